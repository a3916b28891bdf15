"""A head that is stored although the configuration says that it is the embedding.

Some tools write tied weights twice. Copies are left out: they would be planned and counted, and no runtime reads them.
A head with numbers of its own contradicts the configuration, and runtimes disagree about which of the two counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from acip_export.errors import CheckpointError
from acip_export.model.tensor_info import TensorInfo
from acip_export.model.tensor_names import HEAD, MASKED_HEAD, is_embedding

_HEADS = (HEAD, MASKED_HEAD)
# A head that was trained on differs everywhere; a gigabyte need not be read to see it.
_STRETCHES, _STRETCH = 256, 4096

Info = TypeVar("Info", bound=TensorInfo)


def without_repeated_head(path: Path, tensors: Mapping[str, Info]) -> dict[str, Info]:
    """``tensors`` of a model whose configuration ties its head, without a stored copy of the embedding.

    Raises:
        CheckpointError: the stored head has other numbers than the embedding.
    """
    head = next((name for name in _HEADS if name in tensors), None)
    embedding = next((name for name in tensors if is_embedding(name)), None)
    if head is None or embedding is None:
        return dict(tensors)
    if not _same(path, tensors[head], tensors[embedding]):
        raise CheckpointError(
            f"{path} mixes tied and untied heads: config.json says tie_word_embeddings, but {head} has other numbers "
            f'than {embedding}.\nWrite  "tie_word_embeddings": false  into config.json to keep the stored head, or '
            "remove it from the weights"
        )
    return {name: info for name, info in tensors.items() if name != head}


def _same(path: Path, one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors agree in shape, type, and bytes of stretches spread evenly over them."""
    if (one.shape, one.dtype, one.nbytes) != (other.shape, other.dtype, other.nbytes):
        return False
    step = max(_STRETCH, one.nbytes // _STRETCHES)
    with (path / one.shard).open("rb") as first, (path / other.shard).open("rb") as second:
        for start in range(0, one.nbytes, step):
            length = min(_STRETCH, one.nbytes - start)
            first.seek(one.offset + start)
            second.seek(other.offset + start)
            if first.read(length) != second.read(length):
                return False
    return True
