"""Models larger than one device: of each block's matrices, every process holds a part (FSDP, arXiv 2304.11277).

torch's ``fully_shard`` puts the matrices of a block together for the moment in which it computes. They are frozen, so
it has no gradients to reduce: masks, adapters, norms and biases stay whole in every process, and the gradients of the
first two are averaged as they are without sharding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from acip_export.errors import UnsupportedError
from acip_export.model.tensor_names import block_of


def by_block(modules: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Modules in a model's order, by the numbered block that they are in."""

    def block(name: str) -> str:
        found = block_of(name)
        assert found is not None  # Checkpoint.linear_modules are in numbered blocks
        return found

    return [(name, list(members)) for name, members in groupby(modules, block)]


def shard_dense(model: nn.Module, modules: Iterable[str], mesh: DeviceMesh) -> None:
    """Shard a model on the host whose linear layers in blocks are ``modules``; what is left of it is on the device."""
    for block, _ in by_block(modules):
        shard_block(model.get_submodule(block), mesh)
    shard_rest(model, mesh)


def shard_block(block: nn.Module, mesh: DeviceMesh, by_column: Collection[Tensor] = ()) -> None:
    """Keep this process's part of the frozen matrices, on its device: rows, or columns of those in ``by_column``.

    Raises:
        UnsupportedError: columns that the processes cannot share equally.
    """
    from torch.distributed.fsdp import fully_shard

    columns = {id(matrix) for matrix in by_column}
    for matrix in by_column:
        if matrix.shape[1] % mesh.size():
            raise UnsupportedError(
                f"{mesh.size()} processes cannot shard a layer of {matrix.shape[1]} inputs equally; "
                "launch a number of processes that divides it"
            )

    def placed(parameter: nn.Parameter) -> Shard:
        return Shard(1 if id(parameter) in columns else 0)

    whole = {p for p in block.parameters() if (p.requires_grad or p.ndim < 2) and not isinstance(p, DTensor)}
    for tensor in (*whole, *block.buffers()):
        tensor.data = tensor.data.to(mesh.device_type)
    fully_shard(block, mesh=mesh, shard_placement_fn=placed, ignored_params=whole)


def shard_rest(model: nn.Module, mesh: DeviceMesh) -> None:
    """Embedding and head, once all blocks are sharded."""
    shard_block(model, mesh)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same storage; all of it where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is sharded, all processes have to ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What of ``tensor``, whole and sharded as ``like`` is, this process holds."""
    if not isinstance(like, DTensor):
        return tensor
    (placement,) = like.placements
    assert isinstance(placement, Shard)
    parts = torch.chunk(tensor, like.device_mesh.size(), placement.dim)
    rank = like.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else tensor.narrow(placement.dim, 0, 0)
