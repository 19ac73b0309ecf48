"""Child processes that never outlive their parent: their life hangs on the pipe at their standard input."""

from __future__ import annotations

import os
import signal
import sys
import threading


def end_with_parent() -> None:
    """Send this process SIGTERM when its standard input ends: its parent is gone, however it went.

    (The kernel's parent-death signal is no way: it is tied to the parent's thread, and trio's worker threads end.)
    """

    def wait() -> None:
        # The raw descriptor: a thread inside sys.stdin's lock would stop the interpreter from ending.
        while os.read(descriptor, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    descriptor = sys.stdin.fileno()
    threading.Thread(target=wait, name="parent watch", daemon=True).start()
