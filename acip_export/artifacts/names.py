"""Names of files and artifacts, with the versions that this tool reads and writes: each stands here alone."""

from __future__ import annotations

from typing import NamedTuple

PLAN_FILE = "plan.json"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
CARD_FILE = "README.md"
COMPARISON_FILE = "comparison.html"
MARK_FILE = "UNVERIFIED.txt"
MANIFEST_FILE = "bundle.json"
WEIGHTS_FILE = "model.safetensors"
IMPORTANCE_FILE = "importance.safetensors"
FEEDBACK_FILE = "feedback.safetensors"
TUNED_FILE = "tuned.safetensors"
CONFIG_FILE = "config.json"
SCORE_FILE_SUFFIX = ".acip"
# What an export's directory holds for people and tools, and no device needs.
PAPERS = frozenset({PLAN_FILE, REPORT_FILE, PAGE_FILE, CARD_FILE, MARK_FILE, TUNED_FILE})


class ArtifactName(NamedTuple):
    """What a file says that it is: the values of its keys ``artifact`` and ``version``.

    Attributes:
        noun: what people call it. remedy: what to do about one of another version.
    """

    artifact: str
    version: int
    noun: str
    remedy: str


SCORES = ArtifactName("acip-scores", 2, "a score file", "rank again")
PLAN = ArtifactName("acip-plan", 2, "a plan", "plan again")
BUNDLE = ArtifactName("acip-bundle", 3, "a bundle", "materialize again")
TUNED = ArtifactName("acip-tuned", 1, "tuned numbers", "export again")
REPORT = ArtifactName("acip-report", 2, "a report", "run  acip-export verify  again")
PAGE_DATA = ArtifactName("acip-report-data", 2, "a report page", "run  acip-export report  again")
ROUNDING_ERRORS = ArtifactName("acip-rounding-errors", 2, "a cache of rounding errors", "plan again")
MEASURED_LOSSES = ArtifactName("acip-measured-losses", 2, "a cache of measured losses", "plan again")
PLAN_LOSSES = ArtifactName("acip-plan-losses", 1, "a cache of what plans lose", "plan again")
CACHE_LOSSES = ArtifactName("acip-kv-cache-losses", 1, "a cache of what KV cache types lose", "plan again")
SPEEDS = ArtifactName("acip-speeds", 2, "a table of speeds", "run  acip-export calibrate  again")
ANATOMY = ArtifactName("acip-anatomy", 2, "an anatomy", "run  acip-export inspect  again")
ANATOMY_DIFF = ArtifactName("acip-anatomy-diff", 1, "a comparison", "run  acip-export inspect  again")
EXPORTS = ArtifactName("acip-exports", 1, "a list of exports", "run  acip-export inspect  again")
SWEEP = ArtifactName("acip-sweep", 3, "a sweep", "plan again")
CHECK = ArtifactName("acip-check", 2, "a check's result", "run  acip-export check  again")
LOCK = ArtifactName(
    "acip-check-lock",
    2,
    "a baseline",
    "use the version of acip-export that wrote it, or delete it and run  acip-export check --update",
)
