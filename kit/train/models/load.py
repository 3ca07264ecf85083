"""Models and tokenizers: the shipped SmolLM2, a hub id, a local folder or a GGUF file, through one door."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kit import process, resolve_path
from kit.errors import ModelError
from kit.train.models import shipped
from kit.train.models.adapters import merge_adapter, tuned_on
from kit.train.models.quantise import never_repacked, settings_of

DISTINCT_PADS = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|endoftext|>", "<unk>")
"""Tokens that may pad a row, in order of preference, when the model pads with its end token or with none."""

# TRL reports every trainer to the hub unless told not to; a kit that works offline does not call home
hub.HF_HUB_DISABLE_TELEMETRY = True


def locate(name: str) -> tuple[str, bool]:
    """What transformers should open for `name`, and whether it is on this disk (then no network is touched).

    Raises `ModelError` for a shipped model not fetched yet, a folder that is missing or holds no safetensors,
    and a name that can be neither a folder nor a hub id.
    """
    if name in shipped.PACKAGES:
        if not shipped.PACKAGES[name].here:
            raise ModelError(
                f"the shipped model is not here yet: run '{shipped.FETCH}' once, with the network"
            )
        return str(shipped.CACHE / shipped.PACKAGES[name].folder), True
    folder = Path(resolve_path(name))
    if folder.suffix == ".gguf":
        return str(_from_gguf(folder, name)), True
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"'{name}' is no model: it holds no config.json")
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"'{name}' holds no safetensors; other formats can run code and are not opened")
        return str(folder), True
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(f"base_model '{name}' is neither '{shipped.SHIPPED}', nor a folder, nor a hub id")
    return name, False


def _from_gguf(file: Path, name: str) -> Path:
    """The folder of safetensors made of a GGUF file, made once: the file itself can be neither trained nor saved."""
    try:
        about = file.stat()
    except OSError:
        raise ModelError(f"there is no GGUF file '{name}'") from None
    key = hashlib.sha256(f"{file.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:12]
    target = shipped.CACHE / f"{file.stem}-{key}"
    if not (target / "config.json").exists():
        shipped.CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=shipped.CACHE, prefix="gguf-") as temp:
            try:
                work = shipped.convert_gguf(file, Path(temp, "made"))
            except (OSError, ValueError, KeyError, NotImplementedError) as error:
                raise ModelError(f"'{name}' cannot be converted: {str(error).splitlines()[0]}") from None
            shipped.place(work, target)
    return target


def open_pretrained(opener: Any, name: str, trust_remote_code: bool = False, **options: Any) -> Any:
    """`opener.from_pretrained`, with every failure a person can meet as one line."""
    source, local = locate(name)
    transformers_logging.disable_progress_bar()
    try:
        return opener.from_pretrained(
            source, local_files_only=local, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "" if local else f" (with no network use base_model '{shipped.SHIPPED}' or a local folder)"
        raise ModelError(f"model '{name}' cannot be loaded: {first}{hint}") from None


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of `name`, with a padding token that is not the end token wherever one exists.

    A model whose padding is its end token can be trained never to stop. What was chosen is kept in the
    tokenizer's `pad_note` and printed by the stages. Raises `ModelError`.
    """
    tokenizer = open_pretrained(AutoTokenizer, name, trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of '{name}' has no end token: a model tuned with it would never stop"
        )
    tokenizer.pad_note = f"pad token {tokenizer.pad_token!r}, as the model has it"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        known = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
        distinct = [t for t in DISTINCT_PADS if t in known and t != tokenizer.eos_token]
        had = tokenizer.pad_token
        tokenizer.pad_token = distinct[0] if distinct else tokenizer.eos_token
        tokenizer.pad_note = (
            f"pad token {tokenizer.pad_token!r} instead of {had!r} (end token {tokenizer.eos_token!r})"
        )
        if not distinct:
            tokenizer.pad_note += ": no distinct token exists, padding is masked by position"
    return tokenizer


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    adapters: Sequence[str | Path] = (),
    quantization: str = "none",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model of `name`, ready to run or to train on, on the GPU where there is one.

    `adapters` are local folders, applied in order: a PEFT adapter is merged into the weights, in float32 (one
    trained over a quantised base into that base, dequantised); learned prompts, which cannot be merged, stay
    in front of the model and must come last; a folder of full weights replaces what was before. The cast to
    `dtype` (see `pick_dtype`) comes last, so that rounding happens once. `quantization` (see `QUANTIZATIONS`) is
    for a frozen base to train over. Raises `ModelError`.
    """
    folders = [Path(a) for a in adapters]
    # weights that a later folder replaces as a whole need not be read
    whole = [i for i, f in enumerate(folders) if not (f / "adapter_config.json").exists()]
    source, rest = (str(folders[whole[-1]]), folders[whole[-1] + 1 :]) if whole else (name, folders)
    wanted = pick_dtype(dtype)
    options = {"use_safetensors": True, "trust_remote_code": trust_remote_code}
    if quantization != "none" and not rest:
        model = quantised(source, quantization, wanted, **options)
    else:
        model = open_pretrained(
            AutoModelForCausalLM, source, dtype=torch.float32 if rest else wanted, **options
        )
        for folder in rest:
            was = tuned_on(folder)
            if was["quantization"] != "none":
                # quantised from weights of another type it would be another base
                model = cast(_requantised(model, was["quantization"], pick_dtype(was["dtype"])).dequantize())
            model = merge_adapter(model, folder)
        if quantization != "none":
            model = _requantised(model, quantization, wanted)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.config._name_or_path = inner.name_or_path = name
    return model if quantization != "none" else cast(model, wanted).to(device())


def cast(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with its weights in `dtype`. Buffers stay: `model.to` would round rotary frequencies to bfloat16."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def quantised(name: str, kind: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The model of `name` with the weights of its linear layers in `kind`, computing in `dtype`."""
    options |= {"quantization_config": settings_of(kind, dtype), "device_map": {"": device()}}
    return never_repacked(open_pretrained(AutoModelForCausalLM, name, dtype=dtype, **options))


def _requantised(model: PreTrainedModel, kind: str, dtype: torch.dtype) -> PreTrainedModel:
    if isinstance(model, PeftModel):
        raise ModelError("a learned prompt cannot be merged, so nothing can be trained on top of it")
    with tempfile.TemporaryDirectory(prefix="kit-quantise-") as temp:
        model.save_pretrained(temp)
        return quantised(temp, kind, dtype, use_safetensors=True)


def device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: str = "auto") -> torch.dtype:
    """`auto` as a type: bfloat16 where the hardware multiplies it natively, else float32.

    On a CPU that means AVX512-BF16 or AMX: measured there, a bfloat16 matmul is 2.3 times as fast as a
    float32 one; without these instructions it is slower. A feature check, not a timing: the same machine
    always answers the same, or two runs would not give the same bytes.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has = torch.cpu.get_capabilities()
    native = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
    return torch.bfloat16 if native else torch.float32


def set_threads(threads: int = 0) -> int:
    """Use `threads` CPU threads, 0 = OMP_NUM_THREADS or all that this process may use; returns the number.

    Also tells glibc to keep freed memory: torch frees and takes the same hundreds of MB in every step, and
    fetching them from the kernel again costs as much as the arithmetic (measured: 130 → 240 tokens/s).
    """
    torch.set_num_threads(threads or int(os.environ.get("OMP_NUM_THREADS") or process.cores()))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version"):
            for option, value in (
                (-4, 0),
                (-1, 2**31 - 1),
                (-2, 64 << 20),
            ):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
                libc.mallopt(option, value)
    return torch.get_num_threads()


def release() -> None:
    """Give the memory of models that nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
