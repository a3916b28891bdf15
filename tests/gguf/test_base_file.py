"""``--base-gguf``: architectures that only the base knows, orders found out, bases of other models refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from acip_export import api as pipeline
from acip_export.artifacts.bundle import Bundle, load_bundle
from acip_export.artifacts.plan import load_plan
from acip_export.errors import AcipError, ImatrixError, ModelFileError, UnsupportedError
from acip_export.io.atomic import new_directory
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from converters.gguf import converter
from converters.gguf import ggml_library as ggml
from converters.gguf.base_file import open_base, planned_names
from converters.gguf.imatrix import read_imatrix
from tests.gguf.conftest import export
from tests.gguf.test_converter import FLOAT_TOLERANCE, agreement, assert_float_agreement
from tests.support import Run, dense, everywhere, make_bundle, make_model, make_plan, make_scores

# ggml takes GELU from a table of float16 values.
GELU_TOLERANCE = 3e-3
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "tie_word_embeddings": True}


def starcoder2(directory: Path, **settings: Any) -> Path:
    """An architecture that this tool has no file for: layer norms, biases everywhere, no gate."""
    return make_model(directory, "starcoder2", **{**SIZES, "sliding_window": None, "num_hidden_layers": 2, **settings})


def base_of(model: Path, file: Path, split_max_size: int = 0) -> Path:
    """A base as llama.cpp's converter writes it, through gguf-py: float16 matrices, float32 vectors. Returns the file
    to name, which is the first of several with a ``split_max_size``."""
    checkpoint = Checkpoint.open(model)
    shape, config = checkpoint.shape, checkpoint.config
    writer = gguf.GGUFWriter(file, "starcoder2", split_max_size=split_max_size)
    writer.add_name("the base's own name")
    writer.add_context_length(shape.max_context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_eps(config["norm_epsilon"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    vocabulary = gguf.BpeVocab(model)
    tokens = list(vocabulary.all_tokens())
    writer.add_token_list([token for token, _, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    gguf.SpecialVocab(model, load_merges=True).add_to_gguf(writer, quiet=True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STARCODER2, shape.layers)
    for name in checkpoint.tensors:
        numbers = checkpoint.read(name).numpy()
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        writer.add_tensor(found, numbers.astype(np.float16) if numbers.ndim == 2 else numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file if split_max_size == 0 else min(file.parent.glob(f"{file.stem}-00001-of-*.gguf"))


def export_on(base: Path, model: Path, layout: str, rule: Any, directory: Path) -> tuple[Bundle, Path]:
    plan = dataclasses.replace(make_plan(model, "gguf", layout, rule), options={"base_gguf": str(base)})
    bundle = make_bundle(model, plan, directory / "bundle")
    with new_directory(directory / "export") as out:
        converter.convert(bundle, out, lambda _: None)
    checkpoint = Checkpoint.open(model).with_options(plan.options)
    predicted = converter.predict_files(checkpoint, layout, plan.tensors, plan.serving)
    assert {file.name: file.stat().st_size for file in (directory / "export").iterdir()} == predicted
    return bundle, directory / "export"


PAIRS = everywhere(representation="lora", type="q1_0", rank=64, up_type="f32", down_type="f32", embedding_type="f32")


@pytest.mark.parametrize(("layout", "rule"), [("stock", dense(type="f32")), ("lora", PAIRS)])
def test_an_architecture_that_only_the_base_knows(layout: str, rule: Any, tmp_path: Path) -> None:
    model = starcoder2(tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"(?s)Starcoder2ForCausalLM cannot be written as GGUF .* --base-gguf"):
        export(model, layout, rule, tmp_path / "alone")
    bundle, out = export_on(base_of(model, tmp_path / "base.gguf"), model, layout, rule, tmp_path)
    assert_float_agreement(agreement(load_bundle(bundle.path), out), GELU_TOLERANCE)
    fields = gguf.GGUFReader(out / "model.gguf").fields
    assert fields["general.name"].contents() == "the base's own name"
    assert fields["general.file_type"].contents() != gguf.LlamaFileType.MOSTLY_F16
    assert "acip.plan_sha256" in fields


@pytest.mark.parametrize(("layout", "rule"), [("stock", dense(type="f32")), ("lora", PAIRS)])
def test_order_of_rows_is_found_out(layout: str, rule: Any, tmp_path: Path) -> None:
    """Llama's q and k are reordered in a GGUF; here nothing but the base says so."""
    model = make_model(tmp_path / "model", "llama", **SIZES)
    _, made = export(model, "stock", dense(type="q8_0"), tmp_path / "base")
    bundle, out = export_on(made / "model.gguf", model, layout, rule, tmp_path)
    assert_float_agreement(agreement(load_bundle(bundle.path), out), FLOAT_TOLERANCE)


def contents(directory: Path) -> tuple[set[str], dict[str, bytes]]:
    """Keys and tensors of the model in ``directory``, by gguf-py."""
    readers = [gguf.GGUFReader(file) for file in sorted(directory.glob("model*.gguf"))]
    keys = {key for key in readers[0].fields if not key.startswith("GGUF.")}
    return keys, {tensor.name: tensor.data.tobytes() for reader in readers for tensor in reader.tensors}


@pytest.mark.parametrize(("layout", "rule"), [("stock", dense(type="q8_0")), ("lora", PAIRS)])
def test_a_base_in_several_files(layout: str, rule: Any, tmp_path: Path) -> None:
    """Split by gguf-py, whose later parts have nothing but the numbers of the split."""
    model = starcoder2(tmp_path / "model")
    first = base_of(model, tmp_path / "parts.gguf", split_max_size=100_000)
    assert len(list(tmp_path.glob("parts-*.gguf"))) > 3
    _, whole = export_on(base_of(model, tmp_path / "base.gguf"), model, layout, rule, tmp_path / "a")
    _, parts = export_on(first, model, layout, rule, tmp_path / "b")
    assert contents(whole) == contents(parts)


def test_with_an_imatrix_and_in_several_files(tmp_path: Path, run: Run) -> None:
    """Everything at once, from the command line: base in parts, importance from a file, export in parts."""
    model = starcoder2(tmp_path / "model")
    base = base_of(model, tmp_path / "base.gguf", split_max_size=150_000)
    checkpoint, generator = Checkpoint.open(model), np.random.default_rng(5)
    made = make_scores(model)
    weighted = {
        name: dataclasses.replace(module, input_moment=generator.gamma(0.5, 2, module.shape[1]).astype(np.float32))
        for name, module in made.modules.items()
    }
    imatrix = tmp_path / "imatrix.gguf"
    with_base = checkpoint.with_options({"base_gguf": str(base)})
    pipeline.write_imatrix(with_base, dataclasses.replace(made, modules=weighted), imatrix)
    ask = ("--model", model, "--budget", "260kB", "--budget-scope", "file", "--format", "gguf", "--context", "64",
           "--types", "q8_0,q4_0", "--base-gguf", base, "--split-max-size", "80kB", "--json")  # fmt: skip
    done = run(*ask, "--imatrix", imatrix, "-o", tmp_path / "export")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["report"]["passed"]
    assert len(answer["plan"]["files"]) > 2
    assert max(answer["plan"]["files"].values()) <= 80_000
    _, tensors = contents(tmp_path / "export")
    names = planned_names(open_base(with_base), with_base, load_plan(tmp_path / "export" / "plan.json").tensors)
    means, told = read_imatrix(imatrix), 0
    for decision in load_plan(tmp_path / "export" / "plan.json").tensors:
        if decision.module not in made.modules:
            continue
        name, weight = names[decision.name], checkpoint.read(decision.name)
        importance = torch.from_numpy(means[name])
        assert tensors[name] == ggml.quantize(weight, decision.type, importance).tobytes()
        told += tensors[name] != ggml.quantize(weight, decision.type, None).tobytes()
    assert told > 4  # q8_0 is the same with any weights
    # Of another model: nothing is written.
    other = starcoder2(tmp_path / "other", intermediate_size=384)
    own = imatrix_of(other, tmp_path)
    refused = run(*ask, "--imatrix", own, "-o", tmp_path / "refused")
    assert refused.code == ImatrixError.exit_code, refused.err
    assert not (tmp_path / "refused").exists()


def imatrix_of(model: Path, directory: Path) -> Path:
    """Its imatrix."""
    checkpoint = Checkpoint.open(model).with_options({"base_gguf": str(base_of(model, directory / "other.gguf"))})
    pipeline.write_imatrix(checkpoint, make_scores(model), directory / "other-imatrix.gguf")
    return directory / "other-imatrix.gguf"


def test_planned_within_a_budget_and_verified(tmp_path: Path) -> None:
    model = starcoder2(tmp_path / "model")
    base = base_of(model, tmp_path / "base.gguf")
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    budget = int(0.35 * checkpoint.weight_bytes)
    options, types = {"base_gguf": str(base)}, ("f16", "q8_0", "q4_0")
    request = PlanRequest("gguf", budget, budget_scope="file", context=64, options=options, types=types)
    plan = pipeline.plan_export(checkpoint, scores, request)
    report = pipeline.export_model(checkpoint, scores, plan, tmp_path / "export")
    assert report is not None
    assert report.passed
    assert 0.95 * budget < report.written_bytes == plan.planned_bytes <= budget


def test_bases_that_cannot_be_used(tmp_path: Path) -> None:
    model = starcoder2(tmp_path / "model")
    base = base_of(model, tmp_path / "base.gguf")

    def refused(error: type[AcipError], message: str, file: Path, of: Path = model, layout: str = "stock") -> None:
        with pytest.raises(error, match=message):
            export_on(file, of, layout, dense(type="f32"), tmp_path / str(len(list(tmp_path.iterdir()))))

    refused(ModelFileError, "does not exist", tmp_path / "none.gguf")
    (tmp_path / "cut.gguf").write_bytes(base.read_bytes()[:-100])
    refused(ModelFileError, "truncated or damaged", tmp_path / "cut.gguf")
    refused(UnsupportedError, "for the layouts stock and adapter", base, layout="factored")
    other = starcoder2(tmp_path / "other", seed=5)
    refused(ModelFileError, r"nothing in common .* \(cosine -?0\.0", base, of=other)
    assert not list(tmp_path.glob("*/export"))
    deeper = starcoder2(tmp_path / "deeper", num_hidden_layers=3)
    refused(ModelFileError, "its block_count is 2, the model's is 3", base, of=deeper)
    wider = starcoder2(tmp_path / "wider", intermediate_size=384)
    refused(ModelFileError, r"ffn_up\.weight is \(256, 128\)", base, of=wider)
    llama = make_model(tmp_path / "llama", "llama", **SIZES)
    refused(UnsupportedError, "nothing for .*mlp.gate_proj.weight", base, of=llama)
