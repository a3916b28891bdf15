"""Whether onnxruntime-qnn takes a ``--backend qnn-friendly`` graph as a whole: its HTP backend, emulated here.

    pip install 'acip-export[qnn]' && python -m benchmarks.qnn

Random two-layer models; falling back to the processor is forbidden, so a session that opens is entirely Qualcomm's.
Logits are compared with onnxruntime's own processor kernels. No neural processor is involved, so there are no times.
Writes benchmarks/qnn.json.
"""

from __future__ import annotations

import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_qnn as qnn  # type: ignore[import-not-found, unused-ignore]

from tests.onnx.test_static_cache import export

RESULT = Path(__file__).parent / "qnn.json"
# Snapdragon 8 Gen 3
DEVICE = {"htp_arch": "75", "soc_model": "57"}
CASES = (("llama", True, "pairs"), ("qwen3", False, "f16"), ("mistral", False, "pairs"))
CONTEXT, TOKENS = 48, (1, 16)


def open_on_htp(model: Path, tokens: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_free_dimension_override_by_name("sequence_length", tokens)
    options.add_free_dimension_override_by_name("total_sequence_length", CONTEXT)
    devices = [device for device in ort.get_ep_devices() if device.ep_name == "qnn"]
    options.add_provider_for_devices(devices[:1], {"backend_path": qnn.get_qnn_htp_path(), **DEVICE})
    return ort.InferenceSession(str(model), options)


def main() -> None:
    ort.register_execution_provider_library("qnn", qnn.get_library_path())
    rows = []
    for arch, tied, rule in CASES:
        for tokens in TOKENS:
            with tempfile.TemporaryDirectory() as scratch:
                model = export(Path(scratch), arch, {"tie_word_embeddings": tied}, rule).path / "onnx" / "model.onnx"
                session = open_on_htp(model, tokens)
                positions = np.arange(tokens, dtype=np.int64)[None]
                known = {
                    "input_ids": positions + 5,
                    "position_ids": positions,
                    "attention_mask": np.ones((1, CONTEXT), np.int64),
                }
                feeds: dict[str, Any] = {
                    node.name: known[node.name] if node.name in known else np.zeros(node.shape, np.float16)
                    for node in session.get_inputs()
                }
                theirs = session.run(["logits"], feeds)[0].astype(np.float32)
                plain = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
                ours = plain.run(["logits"], feeds)[0].astype(np.float32)
            difference = float(np.abs(theirs - ours).max())
            row = {"architecture": arch, "tied": tied, "weights": rule, "tokens": tokens, "all_nodes_on_htp": True}
            rows.append({**row, "max_logit_difference": difference, "logit_deviation": float(ours.std())})
            print(json.dumps(rows[-1]), flush=True)
    document = {
        "benchmark": "qnn",
        "device": {**DEVICE, "emulated_on": platform.machine()},
        "versions": {name: version(name) for name in ("onnxruntime", "onnxruntime-qnn")},
        "rows": rows,
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
