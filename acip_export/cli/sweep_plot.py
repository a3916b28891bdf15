"""The drawing of a sweep. The only module that imports matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from acip_export.artifacts.plan import cache_types
from acip_export.errors import MissingExtraError, UsageError
from acip_export.io.outputs import FileKind, claim_output
from acip_export.planning.sweep import SweepLine, SweepPoint
from acip_export.units import format_bytes, format_speed

SUFFIXES = (".png", ".svg")
_WRITER = "acip-export plan --sweep"
DRAWING_KIND = FileKind("a drawing of a sweep", re.compile(rb"(?s)(\x89PNG|<\?xml ).*%b" % _WRITER.encode()))
# Readable next to each other, in grey, and with the common colour blindnesses (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# A curve that runs off to the top says nothing; the interesting part is within this factor of the best.
_PERPLEXITY_SPAN = 4.0

# Left, bottom, right and top of a name, in points.
Box = tuple[float, float, float, float]
# Where a plan lies in the drawing.
PlaceOf = Callable[[SweepPoint], tuple[float, float]]


def require_matplotlib() -> Any:
    """Raises MissingExtraError without matplotlib; asked before anything is computed."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "drawing a sweep") from None
    return mpl


def check_suffix(file: Path) -> None:
    """Raises UsageError for a file that is neither PNG nor SVG."""
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{file} is no drawing: end its name in {' or '.join(SUFFIXES)}")


def draw(lines: Sequence[SweepLine], title: str, scope: str, unit: str, file: Path, force: bool) -> None:
    """Write the curves as PNG or SVG, whole or not at all.

    Args:
        scope: what the bytes count. unit: of the losses, for models without a perplexity.
    """
    mpl = require_matplotlib()
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    perplexities = all(point.predicted_perplexity is not None for line in lines for point in line.points)

    def height(point: SweepPoint) -> float:
        return float(point.predicted_perplexity or 0.0) if perplexities else point.predicted_loss

    largest = max(point.used_bytes for line in lines for point in (*line.points, *line.presets.values()))
    scale, name = next((s, n) for s, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if largest >= s)

    def place_of(point: SweepPoint) -> tuple[float, float]:
        return point.used_bytes / scale, height(point)

    with plt.rc_context({"font.size": 10, "svg.hashsalt": "acip-export", "axes.edgecolor": "#495057"}):
        timed = any(point.speed is not None for line in lines for point in line.points)
        figure, panels = plt.subplots(
            1 + timed,
            squeeze=False,
            sharex=True,
            height_ratios=(3, 1)[: 1 + timed],
            figsize=(8.4, 5.0 + 1.6 * timed),
            layout="constrained",
            facecolor="white",
        )
        axis, lowest = panels[0, 0], panels[-1, 0]
        axis.set_xscale("log")
        if perplexities:
            axis.set_yscale("log")
        for number, line in enumerate(lines):
            axis.plot(*zip(*map(place_of, line.points), strict=True), label=line.label, **_look(number))
        heights = [height(point) for line in lines for point in line.points]
        best = min(heights)
        if perplexities:
            axis.set_ylim(best * 0.97, min(max(heights), best * _PERPLEXITY_SPAN) * 1.03)
        taken: list[Box] = []
        for number, line in enumerate(lines):
            _draw_caches(axis, line, place_of, _COLOURS[number % len(_COLOURS)], taken)
        for number, line in enumerate(lines):
            _draw_presets(axis, line, place_of, _COLOURS[number % len(_COLOURS)], taken)
        if timed:
            _draw_speeds(lowest, lines, scale)
        for ticks, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            if ticks.get_scale() == "log":
                ticks.set_major_locator(mpl.ticker.FixedLocator(_round_numbers(low, high)))
                ticks.set_minor_locator(mpl.ticker.NullLocator())
                ticks.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        lowest.set_xlabel(f"{'file size' if scope == 'file' else scope}, {name}")
        axis.set_ylabel("predicted perplexity" if perplexities else f"predicted loss, {unit}")
        axis.set_title(title, loc="left", fontsize=12, color="#212529")
        for panel in panels[:, 0]:
            panel.tick_params(labelsize=9)
            panel.grid(color="#e9ecef", linewidth=0.8)
            panel.set_axisbelow(True)
            for side in ("top", "right"):
                panel.spines[side].set_visible(False)
        axis.plot(
            [], [], "o", markersize=4.5, color="white", markeredgecolor="#495057", label="one type for everything"
        )
        if any(_caches(line) for line in lines):
            axis.plot([], [], "|", markersize=9, color="#495057", label="other types of KV cache")
        axis.legend(frameon=False, loc="upper right")
        with claim_output(file, DRAWING_KIND, force).new_file() as temporary:
            kind = file.suffix.lower().removeprefix(".")
            metadata = {"Creator": _WRITER, "Date": None} if kind == "svg" else {"Software": _WRITER}
            figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
        plt.close(figure)


def _look(number: int) -> dict[str, Any]:
    """How a line is drawn. Layouts often agree over a stretch; dashes let the line below show."""
    style = "-" if number == 0 else (0, (5, 1 + number))
    return {"color": _COLOURS[number % len(_COLOURS)], "linewidth": 2, "linestyle": style}


def _draw_speeds(axis: Any, lines: Sequence[SweepLine], scale: float) -> None:
    """Tokens a second of an answer with a full context, of the sizes whose types were measured."""
    for number, line in enumerate(lines):
        known = [(point.used_bytes / scale, point.speed.answer) for point in line.points if point.speed is not None]
        axis.plot([x for x, _ in known], [y for _, y in known], **_look(number))
    axis.set_ylim(bottom=0)
    axis.set_ylabel("answer, tokens/s")


def _draw_presets(axis: Any, line: SweepLine, place_of: PlaceOf, colour: str, taken: list[Box]) -> None:
    """Rings with names; a name that would lie on another one goes to another side of its ring, or is left out."""
    low, high = axis.get_ylim()
    for name, point in sorted(line.presets.items(), key=lambda item: item[1].used_bytes):
        place = place_of(point)
        if not low <= place[1] <= high:
            continue
        axis.plot(*place, marker="o", markersize=4.5, color="white", markeredgecolor=colour, zorder=4)
        _annotate(axis, name, place, colour, taken)


def _draw_caches(axis: Any, line: SweepLine, place_of: PlaceOf, colour: str, taken: list[Box]) -> None:
    """Where plans choose the types of the KV cache: each from its smallest size on, named keys before values."""
    caches = [(point.cache_type_k, point.cache_type_v) for point in line.points]
    if len(set(caches)) == 1:
        return
    for before, (keys, values), point in zip([None, *caches], caches, line.points, strict=False):
        if (keys, values) != before:
            place = place_of(point)
            axis.plot(*place, marker="|", markersize=9, color=colour, zorder=4)
            _annotate(axis, keys if keys == values else f"{keys}/{values}", place, colour, taken)


def _annotate(axis: Any, name: str, place: tuple[float, float], colour: str, taken: list[Box]) -> None:
    """Write a name beside a place where no other one is; it is left out where there is no room."""
    x, y = axis.transData.transform(place) * 72 / axis.figure.dpi
    left, bottom, right, top = axis.get_window_extent().extents * 72 / axis.figure.dpi
    width, tall = 4.4 * len(name), 8.0
    for dx, dy in ((5, 4), (5, -11), (-5 - width, 4), (-5 - width, -11), (5, 14), (5, -21)):
        box = (x + dx, y + dy, x + dx + width, y + dy + tall)
        inside = left <= box[0] and box[2] <= right and bottom <= box[1] and box[3] <= top
        if inside and all(box[0] > b[2] or box[2] < b[0] or box[1] > b[3] or box[3] < b[1] for b in taken):
            taken.append(box)
            axis.annotate(name, place, xytext=(dx, dy), textcoords="offset points", fontsize=7.5, color=colour)
            return


def _round_numbers(low: float, high: float) -> list[float]:
    """Ticks for a logarithmic axis, at most a dozen."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leading in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        found = [digit * 10.0**decade for decade in decades for digit in leading if low <= digit * 10.0**decade <= high]
        if len(found) <= 12:
            break
    return found


def summary(lines: Sequence[SweepLine]) -> list[str]:
    """One sentence a line."""
    return [
        f"{line.label}: {format_bytes(line.points[0].used_bytes)} to {format_bytes(line.points[-1].used_bytes)}, "
        f"{len(line.points)} sizes{_caches(line)}{_speeds(line)}"
        for line in lines
    ]


def _caches(line: SweepLine) -> str:
    """What types of KV cache the smallest and the largest size have, if they were chosen."""
    least, most = (cache_types(p.cache_type_k, p.cache_type_v) for p in (line.points[0], line.points[-1]))
    return "" if least == most else f", KV cache of {least} to {most}"


def _speeds(line: SweepLine) -> str:
    """What the smallest and the largest size are predicted to answer with."""
    least, most = line.points[0].speed, line.points[-1].speed
    if least is None or most is None:
        return ""
    return f", {format_speed(least.answer)} to {format_speed(most.answer)} tokens/s"
