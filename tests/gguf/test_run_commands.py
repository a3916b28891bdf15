"""The commands of each layout, and that each program gets what the plan promises its memory for."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from acip_export.artifacts.plan import Plan
from converters.gguf.run_commands import run_commands
from tests.gguf import modelfile
from tests.support import dense, make_plan

DIRECTORY = Path("my export")


@pytest.fixture
def plan(models: dict[str, Path]) -> Plan:
    made = make_plan(models["llama"], "gguf", "stock", dense(type="q8_0"), context=128, prompt_batch=16)
    return dataclasses.replace(made, files={"model.gguf": 1})


def with_layout(plan: Plan, layout: str) -> Plan:
    files = {"model.gguf": 1} | ({"adapter.gguf": 1} if layout == "lora" else {})
    return dataclasses.replace(plan, layout=layout, files=files)


def texts(plan: Plan, directory: Path = DIRECTORY) -> dict[str, str]:
    return {command.program: command.text for command in run_commands(plan, directory)}


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
    options = dict(zip(words[1::2], words[2::2], strict=False))
    assert options["-c"] == "128"
    assert options["-b"] == options["-ub"] == "16"
    assert options["--cache-type-k"] == options["--cache-type-v"] == "f16"
    assert "--no-repack" in words
    assert "--lora" not in words


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
        assert names == ["from"] + ["adapter"] * (layout == "lora") + ["parameter"] * 2
        for name, value in instructions:
            if name != "parameter":
                # Absolute, or relative to the Modelfile: anything else is the name of a model.
                assert value.startswith(("/", "./"))
                assert Path(value).parent == Path(directory)
        assert modelfile.parameters(text) == {"num_ctx": 128, "num_batch": 16}
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
