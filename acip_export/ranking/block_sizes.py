"""Know the sizes of the linear layers of a block, which time, memory and disk of a ranking follow from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Of modules that write into the residual stream: what they read nobody else does.
_WRITES = re.compile(r"(^|[._])(o_proj|out_proj|down_proj|c_proj|dense|fc2|out_lin|lin2)$")


@dataclass(frozen=True)
class BlockSizes:
    """Hold the sizes of the linear layers of one block.

    Attributes:
        shapes: (out, in), in the order in which the layers are factorized. inputs: widths of the tensors that they
            read, each once.
    """

    shapes: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]

    @classmethod
    def of(cls, modules: Mapping[str, tuple[int, int]]) -> BlockSizes:
        """Take them from the shapes of a block's linear layers by name."""
        inputs: dict[tuple[str, int, bool], int] = {}
        for name, (_, width) in modules.items():
            inputs[name.rpartition(".")[0], width, bool(_WRITES.search(name))] = width
        return cls(tuple(modules.values()), tuple(inputs.values()))

    @property
    def weights(self) -> int:
        return sum(out * width for out, width in self.shapes)

    @property
    def factors(self) -> int:
        return sum(min(shape) * sum(shape) for shape in self.shapes)

    @property
    def triangles(self) -> int:
        """Numbers in the triangles of its moments; those of outputs wider than their inputs are kept as narrow."""
        return sum(n * (n + 1) // 2 for n in (*self.inputs, *(min(shape) for shape in self.shapes)))

    @property
    def squares(self) -> tuple[int, int]:
        """Numbers in the moments of inputs, and of gradients."""
        return sum(n * n for n in self.inputs), sum(out * out for out, _ in self.shapes)

    @property
    def width(self) -> int:
        """Numbers that one token brings to the inputs and to the outputs of its layers."""
        return sum(self.inputs) + sum(out for out, _ in self.shapes)
