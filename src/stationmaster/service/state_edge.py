"""What the commands on the state file have in common: options, loading, tables, and how they end."""

from __future__ import annotations

import functools
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import click
import orjson

from stationmaster.errors import StoreError
from stationmaster.service.config_reading import load_config
from stationmaster.service.config_rules import printable
from stationmaster.service.shutdown import EXIT_CUT_SHORT, EXIT_OK
from stationmaster.state.inspection import is_in_use

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from stationmaster.service.config import Config

P = ParamSpec("P")

CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    required=True,
    help="The service's configuration file (TOML).",
)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Override one key of the configuration; may be given several times.",
)
REASON = click.option("--reason", help="Only those with this reason, such as not-json.")
TOPIC = click.option("--topic", help="Only those of this topic.")


def edge(command: Callable[P, int]) -> Callable[P, int]:
    """Let a passing trouble end a command with words and EXIT_CUT_SHORT; a reader that leaves early is no trouble.

    Commands turn errors of their own files into errors of ours: what is left of the system's is about the output.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            code = command(*args, **kwargs)
            sys.stdout.flush()
        except StoreError as error:
            click.echo(f"stationmaster: {error}", err=True)
            return EXIT_CUT_SHORT
        except BrokenPipeError:
            _drop_output()
            return EXIT_OK
        except OSError as error:
            _drop_output()
            click.echo(f"stationmaster: the output cannot be written ({error.strerror})", err=True)
            return EXIT_CUT_SHORT
        return code

    return run


def _drop_output() -> None:
    """Send what is left in the buffer nowhere; else Python complains about it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load(config_path: Path, overrides: Sequence[str], *, read_secrets: bool = False) -> Config:
    """Read the configuration as the service does.

    Without its secrets, unless told otherwise: an operator need not be allowed to read the service's credentials.
    """
    return load_config(
        config_path, overrides=overrides, environ=os.environ, read_secrets=read_secrets
    )


def load_for_letters(
    config_path: Path, overrides: tuple[str, ...], *, read_secrets: bool = False
) -> Config:
    """Read the configuration for a command about dead letters.

    Raises:
        click.UsageError: they are not in the state file.
    """
    config = load(config_path, overrides, read_secrets=read_secrets)
    if config.dead_letters.kind == "kafka":
        topic = config.dead_letters.topic
        raise click.UsageError(
            f"dead letters go to the Kafka topic {topic} (dead_letters.kind): look at them with Kafka's own tools, "
            f"such as `kafka-console-consumer.sh --from-beginning --property print.headers=true --topic {topic}`. "
            "What was kept on SQLite before is shown with --set dead_letters.kind=sqlite"
        )
    return config


def tell_if_nobody_runs(config: Config) -> None:
    """Say so if there is no service that would send what is due."""
    if not is_in_use(config.outbox.path):
        click.echo(
            f"stationmaster: no service uses {config.outbox.path} now; it is sent when one runs",
            err=True,
        )


def tell_row(widths: Sequence[int], cells: Sequence[str]) -> None:
    """Print one row of a table; a negative width is for figures. A longer text pushes its neighbours."""
    padded = (
        f"{printable(cell):>{-width}}" if width < 0 else f"{printable(cell):<{width}}"
        for width, cell in zip(widths, cells, strict=True)
    )
    click.echo("  ".join(padded).rstrip())


def write_lines(lines: Iterable[dict[str, object]]) -> None:
    """Print each as a line of JSON."""
    for line in lines:
        sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


def iso(seconds: float) -> str:
    """Return a time since the epoch for people and programs; beyond all years the number itself."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g}"


def count(number: int, one: str, many: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {one if number == 1 else many}"
