"""Tokenizers and templates whose files disagree with themselves, each other, or with what runtimes do."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime_genai
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from acip_export.artifacts.plan import load_plan
from acip_export.errors import CheckpointError, InputError, UnsupportedError
from acip_export.model.chat_template import ChatTemplate
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.opening import check_checkpoint
from acip_export.model.tokenizer_files import resolved_normalizer
from acip_export.text.tokens import TextTokens
from converters.gguf.tokenizer import tokenizer_metadata
from converters.onnx.companion_files import small_files, tokenizer_notes
from converters.onnx.run_commands import run_commands
from converters.onnx.runtimes.chat import GenaiChatSession
from tests.encoders import make_encoder
from tests.gguf import tokenizers
from tests.model.test_config_layouts import planned_and_written
from tests.support import Run, make_model, make_scores

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(tmp_path_factory.mktemp("whole") / "model", **SIZES)
    make_scores(model)
    return model


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def added(number: object, content: object = "<new>") -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags}


BAD_TOKENS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "the number of a piece": (lambda d: d["added_tokens"].append(added(300)), "token 300 is .* and '<new>' among"),
    "no content": (lambda d: d["added_tokens"].append({"id": 600}), r"\$\.added_tokens\[2\] has no content"),
    "no number": (lambda d: d["added_tokens"].append({"content": "x"}), r"\$\.added_tokens\[2\] has no id"),
    "a number in words": (lambda d: d["added_tokens"].append(added("512")), r"\$\.added_tokens\[2\] has no id"),
    "a text": (lambda d: d["added_tokens"].append("x"), r"\$\.added_tokens\[2\] has no content"),
    "an object": (lambda d: d.update(added_tokens={"a": 1}), "expected a list of tokens"),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_added_tokens_are_checked_at_opening(case: str, model: Path) -> None:
    change, says = BAD_TOKENS[case]
    check_checkpoint(Checkpoint.open(model))
    edit(model / "tokenizer.json", change)
    with pytest.raises(CheckpointError, match=says):
        check_checkpoint(Checkpoint.open(model))


def test_a_clash_is_one_in_transformers_too(model: Path) -> None:
    """Which gives the added token another number than the file says."""
    edit(model / "tokenizer.json", lambda d: d["added_tokens"].append(added(300)))
    assert AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<new>") != 300


@pytest.mark.parametrize("template", [[1, 2], [{"name": "default"}], [{"name": 1, "template": "x"}], 7, {"a": "b"}])
def test_a_template_that_is_none(template: object, model: Path) -> None:
    edit(model / "tokenizer_config.json", lambda d: d.update(chat_template=template))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template is"):
        check_checkpoint(Checkpoint.open(model))


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BAD_TEMPLATES = {
    "does not parse": ("{% for m in messages %}{{ m[ }}", "unexpected"),
    "does not end": (ENDLESS, "longer than 5 s"),
    "multiplies": ("{{ 'x' * 1800000000 }}", "more than 256 MiB"),
    "doubles": (
        "{% set x = namespace(y='x' * 9999) %}{% for a in range(60) %}{% set x.y = x.y ~ x.y %}{% endfor %}{{ x.y }}",
        "more than 256 MiB",
    ),
    "refuses": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "reaches out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_a_bad_template_is_a_warning(case: str, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    template, says = BAD_TEMPLATES[case]
    (model / "chat_template.jinja").write_text(template)
    start = time.monotonic()
    check_checkpoint(Checkpoint.open(model))
    assert time.monotonic() - start < 30
    (warning,) = (record.getMessage() for record in caplog.records)
    assert says in warning and "can be exported, but not be talked to" in warning


def test_a_template_goes_on_after_what_it_refused() -> None:
    chat = ChatTemplate("{% if messages|length > 1 %}{{ 'x' * 1800000000 }}{% endif %}{{ messages[0].content }}")
    question = {"role": "user", "content": "Grüße 👋"}
    with pytest.raises(InputError):
        chat.render([question, question])
    assert chat.render([question]) == "Grüße 👋"


def test_templates_see_what_transformers_gives_them(model: Path) -> None:
    """Tools and documents are None, and defined: Mistral's and Llama 3.1's templates ask for both."""
    template = "{{ tools is defined }} {{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}"
    expected = AutoTokenizer.from_pretrained(model).apply_chat_template(
        [{"role": "user", "content": "x"}], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(template).render([{"role": "user", "content": "x"}]) == expected == "True True True True"


def test_a_module_in_the_models_directory_is_not_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "jinja2", "acip_export"):
        (model / f"{name}.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(model)
    assert ChatTemplate("{{ 1 + 1 }}").render([]) == "2"


# What stands in tokenizer_config.json, and what transformers makes of tokenizer.json with it.
SETTINGS = [{"strip_accents": False}, {"do_lower_case": False}, {"tokenize_chinese_chars": False}, {}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_bert_tokenizer_is_read_as_transformers_does(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert")
    edit(model / "tokenizer.json", lambda d: d["normalizer"].update(strip_accents=True, lowercase=True))
    options = {"tokenizer_class": name, "model_max_length": 48, **settings}
    (model / "tokenizer_config.json").write_text(json.dumps(options))
    made = resolved_normalizer(json.loads((model / "tokenizer.json").read_text()), options)
    text = "Große ÉCOLE naïve 汉字 e\u0301"
    (tmp_path / "made.json").write_text(json.dumps(made))
    found = Tokenizer.from_file(str(tmp_path / "made.json")).encode(text).ids
    assert found == AutoTokenizer.from_pretrained(model)(text)["input_ids"]


def test_exports_hold_the_tokenizer_of_transformers(tmp_path: Path, run: Run) -> None:
    model = make_encoder(tmp_path / "bert")
    make_scores(model)
    edit(model / "tokenizer_config.json", lambda d: d.update(strip_accents=False))
    flags = ("--model", model, "--budget", "50MB", "--no-verify")
    refused = run(*flags, "--format", "gguf", "-o", tmp_path / "gguf")
    assert refused.code == UnsupportedError.exit_code
    assert "strip_accents=False" in refused.err
    assert run(*flags, "--format", "onnx", "-o", tmp_path / "onnx").code == 0
    text = "Große ÉCOLE naïve"
    found = Tokenizer.from_file(str(tmp_path / "onnx/tokenizer.json")).encode(text).ids
    assert found == AutoTokenizer.from_pretrained(model)(text)["input_ids"]


def test_a_normalizer_that_genai_leaves_out_is_in_the_plan(model: Path, run: Run) -> None:
    flags = ("--model", model, "--budget", "50MB", "--format", "onnx", "--context", "64", "--types", "f32")
    assert json.loads(run(*flags, "--dry-run", "--json").out)["notes"]
    edit(model / "tokenizer.json", lambda d: d.update(normalizer={"type": "Lowercase"}))
    planned = json.loads(run(*flags, "--dry-run", "--json").out)
    assert any(
        "normalizes its input (Lowercase), which onnxruntime-genai does not" in note for note in planned["notes"]
    )
    # What the plan says does not fail the verification.
    done = run(*flags, "-o", model.parent / "out", "--json")
    assert done.code == 0, done.err


def test_unigram_with_bytes_is_refused_from_the_model_file(tmp_path: Path) -> None:
    """In tokenizer.json it was."""
    data = tokenizers.sentencepiece_model("unigram")
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)  # type: ignore[attr-defined]
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer_metadata(tmp_path, {}, tokenizers.VOCABULARY + 300)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=model.SentencePiece.BYTE)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match="no byte fallback"):
        tokenizer_metadata(tmp_path, {}, tokenizers.VOCABULARY + 300)


@pytest.mark.parametrize("flag", ["none", "single_word", "lstrip", "rstrip", "normalized"])
def test_added_tokens_that_runtimes_find_elsewhere(flag: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Said of a runtime where its tokens differ from transformers', and only there."""
    tokenizer = copy.deepcopy(tokenizers.sentencepiece_tokenizer("llama2"))
    flags = {"normalized": False, **({} if flag == "none" else {flag: True})}
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<odd>", **flags)])
    rows = len(tokenizer) + 8
    model = make_model(tmp_path / "model", tokenizer=tokenizer, vocab_size=rows, **SIZES)
    texts = ["a<odd>user", "a <odd> b", "x<odd>\nb"]
    wanted = [AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"] for text in texts]
    vocabulary = tokenizers.Vocabulary(tokenizer_metadata(model, {}, rows), tmp_path / "v.gguf")
    different = [vocabulary.tokenize(text) for text in texts] != wanted
    said = [message for message in caplog.messages if "llama.cpp finds some added tokens" in message]
    assert different == bool(said) == (flag != "none")
    assert all(f"{flag}: '<odd>'" in message for message in said)
    out = planned_and_written(model, "onnx", tmp_path / "onnx")
    genai = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(out)))
    genai.update_options(add_special_tokens="false")
    different = [list(map(int, genai.encode(text))) for text in texts] != wanted
    notes = tokenizer_notes(model)
    assert different == bool(notes) == (flag not in ("none", "rstrip"))
    assert all(f"{flag}: '<odd>'" in note for note in notes)


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def wrapping(*names: str) -> dict[str, Any]:
    """Of one text: ``A`` is the text, others are tokens by their texts; their ids are those of a Llama's tokenizer."""
    ids = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1}
    steps = [
        {"Sequence": {"id": name, "type_id": 0}} if name == "A" else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in names
    ]
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names if name != "A"}
    return {"type": "TemplateProcessing", "single": steps, "pair": steps, "special_tokens": special}


@pytest.mark.parametrize("begins", ["nothing", "bytes", "token", "bytes, token", "token, end"])
@pytest.mark.parametrize("options", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=["", "true", "false"])
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_texts_begin_as_in_transformers(begins: str, options: dict[str, bool], name: str, tmp_path: Path) -> None:
    """In what continues a text, and in the code that is printed; by its own judgement genai adds nothing."""
    first, end = "<|begin_of_text|>", "<|end_of_text|>"
    steps: dict[str, Any] = {
        "nothing": None,
        "bytes": BYTES,
        "token": wrapping(first, "A"),
        "bytes, token": {"type": "Sequence", "processors": [BYTES, wrapping(first, "A")]},
        "token, end": wrapping(first, "A", end),
    }
    model = make_model(tmp_path / "model", **SIZES)
    edit(model / "tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=steps[begins]))
    edit(model / "tokenizer_config.json", lambda settings: settings.update(tokenizer_class=name, **options))
    wanted = AutoTokenizer.from_pretrained(model)("def main")["input_ids"]
    assert (wanted[0] == 0) == ("token" in begins) and (wanted[-1] == 1) == ("end" in begins)
    prompt = [token for token in wanted if token != 1]
    assert TextTokens(model).encode("def main", begin=True) == prompt
    vocabulary = tokenizers.Vocabulary(tokenizer_metadata(model, {}, 512), tmp_path / "v.gguf")
    assert vocabulary.tokenize("def main", wrap=True) == wanted
    out = planned_and_written(model, "onnx", tmp_path / "onnx")
    assert AutoTokenizer.from_pretrained(out)("def main")["input_ids"] == wanted
    plan = load_plan(out / "plan.json")
    with GenaiChatSession(out, plan.serving, 1) as session:
        assert session.encode("def main", begin=True) == prompt
        assert session.encode("def main", begin=False) == [token for token in prompt if token != 0]
    known: dict[str, Any] = {}
    code = run_commands(plan, out)[0].text.replace("'Hello'", "'def main'")
    exec(code.partition("generator =")[0], known)  # what comes then generates
    found = [int(token) for token in known["tokenizer"].encode("def main")]
    assert found == (wanted if found[-1] == 1 else prompt)


def test_patterns_that_transformers_mends_in_mistrals_tokenizers(tmp_path: Path) -> None:
    """Everybody reads texts alike, or ranking refuses; what it says to type helps."""
    rows = 100_100
    model = make_model(tmp_path / "model", "mistral", torch.float16, vocab_size=rows, **SIZES)
    options, config, file = (model / name for name in ("tokenizer_config.json", "config.json", "tokenizer.json"))
    edit(file, lambda tokenizer: tokenizer["model"]["vocab"].update({f"filler{i}": i for i in range(512, rows)}))
    text = "HTTPServer camelCase 12345 don't 'S\n"

    def ids() -> list[int]:
        check_checkpoint(Checkpoint.open(model))
        read = TextTokens(model).encode(text, begin=False)
        vocabulary = tokenizers.Vocabulary(tokenizer_metadata(model, {}, rows), tmp_path / "v.gguf")
        assert read == vocabulary.tokenize(text)
        assert read == AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"]
        return read

    as_it_is = ids()  # of today's transformers
    edit(options, lambda settings: settings.update(fix_mistral_regex=True))
    assert ids() == as_it_is
    for version in ("4.57.1", None):
        edit(config, lambda settings, version=version: settings.update(transformers_version=version))
        with pytest.raises(CheckpointError, match=r"(?s)has fix_mistral_regex: .*save_pretrained\('\.'\)") as refused:
            ids()
    edit(options, lambda settings: settings.pop("fix_mistral_regex"))
    assert ids() == as_it_is
    edit(options, lambda settings: settings.update(fix_mistral_regex=True))
    code = str(refused.value).partition('python -c "')[2].rpartition('"')[0].replace("'.'", repr(str(model)))
    exec(code, {})
    assert ids() != as_it_is


def test_damaged_steps_are_named(model: Path) -> None:
    out = planned_and_written(model, "onnx", model.parent / "onnx")
    serving = load_plan(out / "plan.json").serving
    for steps in (["bos"], {"processors": "bos"}, {"single": [5]}):
        edit(model / "tokenizer.json", lambda tokenizer, steps=steps: tokenizer.update(post_processor=steps))
        with pytest.raises(CheckpointError, match="post_processor is malformed"):
            small_files(Checkpoint.open(model), serving)
