"""Serve the page, an export and the JavaScript packages to a browser on this machine; nothing comes from elsewhere.

npm install --ignore-scripts                       once, in this directory
python serve.py ../../export/onnx-900MB            then open the address that it prints
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent


class Handler(SimpleHTTPRequestHandler):
    """Maps the first part of a path to a directory: ``/model/...``, ``/packages/...``, and the page for the rest."""

    extensions_map: dict[str, str] = {  # noqa: RUF012 - the name and type of the base class
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
        ".onnx_data": "application/octet-stream",
    }

    def __init__(self, *args: Any, roots: Mapping[str, Path], **kwargs: Any) -> None:
        self.roots = roots
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        """The file of a request, never one outside the mapped directories."""
        parts = [part for part in unquote(urlsplit(path).path).split("/") if part not in ("", ".", "..")]
        root = self.roots.get(parts[0]) if parts else None
        file = root.joinpath(*parts[1:]) if root else self.roots[""].joinpath(*parts or ["index.html"])
        return str(file)

    def end_headers(self) -> None:
        """Pages that isolate themselves may use shared memory, which WebAssembly threads need."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the browser's console shows failures."""


def server(model: Path, packages: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server on the loopback address; port 0 takes a free one."""
    if not (model / "config.json").is_file():
        raise SystemExit(f"{model} is no ONNX export: it has no config.json. Make one with  acip-export --format onnx")
    if not (packages / "@huggingface" / "transformers").is_dir():
        raise SystemExit(f"{packages} lacks transformers.js; run  npm install --ignore-scripts  in {HERE}")
    roots = {"": HERE, "model": model.resolve(), "packages": packages.resolve()}
    return ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, roots=roots))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="export directory that acip-export --format onnx wrote")
    parser.add_argument("--packages", type=Path, default=HERE / "node_modules", help="where transformers.js is")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    with server(arguments.model, arguments.packages, arguments.port) as running:
        print(f"http://127.0.0.1:{running.server_port}/")
        running.serve_forever()


if __name__ == "__main__":
    main()
