"""What the kit sets otherwise than TRL, to be fast on one device, each under a name of its own, to be switched one by one.

Imports only torch and transformers, so that a bare GPU machine can run it. `STOCK` is TRL 1.16 as it comes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_flash_attn_2_available

CPU_TILE = 2048  # vocabulary entries a tile of TRL's chunked loss: its own fall out of a CPU's cache
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit"}
"""The kit's names in transformers' words. Fused: on a CPU, too (measured: a third of the time). 8 bits: bitsandbytes."""
COMPILE_STEPS = 100  # steps in which the minute or so that compiling takes comes back

STOCK: dict[str, Any] = {
    "weights": "float32",  # trl.trainer.utils.create_model_from_path
    "autocast": True,  # _BaseConfig.bf16
    "adapter_inputs": "float32",  # peft: BaseTunerLayer._cast_input_dtype, to the type of the adapter's weights
    "activation_checkpointing": True,  # _BaseConfig.gradient_checkpointing
    "packing": False,  # SFTConfig.packing: rows are padded to the longest of their batch
    "attention": "sdpa",  # transformers' own choice
    "optimizer": "adamw_torch_fused",  # TrainingArguments.optim from torch 2.8 on
    "compile": False,  # TrainingArguments.torch_compile
    "loss_tile": 32_768,  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    "pin_memory": True,  # TrainingArguments.dataloader_pin_memory
}
"""What `SFTTrainer` does unasked, by the kit's names, and where it says so."""


def recipe(
    *,
    full: bool,
    bf16: bool = True,
    gpu: bool | None = None,
    attention: str = "auto",
    optimizer: str = "adamw",
    compile_model: str = "auto",
    packing: bool = True,
    activation_checkpointing: bool = False,
    steps: int = 0,
) -> dict[str, Any]:
    """The kit's choice under `STOCK`'s names, for all weights (`full`) or an adapter; `bf16`: the hardware has it.

    Raises `ValueError` for an attention kernel that is not here.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    # each line stands against the same line of `STOCK`; 80 measures what it is worth
    return {
        "weights": "bfloat16" if bf16 and not full else "float32",  # trained ones: small updates would vanish
        "autocast": bf16 and (full or gpu),
        "adapter_inputs": "autocast" if bf16 and gpu else "float32",
        "activation_checkpointing": activation_checkpointing,
        "packing": packing,
        "attention": attention_kernel(attention, gpu),
        "optimizer": OPTIMIZERS[optimizer],
        "compile": compiled(compile_model, steps, gpu),
        "loss_tile": loss_tile(gpu),
        "pin_memory": gpu,
    }


def arguments(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `recipe` that TRL's configurations take."""
    names = {"bf16": "autocast", "optim": "optimizer", "dataloader_pin_memory": "pin_memory"}
    names |= {"activation_checkpointing": "activation_checkpointing"}
    return {theirs: chosen[ours] for theirs, ours in names.items()}


def loss_tile(gpu: bool) -> int:
    """Vocabulary entries of a tile of TRL's chunked loss."""
    return STOCK["loss_tile"] if gpu else CPU_TILE


def attention_kernel(wanted: str, gpu: bool) -> str:
    """transformers' name of the kernel: auto is FlashAttention 2 where it is installed and there is a GPU, else SDPA.

    Raises `ValueError` where FlashAttention 2 is asked for and missing: transformers would fetch a kernel from the hub.
    """
    flash = gpu and is_flash_attn_2_available()
    if wanted == "flash_attention_2" and not flash:
        raise ValueError("attention=flash_attention_2 needs a GPU and the package flash-attn: attention=auto")
    return ("flash_attention_2" if flash else "sdpa") if wanted == "auto" else wanted


def compiled(wanted: str, steps: int, gpu: bool) -> bool:
    """Whether to compile: auto on a GPU, from `COMPILE_STEPS` on."""
    return wanted == "on" or (wanted == "auto" and gpu and steps >= COMPILE_STEPS)


@contextlib.contextmanager
def prepared(model: torch.nn.Module, chosen: Mapping[str, Any]) -> Iterator[torch.nn.Module]:
    """A model whose layers are compiled and whose adapters take their inputs as they come, while the block runs.

    Layers are all alike: the first is compiled, the others find it done. Autocast, so training alone, multiplies what
    comes with weights of another type.
    """
    bare = chosen["autocast"] and chosen["adapter_inputs"] == "autocast"
    loose = [m for m in model.modules() if bare and getattr(m, "cast_input_dtype_enabled", False)]
    # the same modules that can be recomputed: each is a whole layer with nothing around it
    layers = [m for m in model.modules() if chosen["compile"] and isinstance(m, GradientCheckpointingLayer)]
    try:
        for adapter in loose:
            adapter.cast_input_dtype_enabled = False
        for layer in layers:
            layer.compile()
        yield model
    finally:
        for adapter in loose:
            adapter.cast_input_dtype_enabled = True
        for layer in layers:  # what comes after is of other lengths, and would compile them anew
            layer._compiled_call_impl = None
