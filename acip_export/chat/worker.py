"""The process that a conversation runs in: the runtime, and nothing beside it, so that its memory is the runtime's.

Run by :mod:`acip_export.chat.model`, never imported. It ends with its standard input.

    python -m acip_export.chat.worker MODULE CLASS DIRECTORY SERVING THREADS
"""

from __future__ import annotations

import gc
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from acip_export.artifacts.plan import Serving
from acip_export.chat.conversation import Conversation, choose
from acip_export.chat.protocol import Ask, Asked, Next, Opened, Reply, Request
from acip_export.errors import AcipError, MissingExtraError
from acip_export.verification.probe import forget_peak, resident


def main() -> None:
    """Serve one conversation."""
    module, name, directory, serving_, threads = sys.argv[1:]
    serving = msgspec.json.decode(serving_, type=Serving)
    # Libraries print what they like to standard output; the answers go where it was.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    runtime = getattr(import_module(module), name)
    choose(np.zeros(2, np.float32), 1.0, np.random.default_rng(0))
    # From here on, as where exports are verified: Python's own modules, and what they load when they are first used,
    # are no part of a plan.
    gc.collect()
    forget_peak()
    before = resident("VmRSS")

    def memory() -> int | None:
        now = resident("VmHWM")
        return None if before is None or now is None else now[0] - before[0]

    start = time.perf_counter()
    try:
        session = runtime(Path(directory), serving, int(threads) or None)
    except MissingExtraError as error:
        _say(channel, Opened(missing=error.fields))
        return
    except AcipError as error:
        _say(channel, Opened(error=str(error)))
        return
    with session:
        _say(channel, Opened(session.name, dict(session.tokens), time.perf_counter() - start))
        conversation = Conversation(session, serving.context, memory)
        for line in sys.stdin.buffer:
            asked = msgspec.json.decode(line, type=Asked)
            try:
                reply = _reply(conversation, asked.request)
            except AcipError as error:
                reply = Reply(error=str(error))
            _say(channel, msgspec.structs.replace(reply, number=asked.number))


def _reply(conversation: Conversation, request: Request) -> Reply:
    if isinstance(request, Ask):
        return Reply(too_long=conversation.ask(request.text, request.begin, request.settings, request.room))
    if isinstance(request, Next):
        return Reply(conversation.next(), conversation.answer())
    conversation.stop()
    return Reply("", conversation.answer())


def _say(channel: BinaryIO, message: Opened | Reply) -> None:
    channel.write(msgspec.json.encode(message) + b"\n")
    channel.flush()


if __name__ == "__main__":
    main()
