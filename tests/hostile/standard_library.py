"""Python's own `json` in the place of orjson: what the parser would be with another JSON library.

`StandardJson` has what `stationmaster.messages` uses of orjson, with the same contract (RFC 8259 and nothing else, all
numbers finite, all texts whole), kept by other means. It is as slow as it is plain.

What JSON libraries differ in, and who decides it here:

    nesting                  the parser, from the bytes, before anything is read
    integers beyond 64 bits  the parser: a scan of the bytes; a library may read them, make reals of them, or refuse
    NaN, 1e400, a mark of    a library must refuse them, and the parser says which it was; half a character also where a
    byte order, half a char  later key hides it
    equal keys               the last one counts, in both; RFC 8259 leaves it open, so the corpus holds it
    texts of real numbers    the library: `Limits.readings_bytes` is exact but for two characters a number
"""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from stationmaster import messages
from stationmaster.batch import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stationmaster.batch import Message

_LARGEST_MANTISSA_DIGITS = 4_000


class StandardJson:
    """Has the names that the parser uses."""

    JSONDecodeError = ValueError

    @staticmethod
    def loads(value: bytes) -> Any:
        """Read JSON; ValueError for anything that is none."""
        if value.startswith(b"\xef\xbb\xbf"):
            raise ValueError("a byte order mark")
        document = json.loads(
            value.decode(),
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_constant,
            object_pairs_hook=_members,
        )
        _be_whole(document)
        return document

    @staticmethod
    def dumps(value: object) -> bytes:
        """Write compact JSON."""
        return json.dumps(
            value, ensure_ascii=False, separators=(",", ":"), allow_nan=False
        ).encode()


def _integer(digits: str) -> int | float:
    # As orjson does: the parser must not count on a library that reads large integers, nor on one that refuses them.
    if len(digits) > _LARGEST_MANTISSA_DIGITS or not -(2**63) <= int(digits) < 2**64:
        return _real(digits)
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"beyond a double: {digits[:24]}")
    return number


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object, in which the last of equal keys counts; what the others hide must be whole all the same."""
    _be_whole(pairs)
    return dict(pairs)


def _be_whole(value: object) -> None:
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, list | tuple):
        for item in value:
            _be_whole(item)


@contextmanager
def another_library() -> Iterator[None]:
    """Let the parser read and write with the standard library in the block."""
    with mock.patch.object(messages, "orjson", StandardJson):
        yield


def essence(parsed: Message | Refusal) -> tuple[object, ...]:
    """Return what must be the same with every library: all but the words of a refusal; types of numbers count."""
    if isinstance(parsed, Refusal):
        return ("refused", parsed.reason)
    return ("accepted", repr(parsed), repr(parsed.fields))
