"""What an output may replace: nothing that the command reads, and nothing that acip-export did not write.

Every output of every command goes through :func:`claim_output`, before any heavy work. How files of one kind are
recognised stands beside the code that writes them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from acip_export.errors import OutputError, UsageError
from acip_export.io import atomic
from acip_export.io.locks import held, refuse_held

_HEAD = 65_536
# What a process that was killed while it wrote a file has left beside it: a file that was its lock, see locks.py, and a
# directory with what would have become the file, see atomic.py. Things of the other kind with these names are not ours.
_LOCK = re.compile(r"\.(.+)\.lock")
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class FileKind:
    """A kind of file that commands write.

    Attributes:
        name: with its article, for messages.
        head: pattern that the first 64 KiB of such a file match from their start, and nobody else's do.
    """

    name: str
    head: re.Pattern[bytes]

    def wrote(self, file: Path) -> bool:
        """Whether ``file`` is one of these. An empty one is taken for one: there is nothing to lose."""
        with file.open("rb") as stream:
            start = stream.read(_HEAD)
        return not start or self.head.match(start) is not None


def json_kind(name: str, artifact: str) -> FileKind:
    """JSON documents that begin with the key ``artifact``, as all of ours do."""
    return FileKind(name, re.compile(rb'\s*\{\s*"artifact"\s*:\s*"%b"' % re.escape(artifact.encode())))


def safetensors_kind(name: str, artifact: str) -> FileKind:
    """safetensors files whose metadata say ``artifact``."""
    return FileKind(name, re.compile(rb'(?s).{8}\{"__metadata__":\{.*"artifact":"%b"' % re.escape(artifact.encode())))


@dataclass(frozen=True)
class DirectoryKind:
    """A kind of directory that commands write.

    Attributes:
        name: with its article, for messages.
        contents: what a directory says that it holds, by path below it: files of so many bytes, or of a kind. Empty
            where it says nothing, because it is none of these.
        to_finish: what is missing of one, and the command that finishes it, given its path; empty: nothing.
    """

    name: str
    contents: Callable[[Path], Mapping[str, int | FileKind]]
    to_finish: Callable[[Path], str] = lambda _: ""


@dataclass(frozen=True)
class Output:
    """A place that may be written to.

    Attributes:
        named: as the user wrote it. place: where that is: links are followed, and stay.
        inputs, base: see :func:`claim_output`.
    """

    named: Path
    place: Path
    kind: FileKind | DirectoryKind
    force: bool
    inputs: tuple[Path, ...]
    base: Path | None

    def check(self) -> None:
        """Raises as :func:`claim_output`; called again before anything is replaced, which may be hours later."""
        try:
            self._check_inputs()
            with suppress(FileNotFoundError):
                self.place.lstat()
                self._check_replaced()
        except OSError as reason:
            raise OutputError(
                f"{self.named} cannot be written: {reason.strerror or reason}; choose another place with -o"
            ) from reason

    @contextmanager
    def new_file(self) -> Iterator[Path]:
        """Yield a temporary file that becomes this one; see :func:`acip_export.io.atomic.new_file`."""
        with self.held(), atomic.new_file(self.place, self.check) as temporary:
            yield temporary

    @contextmanager
    def new_directory(self) -> Iterator[Path]:
        """Yield a temporary directory that becomes this one; see :func:`acip_export.io.atomic.new_directory`."""
        with self.held(), atomic.new_directory(self.place, self.check) as temporary:
            yield temporary

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from writing here; what one that was killed has left is removed.

        Raises:
            UsageError, OutputError: see :func:`acip_export.io.locks.held` and :meth:`check`.
        """
        with held(self.place) as first:
            if first and atomic.remove_leftovers(self.place):
                self.check()
            yield

    def take(self, directory: Path) -> None:
        """Put ``directory``, which lies beside it, into its place; see :func:`acip_export.io.atomic.exchange`."""
        self.check()
        atomic.exchange(directory, self.place)

    def _check_inputs(self) -> None:
        around = {"the current directory": Path.cwd(), "your home directory": _home(), "what is read": self.base}
        for what, directory in around.items():
            if directory is not None and _holds(self.place, directory):
                self._refuse(f"is or contains {what}, {directory}")
        for read in self.inputs:
            if _same(self.place, read):
                self._refuse(f"is {read}, which is read")
            if _holds(self.place, read):
                self._refuse(f"contains {read}, which is read")
            # A directory that is read may be the one that everything lies in.
            shared = any(directory is not None and _holds(read, directory) for directory in around.values())
            if not shared and _is_directory(read) and _holds(read, self.place):
                self._refuse(f"lies inside {read}, which is read")
        if self.base is not None and self.place.suffix == ".safetensors" and _same(self.place.parent, self.base):
            self._refuse(f"would become a part of the model in {self.base}")

    def _check_replaced(self) -> None:
        if isinstance(self.kind, DirectoryKind) and self.place.is_dir() and not any(self.place.iterdir()):
            return
        foreign = self._foreign(self.kind)
        if foreign:
            self._refuse(f"already exists and {foreign}", "move it away, or choose another place")
        if self.force:
            return
        unfinished = self.kind.to_finish(self.named) if isinstance(self.kind, DirectoryKind) else ""
        if unfinished:
            raise UsageError(f"{self.named} already exists, {unfinished}\nor add --force to make it again")
        raise UsageError(f"{self.named} already exists; add --force to replace it, or choose another place with -o")

    def _foreign(self, kind: FileKind | DirectoryKind) -> str:
        """Why what is there may not be replaced; empty where it may."""
        place, ours = self.place, f"{kind.name} that acip-export wrote"
        if isinstance(kind, FileKind):
            return "" if place.is_file() and not place.is_symlink() and kind.wrote(place) else f"is not {ours}"
        if not place.is_dir():
            return f"is no directory, and not {ours}"
        foreign = _first_foreign(place, kind.contents(place))
        if foreign is None:
            return ""
        return f"holds {self.named / foreign.relative_to(place)}, which is no part of {ours}, or was changed"

    def _refuse(self, why: str, advice: str = "choose another place") -> None:
        at = "" if self.named.absolute() == self.place else f" ({self.place})"
        raise UsageError(f"{self.named}{at} {why}; {advice}")


def claim_output(
    out: Path,
    kind: FileKind | DirectoryKind,
    force: bool = False,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
    base: str | Path | None = None,
) -> Output:
    """Decide whether a command may write to ``out``, which is called before any heavy work.

    An output never is, contains or lies inside an input, and it never is or contains the current directory, the user's
    home, or ``base``. What is there already is replaced only with ``force``, and only if it is of the same kind and
    acip-export wrote all of it. An empty directory may be filled without.

    Args:
        inputs: what is read: files, and directories that are nobody's place to write to; ids may be among them.
        base: the directory that outputs may lie in although it is read: the model's, or that of a check.

    Raises:
        UsageError: it may not; the message names what stands in the way: another process, too.
        OutputError: it cannot be told.
    """
    try:
        named = tuple(_real(read) for read in inputs if read is not None)
        output = Output(out, _real(out), kind, force, named, None if base is None else _real(base))
    except (OSError, ValueError) as reason:
        raise OutputError(f"{out} cannot be written: {reason}; choose another place with -o") from reason
    output.check()
    refuse_held(output.place)
    return output


def sizes_below(directory: Path) -> dict[str, int]:
    """Bytes of every file below ``directory``, by path."""
    return {file.relative_to(directory).as_posix(): file.stat().st_size for file in sorted(_files_below(directory))}


def half_written(file: PurePath) -> str | None:
    """Return the file that a killed process was writing, if ``file`` is what it has left of that.

    Paths are relative to one directory. What is left is removed when the file is written again.
    """
    *folders, name = file.parts
    for at, folder in enumerate(folders):
        if written := _TEMPORARY.fullmatch(folder):
            return PurePath(*folders[:at], written[1]).as_posix()
    if written := _LOCK.fullmatch(name):
        return PurePath(*folders, written[1]).as_posix()
    return None


def _first_foreign(directory: Path, contents: Mapping[str, int | FileKind]) -> Path | None:
    """Something below ``directory`` that is not of its ``contents``: a file where there is one."""
    folders = {str(folder) for name in contents for folder in Path(name).parents}

    def unreadable(error: OSError) -> None:
        raise error

    def is_left(path: Path) -> bool:
        """Whether it is of a process that was killed while it wrote one of the files; of one that lives is refused."""
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            return False
        here = path.relative_to(directory)
        written = half_written(here / "any" if path.is_dir() else here)
        if written is None or not isinstance(contents.get(written), FileKind):
            return False
        refuse_held(directory / written)
        return True

    for folder, below, files in os.walk(directory, onerror=unreadable):
        here = Path(folder)
        if not os.access(here, os.W_OK | os.X_OK):
            raise PermissionError(0, f"nothing can be removed from {here}")
        for name in sorted(files):
            if is_left(here / name):
                continue
            if not _is_as_listed(here / name, contents.get(str((here / name).relative_to(directory).as_posix()))):
                return here / name
        below[:] = [name for name in below if not is_left(here / name)]
        for name in sorted(below):
            child = here / name
            if child.is_symlink() or child.relative_to(directory).as_posix() not in folders:
                return next(_files_below(child), child)
    return None


def _is_as_listed(file: Path, listed: int | FileKind | None) -> bool:
    if listed is None or file.is_symlink() or not file.is_file():
        return False
    return listed.wrote(file) if isinstance(listed, FileKind) else file.stat().st_size == listed


def _files_below(directory: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(directory):
        below.sort()
        yield from (Path(folder, name) for name in sorted(files))


def _real(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(path))


def _home() -> Path | None:
    try:
        return _real(Path.home())
    except RuntimeError:
        return None


def _is_directory(path: Path) -> bool:
    """Whether there is a directory; of a name that no file can have, whatever reads it says so."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _same(one: Path, other: Path) -> bool:
    """Whether two real paths are one place, hard links and names that differ in case included."""
    if one == other:
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False


def _holds(directory: Path, path: Path) -> bool:
    """Whether ``path`` is ``directory`` or lies below it."""
    return any(_same(directory, above) for above in (path, *path.parents))
