"""A Hugging Face model directory, read lazily: shapes without torch, weights one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from acip_export.errors import CheckpointError
from acip_export.finite import is_finite
from acip_export.io.atomic import read_json_object, safetensors_header
from acip_export.io.frozen import frozen, thawed
from acip_export.io.stamps import Stamp, stamp_of
from acip_export.model.config_fields import check_config
from acip_export.model.encoder import Encoder, encoder_of, is_encoder, kind_of
from acip_export.model.shape import ModelShape, model_shape, ties_head
from acip_export.model.stored_names import stored_names
from acip_export.model.tensor_info import TensorInfo
from acip_export.model.tensor_names import layer_of, natural_key
from acip_export.model.tied_head import without_repeated_head
from acip_export.model.tokenizer_size import TokenizerSize, tokenizer_size
from acip_export.model.weights_hash import weights_sha256

if TYPE_CHECKING:
    import torch

# Config keys that say who wrote the file, not what the model is.
_VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version", "_commit_hash")
_FINGERPRINT_SAMPLE = 4096
_WEIGHTS_FILE = "model.safetensors"
_PART = re.compile(r"-\d+-of-\d+\.safetensors$")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


class Checkpoint:
    """An opened model directory. Holds no weights.

    Attributes:
        path: the directory.
        config: ``config.json`` as read; nothing can write into it.
        tensors: every tensor of every shard, by Hugging Face name.
        options: what the user told a format beyond what the directory says.
        stamps: what the files of the tensors were like when they were opened, by name.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        options: Mapping[str, str] = MappingProxyType({}),
        stamps: Mapping[str, Stamp | None] | None = None,
    ) -> None:
        self.path = path
        self.config: Mapping[str, Any] = frozen(config)
        self.tensors = tensors
        self.options = options
        self.stamps = stamps or {shard: stamp_of(path / shard) for shard in {info.shard for info in tensors.values()}}
        self._checked: set[str] = set()

    @classmethod
    def open(cls, model: str | os.PathLike[str], revision: str | None = None, token: str | None = None) -> Checkpoint:
        """Open a local directory, or a Hugging Face id (downloaded through ``huggingface_hub``).

        Args:
            revision: branch, tag or commit of an id. token: for a private one; both are the hub's own.

        Raises:
            CheckpointError: not a model directory, damaged shards, an id that cannot be fetched, or a stored head with
                other numbers than the embedding that the config ties it to.
        """
        path = Path(model)
        if not path.is_dir():
            path = _download(str(model), revision, token)
        config = _read_config(path)
        tensors = {name: info for name, info in _read_index(path).items() if not _unused(config, name)}
        if not is_encoder(config):
            tensors = _by_todays_names(config, tensors)
        return cls(path, config, without_repeated_head(path, tensors) if ties_head(config) else tensors)

    def with_options(self, options: Mapping[str, str]) -> Checkpoint:
        return Checkpoint(self.path, self.config, self.tensors, options, self.stamps)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def linear_modules(self) -> dict[str, tuple[int, int]]:
        """``{module name: (out, in)}`` of every linear layer inside a numbered block, in checkpoint order of depth.

        Embeddings, the head and everything outside the repeated blocks are not compressed (ACIP, section 4).
        """
        found = {
            name.removesuffix(".weight"): (info.shape[0], info.shape[1])
            for name, info in self.tensors.items()
            if name.endswith(".weight") and len(info.shape) == 2 and layer_of(name) is not None
        }
        return dict(sorted(found.items(), key=lambda item: natural_key(item[0])))

    @cached_property
    def shape(self) -> ModelShape:
        return model_shape(self.config, self.path)

    @cached_property
    def encoder(self) -> Encoder | None:
        """What it is if it is an encoder; raises as :func:`encoder_of`."""
        return encoder_of(self.config, self.path)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the config, the weight index, and the first 4 KiB of every tensor.

        The sample makes a retrained model with the same shapes a different model, without reading all of it.
        """
        digest = hashlib.sha256()
        config = {k: v for k, v in self.config.items() if k not in _VOLATILE_CONFIG_KEYS}
        digest.update(json.dumps(thawed(config), sort_keys=True).encode())
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name}|{info.dtype}|{info.shape}|".encode())
            with (self.path / info.shard).open("rb") as shard:
                shard.seek(info.offset)
                digest.update(shard.read(min(info.nbytes, _FINGERPRINT_SAMPLE)))
        return digest.hexdigest()

    @property
    def weights_sha256(self) -> str:
        """See :func:`acip_export.model.weights_hash.weights_sha256`."""
        return weights_sha256(self.path, self.tensors)

    def check_unchanged(self) -> None:
        """Raises CheckpointError where a file of the tensors is gone, or was written since it was opened."""
        for shard in self.stamps:
            self._check_stamp(shard)

    def _check_stamp(self, shard: str) -> None:
        file = self.path / shard
        if stamp_of(file) != self.stamps.get(shard):
            raise CheckpointError(
                f"{file} was changed or moved since it was opened; start again when it stays as it is"
            )

    @cached_property
    def tokenizer_size(self) -> TokenizerSize:
        return tokenizer_size(self.path)

    @property
    def weight_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype.

        Raises:
            CheckpointError: no such tensor, or one that holds NaN or infinity; its file is gone or has changed.
        """
        from safetensors import SafetensorError, safe_open

        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        file = self.path / info.shard
        try:
            with safe_open(file, framework="pt") as shard:
                tensor: torch.Tensor = shard.get_tensor(info.stored or name)
        except (OSError, SafetensorError) as reason:
            raise CheckpointError(
                f"{file} cannot be read any more, it was changed or moved while it was read: {reason}"
            ) from reason
        self._check_stamp(info.shard)
        # Once: some tensors are read a few rows at a time.
        if name not in self._checked and not is_finite(tensor):
            raise CheckpointError(
                f"{file}: {name} holds NaN or infinity, so the model computes none; fetch or train it again"
            )
        self._checked.add(name)
        return tensor.T.contiguous() if info.transposed else tensor


def _by_todays_names(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    found = {}
    for name, stored in stored_names(config, {name: info.shape for name, info in tensors.items()}).items():
        info = tensors[stored.name]
        shape = info.shape[::-1] if stored.transposed else info.shape
        found[name] = replace(
            info, shape=shape, stored=None if stored.name == name else stored.name, transposed=stored.transposed
        )
    return found


def _unused(config: Mapping[str, Any], name: str) -> bool:
    """Tensors of encoders that nothing computes with: a stored range, and the pooler where token vectors are pooled."""
    if name.endswith("embeddings.position_ids"):
        return True
    return is_encoder(config) and kind_of(config) == "embedding" and name.startswith("pooler.")


def _read_config(path: Path) -> Mapping[str, Any]:
    file = path / "config.json"
    if not file.exists():
        raise CheckpointError(
            f"{path} has no config.json: it is not a Hugging Face model directory.\n"
            "Give one with  --model DIR  or change into it"
        )
    config = read_json_object(file, CheckpointError)
    check_config(file, config)
    return config


def _read_index(path: Path) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in _shards(path):
        for name, info in safetensors_header(shard, CheckpointError).items():
            tensors[name] = TensorInfo(info.shape, info.dtype, shard.name, info.offset, info.nbytes)
    return tensors


def _shards(path: Path) -> list[Path]:
    """The files that transformers loads: the single one, or those that the index names."""
    single, index = path / _WEIGHTS_FILE, path / f"{_WEIGHTS_FILE}.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        named = read_json_object(index, CheckpointError).get("weight_map")
        if not isinstance(named, Mapping) or not named or not all(isinstance(name, str) for name in named.values()):
            raise CheckpointError(f"{index} is not a safetensors index: weight_map names a file for no tensor")
        # A name with a separator could point outside the directory.
        return [path / Path(name).name for name in sorted(set(named.values()))]
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if not others:
        raise CheckpointError(f"{path} has no *.safetensors; convert the weights with transformers' save_pretrained")
    some = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    raise CheckpointError(
        f"{path} has {some}, but neither {single.name} nor {index.name}, which names the files of a model.\n"
        + (
            f"Rename it to {single.name}"
            if len(others) == 1 and _PART.search(others[0]) is None
            else f"Fetch {index.name} and all files that it names"
        )
    )


def _download(model: str, revision: str | None, token: str | None) -> Path:
    looks_like_id = re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not model.startswith(".")
    if not looks_like_id:
        raise CheckpointError(f"{model} is no directory, and no Hugging Face id of the form owner/name either")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(model, revision=revision, token=token, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds; all of them mean that the model is not here
        raise CheckpointError(f"{model} is no local directory and cannot be downloaded: {error}") from error
