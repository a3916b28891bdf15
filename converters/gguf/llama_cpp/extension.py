"""Teaches a llama.cpp checkout to run factor pairs (docs/format.md).

Run it as ``python -m converters.gguf.llama_cpp.extension PATH``.

``PATH`` is a checkout of llama.cpp, or an unpacked source package of llama-cpp-python. Our additions are insertions
only, each at a place named by two of llama.cpp's lines: where its function or struct begins, and the line next to
which it belongs. A place that is missing, or found more than once where that matters, stops everything before the
first file is written.

What the additions do: where ``NAME.weight`` is absent and ``NAME.weight.lora_a`` is there, the loader creates both
factors and remembers which belongs to which; the one function that multiplies by a weight multiplies by the second
factor as well; a LoRA for ``NAME.weight`` finds the pair. docs/upstream.md explains each.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from acip_export.errors import AcipError, ExtensionError
from acip_export.io.atomic import new_file


@dataclass(frozen=True)
class Addition:
    """Lines to insert into one file of llama.cpp.

    Attributes:
        file: path below the checkout. scope: the line that begins the function or struct; it occurs once in the file.
        anchor: the first line after ``scope`` that reads so. before: insert above the anchor instead of below.
        lines: what is inserted, as it will stand there.
    """

    file: str
    scope: str
    anchor: str
    lines: str
    before: bool = False


_MAP = "std::unordered_map<const ggml_tensor *, ggml_tensor *>"

ADDITIONS: tuple[Addition, ...] = (
    Addition(
        "src/llama-model.h",
        "struct llama_model {",
        "llama_prec_policy prec_policy;",
        f"""
    // weights stored as two factors: the first (rank rows) -> the second (rank columns)
    {_MAP} factors;
""",
    ),
    Addition(
        "src/llama-model.cpp",
        "ggml_tensor * llama_model_base::create_tensor(llama_model_loader & ml, const LLM_TN_IMPL & tn, "
        "const std::initializer_list<int64_t> & ne, int flags) {",
        "return ml.create_tensor(",
        """
    // a weight that is only multiplied by may be stored as the pair X.lora_a, X.lora_b, with X = lora_b * lora_a
    if (ne.size() == 2 && tn.suffix && strcmp(tn.suffix, "weight") == 0 && !ml.get_tensor_meta(tn.str().c_str()) &&
            llm_tensor_info_for(tn.tensor).op == GGML_OP_MUL_MAT) {
        if (const ggml_tensor * meta = ml.get_tensor_meta((tn.str() + ".lora_a").c_str())) {
            const int64_t n_in = ne.begin()[0], n_out = ne.begin()[1], rank = meta->ne[1];
            if (rank >= n_out) { // a graph that took the first factor for the whole would fail later, or not at all
                throw std::runtime_error(format("%s: rank %d is not below %d", meta->name, (int) rank, (int) n_out));
            }
            const int required = flags & ~llama_model_loader::TENSOR_NOT_REQUIRED;
            ggml_tensor * a = create_tensor(ml, { tn.arch, tn.tensor, "weight.lora_a", tn.bid, tn.xid },
                    { n_in, rank }, required);
            ggml_tensor * b = create_tensor(ml, { tn.arch, tn.tensor, "weight.lora_b", tn.bid, tn.xid },
                    { rank, n_out }, required);
            if (a && b) {
                factors[a] = b;
            }
            return a;
        }
    }
""",
        before=True,
    ),
    Addition(
        "src/llama-graph.h",
        "struct llm_graph_params {",
        "const llama_prec_policy * prec_policy = nullptr;",
        f"    const {_MAP} * factors = nullptr;\n",
    ),
    Addition(
        "src/llama-graph.h",
        "struct llm_graph_context {",
        "const llama_prec_policy * prec_policy;",
        f"    const {_MAP} * factors;\n",
    ),
    Addition(
        "src/llama-context.cpp",
        "llm_graph_params llama_context::graph_params(",
        "/*.prec_policy =*/ &model.prec_policy,",
        "        /*.factors     =*/ &model.factors,\n",
    ),
    Addition(
        "src/llama-graph.cpp",
        "llm_graph_context::llm_graph_context(const llm_graph_params & params) :",
        "prec_policy (params.prec_policy),",
        "    factors          (params.factors),\n",
    ),
    Addition(
        "src/llama-graph.cpp",
        "ggml_tensor * llm_graph_context::build_lora_mm(",
        "if (w_s) {",
        """\
    // w may be the first factor of a pair: so far, res has as many rows as its rank
    if (const auto it = factors->find(w); it != factors->end()) {
        res = ggml_mul_mat(ctx0, it->second, res);
    }

""",
        before=True,
    ),
    Addition(
        "src/llama-adapter.cpp",
        "llama_adapter_lora_weight * llama_adapter_lora::get_weight(ggml_tensor * w) {",
        "return nullptr;",
        """\
    // a LoRA on top of a weight that is stored as two factors: w is the first of them
    if (const size_t end = name.rfind(".lora_a"); end != std::string::npos) {
        const auto whole = ab_map.find(name.substr(0, end));
        return whole != ab_map.end() ? &whole->second : nullptr;
    }

""",
        before=True,
    ),
    Addition(
        "src/llama-adapter.cpp",
        "static void llama_adapter_lora_init_impl(llama_model & model, FILE * file, llama_adapter_lora & adapter) {",
        "if (!model_tensor) {",
        """\
        ggml_tensor product; // of two factors: no such tensor exists, only its shape and place are asked for
        const auto * factor_a = model.get_tensor((name + ".lora_a").c_str());
        if (!model_tensor && factor_a) {
            product = *factor_a;
            product.ne[1] = model.factors.at(factor_a)->ne[1];
            model_tensor = &product;
        }
""",
        before=True,
    ),
)


class Change(Enum):
    """What was done to one file, or would be."""

    ADDED = "added"
    REMOVED = "removed"
    NONE = "unchanged"


def apply_extension(checkout: Path, revert: bool = False, check: bool = False) -> dict[str, Change]:
    """Insert what is missing of :data:`ADDITIONS`, or with ``revert`` remove what is there; twice is the same as once.

    Args:
        checkout: a llama.cpp checkout, or llama-cpp-python's sources with one in ``vendor/llama.cpp``.
        check: change nothing, only find out.

    Returns:
        the change of every file, by path below the llama.cpp checkout.

    Raises:
        ExtensionError: not a llama.cpp checkout, or a place has moved; nothing was written.
    """
    root = _llama_cpp(checkout)
    texts: dict[str, str] = {}
    changes: dict[str, Change] = {}
    for addition in ADDITIONS:
        file = root / addition.file
        if addition.file not in texts:
            texts[addition.file] = _read(file)
            changes[addition.file] = Change.NONE
        lines = texts[addition.file].split("\n")
        ours = addition.lines.removesuffix("\n").split("\n")
        place = _place(lines, addition, file)
        start = place - len(ours) if addition.before else place
        present = lines[start : start + len(ours)] == ours
        if revert and present:
            del lines[start : start + len(ours)]
            changes[addition.file] = Change.REMOVED
        elif not revert and not present:
            lines[place:place] = ours
            changes[addition.file] = Change.ADDED
        texts[addition.file] = "\n".join(lines)
    if not check:
        for name, change in changes.items():
            if change is not Change.NONE:
                with new_file(root / name) as temporary:
                    temporary.write_text(texts[name], encoding="utf-8", newline="")
    return changes


def extension_hash() -> str:
    """Eight hexadecimal digits that change when any addition changes: what a cached build is filed under."""
    return hashlib.sha256(repr([astuple(addition) for addition in ADDITIONS]).encode()).hexdigest()[:8]


def _llama_cpp(checkout: Path) -> Path:
    for root in (checkout, checkout / "vendor" / "llama.cpp"):
        if (root / "src" / "llama-model.cpp").is_file():
            return root
    raise ExtensionError(
        f"{checkout} is no checkout of llama.cpp: src/llama-model.cpp is missing there and in vendor/llama.cpp. "
        "Name the directory that holds llama.cpp's src/, or llama-cpp-python's unpacked source package"
    )


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as reason:
        raise ExtensionError(f"{file} cannot be read: {reason}; this llama.cpp is arranged differently") from reason


def _place(lines: list[str], addition: Addition, file: Path) -> int:
    """Index of the line above which the addition stands or belongs."""
    starts = [index for index, line in enumerate(lines) if _same(line, addition.scope)]
    if len(starts) != 1:
        raise _moved(file, addition, f"the line that begins its scope was found {len(starts)} times, expected once")
    for index in range(starts[0] + 1, len(lines)):
        if _same(lines[index], addition.anchor):
            return index if addition.before else index + 1
        if lines[index].startswith("}"):
            break
    raise _moved(file, addition, "its anchor is not there")


def _same(line: str, wanted: str) -> bool:
    """Equal but for white space, which formatters change."""
    return line.split() == wanted.split()


def _moved(file: Path, addition: Addition, why: str) -> ExtensionError:
    return ExtensionError(
        f"{file}: {why}. Wanted the line\n    {addition.anchor}\nafter the line\n    {addition.scope}\n"
        "Nothing was changed. This llama.cpp differs from the version in constraints.txt: find where the lines went, "
        "and adapt ADDITIONS in converters/gguf/llama_cpp/extension.py"
    )


def main(
    path: Annotated[Path, typer.Argument(help="Checkout of llama.cpp, or unpacked sources of llama-cpp-python.")],
    check: Annotated[bool, typer.Option("--check", help="Change nothing; say what would be done.")] = False,
    revert: Annotated[bool, typer.Option("--revert", help="Take our lines out again.")] = False,
) -> None:
    """Teach a llama.cpp checkout to run factor pairs."""
    try:
        changes = apply_extension(path, revert, check)
    except AcipError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    for name, change in changes.items():
        typer.echo(f"{change.value:10} {name}")


if __name__ == "__main__":
    typer.run(main)
