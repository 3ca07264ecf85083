"""Frozen weights in fewer bits: which layers, with which settings, and what keeps their gradients right."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
"""How a frozen base may be kept: settings of `BitsAndBytesConfig` (NF4, double quantisation: Dettmers et al. 2023)."""


def settings_of(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers needs to load a model in `kind`, one of `QUANTIZATIONS`, to compute in `dtype`."""
    settings = QUANTIZATIONS[kind] or {}
    if "load_in_4bit" in settings:
        settings = {**settings, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(**settings)


def never_repacked(model: nn.Module) -> Any:
    """`model`, of which no forward pass may repack 4-bit weights.

    On CPUs with AVX512-BF16 one in evaluation mode would, for good: every gradient after it is wrong, and the loss
    looks right.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def quantisable(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that bitsandbytes quantises, by name: all linear ones but the head and what PEFT adds."""
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: m for name, m in linear.items() if m is not head and "lora_" not in name}


def quantise_in_place(model: PreTrainedModel, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Put 4-bit layers on `device` in the place of the linear ones of `model`, to compute in `dtype`.

    For weights that lie on no disk, so that transformers cannot load them in `kind` (nf4 or nf4_double). Raises
    `ImportError` without bitsandbytes.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings = QUANTIZATIONS[kind] or {}
    stored = {
        "quant_type": settings["bnb_4bit_quant_type"],
        "compress_statistics": settings.get("bnb_4bit_use_double_quant", False),
    }
    for name, old in quantisable(model).items():
        # of size 1 × 1: the weights that a layer is born with would be thrown away
        new = Linear4bit(1, 1, bias=False, compute_dtype=dtype, quant_type=stored["quant_type"])
        new.in_features, new.out_features = old.in_features, old.out_features
        new.weight = Params4bit(old.weight.data, requires_grad=False, module=new, **stored).to(device)
        model.set_submodule(name, new)
    never_repacked(model)
    model.is_loaded_in_4bit = True  # what PEFT asks for
