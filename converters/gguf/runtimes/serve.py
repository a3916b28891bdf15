"""llama.cpp's server as xllamacpp has it inside, with the plan's settings; ended by Ctrl-C.

Run by ``acip-export serve`` where there is no llama-server:

    python -m converters.gguf.runtimes.serve EXPORT HOST PORT
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from acip_export.artifacts.names import PLAN_FILE
from acip_export.artifacts.plan import load_plan
from acip_export.machine import processors
from converters.gguf.runtimes.llama_server import server_parameters


def main() -> None:
    """Serve until a signal comes."""
    import xllamacpp

    export, host, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    parameters = server_parameters(export, load_plan(export / PLAN_FILE).serving, processors())
    parameters.hostnames, parameters.port = [host], port
    ended = threading.Event()
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda *_: ended.set())
    server = xllamacpp.Server(parameters)
    sys.stderr.write(f"listening on {server.listening_address}\n")
    sys.stderr.flush()
    while not ended.wait(1):  # a wait without end would not let signals through on every system
        pass


if __name__ == "__main__":
    main()
