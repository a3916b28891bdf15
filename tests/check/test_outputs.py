"""Every output form, read as its consumer would read it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from acip_export.check.compare import Problem, Result
from acip_export.check.markdown import MARKER, markdown
from acip_export.check.outputs import check_json, github_annotations, junit
from acip_export.check.run import Outcome
from acip_export.inspection.diff import Stored, TensorChange
from tests.support import all_tokens

HOSTILE = "a|b`c` </details><script>alert(1)</script> ![x](http://evil) [y](http://evil) @octocat #1 100% x,y:z"


def change(name: str, delta: int = 10) -> TensorChange:
    return TensorChange(name, Stored("q4_k", (4, 4), 100), Stored("q8_0", (4, 4), 100 + delta))


OUTCOME = Outcome(
    "acip-check.toml",
    "acip-check.lock.json",
    (
        Result("fine", "a.gguf", "ok", 1000, 900, 2000, 0.97, notes=("shrank",), changes=(change("blk.0.q"),)),
        Result("large", "b.gguf", "failed", 3000, 900, 2000, problems=(Problem("max_bytes", "3,000 bytes"),)),
        Result("gone", "c.gguf", "failed", problems=(Problem("missing", "c.gguf does not exist", broken=True),)),
        Result("optional", "d.gguf", "skipped", notes=("not here",)),
        Result(
            HOSTILE,
            "e.gguf",
            "failed",
            1,
            1,
            1,
            problems=(Problem("max_growth", f"grew {HOSTILE}\nsecond line\x00"),),
            changes=(change(HOSTILE), TensorChange("new", None, Stored(HOSTILE, (1,), 5))),
        ),
    ),
)


def test_junit_by_its_schemas_rules() -> None:
    """What jenkins' junit-10.xsd and GitLab's reader require."""
    text = junit(OUTCOME)
    root = ElementTree.fromstring(text)
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>')
    assert root.tag == "testsuites"
    assert set(root.attrib) <= {"name", "time", "tests", "failures", "disabled", "errors"}
    (suite,) = root
    assert suite.tag == "testsuite"
    assert {"name", "tests", "failures", "errors", "skipped"} <= set(suite.attrib)
    cases = list(suite)
    assert [case.attrib["name"] for case in cases] == [result.name for result in OUTCOME.results]
    assert all(
        case.tag == "testcase" and case.attrib["classname"] and float(case.attrib["time"]) >= 0 for case in cases
    )
    found = [[child.tag for child in case] for case in cases]
    assert found == [["system-out"], ["failure"], ["error"], ["skipped"], ["failure", "system-out"]]
    for kind, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        assert int(suite.attrib[attribute]) == sum(kind in tags for tags in found)
    assert int(suite.attrib["tests"]) == int(root.attrib["tests"]) == len(cases)
    for failure in [*suite.iter("failure"), *suite.iter("error")]:
        assert failure.attrib["message"]
        assert failure.attrib["type"] in {"max_bytes", "max_growth", "missing"}
        assert failure.text


def test_markdown_structure() -> None:
    text = markdown(OUTCOME)
    assert text.splitlines()[0] == MARKER
    assert text.count(MARKER) == 1
    tokens = all_tokens(text)
    tables = [i for i, token in enumerate(tokens) if token.type == "table_open"]
    assert len(tables) == 3
    rows: list[int] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append(0)
        elif token.type in ("td_open", "th_open"):
            rows[-1] += 1
    # Header and five entries of seven cells, then header and tensors of five cells.
    assert rows == [7] * 6 + [5] * 2 + [5] * 3
    html = "".join(token.content for token in tokens if token.type in ("html_block", "html_inline"))
    assert html.count("<details>") == html.count("</details>") == 2
    heading = tokens[[t.type for t in tokens].index("heading_open") + 1]
    assert heading.content.endswith("Model size: 3 of 5 checks failed, 1 skipped")


def test_markdown_of_hostile_names_stays_text() -> None:
    text = markdown(OUTCOME)
    tokens = all_tokens(text)
    assert not {token.type for token in tokens} & {"link_open", "image"}
    html = "".join(token.content for token in tokens if token.type in ("html_block", "html_inline"))
    assert set(re.findall(r"</?(\w+)", html)) <= {"details", "summary", "code"}
    plain = "".join(token.content for token in tokens if token.type == "text")
    assert not re.search(r"@\w", plain)
    assert "://" not in plain


def test_markdown_fits_a_comment() -> None:
    """GitHub refuses more than 65,536 characters."""
    many = tuple(change(f"blk.{n}." + "x" * 200, n) for n in range(2000))
    results = tuple(Result(f"m{n}", f"m{n}", "ok", 10, 10, changes=many) for n in range(50))
    text = markdown(Outcome("c", "l", results))
    assert 10_000 < len(text) < 65_536
    assert text.count("<details>") == text.count("</details>")
    problems = tuple(Problem("max_bytes", "y" * 500) for _ in range(500))
    text = markdown(Outcome("c", "l", (Result("m", "m", "failed", problems=problems),)))
    assert len(text) < 65_536


def _unescape(text: str) -> str:
    for escaped, plain in (("%0A", "\n"), ("%0D", "\r"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(escaped, plain)
    return text


def test_annotations_as_github_reads_them() -> None:
    """Syntax of workflow commands: ``::name key=value,key=value::data``, one line each."""
    lines = list(github_annotations(OUTCOME))
    expected = [(f"{r.name}: {p.rule}", p.message) for r in OUTCOME.results for p in r.problems]
    found = []
    for line in lines:
        assert "\n" not in line
        match = re.fullmatch(r"::(error|notice) ([^:]*)::(.*)", line)
        assert match is not None
        properties = dict(pair.split("=", 1) for pair in match[2].split(","))
        assert set(properties) == {"file", "title"}
        assert properties["file"] == "acip-check.toml"
        if match[1] == "error":
            found.append((_unescape(properties["title"]), _unescape(match[3])))
    assert found == expected
    assert sum(line.startswith("::notice") for line in lines) == 2


def test_json_keys() -> None:
    data = json.loads(json.dumps(check_json(OUTCOME)))
    assert (data["artifact"], data["version"], data["passed"]) == ("acip-check", 2, False)
    documented = (Path(__file__).parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
    for key in {*data, *(key for result in data["results"] for key in result)}:
        assert f"`{key}`" in documented, key
    assert data["results"][0]["changes"][0]["delta"] == 10
    assert data["results"][1]["problems"] == [{"rule": "max_bytes", "message": "3,000 bytes", "broken": False}]


@pytest.mark.parametrize("results", [(), OUTCOME.results[:1]])
def test_passing_outcomes(results: tuple[Result, ...]) -> None:
    outcome = Outcome("c", "l", results)
    assert outcome.passed
    assert "✅" in markdown(outcome)
    assert ElementTree.fromstring(junit(outcome)).attrib["failures"] == "0"
