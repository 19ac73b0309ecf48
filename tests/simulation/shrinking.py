"""The smallest set of fault kinds with which a seed still breaks: taking any one away heals it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.dice import ALL
from tests.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from tests.simulation.dice import Fault


def breaks(seed: int, faults: Collection[Fault]) -> bool:
    """Tell whether this history breaks."""
    try:
        World(seed, faults=faults).run()
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - whatever it is: the seed is known to be bad
        return True
    return False


def shrink(
    seed: int, *, still: Callable[[int, Collection[Fault]], bool] = breaks
) -> frozenset[Fault]:
    """Return the smallest set; empty if it breaks without any fault. Halves are tried before single kinds.

    Args:
        seed: breaks with all of them.
        still: tells whether it breaks with these.
    """
    kept = sorted(ALL, key=lambda fault: fault.value)
    size = len(kept) // 2
    while size:
        at = 0
        while at < len(kept):
            without = kept[:at] + kept[at + size :]
            if still(seed, without):
                kept = without
            else:
                at += size
        size //= 2
        if (
            not size
            and len(kept) > 1
            and any(still(seed, [f for f in kept if f is not g]) for g in kept)
        ):
            size = 1  # one that was needed may not be any more
    return frozenset(kept)
