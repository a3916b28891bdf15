"""The commands of each layout, and that each program gets what the plan promises its memory for."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from acip_export.artifacts.plan import Plan
from acip_export.model.chat_template import ChatTemplate
from converters.gguf.ollama import ollama_template
from converters.gguf.run_commands import run_commands, server
from tests.gguf import modelfile
from tests.gguf.llama_options import unknown_options
from tests.support import CHATML, dense, make_plan

DIRECTORY = Path("my export")


@pytest.fixture
def plan(models: dict[str, Path]) -> Plan:
    made = make_plan(models["llama"], "gguf", "stock", dense(type="q8_0"), context=128, prompt_batch=16)
    return dataclasses.replace(made, files={"model.gguf": 1})


def with_layout(plan: Plan, layout: str) -> Plan:
    files = {"model.gguf": 1} | ({"adapter.gguf": 1} if layout == "lora" else {})
    return dataclasses.replace(plan, layout=layout, files=files)


def texts(plan: Plan, directory: Path = DIRECTORY, template: str | None = None) -> dict[str, str]:
    return {command.program: command.text for command in run_commands(plan, directory, template)}


def test_every_program_runs_the_stock_layouts_and_only_extended_ones_run_pairs(plan: Plan) -> None:
    stock = ["llama-server", "llama-cli", "llama-cpp-python", "node-llama-cpp", "Ollama"]
    assert list(texts(plan)) == stock
    assert list(texts(with_layout(plan, "lora"))) == stock
    factored = run_commands(with_layout(plan, "factored"), DIRECTORY)
    assert [command.program for command in factored] == stock[:3]
    assert all("extension" in command.note or "make llama-cpp" in command.note for command in factored)


def test_llama_server_gets_the_plans_memory_settings(plan: Plan) -> None:
    words = shlex.split(texts(plan)["llama-server"])
    assert words[:3] == ["llama-server", "-m", "my export/model.gguf"]
    options = dict(pairwise(words))
    assert options["-c"] == "128"
    assert options["-b"] == options["-ub"] == "16"
    assert options["--cache-type-k"] == options["--cache-type-v"] == "f16"
    assert "--no-repack" in words
    assert "--lora" not in words
    # What it keeps beside the plan otherwise: 8 GiB of earlier conversations, states of windowed layers.
    assert options["--cache-ram"] == options["--ctx-checkpoints"] == options["--gpu-layers"] == "0"


def test_keys_and_values_have_types_of_their_own(plan: Plan) -> None:
    serving = dataclasses.replace(plan.serving, cache_type_k="q8_0", cache_type_v="iq4_nl")
    found = texts(dataclasses.replace(plan, serving=serving))
    for program in ("llama-server", "llama-cli"):
        options = dict(pairwise(shlex.split(found[program])))
        assert (options["--cache-type-k"], options["--cache-type-v"], options["-fa"]) == ("q8_0", "iq4_nl", "on")
    assert "type_k=8, type_v=20, flash_attn=True,  # q8_0 (K), iq4_nl (V)" in found["llama-cpp-python"]
    assert 'KeyType: "Q8_0", experimentalKvCacheValueType: "IQ4_NL"' in found["node-llama-cpp"]
    assert "Ollama" not in found  # it has one type for both


def test_llama_cpp_knows_every_option(plan: Plan) -> None:
    assert unknown_options(["--cache-rams", "--cache-ram"]) == ["--cache-rams"]
    encoder = dataclasses.replace(plan, task="embedding")
    for text in (texts(with_layout(plan, "lora"))["llama-server"], texts(plan)["llama-cli"], *texts(encoder).values()):
        assert unknown_options(shlex.split(text)) == []


def test_what_is_switched_off_is_on_by_default() -> None:
    import xllamacpp

    defaults = xllamacpp.CommonParams()
    assert defaults.cache_ram_mib > 0 and defaults.n_ctx_checkpoints > 0 and defaults.n_gpu_layers != 0
    assert not defaults.no_extra_bufts


def test_llama_cpp_python_knows_every_argument(plan: Plan) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    for template in (None, CHATML):
        calls = [
            n
            for n in ast.walk(ast.parse(texts(plan, template=template)["llama-cpp-python"]))
            if isinstance(n, ast.Call)
        ]
        for name, function in (
            ("Llama", llama_cpp.Llama.__init__),
            ("create_chat_completion", llama_cpp.Llama.create_chat_completion),
        ):
            used = {
                k.arg for c in calls if getattr(c.func, "attr", getattr(c.func, "id", "")) == name for k in c.keywords
            }
            assert used <= set(inspect.signature(function).parameters)


def test_a_template_makes_every_program_chat(plan: Plan) -> None:
    plain, chats = texts(plan), texts(plan, template=CHATML)
    assert "create_chat_completion" in chats["llama-cpp-python"] and "create_chat" not in plain["llama-cpp-python"]
    assert "LlamaChatSession" in chats["node-llama-cpp"] and "LlamaCompletion" in plain["node-llama-cpp"]
    assert plain["llama-server"] == chats["llama-server"]  # it reads the template from the file
    instructions = dict(modelfile.parse(chats["Ollama"]))
    assert "<|im_start|>user\n" in instructions["template"]
    assert "template" not in dict(modelfile.parse(plain["Ollama"]))
    compile(chats["llama-cpp-python"], "snippet", "exec")


SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The question's number is in the text: nothing that repeats can write it.
COUNTING = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}"


def _go(template: str, messages: list[dict[str, str]]) -> str:
    """Run the few constructs of Go's text/template that ours use."""
    system = " ".join(m["content"] for m in messages if m["role"] == "system")
    head, _, body = template.partition("{{ range $index, $_ := .Messages }}")
    found = re.fullmatch(r"\{\{ if \.System }}(.*?)\{\{ else }}(.*?)\{\{ end }}", head, re.DOTALL)
    if found is not None:
        head = found[1].replace("{{ .System }}", system) if system else found[2]
    parts = (
        '{{ $last := eq (len (slice $.Messages $index)) 1 }}{{ if eq .Role "user" }}{{ .Content }}',
        '{{ else if eq .Role "assistant" }}{{ .Content }}{{ if not $last }}',
        "{{ end }}{{ end }}{{ end }}",
    )
    each = re.fullmatch("(.*?)".join(map(re.escape, parts)), body, re.DOTALL)
    assert each is not None
    text = head
    for index, message in enumerate(messages):
        if message["role"] == "user":
            text += message["content"] + each[1]
        elif message["role"] == "assistant":
            text += message["content"] + ("" if index == len(messages) - 1 else each[2])
    return text


@pytest.mark.parametrize("template", [CHATML, SMOLLM, GEMMA], ids=["chatml", "smollm", "gemma"])
def test_ollama_writes_conversations_as_the_template_does(template: str) -> None:
    go = ollama_template(template)
    assert go is not None
    chat = ChatTemplate(template)
    said = [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "e"),
        ("assistant", "f"),
        ("user", "g"),
    ]
    messages = [{"role": role, "content": text} for role, text in said]
    assert _go(go, messages) == chat.render(messages)
    assert _go(go, messages[:2]) == chat.render(messages[:2], answer=False).rsplit("b", 1)[0] + "b"  # to be continued
    if template != GEMMA:
        with_system = [{"role": "system", "content": "be brief"}, *messages]
        assert _go(go, with_system) == chat.render(with_system)


@pytest.mark.parametrize(
    "template", [COUNTING, "{{ messages | length }}", "{{ raise_exception('never') }}", "{% if %}"]
)
def test_a_template_that_ollama_cannot_have_is_left_out(template: str) -> None:
    assert ollama_template(template) is None


def test_a_server_is_told_what_is_printed(plan: Plan) -> None:
    assert list(server(plan, DIRECTORY, "/opt/llama-server"))[1:] == shlex.split(texts(plan)["llama-server"])[1:]


def test_the_adapter_is_named_to_every_program(plan: Plan) -> None:
    for text in texts(with_layout(plan, "lora")).values():
        assert "adapter.gguf" in text
    assert "ADAPTER ./my export/adapter.gguf" in texts(with_layout(plan, "lora"))["Ollama"].splitlines()
    for text in texts(plan).values():
        assert "adapter.gguf" not in text


def test_code_survives_any_path(plan: Plan) -> None:
    found = {c.program: c.text for c in run_commands(plan, Path('it\'s "here"'))}
    compile(found["llama-cpp-python"], "snippet", "exec")
    literal = re.search(r"modelPath: (.*)}\)", found["node-llama-cpp"])
    assert literal is not None
    assert json.loads(literal[1]) == 'it\'s "here"/model.gguf'


@pytest.mark.parametrize("directory", ["my export", "/srv/models", 'it\'s "here"', '"quoted"', "# no comment", "~me"])
def test_ollama_reads_its_modelfile(plan: Plan, directory: str) -> None:
    for layout in ("stock", "lora"):
        text = texts(with_layout(plan, layout), Path(directory))["Ollama"]
        instructions = modelfile.parse(text)
        names = [name for name, _ in instructions]
        assert names == ["from"] + ["adapter"] * (layout == "lora") + ["parameter"] * 3
        for name, value in instructions:
            if name != "parameter":
                # Absolute, or relative to the Modelfile: anything else is the name of a model.
                assert value.startswith(("/", "./"))
                assert Path(value).parent == Path(directory)
        assert modelfile.parameters(text) == {"num_ctx": 128, "num_batch": 16, "num_gpu": 0}
        template = f'{text}\nTEMPLATE """{{{{ .System }}}}\nUSER: {{{{ .Prompt }}}}\n# kept\n"""\n# a comment\n'
        assert modelfile.parse(template) == [
            *instructions,
            ("template", "{{ .System }}\nUSER: {{ .Prompt }}\n# kept\n"),
        ]


@pytest.mark.parametrize(
    "text", ["PARAMETER num_ctx 1", "FROM", "FORM ./x.gguf", 'FROM x\nTEMPLATE """open', 'FROM "open', "./x.gguf"]
)
def test_what_is_no_modelfile(text: str) -> None:
    with pytest.raises(ValueError, match=r"no |not closed"):
        modelfile.parse(text)
