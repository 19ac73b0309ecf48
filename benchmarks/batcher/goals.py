"""What the figures say about the goals B1 to B7: ratios within a round, then the median over the rounds."""

import operator
import statistics
from dataclasses import dataclass

DEDICATED = ("async-batcher", "bentoml", "batched", "ray", "infinity")
GATHERING = ("async-batcher", "batched", "ray", "infinity")  # those that wait for a fixed time
LISTS = ("batched, list", "infinity, list", "aiodataloader, list")


NOBODY = (None, "no peer ran")
SIGNS = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Verdict:
    """A goal, and what was seen."""

    name: str
    what: str
    sign: str
    bound: float
    ratio: float | None
    """None: it was not measured."""
    against: str = ""

    @property
    def holds(self):
        """Return whether the goal is met; None if nobody knows."""
        return None if self.ratio is None else SIGNS[self.sign](self.ratio, self.bound)


class Rounds:
    """The rounds of one case: contender@loop -> figures, for each round."""

    def __init__(self, rounds):
        self._rounds = rounds

    def ratios(self, one, other, figure):
        """Return one to other, of each round in which both ran."""
        return [
            each[one][figure] / each[other][figure]
            for each in self._rounds
            if figure in each.get(one, {}) and figure in each.get(other, {})
        ]

    def ratio(self, one, other, figure):
        """Return the median of the ratios; None without any."""
        found = self.ratios(one, other, figure)
        return statistics.median(found) if found else None

    def quartiles(self, one, other, figure):
        """Return the quartiles of the ratios, the median in the middle."""
        found = self.ratios(one, other, figure)
        return statistics.quantiles(found, method="inclusive") if len(found) > 1 else found * 3

    def median(self, name, figure):
        """Return a contender's own median; None if it did not run."""
        found = [each[name][figure] for each in self._rounds if figure in each.get(name, {})]
        found = [number for number in found if number is not None]
        return statistics.median(found) if found else None

    def error(self, name):
        """Return what a contender died of, if it did."""
        return next((each[name]["error"] for each in self._rounds if "error" in each[name]), None)

    def names(self):
        """Return who took part."""
        return list(self._rounds[0])

    def better(self, contender, figure, *, most=False):
        """Return the contender on its better loop; None if it ran on neither."""
        both = [
            (self.median(name, figure), name)
            for name in self.names()
            if name.partition("@")[0] == contender and self.median(name, figure) is not None
        ]
        if not both:
            return None
        return (max(both) if most else min(both))[1]

    def against(self, ours, contenders, figure, *, most=False):
        """Return ours to each of the others on its better loop, with its name."""
        names = (self.better(each, figure, most=most) for each in contenders)
        return [(self.ratio(ours, name, figure), name) for name in names if name]


def judge_callers(many):
    """Judge B1 to B4 by the rounds of 1,000 callers and a model that answers at once."""
    floor = many.ratio("embed@trio", "floor@trio", "cpu_us")
    yield Verdict("B1", "CPU of `embed` to a bare park and wake", "<=", 1.4, floor)
    nearest = max(many.against("embed@trio", DEDICATED, "cpu_us"), default=NOBODY)
    yield Verdict("B2", "CPU of `embed` to the nearest dedicated batcher", "<", 1.0, *nearest)
    loader = many.ratio("embed@trio", "aiodataloader@asyncio", "cpu_us")
    yield Verdict("B3", "CPU of `embed` to aiodataloader on asyncio", "<=", 1.15, loader)
    bulk = many.ratio("embed_many@trio", "embed@trio", "cpu_us")
    yield Verdict("B4", "CPU of a row of `embed_many` of 16 to `embed`", "<=", 0.25, bulk)
    nearest = max(many.against("embed_many@trio", LISTS, "cpu_us"), default=NOBODY)
    ahead = nearest[0] and 1 / nearest[0]
    what = "CPU of a row of the nearest peer's list call to `embed_many`"
    yield Verdict("B4", what, ">=", 3.0, ahead, nearest[1])


def judge_idle(idle):
    """Judge B5 by the rounds of one caller."""
    whole = idle.ratios("embed, defaults@trio", "floor@trio", "p50_us")
    model = idle.ratios("model alone@trio", "floor@trio", "p50_us")
    added = [one - other for one, other in zip(whole, model, strict=True)]
    what = "latency that `embed` adds for a lone caller, to a bare park and wake"
    yield Verdict("B5", what, "<=", 2.5, statistics.median(added))


def judge_gathering(waits):
    """Judge B6 by the rounds of 32 callers and a model of 2 ms."""
    found = waits.against("embed, defaults@trio", GATHERING, "rows_per_s", most=True)
    what = "requests/s of 32 callers, model of 2 ms, to the nearest peer that waits 5 ms"
    yield Verdict("B6", what, ">=", 2.3, *min(found, default=NOBODY))


def judge_server(server):
    """Judge B7 by the rounds against a model server."""
    gain = server.ratio("batched", "each for itself", "texts_per_s")
    yield Verdict("B7", "texts/s batched to each station for itself", ">=", 5.0, gain)
    share = server.ratio("batched", "back to back", "texts_per_s")
    yield Verdict("B7", "texts/s batched to the server's own limit", ">=", 0.9, share)
