"""llama.cpp's importance matrices: written, read, used in place of a score file's moments, refused."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from acip_export.api import materialize_bundle, write_imatrix
from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.scores import ScoreFile, save_scores
from acip_export.cli.main import app
from acip_export.errors import ImatrixError
from acip_export.model.checkpoint import Checkpoint
from converters.gguf.imatrix import importance_of, read_imatrix
from tests.support import dense, make_plan, make_scores

Tensors = dict[str, np.ndarray]


def _scores(model: Path) -> ScoreFile:
    """Moments that differ from column to column and from module to module."""
    made, generator = make_scores(model, model.parent / "made.acip"), np.random.default_rng(3)
    modules = {
        name: dataclasses.replace(module, input_moment=generator.gamma(0.5, 2, module.shape[1]).astype(np.float32))
        for name, module in made.modules.items()
    }
    algorithm = {**made.algorithm, "statistics_tokens": 5000, "context": 512}
    data = dataclasses.replace(made.data, source="calibration.txt", tokens=9000)
    return dataclasses.replace(made, modules=modules, algorithm=algorithm, data=data)


def test_what_was_written_comes_back(model: Path, tmp_path: Path) -> None:
    checkpoint, scores, file = Checkpoint.open(model), _scores(model), tmp_path / "imatrix.gguf"
    assert write_imatrix(checkpoint, scores, file) == len(scores.modules)
    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "general.quantized_by": "acip-export imatrix",
        "imatrix.datasets": ["calibration.txt"],
        "imatrix.chunk_count": 10,
        "imatrix.chunk_size": 512,
    }
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert tensors["blk.1.ffn_down.weight.counts"].tolist() == [[5000.0]]
    assert tensors["blk.1.ffn_down.weight.in_sum2"].shape == (1, 512)
    for name, moment in importance_of(checkpoint, file).items():
        # Times the tokens and divided by them again: two roundings of float32, half a unit in the last place each.
        np.testing.assert_allclose(moment, scores.modules[name].input_moment, rtol=2.0**-23)


def test_the_bundle_rounds_with_it(model: Path, tmp_path: Path) -> None:
    checkpoint, scores, file = Checkpoint.open(model), _scores(model), tmp_path / "imatrix.gguf"
    write_imatrix(checkpoint, scores, file)
    plan = dataclasses.replace(make_plan(model, "gguf", "stock", dense(type="q4_k")), options={"imatrix": str(file)})
    bundle = Bundle.open(materialize_bundle(checkpoint, make_scores(model), plan, tmp_path / "bundle"))
    name = "model.layers.1.mlp.down_proj"
    found, means = bundle.importance(f"{name}.weight"), read_imatrix(file)
    assert found is not None
    assert np.array_equal(found.numpy(), means["blk.1.ffn_down.weight"])


def test_from_the_command_line(model: Path, tmp_path: Path) -> None:
    scores, file, run = tmp_path / "model.acip", tmp_path / "imatrix.gguf", CliRunner()
    save_scores(_scores(model), scores)
    written = run.invoke(app, ["imatrix", str(scores), "-m", str(model), "-o", str(file), "--json"])
    assert written.exit_code == 0, written.output
    assert '"matrices": 14' in written.stdout
    flags = ["plan", "-m", str(model), "--scores", str(scores), "--budget", "3MB", "--budget-scope", "file"]
    planned = run.invoke(app, [*flags, "--format", "gguf", "--types", "q8_0,q4_0", "--imatrix", str(file), "--json"])
    assert planned.exit_code == 0, planned.output
    assert str(file.resolve()) in planned.stdout


def _write(file: Path, tensors: Tensors, kind: str = "imatrix") -> None:
    """By gguf-py, which knows nothing of what an imatrix has to have."""
    writer = gguf.GGUFWriter(file, "")
    writer.add_type(kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _drop(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


Q = "blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop(f"{Q}.counts"), rf"damaged: 14 sums and 13 counts, alone: {Q}"),
        (_drop(f"{Q}.counts", f"{Q}.in_sum2"), f"nothing for {Q}; not in tiny: none"),
        (lambda t: t.update({"blk.9.ffn_up.weight.in_sum2": np.ones((1, 4), np.float32),
                             "blk.9.ffn_up.weight.counts": np.ones((1, 1), np.float32)}),
         "another model.*not in tiny: blk.9.ffn_up.weight"),
        (lambda t: t.update({f"{Q}.in_sum2": np.ones((1, 128), np.float32)}), "128 columns, the model's has 256"),
        (lambda t: t.update({f"{Q}.in_sum2": np.ones((2, 256), np.float32)}), r"\(2, 256\) f32 .*expected \(1, col"),
        (lambda t: t.update({f"{Q}.in_sum2": np.ones((1, 256), np.float16)}), "f16 and counts"),
        (lambda t: t.update({f"{Q}.in_sum2": np.full((1, 256), np.nan, np.float32)}), "not finite"),
        (lambda t: t.update({f"{Q}.in_sum2": np.full((1, 256), -1, np.float32)}), "negative"),
        (lambda t: t.update({f"{Q}.counts": np.full((1, 1), np.inf, np.float32)}), "not finite"),
    ],
)  # fmt: skip
def test_refusals(model: Path, tmp_path: Path, change: Callable[[Tensors], None], message: str) -> None:
    checkpoint, scores, file = Checkpoint.open(model), make_scores(model, tmp_path / "s.acip"), tmp_path / "good.gguf"
    write_imatrix(checkpoint, scores, file)
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    change(tensors)
    _write(tmp_path / "bad.gguf", tensors)
    with pytest.raises(ImatrixError, match=message):
        importance_of(checkpoint, tmp_path / "bad.gguf")


def test_no_imatrix_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    with pytest.raises(ImatrixError, match="does not exist; it was named by --imatrix"):
        read_imatrix(file)
    file.write_bytes(struct.pack("<ii", 1, 5) + b"blk.0")  # the form before GGUF
    with pytest.raises(ImatrixError, match="llama-imatrix --in-file OLD"):
        read_imatrix(file)
    _write(file, {"a.weight": np.ones((1, 4), np.float32)}, "model")
    with pytest.raises(ImatrixError, match="is no imatrix but 'model'"):
        read_imatrix(file)
    _write(file, {"a.weight.in_sum2": np.ones((1, 4), np.float32), "a.weight.counts": np.zeros((1, 1), np.float32)})
    assert read_imatrix(file)["a.weight"].tolist() == [1, 1, 1, 1]  # never reached: no weights, as llama-quantize
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(ImatrixError, match="truncated or damaged"):
        read_imatrix(file)
