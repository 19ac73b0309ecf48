"""The life of a batcher: its tasks, and what becomes of everybody who waits when it ends.

Every caller gets a vector or a typed error, whatever happens: what ends a task of the batcher goes through
`Batcher.end`, which answers everybody who waits, at once and without a checkpoint, and closes the intake for good.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from stationmaster.abc import NullObserver
from stationmaster.batcher.admission import estimate_tokens
from stationmaster.batcher.batcher import Batcher
from stationmaster.batcher.policy import BatchPolicy
from stationmaster.errors import ConfigError, plain_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from stationmaster.abc import Embedder, Observer


@asynccontextmanager
async def open_batcher(
    embedder: Embedder,
    *,
    policy: BatchPolicy | None = None,
    observer: Observer | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> AsyncIterator[Batcher]:
    """Open a batcher around a list-in, list-out embedder.

    Args:
        embedder: called with lists of texts, by up to `max_in_flight` tasks at once. What it fails with decides what
            becomes of the rows (see `stationmaster.batcher.courier`).
        policy: when a batch leaves, and all bounds; by default `BatchPolicy()`.
        observer: hears of every call, and of every request if it is `detailed`.
        count_tokens: how many tokens a text has; of use only with the policy's `max_batch_tokens`, and by default
            `estimate_tokens`. Called in the task that submits the text, once, so it should be quick; what it raises is
            that caller's.

    Leaving the block closes the intake, waits up to `grace_s` for what is queued or in flight, and answers the rest
    with BatcherClosedError. Leaving it by an error or a cancellation answers everybody at once. What the embedder
    raises that is no Exception (KeyboardInterrupt, say), and what the observer raises, ends the batcher and leaves
    this block.

    Raises:
        ConfigError: `count_tokens` is given, but the policy has no `max_batch_tokens`.
    """
    policy = policy or BatchPolicy()
    if policy.max_batch_tokens is not None:
        count_tokens = count_tokens or estimate_tokens
    elif count_tokens is not None:
        raise ConfigError(["max_batch_tokens: is needed if tokens are to be counted"])
    batcher = Batcher(
        embedder, policy=policy, observer=observer or NullObserver(), count_tokens=count_tokens
    )
    dispatcher = batcher._dispatcher  # noqa: SLF001 - its own package

    async def guarded(
        part: Callable[[], Awaitable[None]], *, task_status: trio.TaskStatus[None]
    ) -> None:
        task_status.started()  # before its parent runs again the part stands where it waits for work
        try:
            # Whatever cancels the whole stack reaches inner rings through the block's body: they may want to drain, and
            # need answers for that. The shield ends when the body is left.
            with trio.CancelScope(shield=True) as shield:
                shields.append(shield)
                await part()
        except BaseException as error:
            batcher.end(error)
            raise

    shields: list[trio.CancelScope] = []
    with plain_errors():
        async with trio.open_nursery() as nursery:
            for number in range(policy.max_in_flight):
                await nursery.start(guarded, dispatcher.send_rows, name=f"batcher sender {number}")
            await nursery.start(guarded, dispatcher.keep_time, name="batcher timekeeper")
            try:
                yield batcher
                await batcher.drain()
            except BaseException as error:
                batcher.end(error)
                raise
            else:
                batcher.end(None)
            finally:
                for shield in shields:
                    shield.cancel()
