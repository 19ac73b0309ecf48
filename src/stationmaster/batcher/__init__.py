"""The request batcher: many callers with a text each, few calls to a model server.

    async with open_batcher(embedder) as batcher:
        vector = await batcher.embed(text)

Inside, from the bottom: `callers` (who waits, and the law of waking), `rows` (the queue, the calls, kept deadlines),
`policy` and `cost` (pure: when a batch leaves, what a call takes), `courier` (a call and its second chances),
`dispatcher` (the standing senders and the timekeeper), `batcher` (what callers see).
"""

from stationmaster.batcher.batcher import Batcher, BatcherStatistics, open_batcher
from stationmaster.batcher.policy import BatchPolicy, SendReason

__all__ = ["BatchPolicy", "Batcher", "BatcherStatistics", "SendReason", "open_batcher"]
