"""Fakes that pass the same contract suites as the real parts, for tests of handlers, sinks and whole pipelines."""

from stationmaster.testing.embedder import ScriptedEmbedder
from stationmaster.testing.observer import RecordingObserver
from stationmaster.testing.sink import Hang, RecordingSink, Slow
from stationmaster.testing.source import MemorySource

__all__ = [
    "Hang",
    "MemorySource",
    "RecordingObserver",
    "RecordingSink",
    "ScriptedEmbedder",
    "Slow",
]
