"""A model to talk to: an export in its own runtime, or the dense model in PyTorch, in a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from acip_export.artifacts.names import PLAN_FILE
from acip_export.artifacts.plan import Plan, Serving, load_plan
from acip_export.chat.protocol import Answer, Ask, Asked, Next, Opened, Reply, Request, Settings, Stop
from acip_export.errors import (
    AcipError,
    MissingExtraError,
    PlanFileError,
    RuntimeCrashError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from acip_export.formats.protocol import SessionClass
from acip_export.formats.registry import export_format
from acip_export.io.processes import module_environment
from acip_export.model.chat_template import ChatTemplate, Message, find_chat_template
from acip_export.model.checkpoint import Checkpoint
from acip_export.verification.process import ending, kill, tail

_WORKER = "acip_export.chat.worker"
# What a dense model is given where no export beside it says more.
_LONGEST_DENSE_CONTEXT = 4096
_PROMPT_BATCH = 128
# Of its context, how much is left for an answer that may be so long, as long as there is something to forget.
_ANSWER_SHARE = 0.25
_DENSE = SessionClass("PyTorch", "acip_export.chat.dense", "DenseSession")
_Message = TypeVar("_Message", Opened, Reply)


@dataclass(frozen=True)
class _Source:
    """What is opened, and how: ``sessions`` are tried in their order. ``plan``: ``None`` for a dense model."""

    directory: Path
    serving: Serving
    sessions: tuple[SessionClass, ...]
    template: str | None
    plan: Plan | None


class ChatModel:
    """An opened model and the conversation with it so far.

    Attributes:
        directory: as it was named. runtime: name and version. serving: its settings. context: tokens.
        chats: whether there is a template; else it continues texts. note: why it is not the first runtime, or empty.
        answer: what the last answer took. forgotten: exchanges that no longer fitted when it was asked.
    """

    def __init__(self, source: _Source, threads: int, system: str) -> None:
        self.directory, self.context, self.chats = source.directory, source.serving.context, source.template is not None
        if system and not self.chats:
            raise UsageError(
                f"{self.directory} has no chat template, so it has no place for --system; write it into the prompt"
            )
        self.serving, self._plan = source.serving, source.plan
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns: list[Message] = []
        self.answer: Answer | None = None
        self.forgotten = 0
        self._process, opened, self.note = _first_that_opens(source, threads)
        self.runtime, self.load_seconds = opened.runtime, opened.load_seconds
        self._template = ChatTemplate(source.template or "", opened.tokens)

    @property
    def planned_bytes(self) -> int | None:
        """Memory of the process by the plan; ``None`` for the dense model."""
        return None if self._plan is None else self._plan.process_bytes

    def ask(self, text: str, settings: Settings) -> Generator[str, None, None]:
        """Give the answer piece by piece, and remember it; where it is stopped, what there was of it.

        Raises:
            UsageError: the text alone is too long. InputError: the template refuses the conversation.
            RuntimeCrashError: the process died. VerificationError: the runtime refuses.
        """
        self._begin(text, settings)
        said = ""
        self.answer = None
        try:
            while self.answer is None:
                reply = self._process.request(Next())
                said, self.answer = said + reply.text, reply.answer
                if reply.text:
                    yield reply.text
        finally:
            if self.answer is None and self._process.alive:
                self.answer = self._process.request(Stop()).answer
            if self.chats:
                self._turns += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]

    def _begin(self, text: str, settings: Settings) -> None:
        self.forgotten = 0
        while True:
            asked: list[Message] = [*self._system, *self._turns, {"role": "user", "content": text}]
            prompt = self._template.render(asked) if self.chats else text
            room = max(1, min(settings.max_tokens, int(self.context * _ANSWER_SHARE))) if self._turns else 1
            too_long = self._process.request(Ask(prompt, not self.chats, settings, room)).too_long
            if too_long is None:
                return
            if not self._turns:
                raise UsageError(
                    f"that takes {too_long:,} tokens, and the context is {self.context:,} with the answer: shorten it, "
                    "or export with a longer  --context"
                )
            del self._turns[:2]
            self.forgotten += 1

    def forget(self) -> None:
        """Begin a new conversation."""
        self._turns = []

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_chat(
    directory: Path, threads: int = 0, system: str = "", serving: Serving | None = None
) -> ChatModel:  # fmt: skip
    """Open an export or a model directory.

    Args:
        threads: of the runtime; 0: all processors. system: what the model is told before the conversation.
        serving: settings for a dense model: those of the export that it is compared with.

    Raises:
        PlanFileError, CheckpointError: neither an export nor a model. UnsupportedError: it does not generate.
        MissingExtraError: no runtime is installed. VerificationError: it refuses the export.
        UsageError: a system message without a template.
    """
    return ChatModel(_source(directory, serving), threads, system)


def _source(directory: Path, serving: Serving | None) -> _Source:
    if (directory / PLAN_FILE).is_file():
        plan = load_plan(directory / PLAN_FILE)
        written_as = export_format(plan.format)
        if plan.task != "causal":
            raise UnsupportedError(f"{directory} is an encoder ({plan.task}): it has nothing to say")
        if not written_as.chats:
            raise UnsupportedError(f"no runtime of {plan.format} can be talked to")
        template = written_as.chat_template(directory)
        return _Source(directory, plan.serving, written_as.chats, template, plan)
    if not (directory / "config.json").is_file():
        raise PlanFileError(
            f"{directory} is neither an export nor a model: it has no {PLAN_FILE} and no config.json; make one with  "
            "acip-export --budget 4GB --format gguf"
        )
    checkpoint = Checkpoint.open(directory)
    if not checkpoint.shape.generates:
        raise UnsupportedError(f"{directory} is an encoder: it has nothing to say")
    longest = checkpoint.shape.max_context
    context = min(longest, serving.context if serving is not None else _LONGEST_DENSE_CONTEXT)
    settings = Serving(context, "f32", _PROMPT_BATCH)
    return _Source(directory, settings, (_DENSE,), find_chat_template(checkpoint.path), None)


def _first_that_opens(source: _Source, threads: int) -> tuple[_Process, Opened, str]:
    refused: list[AcipError] = []
    for session in source.sessions:
        process = _Process(source, session, threads)
        try:
            opened = process.opened()
        except BaseException as error:
            process.close()
            if not isinstance(error, MissingExtraError | VerificationError):
                raise
            refused.append(error)
        else:
            reason = str(refused[0]).partition("\n")[0] if refused else ""
            return process, opened, f"{reason}; {opened.runtime} runs it" if reason else ""
    raise refused[0]


class _Process:
    """A worker; see :mod:`acip_export.chat.worker`."""

    def __init__(self, source: _Source, session: SessionClass, threads: int) -> None:
        self._what, self._asked = f"{source.directory} in {session.runtime}", 0
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        serving = msgspec.json.encode(source.serving).decode()
        arguments = [session.module, session.name, str(source.directory), serving, str(threads)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-X", "faulthandler", "-m", _WORKER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env=module_environment(),
            start_new_session=True,  # Ctrl-C stops an answer, not the model
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def opened(self) -> Opened:
        """Wait for the model."""
        opened = self._read(Opened)
        if opened.missing is not None:
            raise MissingExtraError(*opened.missing)
        if opened.error:
            raise VerificationError(opened.error)
        return opened

    def request(self, request: Request) -> Reply:
        """Ask, and wait for the reply."""
        assert self._process.stdin is not None
        self._asked += 1
        with contextlib.suppress(BrokenPipeError):  # reading says why
            self._process.stdin.write(msgspec.json.encode(Asked(self._asked, request)) + b"\n")
            self._process.stdin.flush()
        reply = self._read(Reply)
        while reply.number != self._asked:  # to one before, for which Ctrl-C ended the waiting
            reply = self._read(Reply)
        if reply.error:
            raise VerificationError(reply.error)
        return reply

    def _read(self, kind: type[_Message]) -> _Message:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeCrashError(
                f"the process that ran {self._what} {ending(status)}; the end of its output:\n{tail(self._output)}"
            )
        return msgspec.json.decode(line, type=kind)

    def close(self) -> None:
        """End it, whatever it does."""
        kill(self._process)
        for stream in (self._process.stdin, self._process.stdout, self._output):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
