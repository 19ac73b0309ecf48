"""What the figures of all rounds say: ratios within a round, then the median over the rounds; goals and tables."""

import operator
import statistics
from dataclasses import dataclass

SIGNS = {"<": operator.lt, "<=": operator.le, ">=": operator.ge, ">": operator.gt}


@dataclass(frozen=True)
class Verdict:
    """A goal, and what was seen."""

    name: str
    what: str
    sign: str
    bound: float
    seen: float | None
    """None: it was not measured."""
    against: str = ""
    unit: str = ""

    @property
    def holds(self):
        """Return whether the goal is met; None if nobody knows."""
        return None if self.seen is None else SIGNS[self.sign](self.seen, self.bound)


class Rounds:
    """The rounds of one case: contender -> figures, for each round."""

    def __init__(self, rounds):
        self._rounds = rounds

    def all(self, name, figure):
        """Return a figure of every round in which the contender ran."""
        return [each[name][figure] for each in self._rounds if figure in each.get(name, {})]

    def ratios(self, one, other, figure, other_figure=None):
        """Return one to other, of each round in which both ran."""
        other_figure = other_figure or figure
        return [
            each[one][figure] / each[other][other_figure]
            for each in self._rounds
            if figure in each.get(one, {}) and other_figure in each.get(other, {})
        ]

    def ratio(self, one, other, figure, other_figure=None):
        """Return the median of the ratios; None without any."""
        found = self.ratios(one, other, figure, other_figure)
        return statistics.median(found) if found else None

    def median(self, name, figure):
        """Return a contender's own median; None if it did not run."""
        found = self.all(name, figure)
        return statistics.median(found) if found else None

    def with_ratio(self, called, figure, base):
        """Return these rounds with one more figure: the ratio of another to that of `base` in the same round."""
        rounds = []
        for each in self._rounds:
            whole = each.get(base, {}).get(figure)
            rounds.append(
                {
                    name: figures
                    | ({called: figures[figure] / whole} if whole and figure in figures else {})
                    for name, figures in each.items()
                }
            )
        return Rounds(rounds)

    def errors(self):
        """Return contender -> what it died of."""
        return {
            name: figures["error"]
            for each in self._rounds
            for name, figures in each.items()
            if "error" in figures
        }

    def names(self):
        """Return who ran to the end at least once."""
        seen = {name: None for each in self._rounds for name in each}
        return [name for name in seen if name not in self.errors()]


def tell_ratios(title, rounds, base, figure, *, unit, more=()):
    """Print a case, cheapest first: the ratio to `base`, its spread, and the figure itself.

    `more` are (heading, figure, format) of further columns, medians.
    """
    print(f"\n## {title}\n")
    rows = []
    for name in sorted(rounds.names(), key=lambda name: rounds.median(name, figure)):
        found = rounds.ratios(name, base, figure) or [float("nan")]
        further = [_shown(rounds.median(name, each), form) for _, each, form in more]
        rows.append(
            [
                name,
                f"{statistics.median(found):.2f}",
                f"{min(found):.2f} to {max(found):.2f}",
                f"{rounds.median(name, figure):.2f}",
                *further,
            ]
        )
    headings = [heading for heading, _, _ in more]
    tell_table(["contender", f"to {base}", "min to max", unit, *headings], rows)
    tell_errors(rounds)


def _shown(number, form):
    return "" if number is None else format(number, form)


def tell_errors(rounds):
    """Name the contenders that broke."""
    for name, error in rounds.errors().items():
        print(f"\nNOT RUN: {name}: {error}")


def tell_table(headings, rows):
    """Print a table."""
    print(f"| {' | '.join(map(str, headings))} |")
    print(f"| {' | '.join('---' for _ in headings)} |")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")


def tell_verdicts(verdicts):
    """Print which goals hold."""
    rows = []
    for each in verdicts:
        holds = {True: "yes", False: "NO", None: "?"}[each.holds]
        seen = "not measured" if each.seen is None else f"{each.seen:.2f}{each.unit}"
        seen += each.against and f" ({each.against})"
        rows.append([each.name, each.what, f"{each.sign} {each.bound:g}{each.unit}", seen, holds])
    print("\n## goals\n")
    tell_table(["#", "what", "goal", "seen", "holds"], rows)


def percentile(numbers, share):
    """Return the smallest number that `share` of all do not exceed."""
    ordered = sorted(numbers)
    return ordered[min(len(ordered) - 1, max(0, -int(-len(ordered) * share // 1) - 1))]
