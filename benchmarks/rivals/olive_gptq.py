"""Olive's GPTQ recipe for ONNX, in an environment of its own: nothing of this repository is imported.

    python olive_gptq.py MODEL TEXT OUT GROUP [last]

Its passes ``Gptq`` (4 bits, asymmetric, blocks of GROUP columns) and ``ModelBuilder``, as its own recipes for the CPU
have them; with ``last`` the pass ``SelectiveMixedPrecision`` (``k_quant_last``) and a quantized head. It calibrates on
128 windows of 512 tokens of the text, in place of 128 of 2,048 of a data set from the hub.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OLIVE_DISABLE_TELEMETRY", "1")

from olive import run
from olive.passes.pytorch.train_utils import get_calibration_data_config

WINDOW, SAMPLES = 512, 128


def main() -> None:
    model, text, out, group, *last = sys.argv[1:]
    data = get_calibration_data_config(
        model, data_name="text", subset=None, split="train", max_seq_len=WINDOW, max_samples=SAMPLES
    )
    settings = data.model_dump() if hasattr(data, "model_dump") else data.to_json()
    settings["load_dataset_config"]["data_files"] = text
    gptq: dict[str, Any] = {"type": "Gptq", "bits": 4, "group_size": int(group), "data_config": settings}
    passes: dict[str, Any] = {"gptq": gptq, "builder": {"type": "ModelBuilder", "precision": "int4"}}
    if last:
        gptq["lm_head"] = True
        passes = {"mixed": {"type": "SelectiveMixedPrecision", "algorithm": "k_quant_last"}, **passes}
    scratch = Path(out).with_suffix(".scratch")
    run(
        {
            "input_model": {"type": "HfModel", "model_path": model},
            "systems": {
                "local": {
                    "type": "LocalSystem",
                    "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
                }
            },
            "target": "local",
            "passes": passes,
            "output_dir": str(scratch / "out"),
            "cache_dir": str(scratch / "cache"),
        }
    )
    config = next((scratch / "out").rglob("genai_config.json"))
    shutil.copytree(config.parent, out, dirs_exist_ok=True)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
