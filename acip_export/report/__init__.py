"""What people read about an export: ``report.html`` and the model card ``README.md``, made from the files of an export.

Neither has a figure of its own: all come from ``plan.json``, ``report.json`` and the score file, or from an earlier
``report.html`` where the score file is out of reach.
"""

from acip_export.report.comparison import write_comparison
from acip_export.report.page import Exported, Page, Ranking, build_page, read_export
from acip_export.report.write import write_papers

__all__ = [
    "Exported",
    "Page",
    "Ranking",
    "build_page",
    "read_export",
    "write_comparison",
    "write_papers",
]
