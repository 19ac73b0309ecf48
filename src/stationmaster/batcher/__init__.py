"""The request batcher: many callers with a text each, few calls to a model server.

    async with open_batcher(embedder) as batcher:
        vector = await batcher.embed(text)

Inside, from the bottom: `callers` and `bulks` (who waits, and the law of waking), `calls`, `rows` and `expiries` (rows
that travel, the queue, kept deadlines), `policy` and `cost` (pure: when a batch leaves, what a call takes), `courier`
(a call and its second chances), `dispatcher` (the standing senders and the timekeeper), `admission` (what is refused),
`batcher` and `statistics` (what callers see), `opening` (the life of it all).
"""

from stationmaster.batcher.admission import estimate_tokens
from stationmaster.batcher.batcher import Batcher
from stationmaster.batcher.opening import open_batcher
from stationmaster.batcher.policy import BatchPolicy, SendReason
from stationmaster.batcher.statistics import BatcherStatistics

__all__ = [
    "BatchPolicy",
    "Batcher",
    "BatcherStatistics",
    "SendReason",
    "estimate_tokens",
    "open_batcher",
]
