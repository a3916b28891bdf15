"""The browser sample as a visitor sees it: WebAssembly in a headless Chromium, nothing from the network."""

from __future__ import annotations

import http.client
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from acip_export.artifacts.plan import save_plan
from tests.browser import open_page
from tests.onnx.conftest import CONTEXT, Export, MakeExport
from tests.onnx.consumers import HOME

SAMPLE = Path(__file__).parents[2] / "samples" / "web"
PACKAGES = HOME / "node" / "node_modules"


@contextmanager
def served(model: Path, packages: Path) -> Iterator[int]:
    sys.path.insert(0, str(SAMPLE))
    try:
        import serve  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    server = serve.server(model, packages)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def whole(export: Export, place: Path) -> Path:
    """A copy with its plan, which holds the model's name."""
    copy = shutil.copytree(export.path, place / "export")
    save_plan(export.bundle.plan, copy / "plan.json")
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["int8", "mixed"])
def test_the_page_loads_an_export_and_generates(make_export: MakeExport, rule: str, tmp_path: Path) -> None:
    if not PACKAGES.is_dir():
        pytest.skip("transformers.js is not installed; with Node on the path run  make consumers")
    export = whole(make_export("samples/llama", True, rule), tmp_path)
    with served(export, PACKAGES) as port, open_page() as page:
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("body[data-state]", timeout=120_000)
        assert page.inner_text("#status") == ""
        about = page.inner_text("#about")
        assert f"{CONTEXT} tokens of context" in about and about.startswith("samples-llama")
        page.fill("#prompt", "import os\n")
        page.fill("#count", "12")
        page.click("#run")
        page.wait_for_selector("body[data-state=done], body[data-state=failed]", timeout=120_000)
        assert "12 tokens in" in page.inner_text("#status")
        text = page.inner_text("#output")
        assert text.startswith("import os\n")
        assert len(text) > len("import os\n")
        # A prompt as long as the context is refused in words.
        page.fill("#prompt", "x = 1\n" * CONTEXT)
        page.click("#run")
        page.wait_for_selector("body[data-state=failed]", timeout=60_000)
        assert f"the context is {CONTEXT} tokens" in page.inner_text("#status")


@pytest.mark.slow
def test_the_page_holds_a_conversation(make_export: MakeExport, tmp_path: Path) -> None:
    """Where the tokenizer has a template; the beginning is forgotten when the context is full."""
    if not PACKAGES.is_dir():
        pytest.skip("transformers.js is not installed; with Node on the path run  make consumers")
    export = whole(make_export("samples/llama", True, "int8"), tmp_path)
    settings = json.loads((export / "tokenizer_config.json").read_text())
    # Short, for a short context.
    template = "{% for m in messages %}{{ m['role'][0] + m['content'] + ';' }}{% endfor %}"
    (export / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    with served(export, PACKAGES) as port, open_page() as page:
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("body[data-state=ready]", timeout=120_000)
        assert page.inner_text("#run") == "Send"
        page.fill("#count", "8")
        for number in range(1, 5):
            page.fill("#prompt", "import os")
            page.click("#run")
            answered = f"document.querySelectorAll('#output b').length === {number}"
            page.wait_for_function(f"{answered} && !document.querySelector('#run').disabled", timeout=120_000)
            assert "tokens in" in page.inner_text("#status")
        assert page.inner_text("#output").count("> import os") == 4
        page.click("#anew")
        assert page.inner_text("#output") == ""


def test_the_server_stays_within_its_directories(make_export: MakeExport, tmp_path: Path) -> None:
    export = make_export("llama", True, "int8")
    (tmp_path / "@huggingface" / "transformers").mkdir(parents=True)
    with served(export.path, tmp_path) as port:

        def status(path: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", path)
            return connection.getresponse().status

        assert status("/") == status("/app.js") == status("/model/config.json") == 200
        assert status("/model/../../README.md") == status("/%2e%2e/README.md") == status("/../README.md") == 404


def test_missing_parts_are_named(make_export: MakeExport, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no config\.json"), served(tmp_path, tmp_path):
        pass
    export = make_export("llama", True, "int8")
    with pytest.raises(SystemExit, match="npm install"), served(export.path, tmp_path):
        pass
