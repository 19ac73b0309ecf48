"""What this process holds of the machine's memory. Linux."""

import os


def resident_bytes():
    """Return the resident set size."""
    with open("/proc/self/statm", encoding="ascii") as lines:
        return int(lines.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
