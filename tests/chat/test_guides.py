"""What guides tell people to type is what the tool prints and the installed runtimes take."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from acip_export.artifacts.plan import Plan, Serving, load_plan
from acip_export.formats.registry import export_format
from converters.gguf.run_commands import run_commands
from tests.gguf.llama_options import unknown_options

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    file.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "docs/guides/*.md", "samples/**/*.md")
    for file in ROOT.glob(pattern)
    if "node_modules" not in file.parts and file.name not in ("LOG.md", "CHANGELOG.md")
)
_BLOCK = re.compile(r"^```(?:console|ini|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _lines(page: str) -> list[list[str]]:
    """The words of every llama-server and llama-cli in code blocks, from the program's name on."""
    found = []
    for block in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:
                continue
            starts = [i for i, word in enumerate(words) if re.search(r"(^|[/=])llama-(server|cli)$", word)]
            found += [words[start:] for start in starts]
    return found


def test_there_are_command_lines() -> None:
    assert sum(len(_lines(page)) for page in PAGES) >= 3


@pytest.fixture(scope="module")
def plan(places: dict[str, Path]) -> Plan:
    return load_plan(places["gguf"] / "plan.json")


@pytest.mark.parametrize("page", [page for page in PAGES if _lines(page)])
def test_command_lines_are_those_that_are_printed(page: str, plan: Plan) -> None:
    """To the word, for a plan with the settings in them."""
    for words in _lines(page):
        assert unknown_options(words) == []
        options = dict(pairwise([*words, ""]))
        if "-m" not in options:
            continue
        cache = options["--cache-type-k"], options["--cache-type-v"]
        serving = Serving(int(options["-c"]), cache[0], int(options["-b"]), cache_type_v=cache[1])
        model, name = Path(options["-m"]), Path(words[0].rpartition("=")[2]).name
        made = {each.program: each.text for each in run_commands(replace(plan, serving=serving), model.parent)}
        assert [name, *words[1:]] == shlex.split(made[name])


_CACHE = re.compile(r"""--cache-type-[kv] (\w+)|GGML_TYPE_(\w+)|cache_type_[kv]: "(\w+)\"""")
_FLASH = ("-fa on", "FLASH_ATTN_TYPE_ENABLED")


@pytest.mark.parametrize("page", [page for page in PAGES if "/guides/" in page])
def test_guides_say_whose_types_of_the_cache_they_show(page: str) -> None:
    """The plan's, which no guide knows; and what is shown would run."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for groups in _CACHE.findall(block):
            (type_,) = (name.lower() for name in groups if name)
            assert type_ in export_format("gguf").cache_types
            # Without a word of it the plan may have chosen other types than the default ones.
            assert type_ != "f16" or "--cache-type f16" in text
            assert "memory.md#types-of-the-kv-cache" in text
            assert type_ == "f16" or any(each in block for each in _FLASH)


def test_genai_knows_the_search_options_of_the_guides(places: dict[str, Path]) -> None:
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(places["onnx"]))
    known = onnxruntime_genai.GeneratorParams(model).get_search_options()
    named = {
        name for page in PAGES for name in re.findall(r'setSearchOption\("(\w+)"', (ROOT / page).read_text("utf-8"))
    }
    assert named and named <= set(known)


def test_genai_writes_questions_as_the_android_guide_does(places: dict[str, Path]) -> None:
    """Its own template engine, with the export's own template; so does ours."""
    import onnxruntime_genai

    tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(places["onnx"])))
    wanted = tokenizer.apply_chat_template('[{"role": "user", "content": "QUESTION"}]')
    guide = (ROOT / "docs/guides/android.md").read_text(encoding="utf-8")
    line = re.search(r"String prompt = (.*);$", guide, re.MULTILINE)
    assert line is not None
    assert "".join(part.strip('" ') for part in line[1].replace("question", "QUESTION").split("+")) == wanted.replace(
        "\n", "\\n"
    )
