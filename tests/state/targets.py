"""A target that answers by a script, for tests of what delivers to it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import attrs
import trio
from trio_util import AsyncValue

from stationmaster.abc import Accepted, TryAgain

if TYPE_CHECKING:
    from collections.abc import Callable

    from stationmaster.abc import UploadAnswer

DOWN = TryAgain(reason="500: down")


@attrs.define(eq=False)
class Target:
    """Each send takes one answer from the left of `script`, else what `by_id` says of the batch, else `otherwise`."""

    script: deque[UploadAnswer] = attrs.field(factory=deque)
    otherwise: UploadAnswer = attrs.field(factory=lambda: Accepted(sent_bytes=3))
    by_id: dict[str, UploadAnswer] = attrs.field(factory=dict)
    seconds: float = 0.0
    on_sent: Callable[[str], None] = lambda _: None
    sent: list[tuple[float, str]] = attrs.field(factory=list, init=False)
    """When (trio's clock) and what, in the order in which sends began."""
    taken: dict[str, bytes] = attrs.field(factory=dict, init=False)
    in_flight: int = attrs.field(default=0, init=False)
    most_in_flight: int = attrs.field(default=0, init=False)
    accepted: AsyncValue[int] = attrs.field(factory=lambda: AsyncValue(0), init=False)
    sends: AsyncValue[int] = attrs.field(factory=lambda: AsyncValue(0), init=False)

    def ids(self) -> list[str]:
        return [batch_id for _, batch_id in self.sent]

    async def send(self, batch_id: str, body: bytes) -> UploadAnswer:
        self.sent.append((trio.current_time(), batch_id))
        self.sends.value = len(self.sent)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.on_sent(batch_id)
        try:
            await trio.sleep(self.seconds)
        finally:
            self.in_flight -= 1
        answer = self.script.popleft() if self.script else self.by_id.get(batch_id, self.otherwise)
        if isinstance(answer, Accepted):
            assert batch_id not in self.taken, "a batch that was accepted came again"
            self.taken[batch_id] = body
            self.accepted.value = len(self.taken)
        return answer
