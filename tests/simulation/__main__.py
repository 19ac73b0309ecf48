"""`python -m tests.simulation`. The command stands elsewhere: processes that are spawned cannot import this file."""

import sys

from tests.simulation.command import main

sys.exit(main())
