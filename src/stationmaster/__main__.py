"""`python -m stationmaster` and the `stationmaster` command."""

from __future__ import annotations

import faulthandler
import sys


def main() -> None:
    """Run the command line; say what to install if the service's packages are missing."""
    faulthandler.enable()  # the watchdog's SIGABRT then says in the log where every thread stood
    try:
        from stationmaster.service.cli import run_command_line  # noqa: PLC0415 - the library works without them
    except ModuleNotFoundError as error:
        sys.exit(
            f"stationmaster: {error}; the command needs the extra: pip install 'stationmaster[service]'"
        )
    sys.exit(run_command_line())


if __name__ == "__main__":
    main()
