"""What both tables have in common: how much they hold, whether more fits, and how long words may be. Pure."""

from __future__ import annotations

from typing import Final

import attrs

from stationmaster.errors import StoreError

WORDS_BYTES: Final = 2048
"""Longer words of an error or an answer are cut."""


@attrs.frozen(kw_only=True)
class Tally:
    """How much a table holds."""

    rows: int = 0
    bytes: int = 0
    oldest_at: float | None = None
    """Wall clock, seconds since the epoch; None when it is empty."""


def check_room(store: str, tally: Tally, size: int, *, max_bytes: int) -> None:
    """Let `size` more bytes pass if they fit, or if the table is empty: none is so large that it blocks for ever.

    Raises:
        StoreError: they do not fit.
    """
    if tally.rows and tally.bytes + size > max_bytes:
        raise StoreError(
            f"the {store} is full: {tally.rows} rows, {tally.bytes} of {max_bytes} bytes, "
            f"{size} more do not fit",
            kind="full",
        )


def shortened(words: str) -> str:
    """Return the words as legal UTF-8 of at most 2 KiB."""
    return legal(words).encode()[:WORDS_BYTES].decode("utf-8", "ignore")


def legal(text: str) -> str:
    """Return a text from anywhere without the lone surrogates that no file can hold."""
    return text.encode("utf-8", "backslashreplace").decode()
