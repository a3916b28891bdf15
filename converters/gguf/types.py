"""The types that GGUF exports store matrices in: one row each.

Ids, block sizes and bytes are ggml's and stand once, in :data:`acip_export.inspection.gguf.GGML_TYPES`; a test compares
them with the ``gguf`` package. ``relative_mse`` is measured with uniform importance, since every ranked layer is
quantized with importance; without any, as for embeddings, the error is up to a quarter larger (two thirds for 1 bit).
"""

from __future__ import annotations

from dataclasses import dataclass

from acip_export.inspection.gguf import GGML_TYPES
from acip_export.weight_types import WeightType

_LAYOUTS = {name: (number, block, nbytes) for number, (name, block, nbytes) in GGML_TYPES.items()}


@dataclass(frozen=True)
class GgmlType(WeightType):
    """A type of ggml.

    Attributes:
        type_id: enum ggml_type, as a tensor's entry in the file says it.
        file_type: enum llama_ftype (llama.h) of a file that is mostly of this type. llama.cpp only prints it.
    """

    type_id: int = 0
    file_type: int = 0


def _ggml(
    name: str,
    relative_mse: float,
    file_type: int,
    needs_importance: bool = False,
    effort: float = 125.0,
    tables: float = 0.0,
    since: str = "",
) -> GgmlType:
    type_id, block, nbytes = _LAYOUTS[name]
    # ggml's products read the other factor in blocks of their own: Q8_0 or Q8_1 of 32 numbers, Q8_K of 256.
    input_block = 0 if block == 1 else 256 if block == 256 else 32
    return GgmlType(
        name,
        "gguf",
        block,
        nbytes,
        relative_mse,
        needs_importance=needs_importance,
        input_block=input_block,
        effort=effort,
        tables=tables,
        since=since,
        type_id=type_id,
        file_type=file_type,
    )


# Most precise first.
GGML: tuple[GgmlType, ...] = (
    _ggml("f32", 0.0, file_type=0, effort=10),
    _ggml("f16", 4.32e-8, file_type=1, effort=10),
    _ggml("bf16", 2.77e-6, file_type=32, effort=10),
    _ggml("q8_0", 2.86e-5, file_type=7, effort=70),
    _ggml("q6_k", 2.98e-4, file_type=18),
    _ggml("q5_1", 1.14e-3, file_type=9, effort=340),
    _ggml("q5_k", 1.25e-3, file_type=16, effort=340),
    _ggml("q5_0", 1.63e-3, file_type=8),
    _ggml("q4_1", 4.88e-3, file_type=3, effort=340),
    _ggml("q4_k", 5.00e-3, file_type=14, effort=340),
    _ggml("q4_0", 6.66e-3, file_type=2),
    _ggml("iq4_nl", 5.58e-3, file_type=25, effort=750),
    _ggml("iq4_xs", 5.68e-3, file_type=30, effort=750),
    _ggml("q3_k", 2.08e-2, file_type=11),
    _ggml("iq3_s", 1.88e-2, file_type=26, effort=730, tables=6e5),
    _ggml("iq3_xxs", 3.31e-2, file_type=23, effort=1000, tables=1.7e5),
    _ggml("q2_k", 7.22e-2, file_type=10, effort=360),
    _ggml("iq2_s", 6.22e-2, file_type=28, effort=560, tables=7e6),
    _ggml("iq2_xs", 9.01e-2, file_type=20, needs_importance=True, effort=1400, tables=2.8e6),
    _ggml("iq2_xxs", 0.118, file_type=19, needs_importance=True, effort=1000, tables=1.7e6),
    _ggml("iq1_m", 0.203, file_type=31, effort=550, tables=1.7e7),
    _ggml("iq1_s", 0.235, file_type=24, needs_importance=True, effort=550, tables=1.7e7),
    _ggml("tq2_0", 0.647, file_type=37),
    _ggml("tq1_0", 0.647, file_type=36),
    _ggml("q2_0", 0.130, file_type=41, effort=650, since="b10015"),
    _ggml("q1_0", 0.360, file_type=40),
    _ggml("mxfp4", 1.32e-2, file_type=38),
)
TYPE_IDS = {row.name: row.type_id for row in GGML}
# What converters.gguf.block_codes can choose the codes of; a test compares.
FEEDBACK_TYPES = frozenset(
    ("q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k", "q2_k", "q2_0")
)
# Those whose blocks have a float16 to be tuned, in converters.gguf.block_codes; a test compares.
TUNABLE_TYPES = FEEDBACK_TYPES | {"iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_s"}
FILE_TYPES = {row.name: row.file_type for row in GGML}
