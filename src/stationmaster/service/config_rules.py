"""What a configuration value may be: rules that ride on its type, secrets, and how TOML writes a value.

A type such as `Seconds` is `Annotated[float, Rule(...)]`: the converter reads the plain type strictly, then asks the
rule. A rule lists every complaint instead of raising the first, so that all faults of a file can be told at once.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, time
from typing import Annotated, Any, Final, TypeAlias
from urllib.parse import urlsplit

import attrs

_MOST_SECONDS: Final = 86_400
_MOST_BYTES: Final = 2**40
_MOST_COUNT: Final = 1_000_000
_MOST_NESTING: Final = 32
_MOST_CHARS: Final = 1_024
_MOST_URLS: Final = 64
_SHOWN_CHARS: Final = 60
_URL_CHARACTERS: Final = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")
_HOST_AND_PORT: Final = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?")
_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")
_HANDLER: Final = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")
BUILT_IN_HANDLERS: Final = ("embed", "embed_batch")
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_SECRET_NAME: Final = re.compile(
    r"(?:^|[._-])(?:password|passphrase|secret|token|api_?key|private_?key|key\.pem)$",
    re.IGNORECASE,
)

# ---------------------------------------------------------------------------------------------------------- secrets


class Secret:
    """A text that is not shown by accident: not by `repr`, `str` or `attrs.asdict`. Equal to itself only."""

    __slots__ = ("_text",)

    def __init__(self, text: str, /) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself: only for where it is sent."""
        return self._text


def is_secret_name(name: str) -> bool:
    """Tell whether an option of this name (`sasl.password`) holds a secret."""
    return _SECRET_NAME.search(name) is not None


# -------------------------------------------------------------------------------------------------- TOML, and words


def toml_key(name: str) -> str:
    """Return a key as TOML writes it: quoted unless it is a bare one."""
    return name if _BARE_KEY.fullmatch(name) else _quoted(name)


def toml_text(value: object) -> str:
    """Return a value as TOML, on one line and without control characters."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _quoted(value)
        case date() | time():  # a datetime is a date
            return value.isoformat()
        case list() | tuple():
            return f"[{', '.join(map(toml_text, value))}]"
        case Mapping():
            pairs = [f"{toml_key(key)} = {toml_text(inner)}" for key, inner in value.items()]
            return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
        case _:
            return repr(value)  # the two number types: Python writes them as TOML does


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{printable(escaped)}"'


def printable(text: str) -> str:
    """Return the text with everything escaped that could break the line or steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else _escaped(ord(character)) for character in text
    )


def _escaped(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x1_0000 else f"\\U{code:08x}"


def shown(value: object) -> str:
    """Return a single value for a message: as TOML writes it, cut short."""
    if _is_huge(value):
        return "an integer beyond 64 bits"
    if type(value) is str and len(value) > _SHOWN_CHARS:
        return f"{toml_text(value[:_SHOWN_CHARS])}..."
    return toml_text(value)


def _is_huge(value: object) -> bool:
    return type(value) is int and value.bit_length() > 63


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def figure(number: float) -> str:
    """Return a number for a message: -1 also where it was made a -1.0."""
    return f"{number:.16g}" if type(number) is float else shown(number)


def misfit(value: object) -> str:
    """Say what sort of value stands where another was expected: `"7" is a string`."""
    if isinstance(value, list | dict):
        return f"is {_kind(value)}"
    return f"{shown(value)} is {_kind(value)}"


def _kind(value: object) -> str:
    kinds: Mapping[type, str] = {
        bool: "a boolean",
        int: "a whole number",
        float: "a number with a fraction",
        str: "a string",
        list: "a list",
        dict: "a table",
    }
    return kinds.get(type(value), "a date or time")


# ------------------------------------------------------------------------------------------------------------ rules


@attrs.frozen
class Complaint:
    """What is wrong with a value, and what is expected instead."""

    wrong: str
    expected: str
    where: str = ""
    """Which part of the value: `[2]` or `."linger.ms"`; empty for the whole."""


class UnfitError(Exception):
    """A value does not fit its type; every complaint about it."""

    def __init__(self, *complaints: Complaint) -> None:
        self.complaints = complaints
        super().__init__(*complaints)


@attrs.frozen
class Rule:
    """What else a value of the right type has to be."""

    expected: str
    complaints: Callable[[Any], Iterable[Complaint]]


def _number(
    noun: str, *, most: float, least: float | None = None, above: float | None = None
) -> Rule:
    low = f">= {least}" if least is not None else f"> {above}"
    expected = f"{noun} {low} and <= {most}"

    def complaints(value: float) -> Iterator[Complaint]:
        # Asked so that NaN is out of range, and integers of any length are compared as they are.
        high_enough = value >= least if least is not None else above is not None and value > above
        if not (high_enough and value <= most):
            yield Complaint(f"{figure(value)} is out of range", expected)

    return Rule(expected, complaints)


def _text(expected: str, wrong: Callable[[str], str]) -> Rule:
    """Make a rule for texts: `wrong` says what is wrong with one, or nothing."""

    def complaints(value: str) -> Iterator[Complaint]:
        fault = (
            "is empty"
            if not value.strip()
            else f"has more than {_MOST_CHARS} characters"
            if len(value) > _MOST_CHARS
            else "holds characters that cannot be printed"
            if not value.isprintable()
            else wrong(value)
        )
        if fault:
            yield Complaint(fault, expected)

    return Rule(expected, complaints)


def _matching(expected: str, pattern: re.Pattern[str]) -> Rule:
    return _text(
        expected,
        lambda value: "" if pattern.fullmatch(value) else f"{shown(value)} is not of this form",
    )


def _wrong_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is no URL"
    # Never shown: it may hold a password, or a signature in its query.
    if "@" in parts.netloc:
        return "holds a user name or password"
    if not _URL_CHARACTERS.fullmatch(url):
        return "holds characters that a URL cannot have"
    if parts.scheme not in {"http", "https"}:
        return "does not begin with http:// or https://"
    if not parts.hostname or port == 0:
        return "names no host and port"
    try:
        parts.hostname.encode("idna")
    except UnicodeError:
        return "names a host that can never be looked up"
    return "has a fragment" if "#" in url else ""


def _wrong_base_url(url: str) -> str:
    return _wrong_url(url) or ("has a query" if "?" in url else "")


def _wrong_servers(servers: str) -> str:
    for server in servers.split(","):
        match = _HOST_AND_PORT.fullmatch(server.strip())
        if match is None or not 1 <= int(match[1]) <= 65_535:
            return f"{shown(server)} is no host:port"
    return ""


def _several(expected: str, *, most: int | None = None, least: int = 0) -> Rule:
    def complaints(values: tuple[object, ...]) -> Iterator[Complaint]:
        if len(values) < least:
            yield Complaint("is empty", expected)
        if most is not None and len(values) > most:
            yield Complaint(f"has {len(values)} entries", expected)
        known: set[object] = set()
        for index, value in enumerate(values):
            if value in known:
                yield Complaint("stands in the list twice", expected, f"[{index}]")
            known.add(value)

    return Rule(expected, complaints)


def _free_table(expected: str) -> Rule:
    def complaints(table: Mapping[str, object]) -> Iterator[Complaint]:
        waiting: list[tuple[object, int]] = [(table, 0)]
        while waiting:  # no recursion: one line of dotted keys can nest thousands of tables
            value, depth = waiting.pop()
            if _is_huge(value):
                yield Complaint("holds an integer beyond 64 bits", expected)
            elif isinstance(value, list | Mapping):
                if depth == _MOST_NESTING:
                    yield Complaint(f"is nested deeper than {_MOST_NESTING}", expected)
                    return
                inner = value.values() if isinstance(value, Mapping) else value
                waiting.extend((item, depth + 1) for item in inner)

    return Rule(expected, complaints)


def _kafka_options() -> Rule:
    scalar = "a string, number or boolean"

    def complaints(options: Mapping[str, object]) -> Iterator[Complaint]:
        for name, value in options.items():
            where = f".{toml_key(name)}"
            if name in {"enable.auto.commit", "enable.auto.offset.store"}:
                yield Complaint(
                    "cannot be set",
                    "that it is left out: offsets are committed only after their batch is accounted for",
                    where,
                )
            elif type(value) not in {str, int, float, bool} or _is_huge(value):
                yield Complaint(misfit(value), scalar, where)

    return Rule("a table of librdkafka's own keys", complaints)


Seconds: TypeAlias = Annotated[float, _number("a number of seconds", above=0, most=_MOST_SECONDS)]
SecondsOrZero: TypeAlias = Annotated[
    float, _number("a number of seconds", least=0, most=_MOST_SECONDS)
]
Share: TypeAlias = Annotated[float, _number("a share", above=0, most=1)]
ShareOrZero: TypeAlias = Annotated[float, _number("a share", least=0, most=1)]
Count: TypeAlias = Annotated[int, _number("a whole number", least=1, most=_MOST_COUNT)]
CountOrZero: TypeAlias = Annotated[int, _number("a whole number", least=0, most=_MOST_COUNT)]
Depth: TypeAlias = Annotated[int, _number("a whole number", least=1, most=256)]
Bytes: TypeAlias = Annotated[int, _number("a whole number of bytes", least=1, most=_MOST_BYTES)]
Status: TypeAlias = Annotated[int, _number("an HTTP status code", least=400, most=599)]
Name: TypeAlias = Annotated[
    str, _text(f"a text of at most {_MOST_CHARS} printable characters", lambda _: "")
]
PathText: TypeAlias = Annotated[str, _text("the path of a file", lambda _: "")]
Topic: TypeAlias = Annotated[
    str, _matching("a topic's name (letters, digits, '.', '_', '-'; at most 249)", _TOPIC)
]
Port: TypeAlias = Annotated[int, _number("a TCP port, 0 for any free one", least=0, most=65_535)]
Host: TypeAlias = Annotated[
    str,
    _text(
        "an address or a host's name",
        lambda value: "" if _HOST.fullmatch(value) else f"{shown(value)} is none",
    ),
]
StationId: TypeAlias = Annotated[
    str, _text(f"a station's id of at most {_MOST_CHARS} printable characters", lambda _: "")
]
Roster: TypeAlias = Annotated[
    tuple[StationId, ...], _several("a list of different station ids", most=_MOST_COUNT)
]
Servers: TypeAlias = Annotated[str, _text('"host:port", several joined by commas', _wrong_servers)]
HandlerName: TypeAlias = Annotated[
    str,
    _text(
        '"embed", "embed_batch" or "package.module:name"',
        lambda value: (
            ""
            if value in BUILT_IN_HANDLERS or _HANDLER.fullmatch(value)
            else f"{shown(value)} is none of them"
        ),
    ),
]
HookName: TypeAlias = Annotated[str, _matching('"package.module:name"', _HANDLER)]
Url: TypeAlias = Annotated[str, _text("an http or https URL without credentials", _wrong_url)]
BaseUrl: TypeAlias = Annotated[
    str, _text("an http or https URL without credentials and query", _wrong_base_url)
]
Topics: TypeAlias = Annotated[
    tuple[Topic, ...], _several("a list of different topics, at least one", least=1)
]
Urls: TypeAlias = Annotated[
    tuple[BaseUrl, ...],
    _several(f"a list of 1 to {_MOST_URLS} different URLs", least=1, most=_MOST_URLS),
]
Statuses: TypeAlias = Annotated[tuple[Status, ...], _several("a list of different status codes")]
Options: TypeAlias = Annotated[
    Mapping[str, Any], _free_table(f"a table, nested at most {_MOST_NESTING} deep")
]
KafkaOptions: TypeAlias = Annotated[Mapping[str, str | int | float | bool], _kafka_options()]
