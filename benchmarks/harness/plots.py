"""Line plots as SVG, made by the benchmarks for the documentation. Standard library only."""

import math
import pathlib
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 48
COLOURS = ("#1b6ca8", "#c1440e", "#3a7d44", "#7a4fa3")


@dataclass(frozen=True)
class Line:
    """A named row of (x, y)."""

    name: str
    points: list
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """One plot; both axes begin at 0 unless they are logarithmic."""

    title: str
    x: str
    y: str
    lines: list
    log_x: bool = False
    log_y: bool = False

    def write(self, path):
        """Write it as SVG."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._svg(), encoding="utf-8")

    def _svg(self):
        across = _Axis([x for line in self.lines for x, _ in line.points], log=self.log_x)
        up = _Axis([y for line in self.lines for _, y in line.points], log=self.log_y)

        def place(x, y):
            return (
                LEFT + across.share(x) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - up.share(y) * (HEIGHT - TOP - BOTTOM),
            )

        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {_LOOK}>',
            f"<title>{escape(self.title)}</title>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            _text(LEFT, 20, self.title, anchor="start", size=14),
            _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, self.x),
            _text(16, (TOP + HEIGHT - BOTTOM) / 2, self.y, turned=True),
        ]
        for tick in up.ticks():
            _, y = place(across.low, tick)
            parts.append(
                f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
                + _text(LEFT - 6, y + 4, _number(tick), anchor="end")
            )
        for tick in across.ticks():
            x, _ = place(tick, up.low)
            parts.append(
                f'<path d="M{x:.1f} {HEIGHT - BOTTOM}v4" stroke="#222"/>'
                + _text(x, HEIGHT - BOTTOM + 18, _number(tick))
            )
        parts.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" {_STROKE}/>')
        for number, line in enumerate(self.lines):
            parts += _drawn(line, COLOURS[number % len(COLOURS)], number, place)
        return "\n".join([*parts, "</svg>", ""])


_LOOK = 'role="img" font-family="sans-serif" font-size="12" fill="#222"'
_STROKE = 'fill="none" stroke="#222"'


class _Axis:
    def __init__(self, numbers, *, log):
        self._log = log
        self.low = min(numbers) if log else 0.0
        self._high = max(numbers) if log else max(numbers) * 1.05
        if self._high <= self.low:
            self._high = self.low + 1.0

    def share(self, number):
        if self._log:
            return math.log(number / self.low) / math.log(self._high / self.low)
        return (number - self.low) / (self._high - self.low)

    def ticks(self):
        if self._log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self._high))
            tens = [10.0**power for power in range(first, last + 1)]
            return tens if len(tens) > 2 else sorted({self.low, *tens, self._high})
        step = 10 ** math.floor(math.log10(self._high / 2))
        step *= next(many for many in (1, 2, 5, 10) if self._high / (step * many) <= 6)
        return [number * step for number in range(int(self._high / step) + 1)]


def _drawn(line, colour, number, place):
    points = [place(x, y) for x, y in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="6 4"' if line.dashed else ""
    yield f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
    if not line.dashed:
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points)
    y = TOP + 8 + number * 16
    yield f'<path d="M{LEFT + 12} {y}h24" stroke="{colour}" stroke-width="2"{dashes}/>'
    yield _text(LEFT + 42, y + 4, line.name, anchor="start")


def _text(x, y, words, *, anchor="middle", size=12, turned=False):
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place}{turn}>{escape(words)}</text>"


def _number(number):
    return f"{number:,.0f}" if number >= 1 or number == 0 else f"{number:g}"
