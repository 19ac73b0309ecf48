"""Runs a target for a number of inputs: counts verdicts, watches time and memory, keeps what shows a bug."""

from __future__ import annotations

import base64
import gc
import hashlib
import os
import signal
import time
import traceback
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

import attrs

from tests.fuzzing import outbox, pipeline
from tests.fuzzing.seeds import maker_of
from tests.fuzzing.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

LIMIT_S: Final = 120.0
"""A chunk of inputs that takes longer is a bug as well; on a busy machine, too."""
GROWTH_BYTES: Final = 64 * 1024 * 1024
"""More memory than at a tenth of the run, at its end, is a bug as well."""
_MOST_BUGS: Final = 10
_TOGETHER: Final = 20
"""Inputs of one look at the clock, where each is a matter of microseconds."""
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def _one_by_one(target: Callable[[bytes], str], inputs: Sequence[bytes]) -> Counter[str]:
    return Counter(map(target, inputs))


RUNNERS: Final[dict[str, tuple[Callable[[Sequence[bytes]], Counter[str]], int]]] = {
    **{name: (partial(_one_by_one, target), _TOGETHER) for name, target in TARGETS.items()},
    "outbox": (outbox.run_outbox, outbox.CHUNK),
    "pipeline": (pipeline.run_pipeline, pipeline.CHUNK),
}
"""Target -> what takes its inputs, and how many at a time."""


@attrs.define(eq=False)
class Tally:
    """What a run saw."""

    inputs: int = 0
    input_bytes: int = 0
    verdicts: Counter[str] = attrs.field(factory=Counter)
    bugs: list[Path] = attrs.field(factory=list)
    """Files with inputs that show one."""
    slowest_s: float = 0.0
    rss_early: int = 0
    """Bytes of memory at a tenth of the run."""
    rss: int = 0

    @property
    def grew(self) -> bool:
        """Whether memory is not flat."""
        return self.rss - self.rss_early > GROWTH_BYTES


def make_inputs(target: str, seed: int, first: int, count: int) -> list[bytes]:
    """Return inputs number `first` and so on: the same ones whenever they are asked for."""
    maker, rng = maker_of(target), Random(0)
    made: list[bytes] = []
    for number in range(first, first + count):
        rng.seed((seed << 80) | (zlib.crc32(target.encode()) << 48) | number)
        made.append(maker.make(rng))
    return made


def resident_bytes() -> int:
    """Return how much memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def run_target(
    target: str, *, inputs: int, seed: int, folder: Path, tell: Callable[[str], None]
) -> Tally:
    """Give a target `inputs` inputs; stop early after ten that show a bug.

    Args:
        folder: for the inputs that show one.
        tell: gets a line at the start and after every tenth.
    """
    run, chunk = RUNNERS[target]
    tally = Tally()
    began = time.monotonic()
    tenth = max(1, inputs // 10)
    tell(f"{target}: {inputs} inputs, seed {seed}, {resident_bytes() / 1e6:.0f} MB")
    while tally.inputs < inputs and len(tally.bugs) < _MOST_BUGS:
        made = make_inputs(target, seed, tally.inputs, min(chunk, inputs - tally.inputs))
        try:
            started = time.perf_counter()
            with _limited():
                tally.verdicts += run(made)
            tally.slowest_s = max(tally.slowest_s, time.perf_counter() - started)
        except Exception:  # noqa: BLE001 - whatever it is, it is what this was written to find
            tally.bugs.append(write_bug(target, made, folder=folder, tell=tell))
            tally.verdicts["BUG"] += 1
        before = tally.inputs // tenth
        tally.inputs += len(made)
        tally.input_bytes += sum(map(len, made))
        if tally.inputs // tenth > before:
            gc.collect()
            tally.rss = resident_bytes()
            tally.rss_early = tally.rss_early or tally.rss
            rate = tally.inputs / (time.monotonic() - began)
            tell(
                f"{target}: {100 * tally.inputs // inputs:3} %, {tally.rss / 1e6:.0f} MB,"
                f" {rate:.0f}/s, bugs {len(tally.bugs)}"
            )
    seconds = time.monotonic() - began
    verdicts = ", ".join(f"{name} {count}" for name, count in tally.verdicts.most_common())
    tell(
        f"{target}: {tally.inputs} inputs of {tally.input_bytes / 1e6:.0f} MB in {seconds:.0f} s,"
        f" slowest {chunk} {tally.slowest_s:.2f} s; {verdicts}"
    )
    if tally.grew:
        tell(f"{target}: memory grew from {tally.rss_early / 1e6:.0f} to {tally.rss / 1e6:.0f} MB")
    return tally


@contextmanager
def _limited() -> Iterator[None]:
    """Break off what hangs."""

    def too_long(number: int, frame: object) -> None:
        raise TimeoutError(f"took longer than {LIMIT_S:g} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------------------- bugs


def write_bug(
    target: str, inputs: Sequence[bytes], *, folder: Path, tell: Callable[[str], None]
) -> Path:
    """Write down the inputs that show a bug, as few as are needed for it, and how to see it again.

    Called where its exception is handled.
    """
    tell(traceback.format_exc())
    needed = _fewest(RUNNERS[target][0], inputs)
    lines = b"".join(base64.b64encode(each) + b"\n" for each in needed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{target}-{hashlib.sha256(lines).hexdigest()[:12]}.b64"
    path.write_bytes(lines)
    shown = f"{needed[0][:200]!r}" if len(needed) == 1 else f"{len(needed)} inputs together"
    tell(
        f"{target}: a bug: {shown}\n    again: python -m tests.fuzzing --target {target} --file {path}"
    )
    return path


def _fewest(run: Callable[[Sequence[bytes]], object], inputs: Sequence[bytes]) -> Sequence[bytes]:
    """Return inputs that still show a bug: halves are left out as long as the rest shows one."""
    size = len(inputs)
    while size > 1:
        size = (size + 1) // 2
        first = 0
        while first < len(inputs) and len(inputs) > 1:
            rest = [*inputs[:first], *inputs[first + size :]]
            if rest and _fails(run, rest):
                inputs = rest
            else:
                first += size
    return inputs


def _fails(run: Callable[[Sequence[bytes]], object], inputs: Sequence[bytes]) -> bool:
    try:
        with _limited():
            run(inputs)
    except Exception:  # noqa: BLE001 - the same one or another: either is to be mended
        return True
    return False


def replay(target: str, path: Path) -> Counter[str]:
    """Give a target the inputs that a file holds; raises what they show."""
    inputs = [base64.b64decode(line) for line in path.read_bytes().splitlines()]
    return RUNNERS[target][0](inputs)


def tell_at_once(line: str) -> None:
    print(line, flush=True)
