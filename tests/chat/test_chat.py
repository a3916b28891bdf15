"""Conversations: the template's text, the runtimes' tokens, what is kept and forgotten, and the command."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acip_export.artifacts.plan import Plan, load_plan
from acip_export.chat import Settings, open_chat
from acip_export.chat.conversation import Conversation, choose
from acip_export.chat.dense import DenseSession
from acip_export.errors import InputError, RuntimeCrashError, UsageError, VerificationError
from acip_export.formats.protocol import EXAMPLE_QUESTION
from acip_export.formats.registry import export_format
from acip_export.formats.session import ChatSession, RuntimeSession
from acip_export.model.chat_template import ChatTemplate, find_chat_template
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import load_causal_lm
from converters.gguf.runtimes.llama_chat import LlamaChatSession
from converters.gguf.runtimes.llama_cpp import LlamaCppSession
from converters.onnx.runtimes.chat import GenaiChatSession, OnnxRuntimeChatSession
from converters.onnx.runtimes.genai import GenaiSession
from converters.onnx.runtimes.onnxruntime import OnnxRuntimeSession
from tests.chat.conftest import CONTEXT, export
from tests.support import CHATML, Run, make_model

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if m['content'] == 'skip' %}{% continue %}{% endif %}\n"
    "    {{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}\n"
    "{% endfor %}{% generation %}{{ 'x' }}{% endgeneration %}{{ {'a': 'ü'} | tojson }}"
)
CONVERSATION = [
    {"role": "user", "content": " Hello "},
    {"role": "assistant", "content": "skip"},
    {"role": "user", "content": "Größe?"},
]
SHORT = Settings(max_tokens=12)


@pytest.mark.parametrize("template", [CHATML, GEMMA], ids=["chatml", "gemma"])
def test_templates_are_rendered_as_transformers_does(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    wanted, _ = render_jinja_template(
        [CONVERSATION], chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )
    assert ChatTemplate(template, {"bos_token": "<s>"}).render(CONVERSATION) == wanted[0]


def test_a_template_may_refuse_and_cannot_do_harm() -> None:
    with pytest.raises(InputError, match="refuses this conversation: no system"):
        ChatTemplate(GEMMA).render([{"role": "system", "content": "x"}])
    with pytest.raises(InputError, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}").render(CONVERSATION)


def test_where_a_template_is(tmp_path: Path, places: dict[str, Path]) -> None:
    assert find_chat_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert find_chat_template(tmp_path) == "yes"
    (tmp_path / "chat_template.jinja").write_text("the file")
    assert find_chat_template(tmp_path) == "the file"
    for name in ("gguf", "onnx"):
        assert export_format(name).chat_template(places[name]) == CHATML
    assert export_format("gguf").chat_template(places["plain"]) is None
    # transformers.js reads no other file.
    assert json.loads((places["onnx"] / "tokenizer_config.json").read_text())["chat_template"] == CHATML


def _plan(export: Path) -> Plan:
    return load_plan(export / "plan.json")


RUNTIMES: list[tuple[str, Any, Any]] = [
    ("gguf", LlamaChatSession, LlamaCppSession),
    ("onnx", GenaiChatSession, GenaiSession),
    ("onnx", OnnxRuntimeChatSession, OnnxRuntimeSession),
]
PROMPT = "import os\n\n\ndef main("


@pytest.mark.parametrize(("name", "chat_class", "session_class"), RUNTIMES)
def test_an_answer_is_what_the_verified_session_says(
    name: str, chat_class: Any, session_class: Any, places: dict[str, Path]
) -> None:
    serving = _plan(places[name]).serving
    chat: ChatSession
    session: RuntimeSession
    with chat_class(places[name], serving, 1) as chat, session_class(places[name], serving) as session:
        conversation = Conversation(chat, CONTEXT)
        prompt = chat.encode(PROMPT, True)
        for _ in range(2):  # the second time from what is held
            assert conversation.ask(PROMPT, True, SHORT) is None
            said = ""
            while conversation.answer() is None:
                said += conversation.next()
            write = chat.stream()
            assert said == "".join(write(token) for token in session.greedy(prompt, 12))
        answer = conversation.answer()
        assert answer is not None and answer.ending == "length" and answer.tokens == 12
        assert answer.kept_tokens == len(prompt) - 1
        # What comes next shares a beginning only; what was after it is forgotten.
        other = PROMPT.replace("main", "other")
        assert conversation.ask(other, True, SHORT) is None
        again = "".join(conversation.next() for _ in range(12))
        fresh = Conversation(chat, CONTEXT)
        chat.rewind(0)
        assert fresh.ask(other, True, SHORT) is None
        assert "".join(fresh.next() for _ in range(12)) == again


@pytest.mark.parametrize(("name", "chat_class"), [(name, chat_class) for name, chat_class, _ in RUNTIMES])
def test_the_token_that_begins_texts_is_added_to_texts_only(name: str, chat_class: Any, tmp_path: Path) -> None:
    """Templates write it themselves: twice would be another text."""
    made = export(make_model(tmp_path / "model"), name, tmp_path / "export")
    with chat_class(made, _plan(made).serving, 1) as chat:
        plain = chat.encode("def main", False)
        assert chat.tokens["bos_token"] == "<|begin_of_text|>"
        (first,) = chat.encode(chat.tokens["bos_token"], False)
        assert chat.encode("def main", True) == [first, *plain]
        assert chat.encode("def main", False) == plain and first not in plain


@pytest.mark.parametrize("begins", ["", "{{ bos_token }}"], ids=["", "bos_token"])
@pytest.mark.parametrize("stale", [False, True], ids=["one template", "an older one"])
def test_conversations_begin_as_in_transformers(begins: str, stale: bool, tmp_path: Path) -> None:
    """With a template in its own file, in every runtime; applications call genai without options, as the guides do."""
    import onnxruntime_genai
    from transformers import AutoTokenizer

    model = make_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(begins + CHATML)
    if stale:
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "no"}))
    question = [{"role": "user", "content": "import os"}]
    reference = AutoTokenizer.from_pretrained(model)
    wanted = reference.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert wanted.count(reference.bos_token_id) == len(begins and [1])
    for name, chat_class, _ in RUNTIMES:
        made = tmp_path / name
        if not made.exists():
            export(model, name, made)
        with chat_class(made, _plan(made).serving, 1) as chat:
            template = export_format(name).chat_template(made)
            assert template is not None
            assert chat.encode(ChatTemplate(template, chat.tokens).render(question), False) == wanted
    tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(tmp_path / "onnx")))
    assert list(tokenizer.encode(tokenizer.apply_chat_template(json.dumps(question)))) == wanted
    known: dict[str, Any] = {}
    made = tmp_path / "onnx"
    code = export_format("onnx").run_commands(_plan(made), made, begins + CHATML)[0].text
    exec(code.replace(EXAMPLE_QUESTION, "import os").partition("generator =")[0], known)  # what comes then generates
    asked = known["tokenizer"].apply_chat_template(json.dumps(known["messages"]))
    assert list(known["tokenizer"].encode(asked)) == wanted


def test_the_dense_model_answers_as_the_reference(places: dict[str, Path]) -> None:
    serving = _plan(places["onnx"]).serving
    with DenseSession(places["model"], serving, 1) as session:
        prompt = session.encode(PROMPT * 9, True)
        assert len(prompt) > serving.prompt_batch
        stored = load_causal_lm(Checkpoint.open(places["model"]), "auto")  # bfloat16, as the session has it
        for common in (0, 40, 7):
            kept = session.rewind(common)
            found = session.extend(prompt[kept:])
            wanted = stored(input_ids=torch.tensor([prompt])).logits[0, -1].float().numpy()
            assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
        conversation = Conversation(session, CONTEXT)
        conversation.ask(PROMPT, True, SHORT)
        assert "".join(conversation.next() for _ in range(12))


@pytest.mark.parametrize("arch", ["gemma2", "qwen2"])
def test_llama_cpp_forgets_windows_that_it_cannot_rewind(arch: str, tmp_path: Path) -> None:
    """Layers with a sliding window have dropped what a rewound conversation would need."""
    windows = {"sliding_window": 16} if arch == "gemma2" else {}
    model = make_model(tmp_path / "model", arch, max_position_embeddings=512, **windows)
    made = export(model, "gguf", tmp_path / "export", context=512)
    with LlamaChatSession(made, _plan(made).serving, 1) as session:
        tokens = [5 + index % 400 for index in range(480)]
        session.rewind(0)
        session.extend(tokens)
        kept = session.rewind(40)
        assert kept == (0 if arch == "gemma2" else 40)
        found = session.extend(tokens[kept:60])
        session.rewind(0)
        np.testing.assert_allclose(found, session.extend(tokens[:60]), atol=2e-3)


def test_sampling() -> None:
    logits = np.array([0.0, 1.0, 4.0, 3.5, -50.0], np.float32)
    chance = np.random.default_rng(0)
    assert choose(logits, 0, chance) == 2
    drawn = {choose(logits, 1.0, chance) for _ in range(200)}
    assert drawn == {2, 3}  # others are below a twentieth of the likeliest
    assert choose(logits, 1.0, np.random.default_rng(7)) == choose(logits, 1.0, np.random.default_rng(7))
    with pytest.raises(VerificationError, match="NaN"):
        choose(np.array([np.nan, 1], np.float32), 0, chance)


@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_a_conversation_forgets_its_beginning_when_the_context_is_full(name: str, places: dict[str, Path]) -> None:
    with open_chat(places[name], threads=1, system="be brief") as model:
        assert model.chats and model.context == CONTEXT
        forgotten = []
        for _ in range(4):
            text = "".join(model.ask("import os", SHORT))
            assert text and model.answer is not None
            assert model.answer.prompt_tokens + model.answer.tokens <= CONTEXT
            assert model.answer.memory_bytes is None or model.answer.memory_bytes > 10**7
            forgotten.append(model.forgotten)
        assert forgotten[0] == 0 and max(forgotten) > 0
        with pytest.raises(UsageError, match=rf"takes \d+ tokens, and the context is {CONTEXT}"):
            list(model.ask("x = 1\n" * CONTEXT, SHORT))
        model.forget()
        assert "".join(model.ask("import os", SHORT))


def test_an_answer_that_fills_the_context_ends_there(places: dict[str, Path]) -> None:
    with open_chat(places["plain"], threads=1) as model:
        assert not model.chats
        text = "".join(model.ask("x = 1\n" * 22, Settings(max_tokens=500)))
        assert model.answer is not None and model.answer.ending in ("context", "end")
        assert model.answer.prompt_tokens + model.answer.tokens <= CONTEXT
        assert text
        # Each text is continued for itself.
        assert "".join(model.ask("x = 1\n" * 22, Settings(max_tokens=500))) == text


def test_a_stopped_answer_is_remembered_as_far_as_it_went(places: dict[str, Path]) -> None:
    with open_chat(places["gguf"], threads=1) as model:
        pieces = model.ask("import os", Settings(max_tokens=40))
        first = next(pieces)
        pieces.close()
        assert model.answer is not None and model.answer.ending == "stopped" and model.answer.tokens >= 1
        assert model._turns[-1]["content"] == first


def test_a_runtime_that_dies_is_told(places: dict[str, Path]) -> None:
    with open_chat(places["gguf"], threads=1) as model:
        model._process._process.kill()
        with pytest.raises(RuntimeCrashError, match="SIGKILL"):
            list(model.ask("import os", SHORT))


def test_plain_onnxruntime_where_genai_is_missing(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime_genai.py").write_text("raise ImportError('not for this machine')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with open_chat(places["onnx"], threads=1) as model:
        assert model.runtime.startswith("onnxruntime 1")
        assert "onnxruntime-genai is not installed" in model.note and "runs it" in model.note
        assert "".join(model.ask("import os", SHORT))


@pytest.mark.slow
def test_the_command_with_a_prompt(places: dict[str, Path], run: Run) -> None:
    asked = ("--prompt", "import os", "--max-tokens", 12, "--threads", 1)
    shown = run("chat", places["gguf"], *asked)
    assert shown.code == 0, shown.err
    said = " ".join(shown.err.split())
    assert "12 tokens, " in said and "tokens/s" in said and "128 tokens of context" in said
    as_json = run("chat", places["gguf"], places["model"], *asked, "--json")
    assert as_json.code == 0, as_json.err
    answers = json.loads(as_json.out)["answers"]
    assert [answer["runtime"].split()[0] for answer in answers] == ["llama.cpp", "PyTorch"]
    assert shown.out == answers[0]["text"] + "\n"
    assert answers[0]["planned_bytes"] is not None and answers[1]["planned_bytes"] is None
    both = run("chat", places["gguf"], places["onnx"], *asked, "--quiet")
    assert both.err == ""
    assert f"{places['gguf']}:" in both.out.replace("\n", "") and f"{places['onnx']}:" in both.out.replace("\n", "")


@pytest.mark.slow
def test_a_piped_prompt(places: dict[str, Path], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\n"))
    piped = run("chat", places["gguf"], "--max-tokens", 8, "--threads", 1)
    assert piped.code == 0, piped.err
    named = run("chat", places["gguf"], "--prompt", "import os", "--max-tokens", 8, "--threads", 1)
    assert piped.out == named.out
    drawn = [
        run("chat", places["gguf"], "--prompt", "import os", "--temperature", 2, "--seed", seed, "--threads", 1).out
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_cannot_be_talked_to(places: dict[str, Path], run: Run, tmp_path: Path) -> None:
    for arguments, code, says in (
        ((places["plain"], "--system", "be brief", "--prompt", "x"), 2, "no chat template"),
        ((places["gguf"], "--prompt", ""), 2, "nothing to ask"),
        ((places["gguf"], "--prompt", "x = 1\n" * 200), 2, "the context is 128"),
        ((tmp_path, "--prompt", "x"), 3, "neither an export nor a model"),
    ):
        shown = run("chat", *arguments)
        assert shown.code == code, shown.err
        assert says in " ".join(shown.err.split())
    damaged = shutil.copytree(places["gguf"], tmp_path / "damaged")
    content = (damaged / "model.gguf").read_bytes()
    (damaged / "model.gguf").write_bytes(content[: len(content) // 2])
    assert run("chat", damaged, "--prompt", "x").code in (3, 6)


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from acip_export.cli import output

    output.stream("a\x1b[2Jb\tc\nd\x07\x9b31m")
    assert capsys.readouterr().out == "a[2Jb\tc\nd31m"


# The terminal becomes the program's own in the new process: between fork and exec no Python may run.
_ON_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "acip_export", *sys.argv[1:]])
"""


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ON_A_TERMINAL, *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
        )
        os.close(slave)
        self.master, self.seen = master, ""

    def wait_for(self, text: str, again: str = "") -> str:
        """Read until ``text`` is there; returns what came before it, and goes on after it.

        ``again`` is typed whenever nothing comes for ten seconds: a Ctrl-C between Python's prompt and its waiting for
        keys is not noticed before the next key.
        """
        deadline = time.monotonic() + 120
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if not select.select([self.master], [], [], 10)[0]:
                self.type(again)
                continue
            try:
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
            except OSError:  # the other end is closed
                assert text in self.seen, self.seen
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self, again: signal.Signals | None = None) -> int:
        """Wait for the end; a signal ``again`` is sent every ten seconds, as :meth:`wait_for` types."""
        for _ in range(12):
            try:
                code = self.process.wait(10)
            except subprocess.TimeoutExpired:
                if again is not None:
                    self.process.send_signal(again)
            else:
                os.close(self.master)
                return code
        self.process.kill()
        self.process.wait()
        raise AssertionError(f"it did not end; it said {self.seen!r}")


@pytest.mark.skipif(os.name == "nt", reason="terminals of another kind")
def test_a_terminal(places: dict[str, Path]) -> None:
    """Ctrl-C stops an answer and nothing else; Ctrl-D ends with success."""
    terminal = Terminal("chat", places["gguf"], "--threads", 1, "--max-tokens", 30)
    terminal.wait_for("Ctrl-D ends")
    terminal.wait_for("> ")
    terminal.type("import os\n")
    terminal.wait_for("tokens/s")
    terminal.wait_for("> ")
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D ends", again="\x03")
    terminal.wait_for("> ")
    terminal.type("x = 1 " * 100 + "\n")
    terminal.wait_for("the context is 128")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.skipif(os.name == "nt", reason="terminals of another kind")
def test_a_conversation_is_ended_from_outside(places: dict[str, Path]) -> None:
    """By whatever stops processes: not every request to end is a Ctrl-C that stops an answer."""
    terminal = Terminal("chat", places["gguf"], "--threads", 1)
    terminal.wait_for("> ")
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.end(again=signal.SIGTERM) == 130


def test_ctrl_c_while_a_piece_is_waited_for(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reply, which comes afterwards, is not taken for that to the next request."""
    with open_chat(places["gguf"], threads=1) as model:
        read, waited = model._process._read, []

        def interrupted(kind: Any) -> Any:
            waited.append(kind)
            if len(waited) == 2:
                raise KeyboardInterrupt
            return read(kind)

        monkeypatch.setattr(model._process, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(model.ask("import os", Settings(max_tokens=40)))
        assert model.answer is not None and model.answer.ending == "stopped"
        with pytest.raises(UsageError, match="the context is 128"):
            model.forget()
            list(model.ask("x = 1\n" * 200, Settings(max_tokens=4)))


def test_ctrl_c_stops_an_answer(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from acip_export.cli import chat as command

    with open_chat(places["gguf"], threads=1) as model, command._interruptible():

        def interrupt(_text: str) -> None:
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr("acip_export.cli.chat.console.stream", interrupt)
        with pytest.raises(KeyboardInterrupt):
            command._answers([model], "import os", Settings(max_tokens=40))
        assert model.answer is not None and model.answer.ending == "stopped"
