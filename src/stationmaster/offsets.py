"""Which offset may be committed: the contiguous prefix of accounted records of one assigned partition. Pure.

Rules:
1. Offsets are handed out in growing order; gaps between them (compaction, transaction markers) are normal, therefore
   the prefix runs over what was handed out, not over the integers.
2. A range is accounted once, in any order; the watermark moves only over a prefix without a hole.
3. The watermark never moves backwards.

`hand_out` may run in one thread and `account` in another: each touches its own end of a deque.
"""

from __future__ import annotations

from collections import deque

import attrs


@attrs.define(eq=False)
class Lease:
    """One assignment of one partition to this process."""

    topic: str
    partition: int
    generation: int
    watermark: int | None = None
    """The next offset to read after everything accounted (what Kafka calls the committed offset); None: nothing yet."""
    _pending: deque[int] = attrs.field(factory=deque, init=False)
    _done: dict[int, int] = attrs.field(factory=dict, init=False)

    def hand_out(self, offset: int) -> None:
        """Take note that a record was given to the pipeline."""
        self._pending.append(offset)

    def account(self, first: int, last: int) -> bool:
        """Take note that `first` to `last` are accounted for; return whether the watermark moved."""
        done, pending = self._done, self._pending
        done[first] = last
        moved = False
        while pending and (end := done.pop(pending[0], None)) is not None:
            while pending and pending[0] <= end:
                # A range may enclose a record that was accounted for on its own (a dead letter in a poll).
                done.pop(pending.popleft(), None)
            self.watermark = end + 1
            moved = True
        return moved

    def give_back(self, offset: int) -> None:
        """Take note that nobody will work on the last record that was handed out; any other one is kept."""
        if self._pending and self._pending[-1] == offset:
            self._pending.pop()

    @property
    def outstanding(self) -> int:
        """Records that were handed out, were not given back, and are not below the watermark."""
        return len(self._pending)
