"""Write down how each program runs a GGUF export within its plan's memory: one row per program, ready to copy."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from acip_export.artifacts.plan import Plan, cache_types
from acip_export.formats.protocol import EXAMPLE_QUESTION, RunCommand
from converters.gguf.arrange import ADAPTER_FILE, MODEL_FILE, model_files
from converters.gguf.ollama import ollama_template
from converters.gguf.types import TYPE_IDS

_STOCK = ("stock", "lora")
_EXTENDED = (*_STOCK, "factored")


@dataclass(frozen=True)
class _Export:
    """What every program needs to know of an export.

    Attributes:
        parts: the model's files; most programs are given the first.
        adapter: the adapter's file; ``None`` if there is none.
        context: tokens of a conversation.
        batch: tokens of a prompt that are computed together.
        cache_type_k: type of the cached keys.
        cache_type_v: type of the cached values.
        template: the template of chats; ``None`` if the model only continues text.
    """

    parts: tuple[Path, ...]
    adapter: Path | None
    context: int
    batch: int
    cache_type_k: str
    cache_type_v: str
    template: str | None = None

    @property
    def model(self) -> Path:
        return self.parts[0]


@dataclass(frozen=True)
class _Program:
    """A program that runs exports.

    Attributes:
        name: what people call it.
        language: the language of the text, as Markdown's fences name it.
        layouts: the layouts that it runs.
        text: writes the command or the code.
        note: a sentence on what else it needs.
        factored_note: stands in place of ``note`` for the layout of factor pairs.
        split_note: is added for a model in several files.
        cache_types: the types that it can keep the cache in, the same for keys and values; ``None`` if it takes any
            pair that llama.cpp has.
    """

    name: str
    language: str
    layouts: tuple[str, ...]
    text: Callable[[_Export], str]
    note: str = ""
    factored_note: str = ""
    split_note: str = ""
    cache_types: frozenset[str] | None = None

    def runs(self, plan: Plan) -> bool:
        """Tell whether it runs the plan's layout with the plan's cache."""
        types = {plan.serving.cache_type_k, plan.serving.cache_type_v}
        one_of_its = self.cache_types is None or (len(types) == 1 and types <= self.cache_types)
        return plan.layout in self.layouts and one_of_its


def run_commands(plan: Plan, directory: Path, template: str | None = None) -> tuple[RunCommand, ...]:
    """Return how to run an export, for every program that can; the recommended one first.

    Args:
        plan: the export's plan.
        directory: where the export is.
        template: the template of chats, if the model has one.
    """
    if plan.task != "causal":
        return (RunCommand("llama-server", "console", shlex.join(server(plan, directory)), "POST /v1/embeddings"),)
    export = _export(plan, directory, template)
    return tuple(
        RunCommand(program.name, program.language, program.text(export), _note(program, plan.layout, len(export.parts)))
        for program in _PROGRAMS
        if program.runs(plan)
    )


def server(plan: Plan, directory: Path, program: str = "llama-server") -> tuple[str, ...]:
    """Return the command that starts llama.cpp's server with the plan's settings; it takes all layouts."""
    export = _export(plan, directory)
    if plan.task == "causal":
        return (program, *_options(export), "-np", "1")
    # The file says how to pool; a text has to fit into one batch.
    batch = str(export.batch)
    options = ("-m", str(export.model), "-c", batch, "-b", batch, "-ub", batch)
    return (program, "--embedding", *options, "--no-repack", "--gpu-layers", "0", "-np", "1")


def _export(plan: Plan, directory: Path, template: str | None = None) -> _Export:
    parts = tuple(directory / name for name in model_files(plan.files) or (MODEL_FILE,))
    adapter = directory / ADAPTER_FILE if ADAPTER_FILE in plan.files else None
    serving = plan.serving
    cache = serving.cache_type_k, serving.cache_type_v
    return _Export(parts, adapter, serving.context, serving.prompt_batch, *cache, template)


def _note(program: _Program, layout: str, parts: int) -> str:
    notes = [program.factored_note if layout == "factored" else program.note]
    if parts > 1:
        notes.append(program.split_note)
    return ". ".join(note for note in notes if note)


def _options(export: _Export) -> list[str]:
    options = ["-m", str(export.model)]
    if export.adapter is not None:
        options += ["--lora", str(export.adapter)]
    options += ["-c", str(export.context), "-b", str(export.batch), "-ub", str(export.batch)]
    options += ["--cache-type-k", export.cache_type_k, "--cache-type-v", export.cache_type_v, "-fa", "on"]
    # No repacked copy of the weights; no copies of earlier conversations (8 GiB of them by default); the plan's memory
    # is the processor's.
    return [*options, "--no-repack", "--cache-ram", "0", "--ctx-checkpoints", "0", "--gpu-layers", "0"]


def _llama_server(export: _Export) -> str:
    # One slot, since every slot has its own share of the context.
    return shlex.join(["llama-server", *_options(export), "-np", "1"])


def _llama_cli(export: _Export) -> str:
    return shlex.join(["llama-cli", *_options(export)])


def _llama_cpp_python(export: _Export) -> str:
    lora = "" if export.adapter is None else f"    lora_path={str(export.adapter)!r},\n"
    keys, values = export.cache_type_k, export.cache_type_v
    opened = (
        "from llama_cpp import Llama\n\n"
        "model = Llama(\n"
        f"    {str(export.model)!r},\n{lora}"
        f"    n_ctx={export.context}, n_batch={export.batch}, n_ubatch={export.batch}, n_gpu_layers=0,\n"
        f"    type_k={TYPE_IDS[keys]}, type_v={TYPE_IDS[values]}, flash_attn=True,  # {cache_types(keys, values)}\n"
        "    verbose=False,\n"
        ")\n"
    )
    if export.template is None:
        return opened + "print(model('Hello', max_tokens=32)['choices'][0]['text'])"
    return opened + (
        f"messages = [{{'role': 'user', 'content': {EXAMPLE_QUESTION!r}}}]\n"
        "for part in model.create_chat_completion(messages, max_tokens=256, stream=True):\n"
        "    print(part['choices'][0]['delta'].get('content', ''), end='', flush=True)"
    )


def _node_llama_cpp(export: _Export) -> str:
    chats = export.template is not None
    lora = "" if export.adapter is None else f"  lora: {_javascript(export.adapter)},\n"
    keys, values = (name.upper() for name in (export.cache_type_k, export.cache_type_v))
    opened = (
        f'import {{getLlama, {"LlamaChatSession" if chats else "LlamaCompletion"}}} from "node-llama-cpp";\n\n'
        "const llama = await getLlama({gpu: false});\n"
        f"const model = await llama.loadModel({{modelPath: {_javascript(export.model)}}});\n"
        "const context = await model.createContext({\n"
        f"  contextSize: {export.context}, batchSize: {export.batch}, flashAttention: true,\n{lora}"
        f'  experimentalKvCacheKeyType: "{keys}", experimentalKvCacheValueType: "{values}"\n'
        "});\n"
    )
    if not chats:
        return opened + (
            "const completion = new LlamaCompletion({contextSequence: context.getSequence()});\n"
            'console.log(await completion.generateCompletion("Hello", {maxTokens: 32}));'
        )
    return opened + (
        "const session = new LlamaChatSession({contextSequence: context.getSequence()});\n"
        "session.setChatHistory([]);  // no system prompt but the template's\n"
        f"await session.prompt({_javascript(EXAMPLE_QUESTION)}, {{\n"
        "  maxTokens: 256, onTextChunk: (text) => process.stdout.write(text)\n"
        "});\n"
        "await llama.dispose();"
    )


def _javascript(text: object) -> str:
    return json.dumps(str(text))  # JSON's strings are JavaScript's


def _modelfile(path: Path) -> str:
    """Write a path so that Ollama cannot take it for the name of a model."""
    return str(path) if path.is_absolute() else f"./{path}"


def _ollama(export: _Export) -> str:
    lines = [f"FROM {_modelfile(part)}" for part in export.parts]
    if export.adapter is not None:
        lines.append(f"ADAPTER {_modelfile(export.adapter)}")
    lines += [f"PARAMETER num_ctx {export.context}", f"PARAMETER num_batch {export.batch}", "PARAMETER num_gpu 0"]
    template = None if export.template is None else ollama_template(export.template)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    return "\n".join(lines)


_BUILD = "Needs a llama.cpp that was built after  python -m converters.gguf.llama_cpp.extension PATH"
# Which of the printed flags a reader may want to change, and when.
_MORE = (
    "Earlier conversations in memory:  --cache-ram MIB  in place of 0, beside the budget. A graphics card: without  "
    "--gpu-layers 0"
)
_PROGRAMS = (
    _Program("llama-server", "console", _EXTENDED, _llama_server, note=_MORE, factored_note=_BUILD),
    _Program("llama-cli", "console", _EXTENDED, _llama_cli, factored_note=_BUILD),
    _Program(
        "llama-cpp-python",
        "python",
        _EXTENDED,
        _llama_cpp_python,
        note="It repacks some types for speed, which the planned memory does not count",
        factored_note="Needs the build that  make llama-cpp  installs",
    ),
    _Program("node-llama-cpp", "javascript", _STOCK, _node_llama_cpp),
    _Program(
        "Ollama",
        "dockerfile",
        _STOCK,
        _ollama,
        note="Save as Modelfile, here: its paths are relative to it. Then  ollama create NAME -f Modelfile.  The rest "
        "is the server's: OLLAMA_FLASH_ATTENTION=1, OLLAMA_KV_CACHE_TYPE for the type of the KV cache, and "
        "LLAMA_ARG_CACHE_RAM=0 against copies of earlier conversations",
        cache_types=frozenset(("f16", "q8_0", "q4_0")),
        split_note="A model in several files needs Ollama 0.30 or later",
    ),
)
