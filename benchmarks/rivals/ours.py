"""A process that plans and writes one export of ours, by the defaults: what a user gets at these bytes of files.

python -m benchmarks.rivals.ours MODEL SCORES FORMAT BYTES CONTEXT OUT
"""

from __future__ import annotations

import sys

import acip_export


def main() -> None:
    model, scores, fmt, nbytes, context, out = sys.argv[1:]
    plan = acip_export.plan(model, scores, budget=int(nbytes), format=fmt, scope="file", context=int(context))
    acip_export.export(plan, out, model=model, scores=scores, verify=False, force=True)


if __name__ == "__main__":
    main()
