"""Several processes on one machine, started as users start them, against one process at the same batch."""

from __future__ import annotations

import itertools
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from acip_export.artifacts.scores import ScoreFile, load_scores
from acip_export.errors import DataError, UnsupportedError, UsageError
from acip_export.ranking import AcipConfig, rank_model
from acip_export.ranking.factorized_model import owners_of
from acip_export.ranking.processes import Processes, check_batch, start_processes
from acip_export.ranking.sharding import shard_block
from tests.ranking.support import CALIBRATION

pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[2]

# Dropout draws other inputs to drop for every process, so it is off where rankings are compared.
SETTINGS = {
    "basis": "kfac",
    "start": "drop-loss",
    "learning_rate": 3e-3,
    "penalty": 3e-2,
    "post_tune": 4,
    "batch": 4,
    "adapter_rank": 4,
    "adapter_dropout": 0.0,
}
SCRIPT = """
import gc, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, torch
from acip_export.lowrank import cache as factor_cache
from acip_export.ranking import AcipConfig, rank_model
from acip_export.ranking.masked_linear import MaskedLinear
from acip_export.ranking.processes import launched_index
from acip_export.ranking.sharding import local
from tests.ranking.support import CALIBRATION
from tests.ranking.test_processes import SETTINGS
torch.set_num_threads(1)
model, text, out = sys.argv[1:]
factorize, counted = factor_cache.whitened_components, []
def counting(*arguments):
    counted.append(arguments)
    return factorize(*arguments)
factor_cache.whitened_components = counting
def look(progress):
    if (progress.stage, progress.done) == ("curve", 1):
        factors = [f for m in gc.get_objects() if isinstance(m, MaskedLinear) for f in (m.up, m.down)]
        share = sum(local(f).numel() for f in factors) / sum(f.numel() for f in factors)
        print(f"holds {share}\\n", end="", flush=True)
ranked = rank_model(
    model, text, acip=AcipConfig(**SETTINGS), calibration=CALIBRATION, out=Path(out) / "scores.acip", progress=look
)
np.save(Path(out) / f"rank{launched_index()}.npy", np.concatenate([m.scores for m in ranked.modules.values()]))
print(f"factorized {len(counted)}\\n", end="", flush=True)
"""


def launch(*arguments: object, script: str | None = None, mode: str = "--multi_gpu") -> str:
    # --multi_gpu is accelerate's name for "one process per device through torchrun"; without GPUs they use gloo.
    options = f"{mode} --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    command += [script] if script else ["-m", "acip_export"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        # The script of the first test imports from tests, which no installation has.
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


KILLED = """
import os, signal, sys, torch
from dataclasses import replace
from pathlib import Path
from acip_export.io import kept_until_done
from acip_export.ranking import rank_model
from tests.ranking.test_kept_ranking import SHORT
torch.set_num_threads(1)
kept_until_done._WORTH_KEEPING = 0.0
model, text, out, algorithm, stage, done, indices = sys.argv[1:]
def look(progress):
    print(progress.stage, progress.done, flush=True)
    if progress.stage == stage and progress.done >= int(done) and os.environ["RANK"] in indices:
        os.kill(os.getpid(), signal.SIGKILL)
# Three batches: one process has two of them.
rank_model(
    model, text, algorithm=algorithm, calibration=replace(SHORT, batch=12), out=Path(out), device="cpu", progress=look
)
"""


def in_two_processes(*arguments: object, **variables: str) -> list[tuple[int, str, str]]:
    """Run ``KILLED`` in two processes without a launcher, which would end one when the other does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables, "RANK": index, "LOCAL_RANK": index},
        )
        for index in "01"
    ]
    said = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *each) for process, each in zip(started, said, strict=True)]


def joined(scores: ScoreFile) -> np.ndarray:
    return np.concatenate([module.scores for module in scores.modules.values()])


@pytest.fixture(scope="module")
def alone(model: Path, text: Path) -> ScoreFile:
    return rank_model(model, text, acip=AcipConfig(**SETTINGS), calibration=CALIBRATION)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "share"), [("--multi_gpu", 1.0), ("--use_fsdp --fsdp_version 2", 0.5)])
def test_two_processes_rank_as_one(
    model: Path, text: Path, tmp_path: Path, alone: ScoreFile, mode: str, share: float
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    printed = launch(model, text, tmp_path, script=str(tmp_path / "script.py"), mode=mode)
    told = [line.split() for line in printed.splitlines()]
    counts = [int(words[1]) for words in told if words[0] == "factorized"]
    assert len(counts) == 2 and sum(counts) == len(alone.modules) and min(counts) > 0
    assert [float(words[1]) for words in told if words[0] == "holds"] == [share, share]
    by_rank = [np.load(tmp_path / f"rank{rank}.npy") for rank in (0, 1)]
    np.testing.assert_array_equal(*by_rank)  # the same steps from the same sums
    together = load_scores(tmp_path / "scores.acip")
    np.testing.assert_array_equal(by_rank[0], joined(together))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rank0.npy", "rank1.npy", "scores.acip", "script.py"]
    # Statistics are sums in float32 of the same rows, in another order.
    for key, moment in alone.second_moments.items():
        ours = together.second_moments[key].diagonal
        np.testing.assert_allclose(ours, moment.diagonal, rtol=1e-4, atol=1e-6 * moment.diagonal.max())
    # Gradients are averaged in another order, and Adam turns the last bits of a tiny gradient into part of a step: a
    # mask may cross zero a step earlier or later, which moves a component past its neighbours only. And a last bit may
    # make a code of a moment another one: components of the layers that read it then begin a per cent apart. One such
    # code leaves 0.89 in common at a ratio of 0.5; the curve says that it is as good an order.
    for ratio in (0.9, 0.7, 0.5):
        ours, theirs = together.ranks_at(ratio), alone.ranks_at(ratio)
        kept = common = 0
        for name, module in alone.modules.items():
            one, two = set(module.order[: theirs[name]]), set(together.modules[name].order[: ours[name]])
            kept, common = kept + len(one), common + len(one & two)
        assert common >= 0.85 * kept
    for point, other in zip(alone.curve, together.curve, strict=True):
        assert other.loss == pytest.approx(point.loss, abs=0.15)  # two orders as good; 0.09 was seen, of 6.4
        assert other.divergence == pytest.approx(point.divergence, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--multi_gpu", "--use_fsdp --fsdp_version 2"], ids=["whole", "sharded"])
def test_command_line_in_two_processes(model: Path, text: Path, tmp_path: Path, mode: str) -> None:
    arguments = "rank", model, "--data", text, "--context", 32, "--algorithm", "fisher", "-o", tmp_path / "a.acip"
    printed = launch(*arguments, mode=mode)
    assert printed.count("score file written to") == 1
    together = load_scores(tmp_path / "a.acip")
    calibration = type(CALIBRATION)(context=32)
    alone = rank_model(model, text, algorithm="fisher", calibration=calibration)
    if "fsdp" in mode:  # batches begin at other windows, and draw other labels
        losses = [[point.loss for point in scores.curve] for scores in (alone, together)]
        assert losses[1] == pytest.approx(losses[0], abs=0.15)
        return
    # Every batch draws its labels from its own generator, so only the order of additions differs; where that makes a
    # code of a moment another one, the components of the layers that read it differ by a few per cent.
    differences = np.abs(joined(together) / joined(alone) - 1)
    assert differences.max() < 0.05 and (differences < 1e-3).mean() > 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "kills", "behind"),
    [
        # Of the steps of statistics 32 each are a block's forward, 48 backward.
        ("fisher", [("statistics", 40, "1"), ("statistics", 120, "01")], 112),
        ("first-order", [("first-order", 24, "01"), ("curve", 3, "01")], 0),
    ],
)
def test_killed_processes_go_on(
    model: Path, text: Path, tmp_path: Path, algorithm: str, kills: list[tuple[str, int, str]], behind: int
) -> None:
    """SIGKILL in all of them, or in one, without which the other ends: both end with the same bytes later."""
    whole, out = tmp_path / "whole.acip", tmp_path / "scores.acip"
    assert [done[0] for done in in_two_processes(model, text, whole, algorithm, "", 0, "")] == [0, 0]
    for stage, done, indices in kills:
        ended = in_two_processes(model, text, out, algorithm, stage, done, indices)
        for index, (code, _, error) in enumerate(ended):
            if str(index) in indices:
                assert code == -signal.SIGKILL
            else:
                assert "another process of this ranking has ended" in error
        assert not out.exists()
    for code, printed, _ in in_two_processes(model, text, out, algorithm, "", 0, ""):
        first, done = printed.split()[:2]
        assert (code, first) == (0, kills[-1][0]) and int(done) > behind
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scores.acip", "whole.acip"]


def test_shares_are_whole_and_disjoint() -> None:
    windows = torch.arange(23).view(23, 1)
    for count in (1, 2, 3, 5, 23):
        shares = [Processes(index, count, torch.device("cpu")).batches(windows, 4) for index in range(count)]
        assert all(shares)
        seen = sorted((start + i, int(row)) for share in shares for start, part in share for i, row in enumerate(part))
        assert seen == [(i, i) for i in range(23)]


def test_factorizing_is_shared_out_evenly_and_by_input() -> None:
    shapes, inputs = {}, {}
    for layer in range(8):
        for name, shape, read in (
            ("q", (64, 64), "qkv"),
            ("k", (32, 64), "qkv"),
            ("v", (32, 64), "qkv"),
            ("o", (64, 64), "o"),
            ("gate", (176, 64), "mlp"),
            ("up", (176, 64), "mlp"),
            ("down", (64, 176), "down"),
        ):
            shapes[f"{layer}.{name}"], inputs[f"{layer}.{name}"] = shape, f"{layer}.{read}"
    for count in (1, 2, 3, 4):
        owners = owners_of(shapes, inputs, count)
        loads = [0] * count
        for name, owner in owners.items():
            loads[owner] += shapes[name][0] ** 3 + math.prod(shapes[name]) * min(shapes[name])
        for key in set(inputs.values()):
            reader = next(name for name in shapes if inputs[name] == key)
            loads[owners[reader]] += shapes[reader][1] ** 3
        # Groups are dealt out whole, and the largest one is less than a layer.
        assert max(loads) - min(loads) < sum(loads) / 8
        assert all(owners[one] == owners[two] for one in shapes for two in shapes if inputs[one] == inputs[two])


def test_processes_that_share_a_model_take_equally_many_batches() -> None:
    for count, windows, size in itertools.product((2, 3, 8), (8, 9, 48, 65), (1, 4, 100)):
        shares = [sharing(index, count).batches(torch.arange(windows).view(-1, 1), size) for index in range(count)]
        assert len({len(share) for share in shares}) == 1
        seen = sorted((start + i, int(row)) for share in shares for start, part in share for i, row in enumerate(part))
        assert seen == [(i, i) for i in range(windows)]
        # A window more than asked for, where there is no other way to give each the same number of batches.
        assert max(len(part) for share in shares for _, part in share) <= size + 1
        if windows % (size * count) == 0:
            assert {len(part) for share in shares for _, part in share} == {size}


def sharing(index: int, count: int) -> Processes:
    return Processes(index, count, torch.device("cpu"), cast("DeviceMesh", SimpleNamespace(size=lambda: count)))


def test_layers_that_processes_cannot_share() -> None:
    block = nn.Module()
    block.down = nn.Parameter(torch.zeros(4, 10), requires_grad=False)
    with pytest.raises(UnsupportedError, match="3 processes cannot shard a layer of 10 inputs equally"):
        shard_block(block, sharing(0, 3).mesh, [block.down])


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_other_ways_of_sharding_are_refused(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UnsupportedError, match=rf"{engine} asks for .* --use_fsdp"):
        start_processes("auto")


def test_work_that_cannot_be_shared() -> None:
    with pytest.raises(DataError, match="3 windows of text for 4 processes"):
        Processes(0, 4, torch.device("cpu")).batches(torch.zeros(3, 8), 2)
    with pytest.raises(UsageError, match=r"2 processes cannot share 5 windows .* --batch"):
        check_batch(5, 2)
