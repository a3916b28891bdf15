"""Calibration text of every kind: what is read, in which order, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from acip_export.errors import AcipError, DataError, MissingExtraError, UnsupportedError, UsageError
from acip_export.model.checkpoint import Checkpoint
from acip_export.ranking import DataConfig, rank_model
from acip_export.ranking.data import sample_data
from acip_export.ranking.load import load_model
from acip_export.text import packing, pieces
from acip_export.text.documents import read_documents
from acip_export.text.packing import pack_text
from tests.ranking.support import CALIBRATION, sharp_model
from tests.support import CORPUS

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It's 1,234.56."}]


def json_lines(file: Path, records: list[object]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def parquet(file: Path, columns: dict[str, list[object]]) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), file)
    return file


def with_template(model: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    return model


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(sharp_model(tmp_path_factory.mktemp("chat") / "model"))


def tokens_of(model: Path, *texts: str) -> list[int]:
    """What packing must give: the documents' own tokens with the end-of-text token between them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for text in texts:
        ids += ([tokenizer.eos_token_id] if ids else []) + tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_the_same_documents_give_the_same_windows_from_every_kind_of_file(chat_model: Path, tmp_path: Path) -> None:
    expected = tokens_of(chat_model, *CORPUS)
    expected = expected[: len(expected) // 8 * 8]
    sources = {
        "lines": json_lines(tmp_path / "a.jsonl", [{"id": i, "text": text} for i, text in enumerate(CORPUS)]),
        "parquet": parquet(tmp_path / "a.parquet", {"id": [*range(len(CORPUS))], "text": [*CORPUS]}),
        "directory": tmp_path / "directory",
    }
    for name, text in zip("abcde", CORPUS, strict=True):
        (tmp_path / "directory" / name).mkdir(parents=True)
        (tmp_path / "directory" / name / "part.txt").write_text(text, encoding="utf-8")
    (tmp_path / "directory" / "README.md").write_text("not calibration text")
    packed = {kind: pack_text(chat_model, source, 8) for kind, source in sources.items()}
    for found in packed.values():
        assert found.windows.flatten().tolist() == expected
        assert found.documents == len(CORPUS)
    assert len({found.sha256 for found in packed.values()}) == 1
    other = json_lines(tmp_path / "b.jsonl", [{"text": text} for text in reversed(CORPUS)])
    assert pack_text(chat_model, other, 8).sha256 != packed["lines"].sha256


def test_a_single_text_is_hashed_as_it_is(chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(CORPUS[1], encoding="utf-8")
    assert pack_text(chat_model, tmp_path / "text.txt", 8).sha256 == hashlib.sha256(CORPUS[1].encode()).hexdigest()


@pytest.mark.parametrize("field", ["messages", "prompt"])
def test_chats_go_through_the_models_template(chat_model: Path, tmp_path: Path, field: str) -> None:
    file = json_lines(tmp_path / "chat.jsonl", [{field: CHAT, "other": 3}, {field: CHAT}])
    one = "<user>What is it?\n<assistant>It's 1,234.56.\n"
    expected = tokens_of(chat_model, one, one)
    packed = pack_text(chat_model, file, 4, field=None if field == "messages" else field)
    assert packed.windows.flatten().tolist() == expected[: len(expected) // 4 * 4]


def test_a_long_document_is_tokenized_piece_by_piece(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same windows; what is read behind the most tokens is hashed and not tokenized."""
    text = "and so on, word after word\n" * 200
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    lengths, whole = [], packing._ids
    monkeypatch.setattr(packing, "_ids", lambda tokenizer, text: lengths.append(len(text)) or whole(tokenizer, text))
    monkeypatch.setattr(pieces, "_PIECE", 100)
    packed = pack_text(chat_model, tmp_path / "text.txt", 8)
    assert packed.windows.flatten().tolist() == tokens_of(chat_model, text)[: packed.tokens]
    assert sum(lengths) == len(text) and max(lengths) <= 200
    lengths.clear()
    first = pack_text(chat_model, tmp_path / "text.txt", 8, most_tokens=16)
    assert first.windows.flatten().tolist() == packed.windows.flatten().tolist()[:16]
    assert first.sha256 == packed.sha256 and len(lengths) == 1


def test_reading_stops_at_the_most_tokens(chat_model: Path, tmp_path: Path) -> None:
    file = json_lines(tmp_path / "a.jsonl", [{"text": CORPUS[1]}] * 50)
    with file.open("a") as lines:
        lines.write("this line is never reached\n")
    packed = pack_text(chat_model, file, 8, most_tokens=100)
    assert packed.tokens == 96 and packed.documents < 50


def lines(text: str) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        (directory / "data.jsonl").write_text(text, encoding="utf-8")
        return directory / "data.jsonl"

    return write


def raw(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        (directory / name).write_bytes(data)
        return directory / name

    return write


@pytest.mark.parametrize(
    ("make", "field", "error", "says"),
    [
        (lines('{"text": "a"}\n\nnonsense\n'), None, DataError, r"data\.jsonl:3: not JSON"),
        (lines("[1, 2]\n"), None, DataError, r"data\.jsonl:1: a list, expected a JSON object per line"),
        (lines('{"body": "a"}\n'), None, DataError, r"data\.jsonl:1: .*--field  from 'body'"),
        (lines('{"text": "a"}\n{"body": "a"}\n'), "text", DataError, r"data\.jsonl:2: no field 'text'; it has 'body'"),
        (lines('{"text": 3}\n'), None, DataError, r"data\.jsonl:1: field 'text' holds a int, expected text or a list"),
        (lines('{"messages": []}\n'), None, DataError, r"data\.jsonl:1: field 'messages' holds an empty list"),
        (lines('{"messages": [{"content": 1}]}\n'), None, DataError, r"not all messages with 'role' and 'content'"),
        (lines(""), None, DataError, "is empty"),
        (lines('{"text": " "}\n'), None, DataError, "is empty"),
        (lines('{"text": "too short"}\n'), None, DataError, r"tokens, at least 64 are needed"),
        (lines("[" * 100_000), None, DataError, r"data\.jsonl:1: not JSON"),
        (raw("a.txt", b"\xff\xfe"), None, DataError, "not UTF-8"),
        (raw("a.jsonl", b'{"text": "\xff"}\n'), None, DataError, "not UTF-8"),
        (raw("a.parquet", b"PAR1 but not really PAR1"), None, DataError, "cannot be read as Parquet"),
        (lambda d: parquet(d / "a.parquet", {"body": ["a"]}), None, DataError, "--field  from 'body'"),
        (lambda d: parquet(d / "a.parquet", {"text": ["a", None]}), None, DataError, r"a\.parquet, row 1: .*NoneType"),
        (lambda d: d / "missing.jsonl", None, DataError, "does not exist"),
        (lambda d: d / "no" / "such", None, DataError, "does not exist"),
        (lambda d: d, None, DataError, r"holds no \*\.txt"),
    ],
)
def test_bad_data(
    make: Callable[[Path], Path], field: str | None, error: type[AcipError], says: str, chat_model: Path, tmp_path: Path
) -> None:
    source = make(tmp_path)
    with pytest.raises(error, match=says):
        pack_text(chat_model, source, 8, least_windows=8, field=field)


def test_chats_need_a_template(model: Path, tmp_path: Path) -> None:
    file = json_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    with pytest.raises(UnsupportedError, match=r"chat\.jsonl:1 is a chat, but .* no chat template"):
        pack_text(model, file, 4)


def test_a_template_that_refuses_a_chat_is_named(tmp_path: Path) -> None:
    model = sharp_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    tokenizer.save_pretrained(model)
    with pytest.raises(DataError, match=r"chat\.jsonl:1: .*roles must alternate"):
        pack_text(model, json_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}]), 4)


def test_tokenizer_of_another_model(tmp_path: Path, text: Path) -> None:
    model = sharp_model(tmp_path / "model", vocab_size=300)
    with pytest.raises(DataError, match=r"gives token \d+, but the model has only 300 embeddings"):
        pack_text(model, text, 8)


def test_no_tokenizer(tmp_path: Path, text: Path) -> None:
    model = sharp_model(tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(DataError, match="no usable tokenizer"):
        pack_text(model, text, 8)


@pytest.mark.parametrize(
    ("package", "source"), [("pyarrow", "a.parquet"), ("datasets", "owner/name"), ("datasets", "owner/name/part:test")]
)
def test_missing_packages_say_what_to_install(
    package: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # what an import finds where the package is not installed
    with pytest.raises(MissingExtraError, match=r"acip-export\[data\]") as caught:
        next(read_documents(source))
    assert caught.value.exit_code == 7


def test_data_set_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = "from acip_export.text.documents import read_documents; next(read_documents('nobody/nothing'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "DataError: nobody/nothing is no file or directory here" in done.stderr
    assert "--data self" in done.stderr


def test_the_models_own_text_is_seeded_counted_and_likely(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    dense = load_model(checkpoint, torch.device("cpu"))
    config = DataConfig(context=32, self_tokens=65 * 32, curve_tokens=256)
    first, again = (sample_data(checkpoint, dense, config) for _ in range(2))
    assert first.text.tokens == 65 * 32 and first.text.source == "self"
    assert first.text.sha256 == again.text.sha256 and torch.equal(first.training, again.training)
    other = sample_data(checkpoint, dense, DataConfig(context=32, self_tokens=65 * 32, seed=1))
    assert other.text.sha256 != first.text.sha256

    def loss(windows: torch.Tensor) -> float:
        with torch.no_grad():
            logits = dense(input_ids=windows).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()

    # Sampled from the model, so as surprising to it as its own entropy says, which uniformly random tokens are not.
    with torch.no_grad():
        believed = torch.distributions.Categorical(logits=dense(input_ids=first.text.windows).logits[:, :-1]).entropy()
    assert believed.mean() < 0.98 * torch.tensor(512.0).log()  # or sampling uniformly would pass
    # The mean over 2,000 tokens: surprises deviate by about 2 nats, their mean by 0.05.
    assert loss(first.text.windows) == pytest.approx(believed.mean().item(), abs=0.2)
    random = torch.randint(512, first.text.windows.shape, generator=torch.Generator().manual_seed(0))
    assert loss(random) > believed.mean() + 0.3


def test_ranking_on_the_models_own_text(model: Path) -> None:
    calibration = DataConfig(context=32, statistics_tokens=1024, curve_tokens=256, self_tokens=2048)
    ranked = rank_model(model, "self", algorithm="kfac", calibration=calibration)
    assert ranked.data.source == "self" and ranked.data.tokens == 2048
    with pytest.raises(DataError, match=r"100 tokens of the model's own are asked for, at least 256"):
        rank_model(model, "self", algorithm="kfac", calibration=DataConfig(context=32, self_tokens=100))


def test_field_reaches_the_ranking(model: Path, text: Path, tmp_path: Path) -> None:
    content = text.read_text(encoding="utf-8")
    file = json_lines(tmp_path / "data.jsonl", [{"text": 1, "body": content}])
    ranked = rank_model(model, file, algorithm="magnitude", calibration=DataConfig(context=32, field="body"))
    assert ranked.algorithm["field"] == "body" and ranked.data.documents == 1
    assert ranked.data.sha256 == hashlib.sha256(content.encode()).hexdigest()
    assert CALIBRATION.field is None


def test_a_window_of_one_token_predicts_nothing() -> None:
    with pytest.raises(UsageError, match="at least 2 tokens"):
        DataConfig(context=1)


RECORDS = [{"n": number, "text": f'Line {number}, "quoted" and\nbroken.'} for number in range(3)]
QUOTED = [[str(record["n"]), '"{}"'.format(str(record["text"]).replace('"', '""'))] for record in RECORDS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(RECORDS)),
        ("b.json", " \n" + json.dumps([record["text"] for record in RECORDS])),
        ("c.json", "\n".join(map(json.dumps, RECORDS))),
        ("d.csv", "n,text\n" + "".join(f"{','.join(row)}\n" for row in QUOTED)),
        ("e.tsv", "\ufeffn\ttext\r\n" + "".join("\t".join(row) + "\r\n" for row in QUOTED)),
    ],
)
def test_arrays_and_tables_are_records(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode())
    for field in (None, "text") if name != "b.json" else (None,):
        found = [document.content for document in read_documents(tmp_path / name, field)]
        assert found == [record["text"] for record in RECORDS]


@pytest.mark.parametrize(
    ("name", "content", "field", "says"),
    [
        ("a.json", "[1]", None, r"a\.json: \$\[0\]: a int, expected an object"),
        ("a.json", "[" * 100_000, None, "not JSON"),
        ("a.json", json.dumps(RECORDS), "words", "no field 'words'; it has 'n', 'text'"),
        ("a.csv", "n,text\n1\n", None, r"a\.csv:2: 1 columns, expected 2"),
        ("a.csv", 'text\n"a\n', None, r"a\.csv:2: no table of columns: unexpected end of data"),
        ("a.csv", "", None, "none of the usual text fields"),
        ("a.txt", "plain", "text", "one plain text, which has no fields; leave out  --field"),
    ],
)
def test_bad_records(name: str, content: str, field: str | None, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=says):
        list(read_documents(tmp_path / name, field))
