"""Fakes that pass the same contract suites as the real parts, for tests of handlers, sinks and whole pipelines.

Beside them: `stationmaster.testing.server`, an HTTP server that answers by a script, and
`stationmaster.testing.contracts`, the contract suites themselves (they need pytest).
"""

from stationmaster.testing.embedder import ScriptedEmbedder
from stationmaster.testing.observer import RecordingObserver
from stationmaster.testing.running import run_batch
from stationmaster.testing.sink import Hang, RecordingSink, Slow
from stationmaster.testing.source import MemorySource
from stationmaster.testing.state import Disk, MemoryDeadLetters, MemoryOutboxRows
from stationmaster.testing.telemetry import station_input, telemetry

__all__ = [
    "Disk",
    "Hang",
    "MemoryDeadLetters",
    "MemoryOutboxRows",
    "MemorySource",
    "RecordingObserver",
    "RecordingSink",
    "ScriptedEmbedder",
    "Slow",
    "run_batch",
    "station_input",
    "telemetry",
]
