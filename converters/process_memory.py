"""What a runtime's process holds whatever the plan: its library, its own heap, its tokenizer's tables. Measured.

The figures are those of the Python packages on one platform, measured by ``make bench-memory``; another build of the
same runtime (a phone's, say) differs by a few MiB either way. A test measures again and turns red when a version moves
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from acip_export.formats.protocol import ProcessBase
from acip_export.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class RuntimeBase:
    """One runtime's share of a process, beside the interpreter that drives it.

    Attributes:
        measured_with: packages and platform.
        library: bytes of code, sessions, allocators and two threads: everything that no model changes.
        heap: of these, what no file backs, and ``layer_heap`` with every layer.
        layer: bytes that the graph of one layer takes: its nodes, their names, the plan of running them.
        token, merge: bytes that the tokenizer keeps for each token and each merge.
        holes: as those of :class:`~acip_export.formats.protocol.ProcessBase`.
        building: share of that which building the tokenizer takes besides, and frees.
    """

    measured_with: str
    library: int
    heap: int
    token: int
    merge: int
    building: float = 0.0
    layer: int = 0
    layer_heap: int = 0
    holes: bool = False

    def of(self, checkpoint: Checkpoint) -> ProcessBase:
        """Return what the runtime holds for one model."""
        size = checkpoint.tokenizer_size
        tokenizer = self.token * max(size.tokens, checkpoint.shape.vocabulary) + self.merge * size.merges
        library = self.library + self.layer * checkpoint.shape.layers
        heap = min(library, self.heap + self.layer_heap * checkpoint.shape.layers)
        building = tokenizer + math.ceil(self.building * tokenizer)
        return ProcessBase(library, tokenizer, building, heap, self.holes)
