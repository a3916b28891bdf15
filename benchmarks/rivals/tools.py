"""The other tools: what each is called, what it is run with, and the environment of its own that it is installed in."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from acip_export.io.atomic import user_cache

HERE = Path(__file__).parent
HOME = user_cache() / "rivals"

PRESETS = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS",
    "IQ2_XXS",
)  # fmt: skip
BUILDER = {
    "int4 default": (),
    "int4 rtn": ("algo_config=rtn",),
    "int4 k_quant": ("algo_config=k_quant",),
    "int4 k_quant, asymmetric": ("algo_config=k_quant", "is_symmetric=false"),
    "int4 default, blocks of 128": ("block_size=128",),
    "int4 k_quant_last": ("algo_config=k_quant_last",),
    "int4 k_quant_mixed": ("algo_config=k_quant_mixed",),
    "int4 default, float activations": ("accuracy_level=1",),
    "int8 default": (),
}
# Each in an environment of its own; torch is the version of constraints.txt, so that pip's cache has it.
ENVIRONMENTS = {
    "auto-round": ("torch==2.13.0", "auto-round==0.16.1", "gguf", "sentencepiece"),
    # This Olive patches a module that later model builders do not have, and needs requests without saying so.
    "olive": (
        *("torch==2.13.0", "olive-ai==0.13.0", "onnxruntime", "onnxruntime-genai==0.14.1"),
        *("transformers", "datasets", "requests"),
    ),
}


class NotInstalledError(Exception):
    """A tool that cannot be installed here; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """What every tool starts from.

    Attributes:
        model: a Hugging Face directory. source: the same as a bf16 GGUF. imatrix: its importance matrix.
        calibration: text for tools that calibrate.
    """

    model: Path
    source: Path
    imatrix: Path
    calibration: Path


@dataclass(frozen=True)
class Rival:
    """One file of another tool.

    Attributes:
        tool: with ``name``, what the tables call it. arguments: of the program that writes it into a directory.
        environment: a key of :data:`ENVIRONMENTS`; empty: this one.
    """

    format: str
    tool: str
    name: str
    arguments: tuple[str, ...]
    environment: str = ""

    def command(self, inputs: Inputs, out: Path) -> list[str]:
        """The command that writes the directory ``out``.

        Raises:
            NotInstalledError: the tool's environment cannot be made.
        """
        names = {"model": inputs.model, "source": inputs.source, "imatrix": inputs.imatrix, "text": inputs.calibration}
        words = [word.format(out=out, scratch=out.with_suffix(".scratch"), **names) for word in self.arguments]
        return [str(environment(self.environment) if self.environment else sys.executable), *words]


def rivals() -> Iterator[Rival]:
    """Every file that is asked for, in the order of the tables."""
    words: tuple[str, ...]
    for preset in PRESETS:
        words = ("-m", "benchmarks.llama_steps", "preset", "{source}", "{out}/model.gguf", "{imatrix}", preset)
        yield Rival("gguf", "llama-quantize", preset, words)
    for name, scheme, settings in (
        ("Q4_K_M, iters 0", "gguf:q4_k_m", ("0", "128")),
        ("Q4_0, iters 0", "gguf:q4_0", ("0", "128")),
        ("Q3_K_M, iters 0", "gguf:q3_k_m", ("0", "128")),
        ("Q2_K_S, iters 0", "gguf:q2_k_s", ("0", "128")),
        ("Q4_0, iters 50", "gguf:q4_0", ("50", "64")),
        ("Q4_K_M, iters 50", "gguf:q4_k_m", ("50", "64")),
    ):
        words = (str(HERE / "auto_round_gguf.py"), "{model}", "{text}", "{out}", scheme, *settings)
        yield Rival("gguf", "AutoRound", name, words, "auto-round")
    for name, options in BUILDER.items():
        words = ("-m", "onnxruntime_genai.models.builder", "-i", "{model}", "-o", "{out}", "-c", "{scratch}")
        words += ("-p", name.partition(" ")[0], "-e", "cpu")
        yield Rival("onnx", "genai builder", name, words + (("--extra_options", *options) if options else ()))
    for group in ("32", "128"):
        words = (str(HERE / "olive_gptq.py"), "{model}", "{text}", "{out}", group)
        yield Rival("onnx", "Olive", f"GPTQ int4, blocks of {group}", words, "olive")


def environment(name: str) -> Path:
    """The Python of a tool's environment, made when it is first asked for."""
    directory, requirements = HOME / name, ENVIRONMENTS[name]
    stamp, python = directory / "installed.txt", directory / "bin" / "python"
    wanted = "\n".join(requirements)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    venv.create(directory, with_pip=True, clear=directory.exists())
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotInstalledError(f"pip install {' '.join(requirements)}: {last_line(done.stderr)}")
    stamp.write_text(wanted)
    return python


def last_line(text: str) -> str:
    """What a failed program said last, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
