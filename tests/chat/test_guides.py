"""What guides tell people to type is what the installed runtimes take, and what the plan's memory holds for."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from tests.gguf.llama_options import unknown_options

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    file.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "docs/guides/*.md", "samples/**/*.md")
    for file in ROOT.glob(pattern)
    if "node_modules" not in file.parts and file.name not in ("LOG.md", "CHANGELOG.md")
)
_BLOCK = re.compile(r"^```(?:console|ini)\n(.*?)^```", re.MULTILINE | re.DOTALL)


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


@pytest.mark.parametrize("page", [page for page in PAGES if _lines(page)])
def test_llama_cpp_takes_its_command_lines(page: str) -> None:
    for words in _lines(page):
        assert unknown_options(words) == []
        options = dict(pairwise([*words, ""]))
        if "-m" in options:
            # What is kept beside the plan by default.
            assert options["--cache-ram"] == options["--ctx-checkpoints"] == options["--gpu-layers"] == "0"
            assert "--no-repack" in words and options["-b"] == options["-ub"] and options["-fa"] == "on"
            assert options["--cache-type-k"] == options["--cache-type-v"]
            assert "-np" in words or words[0].endswith("llama-cli")


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
