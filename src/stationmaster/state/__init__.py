"""What must not be lost, on one SQLite file: the outbox (batches the target does not take now) and the dead letters."""

from stationmaster.state.outbox import OutboxRows
from stationmaster.state.replay import Replay, open_outbox
from stationmaster.state.store import State, StateStatistics, StoreStatistics, open_state

__all__ = [
    "OutboxRows",
    "Replay",
    "State",
    "StateStatistics",
    "StoreStatistics",
    "open_outbox",
    "open_state",
]
