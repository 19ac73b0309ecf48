"""The words of HTTP that sinks and embedders share: secrets, `Retry-After`, and what an error answer says. Pure."""

from __future__ import annotations

import re
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

ERROR_BODY_BYTES = 16 * 1024
"""What is read of an answer whose body does not decide anything. Servers echo whole requests in their errors."""
ERROR_TEXT_CHARS = 300
MAX_RETRY_AFTER_S = 3600.0


def bearer(secret: str) -> dict[str, str]:
    """Return the header that shows a secret to the server.

    Raises:
        ValueError: it is empty or has characters that no header can hold (a newline at its end, say).
    """
    if not secret or not all("!" <= char <= "~" for char in secret):
        raise ValueError(
            "a secret must be visible ASCII characters; is there a blank or a newline in its file?"
        )
    return {"Authorization": f"Bearer {secret}"}


def parse_retry_after(value: str | None, *, now: float) -> float | None:
    """Return how many seconds a `Retry-After` header asks to wait; None if it does not say, or not in a legal way.

    Args:
        value: seconds, or an HTTP date.
        now: seconds since the epoch, for the date.

    Returns:
        0 to `MAX_RETRY_AFTER_S`.
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        seconds = float(text)
    else:
        try:
            date = parsedate_to_datetime(text)
            seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now
        except (ValueError, OverflowError, TypeError, IndexError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def error_text(body: bytes, *, secret: str | None = None) -> str:
    """Return the words of an error body, for people: one line, printable, at most `ERROR_TEXT_CHARS` characters.

    Reads `{"error": {"message": ...}}`, `{"error": ...}`, `{"detail": ...}`, `{"message": ...}` and plain text, of the
    first 16 KiB.
    """
    body = body[:ERROR_BODY_BYTES]
    try:
        words: Any = orjson.loads(body)
        for name in ("error", "detail", "message"):
            if isinstance(words, dict) and words.get(name):
                words = words[name]
        text = words if isinstance(words, str) else orjson.dumps(words).decode()
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):  # more nesting than it writes: 254
        text = body.decode("utf-8", "backslashreplace")
    text = hide(text, secret).strip()[:ERROR_TEXT_CHARS]
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return shown[:ERROR_TEXT_CHARS]


def hide(text: str, secret: str | None) -> str:
    """Return the text without the secret: servers quote what they refuse."""
    return text.replace(secret, "***") if secret else text
