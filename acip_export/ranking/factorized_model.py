"""Factorize the model in a basis, with the losses that statistics predict for its components."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from acip_export.artifacts.scores import FloatArray
from acip_export.lowrank.components import Components, component_dtype
from acip_export.lowrank.losses import ComponentLosses, dense_sensitivity, losses_of_energies
from acip_export.lowrank.whitening import Whitening
from acip_export.progress import Clock
from acip_export.ranking.config import Basis
from acip_export.ranking.context import RankContext
from acip_export.ranking.layer_memory import components_bytes
from acip_export.ranking.load import dense_weight
from acip_export.ranking.masked_linear import NO_ADAPTER, AdapterShape, MaskedLinear, replace_linear
from acip_export.ranking.sharding import by_block, shard_block, shard_rest
from acip_export.ranking.side_by_side import side_by_side
from acip_export.ranking.statistics import Statistics
from acip_export.ranking.stored_tensors import StoredTensors

Whitenings = tuple[Whitening | None, Whitening | None]

# What is kept of a module beside its pair of factors, as :meth:`_Factors.tensors` has it.
_VECTORS = ("singular", "drop", "up_sensitivity", "down_sensitivity", "sensitivity")


@dataclass(frozen=True)
class Factorized:
    """Hold what is known about a model whose linear layers are factorized; the factors are in a scratch file.

    Attributes:
        context, statistics: that the factors were made from.
        losses, singular, sensitivity, owners: by module name; the owner is the process that does the linear algebra of
            the module for all.
        whitenings: of a module's (inputs, gradients), made anew whenever they are asked for.
        mask_scale, adapter: of the layers that are made of the factors.
    """

    context: RankContext
    statistics: Statistics
    losses: Mapping[str, ComponentLosses]
    singular: Mapping[str, FloatArray]
    sensitivity: Mapping[str, float]
    whitenings: Callable[[str], Whitenings]
    owners: Mapping[str, int]
    mask_scale: float
    adapter: AdapterShape
    factors: StoredTensors

    @property
    def drop_losses(self) -> dict[str, npt.NDArray[np.float64]]:
        """The loss that the moments predict for dropping each component, (k,) by module."""
        return {name: losses.drop.numpy() for name, losses in self.losses.items()}

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Read the factors (out, k) and (k, in) of a module, in the dense weight's dtype."""
        return self.factors[f"{name}.up"], self.factors[f"{name}.down"]

    @cached_property
    def layers(self) -> dict[str, MaskedLinear]:
        """All layers, which take the places of the dense ones in the model; these are released one by one."""
        model, mesh = self.context.model, self.context.processes.mesh
        layers = {}
        for block, names in by_block(self.singular):
            for name in names:
                layers[name] = self._layer(name)
                replace_linear(model, name, layers[name])
            if mesh is not None:
                shard_block(model.get_submodule(block), mesh, [layers[name].down for name in names])
        if mesh is not None:
            shard_rest(model, mesh)
        return layers

    @property
    def whole(self) -> bool:
        """Whether :attr:`layers` were made: then the dense ones are gone."""
        return "layers" in self.__dict__

    @contextmanager
    def of_block(self, names: Sequence[str]) -> Iterator[dict[str, MaskedLinear]]:
        """Make some layers, for a moment; where all were made, these."""
        model = self.context.model
        if self.whole:
            yield {name: self.layers[name] for name in names}
            return
        dense = {name: model.get_submodule(name) for name in names}
        try:
            yield {name: self._layer(name) for name in names}
        finally:
            for name, layer in dense.items():
                replace_linear(model, name, layer)

    def _layer(self, name: str) -> MaskedLinear:
        dense = self.context.model.get_submodule(name)
        assert isinstance(dense, nn.Linear)  # load_model has checked it
        components = Components(*self.pair(name), torch.from_numpy(self.singular[name]))
        return MaskedLinear(components, dense, self.mask_scale, self.adapter)


@dataclass(frozen=True)
class _Factors:
    """Hold what is known about one module, as tensors that processes can send each other."""

    components: Components
    losses: ComponentLosses
    sensitivity: Tensor  # float64 scalar

    def tensors(self) -> tuple[Tensor, ...]:
        parts, losses = self.components, self.losses
        vectors = (losses.drop, losses.up_sensitivity, losses.down_sensitivity)
        return (parts.up, parts.down, parts.singular, *vectors, self.sensitivity)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> _Factors:
        return cls(Components(*tensors[:3]), ComponentLosses(*tensors[3:6]), tensors[6])

    @classmethod
    def empty(cls, weight: Tensor) -> _Factors:
        (out, inputs), dtype = weight.shape, component_dtype(weight)
        count = min(out, inputs)
        factors = [torch.empty(shape, dtype=dtype) for shape in ((out, count), (count, inputs), (count,))]
        return cls.of([*factors, *(torch.empty(shape, dtype=torch.float64) for shape in ((count,),) * 3 + ((),))])


def factorize_model(
    context: RankContext,
    statistics: Statistics,
    basis: Basis,
    mask_scale: float = 1.0,
    adapter: AdapterShape = NO_ADAPTER,
) -> Factorized:
    """Factorize every linear layer of the model.

    Each process factorizes its share for all. As many layers are factorized side by side as torch has threads and
    memory has room for, one thread each: an SVD gains little from more.
    """
    checkpoint, model, processes = context.checkpoint, context.model, context.processes
    losses, singular, sensitivity = {}, {}, {}
    work = context.work
    stored = StoredTensors(work.scratch("factors"))
    blocks = by_block(checkpoint.linear_modules)
    done = {name for block, names in blocks if _step(block) in work for name in names}
    clock = Clock("components", len(checkpoint.linear_modules), context.progress, done=len(done))

    owners = owners_of(checkpoint.linear_modules, statistics.input_keys, processes.count)
    own = [name for name in checkpoint.linear_modules if owners[name] == processes.index and name not in done]
    whitenings = _Whitenings(statistics, basis, own)

    def factorize(name: str) -> _Factors:
        weight = dense_weight(checkpoint, model, name)
        inputs, gradients = whitenings.moments(name)
        right, left = whitenings.wanted(inputs, gradients)
        components = context.factors.components(weight, right, left)
        whitenings.forget(name)
        # In a whitened basis, both energies are the singular value.
        up = components.singular if left else gradients.of_columns(components.up.double()).square().sum(0)
        down = components.singular if right else inputs.of_rows(components.down.double()).square().sum(1)
        diagonals = statistics.input_diagonal(name), statistics.gradient_diagonal(name)
        estimate = dense_sensitivity(weight, *diagonals)
        exact = statistics.sensitivity.get(name)
        rounding = 1.0 if exact is None else exact / estimate
        losses = losses_of_energies(components, (up.double(), down.double()), diagonals, rounding)
        return _Factors(components, losses, torch.tensor(estimate if exact is None else exact, dtype=torch.float64))

    largest = max((components_bytes(checkpoint.linear_modules[name]) for name in own), default=0)
    with closing(side_by_side(factorize, own, largest, ahead=processes.count > 1)) as factorized:
        for block, names in blocks:
            for name in names:
                if name in done:
                    losses[name], singular[name], sensitivity[name] = _known(name, stored)
                    continue
                dense = model.get_parameter(f"{name}.weight")
                mine = next(factorized)[1] if owners[name] == processes.index else _Factors.empty(dense)
                factors = _Factors.of([processes.from_owner(tensor, owners[name]) for tensor in mine.tensors()])
                losses[name], sensitivity[name] = factors.losses, float(factors.sensitivity)
                singular[name] = factors.components.singular.numpy()
                stored[f"{name}.up"] = factors.components.up.to(dense.dtype)
                stored[f"{name}.down"] = factors.components.down.to(dense.dtype)
                for kind, tensor in zip(_VECTORS, factors.tensors()[2:], strict=True):
                    stored[f"{name}.{kind}"] = tensor
                clock.advance()
            if _step(block) not in work:
                work.finish(_step(block))
    result = Factorized(
        context, statistics, losses, singular, sensitivity, whitenings, owners, mask_scale, adapter, stored
    )
    if processes.mesh is not None:
        _ = result.layers  # a model is sharded before anything is computed with it
    return result


def _step(block: str) -> str:
    return f"factors {block}"


def _known(name: str, stored: StoredTensors) -> tuple[ComponentLosses, FloatArray, float]:
    """Read losses, singular values and sensitivity of a module that was factorized before."""
    singular, *losses, sensitivity = (stored[f"{name}.{kind}"] for kind in _VECTORS)
    return ComponentLosses(*losses), singular.numpy(), float(sensitivity)


class _Whitenings:
    """Read moments when a module needs them; those of inputs that several of ``modules`` share are kept until all had
    them.
    """

    def __init__(self, statistics: Statistics, basis: Basis, modules: Sequence[str]) -> None:
        self.statistics, self.basis = statistics, basis
        self._shared: dict[str, Whitening] = {}
        self._wanting, self._lock = Counter(statistics.input_keys[name] for name in modules), Lock()

    def __call__(self, name: str) -> Whitenings:
        inputs, gradients = self.moments(name)
        self.forget(name)
        return self.wanted(inputs, gradients)

    def moments(self, name: str) -> tuple[Whitening, Whitening]:
        """Return those of inputs and output gradients, whatever the basis."""
        key = self.statistics.input_keys[name]
        # Two threads that come at the same time may both read it: that costs a read.
        inputs = self._shared.setdefault(key, self._shared.get(key) or self.statistics.inputs.whitening(key))
        return inputs, self.statistics.gradients.whitening(self.statistics.gradient_keys[name])

    def wanted(self, inputs: Whitening, gradients: Whitening) -> Whitenings:
        """Leave out what the basis makes no use of."""
        return (
            inputs if self.basis in ("input", "kfac") else None,
            gradients if self.basis == "kfac" else None,
        )

    def forget(self, name: str) -> None:
        """Give up what a module has shared, unless others want it still."""
        key = self.statistics.input_keys[name]
        with self._lock:
            self._wanting[key] -= 1
            if self._wanting[key] <= 0:
                self._shared.pop(key, None)


def owners_of(shapes: Mapping[str, tuple[int, int]], inputs: Mapping[str, str], count: int) -> dict[str, int]:
    """Choose the process that factorizes each module: shares of about equal work, in the modules' order, so that no
    process waits long for another. Modules that read the same input share its whitening, and so an owner.
    """
    work: dict[str, int] = {}
    for name, (out, columns) in shapes.items():
        # The roots of two moments, one of them shared, and an SVD, up to constants that are alike.
        work[inputs[name]] = work.get(inputs[name], columns**3) + out**3 + out * columns * min(out, columns)
    loads = [0] * count
    chosen = {}
    for key, amount in work.items():
        chosen[key] = loads.index(min(loads))
        loads[chosen[key]] += amount
    return {name: chosen[inputs[name]] for name in shapes}
