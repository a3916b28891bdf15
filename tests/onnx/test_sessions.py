"""The runtime adapters, and genai as an application uses it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from acip_export.api.speed import Sizes, made_checkpoint, tensor_shapes, uniform
from acip_export.artifacts.bundle import load_bundle
from acip_export.artifacts.plan import Serving
from acip_export.errors import VerificationError
from acip_export.formats.protocol import EXAMPLE_QUESTION, RunCommand
from acip_export.formats.registry import export_format
from acip_export.model.chat_template import ChatTemplate
from acip_export.verification.metrics import compare_logits
from converters.onnx.run_commands import run_commands
from converters.onnx.runtimes.genai import GenaiSession
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession
from tests.onnx.conftest import CONTEXT, PROMPT_BATCH, MakeExport
from tests.support import CHATML, greedy_tokens

SESSIONS = [OnnxRuntimeSession, GenaiSession]
WINDOWS = np.random.default_rng(1).integers(0, 512, (2, CONTEXT))
# Longer than a prompt batch, and no multiple of it.
PROMPT = [int(token) for token in WINDOWS[0][: PROMPT_BATCH + 5]]


@pytest.mark.parametrize("session_class", SESSIONS)
@pytest.mark.parametrize(
    ("arch", "tied", "rule"),
    [
        ("llama", True, "dense f32"),
        ("llama", True, "factored f32"),
        ("mistral", False, "factored f32"),
        ("qwen2", False, "factored f32"),
        ("qwen3", True, "factored f32"),
    ],
)
def test_logits_and_greedy_tokens_are_the_bundles(
    make_export: MakeExport, session_class: type[OnnxRuntimeSession | GenaiSession], arch: str, tied: bool, rule: str
) -> None:
    export = make_export(arch, tied, rule)
    reference = load_bundle(export.bundle.path)
    with torch.no_grad():
        expected = list(reference(torch.from_numpy(WINDOWS)).logits.numpy())
    count = CONTEXT - len(PROMPT)
    with session_class(export.path, export.bundle.plan.serving) as session:
        agreement = compare_logits(
            expected,
            session.logits(WINDOWS),
            (greedy_tokens(reference, PROMPT, count), session.greedy(PROMPT, count)),
        )
    assert agreement.max_logit_difference <= 1e-5
    assert agreement.greedy_equal == agreement.greedy_tokens == count


def test_no_token_of_an_answer_costs_nothing(tmp_path: Path) -> None:
    """genai's own loop computes a token when the next one is asked for: its first one takes a hundredth."""
    sizes = Sizes(1024, 2816, 2)
    checkpoint, onnx = made_checkpoint(tmp_path / "model", sizes), export_format("onnx")
    serving = Serving(64, "f32", 32)
    (tmp_path / "export").mkdir()
    decisions = uniform(onnx, tensor_shapes(sizes), "int8")
    onnx.imitate(checkpoint, "factored", decisions, serving, tmp_path / "export")
    with GenaiSession(tmp_path / "export", serving) as session:
        one, four = (max(session.speed([1, 2, 3], count).decode or 0 for _ in range(10)) for count in (1, 4))
    assert 0 < one < 20 * four


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rule", ["int8", "int4", "mixed"])
def test_both_runtimes_agree_on_rounded_exports(make_export: MakeExport, rule: str, tied: bool) -> None:
    export = make_export("llama", tied, rule)
    runtime = export.bundle.plan.serving
    with OnnxRuntimeSession(export.path, runtime) as plain, GenaiSession(export.path, runtime) as genai:
        agreement = compare_logits(
            plain.logits(WINDOWS), genai.logits(WINDOWS), (plain.greedy(PROMPT, 20), genai.greedy(PROMPT, 20))
        )
    assert agreement.max_logit_difference <= 1e-5
    assert agreement.greedy_equal == 20


@pytest.mark.parametrize("session_class", SESSIONS)
def test_speed_fits_the_context(
    make_export: MakeExport, session_class: type[OnnxRuntimeSession | GenaiSession]
) -> None:
    export = make_export("llama", True, "int4")
    with session_class(export.path, export.bundle.plan.serving) as session:
        speed = session.speed([5] * (CONTEXT - 8), 8)
    assert speed.prefill > 0
    assert speed.decode > 0
    assert (speed.prompt_tokens, speed.new_tokens) == (CONTEXT - 8, 8)


@pytest.mark.parametrize("session_class", SESSIONS)
def test_a_damaged_export_is_a_verification_error(
    make_export: MakeExport, session_class: type[OnnxRuntimeSession | GenaiSession], tmp_path: Path
) -> None:
    runtime = make_export("llama", True, "int4").bundle.plan.serving
    with pytest.raises(VerificationError, match="cannot open"):
        session_class(tmp_path, runtime)


def _printed(command: RunCommand) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(command.text, {})
    return printed.getvalue()


def test_the_printed_code_runs(make_export: MakeExport) -> None:
    export = make_export("samples/llama", True, "int8")
    command = run_commands(export.bundle.plan, export.path)[0]
    with GenaiSession(export.path, export.bundle.plan.serving) as session:
        prompt = AutoTokenizer.from_pretrained(export.model)("Hello")["input_ids"]
        assert len(prompt) == 1 + len(session.tokenize("Hello"))
        wanted = session._tokenizer.decode(np.array(session.greedy(prompt, CONTEXT - len(prompt)), np.int32))
    printed = _printed(command)
    assert printed and wanted.startswith(printed)


def test_the_printed_code_chats_where_there_is_a_template(make_export: MakeExport, tmp_path: Path) -> None:
    """genai writes the conversation with the export's own template."""
    export = make_export("samples/llama", True, "int8")
    chats = shutil.copytree(export.path, tmp_path / "export")
    (chats / "chat_template.jinja").write_text(CHATML)
    genai = run_commands(export.bundle.plan, chats, CHATML)[0]
    question = ChatTemplate(CHATML).render([{"role": "user", "content": EXAMPLE_QUESTION}])
    with GenaiSession(chats, export.bundle.plan.serving) as session:
        prompt = session.tokenize(question)
        wanted = session._tokenizer.decode(np.array(session.greedy(prompt, CONTEXT - len(prompt)), np.int32))
    printed = _printed(genai)
    assert printed and wanted.startswith(printed)


def test_other_programs_are_told_where_they_run_the_graph(make_export: MakeExport) -> None:
    plan = make_export("llama", True, "int8").bundle.plan
    for template in (None, CHATML):
        programs = {c.program: c.text for c in run_commands(plan, Path("my export"), template)}
        assert list(programs) == ["onnxruntime-genai", "transformers.js", "optimum"]
        assert all(("apply_chat_template" in text) == (template is not None) for text in programs.values())
        for name in ("onnxruntime-genai", "optimum"):
            compile(programs[name], name, "exec")
    static = dataclasses.replace(plan, serving=dataclasses.replace(plan.serving, backend="qnn-friendly"))
    assert [c.program for c in run_commands(static, Path())] == ["onnxruntime-genai"]
