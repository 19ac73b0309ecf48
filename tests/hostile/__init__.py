"""Hostile Kafka messages of our own making, each with what must become of it."""
