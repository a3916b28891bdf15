"""The tables and plots of a comparison, written into the pages that show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from samples.marked import with_marked

OURS = "acip-export"
PAGE, PLOTS = "docs/measurements/rivals.md", "docs/images/rivals-{}.svg"
RUNTIMES = {"gguf": "GGUF in llama.cpp", "onnx": "ONNX in onnxruntime-genai"}
# Readable in grey and with the common colour blindnesses (Okabe and Ito).
STYLES = (("#D55E00", "s"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "x"))
# What the README shows of them: each size class once.
SHOWN = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "int4 default")
Row = dict[str, Any]


def title(row: Row) -> str:
    """What a row is called by ours beside it."""
    return f"{row['format']} {row['tool']} {row['name']}"


def pairs(rows: list[Row], fmt: str) -> list[tuple[Row, Row]]:
    """The rows of other tools, largest first, each with ours of at most its bytes (empty while there is none)."""
    mine = {row["name"]: row for row in rows if row["tool"] == OURS and "bytes" in row}
    theirs = [row for row in rows if row["format"] == fmt and row["tool"] != OURS and "bytes" in row]
    return [(row, mine.get(title(row), {})) for row in sorted(theirs, key=lambda row: (-row["bytes"], row["mean_kl"]))]


def tables(document: dict[str, Any], fmt: str) -> str:
    """Quality, then time and memory, then what did not run."""
    found = pairs(document["rows"], fmt)
    failed = [row for row in document["rows"] if row["format"] == fmt and "failed" in row]
    lines = [
        "| file | MB | KL | **ours** | share | KL 99.9 % | **ours** | same top | **ours** | perplexity | **ours** |",
        "| --- |" + " ---: |" * 10,
    ]
    for theirs, ours in found:
        share = f"{ours['mean_kl'] / theirs['mean_kl']:.2f}" if ours else ""
        cells = [f"{theirs['tool']} {theirs['name']}", f"{theirs['bytes'] / 1e6:.1f}"]
        cells += [_text(theirs, "mean_kl", ".4f"), _text(ours, "mean_kl", ".4f"), share]
        for field, form in (("kl_999", ".2f"), ("same_top", ".1%"), ("perplexity", ".2f")):
            cells += [_text(theirs, field, form), _text(ours, field, form)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| file | written in, s of processor | **ours** | peak, GB | **ours** | prefill, tokens/s | **ours** "
        "| decode, tokens/s | **ours** | runs in, MB | **ours** |",
        "| --- |" + " ---: |" * 10,
    ]
    for theirs, ours in found:
        cells = [f"{theirs['tool']} {theirs['name']}"]
        costs = [row | row.get("writing", {}) for row in (theirs, ours)]
        for field, form, unit in (
            ("processor_seconds", ".0f", 1),
            ("peak_bytes", ".2f", 1e9),
            ("prefill_tokens_per_second", ".0f", 1),
            ("decode_tokens_per_second", ".0f", 1),
            ("memory_bytes", ".0f", 1e6),
        ):
            cells += [_text(row, field, form, unit) for row in costs]
        lines.append(f"| {' | '.join(cells)} |")
    if failed:
        lines += ["", "| did not run | why |", "| --- | --- |"]
        lines += [f"| {row['tool']} {row['name']} | {row['failed'].replace('|', '/')} |" for row in failed]
    return "\n".join(lines)


def summary(document: dict[str, Any]) -> str:
    """KL of other tools' files, and of ours of at most the same bytes."""
    lines = ["| file | MB | its KL | **ours** | |", "| --- |" + " ---: |" * 4]
    for fmt in RUNTIMES:
        for theirs, ours in pairs(document["rows"], fmt):
            if ours and theirs["name"] in SHOWN:
                cells = [f"{theirs['tool']} {theirs['name']}", f"{theirs['bytes'] / 1e6:.1f}"]
                cells += [_text(theirs, "mean_kl", ".4f"), f"**{_text(ours, 'mean_kl', '.4f')}**"]
                lines.append(f"| {' | '.join(cells)} | {theirs['mean_kl'] / ours['mean_kl']:.1f} times less |")
    return "\n".join(lines)


def _text(row: Row, field: str, form: str, unit: float = 1) -> str:
    value = row.get(field)
    return "" if value is None else format(value / unit, form)


def page(text: str, document: dict[str, Any]) -> str:
    """``text`` with the tables between its markers."""
    for fmt in RUNTIMES:
        text = with_marked(text, f"rivals {fmt}", tables(document, fmt))
    return text


def update(document: dict[str, Any], root: Path) -> None:
    """Write the page's tables, the README's, and the plots again."""
    readme = root / "README.md"
    readme.write_text(
        with_marked(readme.read_text(encoding="utf-8"), "rivals summary", summary(document)), encoding="utf-8"
    )
    file = root / PAGE
    file.write_text(page(file.read_text(encoding="utf-8"), document), encoding="utf-8")
    for fmt in RUNTIMES:
        if pairs(document["rows"], fmt):
            plot(document["rows"], fmt, root / PLOTS.format(fmt))


def plot(rows: list[Row], fmt: str, file: Path) -> None:
    """KL on a logarithmic axis against megabytes: a colour a tool."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [row for row in rows if row["format"] == fmt and "bytes" in row]
    tools = list(dict.fromkeys(row["tool"] for row in drawn if row["tool"] != OURS))
    with plt.rc_context({"font.size": 10, "svg.hashsalt": "rivals", "axes.edgecolor": "#495057"}):
        figure, axis = plt.subplots(figsize=(8.4, 5.0), layout="constrained", facecolor="white")
        axis.set_yscale("log")
        line = sorted({(row["bytes"] / 1e6, row["mean_kl"]) for row in drawn if row["tool"] == OURS})
        if line:
            x, y = zip(*line, strict=True)
            axis.plot(x, y, "o-", color="#0072B2", markersize=4, linewidth=1.8, zorder=3, label=OURS)
        for (colour, marker), tool in zip(STYLES, tools, strict=False):
            points = sorted((row["bytes"] / 1e6, row["mean_kl"], row["name"]) for row in drawn if row["tool"] == tool)
            x, y, names = zip(*points, strict=True)
            axis.plot(x, y, marker, color=colour, markersize=5, linestyle="none", zorder=4, label=tool)
            for place, (size, kl, name) in enumerate(zip(x, y, names, strict=True)):
                # Neighbours' names at different heights, so that they can be told apart.
                offset = (4, 4 + 7 * (place % 3))
                axis.annotate(name, (size, kl), offset, textcoords="offset points", fontsize=6.5, color=colour)
        axis.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(labelsize=9)
        axis.set_xlabel("all files, MB")
        axis.set_ylabel("KL to the dense model, nats per token")
        axis.set_title(f"SmolLM2-135M, {RUNTIMES[fmt]}", loc="left", fontsize=12, color="#212529")
        axis.grid(which="both", color="#e9ecef", linewidth=0.7)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.legend(frameon=False, loc="upper right")
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)
