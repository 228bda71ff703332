"""A frame with two axes on a canvas, and names beside points that do not cover each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pi0exp.report.svg import FONT, INK, MUTED, SMALL, Canvas, fitted, width_of


@dataclass(frozen=True)
class Axis:
    """From low to high, of which either is above 0 where it is logarithmic."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        if self.log:
            decades = math.log10(self.high / self.low)
            steps = (1, 2, 5) if decades < most / 3 else (1, 3) if decades < most / 2 else (1,)
            found = LogLocator(base=10, subs=steps, numticks=100).tick_values(self.low, self.high)
        else:
            found = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        edge = 1e-9 * (self.high - self.low)
        return [float(one) for one in found if self.low - edge <= one <= self.high + edge]


_LEAST_LOG = 4.0
"""A logarithmic axis ends at so many times its start, or more: less has no ticks worth the name."""


def axis(values: Sequence[float], log: bool = False, zero: bool = False) -> Axis:
    """An axis that holds these values with some air. zero: from 0 on."""
    low, high = min(values), max(values)
    if log:
        air = max((high / low) ** 0.08, 1.15, math.sqrt(_LEAST_LOG * low / high))
        return Axis(low / air, high * air, log=True)
    if zero:
        return Axis(0.0, (high or 1.0) * 1.08)
    air = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - air, high + air)


def tick_text(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        power = math.floor(math.log10(abs(value)))
        lead = value / 10**power
        return f"1e{power}" if abs(lead - 1) < 1e-6 else f"{lead:.3g}e{power}"
    return f"{value:.6g}"


@dataclass
class Frame:
    """The area between the axes; x and y place values in pixels."""

    canvas: Canvas
    x_axis: Axis
    y_axis: Axis
    left: float = 62.0
    top: float = 26.0
    height: float = 300.0
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = 52.0 if self.canvas.narrow else 62.0
        self.height = 240.0 if self.canvas.narrow else 320.0

    @property
    def right(self) -> float:
        return self.canvas.width - 12

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def x(self, value: float) -> float:
        return self.left + self.x_axis.place(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.y_axis.place(value) * self.height

    def inside(self, x: float, y: float) -> bool:
        return 0 <= self.x_axis.place(x) <= 1 and 0 <= self.y_axis.place(y) <= 1

    def draw(self, x_title: str, y_title: str) -> None:
        """Grid, ticks and titles; the canvas ends below them."""
        canvas = self.canvas
        for value in self.x_axis.ticks(5 if canvas.narrow else 9):
            canvas.line(self.x(value), self.top, self.x(value), self.bottom)
            canvas.text(self.x(value), self.bottom + 17, tick_text(value), SMALL, MUTED, "middle")
        for value in self.y_axis.ticks(6):
            canvas.line(self.left, self.y(value), self.right, self.y(value))
            canvas.text(self.left - 7, self.y(value) + 4, tick_text(value), SMALL, MUTED, "end")
        canvas.line(self.left, self.bottom, self.right, self.bottom, INK)
        canvas.line(self.left, self.top, self.left, self.bottom, INK)
        canvas.text(self.left, self.top - 10, y_title, FONT, INK)
        canvas.text(self.right, self.bottom + 36, x_title, FONT, INK, "end")
        canvas.height = self.bottom + 46

    def occupy(self, x: float, y: float, radius: float = 6.0) -> None:
        """Pixels that no name may cover."""
        self.taken.append((x - radius, y - radius, x + radius, y + radius))

    def name(self, points: Sequence[tuple[float, float, str]]) -> None:
        """Names (x and y in pixels) beside their points where there is room for all; else numbers, and a key below."""
        for x, y, _ in points:
            self.occupy(x, y)
        places = None if self.canvas.narrow else self.places(points)
        if places is None:
            numbers = [(x, y, str(i)) for i, (x, y, _) in enumerate(points, 1)]
            places = self.places(numbers)
            self.key([f"{i}  {text}" for i, (_, _, text) in enumerate(points, 1)])
        else:
            numbers = list(points)
        for (x, y), (px, py, text) in zip(places or [(x + 7, y - 5) for x, y, _ in numbers], numbers, strict=True):
            near = min(max(px, x), x + width_of(text, SMALL)), y + 2 if py > y else y - SMALL + 2
            if math.dist(near, (px, py)) > 14:
                self.canvas.line(px, py, *near, MUTED, 0.8)
            self.canvas.text(x, y, text, SMALL)

    def places(
        self, points: Sequence[tuple[float, float, str]], size: float = SMALL
    ) -> list[tuple[float, float]] | None:
        """Base lines of the names, tried around each point and further away; None where one finds no room."""
        taken, found = list(self.taken), []
        for x, y, text in points:
            width = width_of(text, size)
            for dx, dy in _AROUND:
                left = x + dx if dx > 0 else x + dx - width if dx < 0 else x - width / 2
                box = (left, y + dy - size, left + width, y + dy + 3)
                within = (
                    box[0] >= self.left + 2 and box[2] <= self.right and self.top <= box[1] and box[3] <= self.bottom
                )
                if within and not any(_overlap(box, other) for other in taken):
                    taken.append(box)
                    found.append((left, y + dy))
                    break
            else:
                return None
        self.taken = taken
        return found

    def key(self, lines: Sequence[str], colours: Sequence[str] = ()) -> None:
        """Lines below the picture, in columns where it is wide; with a patch of colour each, if there are colours."""
        columns = 1 if self.canvas.narrow or max(map(len, lines), default=0) > 52 else 2
        room = (self.canvas.width - 16) / columns
        rows = -(-len(lines) // columns)
        for i, text in enumerate(lines):
            x, y = 8 + room * (i // rows), self.canvas.height + 14 + 19 * (i % rows)
            if colours:
                self.canvas.bar(x, y - 10, 11, 11, colours[i], text)
                x += 18
            self.canvas.text(x, y, fitted(text, room - 24, SMALL), SMALL)
        self.canvas.height += 19 * rows + 8


_AROUND = tuple(
    (dx, dy)
    for away in (1, 2, 3, 5)
    for dx, dy in (
        (8 * away, 4),
        (-8 * away, 4),
        (8 * away, -9 * away),
        (8 * away, 15 * away),
        (-8 * away, -9 * away),
        (-8 * away, 15 * away),
        (0, -10 * away),
        (0, 18 * away),
    )
)
"""Where a name may stand, seen from its point: the nearest places first."""


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def legend(canvas: Canvas, x: float, y: float, entries: Sequence[tuple[str, str]]) -> float:
    """Patches of colour with names, in as many lines as they need; the y below them."""
    at = x
    for name, colour in entries:
        wide = width_of(name, SMALL) + 34
        if at + wide > canvas.width and at > x:
            at, y = x, y + 20
        canvas.bar(at, y - 10, 11, 11, colour, name)
        canvas.text(at + 17, y, name, SMALL)
        at += wide
    return y + 20
