"""Rules by which architectures choose the layers that attend to a sliding window only.

Each is transformers' own, for a configuration that names a window: it returns for every layer whether it is windowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

WindowRule = Callable[[Mapping[str, Any], int], tuple[bool, ...]]


def no_layer(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Return that no layer has a window, whatever the configuration says."""
    del config
    return (False,) * layers


def every_layer(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Return that all layers have one."""
    del config
    return (True,) * layers


def all_but_every(period: int, key: str | None = None) -> WindowRule:
    """Return the rule that every ``period``-th layer attends to everything, or every so many as ``key`` says."""

    def rule(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
        step = int((config.get(key) if key else None) or period)
        return _listed(config) or tuple((layer + 1) % step != 0 for layer in range(layers))

    return rule


def upper_layers(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Return those from ``max_window_layers`` on, once ``use_sliding_window`` is set (Qwen)."""
    if not config.get("use_sliding_window"):
        return no_layer(config, layers)
    first = int(config.get("max_window_layers") or 0)
    return _listed(config) or tuple(layer >= first for layer in range(layers))


def layers_without_positions(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Return those that have no rotary embedding, once ``use_sliding_window`` is set (SmolLM 3)."""
    if not config.get("use_sliding_window"):
        return no_layer(config, layers)
    step = int(config.get("no_rope_layer_interval") or 4)
    rotated = config.get("no_rope_layers") or [(layer + 1) % step != 0 for layer in range(layers)]
    return _listed(config) or tuple(not rotates for rotates in rotated)


def as_configured(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Return what the keys in use among architectures say: for those whose own rule is not known."""
    return upper_layers({"use_sliding_window": True, **config}, layers)


def _listed(config: Mapping[str, Any]) -> tuple[bool, ...]:
    return tuple(kind == "sliding_attention" for kind in config.get("layer_types") or ())
