"""The wheel, installed into an empty environment: what a user gets, without this checkout in reach."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import acip_export
from acip_export.errors import MissingExtraError
from tests.support import make_model, make_scores

ROOT = Path(__file__).parent.parent


def _run(*command: object, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    # Built from a copy: a build directory left in the checkout would put modules into the wheel that are gone.
    source = place / "source"
    for package in ("acip_export", "converters", "optimum"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    _run(*pip, "wheel", "--no-deps", "-w", place, source, cwd=place)
    venv.create(place / "env", with_pip=True)
    python = place / "env" / "bin" / "python"
    (wheel,) = place.glob("*.whl")
    _run(python, "-m", "pip", "--quiet", "install", "-c", ROOT / "constraints.txt", wheel, cwd=place)
    return python


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(environment: Path, tmp_path: Path) -> None:
    assert _run(environment.parent / "acip-export", "--version", cwd=tmp_path).strip() == acip_export.__version__
    check = (
        "import acip_export, acip_export.formats.registry as r\n"
        "print(type(r.export_format('gguf')).__module__, acip_export.__file__)"
    )
    printed = _run(environment, "-c", check, cwd=tmp_path)
    assert printed.startswith("converters.gguf.format")
    assert str(ROOT) not in printed
    assert '"gguf"' in _run(environment.parent / "acip-export", "formats", "--json", cwd=tmp_path)
    # optimum looks for the plug-in in its namespace package; here that has nothing but the plug-in.
    code = (
        "import importlib.util as u; print(list(u.find_spec('optimum.commands.register').submodule_search_locations))"
    )
    (place,) = ast.literal_eval(_run(environment, "-c", code, cwd=tmp_path))
    assert [file.name for file in Path(place).glob("*.py")] == ["register_acip.py"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_missing_extra_says_what_to_install(target: str, environment: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny", num_hidden_layers=1)
    make_scores(model)
    command = [environment.parent / "acip-export", "--model", model, "--budget", "3MB", "--format", target]
    done = subprocess.run([str(c) for c in command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == MissingExtraError.exit_code, done.stderr
    assert f"pip install 'acip-export[{target}]'" in done.stderr
    assert not (tmp_path / "export").exists()
