"""Render chat templates in a process of their own: strangers' programs, which may never end, or fill the memory.

The sandbox of Jinja keeps a template from files and attributes, but not from loops in loops and from texts that double.
Run as a module this is the other side: a line of JSON in (template, tokens, messages), a line out (text or error).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any, NoReturn

from acip_export.io.processes import module_environment

# Of one conversation. Templates in use take milliseconds, and write what they are given.
SECONDS = 5
_MEMORY = 2**28


class TemplateError(Exception):
    """The template refuses the conversation, does not end, or takes too much memory."""


class TemplateProcess:
    """A child that renders one template for as long as this object lives; it is started by the first conversation."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, request: Mapping[str, Any]) -> str:
        """Return the text of a request as :func:`_answer` reads it. Raises TemplateError."""
        child = self._child
        if child is None:
            # -P: a module in the current directory, which may be the model's, is none of ours.
            command = [sys.executable, "-P", "-m", "acip_export.model.template_process"]
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=module_environment(),
                start_new_session=True,  # Ctrl-C on a terminal stops an answer, not this
            )
            self._child, self._end = child, weakref.finalize(self, _end, child)
        assert child.stdin is not None and child.stdout is not None
        late = threading.Timer(SECONDS, child.kill)
        late.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # reading says why
                child.stdin.write(json.dumps(request).encode() + b"\n")
                child.stdin.flush()
            line = child.stdout.readline()
        except BaseException:
            # It would go on when nobody asks any more, and give this text as the answer to the next request.
            self.close()
            raise
        finally:
            timely = late.is_alive()
            late.cancel()
        if not line:
            self.close()
            raise TemplateError(
                f"it takes more than {_MEMORY >> 20} MiB" if timely else f"it takes longer than {SECONDS} s"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return str(answer["text"])

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child = None
            self._end()


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.communicate()


def _answer(request: Mapping[str, Any]) -> dict[str, str]:
    """Render ``{"template": text, "tokens": {name: text}, "messages": [...], "answer": bool}``."""
    try:
        # Tools and documents are nothing, not undefined: templates tell the two apart.
        names = {**request["tokens"], "tools": None, "documents": None}
        text = (
            _environment()
            .from_string(request["template"])
            .render(**names, messages=request["messages"], add_generation_prompt=request["answer"])
        )
    except MemoryError:
        return {"error": f"it takes more than {_MEMORY >> 20} MiB"}
    except Exception as error:  # templates raise whatever they like, jinja2's own errors included
        return {"error": str(error)[:500] or type(error).__name__}
    return {"text": text}


def _environment() -> Any:
    """As Hugging Face documents it for templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what an assistant said, for training; it changes no text."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def dump(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = dump
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _RefusedError(Exception):
    """What a template raises on purpose."""


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _serve() -> None:
    with contextlib.suppress(ImportError):  # Windows has no such limit, and the time is limited all the same
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
