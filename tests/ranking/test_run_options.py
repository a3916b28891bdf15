"""Options that say how a run uses the machine and where it reports; none of them may change what is learned."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from acip_export.errors import MissingExtraError, RankingError, UsageError
from acip_export.io.atomic import read_safetensors_header
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Progress
from acip_export.ranking import AcipConfig, parse_settings, rank_model
from acip_export.ranking.data import read_data
from acip_export.ranking.load import load_model
from acip_export.ranking.logs import json_log, tensorboard_log, to_all
from acip_export.ranking.out_of_memory import out_of_memory_named
from acip_export.ranking.processes import start_processes
from tests.ranking.support import CALIBRATION, held_out_loss, sharp_model

CPU = torch.device("cpu")
QUICK = AcipConfig(
    basis="kfac", start="drop-loss", learning_rate=3e-3, penalty=3e-2, post_tune=2, batch=2, adapter_rank=4
)


def test_recomputed_activations_give_the_same_ranking(model: Path, text: Path) -> None:
    """Dropout included: the second computation of a block must drop the same inputs."""
    plain, recomputed = (
        rank_model(model, text, acip=QUICK, calibration=CALIBRATION, recompute_activations=wanted)
        for wanted in (False, True)
    )
    for name, module in plain.modules.items():
        np.testing.assert_array_equal(module.scores, recomputed.modules[name].scores)


@pytest.mark.slow
@pytest.mark.parametrize("fast", [False, True], ids=["float32-products", "bfloat16-products"])
def test_weights_and_factors_in_the_models_dtype(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """On a processor without bfloat16 instructions, and on one with them (torch emulates what is not there)."""
    monkeypatch.setattr("acip_export.ranking.load.fast_bfloat16", lambda: fast)
    model = sharp_model(tmp_path / "model")
    dense = load_model(Checkpoint.open(model), CPU)
    dense.bfloat16().save_pretrained(model)
    checkpoint = Checkpoint.open(model)
    windows = read_data(checkpoint, text, CALIBRATION).held_out
    stored = load_model(checkpoint, CPU, "model")
    exact = load_model(checkpoint, CPU, "float32")
    dtypes = {name: stored.get_parameter(f"{name}.weight").dtype for name in checkpoint.linear_modules}
    assert set(dtypes.values()) == {torch.bfloat16}
    assert stored.get_input_embeddings().weight.dtype == (torch.bfloat16 if fast else torch.float32)
    # The same numbers, widened before instead of after they are stored; or 8 bits of mantissa for every activation too.
    tolerance = 0.02 if fast else 1e-6
    assert held_out_loss(stored, windows, 8) == pytest.approx(held_out_loss(exact, windows, 8), abs=tolerance)
    lean = rank_model(model, text, acip=QUICK, calibration=CALIBRATION, precision="model")
    full = rank_model(model, text, acip=QUICK, calibration=CALIBRATION, precision="float32")
    # Rounding both factors to 8 bits of mantissa adds noise of 0.25 % to every weight, whatever the basis.
    assert lean.curve[0].loss == pytest.approx(full.curve[0].loss, abs=0.02)
    assert lean.curve[0].loss != full.curve[0].loss


def test_progress_as_json_lines_and_for_tensorboard(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen: list[Progress] = []
    with json_log(tmp_path / "log" / "run.jsonl") as lines, tensorboard_log(tmp_path / "board") as board:
        rank_model(model, text, acip=QUICK, calibration=CALIBRATION, progress=to_all([seen.append, lines, board]))
    logged = [json.loads(line) for line in (tmp_path / "log" / "run.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["done"], entry["loss"]) for entry in logged] == [
        (p.stage, p.done, p.loss) for p in seen
    ]
    assert all(b["time"] >= a["time"] for a, b in itertools.pairwise(logged))
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    drawn = [(event.step, event.value) for event in events.Scalars("masks/loss")]
    expected = [(p.done, p.loss) for p in seen if p.stage == "masks"]
    assert [step for step, _ in drawn] == [step for step, _ in expected]
    np.testing.assert_allclose([v for _, v in drawn], [v for _, v in expected], rtol=1e-6)  # float32 in the file
    with json_log(tmp_path / "log" / "run.jsonl") as lines:
        lines(seen[0])  # a resumed run goes on in the same file
    assert len((tmp_path / "log" / "run.jsonl").read_text().splitlines()) == len(logged) + 1


def test_tensorboard_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"acip-export\[tensorboard\]"), tensorboard_log(tmp_path):
        pass


def test_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--log-json"), json_log(tmp_path / "file" / "log.jsonl"):
        pass


@pytest.mark.slow
def test_out_of_memory_says_what_to_lower(model: Path, text: Path) -> None:
    """A real limit on a real process: the allocator fails, and nothing else may be reported than that."""
    script = (
        "import resource, sys, torch, transformers\n"
        "from acip_export.ranking import DataConfig, rank_model\n"
        "torch.set_num_threads(1)\n"
        "def limit(progress):\n"
        "    if (progress.stage, progress.done) != ('self', progress.total):\n"
        "        return\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + 2**23, used + 2**23))\n"
        # Sampling reports first, from batches of 64 windows; the statistics then want all of them at once.
        "rank_model(sys.argv[1], 'self', algorithm='kfac', progress=limit,\n"
        "           calibration=DataConfig(context=8, self_tokens=2**17, statistics_tokens=2**17, batch=2**14))\n"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("limits on address space are Linux's")
    done = subprocess.run([sys.executable, "-c", script, model, text], capture_output=True, text=True, check=False)
    assert "RankingError: out of memory" in done.stderr, done.stderr
    assert "Lower  --batch (now 16384)  or  --context (now 8)" in done.stderr


@pytest.mark.slow
def test_out_of_memory_keeps_the_last_state(model: Path, text: Path, tmp_path: Path) -> None:
    script = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from dataclasses import replace\n"
        "from acip_export.ranking import rank_model\n"
        "from tests.ranking.support import CALIBRATION\n"
        "from tests.ranking.test_run_options import QUICK\n"
        "torch.set_num_threads(1)\n"
        "def limit(progress):\n"
        "    print(progress.stage, progress.done, flush=True)\n"
        "    if (progress.stage, progress.done) == ('masks', 2):\n"
        "        used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (used + 2**22, used + 2**22))\n"
        "rank_model(sys.argv[1], sys.argv[2], acip=replace(QUICK, batch=256), calibration=CALIBRATION,\n"
        "           progress=limit, out=Path(sys.argv[3]), store_seconds=0)\n"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("limits on address space are Linux's")
    # Freed memory goes back at once, so that the next step has to ask for it again.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", script, model, text, tmp_path / "scores.acip"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "RankingError: out of memory" in done.stderr, done.stderr
    assert "Lower  --batch (now 256)" in done.stderr and "Run states stored before are kept" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["scores.acip.run"]
    _, metadata = read_safetensors_header(tmp_path / "scores.acip.run", RankingError)
    # Which step no longer fits is the allocator's to say. It is stored only if its check, after it, still had enough.
    steps = sum(line.startswith(("masks", "post-tune")) for line in done.stdout.splitlines())
    counters = json.loads(metadata["counters"])
    assert counters["mask_steps"] + counters["tune_steps"] in (steps - 1, steps)


def test_only_memory_errors_are_renamed() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_named("lower it"):
        raise RuntimeError("shapes do not match")
    words = r"(?s)out of memory: .*DefaultCPUAllocator.*lower it"
    with pytest.raises(RankingError, match=words), out_of_memory_named("lower it"):
        torch.empty(2**50)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adapter_rank=8", {"adapter_rank": 8}),
        ("post-tune-decay = true", {"post_tune_decay": True}),
        ("start=drop-loss", {"start": "drop-loss"}),
        ("adapter_learning_rate=1e-3", {"adapter_learning_rate": 1e-3}),
    ],
)
def test_any_hyper_parameter_can_be_set(text: str, expected: dict[str, object]) -> None:
    assert parse_settings([text]) == expected
    assert replace(AcipConfig(), **expected) != AcipConfig()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rank=8", "the names are: basis, objective"),
        ("adapter_rank", "write NAME=VALUE"),
        ("adapter_rank=many", "adapter_rank is 'many', expected a whole number"),
        ("post_tune_decay=perhaps", "expected true or false"),
        ("start=twos", "expected ones or drop-loss"),
    ],
)
def test_hyper_parameters_that_are_none(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_settings([text])


def test_unknown_device() -> None:
    with pytest.raises(UsageError, match="torch has no device 'abacus' here"):
        start_processes("abacus")


def test_models_that_cannot_recompute_say_so(model: Path) -> None:
    from acip_export.errors import UnsupportedError
    from acip_export.ranking.load import enable_recomputation

    with pytest.raises(UnsupportedError, match="go without  --recompute-activations"):
        enable_recomputation(nn.Linear(2, 2), Checkpoint.open(model), True)
