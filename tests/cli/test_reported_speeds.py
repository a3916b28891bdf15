"""Devices that nobody measured here: plans predict their speed from what people reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from acip_export.devices import load_devices
from acip_export.units import format_error
from tests.support import Run, unspaced

PI = "raspberry-pi-5-8gb"
ASKED = ("plan", "--budget", "400MB", "--context", 64)
PLAN = (*ASKED, "--types", "q8_0,q4_0")


@pytest.mark.usefixtures("model")
def test_a_plan_says_the_speed_and_its_error_before_anything_is_written(run: Run) -> None:
    planned = json.loads(run(*PLAN, "--device", PI, "--json").out)["speed"]
    (speeds,) = load_devices()[PI].reported_speeds().values()
    assert planned["runtime"] == "llama.cpp" and planned["answer"] > 0 and planned["prompt"] > planned["answer"]
    # Of a smaller model than any that was reported they are further off.
    assert planned["answer_error"] > speeds.answer_error and planned["prompt_error"] > speeds.prompt_error
    shown = " ".join(run(*PLAN, "--device", PI).out.split())
    assert f"predicted speed {planned['answer']:,.0f} tokens/s" in shown
    error = format_error(planned["answer_error"])
    assert f"{error}, of an answer with a full context in llama.cpp;" in shown and "of a prompt as long" in shown


@pytest.mark.usefixtures("model")
def test_where_only_answers_were_reported_nothing_is_said_of_prompts(run: Run) -> None:
    asked = (*PLAN, "--device", "galaxy-s24-8gb")
    planned = json.loads(run(*asked, "--json").out)["speed"]
    assert planned["prompt"] is None and planned["answer"] > 0
    shown = " ".join(run(*asked).out.split())
    assert "predicted speed" in shown and "of a prompt as long" not in shown


@pytest.mark.usefixtures("model")
def test_a_speed_is_a_constraint_there(run: Run) -> None:
    fast = json.loads(run(*PLAN, "--device", PI, "--json").out)["speed"]["answer"]
    done = run(*PLAN, "--device", PI, "--min-speed", fast * 0.9, "--json")
    assert done.code == 0 and json.loads(done.out)["speed"]["answer"] >= fast * 0.9
    refused = run(*PLAN, "--device", PI, "--min-speed", fast * 100)
    assert refused.code == 4 and "within a factor" in refused.err and "--min-speed" in refused.err


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("asked", [("--device", "cpu-16gb"), ("--device", PI, "-f", "onnx")])
def test_where_nothing_was_reported_a_speed_is_refused(run: Run, asked: tuple[str, ...]) -> None:
    done = run(*ASKED, *asked, "--json")
    assert done.code == 0, done.out
    assert json.loads(done.out)["speed"] is None, done.out
    refused = " ".join(run(*ASKED, *asked, "--min-speed", 1).err.split())
    assert ("--format gguf" in refused) == ("onnx" in asked)
    assert "nobody has measured" in refused and "acip-export calibrate" in refused and "docs/devices.md" in refused


def test_a_device_shows_every_report_and_where_it_is_from(run: Run) -> None:
    chip = load_devices()[PI].chip
    assert chip is not None
    shown = run("devices", PI).out
    for report in chip.reports:
        assert report.model.name in shown and unspaced(report.source) in unspaced(shown)
    assert "speed in llama.cpp" in shown
    assert json.loads(run("devices", PI, "--json").out)["chip"] == chip.to_json()
    assert "not known" in run("devices", "cpu-16gb").out


@pytest.mark.usefixtures("model")
def test_a_table_that_was_made_there_counts_before_reports(run: Run) -> None:
    table = Path("mine.toml")
    table.write_text(
        f"""[[device]]
name = "{PI}"
title = "Mine"
class = "board"
memory = "8GiB"
usable = 0.5
runtimes = {{ gguf = "llama.cpp" }}
chip = "bcm2712"
speeds = "board.json"
source = {{ memory = "m", usable = "u", types = "t" }}
""",
        encoding="utf-8",
    )
    assert "board.json" in "".join(run("devices", PI, "--devices", table).out.split())
    missing = run(*PLAN, "--devices", table, "--device", PI)
    assert missing.code == 3 and "board.json" in "".join(missing.err.split())
