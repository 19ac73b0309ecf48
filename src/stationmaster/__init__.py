"""Every batch leaves on time: station telemetry, run concurrently under a deadline, uploaded as one list per batch."""

__version__ = "0.1.0"
