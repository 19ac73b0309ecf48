"""Fakes that pass the same contract suites as the real parts, for tests of handlers, sinks and whole pipelines."""

from stationmaster.testing.embedder import ScriptedEmbedder
from stationmaster.testing.observer import RecordingObserver
from stationmaster.testing.sink import Hang, RecordingSink, Slow
from stationmaster.testing.source import MemorySource
from stationmaster.testing.state import Disk, MemoryDeadLetters, MemoryOutboxRows

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
]
