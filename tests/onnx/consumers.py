"""Programs that open exports without this package: transformers.js in Node, optimum-onnx in an environment of its own,
and onnxruntime alone. Each runs a script of tests/consumers, which describes its protocol.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from acip_export.io.atomic import user_cache

HOME = user_cache() / "consumers"
SCRIPTS = Path(__file__).parent.parent / "consumers"


def transformers_js(script: str, exports: Sequence[Path], request: dict[str, Any]) -> Any:
    node = shutil.which("node")
    if node is None or not (HOME / "node" / "node_modules").is_dir():
        pytest.skip("transformers.js is not installed; with Node on the path run  make consumers")
    return _run([node, SCRIPTS / script, HOME / "node", *exports], request)


def optimum_onnx(script: str, exports: Sequence[Path], request: dict[str, Any]) -> Any:
    python = HOME / "optimum" / "bin" / "python"
    if not python.exists():
        pytest.skip("optimum-onnx is not installed; run  make consumers")
    return _run([python, SCRIPTS / script, *exports], request)


def plain_onnxruntime(script: str, exports: Sequence[Path], request: dict[str, Any]) -> Any:
    return _run([sys.executable, SCRIPTS / script, *exports], request)


def _run(command: list[str | Path], request: dict[str, Any]) -> Any:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command,
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
