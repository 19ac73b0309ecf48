"""Makes inputs: takes seeds that mean something and changes them, now by their structure, now byte by byte.

Everything follows from the seed of one `random.Random`: the same number makes the same input, on every machine.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

Span = tuple[int, int]
"""Begin and end of a part that means something by itself."""

LARGE_BYTES: Final = 16_384
"""Larger seeds are taken once in `_LARGE_EVERY` times: they would take all the time there is."""
_LARGE_EVERY: Final = 1_000
_MOST_BYTES: Final = 4 * 1024 * 1024
_JSON_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[][{},:]|[^][{},:"\s]+')

JSON_VALUES: Final = (
    *(
        b'null true false 0 -0 -0.0 1e-400 18446744073709551615 -9223372036854775808 0.1 1e16 1E+2 7 "" " " "S1" "S2"'
        b' "\\u0000" "\\ud83d\\ude00" "\xe2\x80\xa8" "\xc3\xa9" "\\\\" "\\n" "]" "[[[[" [] {} [[]] {"":{}} {"a":1}'
        b' {"stationId":"S2"} {"stationId":null} {"stationId":"S\\n"} {"stationId":"S5","stationId":7} "stationId"'
        b' "2024-01-01T00:00:00Z" "0001-01-01T00:00:00+23:59" "9999-12-31T23:59:59-23:59" "2016-12-31T23:59:60Z"'
        b' 253402300800000 -62135596800001 1700000000000 "__class__" {"__proto__":[]}'
    ).split(b" "),
    b'"%b"' % (b"x" * 200),
    b"1e" + b"0" * 40,
    b"0." + b"3" * 100,
)
_JSON_SIGNS: Final = (
    *(
        b"[ ] { } , : \" \\ NaN Infinity 1e400 -1e999 18446744073709551616 -9223372036854775809 01 .5 1. /**/ nul '"
        b' "\\ud800" "\\udc00\\ud800" "\xff" "\xed\xa0\x80" "\n" "\\x" "\\u00" \xef\xbb\xbf \xc0 \0'
    ).split(b" "),
    b"9" * 400,
    b"[" * 40,
    b"]" * 40,
)
JSON_WORDS: Final = (*JSON_VALUES * 4, *_JSON_SIGNS)
_MEMBERS: Final = (
    b'"stationId":',
    b'"stationData":',
    b'"timestamp":',
    b'"topic":',
    b'"x":',
    b'"":',
    b'"\\ud800":',
    b'"__class__":',
)


@attrs.frozen
class _Seed:
    text: bytes
    spans: tuple[Span, ...]


@attrs.define(eq=False)
class Maker:
    """Makes inputs of one kind."""

    seeds: Sequence[bytes]
    words: Sequence[bytes]
    """What is put somewhere: values, signs, fragments of the language."""
    find_spans: Callable[[bytes], Sequence[Span]]
    joint: bytes
    """What stands between two parts, where one is doubled."""
    _small: list[_Seed] = attrs.field(init=False)
    _large: list[bytes] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._small = [
            _Seed(seed, tuple(self.find_spans(seed)))
            for seed in self.seeds
            if len(seed) <= LARGE_BYTES
        ]
        self._large = [seed for seed in self.seeds if LARGE_BYTES < len(seed) <= _MOST_BYTES]

    def make(self, rng: Random) -> bytes:
        """Return the next input."""
        if self._large and not rng.randrange(_LARGE_EVERY):
            large = rng.choice(self._large)
            return self._change_bytes(large, rng) if rng.randrange(2) else large
        seed = rng.choice(self._small)
        kind = rng.randrange(20)
        if kind == 0:
            return seed.text
        text = self._change_parts(seed, rng) if kind < 16 else seed.text
        return self._change_bytes(text, rng) if kind > 14 else text

    def change(self, text: bytes, rng: Random) -> bytes:
        """Return an input that is made of another one."""
        if rng.randrange(4):
            return self._change_parts(_Seed(text, tuple(self.find_spans(text))), rng)
        return self._change_bytes(text, rng)

    def _change_parts(self, seed: _Seed, rng: Random) -> bytes:
        """Change one to three parts that do not overlap, from the end on: positions before it stay what they are."""
        if not seed.spans:
            return seed.text
        chosen = sorted((rng.choice(seed.spans) for _ in range(rng.randint(1, 3))), reverse=True)
        text, end = seed.text, len(seed.text)
        for first, last in chosen:
            if last <= end:
                text = text[:first] + self._changed(text[first:last], rng) + text[last:]
                end = first
        return text

    def _changed(self, part: bytes, rng: Random) -> bytes:
        match rng.randrange(10):
            case 0:
                return part + self.joint + part
            case 1 | 2:
                other = rng.choice(self._small)
                first, last = rng.choice(other.spans) if other.spans else (0, len(other.text))
                return other.text[first:last]
            case 3:
                return part + self.joint + rng.choice(self.words)
            case 4:
                levels = rng.choice((1, 2, 5, 29, 30, 31, 300))
                return b"[" * levels + part + b"]" * levels
            case 5 | 6 if part.endswith(b"}"):
                return part[:-1] + b"," + rng.choice(_MEMBERS) + rng.choice(self.words) + b"}"
            case 7 if rng.randrange(4) == 0:
                return b""
            case _:
                return rng.choice(self.words)

    def _change_bytes(self, text: bytes, rng: Random) -> bytes:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            at = rng.randrange(len(text) + 1)
            to = min(len(text), at + rng.choice((0, 1, 1, 2, 8, 64)))
            match rng.randrange(8):
                case 0:
                    text = text[:at] + text[to:]
                case 1:
                    text = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
                case 2:
                    text = text[:at] + rng.randbytes(rng.randint(1, 4)) + text[to:]
                case 3:
                    text = text[:to] + text[at:to] * rng.choice((1, 2, 40)) + text[to:]
                case 4:
                    text = text[:at]
                case 5:
                    text = text[:at] + rng.choice(self._small).text[-rng.randint(1, 64) :]
                case _:
                    text = text[:at] + rng.choice(self.words) + text[to:]
        return text


# --------------------------------------------------------------------------------------------------------------- spans


def json_spans(text: bytes) -> list[Span]:
    """Return every value, as far as the text is JSON."""
    spans: list[Span] = []
    opened: list[int] = []
    for token in _JSON_TOKEN.finditer(text):
        first, last = token.span()
        match text[first:last]:
            case b"[" | b"{":
                opened.append(first)
            case b"]" | b"}" if opened:
                spans.append((opened.pop(), last))
            case b":" if spans:
                spans.pop()  # it was a key
            case b",":
                pass
            case _:
                spans.append((first, last))
    return spans


def line_spans(text: bytes) -> list[Span]:
    """Return every line, and what stands behind an equals sign or a colon in it."""
    spans: list[Span] = []
    first = 0
    for line in text.split(b"\n"):
        last = first + len(line)
        spans.append((first, last))
        spans += [(first + sign.end(), last) for sign in re.finditer(rb"[=:] *", line)]
        first = last + 1
    return spans


def word_spans(text: bytes) -> list[Span]:
    """Return every word, number and sign."""
    return [found.span() for found in re.finditer(rb"\w+|[^\w\s]+|\s+", text)]
