"""The server that an export is handed to: which one, with which settings; and what it answers."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from acip_export.artifacts.plan import load_plan
from converters.gguf.run_commands import server
from converters.gguf.runtimes.llama_server import server_parameters
from tests.chat.conftest import CONTEXT
from tests.support import Run


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """No llama-server on the path, whatever is installed here."""
    folders = os.environ["PATH"].split(os.pathsep)
    monkeypatch.setenv("PATH", os.pathsep.join(f for f in folders if not (Path(f) / "llama-server").exists()))


def program(folder: Path, content: bytes = b"") -> Path:
    """Something that can be started, by the name of llama.cpp's server."""
    file = folder / "llama-server"
    file.write_bytes(b'#!/bin/sh\nprintf "%s\\n" "$@"\nexit 0\n#' + content + b"\0")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_the_server_on_the_path_is_told_what_is_printed(
    places: dict[str, Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = program(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    shown = run("serve", places["gguf"], "--dry-run", "--port", 9000)
    assert shown.code == 0, shown.err
    wanted = [*server(load_plan(places["gguf"] / "plan.json"), places["gguf"], str(file))]
    assert shlex.split(shown.out) == [*wanted, "--host", "127.0.0.1", "--port", "9000"]
    assert json.loads(run("serve", places["gguf"], "--json").out)["command"][: len(wanted)] == wanted
    command = [sys.executable, "-m", "acip_export", "serve", str(places["gguf"])]
    started = subprocess.run(command, capture_output=True, text=True, check=True)
    assert started.stdout.split() == [*wanted[1:], "--host", "127.0.0.1", "--port", "8080"]


@pytest.mark.usefixtures("no_server")
def test_xllamacpp_s_server_answers_with_the_template(places: dict[str, Path]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "acip_export", "serve", str(places["gguf"]), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(path: str, **body: object) -> dict[str, object]:
        address = f"http://127.0.0.1:{port}{path}"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with direct.open(request, timeout=60) as answer:
            found: dict[str, object] = json.loads(answer.read())
        return found

    try:
        deadline = time.monotonic() + 120
        messages = [{"role": "user", "content": "import os"}]
        while True:
            try:
                written = post("/apply-template", messages=messages)
                break
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.2)
        # Its own template engine writes what ours does.
        assert written["prompt"] == "<|im_start|>user\nimport os<|im_end|>\n<|im_start|>assistant\n"
        answer = post("/v1/chat/completions", messages=messages, max_tokens=4, temperature=0)
        assert answer["usage"]["completion_tokens"] <= 4  # type: ignore[index]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_the_server_inside_xllamacpp_keeps_nothing_beside_the_plan(places: dict[str, Path]) -> None:
    found = server_parameters(places["gguf"], load_plan(places["gguf"] / "plan.json").serving, 1)
    assert (found.n_ctx, found.n_batch, found.n_ubatch, found.n_parallel) == (CONTEXT, 32, 32, 1)
    assert (found.cache_ram_mib, found.n_ctx_checkpoints, found.n_gpu_layers, found.no_extra_bufts) == (0, 0, 0, True)


@pytest.mark.usefixtures("no_server")
def test_what_is_not_served_says_what_to_do(places: dict[str, Path], run: Run, tmp_path: Path) -> None:
    onnx = run("serve", places["onnx"])
    assert onnx.code == 5 and "acip-export chat" in onnx.err
    absent = run("serve", places["gguf"], "--program", tmp_path / "llama-server")
    assert absent.code == 5 and "no program" in absent.err
    factored = tmp_path / "factored"
    shutil.copytree(places["gguf"], factored)
    plan = (factored / "plan.json").read_text().replace('"layout": "stock"', '"layout": "factored"')
    (factored / "plan.json").write_text(plan)
    refused = run("serve", factored, "--program", program(tmp_path))
    assert refused.code == 5 and "converters.gguf.llama_cpp.extension" in refused.err
    taken = run("serve", factored, "--program", program(tmp_path, b"weight.lora_a"), "--dry-run")
    assert taken.code == 0, taken.err
    assert run("serve", tmp_path).code == 3


@pytest.mark.usefixtures("no_server")
def test_without_any_server_it_says_what_to_install(
    places: dict[str, Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converters.gguf.serve.find_spec", lambda _name: None)
    shown = run("serve", places["gguf"])
    assert shown.code == 7 and "pip install 'acip-export[gguf]'" in shown.err
