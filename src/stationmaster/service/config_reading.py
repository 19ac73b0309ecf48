"""Reads a configuration: file, then environment, then `--set`; strictly, and with all faults at once.

Every fault is one line, `table.key: what is wrong; what is expected`, with its origin if that is not the file.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from stationmaster.errors import ConfigError
from stationmaster.service.config import (
    Config,
    default_drain_timeout_s,
    faults_between,
    needed_tables,
)
from stationmaster.service.config_rules import (
    Complaint,
    Secret,
    UnfitError,
    is_secret_name,
    misfit,
    printable,
    toml_key,
)
from stationmaster.service.config_schema import TABLES, Key, Table, structure
from stationmaster.service.config_topics import faults_of_topics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ENVIRONMENT_PREFIX: Final = "STATIONMASTER_"
_LARGEST_FILE_BYTES: Final = 1_048_576
_LARGEST_SECRET_BYTES: Final = 16_384
_SECRET: Final = re.compile(r"[!-~]+")
_KAFKA_OPTIONS: Final = "kafka.options"
_MAY_HOLD_SECRETS: Final = (_KAFKA_OPTIONS, "stations.options")


def load_config(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str],
    read_secrets: bool = True,
) -> Config:
    """Read and check a configuration, and the files of secrets that it names.

    Args:
        path: a TOML file.
        overrides: `table.key=value` each, stronger than the environment. The value is written as in TOML; a text
            needs no quotes. A table adds to the file's table.
        environ: `STATIONMASTER_<TABLE>__<KEY>`, written likewise, is stronger than the file. Other names are ignored.
        read_secrets: read the files that hold them; without, what needs no secret works for who may not read these.

    Raises:
        ConfigError: with every fault.
    """
    reader = _Reader(tree=_read_toml(Path(path)), read_secrets=read_secrets)
    match reader.tree:
        case {"kafka": {"options": dict() as options}}:
            reader.refuse_secrets(options, origin="")
    for name in sorted(environ):
        # Without a double underscore it may be anybody's: Kubernetes sets STATIONMASTER_PORT for a service's name.
        if name.startswith(_ENVIRONMENT_PREFIX) and "__" in name:
            dotted = name.removeprefix(_ENVIRONMENT_PREFIX).lower().replace("__", ".", 1)
            origin = f"environment {printable(name)}"
            reader.override(dotted, environ[name], origin=origin, may_be_secret=True)
    for override in overrides:
        dotted, equals, text = (part.strip() for part in override.partition("="))
        origin = f"--set {printable(dotted)}"
        if equals:
            # Everybody on the machine can read a command line: no place for a secret.
            reader.override(dotted, text, origin=origin, may_be_secret=False)
        else:
            reader.complain(origin, Complaint("has no value", "table.key=value"))
    return reader.finish()


# ---------------------------------------------------------------------------------------------------------- a reader


@attrs.define(eq=False, kw_only=True)
class _Reader:
    """Collects layers, values and faults; `finish` gives the configuration or all the faults."""

    tree: dict[str, Any]
    read_secrets: bool
    faults: list[str] = attrs.field(factory=list)
    values: dict[str, Any] = attrs.field(factory=dict)
    """`table.key` -> value, of those that are right by themselves."""
    secrets: dict[str, str] = attrs.field(factory=dict)
    """`table.key` -> text, from the environment."""
    origins: dict[str, str] = attrs.field(factory=dict)
    """`table.key` -> where its value came from, unless from the file."""

    def complain(self, path: str, complaint: Complaint, *, origin: str | None = None) -> None:
        """Note a fault; unless told otherwise, its origin is that of the path's value (empty: the file)."""
        origin = self.origins.get(path, "") if origin is None else origin
        self.faults.append(
            f"{path}{complaint.where}: {complaint.wrong}; expected {complaint.expected}"
            + (f" (from {origin})" if origin else "")
        )

    def override(self, path: str, text: str, *, origin: str, may_be_secret: bool) -> None:
        """Lay one value, given as text, over the file's."""
        table, _, name = path.partition(".")
        key = TABLES[table].keys.get(name) if table in TABLES else None
        if key is not None and TABLES[table].is_repeated:
            wrong = f"cannot be set here: [[{table}]] may stand several times"
            self.complain(path, Complaint(wrong, "it in the file"), origin=origin)
        elif key is None:
            self.complain(printable(path), _unknown(table, name), origin=origin)
        elif not _is_unicode(text):
            self.complain(path, Complaint("is not UTF-8", key.expected), origin=origin)
        elif key.is_secret and not may_be_secret:
            self.complain(path, _misplaced_secret(path), origin=origin)
        elif key.is_secret:
            self.secrets[path] = text
            self.origins[path] = origin
        else:
            value = _parse(text, key)
            if path in _MAY_HOLD_SECRETS and not isinstance(value, dict):
                # The text may be a secret in the wrong notation: it is not shown.
                self.complain(path, Complaint("is no TOML table", key.expected), origin=origin)
                return
            if path == _KAFKA_OPTIONS and isinstance(value, dict) and not may_be_secret:
                self.refuse_secrets(value, origin=origin)
            below = self.tree.setdefault(table, {})
            if isinstance(below, dict):  # else that is a fault, told when the table is read
                older = below.get(name)
                if isinstance(value, dict) and isinstance(older, dict):
                    value = {**older, **value}
                below[name] = value
                self.origins[path] = origin

    def refuse_secrets(self, options: dict[str, Any], *, origin: str) -> None:
        """Take the secrets out of Kafka's options, each with a complaint."""
        for name in [name for name in options if is_secret_name(name)]:
            del options[name]
            path = f"{_KAFKA_OPTIONS}.{toml_key(name)}"
            self.complain(path, _misplaced_secret(_KAFKA_OPTIONS), origin=origin)

    def finish(self) -> Config:
        """Return the configuration.

        Raises:
            ConfigError: with every fault.
        """
        needed = needed_tables(self.tree)
        for name in self.tree:
            if name not in TABLES:
                self.complain(toml_key(name), _unknown(name, ""))
        tables: dict[str, Any] = {}
        for name, table in TABLES.items():
            if table.is_repeated:
                tables[name] = self.read_rows(name, table)
            elif name in self.tree or name in needed or not table.is_optional:
                tables[name] = self.read_table(name, table, self.tree.get(name, {}))
        for faults in (
            faults_between(self.values),
            faults_of_topics(self.values, tables["topic"]),
        ):
            for paths, complaint in faults:
                origins = [self.origins[path] for path in paths if path in self.origins]
                self.complain(paths[0], complaint, origin=", ".join(origins))
        if self.faults:
            raise ConfigError(self.faults)
        made: dict[str, Any] = {}
        for name, values in tables.items():
            make = TABLES[name].make
            if TABLES[name].is_repeated:
                made[name] = tuple(make(**row) for row in values)
            else:
                made[name] = make(**values)
        config = Config(**made)
        if config.kafka is None or config.kafka.drain_timeout_s is not None:
            return config
        drain_timeout_s = default_drain_timeout_s(config)
        return attrs.evolve(
            config, kafka=attrs.evolve(config.kafka, drain_timeout_s=drain_timeout_s)
        )

    def read_rows(self, name: str, table: Table) -> list[dict[str, Any]]:
        """Return the values of each `[[name]]`."""
        raw = self.tree.get(name, [])
        if type(raw) is not list:
            self.complain(name, Complaint(misfit(raw), f"any number of tables [[{name}]]"))
            return []
        return [self.read_table(f"{name}[{at}]", table, row) for at, row in enumerate(raw)]

    def read_table(self, name: str, table: Table, raw: object) -> dict[str, Any]:
        """Return the values that the table has; complain about every wrong, missing and unknown key."""
        if type(raw) is not dict:
            self.complain(name, Complaint(misfit(raw), f"a table [{name}]"))
            return {}
        for key_name in raw:
            if key_name not in table.keys:
                complaint = _unknown(name.partition("[")[0], key_name)
                self.complain(f"{name}.{toml_key(key_name)}", complaint)
        values: dict[str, Any] = {}
        for key_name, key in table.keys.items():
            path = f"{name}.{key_name}"
            if key.is_secret:
                if key_name in raw:
                    self.complain(path, _misplaced_secret(path), origin="")
                values[key_name] = self.read_secret(path, file=values.get(f"{key_name}_file"))
            elif key_name in raw:
                try:
                    values[key_name] = structure(raw[key_name], key.kind)
                except UnfitError as error:
                    for complaint in error.complaints:
                        self.complain(path, complaint)
            elif key.default is attrs.NOTHING:
                self.complain(path, Complaint("is missing", key.expected))
            elif not isinstance(key.default, attrs.Factory):  # type: ignore[arg-type]
                values[key_name] = key.default
        self.values.update({f"{name}.{key_name}": value for key_name, value in values.items()})
        return values

    def read_secret(self, path: str, *, file: str | None) -> Secret | None:
        """Return a secret from the environment or else its file, or None; complain if it cannot be used."""
        text = self.secrets.get(path)
        if text is None and file is not None and self.read_secrets:
            path = f"{path}_file"
            try:
                with Path(file).open("rb") as stream:
                    text = stream.read(_LARGEST_SECRET_BYTES + 1).decode(errors="replace")
            except OSError as error:
                # Not its name: perhaps the secret itself was put here.
                wrong = f"cannot be read ({error.strerror})"
                self.complain(path, Complaint(wrong, "a file that holds the secret"))
        if text is None:
            return None
        text = text.strip()
        if len(text) > _LARGEST_SECRET_BYTES or not _SECRET.fullmatch(text):
            wrong = "holds no secret that could be sent"
            expected = f"up to {_LARGEST_SECRET_BYTES} printable ASCII characters without spaces"
            self.complain(path, Complaint(wrong, expected))
        return Secret(text)


# ------------------------------------------------------------------------------------------------------- small steps


def _read_toml(path: Path) -> dict[str, Any]:
    def broken(wrong: str) -> ConfigError:
        return ConfigError([f"{printable(str(path))}: {wrong}; expected a TOML file"])

    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise broken(f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # a zero byte in its name
        raise broken("is not the name of a file") from error
    if len(raw) > _LARGEST_FILE_BYTES:
        raise broken(f"has more than {_LARGEST_FILE_BYTES} bytes")
    try:
        return tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise broken(f"line {line} is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise broken(_where_broken(str(error), raw)) from error
    except (ValueError, RecursionError) as error:
        wrong = "holds a number too long, or a value nested too deeply, to be read"
        raise broken(wrong) from error


def _where_broken(message: str, raw: bytes) -> str:
    """Put the line first, also where the parser only says that the end came too soon."""
    reason, _, position = message.rpartition(" (at ")
    if re.fullmatch(r"line \d+, column \d+\)", position):
        place = position.removesuffix(")")
    else:
        last = raw.rstrip().count(b"\n") + 1
        place = f"line {last} (the end)"
    return f"{place}: {printable(reason)}"


def _parse(text: str, key: Key) -> object:
    """Read an override's value as TOML; as it stands if it is none, or if its key is a text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = parsed["value"]
    return text if len(parsed) > 1 or (key.is_text and type(value) is not str) else value


def _is_unicode(text: str) -> bool:
    """Tell whether the text came from UTF-8: bytes that are none arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unknown(table: str, key: str) -> Complaint:
    """Say that there is no such table, or no such key in it, and what is there."""
    if table in TABLES:
        word, known = key, [name for name, key in TABLES[table].keys.items() if not key.is_secret]
    else:
        word, known = table, list(TABLES)
    close = difflib.get_close_matches(word, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return Complaint(f"is unknown{hint}", f"one of {', '.join(known)}")


def _misplaced_secret(path: str) -> Complaint:
    variable = f"the environment variable {_ENVIRONMENT_PREFIX}{path.upper().replace('.', '__')}"
    wrong = "is a secret, which must stand neither in the configuration file nor on a command line"
    if path == _KAFKA_OPTIONS:
        return Complaint(wrong, f"it in {variable}, whose table adds to the file's")
    return Complaint(wrong, f"{path}_file, the path of a file that holds it, or {variable}")
