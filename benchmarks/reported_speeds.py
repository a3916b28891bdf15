"""How well reports of a chip predict each other: every report of acip_export/devices/devices.toml from the others.

    python -m benchmarks.reported_speeds > benchmarks/reported_speeds.json

One JSON document on stdout, a readable table on stderr. Nothing is measured here: the figures are other people's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from math import exp, log

import numpy as np

from acip_export.devices import load_devices
from acip_export.devices.reports import LeftOut, left_out

KINDS = ("prompt", "answer")
Ratios = dict[str, float | None]


def main() -> None:
    chips = {device.chip.name: device.chip for device in load_devices().values() if device.chip is not None}
    predicted = {name: [_ratios(each) for each in left_out(chip.reports)] for name, chip in chips.items()}
    summary = {kind: _summary([ratios[kind] for listed in predicted.values() for ratios in listed]) for kind in KINDS}
    for name, listed in predicted.items():
        known = {kind: [ratio for ratios in listed if (ratio := ratios[kind]) is not None] for kind in KINDS}
        shown = [f"{kind} {min(each):.2f} to {max(each):.2f}" for kind, each in known.items() if each]
        print(f"{name:20} {len(listed):3} reports  {', '.join(shown)}", file=sys.stderr)
    print(summary, file=sys.stderr)
    reports = {
        name: [
            {"model": report.model.name, "type": report.type.name, **ratios}
            for report, ratios in zip(chips[name].reports, listed, strict=True)
        ]
        for name, listed in predicted.items()
    }
    print(json.dumps({"predicted_over_reported": summary, "chips": reports}, indent=1))


def _ratios(each: LeftOut) -> Ratios:
    return {
        "prompt": None if each.prompt is None else round(each.prompt, 3),
        "answer": None if each.answer is None else round(each.answer, 3),
    }


def _summary(ratios: Sequence[float | None]) -> dict[str, float]:
    """Return how many there are, and the factor that half and nine of ten of them are within."""
    far = [abs(log(ratio)) for ratio in ratios if ratio is not None]
    half, most = (round(exp(float(np.quantile(far, share))), 2) for share in (0.5, 0.9))
    return {"count": len(far), "half_within": half, "nine_of_ten_within": most}


if __name__ == "__main__":
    main()
