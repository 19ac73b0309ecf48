"""A module that cannot be imported."""

UNREACHABLE = 1 / 0
