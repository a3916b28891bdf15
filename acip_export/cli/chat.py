"""``acip-export chat``."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from acip_export.artifacts.export_directory import export_of, load_export_plan
from acip_export.chat import Answer, ChatModel, Settings, open_chat
from acip_export.cli import output as console
from acip_export.cli.options import Debug, Json, Quiet
from acip_export.errors import UsageError
from acip_export.units import format_bytes

_ENDINGS = {
    "length": "ended by --max-tokens",
    "context": "the context is full",
    "stopped": "stopped",
}


def chat(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export directory, or a model directory.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="Another one, asked the same; the dense model, say.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Ask this, print the answer, end. So does text on stdin."),
    ] = None,
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="What the model is told before the conversation.")
    ] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="The longest answer.", min=1)] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0: the likeliest token. More: tokens are drawn.", min=0.0)
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed draws the same tokens.", min=0)] = 0,
    threads: Annotated[int, typer.Option("--threads", help="0: all processors.", min=0)] = 0,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Talk to an export in its own runtime, with the plan's context, cache and prompt batch.

    acip-export chat export/gguf-4GB

    acip-export chat export/gguf-4GB . --temperature 0.7

    acip-export chat export/onnx-900MB --prompt "What is the capital of France?"

    Ctrl-C stops an answer, Ctrl-D ends. After each answer: its tokens, their speed, and the most memory that the
    process has held, beside what was planned. A model without a chat template continues texts. With two, each answers
    in turn: an export, and the dense model that it was made of.
    """
    if not export.is_dir():
        load_export_plan(export_of(export))  # says so
    piped = prompt is None and not sys.stdin.isatty()
    if piped:
        prompt = sys.stdin.read().strip()
    if prompt == "":
        raise UsageError("there is nothing to ask; use  --prompt TEXT,  or run it in a terminal")
    if json and prompt is None:
        raise UsageError("--json prints one answer; say to what with  --prompt TEXT")
    settings = Settings(max_tokens, temperature, seed)
    with ExitStack() as stack:
        models = [stack.enter_context(open_chat(export, threads, system))]
        if other is not None:
            models.append(stack.enter_context(open_chat(other, threads, system, models[0].serving)))
        if json:
            answers = [_to_json(model, "".join(model.ask(prompt or "", settings))) for model in models]
            console.print_json({"prompt": prompt, "answers": answers})
            return
        for model in models:
            _introduce(model)
        if prompt is not None:
            _answers(models, prompt, settings)
        else:
            _converse(models, settings)


def _introduce(model: ChatModel) -> None:
    if model.note:
        console.note(model.note)
    kind = "" if model.chats else "; no chat template: it continues your text"
    console.note(f"{model.directory}: {model.runtime}, {model.context:,} tokens of context{kind}")


def _converse(models: list[ChatModel], settings: Settings) -> None:
    console.note("Ctrl-C stops an answer, Ctrl-D ends")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - lines can be edited and called back
    with _interruptible():
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                console.out.print()
                return
            except _StoppedError:
                console.out.print()
                console.note("Ctrl-D ends")
                continue
            if text:
                try:
                    _answers(models, text, settings)
                except UsageError as error:  # too long: the conversation goes on
                    console.print_error(error)


class _StoppedError(KeyboardInterrupt):
    """Ctrl-C: a kind of its own, as whoever ends the process in another way means the whole of it."""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise _StoppedError


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is the conversation's own, and no reason to end with the status of an interruption."""
    before: Any = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _answers(models: list[ChatModel], text: str, settings: Settings) -> None:
    for model in models:
        if len(models) > 1:
            console.out.print(f"{model.directory}:", style="bold", markup=False)
        pieces = model.ask(text, settings)
        try:
            for piece in pieces:
                console.stream(piece)
        except _StoppedError:
            pieces.close()
        console.stream("\n")
        if model.forgotten:
            count = "the first exchange is" if model.forgotten == 1 else f"the first {model.forgotten} exchanges are"
            console.note(f"the context of {model.context:,} tokens is full: {count} forgotten")
        if model.answer is not None:
            _figures(model, model.answer)


def _figures(model: ChatModel, answer: Answer) -> None:
    parts = [f"{answer.tokens} tokens"]
    if answer.tokens_per_second is not None:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    if answer.memory_bytes is not None:
        planned = model.planned_bytes
        of_plan = "" if planned is None else f" of {format_bytes(planned)} planned"
        parts.append(f"{format_bytes(answer.memory_bytes)}{of_plan}")
    if answer.ending in _ENDINGS:
        parts.append(_ENDINGS[answer.ending])
    console.note("  " + ", ".join(parts))


def _to_json(model: ChatModel, text: str) -> dict[str, Any]:
    answer = model.answer
    assert answer is not None
    return {
        "model": str(model.directory),
        "runtime": model.runtime,
        "text": text,
        "ending": answer.ending,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "prompt_seconds": answer.prompt_seconds,
        "tokens_per_second": answer.tokens_per_second,
        "memory_bytes": answer.memory_bytes,
        "planned_bytes": model.planned_bytes,
    }
