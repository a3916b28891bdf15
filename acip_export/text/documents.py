"""Documents to calibrate or measure on: plain text, JSON lines, Parquet, a directory of them, a Hugging Face data set.

Read lazily and in a fixed order: files by path, rows as stored.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from acip_export.errors import DataError, MissingExtraError
from acip_export.io.inputs import open_input, read_input

_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = (".parquet",)
# What stands between columns.
_TABLES = {".csv": ",", ".tsv": "\t"}
_LARGEST_JSON = 2**30
# Fields that a message lists.
_MOST_SHOWN = 20
# What a directory is searched for; anything else in it (a README, an index) is no calibration text.
_IN_DIRECTORIES = (".txt", *_JSON_LINES, *_PARQUET)
_TEXT_FIELDS = ("text", "content")
_CHAT_FIELDS = ("messages", "conversations")
_DATASET_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%-]+))?")
_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Document:
    """One text, or one chat whose text the model's chat template makes.

    Attributes:
        content: text, or messages (dicts with ``role`` and ``content``). origin: where it was read, for messages to
            the user: a path, ``path:line`` or ``source, row N``.
    """

    content: str | Sequence[Mapping[str, Any]]
    origin: str


def read_documents(source: str | Path, field: str | None = None) -> Iterator[Document]:
    """The documents of ``source`` in order.

    Args:
        source: a file (``.jsonl`` or ``.ndjson``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``; else one plain text),
            a directory of ``*.txt``, ``*.jsonl``, ``*.ndjson`` and ``*.parquet``, or a data set
            ``owner/name[/config][:split]`` (split ``train`` unless given).
        field: of records. ``None``: the first of ``text``, ``content``, ``messages``, ``conversations`` that a record
            has. A field that holds a list is a chat.

    Raises:
        DataError: missing, unreadable, not UTF-8, a line that is no JSON object, a field that is missing or no text.
        MissingExtraError: Parquet or data sets without the packages that read them.
    """
    found = _find(source)
    if isinstance(found, re.Match):
        yield from _read_dataset(found, field)
        return
    for file in found:
        yield from _read_file(file, field)


def check_documents(source: str | Path) -> None:
    """Look whether the documents of ``source`` are there, before anything long is done for them.

    A data set is not looked for, and nothing is read.

    Raises:
        DataError: a file is missing or no file, or a directory holds none.
    """
    found = _find(source)
    for file in () if isinstance(found, re.Match) else found:
        _opened(file).close()


def _find(source: str | Path) -> list[Path] | re.Match[str]:
    """Return the files of a source, or the parts of a data set's name."""
    path = Path(source)
    try:
        is_directory, exists = path.is_dir(), path.exists()
    except OSError:  # a name may be too long: opening it says so
        return [path]
    if is_directory:
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _IN_DIRECTORIES and file.is_file())
        if not files:
            raise DataError(f"{path} holds no {', '.join('*' + suffix for suffix in _IN_DIRECTORIES)} file")
        return files
    named = _DATASET_ID.fullmatch(str(source))
    if not exists and named and path.suffix.lower() not in _IN_DIRECTORIES:
        return named
    return [path]


def _read_file(file: Path, field: str | None) -> Iterator[Document]:
    suffix = file.suffix.lower()
    try:
        if suffix in _PARQUET:
            yield from _read_parquet(file, field)
        elif suffix in _JSON_LINES:
            yield from _read_json_lines(file, field)
        elif suffix == ".json":
            yield from _read_json(file, field)
        elif suffix in _TABLES:
            yield from _read_table(file, field, _TABLES[suffix])
        elif field is not None:
            raise DataError(
                f"{file} is read as one plain text, which has no fields; leave out  --field, or name the file "
                ".jsonl, .json, .csv, .tsv or .parquet after what it holds"
            )
        else:
            with _opened(file) as stream, io.TextIOWrapper(stream, encoding="utf-8") as text:
                yield Document(text.read(), str(file))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _opened(file: Path) -> BinaryIO:
    missing = "; give a file, a directory or a Hugging Face data set; --data of a ranking may be  self"
    return open_input(file, DataError, missing)


def _read_json_lines(file: Path, field: str | None) -> Iterator[Document]:
    with _opened(file) as stream, io.TextIOWrapper(stream, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            origin = f"{file}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{origin}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{origin}: a {type(record).__name__}, expected a JSON object per line")
            yield _document(record, field, origin)


def _read_json(file: Path, field: str | None) -> Iterator[Document]:
    """An array of objects or texts, or objects one a line."""
    with _opened(file) as stream:
        array = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not array:
        yield from _read_json_lines(file, field)
        return
    try:
        records = json.loads(read_input(file, DataError, _LARGEST_JSON))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    for number, record in enumerate(records):
        origin = f"{file}: $[{number}]"
        if isinstance(record, str) and field is None:
            yield Document(record, origin)
        elif isinstance(record, dict):
            yield _document(record, field, origin)
        else:
            raise DataError(f"{origin}: a {type(record).__name__}, expected an object")


def _read_table(file: Path, field: str | None, delimiter: str) -> Iterator[Document]:
    """Columns under the names of the first line."""
    with _opened(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            column = names.index(_field_of(names, field, str(file)))
            for row in filter(None, rows):
                if len(row) != len(names):
                    raise DataError(f"{file}:{rows.line_num}: {len(row)} columns, expected {len(names)}")
                yield Document(row[column], f"{file}:{rows.line_num}")
        except csv.Error as error:
            raise DataError(f"{file}:{rows.line_num}: no table of columns: {error}") from error


def _read_parquet(file: Path, field: str | None) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data", "reading Parquet files") from None
    try:
        with _opened(file) as stream, parquet.ParquetFile(stream) as table:
            columns = table.schema_arrow.names
            # Only what is used: other columns may hold images or embeddings.
            wanted = _field_of(columns, field, str(file))
            row = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[wanted]):
                for value in batch.column(0).to_pylist():
                    yield _document({wanted: value}, wanted, f"{file}, row {row}")
                    row += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def _read_dataset(named: re.Match[str], field: str | None) -> Iterator[Document]:
    name, config, split = named["id"], named["config"], named["split"] or "train"
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data", f"reading the Hugging Face data set {name}") from None
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield _document(row, field, f"{name}, row {number}")
    except DataError:
        raise
    except Exception as error:  # hub, network and format errors of many kinds; all mean that the data is not here
        raise DataError(
            f"{named[0]} is no file or directory here, and as a Hugging Face data set it cannot be read: {error}\n"
            "Without a network give a local file or directory, or text of the model's own with  --data self"
        ) from error


def _field_of(names: Sequence[str], field: str | None, origin: str) -> str:
    if field is not None:
        if field in names:
            return field
        raise DataError(f"{origin}: no field {field!r}; it has {_listed(names)}")
    for name in (*_TEXT_FIELDS, *_CHAT_FIELDS):
        if name in names:
            return name
    raise DataError(f"{origin}: none of the usual text fields; choose with  --field  from {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    shown = [repr(name if len(name) <= 40 else f"{name[:40]}…") for name in names[:_MOST_SHOWN]]
    more = [f"{len(names) - _MOST_SHOWN} more"] if len(names) > _MOST_SHOWN else []
    return ", ".join(shown + more) or "none"


def _document(record: Mapping[str, Any], field: str | None, origin: str) -> Document:
    name = _field_of(list(record), field, origin)
    value = record[name]
    if isinstance(value, str):
        return Document(value, origin)
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return Document(value, origin)
    what = f"a {type(value).__name__}"
    if isinstance(value, list):
        what = "a list whose items are not all messages with 'role' and 'content'" if value else "an empty list"
    raise DataError(f"{origin}: field {name!r} holds {what}, expected text or a list of chat messages")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value
