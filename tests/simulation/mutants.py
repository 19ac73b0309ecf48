"""Deliberate bugs, each a small change of the real source, and whether the simulation sees them.

A mutant whose line is no longer there fails loudly: it would prove nothing.
"""

from __future__ import annotations
import __future__

import importlib
import inspect
import textwrap
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs

from tests.simulation.watch import BrokenError
from tests.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator


@attrs.frozen
class Mutant:
    """One bug."""

    name: str
    where: str
    """`module:Class.function` in stationmaster."""
    line: str
    """What is changed; it stands there once."""
    instead: str
    seeds: int = 60
    """Within so many it must be found."""
    crash: str = ""
    """The error that shows it, if that is not a broken invariant."""

    @contextmanager
    def at_large(self) -> Iterator[None]:
        """Let the bug be there.

        Raises:
            LookupError: the source has changed.
        """
        module_name, _, path = self.where.partition(":")
        owner: Any = importlib.import_module(f"stationmaster.{module_name}")
        *classes, name = path.split(".")
        for each in classes:
            owner = getattr(owner, each)
        original = inspect.getattr_static(owner, name)
        source = textwrap.dedent(inspect.getsource(original))
        if source.count(self.line) != 1:
            msg = f"{self.name}: {self.where} has {self.line!r} {source.count(self.line)} times"
            raise LookupError(msg)
        changed = source.replace(self.line, self.instead)
        made: dict[str, Any] = {}
        flags = __future__.annotations.compiler_flag
        code = compile(changed, f"<{self.name}>", "exec", flags)
        exec(code, inspect.unwrap(original).__globals__, made)
        setattr(owner, name, made[name])
        try:
            yield
        finally:
            setattr(owner, name, original)


@attrs.frozen(kw_only=True)
class Verdict:
    """Whether a mutant was found, by which seed, and how it showed."""

    mutant: Mutant
    seeds: int
    """Histories that were needed, or tried."""
    symptom: str = ""

    @property
    def found(self) -> bool:
        """Whether it was."""
        return bool(self.symptom)


def hunt(mutant: Mutant) -> Verdict:
    """Let histories pass with this bug until one breaks."""
    with mutant.at_large():
        for seed in range(mutant.seeds):
            try:
                World(seed).run()
            except BaseException as error:
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                if isinstance(error, BrokenError) or type(error).__name__ == mutant.crash:
                    return Verdict(mutant=mutant, seeds=seed + 1, symptom=_words(error))
                if not isinstance(error, Exception):
                    raise
    return Verdict(mutant=mutant, seeds=mutant.seeds)


def _words(error: BaseException) -> str:
    told = error.args[1:2] or error.args[:1]  # the first of an invariant says which seed
    return f"{type(error).__name__}: {told[0] if told else ''}"[:70]


MUTANTS: Final = (
    # core
    Mutant(
        "stale scope",
        "stations.station:Station._serve",
        "if now >= limit or self._cancelled_at < math.inf:",
        "if now >= limit:",
        400,
    ),
    Mutant(
        "unsplit group",
        "stations.station:Station._work",
        "raise rest from None",
        "raise",
        crash="ValueError",
    ),
    Mutant(
        "busy station reaped",
        "stations.registry:Stations._give_up_longest_idle",
        "station_id, station = self._idle.popitem(last=False)",
        "station_id, station = next(iter(self._live.items())); self._idle.pop(station_id, None)",
    ),
    Mutant(
        "deadline of the job before",
        "stations.station:Station._serve",
        "scope.deadline = limit",
        "scope.deadline = max(limit, scope.deadline)",
    ),
    Mutant(
        "stop in a fan-out",
        "stations.registry:Stations.submit",
        "except trio.BrokenResourceError:",
        "except ZeroDivisionError:",
        400,
        crash="BrokenResourceError",
    ),
    Mutant(
        "quorum of too few",
        "collector:Collector._quorum_reached",
        "math.ceil(share - 1e-9)",
        "math.floor(share)",
    ),
    Mutant(
        "batch decided twice",
        "batch_ring:BatchRing._see_through",
        "if collector.closed or self._grace.is_over:",
        "if self._grace.is_over:",
    ),
    Mutant(
        "shields without an end",
        "grace:Grace.draw_in",
        "scope.deadline = min(scope.deadline, self._end)",
        "pass",
    ),
    Mutant(
        "no look for a slot",
        "intake:Intake.has_room",
        "return self.in_flight < self._slots and self.has_bytes(size_bytes)",
        "return True",
    ),
    Mutant(
        "abandoned thread forgotten",
        "threads:ThreadedHandler.__call__",
        "while (earlier := self._abandoned.get(station_id)) is not None:",
        "while (earlier := None) is not None:",
    ),
    Mutant(
        "lane without order",
        "batch_handlers:BatchLanes._take",
        "if not self._ordered:",
        "if True:",
    ),
    Mutant(
        "everybody rejected",
        "stations.registry:Stations.submit",
        "station.send.send_nowait(collecting)",
        "raise trio.WouldBlock",
    ),
    Mutant(
        "polled on in a drain",
        "pipeline:Pipeline.drain",
        "self._polling.cancel()",
        "pass",
    ),
    Mutant(
        "deaf hook",
        "result_hook:HookQueue.put",
        "if size <= self._bytes_left:",
        "if False:",
    ),
    # offsets
    Mutant(
        "commit out of order",
        "offsets:Lease.account",
        "done.pop(pending[0], None)",
        "done.pop(next((at for at in pending if at in done), None), None)",
    ),
    Mutant(
        "commit before upload",
        "batch_ring:BatchRing._see_through",
        "await self._uploader.deliver(report)",
        "self._account(draft); await self._uploader.deliver(report)",
    ),
    Mutant(
        "commit of what was dropped",
        "batch_ring:BatchRing._drop",
        "opened.collector.drop()",
        "opened.collector.drop(); self._account(opened.draft)",
    ),
    Mutant(
        "refused records enclosed",
        "poller:Poller._follow",
        "return offset if generation == record.generation else None",
        "return None",
        200,
    ),
    # rebalance
    Mutant(
        "batch dropped at revoke",
        "batch_ring:BatchRing._is_withdrawn",
        "return all(",
        "return any(",
        200,
    ),
    Mutant(
        "batch of partitions that left",
        "batch_ring:BatchRing.open_batch",
        "if self._is_withdrawn(draft.ranges):",
        "if False:",
    ),
    Mutant(
        "withdrawn a generation late",
        "batch_ring:BatchRing.withdraw",
        "self._gone[topic, partition] = generation",
        "self._gone[topic, partition] = generation - 1",
    ),
    # uploads and outbox
    Mutant(
        "uploaded twice",
        "uploader:Uploader.deliver",
        "if await self._upload(delivery):",
        "if await self._upload(delivery) and delivery.attempts != 2:",
    ),
    Mutant(
        "lost outbox row",
        "state.replay:Replay._failed",
        "partial(self._rows.postpone, row.batch_id, until=until, reason=answer.reason)",
        "partial(self._rows.delete, row.batch_id)",
    ),
    Mutant(
        "outbox's refusal overheard",
        "uploader:Uploader.deliver",
        "await outbox.wait_change()",
        "break",
    ),
    Mutant(
        "rejected row without a letter",
        "state.replay:Replay._rejected",
        "await self._dead_letters.keep([letter])",
        "pass",
    ),
    Mutant(
        "end of a row not written down",
        "state.ledger:Ledger.settle",
        "self.say_blocked(error)",
        "self.say_blocked(error); del self._entries[batch_id]",
        seeds=400,  # one history in fifty shows it
    ),
    # batcher
    Mutant(
        "vectors of the neighbour",
        "batcher.courier:hand_out",
        "vectors[at : at + part.rows]",
        "vectors[at + 1 : at + part.rows] + vectors[at : at + 1]",
    ),
    Mutant(
        "every call failed",
        "batcher.courier:Courier.attempt",
        "vectors = _rows(answer, len(texts))",
        "vectors = _rows(answer, 1 / 0)",
    ),
    Mutant(
        "rows of a busy server lost",
        "batcher.courier:Courier._give_up",
        "self._queue.put_back(call)",
        "pass",
    ),
    Mutant(
        "no pause for a busy server",
        "batcher.dispatcher:Dispatcher._decide",
        "if now < self.courier.paused_until:",
        "if False:",
    ),
    Mutant(
        "second try in a pause",
        "batcher.courier:Courier._may_send_again",
        "if self.paused_until <= now:",
        "if True:",
        200,
    ),
    Mutant(
        "deadline not kept",
        "batcher.dispatcher:Dispatcher.keep_deadline",
        "if instant != inf:",
        "if False:",
    ),
)
"""By part. The first eight that a design should be able to see are among them: stale scope, unsplit group, a busy
station reaped, commit out of order, commit before upload, upload twice, lost outbox row, batch dropped at revoke."""
