"""The command line. Exit codes: 0 fine, 64 usage, 70 internal, 75 cut short (batches come again), 78 configuration."""

from __future__ import annotations

import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import structlog
import trio

from stationmaster import __version__
from stationmaster.batch import Outcome
from stationmaster.errors import ConfigError, StationmasterError
from stationmaster.service import demo as demo_module
from stationmaster.service import model_server as model_server_module
from stationmaster.service import receiver as receiver_module
from stationmaster.service.app import Observers, Tally, run_service
from stationmaster.service.children import end_with_parent
from stationmaster.service.config_reading import load_config
from stationmaster.service.config_rendering import render
from stationmaster.service.config_rules import toml_text
from stationmaster.service.logs import LogObserver, configure_logs
from stationmaster.service.shutdown import (
    EXIT_CONFIG,
    EXIT_CUT_SHORT,
    EXIT_INTERNAL,
    EXIT_OK,
    EXIT_USAGE,
)
from stationmaster.service.state_cli import dead_letters, outbox
from stationmaster.service.state_edge import CONFIG, SET
from stationmaster.service.systemd import take_over
from stationmaster.service.translation import check_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from stationmaster.abc import Observer
    from stationmaster.service.config import Config

_WITH_PARENT = click.option(
    "--end-with-parent", is_flag=True, help="Stop as if by SIGTERM when standard input ends."
)
_HOST = click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
_PORT = click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=0,
    show_default=True,
    help="Port to listen on; 0 is any free one.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="stationmaster")
def command_line() -> None:
    """Every batch leaves on time.

    Takes station telemetry from Kafka, runs every station of a batch at the same time, and uploads each batch as one
    list when all stations answered, a quorum has, or the deadline strikes.

    Exit codes: 0 fine, 64 usage, 70 internal, 75 cut short (what was open comes again), 78 configuration;
    1 is the demo's: its books do not balance, or it was interrupted.
    """


@command_line.command()
@CONFIG
@SET
@_WITH_PARENT
def run(config_path: Path, overrides: tuple[str, ...], end_with_parent: bool) -> int:
    """Run the service until SIGTERM or SIGINT, which drains; a second signal stops at once."""
    reread = partial(load_config, config_path, overrides=overrides, environ=os.environ)
    return _serve(reread(), end_with_parent=end_with_parent, reread=reread)


@command_line.command()
@click.argument("file", type=click.Path(path_type=Path))
@CONFIG
@SET
def replay(file: Path, config_path: Path, overrides: tuple[str, ...]) -> int:
    """Run the service over FILE (JSON Lines, may be .gz) instead of Kafka, to its end.

    Topic: `[file] topic`, else the file's name without suffix; partition 0; offset: the line, from 0; timestamp: the
    message's own. The same file gives the same batch ids again.

    Lines of two files with one topic get the same id if number and timestamp are the same, or there is no timestamp:
    the target, or the outbox, then takes the second for the first again. Give each such file a topic of its own
    (--set file.topic=NAME), or its messages a timestamp.
    """
    source = ("source.kind='file'", f"file.path={toml_text(str(file))}")
    config = load_config(config_path, overrides=(*overrides, *source), environ=os.environ)
    tally = Tally()
    code = _serve(config, tally)
    unsuccessful = ", ".join(
        f"{outcome.value} {tally.unsuccessful.get(outcome, 0)}"
        for outcome in Outcome
        if outcome is not Outcome.SUCCEEDED
    )
    click.echo(
        f"{file.name}: {tally.uploaded} batches uploaded with {tally.results} results ({unsuccessful}); "
        f"{tally.by_deadline} closed by deadline, {tally.empty} empty, {tally.refused} dead letters, "
        f"{tally.rejected} rejected by the target, {tally.kept} sent to the outbox, "
        f"{tally.delivered} uploaded out of it, {tally.dropped} dropped"
    )
    return code


@command_line.command("check-config")
@click.argument("file", type=click.Path(path_type=Path))
@SET
@click.option(
    "--print", "show", is_flag=True, help="Print the effective configuration, secrets hidden."
)
def check_config(file: Path, overrides: tuple[str, ...], show: bool) -> int:
    """Check the configuration FILE and name every fault at once, each with its path.

    Whether a handler of one's own exists is looked at when the service starts.
    """
    config = load_config(file, overrides=overrides, environ=os.environ)
    check_settings(config)
    click.echo(render(config) if show else f"{file}: fine")
    return EXIT_OK


@command_line.command()
@click.option(
    "--batches",
    default=200,
    show_default=True,
    type=click.IntRange(min=1),
    help="Messages to send.",
)
@click.option(
    "--seconds",
    default=20.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Time to send them in.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=0,
    show_default=True,
    help="Port of the status page on this machine; 0 is any free one, which is told.",
)
@click.option("--headless", is_flag=True, help="Plain lines instead of the live table.")
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for logs, database and demo.json; a new temporary one if not given.",
)
def demo(batches: int, seconds: float, port: int, headless: bool, state: Path | None) -> int:
    """Run everything on this machine: broker, producer, model server, receiver, and the service between them.

    Real station data, real sockets, one station that hangs and one that fails. The summary at the end is checked
    against the receiver's database; exit code 0 only if nothing was lost, doubled or late, else 1.
    """
    live = not headless and sys.stdout.isatty()
    return trio.run(
        partial(
            demo_module.run_demo,
            batches=batches,
            seconds=seconds,
            live=live,
            state=state,
            port=port,
        )
    )


@command_line.command("model-server")
@_HOST
@_PORT
@click.option(
    "--pretend-ms", default=0.0, type=click.FloatRange(min=0), help="Pretended cost of a call."
)
@click.option(
    "--pretend-ms-per-text",
    default=0.0,
    type=click.FloatRange(min=0),
    help="Pretended cost of each text.",
)
@_WITH_PARENT
def model_server(
    host: str,
    port: int,
    pretend_ms: float,
    pretend_ms_per_text: float,
    end_with_parent: bool,
) -> int:
    """Serve the built-in embedding model `readings-128` at POST /v1/embeddings."""
    _hang_on_parent(wanted=end_with_parent)
    trio.run(
        partial(
            model_server_module.run_model_server,
            host,
            port,
            pretend_s=pretend_ms / 1000,
            pretend_per_text_s=pretend_ms_per_text / 1000,
        )
    )
    return EXIT_OK


@command_line.command()
@_HOST
@_PORT
@click.option(
    "--db", type=click.Path(path_type=Path), required=True, help="SQLite file; made if missing."
)
@click.option(
    "--fail-rate", default=0.0, type=click.FloatRange(0, 1), help="Share of uploads to fail."
)
@click.option(
    "--latency-ms", default=0.0, type=click.FloatRange(0, 3_600_000), help="Delay of every answer."
)
@click.option(
    "--status", type=click.IntRange(200, 599), help="Answer this to everything, store nothing."
)
@_WITH_PARENT
def receiver(  # noqa: PLR0917 - click calls it by name
    host: str,
    port: int,
    db: Path,
    fail_rate: float,
    latency_ms: float,
    status: int | None,
    end_with_parent: bool,
) -> int:
    """Take uploads into a SQLite file, each batch once: a target for demo and tests."""
    _hang_on_parent(wanted=end_with_parent)
    trio.run(
        partial(
            receiver_module.run_receiver,
            host,
            port,
            db=db,
            fail_rate=fail_rate,
            latency_s=latency_ms / 1000,
            status=status,
        )
    )
    return EXIT_OK


command_line.add_command(outbox)
command_line.add_command(dead_letters)


def run_command_line() -> int:
    """Run the command of `sys.argv` and return the exit code."""
    try:
        return int(command_line.main(prog_name="stationmaster", standalone_mode=False) or EXIT_OK)
    except click.Abort:
        return EXIT_CUT_SHORT
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except ConfigError as error:
        for fault in error.faults:
            click.echo(fault, err=True)
        return EXIT_CONFIG
    except Exception as error:  # noqa: BLE001 - the outermost edge: told, and shown by the exit code
        _tell(error)
        return EXIT_INTERNAL


def _tell(error: Exception) -> None:
    """Say plainly what went wrong; anything unforeseen with its traceback."""
    foreseen, unforeseen = _split(error)
    for leaf in foreseen:
        click.echo(f"stationmaster: {leaf}", err=True)
    if unforeseen is not None:
        traceback.print_exception(unforeseen)


def _split(error: Exception) -> tuple[list[Exception], Exception | None]:
    """Tell our own errors, one by one, from whatever else is in a group."""
    group = error if isinstance(error, ExceptionGroup) else ExceptionGroup("", [error])
    foreseen, rest = group.split(StationmasterError)
    unforeseen = error if foreseen is None else rest
    return _leaves(foreseen) if foreseen is not None else [], unforeseen


def _serve(
    config: Config,
    *others: Observer,
    end_with_parent: bool = False,
    reread: Callable[[], Config] | None = None,
) -> int:
    check_settings(config)
    configure_logs(config.log.level, config.log.format, sys.stderr)
    _hang_on_parent(wanted=end_with_parent)
    manager = take_over(os.environ)
    observer = Observers((*others, LogObserver()))
    try:
        return trio.run(
            partial(run_service, config, observer=observer, manager=manager, reread=reread)
        )
    except ConfigError:
        raise
    except Exception as error:
        foreseen, unforeseen = _split(error)
        log = structlog.stdlib.get_logger("stationmaster")
        for leaf in foreseen:
            log.critical("service failed", error=str(leaf))
        if unforeseen is not None:
            log.critical("service failed", exc_info=unforeseen)
        return EXIT_INTERNAL


def _hang_on_parent(*, wanted: bool) -> None:
    if wanted:
        end_with_parent()


def _leaves(group: ExceptionGroup[Exception]) -> list[Exception]:
    leaves: list[Exception] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, ExceptionGroup) else [error]
    return leaves
