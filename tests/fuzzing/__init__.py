"""Fuzzing: bytes that nobody foresaw, for everything that reads what others wrote. `python -m tests.fuzzing --help`."""
