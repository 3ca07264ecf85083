"""What a model is made of: counts and types of its weights, and its configuration with fewer layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig


def describe(model: torch.nn.Module) -> dict[str, Any]:
    """What really runs: counts of parameters, types of weights, attention kernel, device, threads."""
    by_type: dict[str, int] = {}
    trained = 0
    for p in model.parameters():
        kind, n = stored(p)
        by_type[kind] = by_type.get(kind, 0) + n
        trained += n if p.requires_grad else 0
    return {
        "parameters": sum(by_type.values()),
        "trainable": trained,
        "dtype": max(by_type, key=by_type.__getitem__),
        "parameters_by_dtype": dict(sorted(by_type.items())),
        "weights_mb": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6, 1),
        "attention": getattr(model.config, "_attn_implementation", "unknown"),
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
    }


def stored(p: torch.nn.Parameter) -> tuple[str, int]:
    """(type, number of weights) of a parameter; 4-bit ones are stored two in a byte, and counted as what they are."""
    state = getattr(p, "quant_state", None)
    if state is not None:
        return f"{state.quant_type}{' double' if state.nested else ''}", state.shape.numel()
    return str(p.dtype).removeprefix("torch."), p.numel()


def plain_dtype(model: torch.nn.Module) -> torch.dtype:
    """The type of most weights that are not quantised."""
    sizes: dict[torch.dtype, int] = {}
    for p in model.parameters():
        if p.is_floating_point():
            sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    return max(sizes, key=sizes.__getitem__)


def computes_in(model: torch.nn.Module) -> str:
    """The type that a model's matmuls compute in: a 4-bit base's compute type, or that of most weights."""
    kinds = [getattr(m, "compute_dtype", None) for m in model.modules() if hasattr(m, "quant_state")]
    kind = next((k for k in kinds if k), None) or plain_dtype(model)
    return str(kind).removeprefix("torch.")


def with_layers(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """A copy of `config` for a model of the layers `kept` (indices, in order) alone; as wide, with the same words.

    Lists as long as there are layers say something of each layer (kinds of attention, say), and are cut likewise.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, key, [value[i] for i in kept])
    text.num_hidden_layers = len(kept)
    return config
