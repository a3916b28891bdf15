"""What an interrupted command says, and how it ends before it begins or when it is done.

Imports next to nothing: until it is imported an interruption is a traceback.
"""

import os
import signal
import sys
from types import FrameType

EXIT_INTERRUPTED = 130
INTERRUPTED = "interrupted; nothing was left half-written"


def end_at_once(words: bool) -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP end the process from now on, without a traceback; one that is ignored stays so.

    For a command that has nothing to tidy up: it has not begun yet, or is done already.

    Args:
        words: whether it then says that it was interrupted, as a JSON document where one is wanted.
    """

    def end(_signal: int, _frame: FrameType | None) -> None:
        if words:
            try:  # noqa: SIM105  (contextlib is a module to import)
                _say()
            except OSError:  # the terminal may be gone
                pass
        os._exit(EXIT_INTERRUPTED)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def _say() -> None:
    # Without Python's streams and its json: the signal may have come while they were in use, or half imported.
    if "--json" in sys.argv[1:]:
        os.write(1, f'{{"error": "{INTERRUPTED}", "code": {EXIT_INTERRUPTED}, "kind": "KeyboardInterrupt"}}\n'.encode())
    else:
        os.write(2, f"{INTERRUPTED}\n".encode())
