"""The cases: who runs under which load, and what the figures say about the goals C1 to C3."""

import pathlib
import sys

from harness.contenders import Contender, take_turns
from harness.figures import Rounds, Verdict, tell_errors, tell_ratios, tell_table
from harness.plots import Line, Plot

HERE = pathlib.Path(__file__).parent
OURS = "stationmaster"
OURS_BATCH = "stationmaster, batch handler"
LIKE_OURS = "asyncio, timeouts"
CLASSIC = "asyncio, no cancelling"
HANDLER_S = 0.05
MS = HANDLER_S * 1000


def contenders(peers, load, *, batch_handler=True):
    """Return all contenders of one load: the project, and the classic design twice on each loop."""
    yield Contender(OURS, HERE / "trio_side.py", load | {"handler": "station"})
    if batch_handler:
        yield Contender(OURS_BATCH, HERE / "trio_side.py", load | {"handler": "batch"})
    loops = {"asyncio": sys.executable}
    if "uvloop" in peers:
        loops = dict.fromkeys(("asyncio", "uvloop"), peers["uvloop"])
    for loop, python in loops.items():
        for timeouts in (True, False):
            name = f"{loop}, {'timeouts' if timeouts else 'no cancelling'}"
            order = load | {"loop": loop, "timeouts": timeouts}
            yield Contender(name, HERE / "asyncio_side.py", order, python)


def load(arguments, *, stations, in_flight=10, sleep_s=0.0):
    """Return a load of about `--jobs` station jobs, each station in every batch."""
    return {
        "stations": stations,
        "per_batch": stations,
        "in_flight": in_flight,
        "sleep_s": sleep_s,
        "warm": min(max(2 * in_flight, 2000 // stations), arguments.jobs // stations + in_flight),
        "batches": max(arguments.jobs // stations, in_flight),
    }


def jobs(peers, arguments, shuffler):
    """C1 and C2: 100 stations, 10 batches in flight, a handler that does nothing."""
    title = "jobs: 100 stations a batch, 10 batches in flight, a handler that lets others run once"
    rounds = _turns(peers, arguments, shuffler, title, load(arguments, stations=100))
    for name, other, bound in (
        (LIKE_OURS, "the same duties", 1.8),
        (CLASSIC, "no cancelling", 0.85),
    ):
        what = f"station jobs per CPU second, to the asyncio design with {other}"
        yield Verdict("C1", what, ">=", bound, rounds.ratio(OURS, name, "jobs_per_cpu_s"))
    what = "the same with a batch handler, to the asyncio design with the same duties"
    yield Verdict("C2", what, ">=", 6.0, rounds.ratio(OURS_BATCH, LIKE_OURS, "jobs_per_cpu_s"))


def waiting(peers, arguments, shuffler):
    """No goal: the same with a handler that sleeps 1 ms, so that all ten batches are truly in flight."""
    title = "waiting: the same with a handler that sleeps 1 ms (no goal)"
    _turns(peers, arguments, shuffler, title, load(arguments, stations=100, sleep_s=0.001))
    return ()


def growth(peers, arguments, shuffler):
    """C3: from 10 to 1,000 stations, each in every batch."""
    title = "growth: CPU, us a job, by stations (each in every batch, 10 batches in flight)"
    steps = arguments.growth
    part = [
        Contender(f"{each.name}/{stations}", each.script, each.order, each.python)
        for stations in steps
        for each in contenders(peers, load(arguments, stations=stations))
        if not each.name.startswith("uvloop")
    ]
    rounds = take_turns(part, rounds=arguments.rounds, shuffler=shuffler, title=title)
    ran = {
        name: [rounds.median(f"{name}/{stations}", "cpu_us") for stations in steps]
        for name in (OURS, OURS_BATCH, LIKE_OURS, CLASSIC)
    }
    ran = {name: costs for name, costs in ran.items() if None not in costs}
    print(f"\n## {title}\n")
    tell_table(
        ["contender", *steps],
        [[name, *(f"{cost:.2f}" for cost in costs)] for name, costs in ran.items()],
    )
    tell_errors(rounds)
    if arguments.plots:
        lines = [Line(name, list(zip(steps, costs, strict=True))) for name, costs in ran.items()]
        words = "CPU of one station's job, by stations in a batch"
        Plot(words, "stations a batch", "microseconds", lines, log_x=True).write(
            arguments.plots / "job-cost.svg"
        )
    few, many = steps[0], steps[-1]
    seen = rounds.ratio(f"{OURS}/{many}", f"{OURS}/{few}", "cpu_us")
    yield Verdict("C3", f"CPU of a job, {many:,} stations to {few}", "<=", 1.15, seen)


def law(peers, arguments, shuffler):
    """Batches/s are at most in_flight / duration, and 1 / duration for a station that is in every batch."""
    title = f"law: batches/s by batches in flight, 10 stations a batch, a handler of {MS:g} ms"
    kinds = {"stations of its own for each batch": True, "the same stations in every batch": False}
    steps = arguments.slots
    part = []
    for slots in steps:
        for kind, own in kinds.items():
            order = load(arguments, stations=10 * slots if own else 10, in_flight=slots)
            bound = (slots if own else 1) / HANDLER_S
            order |= {
                "handler": "station",
                "sleep_s": HANDLER_S,
                "per_batch": 10,
                "warm": slots + 1,
                "batches": max(10, min(int(bound), 500)),  # half a second to a second each
            }
            part.append(Contender(f"{kind}/{slots}", HERE / "trio_side.py", order))
    rounds = take_turns(part, rounds=min(arguments.rounds, 3), shuffler=shuffler, title=title)
    print(f"\n## {title}\n")
    seen = {
        kind: [(slots, rounds.median(f"{kind}/{slots}", "batches_per_s")) for slots in steps]
        for kind in kinds
    }
    rows = [
        [
            slots,
            f"{slots / HANDLER_S:.0f}",
            *(_speed(dict(points)[slots]) for points in seen.values()),
        ]
        for slots in steps
    ]
    tell_table(["in flight", "in flight / duration", *kinds], rows)
    tell_errors(rounds)
    if arguments.plots and not rounds.errors():
        bound = [(slots, slots / HANDLER_S) for slots in steps]
        lines = [Line(kind, points) for kind, points in seen.items()]
        lines.append(Line("in_flight / duration", bound, dashed=True))
        words = f"Batches per second, handlers of {MS:g} ms, 10 stations a batch"
        Plot(words, "batches in flight", "batches per second", lines, log_x=True, log_y=True).write(
            arguments.plots / "in-flight.svg"
        )
    return ()


def stuck(peers, arguments, shuffler):
    """One of 100 stations hangs for ever, no quorum: what the breaker saves, and what it does not."""
    title = "stuck: batches/s, 100 stations, 10 in flight, handlers of 5 ms, a deadline of 1 s, no quorum"
    ways = {
        "all well": {},
        "one stuck": {"stuck": "S000000"},
        "one stuck, no breaker": {"stuck": "S000000", "breaker_failures": 0, "batches": 20},
    }
    order = load(arguments, stations=100, sleep_s=0.005)
    order |= {"handler": "station", "deadline_s": 1.0, "warm": 60}  # the breaker is open by then
    part = [Contender(name, HERE / "trio_side.py", order | more) for name, more in ways.items()]
    rounds = take_turns(part, rounds=arguments.rounds, shuffler=shuffler, title=title)
    rounds = rounds.with_ratio("kept", "batches_per_s", "all well")
    print(f"\n## {title}\n")
    rows = [
        [name, f"{rounds.median(name, 'batches_per_s'):.1f}", f"{rounds.median(name, 'kept'):.2f}"]
        for name in ways
        if name in rounds.names()
    ]
    tell_table(["stations", "batches/s", "to all well"], rows)
    tell_errors(rounds)
    what = "batches/s with one of 100 stations stuck for ever, to none"
    yield Verdict("-", what, ">=", 0.8, rounds.ratio("one stuck", "all well", "batches_per_s"))


def _speed(number):
    return "?" if number is None else f"{number:.0f}"


def _turns(peers, arguments, shuffler, title, told) -> Rounds:
    rounds = take_turns(
        contenders(peers, told), rounds=arguments.rounds, shuffler=shuffler, title=title
    )
    further = [("jobs per CPU second", "jobs_per_cpu_s", ".0f"), ("succeeded", "succeeded", ".3f")]
    tell_ratios(title, rounds, LIKE_OURS, "cpu_us", unit="CPU, us a job", more=further)
    return rounds


CASES = {"jobs": jobs, "waiting": waiting, "growth": growth, "law": law, "stuck": stuck}
