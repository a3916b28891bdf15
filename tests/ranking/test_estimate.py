"""What a ranking takes is known before it starts, and it fits itself to what there is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from acip_export.api import rounding_estimate
from acip_export.api.rounding_errors import rounding_work
from acip_export.cli.rank import expected_course
from acip_export.errors import InfeasibleBudgetError, OutputError, RankingError, UsageError
from acip_export.lowrank.feedback_cache import MOST_BYTES, entry_bytes
from acip_export.machine import Machine
from acip_export.measurement.pass_time import pass_seconds
from acip_export.measurement.passes import ClassPass
from acip_export.ranking import DataConfig, acip_defaults, automatic_config, rank_model
from acip_export.ranking.acip_defaults import default_algorithm, mask_steps_of
from acip_export.ranking.algorithms import find_algorithm
from acip_export.ranking.config import Precision
from acip_export.ranking.estimate import RankModel, open_sizes
from acip_export.ranking.fitting import Fitted, Limits, fit_ranking
from acip_export.units import parse_seconds
from tests.ranking.support import CALIBRATION
from tests.support import Run

TWO_CORES = Machine(1e11, 5e10, 1e6, 2)
FISHER, ACIP = find_algorithm("fisher"), find_algorithm("acip")


def llama(directory: Path, layers: int = 32) -> Path:
    """The configuration of Llama 3 8B, without weights."""
    directory.mkdir()
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def test_memory_does_not_grow_with_layers_and_needs_no_weights(tmp_path: Path) -> None:
    few, many = (open_sizes(llama(tmp_path / str(layers), layers)) for layers in (16, 32))
    one, two = (RankModel(c).estimate(DataConfig(), FISHER, None, TWO_CORES) for c in (few, many))
    assert one.memory == two.memory
    assert two.disk == pytest.approx(2 * one.disk, rel=0.1)
    assert two.seconds["statistics"] == pytest.approx(2 * one.seconds["statistics"], rel=0.1)


def test_weights_count_where_they_are_widened(tmp_path: Path) -> None:
    """Of 8 billion parameters only embedding and head are, and those not on a processor that multiplies bfloat16."""
    checkpoint = open_sizes(llama(tmp_path / "8b"))

    def memory(machine: Machine, precision: Precision = "auto") -> int:
        return RankModel(checkpoint, precision=precision).estimate(DataConfig(), FISHER, None, machine).memory

    narrow = memory(replace(TWO_CORES, bfloat16=True))
    embeddings = 4 * 2 * 128256 * 4096
    assert memory(TWO_CORES) - narrow == embeddings
    assert memory(TWO_CORES, "float32") - narrow == embeddings + 4 * RankModel(checkpoint).weights


def test_precision_is_in_what_the_command_says(tmp_path: Path, run: Run) -> None:
    asked = ("rank", llama(tmp_path / "8b"), "--estimate", "--json", "--no-measure-rounding", "--precision")
    narrow, wide = (json.loads(run(*asked, precision).out)["memory"] for precision in ("model", "float32"))
    assert wide - narrow > 4 * 6.9e9


def test_learned_ranking_takes_the_steps_that_there_is_time_for(model: Path) -> None:
    checkpoint = open_sizes(model)
    acip = replace(automatic_config(checkpoint), batch=1)
    slow = Machine(1e9, 1e9, 1e5, 2)
    whole = RankModel(checkpoint).estimate(DataConfig(), ACIP, acip, slow)
    seconds = whole.total_seconds - 0.3 * whole.seconds["learning"]
    fitted = fit_ranking(checkpoint, ACIP, acip, DataConfig(), Limits(seconds=seconds), slow)
    assert fitted.acip is not None and fitted.algorithm is ACIP
    steps = mask_steps_of(fitted.acip) + fitted.acip.post_tune
    assert steps == pytest.approx(0.7 * (mask_steps_of(acip) + acip.post_tune), rel=0.05)
    assert fitted.estimate.total_seconds == pytest.approx(seconds, rel=0.05)
    assert "steps of 1 windows instead of" in fitted.changes[0]


def test_windows_are_fewer_before_steps_are_too_few(model: Path) -> None:
    checkpoint = open_sizes(model)
    acip, slow = replace(automatic_config(checkpoint), batch=8, post_tune=900), Machine(1e9, 1e9, 1e5, 2)
    whole = RankModel(checkpoint).estimate(DataConfig(), ACIP, acip, slow)
    start = whole.total_seconds - whole.seconds["learning"]

    def chosen(share: float) -> tuple[int, int]:
        limits = Limits(seconds=start + share * whole.seconds["learning"])
        fitted = fit_ranking(checkpoint, ACIP, acip, DataConfig(), limits, slow)
        assert fitted.acip is not None
        return fitted.acip.batch, mask_steps_of(fitted.acip) + fitted.acip.post_tune

    assert chosen(0.6055) == (8, pytest.approx(605, abs=5))
    assert chosen(0.2055) == (4, pytest.approx(410, abs=5))
    assert chosen(0.05055) == (1, pytest.approx(404, abs=5))
    assert chosen(0.02025) == (1, pytest.approx(161, abs=5))


def test_nothing_is_changed_unless_it_is_asked_for(model: Path) -> None:
    checkpoint = open_sizes(model)
    acip, calibration = replace(automatic_config(checkpoint), batch=32), DataConfig(batch=4)
    fitted = fit_ranking(checkpoint, ACIP, acip, calibration, Limits(asked=False), TWO_CORES)
    assert fitted.acip == acip and fitted.calibration.batch == 4 and not fitted.changes


def test_time_too_short_to_learn_anything(model: Path) -> None:
    checkpoint = open_sizes(model)
    limits = Limits(seconds=20)
    fitted = fit_ranking(
        checkpoint, ACIP, automatic_config(checkpoint), DataConfig(), limits, Machine(1e8, 1e8, 1e5, 2)
    )
    assert fitted.algorithm is FISHER and fitted.acip is None
    assert "too short for acip to learn anything; ranking with fisher" in fitted.changes[0]


def test_less_memory_and_time_take_fewer_windows_and_tokens(tmp_path: Path) -> None:
    checkpoint = open_sizes(llama(tmp_path / "model"))
    whole = fit_ranking(checkpoint, FISHER, None, DataConfig(), Limits(asked=False), TWO_CORES)
    limits = Limits(seconds=0.95 * whole.estimate.total_seconds)
    fitted = fit_ranking(checkpoint, FISHER, None, DataConfig(), limits, TWO_CORES)
    assert fitted.estimate.total_seconds <= 0.95 * whole.estimate.total_seconds
    assert (fitted.calibration.statistics_tokens or 0) < (whole.calibration.statistics_tokens or 0)


def test_measuring_types_is_estimated_by_format_from_the_configuration_alone(tmp_path: Path) -> None:
    few, many = (rounding_estimate(open_sizes(llama(tmp_path / str(layers), layers)), TWO_CORES) for layers in (16, 32))
    assert set(few) == {"types of gguf", "types of onnx"}
    for stage, seconds in few.items():
        assert seconds < many[stage] < 2 * seconds  # tables, and pairs of a few layers, are measured once
    faster = rounding_estimate(open_sizes(tmp_path / "16"), Machine(1e12, 5e11, 1e7, 2))
    assert all(faster[stage] == pytest.approx(seconds / 10) for stage, seconds in few.items())


def test_factors_of_wide_inputs_are_counted_once(tmp_path: Path) -> None:
    """Measuring the first format's types makes them for the second, and for what losses are measured with."""
    checkpoint = open_sizes(llama(tmp_path / "model"))
    found = rounding_estimate(checkpoint, TWO_CORES)
    alone = {name: rounding_work(checkpoint, name) for name in ("gguf", "onnx")}
    columns = alone["onnx"].inputs
    assert min(columns) >= 1024
    made = sum((2.4 if each <= 8192 else 1.2) * each**3 for each in columns) / TWO_CORES.float64
    assert found["types of gguf"] == alone["gguf"].seconds(TWO_CORES)
    assert found["types of onnx"] == pytest.approx(alone["onnx"].seconds(TWO_CORES) - made)
    narrow = replace(alone["onnx"], inputs=[1023])
    assert narrow.seconds(TWO_CORES) == replace(narrow, factors_kept=True).seconds(TWO_CORES)
    # Of a model with more factors than the cache has room for, the last ones are made again.
    room = MOST_BYTES // entry_bytes(8192)
    fitting, all_ = (replace(alone["onnx"], inputs=[8192] * count) for count in (room, room + 1))
    fitting_kept, all_kept = (replace(each, factors_kept=True).seconds(TWO_CORES) for each in (fitting, all_))
    assert all_kept - fitting_kept == pytest.approx(all_.seconds(TWO_CORES) - fitting.seconds(TWO_CORES))
    one = [ClassPass("down_proj", "q4_0", frozenset({"model.layers.0.mlp.down_proj.weight"}), 0.0)]
    few, more = (pass_seconds(checkpoint, one, "gguf", 512, types, TWO_CORES) for types in ((), ("q4_0",)))
    assert few < more < few + 0.05 * made
    # Through half of the blocks: the dense model, and every head, whole.
    whole, half = (pass_seconds(checkpoint, one, "gguf", 512, (), TWO_CORES, share) for share in (1.0, 0.5))
    layers = sum(out * inputs for out, inputs in checkpoint.linear_modules.values())
    assert whole - half == pytest.approx(2 * 512 * 0.5 * layers / (0.5 * TWO_CORES.float32))


def test_what_follows_a_ranking_is_in_its_time(tmp_path: Path) -> None:
    checkpoint = open_sizes(llama(tmp_path / "model"))

    def fitted(limits: Limits, more: float) -> Fitted:
        return fit_ranking(checkpoint, FISHER, None, DataConfig(), limits, TWO_CORES, lambda _: {"types": more})

    alone = fitted(Limits(asked=False), 0).estimate.total_seconds
    assert fitted(Limits(asked=False), 50).estimate.total_seconds == pytest.approx(alone + 50)
    assert not fitted(Limits(seconds=alone + 40), 0).changes
    shorter = fitted(Limits(seconds=alone + 40), 50)
    assert "statistics of" in shorter.changes[0] and shorter.estimate.total_seconds <= alone + 40


def test_estimate_shows_each_formats_types(model: Path, run: Run) -> None:
    shown = run("rank", model, "--estimate", "--algorithm", "kfac").out
    assert "types of gguf" in shown and "types of onnx" in shown
    made = json.loads(run("rank", model, "--estimate", "--algorithm", "kfac", "--json").out)["seconds"]
    total = made.pop("total")
    assert made["types of gguf"] > 0 and total == pytest.approx(sum(made.values()))
    without = run("rank", model, "--estimate", "--algorithm", "kfac", "--no-measure-rounding")
    assert "types of" not in without.out


def test_too_little_memory_or_disk_is_said_with_what_would_fit(tmp_path: Path) -> None:
    checkpoint = open_sizes(llama(tmp_path / "model"))
    for limits in (Limits(memory=10**9), Limits(memory=10**9, asked=False)):
        with pytest.raises(
            InfeasibleBudgetError, match=r"at least .* of memory, .*\n--memory (\d+)MB  would fit"
        ) as told:
            fit_ranking(checkpoint, FISHER, None, DataConfig(), limits, TWO_CORES)
    enough = told.value.smallest_feasible_bytes
    fitted = fit_ranking(checkpoint, FISHER, None, DataConfig(), Limits(memory=enough), TWO_CORES)
    assert fitted.estimate.memory <= enough
    with pytest.raises(OutputError, match=r"of disk, and 1\.00 GB are free"):
        fit_ranking(checkpoint, FISHER, None, DataConfig(), Limits(disk=10**9), TWO_CORES)


def test_too_little_memory_is_said_before_text_and_weights_are_read(model: Path, tmp_path: Path) -> None:
    unreadable = tmp_path / "text.txt"
    unreadable.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InfeasibleBudgetError, match="of memory"):
        rank_model(model, unreadable, algorithm="fisher", memory=10**6)


def test_ranking_says_what_it_takes(model: Path, text: Path) -> None:
    said: list[str] = []
    rank_model(model, text, algorithm="kfac", calibration=CALIBRATION, announce=said.append)
    assert said[0].startswith("ranking with kfac takes about ") and said[0].endswith(" of disk")


def test_learning_is_the_default_where_it_takes_minutes(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = open_sizes(llama(tmp_path / "8b"))
    assert default_algorithm(open_sizes(model), "cpu") == "acip"
    assert default_algorithm(large, "cpu") == "fisher" and default_algorithm(large, "cuda:1") == "acip"
    for asked in ({"settings": {"batch": 2}}, {"resume": True}, {"seconds": 60.0}):
        assert default_algorithm(large, "cpu", **asked) == "acip"  # type: ignore[arg-type]
    assert default_algorithm(large, "cpu", settings={}) == "fisher"
    monkeypatch.setattr(acip_defaults, "_LEARNED_ON_PROCESSORS", 0)
    said: list[str] = []
    scores = rank_model(model, text, calibration=CALIBRATION, announce=said.append, device="cpu")
    assert scores.algorithm["name"] == "fisher"
    assert "--time 20min;" in said[0] and said[0].endswith("--algorithm acip")
    with pytest.raises(RankingError, match="no run state"):  # only what learns has one
        rank_model(model, text, calibration=CALIBRATION, out=tmp_path / "scores.acip", resume=True, device="cpu")


def test_times_are_read_as_people_write_them() -> None:
    assert [parse_seconds(text) for text in ("20min", "90 s", "1.5h")] == [1200, 90, 5400]
    for text in ("20", "0s", "soon", "-3min"):
        with pytest.raises(UsageError, match="write for example 20min"):
            parse_seconds(text)


def test_the_bar_of_a_ranking_follows_its_estimate(model: Path, text: Path, tmp_path: Path) -> None:
    """All stages that report are among those that were expected, in the order in which they come."""
    acip = replace(automatic_config(open_sizes(model)), post_tune=2, max_steps=2)
    fitted: list[Fitted] = []
    for algorithm, settings in (("fisher", None), ("acip", acip)):
        stages: dict[str, None] = {}
        rank_model(
            model,
            text,
            algorithm=algorithm,
            acip=settings,
            calibration=CALIBRATION,
            out=tmp_path / f"{algorithm}.acip",
            progress=lambda report, stages=stages: stages.update({report.stage: None}),  # type: ignore[misc]
            estimated=fitted.append,
        )
        assert list(stages) == list(expected_course(fitted[-1], sampled=False).shares)
    assert expected_course(fitted[-1], sampled=True).seconds == pytest.approx(
        fitted[-1].estimate.total_seconds + fitted[-1].estimate.seconds["statistics"]
    )
