"""A conversation holds what its plan says, and Python's share of the process is not counted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from acip_export.api import export_model, open_scores, plan_export
from acip_export.chat.model import open_chat
from acip_export.chat.protocol import Settings
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from tests.chat.conftest import SAMPLE
from tests.support import make_scores

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")

TEXT = "def main(argv):\n    return sum(int(a) for a in argv)\n"


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["gguf", "onnx"])
def test_a_conversation_holds_what_was_planned(tmp_path: Path, format_name: str) -> None:
    model = Path(shutil.copytree(SAMPLE, tmp_path / "llama"))
    make_scores(model)
    checkpoint = Checkpoint.open(model)
    scores = open_scores(checkpoint, None)
    plan = plan_export(checkpoint, scores, PlanRequest(format_name, 8_000_000))
    assert plan.serving.prompt_batch <= 64
    export_model(checkpoint, scores, plan, tmp_path / "export", verify=False)
    held = []
    with open_chat(tmp_path / "export", threads=2) as chat:
        # A short question first: what follows it is long, and is no beginning.
        for text, temperature in (("def f(", 0.0), (TEXT * 12, 0.0), ("Another " + TEXT * 11, 0.8)):
            list(chat.ask(text, Settings(max_tokens=20, temperature=temperature, seed=0)))
            assert chat.answer is not None and chat.answer.memory_bytes is not None and chat.planned_bytes is not None
            held.append(chat.answer.memory_bytes)
        assert max(held) <= chat.planned_bytes, (held, chat.planned_bytes)
        assert min(held) > 0.8 * chat.planned_bytes
