"""What the configuration's classes say: tables, keys and their types; and a converter that reads those strictly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias, get_args, get_origin

import attrs
import cattrs

from stationmaster.service.config import Config
from stationmaster.service.config_rules import (
    Complaint,
    Secret,
    UnfitError,
    misfit,
    shown,
    toml_text,
)

Kind: TypeAlias = Any
"""A type as annotations spell it: `bool`, `Annotated[float, Rule(...)]`, `tuple[str, ...]`."""


@attrs.frozen(kw_only=True)
class Key:
    """One key of a table, as its class declares it."""

    kind: Kind
    """Its type, without None."""
    default: Any
    """`attrs.NOTHING` if it is required."""
    expected: str

    @property
    def is_secret(self) -> bool:
        """Whether its value may not stand in the file."""
        return self.kind is Secret

    @property
    def is_text(self) -> bool:
        """Whether every value of it is a string."""
        base = _base(self.kind)
        return base is str or _origin(base) is Literal


@attrs.frozen(kw_only=True)
class Table:
    """One table, as its class declares it."""

    make: Callable[..., Any]
    is_optional: bool
    keys: Mapping[str, Key]
    is_repeated: bool = False
    """It stands in the file any number of times, as `[[name]]`."""


def _describe_tables() -> Iterator[tuple[str, Table]]:
    for table in attrs.fields(attrs.resolve_types(Config)):
        is_repeated = _origin(table.type) is tuple
        made = get_args(table.type)[0] if is_repeated else _without_none(table.type)
        keys = {
            key.name: Key(
                kind=_without_none(key.type), default=key.default, expected=_expected(key.type)
            )
            for key in attrs.fields(attrs.resolve_types(made))
        }
        yield (
            table.name,
            Table(
                make=made,
                is_optional=table.default is None,
                keys=keys,
                is_repeated=is_repeated,
            ),
        )


def _without_none(kind: Kind) -> Kind:
    arguments = get_args(kind)
    return arguments[0] if type(None) in arguments else kind


def _origin(kind: Kind) -> object:
    return get_origin(kind)


def _base(kind: Kind) -> Kind:
    return kind.__origin__ if _origin(kind) is Annotated else kind


def _expected(kind: Kind) -> str:
    kind = _without_none(kind)
    if _origin(kind) is Annotated:
        return str(kind.__metadata__[0].expected)
    if _origin(kind) is Literal:
        return " or ".join(map(toml_text, get_args(kind)))
    return "true or false"


def structure(value: object, kind: Kind) -> Kind:
    """Turn a value as `tomllib` reads it into one of this type, without guessing.

    Raises:
        UnfitError: with every complaint.
    """
    return _CONVERTER.structure(value, kind)


def _make_converter() -> cattrs.Converter:
    # By itself cattrs takes "false" for True, 1.9 for 1 and 7 for "7": every type that occurs has a hook of its own.
    converter = cattrs.Converter()
    for wanted in (bool, int, str):
        converter.register_structure_hook(wanted, _exactly(wanted))
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook_func(_has_origin(Literal), _choice)
    converter.register_structure_hook_func(_has_origin(Mapping), _exactly(dict))
    converter.register_structure_hook_func(_has_origin(tuple), _list)
    converter.register_structure_hook_func(_has_origin(Annotated), _ruled)
    return converter


def _has_origin(origin: object) -> Callable[[Any], bool]:
    return lambda kind: _origin(kind) is origin


def _exactly(wanted: type) -> Callable[[object, Kind], object]:
    def hook(value: object, kind: Kind) -> object:
        if type(value) is not wanted:  # `isinstance` would let True pass for 1
            raise UnfitError(Complaint(misfit(value), _expected(kind)))
        return value

    return hook


def _number(value: object, kind: Kind) -> float:
    if type(value) is not float and type(value) is not int:
        raise UnfitError(Complaint(misfit(value), _expected(kind)))
    try:
        return float(value)
    except OverflowError:
        return math.inf  # no range holds it


def _choice(value: object, kind: Kind) -> object:
    if type(value) is not str:
        raise UnfitError(Complaint(misfit(value), _expected(kind)))
    if value not in get_args(kind):
        raise UnfitError(Complaint(f"{shown(value)} is no choice", _expected(kind)))
    return value


def _list(values: object, kind: Kind) -> tuple[object, ...]:
    if type(values) is not list:
        raise UnfitError(Complaint(misfit(values), _expected(kind)))
    items: list[object] = []
    complaints: list[Complaint] = []
    for index, value in enumerate(values):
        try:
            items.append(structure(value, get_args(kind)[0]))
        except UnfitError as error:
            complaints += (attrs.evolve(one, where=f"[{index}]") for one in error.complaints)
    if complaints:
        raise UnfitError(*complaints)
    return tuple(items)


def _ruled(value: object, kind: Kind) -> object:
    rule = kind.__metadata__[0]
    try:
        fitting = structure(value, _base(kind))
    except UnfitError as error:
        # A complaint about the whole is the rule's: only the rule knows that the number is one of seconds.
        raise UnfitError(
            *(
                one if one.where else attrs.evolve(one, expected=rule.expected)
                for one in error.complaints
            )
        ) from None
    complaints = tuple(rule.complaints(fitting))
    if complaints:
        raise UnfitError(*complaints)
    return fitting


_CONVERTER: Final = _make_converter()
TABLES: Final[Mapping[str, Table]] = dict(_describe_tables())
