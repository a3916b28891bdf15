"""The process that verifies holds two blocks of a reference and the logits of a window, however large the model is."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from acip_export.api import convert_bundle
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from tests.support import CORPUS, dense, make_bundle, make_model, make_plan

# What is freed goes back to the system at once: otherwise it depends on how threads take turns what glibc keeps.
_GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
# All of it runs in one fresh process, so that nothing that other tests left in the allocator hides what is taken here.
_PROGRAM = """
import sys, threading, time
from pathlib import Path
from acip_export.api import evaluation_text
from acip_export.artifacts.bundle import Bundle
from acip_export.verification.export import verify_export

def allocated():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024

def peak(directory):
    model, found, done = directory / "model", [], threading.Event()
    text = evaluation_text(model, Path(sys.argv[1]), 64, 256)
    def watch():
        while not done.wait(0.002):
            found.append(allocated())
    before, watcher = allocated(), threading.Thread(target=watch)
    watcher.start()
    report = verify_export(directory / "export", Bundle.open(directory / "bundle"), text, model)
    done.set()
    watcher.join()
    assert report.passed and report.runtimes[0].divergence is not None, report.failures
    return max(found) - before

directories = [Path(name) for name in sys.argv[2:]]
peak(directories[0])
print(*map(peak, directories))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(CORPUS) * 6, encoding="utf-8")
    directories = []
    for layers in (4, 8, 16):
        place = tmp_path / str(layers)
        model = make_model(place / "model", num_hidden_layers=layers, intermediate_size=1024)
        plan = make_plan(model, "gguf", "stock", dense(type="q8_0"))
        files = export_format("gguf").predict_files(Checkpoint.open(model), "stock", plan.tensors, plan.serving)
        plan = replace(plan, files=files, planned_bytes=sum(files.values()), budget_scope="file")
        make_bundle(model, plan, place / "bundle")
        convert_bundle(place / "bundle", place / "export")
        directories.append(str(place))
    block = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, str(text), *directories]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **_GIVEN_BACK})
    assert not found.returncode, found.stderr
    four, eight, sixteen = map(int, found.stdout.split())
    # Twelve layers more would be 47 MB. What is kept of each layer is what the file says of its tensors.
    assert max(eight, sixteen) - four < 2 * block
