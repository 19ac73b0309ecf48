"""Fakes that pass the same contract suites as the real parts, for tests of handlers, sinks and whole pipelines."""

from stationmaster.testing.observer import RecordingObserver

__all__ = ["RecordingObserver"]
