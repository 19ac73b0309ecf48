"""How the tests of a contract run: each in a trio of its own, so that no plugin and no setting of pytest matters."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import trio

from stationmaster.errors import plain_errors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Contract:
    """What all contracts share."""

    patience_s: float = 10.0
    """A test that takes longer has failed: for a part that hangs, not for measuring."""


ContractT = TypeVar("ContractT", bound=Contract)
P = ParamSpec("P")


def in_trio(
    test: Callable[Concatenate[ContractT, P], Awaitable[None]],
) -> Callable[Concatenate[ContractT, P], None]:
    """Make a test of an async method."""

    @wraps(test)
    def run(self: ContractT, /, *args: P.args, **kwargs: P.kwargs) -> None:
        async def within_patience() -> None:
            with trio.fail_after(self.patience_s):
                await test(self, *args, **kwargs)

        with plain_errors():  # a failed assertion is told as itself, not as a group of one
            trio.run(within_patience)

    return run
