"""Curves as SVG: axes with round numbers, a line for each series, values shown where the pointer rests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 360, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 8, 10, 34  # margins around the curves
_MOST_POINTS = 160  # of a line; more are averaged

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A series of points."""

    name: str
    points: Sequence[Point]  # by x; a y that is NaN leaves a gap
    colour: int  # from 1: the number of a colour of the page
    dots: bool = False  # mark each point, where there are few
    dashed: bool = False


def chart(lines: Sequence[Line], *, unit: str = "epoch", log: bool = False, level: float | None = None) -> str:
    """Draw lines over one pair of axes.

    Args:
        lines: to draw; empty ones are left out.
        unit: of x.
        log: whether the y axis is logarithmic; then y is above 0.
        level: a y that is marked by a line across.

    Returns:
        An `svg` element; nothing where no line has a point.
    """
    drawn = [(line, thinned([p for p in line.points if not (log and p[1] <= 0)])) for line in lines]
    finite = [point for _, points in drawn for point in points if math.isfinite(point[1])]
    if not finite:
        return ""
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x_axis = _Axis.linear(0, max(xs), _LEFT, _WIDTH - _RIGHT, 6, whole=True)
    heights = [*ys, *([] if level is None else [level])]
    make = _Axis.logarithmic if log else _Axis.linear
    y_axis = make(min(heights), max(heights), _HEIGHT - _BOTTOM, _TOP, 5)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for y in y_axis.ticks:
        at = y_axis.place(y)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(y)}</text>')
    parts += [
        f'<text x="{x_axis.place(x):.1f}" y="{bottom + 16}" text-anchor="middle">{number(x)}</text>'
        for x in x_axis.ticks
    ]
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 4}" text-anchor="end">{escape(unit)}</text>')
    if level is not None:
        parts.append(f'<path class="level" d="M{_LEFT} {y_axis.place(level):.1f}H{right}"/>')
    for line, points in drawn:
        parts += _drawn(line, points, x_axis, y_axis)
    parts += _hovers(drawn, x_axis, unit)
    names = ", ".join(line.name for line, points in drawn if points)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(names)} by {escape(unit)}">'
        f"{''.join(parts)}</svg>"
    )


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most a screenful of points: neighbours are averaged where there are more."""
    size = -(-len(points) // _MOST_POINTS) or 1
    if size == 1:
        return list(points)
    found = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ys = [y for _, y in part if math.isfinite(y)]
        found.append((part[-1][0], sum(ys) / len(ys) if ys else math.nan))
    return found


def number(value: float) -> str:
    """A number in few letters."""
    if not math.isfinite(value):
        return "not a number"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


@dataclass(frozen=True)
class _Axis:
    """Values -> places on the picture."""

    low: float
    high: float
    start: float  # place of the lowest value
    end: float  # place of the highest
    ticks: Sequence[float]
    log: bool = False

    @classmethod
    def linear(cls, low: float, high: float, start: float, end: float, count: int, *, whole: bool = False) -> _Axis:
        """An axis from one round number to another; of `x` from 0 to the last value.

        Args:
            low: lowest value.
            high: highest value.
            start: place of the lowest.
            end: place of the highest.
            count: ticks, about.
            whole: whether ticks are whole numbers where the values reach 2, and the axis ends at the highest value.
        """
        if high <= low:
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        raw = (high - low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
        if whole:
            step = max(1.0, step) if high >= 2 else step
            last = math.floor(high / step + 1e-9)
            return cls(low, high, start, end, [index * step for index in range(math.ceil(low / step), last + 1)])
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = [round(index * step, 12) for index in range(first, last + 1)]
        return cls(ticks[0], ticks[-1], start, end, ticks)

    @classmethod
    def logarithmic(cls, low: float, high: float, start: float, end: float, count: int) -> _Axis:
        """An axis whose ticks are 1, 2 or 5 times a power of ten, or powers alone where that would be too many."""
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) > 2 * count:
            skip = -(-len(powers) // count)
            ticks = [10.0**power for power in powers[::skip]]
            inside = [tick for tick in ticks if low <= tick <= high]
        below = max((tick for tick in ticks if tick <= low), default=low)
        above = min((tick for tick in ticks if tick >= high), default=high)
        if below == above:
            below, above = below / 2, above * 2
        return cls(below, above, start, end, sorted({below, *inside, above}), log=True)

    def place(self, value: float) -> float:
        """Where a value is."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _drawn(line: Line, points: Sequence[Point], x_axis: _Axis, y_axis: _Axis) -> Iterable[str]:
    """A line, broken where it has gaps, and its dots."""
    places: list[str] = []
    gap = True
    for x, y in points:
        if math.isfinite(y):
            places.append(f"{'M' if gap else 'L'}{x_axis.place(x):.1f} {y_axis.place(y):.1f}")
        gap = not math.isfinite(y)
    dashed = " dashed" if line.dashed else ""
    yield f'<path class="line c{line.colour}{dashed}" d="{"".join(places)}"/>'
    if line.dots or len(points) == 1:
        for x, y in points:
            if math.isfinite(y):
                yield f'<circle class="c{line.colour}" cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}" r="3"/>'


def _hovers(drawn: Sequence[tuple[Line, Sequence[Point]]], x_axis: _Axis, unit: str) -> Iterable[str]:
    """Columns, from middle to middle of neighbouring points, that show the values there."""
    values: dict[float, list[str]] = {}
    for line, points in drawn:
        for x, y in points:
            values.setdefault(x, []).append(f"{line.name}: {number(y)}")
    xs = sorted(values)
    for index, x in enumerate(xs):
        left = x_axis.place((xs[index - 1] + x) / 2) if index else _LEFT
        right = x_axis.place((x + xs[index + 1]) / 2) if index + 1 < len(xs) else _WIDTH - _RIGHT
        said = escape("\n".join([f"{unit} {number(round(x, 2))}", *values[x]]))
        yield (
            f'<rect class="hover" x="{left:.1f}" y="{_TOP}" width="{max(0.0, right - left):.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}"><title>{said}</title></rect>'
        )
