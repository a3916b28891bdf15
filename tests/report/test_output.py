"""The page and the card, read as their readers would: an HTML parser, a YAML reader, a Markdown reader, a browser."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from markdown_it import MarkdownIt

from acip_export.api import report as reporting
from acip_export.artifacts.names import CARD_FILE, PAGE_FILE
from acip_export.artifacts.plan import PlannedSpeed
from acip_export.artifacts.report import TaskMetric
from acip_export.artifacts.scores import RankedOn
from acip_export.report import Exported, Page, Ranking, build_page, read_export, write_papers
from acip_export.report.page import embedded
from acip_export.report.rows import runtime_rows
from tests.browser import open_page
from tests.report.conftest import Exports
from tests.support import all_tokens

if TYPE_CHECKING:
    from playwright.sync_api import Page as Tab

HOSTILE = (
    '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1"> --> {{data}} "\'&amp;'
    " [x](http://evil.example) ![x](http://evil.example/y) @octocat `a` | b\n---\nlicense: evil\x1b[31m\u202e"
)


def full_page(exports: Exports) -> Page:
    found = [read_export(directory) for directory in exports.directories]
    return build_page(
        found[0],
        found[1:],
        exports.sizes,
        reporting.ranking_facts(exports.scores, exports.checkpoint),
        reporting.score_map(exports.scores),
    )


@pytest.fixture(scope="module")
def page(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_papers(full_page(exports), tmp_path_factory.mktemp("page"))[0]


@pytest.fixture(scope="module")
def hostile(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every text that a model, a runtime or a user can choose."""
    whole = full_page(exports)
    plan = dataclasses.replace(whole.own.plan, model=HOSTILE, notes=(HOSTILE,))
    assert whole.own.report is not None
    report = dataclasses.replace(
        whole.own.report,
        runtimes=tuple(dataclasses.replace(runtime, runtime=HOSTILE) for runtime in whole.own.report.runtimes),
        passed=False,
        failures=(HOSTILE,),
        notes=(HOSTILE,),
        tasks={HOSTILE: {HOSTILE: TaskMetric(0.5, None)}},
        versions={HOSTILE: HOSTILE},
    )
    bad = Exported(plan, report)
    ranked_on = RankedOn(HOSTILE, HOSTILE, 1)
    ranking = Ranking({"name": HOSTILE, "basis": HOSTILE}, ranked_on, {HOSTILE: HOSTILE}, (), "mit", "")
    matrices = tuple((HOSTILE + name, layer, HOSTILE + kind, m, n) for name, layer, kind, m, n in whole.matrices)
    breakdown = tuple((HOSTILE + name, size, inside) for name, size, inside in whole.sizes[0].breakdown)
    sizes = tuple(dataclasses.replace(size, note=HOSTILE, breakdown=breakdown) for size in whole.sizes)
    made = dataclasses.replace(whole, own=bad, ranking=ranking, matrices=matrices, sizes=sizes)
    return write_papers(made, tmp_path_factory.mktemp("hostile"))[0]


class _Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_is_one_file_of_reasonable_size(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert 20_000 < len(text) < 150_000
    elements = _Elements(text).found
    assert not [a for _, a in elements for key in ("src", "action", "style") if key in a]
    assert [a["href"] for _, a in elements if "href" in a] == ["data:,", "#main"]
    assert not [key for _, a in elements for key in a if key.startswith("on")]
    assert not re.search(r"https?:", text.replace('"http://www.w3.org/2000/svg"', ""))
    policy = next(a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_embedded_figures_are_the_pages(exports: Exports, page: Path) -> None:
    data = embedded(page.read_text(encoding="utf-8"))
    assert data == full_page(exports).data()


def test_measured_table_without_javascript(exports: Exports, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    export = read_export(exports.directories[0])
    assert export.report is not None
    assert f"<td>{export.plan.planned_bytes:,}</td><td>{export.report.written_bytes:,}</td>" in text
    for runtime in export.report.runtimes:
        assert runtime.runtime in text
    assert f"{export.report.runtimes[0].perplexity.perplexity:.3f}" in text
    assert export.plan.scores_sha256 in text
    # Predicted and measured figures are of different texts.
    assert "tokens of text.txt</small>" in text
    assert "predicted on the text that the ranking held out</small>" in text


def test_texts_are_known_by_their_names(exports: Exports, tmp_path: Path) -> None:
    """Where they lie on this machine is nobody's business, today's figures or those of an earlier page."""
    whole = reporting.ranking_facts(exports.scores, exports.checkpoint)
    ranked_on = RankedOn("/srv/somebody/private/text.txt", "0", tokens=1, evaluation="/srv/somebody/other.txt")
    ranking = dataclasses.replace(whole, data=ranked_on)
    own = read_export(exports.directories[0])
    before = dataclasses.replace(build_page(own, ranking=whole).data(), ranking=ranking)
    for made in (build_page(own, ranking=ranking), build_page(own, before=before)):
        for file in write_papers(made, tmp_path):
            text = file.read_text(encoding="utf-8")
            assert "somebody" not in text
            assert "text.txt" in text and "other.txt" in text


def _front_matter(text: str) -> tuple[dict[str, Any], str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_as_the_hub_reads_it(exports: Exports) -> None:
    text = (exports.directories[0] / CARD_FILE).read_text(encoding="utf-8")
    front, body = _front_matter(text)
    assert front == {
        "base_model": "tiny",
        "base_model_relation": "quantized",
        "library_name": "onnx",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "quantized_by": "acip-export",
        "tags": ["onnx", "onnxruntime", "acip"],
    }
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert [h for h in headings if h in ("Size and quality", "How to run it", "Limits", "Provenance")] == [
        "Size and quality",
        "How to run it",
        "Limits",
        "Provenance",
    ]
    (table,) = [i for i, token in enumerate(tokens) if token.type == "table_open"]
    rows = [token for token in tokens[table:] if token.type == "tr_open"]
    assert len(rows) > 6
    code = [token for token in tokens if token.type == "fence"]
    assert [token.info for token in code] == ["python", "javascript", "python"]
    for token in code[::2]:
        compile(token.content, "card", "exec")


def test_card_of_hostile_names_stays_text(hostile: Path) -> None:
    text = hostile.with_name(CARD_FILE).read_text(encoding="utf-8")
    front, body = _front_matter(text)
    assert front["base_model"] == HOSTILE
    assert front["license"] == "mit"
    tokens = all_tokens(body)
    assert [t.attrs["href"] for t in tokens if t.type == "link_open"] == ["https://arxiv.org/abs/2502.01717"]
    assert not {t.type for t in tokens} & {"image", "html_block", "html_inline"}
    assert not re.search(r"@\w", "".join(t.content for t in tokens if t.type == "text"))
    assert "\x1b" not in text
    assert "\u202e" not in text.split("---\n", 2)[2]


# --- in a browser --------------------------------------------------------------------------------------------------


def _open(tab: Tab, file: Path) -> list[str]:
    """Open the page and list everything that it asks for."""
    requested: list[str] = []
    tab.on("request", lambda request: requested.append(request.url))
    tab.goto(file.as_uri())
    return requested


def _heat(tab: Tab) -> str:
    return str(tab.eval_on_selector_all("#heat button", "cells => cells.map(c => c.textContent).join()"))


def _move_slider(tab: Tab, to: int) -> None:
    tab.eval_on_selector(
        "#size", "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input')); }", to
    )


def test_slider_moves_all_figures_and_nothing_is_requested(exports: Exports, page: Path) -> None:
    sizes = full_page(exports).sizes
    with open_page() as tab:
        requested = _open(tab, page)
        assert tab.get_attribute("#size", "max") == str(len(sizes) - 1)
        tab.get_by_role("button", name="Bits per weight", exact=True).click()
        own = tab.inner_text("#figures"), _heat(tab), tab.inner_text("#bar-legend"), tab.inner_text("#type-legend")
        assert f"{sizes[full_page(exports).own_size].files:,} bytes" in own[0]
        assert "measured perplexity" in own[0]
        _move_slider(tab, len(sizes) - 1)
        largest = tab.inner_text("#figures"), _heat(tab), tab.inner_text("#bar-legend"), tab.inner_text("#type-legend")
        assert all(before != after for before, after in zip(own, largest, strict=True))
        assert f"{sizes[-1].files:,} bytes" in largest[0]
        assert "Planned, not exported." in tab.inner_text("#size-note")
        assert "predicted perplexity" in (tab.get_attribute("#size", "aria-valuetext") or "")
        # Every matrix is a cell and a tile; the tiles' areas are the bytes.
        assert tab.locator("#heat button").count() == 3 * 7
        assert tab.locator("#treemap button").count() == 3 * 7 + 1 + 2
        areas = tab.eval_on_selector_all(
            "#treemap button",
            "tiles => tiles.map(t => [t.ariaLabel, parseFloat(t.style.width) * parseFloat(t.style.height)])",
        )
        assert sum(area for _, area in areas) == pytest.approx(100 * 100, rel=1e-3)
        embedding = next(area for label, area in areas if label.startswith("model.embed_tokens"))
        assert embedding / 1e4 == pytest.approx(sizes[-1].cells[0].nbytes / sizes[-1].files, rel=1e-2)
        # The curve chooses as well.
        tab.locator("#curve svg").click(position={"x": 48, "y": 60})
        assert tab.input_value("#size") == "0"
        assert requested == [page.as_uri()]


def test_groupings_and_quantities(page: Path) -> None:
    with open_page() as tab:
        _open(tab, page)
        seen = set()
        for name in ("Ranks", "Bits per weight", "Score map"):
            tab.get_by_role("button", name=name, exact=True).click()
            seen.add(_heat(tab))
            assert tab.get_by_role("button", name=name, exact=True).get_attribute("aria-pressed") == "true"
        assert len(seen) == 3
        tiles = "tiles => tiles.map(t => t.style.left + t.style.top + t.getAttribute('aria-label')).join()"
        arrangements = set()
        for name in ("by layer", "by module", "by type"):
            tab.get_by_role("button", name=name).click()
            arrangements.add(tab.eval_on_selector_all("#treemap button", tiles))
        assert len(arrangements) == 3


def test_keyboard(page: Path) -> None:
    with open_page() as tab:
        _open(tab, page)
        tab.focus("#size")
        before = tab.inner_text("#figures")
        tab.keyboard.press("ArrowRight")
        assert tab.inner_text("#figures") != before
        for region, down in (("#heat", "model.layers.1.self_attn.q_proj"), ("#treemap", None)):
            assert tab.locator(f"{region} button[tabindex='0']").count() == 1
            tab.focus(f"{region} button[tabindex='0']")
            first = tab.inner_text(f"{region}-detail")
            tab.keyboard.press("ArrowDown")
            second = tab.inner_text(f"{region}-detail")
            assert second != first
            if down is not None:
                assert second.startswith(down)
            assert tab.evaluate("document.activeElement.parentElement.id") == region[1:]
            assert tab.locator(f"{region} button[tabindex='0']").count() == 1
            tab.keyboard.press("End")
            assert tab.inner_text(f"{region}-detail") != second


def _colours(tab: Tab) -> tuple[str, str]:
    style = "getComputedStyle(document.body)"
    return str(tab.evaluate(f"{style}.backgroundColor")), str(tab.evaluate(f"{style}.color"))


def _contrast(tab: Tab, selector: str) -> float:
    """The least WCAG contrast of text and background among the elements of ``selector``."""
    script = """elements => {
        const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const luminance = colour => {
            canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const backdrop = element => {
            for (let at = element; at; at = at.parentElement) {
                const colour = getComputedStyle(at).backgroundColor;
                if (!/, 0\\)$/.test(colour) && colour !== "transparent") return colour;
            }
            return "white";
        };
        return Math.min(...elements.map(element => {
            const text = luminance(getComputedStyle(element).color), behind = luminance(backdrop(element));
            return (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
        }));
    }"""
    return float(tab.eval_on_selector_all(selector, script))


def test_light_and_dark(page: Path) -> None:
    with open_page(color_scheme="dark") as tab:
        _open(tab, page)
        dark = _colours(tab)
        tab.emulate_media(color_scheme="light")
        light = _colours(tab)
        assert dark != light
        found = []
        for _ in range(3):
            tab.click("#theme")
            found.append((tab.get_attribute("#theme", "aria-label"), _colours(tab)))
        assert found == [("Theme: light", light), ("Theme: dark", dark), ("Theme: as the system", light)]
        # WCAG AA for text; every size and theme, since the colours of the cells move with the slider.
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            for size in range(int(tab.get_attribute("#size", "max") or 0) + 1):
                _move_slider(tab, size)
                for selector in ("#heat button", "#treemap button"):
                    assert _contrast(tab, selector) >= 4.5, (scheme, size, selector)
            for selector in (".caption", ".figure span", "h2", "td", "th", ".legend li", "dt", ".notice"):
                assert _contrast(tab, selector) >= 4.5, (scheme, selector)


# What sticks out of the page to the right, beside what is hidden inside a box that cuts it off.
_OUTSIDE = """() => [...document.querySelectorAll("body *")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.right > innerWidth + 0.5 && box.width > 0;
}).map(e => e.outerHTML.slice(0, 120))"""


@pytest.mark.slow
def test_nothing_sticks_out(page: Path, hostile: Path) -> None:
    with open_page() as tab:
        for width in (360, 768, 1280):
            tab.set_viewport_size({"width": width, "height": 740})
            for file in (page, hostile):
                _open(tab, file)
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
                assert tab.evaluate(_OUTSIDE) == []


def test_hostile_names_stay_text(hostile: Path) -> None:
    with open_page() as tab:
        requested = _open(tab, hostile)
        shown = "".join(c if c.isprintable() else " " for c in HOSTILE)
        assert tab.text_content("h1") == shown
        assert tab.evaluate("window.hacked") is None
        assert tab.locator("script").count() == 2
        assert tab.locator("img").count() == 0
        assert "window.hacked=1" in tab.inner_text("#bar-legend")
        tab.focus("#heat button")
        assert "window.hacked=1" in tab.inner_text("#heat-detail")
        assert requested == [hostile.as_uri()]


def test_page_without_sizes_or_measurements(exports: Exports, tmp_path: Path) -> None:
    """One export, no score file, never verified: no slider, no curve, and no complaint."""
    plan = read_export(exports.directories[0]).plan
    file, _ = write_papers(build_page(Exported(dataclasses.replace(plan, predicted_perplexity=None), None)), tmp_path)
    with open_page() as tab:
        _open(tab, file)
        assert tab.is_hidden("#slider-row")
        assert tab.is_hidden("#curve")
        assert tab.is_visible("#treemap button >> nth=0")


def test_without_javascript_all_measured_figures_are_there(page: Path) -> None:
    with open_page(java_script_enabled=False) as tab:
        _open(tab, page)
        assert tab.is_visible("table")
        assert tab.is_hidden("#sizes")
        assert "need JavaScript" in tab.inner_text("main")


def test_papers_are_written_by_the_main_job(exports: Exports) -> None:
    for directory in exports.directories:
        assert embedded((directory / PAGE_FILE).read_text(encoding="utf-8")) is not None


def test_planned_speed_beside_the_measured_one(exports: Exports) -> None:
    """Of the runtime that it was predicted for, and no other."""
    own = read_export(exports.directories[0])
    plan = dataclasses.replace(own.plan, speed=PlannedSpeed("onnxruntime", 4321.0, 1234.0))
    page = build_page(dataclasses.replace(own, plan=plan), (), exports.sizes, None, None)
    assert own.report is not None
    shown = [
        {row.what: row.planned for row in runtime_rows(page, own.report, runtime)} for runtime in own.report.runtimes
    ]
    assert [rows["Generation, tokens per second"] for rows in shown] == ["1,234", "–"]
    assert [rows["Prompt, tokens per second"] for rows in shown] == ["4,321", "–"]


def test_a_speed_that_was_predicted_for_another_device_says_so(exports: Exports) -> None:
    own = read_export(exports.directories[0])
    speed = PlannedSpeed("onnxruntime", None, 1234.0, None, 0.25)
    plan = dataclasses.replace(own.plan, speed=speed, device="raspberry-pi-5-8gb")
    page = build_page(dataclasses.replace(own, plan=plan), (), exports.sizes, None, None)
    assert own.report is not None
    rows = {row.what: row for row in runtime_rows(page, own.report, own.report.runtimes[0])}
    answer, prompt = rows["Generation, tokens per second"], rows["Prompt, tokens per second"]
    assert answer.planned == "1,234 ± 25%" and answer.note == "predicted for raspberry-pi-5-8gb, found here"
    assert (prompt.planned, prompt.note) == ("–", "")
