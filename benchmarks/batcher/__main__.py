"""The request batcher against trio's bare floor, published batchers, and a model server behind HTTP.

    pip install '.[service]'
    python benchmarks/batcher [--rounds 7] [--cases callers,idle,gathering,server]

Every peer has an environment of its own under .cache/batcher-peers, made by the first run. All contenders take turns,
in an order that is shuffled each round; what is told are medians of the ratios within a round. A peer that cannot be
installed, or fails, is named, and the rest runs.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import signal
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import http_side
import peers
import trio
from goals import Rounds, judge_callers, judge_gathering, judge_idle, judge_server
from load import BATCH_ROWS, BULK_ROWS, IN_FLIGHT

HERE = pathlib.Path(__file__).parent
OF_PEER = {
    "async-batcher": ["async-batcher"],
    "bentoml": ["bentoml"],
    "batched": ["batched", "batched, list"],
    "ray": ["ray"],
    "infinity-emb": ["infinity", "infinity, list"],
    "aiodataloader": ["aiodataloader", "aiodataloader, list"],
}
LOOPS = ("asyncio", "uvloop")
QUIET = {
    "DO_NOT_TRACK": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
START_S = 60  # Ray imports for 10 s from a cold disk
ANSWER_S = 30


def say(words):
    print(words, file=sys.stderr, flush=True)


class Worker:
    """A process that runs contenders, one at a time."""

    def __init__(self, process):
        self._process = process
        self._rest = b""
        self.dead = None

    async def ask(self, order):
        """Run a contender; return its figures, or `{"error": ...}`."""
        if self.dead is None:
            try:
                await self._process.stdin.send_all(json.dumps(order).encode() + b"\n")
                return await self.read(ANSWER_S)
            except (trio.TooSlowError, trio.BrokenResourceError, EOFError) as error:
                self.dead = f"{type(error).__name__}: it is run no more"
                self._process.kill()
        return {"error": self.dead}

    async def read(self, seconds):
        """Read a line within a time."""
        with trio.fail_after(seconds):
            while b"\n" not in self._rest:
                chunk = await self._process.stdout.receive_some()
                if not chunk:
                    raise EOFError("the process ended")
                self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)


@asynccontextmanager
async def open_worker(python, module, packages):
    """Start a worker; gives it and the versions it told."""
    environment = os.environ | QUIET
    if str(python) != sys.executable:
        environment.pop("PYTHONPATH", None)
    process = await trio.lowlevel.open_process(
        [str(python), str(HERE / "worker.py"), module, *packages],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # so that what a peer starts can be ended with it
    )
    try:
        worker = Worker(process)
        yield worker, await worker.read(START_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
            await process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()


@dataclass(frozen=True)
class Case:
    """Callers around a batcher around a stub."""

    title: str
    ours: tuple[str, ...]
    callers: int
    judge: object = None
    lists: bool = False
    call_s: float = 0.0
    text_s: float = 0.0
    wait_s: float = 0.0
    rows: int = BATCH_ROWS
    timed: bool = False
    run_s: float = 0.35

    def order(self, contender, loop):
        """Return what a worker is told."""
        return {
            "contender": contender,
            "loop": loop,
            "bulk": contender == "embed_many" or contender.endswith(", list"),
            "callers": self.callers,
            "call_s": self.call_s,
            "text_s": self.text_s,
            "wait_s": self.wait_s,
            "rows": self.rows,
            "timed": self.timed,
            "warm_s": self.run_s * 0.4,
            "run_s": self.run_s,
        }


CASES = {
    "callers": Case(
        "1,000 callers, a model that answers at once",
        ours=("floor", "embed", "embed, deadline", "embed_many"),
        callers=1000,
        lists=True,
        judge=judge_callers,
    ),
    "idle": Case(
        "one caller, a model that answers at once",
        ours=("floor", "embed, defaults", "model alone"),
        callers=1,
        timed=True,
        judge=judge_idle,
        run_s=0.25,
    ),
    "gathering": Case(
        "32 callers, a model of 2 ms + 20 us a text, peers wait 5 ms for up to 64 rows",
        ours=("embed, defaults",),
        callers=32,
        call_s=0.002,
        text_s=20e-6,
        wait_s=0.005,
        timed=True,
        judge=judge_gathering,
    ),
    "gathering 32": Case(
        "the same where peers wait for up to 32 rows, as many as there are callers (no goal)",
        ours=("embed, defaults",),
        callers=32,
        call_s=0.002,
        text_s=20e-6,
        wait_s=0.005,
        rows=32,
        timed=True,
    ),
}
SERVER = "server"


async def main(arguments):
    shuffler = random.Random(arguments.seed)
    wanted = set(arguments.cases.split(","))
    if unknown := wanted - {*CASES, SERVER}:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}")
    environments = await peers.prepare([*peers.REQUIREMENTS], say) if wanted - {SERVER} else {}
    verdicts = []
    async with AsyncExitStack() as stack:
        contenders, versions = await start(stack, environments)
        print(f"Python {platform.python_version()}, {os.cpu_count()} processors")
        for name, told in versions.items():
            print(f"- {name}: {told}")
        for name, case in CASES.items():
            if name in wanted:
                rounds = await run(case, contenders, arguments.rounds, shuffler)
                tell(case, rounds)
                verdicts += case.judge(rounds) if case.judge else ()
    if SERVER in wanted:
        rounds = await run_server(max(arguments.rounds // 2, 1), shuffler)
        tell_server(rounds)
        verdicts += judge_server(rounds)
    tell_verdicts(verdicts)


async def start(stack, environments):
    """Start all workers; return (contender, loop) -> worker, and what runs in which version or why it does not."""
    contenders = {}
    versions = {}

    async def open_one(name, python, module, packages):
        try:
            worker, told = await stack.enter_async_context(open_worker(python, module, packages))
        except (trio.TooSlowError, EOFError) as error:
            versions[name] = f"NOT RUN: its process did not start ({type(error).__name__})"
            return None
        versions[name] = ", ".join(f"{package} {version}" for package, version in told.items())
        return worker

    packages = ["stationmaster", "trio", "httpx", "attrs"]
    ours = await open_one("stationmaster", sys.executable, "trio_side", packages)
    if ours is None:
        sys.exit("stationmaster does not start")
    for contender in sorted({each for case in CASES.values() for each in case.ours}):
        contenders[contender, "trio"] = ours
    for name, python in environments.items():
        if isinstance(python, Exception):
            versions[name] = f"NOT RUN: {python}"
            continue
        worker = await open_one(name, python, "asyncio_side", [name.partition("[")[0], "uvloop"])
        if worker is None:
            continue
        for loop in LOOPS:
            for contender in OF_PEER[name]:
                contenders[contender, loop] = worker
            contenders.setdefault(("polling", loop), worker)  # it needs nothing: any will do
    return contenders, versions


async def run(case, contenders, rounds, shuffler):
    """Let all contenders of a case take turns."""
    part = [
        (contender, loop)
        for contender, loop in contenders
        if contender in case.ours
        or (loop != "trio" and (case.lists or not contender.endswith(", list")))
    ]
    told = []
    for number in range(rounds):
        shuffler.shuffle(part)
        told.append({})
        for contender, loop in part:
            figures = await contenders[contender, loop].ask(case.order(contender, loop))
            told[-1][f"{contender}@{loop}"] = figures
        say(f"{case.title}: round {number + 1} of {rounds}")
    return Rounds(told)


async def run_server(rounds, shuffler):
    """Let the ways to ask a model server take turns, on one server."""
    ways = [*http_side.CONNECTIONS]
    told = []
    async with http_side.open_server() as url:
        for number in range(rounds):
            shuffler.shuffle(ways)
            told.append({})
            for way in ways:
                speed = await http_side.measure(way, url, warm_s=1.0, run_s=4.0)
                told[-1][way] = {"texts_per_s": speed}
            say(f"model server: round {number + 1} of {rounds}")
    return Rounds(told)


def tell(case, rounds):
    """Print a case: medians, and ratios to what is judged, cheapest first."""
    base = f"{next(name for name in case.ours if name.startswith('embed'))}@trio"
    print(f"\n## {case.title}\n")
    print(
        f"| contender | CPU to {base} | quartiles | CPU, us | rows/s | to it | rows a call | p50, us |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    ran = [name for name in rounds.names() if rounds.median(name, "cpu_us") is not None]
    for name in sorted(ran, key=lambda name: rounds.median(name, "cpu_us")):
        low, middle, high = rounds.quartiles(name, base, "cpu_us")
        speed = rounds.ratio(name, base, "rows_per_s")
        shown = [
            f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{rounds.median(name, 'cpu_us'):.2f}",
            f"{rounds.median(name, 'rows_per_s'):.0f}",
            f"{speed:.2f}",
            _number(rounds.median(name, "rows_per_call"), ".1f"),
            _number(rounds.median(name, "p50_us"), ".0f"),
        ]
        print(f"| {name} | {' | '.join(shown)} |")
    for name in rounds.names():
        if error := rounds.error(name):
            print(f"\n{name} failed: {error}")
    sys.stdout.flush()


def tell_server(rounds):
    """Print what the model server gave."""
    cost = f"{http_side.CALL_MS} ms + {http_side.TEXT_MS} ms a text"
    print(f"\n## model server of {cost} behind HTTP, {http_side.STATIONS} stations\n")
    print("| way | texts/s | to each for itself |")
    print("| --- | --- | --- |")
    for way in http_side.CONNECTIONS:
        ratio = rounds.ratio(way, "each for itself", "texts_per_s")
        print(f"| {way} | {rounds.median(way, 'texts_per_s'):.1f} | {ratio:.2f} |")


def tell_verdicts(verdicts):
    print(
        f"\n## goals (peers on their better loop; calls of {BATCH_ROWS} rows, {IN_FLIGHT} at once; "
        f"lists of {BULK_ROWS})\n"
    )
    print("| # | what | goal | seen | holds |")
    print("| --- | --- | --- | --- | --- |")
    for each in verdicts:
        holds = {True: "yes", False: "NO", None: "?"}[each.holds]
        seen = "not measured" if each.ratio is None else f"{each.ratio:.2f}"
        seen += each.against and f" ({each.against})"
        print(f"| {each.name} | {each.what} | {each.sign} {each.bound:g} | {seen} | {holds} |")


def _number(number, form):
    return "" if number is None else format(number, form)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="the model server: half of it")
    parser.add_argument("--cases", default=",".join([*CASES, SERVER]))
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


trio.run(main, arguments())
