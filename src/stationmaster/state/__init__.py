"""What must not be lost, on one SQLite file: the outbox (batches the target does not take now) and the dead letters."""
