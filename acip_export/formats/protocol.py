"""What the rest of the program needs to know about a file format, as one object.

A package adds a format by offering an instance of :class:`ExportFormat` as an entry point of the group
``acip_export.formats``. Its module is imported for every command, so it imports nothing heavy: converters, runtimes and
torch are imported inside the methods that need them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from acip_export.artifacts.plan import Plan, Representation, Serving, TensorDecision, types_used
from acip_export.choices import instead_of
from acip_export.errors import UnsupportedError
from acip_export.installed import format_names, load_format
from acip_export.io.outputs import DirectoryKind
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.shape import ModelShape
from acip_export.progress import ProgressCallback
from acip_export.weight_types import WeightType

if TYPE_CHECKING:
    import torch

    from acip_export.artifacts.materialized import MaterializedModel
    from acip_export.rounding.quantizer import InputMoments

# The layout that stands for "the best predicted of all layouts that the runtime runs".
AUTO = "auto"
# The backend that a format's own fields describe.
DEFAULT_BACKEND = "cpu"


@dataclass(frozen=True)
class Layout:
    """One way to arrange a model in files.

    Attributes:
        low_rank: the representation that carries factor pairs; ``None`` when the layout has none.
        base_type: type of the all-zero base below a LoRA.
        rank_multiple: ranks are multiples of this (the largest block that the pair's types need is taken if larger).
        residual_pairs: types and ranks of low-rank corrections over a quantized base (both factors of one type).
        note: what a user has to know before choosing it.
    """

    name: str
    description: str
    low_rank: Representation | None
    base_type: str | None = None
    rank_multiple: int = 32
    residual_pairs: tuple[tuple[str, int], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Backend:
    """What computes inside a runtime, where that decides what the file may hold.

    Attributes:
        types, embedding_types, vector_type, cache_types, refused: as those of :class:`ExportFormat`.
    """

    name: str
    description: str
    types: tuple[str, ...]
    embedding_types: tuple[str, ...]
    vector_type: str
    cache_types: Mapping[str, tuple[int, int]]
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """A setting that only one format knows: a flag of the command line and a key of ``plan.options``.

    Attributes:
        name: the key; the flag has hyphens for underscores.
        parse: turns what the user typed into what the plan stores; raises UsageError.
    """

    name: str
    help: str
    metavar: str = "TEXT"
    parse: Callable[[str], str] = str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


@dataclass(frozen=True)
class Companion:
    """A second directory that can be made from a finished export, beside it: ``OUT-NAME``.

    Attributes:
        name: the flag that asks for it, and the end of the directory's name.
        kind: how one of ours is told from other directories.
        check: raises UnsupportedError when it cannot be made of files of these bytes.
        write: writes it from an export into a new directory (``force``: in place of an old one); bytes by file.
    """

    name: str
    help: str
    kind: DirectoryKind
    check: Callable[[Mapping[str, int]], None]
    write: Callable[[Path, Path, bool], dict[str, int]]


@dataclass(frozen=True)
class SessionClass:
    """A runtime that opens exports, named so that it is imported only where it runs.

    Attributes:
        runtime: the name under which its memory is known to the format's memory model.
        module, name: of a class that is called with an export's directory and its serving settings; see
            :mod:`acip_export.formats.session`.
        own_threads: it takes one for every core, whatever ``OMP_NUM_THREADS`` says.
    """

    runtime: str
    module: str
    name: str
    own_threads: bool = False

    def open(self, export: Path, serving: Serving) -> Any:
        """Import the class and open an export with it."""
        return getattr(import_module(self.module), self.name)(export, serving)


# What printed programs ask a chat model.
EXAMPLE_QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class RunCommand:
    """How one program runs an export.

    Attributes:
        program: its name. language: of ``text``, as Markdown's fences call it: console, python, javascript, dockerfile.
        text: ready to copy. note: what else the program needs, or an empty string.
    """

    program: str
    language: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Hole:
    """Bytes that a process has let go of and still holds, where the weights have made room for them on the heap.

    Attributes:
        nbytes: 0 where there is none, whatever the weights.
        least: the smallest :attr:`TensorMemory.heap_block` that makes it.
    """

    nbytes: int = 0
    least: int = 0

    def left_by(self, heap_block: int) -> int:
        """Return its bytes where ``heap_block`` is the largest of all tensors."""
        return self.nbytes if heap_block >= self.least else 0


@dataclass(frozen=True)
class ServingMemory:
    """Bytes that a runtime holds beside the weights for one sequence of the whole context.

    Attributes:
        hole: depends on the weights as well, and is not in the total.
    """

    kv_cache: int
    compute: int
    output: int
    hole: Hole = Hole()

    @property
    def total(self) -> int:
        return self.kv_cache + self.compute + self.output


@dataclass(frozen=True)
class TensorMemory:
    """Bytes that a runtime holds of one tensor beside its stored numbers.

    Attributes:
        kept: for as long as the model is loaded.
        once: held once, for the tensor that needs most of it.
        loading: held once while loading, for the tensor that needs most of it.
        heap_block: the largest block that loading gives back to the heap: later ones up to its size are made there, and
            not in memory of their own, which would go back to the system as a whole.
    """

    kept: int = 0
    once: int = 0
    loading: int = 0
    heap_block: int = 0


# Threads of a runtime whose memory plans count.
COUNTED_THREADS = 2


@dataclass(frozen=True)
class ProcessBase:
    """Bytes of a process beside the model's own.

    Attributes:
        library: code, sessions and allocators: everything that no model changes.
        tokenizer: its tables. building: what they take while they are built, themselves included.
        heap: of ``library`` what the system cannot drop: all but code and constants, which it can read again.
        holes: whether it leaves a :class:`Hole`.
    """

    library: int
    tokenizer: int
    building: int
    heap: int
    holes: bool = False

    @property
    def total(self) -> int:
        return self.library + self.tokenizer


class MemoryModel(Protocol):
    """What a format's runtimes hold, in bytes. Pure formulas, upper bounds."""

    def serving(self, shape: ModelShape, serving: Serving) -> ServingMemory:
        """Return cache and buffers for one sequence of ``serving.context`` tokens."""
        ...

    def beside(self, decision: TensorDecision, embedding: bool, tied_head: bool) -> TensorMemory:
        """Return what is held of a tensor beside its stored numbers.

        Args:
            embedding: rows of the tensor are looked up. tied_head: and the head reads it too.
        """
        ...

    def anonymous(self, decision: TensorDecision, embedding: bool, tied_head: bool) -> TensorMemory:
        """Return what is held of a tensor in memory that no file backs, so that the system cannot drop it.

        Copies of its stored numbers count, numbers that are read where the file is mapped do not; never more than
        the stored numbers and what is held beside them. Arguments as of :meth:`beside`.
        """
        ...

    def thread(self, shape: ModelShape, serving: Serving, tensors: Sequence[TensorDecision]) -> int:
        """Return what each thread beyond :data:`COUNTED_THREADS` takes; the system cannot drop it.

        No plan counts it, which does not know how many there will be; where a process is measured, that is known.
        """
        ...

    def process(self, checkpoint: Checkpoint, runtime: str | None = None) -> ProcessBase:
        """Return what a runtime holds whatever the plan; ``None``: the one that plans are made for."""
        ...


@dataclass(frozen=True)
class TensorLimit:
    """The largest tensor that a file of the user's choosing can hold.

    Attributes:
        nbytes: of the tensor. reason: why a type is refused that makes a tensor larger.
        too_small: the message when nothing is left of a tensor; called with its name and its least bytes.
    """

    nbytes: int
    reason: str
    too_small: Callable[[str, int], str]


def longest_context(shape: ModelShape, applies_window: bool) -> int:
    """Return the tokens up to which a runtime computes what the model does.

    One that does not apply a model's sliding window attends to everything: the same only within the window.
    """
    if shape.sliding_window is None or applies_window:
        return shape.max_context
    return min(shape.max_context, shape.sliding_window)


@dataclass(frozen=True)
class ExportFormat(ABC):
    """A file format: what plans may choose, what runs it, what it costs, and how it is written.

    The fields describe the default backend; :meth:`on` gives the format as another backend has it.

    Attributes:
        weight_types: every type that it can store, most precise first.
        types: names of those that a plan chooses from when the user names none, most precise first.
        embedding_types: types that the embedding (and a head tied to it) may take.
        narrow_types: types with smaller blocks, which join the default ones for rows that not all of those fit.
        vector_type: type of norms and biases.
        cache_types: bytes of the numbers of a KV cache as ``(numerator, denominator)``; the first is the default.
        cache_in_file: what is written has one type of KV cache; otherwise it is opened with any.
        own_caches: types of programs that make the cache themselves, as web pages do; empty: any type.
        layouts: the first is the default.
        runtimes: the layouts that each runtime runs, its default first; the first runtime is the default.
        float_tolerance: how far logits of an export with float weights may be from the bundle's.
        float_kl: or how far its predictions may be, in nats per token, where the runtime rounds its cache.
        sessions: runtimes of language models; the first one measures quality. encoder_session: that of encoders.
        chats: runtimes that hold conversations, in the order in which they are tried; classes that are called with the
            number of threads as well; see :class:`acip_export.formats.session.ChatSession`.
        memory: what its runtimes hold.
        feedback_types: types that :meth:`round_trip` rounds with error feedback, where it is given a factor for it.
        tunable_types: types whose blocks :meth:`round_trip` multiplies by gains, where it is given some.
        refused: types that what runs the format has no kernel for, and why that matters.
        library, tags: of model cards.
    """

    name: str
    description: str
    weight_types: tuple[WeightType, ...]
    types: tuple[str, ...]
    embedding_types: tuple[str, ...]
    vector_type: str
    cache_types: Mapping[str, tuple[int, int]]
    layouts: tuple[Layout, ...]
    runtimes: Mapping[str, tuple[str, ...]]
    float_tolerance: float
    sessions: tuple[SessionClass, ...]
    memory: MemoryModel
    encoder_session: SessionClass | None = None
    chats: tuple[SessionClass, ...] = ()
    float_kl: float | None = None
    cache_in_file: bool = False
    own_caches: frozenset[str] = frozenset()
    narrow_types: tuple[str, ...] = ()
    backends: tuple[Backend, ...] = ()
    feedback_types: frozenset[str] = frozenset()
    tunable_types: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    options: tuple[Option, ...] = ()
    companions: tuple[Companion, ...] = ()
    library: str = ""
    tags: tuple[str, ...] = ()

    # What a plan may choose.

    def on(self, backend: str | None) -> ExportFormat:
        """Return the format as one backend has it; ``None``: the default.

        Raises:
            UnsupportedError: no such backend.
        """
        if backend is None or backend == DEFAULT_BACKEND:
            return self
        for known in self.backends:
            if known.name == backend:
                return replace(
                    self,
                    types=known.types,
                    embedding_types=known.embedding_types,
                    narrow_types=(),
                    vector_type=known.vector_type,
                    cache_types=known.cache_types,
                    refused=known.refused,
                )
        names = self.backend_names or (DEFAULT_BACKEND,)
        raise UnsupportedError(f"{self.name} has no backend {backend!r}; {instead_of(backend, names)}")

    @property
    def backend_names(self) -> tuple[str, ...]:
        """What ``--backend`` takes, the default first; empty where there is no choice."""
        return (DEFAULT_BACKEND, *(known.name for known in self.backends)) if self.backends else ()

    @property
    def timed_runtimes(self) -> tuple[str, ...]:
        """Runtimes of language models whose speed plans predict, by name: what people talk to first."""
        return tuple(dict.fromkeys(session.runtime for session in (*self.chats, *self.sessions)))

    def type(self, name: str) -> WeightType:
        """Return a type by name. Raises KeyError for one that the format does not have."""
        for known in self.weight_types:
            if known.name == name:
                return known
        raise KeyError(name)

    def layout(self, name: str | None) -> Layout:
        """Return a layout by name; ``None``: the default. Raises UnsupportedError for one that the format has not."""
        if name is None:
            return self.layouts[0]
        for layout in self.layouts:
            if layout.name == name:
                return layout
        known = instead_of(name, (*(layout.name for layout in self.layouts), AUTO))
        raise UnsupportedError(f"{self.name} has no layout {name!r}; {known}")

    def layouts_for(self, layout: str | None, runtime: str | None) -> tuple[Layout, ...]:
        """Return the layouts to plan for: the named one, or with ``auto`` every one that the runtime runs.

        Without a runtime, a named layout may be any; otherwise it is the default runtime.

        Raises:
            UnsupportedError: no such layout or runtime, or that runtime does not run that layout.
        """
        if runtime is not None and runtime not in self.runtimes:
            raise UnsupportedError(f"{self.name} has no runtime {runtime!r}; {instead_of(runtime, self.runtimes)}")
        runs = self.runtimes[runtime or next(iter(self.runtimes))]
        if layout == AUTO:
            return tuple(self.layout(name) for name in runs)
        chosen = self.layout(layout or runs[0])
        if runtime is not None and chosen.name not in runs:
            others = [name for name, layouts in self.runtimes.items() if chosen.name in layouts]
            raise UnsupportedError(
                f"{runtime} does not run the layout {chosen.name!r}; choose  --runtime {' or '.join(others)}"
            )
        return (chosen,)

    def check_options(self, options: Mapping[str, str]) -> None:
        """Raise UnsupportedError for an option that the format does not have."""
        known = {option.name for option in self.options}
        for name in options:
            if name not in known:
                raise UnsupportedError(f"{self.name} exports have no --{name.replace('_', '-')}")

    def unknown_types(self, options: Mapping[str, str]) -> Mapping[str, str]:  # noqa: ARG002 - for types with a release
        """Return the types that what runs the export does not know, by the user's options, and why."""
        return {}

    def without(self, types: Mapping[str, str]) -> ExportFormat:
        """Return the format without some types: nobody chooses them, and who names one is told why it is refused."""
        if not types:
            return self
        lists = self.types, self.narrow_types, self.embedding_types
        kept = [tuple(name for name in names if name not in types) for names in lists]
        return replace(
            self, types=kept[0], narrow_types=kept[1], embedding_types=kept[2], refused={**self.refused, **types}
        )

    def choose_types(self, names: tuple[str, ...]) -> tuple[WeightType, ...]:
        """Return the types that the user named, or the default ones.

        Raises:
            UnsupportedError: unknown names, and types without a kernel.
        """
        # A graph computes in one precision, so types of the other one are not to be had.
        items = {self.type(name).item_bytes for name in self.types}
        known = [t.name for t in self.weight_types if t.item_bytes in items and t.name not in self.refused]
        for name in names:
            if name in self.refused:
                raise UnsupportedError(f"{name} is not exported: {self.refused[name]}. Use: {', '.join(known)}")
            if name not in known:
                others = self._others_with(name)
                if others:
                    raise UnsupportedError(
                        f"{name!r} is no type of {self.name}, but of {' and '.join(others)}:  --format {others[0]}\n"
                        f"{self.name} has: {', '.join(known)}"
                    )
                raise UnsupportedError(f"{self.name} has no type {name!r} here; {instead_of(name, known)}")
        return tuple(self.type(name) for name in (names or self.types))

    def _others_with(self, type_name: str) -> list[str]:
        """Return the other formats that export a type; none where only the backend is in its way here."""
        if any(each.name == type_name for each in self.weight_types):
            return []
        others: list[ExportFormat] = [load_format(name) for name in format_names() if name != self.name]
        return [
            other.name
            for other in others
            if type_name not in other.refused and type_name in {each.name for each in other.weight_types}
        ]

    def applies_window(self, shape: ModelShape) -> bool:  # noqa: ARG002 - for runtimes that know only some
        """Tell whether the runtime applies the model's sliding window, if there is one."""
        return True

    def longest_context(self, shape: ModelShape) -> int:
        """Return the tokens up to which the runtime computes what the model does."""
        return longest_context(shape, self.applies_window(shape))

    def refused_cache(self, checkpoint: Checkpoint, keys: str, values: str) -> str | None:  # noqa: ARG002
        """Return why the runtime has no KV cache of these types for a model, and what is possible."""
        return None if keys == values else f"{self.name} keeps keys and values in one type"

    def made_by_programs(self, keys: str, values: str) -> bool:
        """Tell whether programs that make the KV cache themselves, as web pages do, make one of these types."""
        return not self.own_caches or self.own_caches.issuperset((keys, values))

    def serving_notes(self, serving: Serving) -> tuple[str, ...]:  # noqa: ARG002
        """Return what a user has to know of what an export is opened with, a sentence each."""
        return ()

    def tensor_limit(self, options: Mapping[str, str]) -> TensorLimit | None:  # noqa: ARG002 - for formats that split
        """Return the limit that the user's options put on a tensor; ``None``: none."""
        return None

    def type_notes(self, types: Collection[str], options: Mapping[str, str]) -> tuple[str, ...]:  # noqa: ARG002
        """Return what a user has to know of an export with matrices of these types, a sentence each."""
        return ()

    def file_notes(self, files: Mapping[str, int], options: Mapping[str, str]) -> tuple[str, ...]:  # noqa: ARG002
        """Return what a user has to know about files of these bytes, a sentence each."""
        return ()

    def is_exact(self, plan: Plan) -> bool:
        """Tell whether a plan keeps all numbers: every matrix, but for those of an all-zero base, and the KV cache."""
        used = types_used(plan.tensors) - {self.layout(plan.layout).base_type}
        return all(self.type(name).relative_mse == 0 for name in used)

    # How it is written. Prediction and conversion go through the same code for names, metadata and order, so that the
    # prediction cannot drift from what is written.

    def check_model(self, checkpoint: Checkpoint) -> None:  # noqa: B027
        """Refuse a model of which this format can hold no export, whatever is planned. A ranking asks before it starts.

        What no format can hold is refused by :func:`acip_export.model.opening.check_checkpoint`.

        Raises:
            UnsupportedError, CheckpointError, MissingExtraError: as :meth:`predict_files`.
        """

    def prepare(
        self,
        checkpoint: Checkpoint,  # noqa: ARG002
        backend: str,  # noqa: ARG002
        context: int,  # noqa: ARG002
        progress: ProgressCallback,  # noqa: ARG002
    ) -> tuple[str, ...]:
        """Do what takes long and is the same for all plans of a model, and keep it for the next time.

        Returns:
            What a user has to know about exports of this model, a sentence each.

        Raises:
            UnsupportedError, MissingExtraError: as :meth:`predict_files`.
        """
        return ()

    @abstractmethod
    def predict_files(
        self, checkpoint: Checkpoint, layout: str, tensors: tuple[TensorDecision, ...], serving: Serving
    ) -> dict[str, int]:
        """Return the exact bytes of every file that :meth:`convert` will write, by path below the export directory.

        Raises:
            UnsupportedError: the architecture, tokenizer or a decision cannot be expressed.
            MissingExtraError: a package that the prediction needs is not installed.
        """

    @abstractmethod
    def convert(self, model: MaterializedModel, out: Path, progress: ProgressCallback) -> None:
        """Write the export into the existing, empty directory ``out``. Peak memory: a few of the largest tensor.

        Raises:
            UnsupportedError, MissingExtraError: as :meth:`predict_files`.
        """

    def imitate(
        self,
        checkpoint: Checkpoint,  # noqa: ARG002
        layout: str,  # noqa: ARG002
        tensors: tuple[TensorDecision, ...],  # noqa: ARG002
        serving: Serving,  # noqa: ARG002
        out: Path,  # noqa: ARG002
    ) -> None:
        """Write an export with any numbers, in no time, into the existing, empty directory ``out``: to measure speed.

        Raises:
            UnsupportedError, MissingExtraError: as :meth:`predict_files`; this format's speed cannot be measured.
        """
        raise UnsupportedError(f"the speed of {self.name} cannot be measured without a model")

    @abstractmethod
    def round_trip(self, weight: torch.Tensor, name: str, inputs: InputMoments | None) -> torch.Tensor:
        """Return the numbers that :meth:`convert` stores, as the runtime reads them.

        See :class:`acip_export.rounding.quantizer.RoundTrip`.
        """

    @abstractmethod
    def quantizer(self) -> str:
        """Return name and version of what :meth:`round_trip` rounds with: measured errors are good for no other."""

    # What is done with it.

    @abstractmethod
    def missing_tensors(self, export: Path, model: MaterializedModel) -> tuple[int, Sequence[str]]:
        """Return how many tensors the plan asks for, and one sentence for each that is not there as planned.

        Raises:
            ModelFileError: a file cannot be read.
        """

    def chat_template(self, export: Path) -> str | None:  # noqa: ARG002 - for formats that carry one
        """Return the chat template of a finished export, in Jinja; ``None``: it has none.

        Raises:
            InputError: the file that holds it cannot be read.
        """
        return None

    @abstractmethod
    def run_commands(self, plan: Plan, directory: Path, template: str | None = None) -> tuple[RunCommand, ...]:
        """Return how every program runs the export within the plan's memory; the recommended one first.

        Args:
            directory: as the text names it. template: of chats, by which the programs are then told to write.
        """

    def server(
        self,
        plan: Plan,  # noqa: ARG002 - for formats that have one
        export: Path,
        host: str,  # noqa: ARG002
        port: int,  # noqa: ARG002
        program: str | None,  # noqa: ARG002
    ) -> tuple[str, ...]:
        """Return the command that serves the export over HTTP with the plan's settings.

        Args:
            program: the server's executable, in place of the one that is found.

        Raises:
            UnsupportedError: the runtime has no server, or none that runs this layout. MissingExtraError: none is here.
        """
        raise UnsupportedError(
            f"what runs {self.name} has no server of its own; talk to it with  acip-export chat {export},  or export "
            "with  --format gguf"
        )
