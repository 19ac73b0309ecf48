"""An embedder that follows a script, for tests of whatever stands before a model server."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import attrs
import trio

from stationmaster.errors import RowRejectedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stationmaster.abc import Vector

Step: TypeAlias = BaseException | Callable[[Sequence[str]], Awaitable[Sequence["Vector"]]] | None
"""What a call does instead of answering: raise this after the usual time, or await this; None answers as usual."""


async def hang(texts: Sequence[str]) -> Sequence[Vector]:
    """Be a script's step that never answers."""
    del texts
    await trio.sleep_forever()


@attrs.define(eq=False)
class ScriptedEmbedder:
    """An Embedder whose vectors follow from the texts alone, and whose time and failures are told beforehand.

    Without a script it answers every call after `seconds_per_call + seconds_per_text x texts`.
    """

    dimensions: int = 4
    seconds_per_call: float = 0.0
    seconds_per_text: float = 0.0
    script: Iterable[Step] = ()
    """One step per call, in the order in which calls begin; afterwards calls are answered."""
    refuses: Callable[[str], bool] = lambda text: False  # noqa: ARG005
    """A call with a text of which this is true fails with RowRejectedError, like a server that answers 400."""
    calls: list[tuple[str, ...]] = attrs.field(factory=list, init=False)
    """The texts of every call, in the order in which calls began (it grows without bound)."""
    began: list[float] = attrs.field(factory=list, init=False)
    """When, on trio's clock."""
    in_flight: int = attrs.field(default=0, init=False)
    most_in_flight: int = attrs.field(default=0, init=False)
    cancelled: int = attrs.field(default=0, init=False)
    """Calls that were given up by their callers."""
    _steps: Iterator[Step] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._steps = iter(self.script)

    def vector(self, text: str) -> list[float]:
        """Return the text's vector: numbers between -1 and 1, equal for equal texts, on every machine."""
        digest = hashlib.shake_256(text.encode()).digest(4 * self.dimensions)
        return [number / 2**31 for number in struct.unpack(f"<{self.dimensions}i", digest)]

    async def embed(self, texts: Sequence[str], /) -> Sequence[Vector]:
        """Do the script's next step with these texts."""
        if not texts or not all(texts):
            raise ValueError(
                f"an embedder takes at least one text and no empty ones, not {texts!r}"
            )
        self.calls.append(tuple(texts))
        self.began.append(trio.current_time())
        step = next(self._steps, None)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if step is not None and not isinstance(step, BaseException):
                return await step(texts)
            await trio.sleep(self.seconds_per_call + self.seconds_per_text * len(texts))
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        if step is not None:
            raise step
        refused = [text for text in texts if self.refuses(text)]
        if refused:
            raise RowRejectedError(f"400: cannot embed {refused[0]!r}")
        return [self.vector(text) for text in texts]
