"""Charts as SVG text. The colours are Okabe and Ito's, and each style has dashes of its own beside."""

import math
from collections.abc import Callable, Sequence

from dskd.report.document import Chart, Line, RangeChart
from dskd.report.escape import html

WIDTH, HEIGHT = 480, 275
LEFT, RIGHT, TOP, BOTTOM = 56, 348, 10, 240
"""The plot's edges; labels stand to its right."""
LABEL_GAP = 13.0
MOST_LABELS = 16
LABEL_LENGTH = 16
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
DARK_COLOURS = ("#56b4e9", "#ff8533", "#2bc79a", "#e69ac4", "#f0b429", "#9fd4f5", "#bbbbbb")
DASHES = ("none", "7 3", "2 3", "10 3 2 3", "5 2 1 2 1 2")
Scale = Callable[[float], float]


def style_sheet() -> str:
    """Of all styles: a colour and dashes, each repeating after a number of its own, so that 35 differ."""
    light = "".join(f"--c{i}:{colour};" for i, colour in enumerate(COLOURS))
    dark = "".join(f"--c{i}:{colour};" for i, colour in enumerate(DARK_COLOURS))
    classes = "".join(
        f".s{i}{{stroke:var(--c{i % len(COLOURS)});stroke-dasharray:{DASHES[i % len(DASHES)]}}}"
        f".f{i}{{fill:var(--c{i % len(COLOURS)})}}"
        for i in range(len(COLOURS) * len(DASHES))
    )
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{classes}"


def style_number(style: int) -> int:
    return style % (len(COLOURS) * len(DASHES))


def sample(style: int) -> str:
    """A style as a short line, for the legend."""
    return (
        '<svg class="sample" viewBox="0 0 36 8" aria-hidden="true">'
        f'<path class="line s{style_number(style)}" d="M0 4H36"/></svg>'
    )


def line_chart(chart: Chart) -> str:
    """A chart of lines, the end of each group's first line labelled."""
    xs = [x for line in chart.lines for x, _ in line.points]
    ys = [y for line in chart.lines for _, y in line.points]
    x, (ticks, y) = linear(min(xs), max(xs), LEFT, RIGHT), vertical(min(ys), max(ys), chart.log)
    lines = "".join(drawn_line(line, x, y, chart.dots) for line in chart.lines)
    what = f"{chart.title}: {len(chart.lines)} runs, from {short(min(ys))} to {short(max(ys))}"
    return svg(what, HEIGHT, axes(nice_ticks(min(xs), max(xs)), ticks, x, y) + lines + labels(chart.lines, x, y))


def vertical(low: float, high: float, log: bool) -> tuple[list[float], Scale]:
    """Ticks and scale of a vertical axis; a range that a linear axis shows well stays on one."""
    if log and 0 < 30 * low < high:
        ticks = decades(low, high)
        inner = linear(math.log10(ticks[0]), math.log10(ticks[-1]), BOTTOM, TOP)
        return ticks, lambda value: inner(math.log10(value))
    if low == high:  # a constant in the middle
        low, high = (0.0, 1.0) if low == 0 else sorted((low / 2, low * 1.5))
    ticks = nice_ticks(low, high, around=True)
    return ticks, linear(ticks[0], ticks[-1], BOTTOM, TOP)


def svg(what: str, height: float, content: str) -> str:
    view = f'viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{html(what)}"'
    return f'<svg class="chart" {view}>{content}</svg>'


def linear(low: float, high: float, start: float, end: float) -> Scale:
    width = (high - low) or 1.0
    return lambda value: start + (value - low) / width * (end - start)


def nice_ticks(low: float, high: float, most: int = 5, around: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within the range, or one value where it has no width.

    Args:
        around: begin and end with the next ones outside of it.
    """
    width = high - low
    if width <= 0 or not math.isfinite(width) or width < 1e-9 * max(abs(low), abs(high)):
        return [low]
    power = 10.0 ** math.floor(math.log10(width / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if width / (power * factor) <= most)
    begin, end, slack = (math.floor, math.ceil, 1e-9) if around else (math.ceil, math.floor, -1e-9)
    first, last = begin(low / step + slack), end(high / step - slack)
    return [i * step for i in range(first, last + 1)] or [low]


def decades(low: float, high: float) -> list[float]:
    return [10.0**i for i in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def short(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def axes(x_ticks: Sequence[float], y_ticks: Sequence[float], x: Scale, y: Scale) -> str:
    found = [f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>']
    for tick in y_ticks:
        found.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>')
        found.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_ticks:
        found.append(f'<text x="{x(tick):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{short(tick)}</text>')
    found.append(f'<text x="{RIGHT}" y="{BOTTOM + 29}" text-anchor="end">step</text>')
    return "".join(found)


def drawn_line(line: Line, x: Scale, y: Scale, dots: bool) -> str:
    style, title = style_number(line.style), f"<title>{html(line.label)}</title>"
    places = [f"{x(a):.1f} {y(b):.1f}" for a, b in line.points]
    found = [f'<path class="line s{style}" d="M{"L".join(places)}">{title}</path>']
    if dots or len(places) == 1:
        circles = (f'<circle class="f{style}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5"/>' for a, b in line.points)
        found += circles
    for step in line.restarts:
        told = f"<title>{html(line.label)}: started again after step {step:g}</title>"
        found.append(
            f'<path class="restart f{style}" d="M{x(step):.1f} {y(height_at(line, step)):.1f}l-5-9h10z">{told}</path>'
        )
    return "".join(found)


def height_at(line: Line, step: float) -> float:
    """The line's value at a step between two of its points."""
    before = [point for point in line.points if point[0] <= step] or [line.points[0]]
    after = [point for point in line.points if point[0] >= step] or [line.points[-1]]
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (step - x0) / (x1 - x0)


def labels(lines: Sequence[Line], x: Scale, y: Scale) -> str:
    """The name of each style at the end of its first line, moved apart where they would cover each other."""
    first: dict[int, Line] = {}
    for line in lines:
        first.setdefault(line.style, line)
    many = len(first) > MOST_LABELS
    ends = sorted(first.values(), key=lambda line: y(line.points[-1][1]))
    places = apart([y(line.points[-1][1]) for line in ends], (BOTTOM - TOP) / max(1, len(ends)) if many else LABEL_GAP)
    found = []
    for line, place in zip(ends, places, strict=True):
        name = line.label.rpartition(", seed ")[0] or line.label
        text = str(line.style + 1) if many else shortened(name, LABEL_LENGTH)
        end = line.points[-1]
        found.append(
            f'<path class="lead s{style_number(line.style)}" d="M{x(end[0]):.1f} {y(end[1]):.1f}'
            f'L{RIGHT + 4} {place:.1f}H{RIGHT + 12}"/>'
            f'<text class="label" x="{RIGHT + 15}" y="{place + 4:.1f}">{html(text)}</text>'
        )
    return "".join(found)


def shortened(name: str, longest: int) -> str:
    """A name without its middle where it is too long: names often differ at their ends."""
    return name if len(name) <= longest else f"{name[: longest // 3]}…{name[longest // 3 + 1 - longest :]}"


def apart(places: Sequence[float], gap: float) -> list[float]:
    """The same places in order, at least `gap` from each other and within the plot where there is room."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap) if found else max(place, TOP))
    limit = float(BOTTOM)
    for i in reversed(range(len(found))):
        found[i] = min(found[i], limit)
        limit = found[i] - gap
    return found


def range_chart(chart: RangeChart) -> str:
    """Distributions below each other: a line from quartile to quartile with a dot at the median."""
    low, high = min(each.low for each in chart.ranges), max(each.high for each in chart.ranges)
    ticks = nice_ticks(min(low, 0.0), high)
    left, row, bottom = 200, 24, TOP + 24 * len(chart.ranges) + 6
    x = linear(min(low, 0.0), max(high, ticks[-1]), left, WIDTH - 20)
    found = [f'<path class="axis" d="M{left} {TOP}V{bottom}H{WIDTH - 20}"/>']
    for tick in ticks:
        found.append(f'<path class="grid" d="M{x(tick):.1f} {TOP}V{bottom}"/>')
        found.append(f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{short(tick)}</text>')
    for i, each in enumerate(chart.ranges):
        y, style = TOP + row * (i + 0.5), style_number(each.style)
        told = f"{each.label}: median {short(each.middle)}, half of them from {short(each.low)} to {short(each.high)}"
        name = shortened(each.label, 26)
        found.append(
            f'<text x="{left - 6}" y="{y + 4:g}" text-anchor="end">{html(name)}</text>'
            f'<path class="range f{style}" d="M{x(each.low):.1f} {y - 3:g}H{x(each.high):.1f}v6H{x(each.low):.1f}z">'
            f"<title>{html(told)}</title></path>"
            f'<circle class="f{style}" cx="{x(each.middle):.1f}" cy="{y:g}" r="5"/>'
        )
    return svg(chart.title, bottom + 24, "".join(found))
