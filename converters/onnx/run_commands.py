"""How each program runs an ONNX export. Context and prompt batch are in its ``genai_config.json``."""

from __future__ import annotations

import json
from pathlib import Path

from acip_export.artifacts.plan import Plan
from acip_export.formats.protocol import EXAMPLE_QUESTION, RunCommand
from converters.onnx.backends import ROUNDED_CACHES, STATIC_CACHE
from converters.onnx.companion_files import MODEL_FILE

_GROWS = "It computes a prompt in one piece and grows its cache, which the planned memory does not count"
_GLIBC = (
    "A second generator in one process finds a heap with holes: with glibc, start it with  "
    "MALLOC_MMAP_THRESHOLD_=131072, or go on with the first, which forgets with  generator.rewind_to(0),  and append "
    "at most {batch} tokens at once: it makes batches of the first prompt alone"
)


def run_commands(plan: Plan, directory: Path, template: str | None = None) -> tuple[RunCommand, ...]:
    """For every program; the recommended one first."""
    if plan.task != "causal":
        return (RunCommand("onnxruntime", "python", _encoder(directory)),)
    chats = template is not None
    note = _GLIBC.format(batch=plan.serving.prompt_batch)
    programs = [RunCommand("onnxruntime-genai", "python", _genai(directory, plan.serving.context, chats), note)]
    # The others make their cache in the floats that the graph computes with.
    if plan.serving.backend != STATIC_CACHE and plan.serving.cache_type_k not in ROUNDED_CACHES:
        programs += [
            RunCommand("transformers.js", "javascript", _transformers_js(directory, chats), _GROWS),
            RunCommand("optimum", "python", _optimum(directory, chats), f"{_GROWS}. Needs  pip install optimum-onnx"),
        ]
    return tuple(programs)


def _encoder(directory: Path) -> str:
    return "\n".join(
        (
            "import onnxruntime",
            "from transformers import AutoTokenizer",
            f"tokenizer = AutoTokenizer.from_pretrained({str(directory)!r})",
            f"session = onnxruntime.InferenceSession({str(directory / MODEL_FILE)!r})",
            "texts = tokenizer(['Hello', 'A second text'], padding=True, truncation=True, return_tensors='np')",
            "print(session.run([session.get_outputs()[-1].name], dict(texts))[0])",
        )
    )


def _genai(directory: Path, context: int, chats: bool) -> str:
    asked = "'Hello'"
    lines = ["import onnxruntime_genai as og", "", f"model = og.Model({str(directory)!r})"]
    lines += ["tokenizer = og.Tokenizer(model)"]
    # Said either way: what genai does where nothing is said has changed.
    if not chats:
        lines += ["tokenizer.update_options(add_special_tokens='true')  # as transformers does"]
    else:
        asked = "tokenizer.apply_chat_template(json.dumps(messages))"
        special = "tokenizer.update_options(add_special_tokens='false')  # the template writes them"
        messages = f"messages = [{{'role': 'user', 'content': {EXAMPLE_QUESTION!r}}}]"
        lines = ["import json", "", *lines, special, messages]
    return "\n".join(
        (
            *lines,
            "generator = og.Generator(model, og.GeneratorParams(model))",
            f"generator.append_tokens(tokenizer.encode({asked}))",
            "stream = tokenizer.create_stream()",
            f"while not generator.is_done() and generator.token_count() < {context}:",
            "    generator.generate_next_token()",
            "    print(stream.decode(generator.get_next_tokens()[0]), end='', flush=True)",
        )
    )


def _transformers_js(directory: Path, chats: bool) -> str:
    """Models are directories beside each other there, called by their names."""
    place = directory.resolve()
    above, name = (str(place.parent), place.name) if directory.name else ("..", "EXPORT")
    inputs = 'tokenizer("Hello")'
    if chats:
        messages = f'[{{ role: "user", content: {json.dumps(EXAMPLE_QUESTION)} }}]'
        inputs = f"tokenizer.apply_chat_template({messages}, {{ add_generation_prompt: true, return_dict: true }})"
    return "\n".join(
        (
            'import { AutoModelForCausalLM, AutoTokenizer, TextStreamer, env } from "@huggingface/transformers";',
            "",
            f"env.localModelPath = {json.dumps(above)};  // where the directory {name} is",
            "env.allowRemoteModels = false;",
            f"const tokenizer = await AutoTokenizer.from_pretrained({json.dumps(name)});",
            f"const model = await AutoModelForCausalLM.from_pretrained({json.dumps(name)});",
            f"const inputs = {inputs};",
            "const streamer = new TextStreamer(tokenizer, { skip_prompt: true, skip_special_tokens: true });",
            "await model.generate({ ...inputs, max_new_tokens: 128, streamer });",
        )
    )


def _optimum(directory: Path, chats: bool) -> str:
    inputs = "tokenizer('Hello', return_tensors='pt')"
    if chats:
        inputs = (
            "tokenizer.apply_chat_template(\n"
            f"    [{{'role': 'user', 'content': {EXAMPLE_QUESTION!r}}}],\n"
            "    add_generation_prompt=True, return_dict=True, return_tensors='pt',\n"
            ")"
        )
    return "\n".join(
        (
            "from optimum.onnxruntime import ORTModelForCausalLM",
            "from transformers import AutoTokenizer, TextStreamer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({str(directory)!r})",
            "model = ORTModelForCausalLM.from_pretrained(",
            f"    {str(directory)!r}, subfolder='onnx', file_name='model.onnx'",
            ")",
            f"inputs = {inputs}",
            "streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)",
            "model.generate(**inputs, max_new_tokens=128, streamer=streamer)",
        )
    )
