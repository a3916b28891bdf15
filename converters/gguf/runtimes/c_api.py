"""llama.cpp's C interface, enough of it to get logits: from llama-cpp-python, else from xllamacpp's shared library.

Both are used through the same names. xllamacpp exports the C symbols but no Python binding for them, so their
prototypes are written here for the version in constraints.txt. Structs passed by value are the fragile part: their
fields are checked against the library's own defaults before anything is called, and a version that moved them is
refused, not guessed at.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint8, c_uint32, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from converters.gguf.ggml_library import library_path

logger = logging.getLogger(__name__)
logger.addHandler(logging.NullHandler())  # else Python prints llama.cpp's warnings where nobody set logging up

LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
# enum ggml_log_level -> logging; 5 continues the line before.
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUE = 5

# Fields that a newer version may append are carried along untouched, from the defaults into the call.
_RESERVE = ("reserve", c_uint8 * 256)


class ModelParams(ctypes.Structure):
    """``llama_model_params``."""

    _fields_: ClassVar = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        _RESERVE,
    ]


class ContextParams(ctypes.Structure):
    """``llama_context_params``."""

    _fields_: ClassVar = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("callbacks", c_void_p * 3),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
        _RESERVE,
    ]


class Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_: ClassVar = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


# name -> (result, arguments)
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (LogCallback, c_void_p)),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_batch_init": (Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_encode": (c_int32, (c_void_p, Batch)),
    "llama_get_embeddings_seq": (POINTER(c_float), (c_void_p, c_int32)),
    "llama_pooling_type": (c_int, (c_void_p,)),
    "llama_model_n_embd": (c_int32, (c_void_p,)),
    "llama_model_n_cls_out": (c_uint32, (c_void_p,)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_memory_seq_pos_min": (c_int32, (c_void_p, c_int32)),
    "llama_token_to_piece": (c_int32, (c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_vocab_get_add_bos": (c_bool, (c_void_p,)),
    "llama_vocab_bos": (c_int32, (c_void_p,)),
    "llama_vocab_eos": (c_int32, (c_void_p,)),
    "llama_vocab_get_text": (c_char_p, (c_void_p, c_int32)),
    "llama_adapter_lora_init": (c_void_p, (c_void_p, c_char_p)),
    "llama_set_adapters_lora": (c_int32, (c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float))),
}

_MODEL_DEFAULTS = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "main_gpu": 0,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0,
    "type_k": 1,
    "type_v": 1,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "n_samplers": 0,
}


@cache
def find(extended: bool = False) -> tuple[Any, str] | None:
    """The C functions as attributes and the name of their source, or ``None`` when no library offers them.

    Args:
        extended: the library must run factor pairs (docs/format.md). Otherwise a stock one is preferred.
    """
    has_pairs = runs_factor_pairs()
    if extended:
        sources = [_llama_cpp_python] if has_pairs else []
    else:
        sources = [_xllamacpp, _llama_cpp_python] if has_pairs else [_llama_cpp_python, _xllamacpp]
    for source in sources:
        found = source()
        if found is not None:
            found[0].llama_backend_init()
            return found
    return None


@cache
def runs_factor_pairs() -> bool:
    """Whether llama-cpp-python is installed with our extension: its library then knows the names of factors."""
    spec = find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        return False
    folder = os.environ.get("LLAMA_CPP_LIB_PATH") or Path(next(iter(spec.submodule_search_locations))) / "lib"
    return names_factor_pairs(Path(folder).glob("*llama.*"))


def names_factor_pairs(files: Iterable[Path]) -> bool:
    """Whether one of these programs and libraries has our extension: it knows the names of factors."""
    for file in files:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"weight.lora_a\0") >= 0:
                return True
    return False


def _llama_cpp_python() -> tuple[Any, str] | None:
    if find_spec("llama_cpp") is None:
        return None
    try:
        from llama_cpp import __version__, llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # installed, but its library cannot be loaded
        logger.warning("llama-cpp-python cannot be used: %s", error)
        return None
    return llama_cpp, f"llama.cpp (llama-cpp-python {__version__})"


def _xllamacpp() -> tuple[Any, str] | None:
    path = library_path()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        logger.info("%s offers no C interface (%s)", path, error)
        return None
    different = [
        f"{name} is {found}, expected {expected}"
        for params, defaults in (
            (library.llama_model_default_params(), _MODEL_DEFAULTS),
            (library.llama_context_default_params(), _CONTEXT_DEFAULTS),
        )
        for name, expected in defaults.items()
        if (found := getattr(params, name)) != expected
    ]
    if different:
        logger.warning("%s has another layout of its parameters: %s", path, "; ".join(different))
        return None
    return library, "llama.cpp (xllamacpp)"


class _Log:
    """llama.cpp's log, line by line: to ``logging``, and to whoever listens."""

    def __init__(self) -> None:
        self._line = ""
        self._level = logging.DEBUG
        self._listeners: list[deque[str]] = []

    def receive(self, level: int, text: bytes | None, _data: object) -> None:
        if level != _CONTINUE:
            self._level = _LEVELS.get(level, logging.DEBUG)
        *lines, self._line = (self._line + (text or b"").decode("utf-8", "replace")).split("\n")
        for line in lines:
            logger.log(self._level, "%s", line)
            for listener in self._listeners:
                listener.append(line)

    @contextmanager
    def listen(self, binding: Any) -> Iterator[deque[str]]:
        """Collect the lines written inside the block; the callback stays installed after it."""
        binding.llama_log_set(_LOG_CALLBACK, None)  # each time: xllamacpp's server installs its own
        lines: deque[str] = deque(maxlen=2000)
        self._listeners.append(lines)
        try:
            yield lines
        finally:
            self._listeners.remove(lines)


LOG = _Log()
# The library keeps the pointer: the callback has to live as long as the process.
_LOG_CALLBACK = LogCallback(LOG.receive)
