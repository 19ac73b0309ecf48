"""A sink in memory that answers by a script."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, TypeAlias

import attrs
import trio
from trio_util import AsyncValue

from stationmaster.abc import Accepted, UploadAnswer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stationmaster.batch import BatchReport


@attrs.frozen
class Hang:
    """Never answer."""

    keeps: bool = False
    """The target took the batch all the same: the answer is what was lost."""


@attrs.frozen
class Slow:
    """Answer after a while; cancelled meanwhile, the batch did not arrive."""

    seconds: float
    answer: UploadAnswer = attrs.field(factory=Accepted)


Step: TypeAlias = UploadAnswer | Hang | Slow | BaseException
"""What one upload meets; an exception is raised: a sink with a bug."""


def _steps(steps: Iterable[Step]) -> deque[Step]:
    return deque(steps)


@attrs.define(eq=False)
class RecordingSink:
    """Keeps what it accepts: the first report of every batch id, however often it is delivered.

    Each upload takes one step from the left of `script`; when that is empty, `otherwise` counts. For tests: it grows
    without bound.
    """

    script: deque[Step] = attrs.field(factory=deque, converter=_steps)
    otherwise: Step = attrs.field(factory=Accepted)
    reports: dict[str, BatchReport] = attrs.field(factory=dict, init=False)
    """Batch id -> the report that was accepted first."""
    attempts: list[BatchReport] = attrs.field(factory=list, init=False)
    """Every report that was ever given to it, in order."""
    deliveries: Counter[str] = attrs.field(factory=Counter, init=False)
    """Batch id -> how often it was accepted: more than once means delivered again, not kept again."""
    accepted: AsyncValue[int] = attrs.field(factory=lambda: AsyncValue(0), init=False)
    """How many batches it keeps; to wait for: `await sink.accepted.wait_value(3)`."""

    async def upload(self, report: BatchReport, /) -> UploadAnswer:
        """Do what the script says."""
        self.attempts.append(report)
        step = self.script.popleft() if self.script else self.otherwise
        if isinstance(step, Hang):
            if step.keeps:
                self._keep(report)
            await trio.sleep_forever()
        if isinstance(step, Slow):
            await trio.sleep(step.seconds)
            step = step.answer
        else:
            await trio.lowlevel.checkpoint()
        if isinstance(step, BaseException):
            raise step
        if isinstance(step, Accepted):
            self._keep(report)
        return step

    def _keep(self, report: BatchReport) -> None:
        batch_id = report.batch.batch_id
        self.deliveries[batch_id] += 1
        self.reports.setdefault(batch_id, report)
        self.accepted.value = len(self.reports)
