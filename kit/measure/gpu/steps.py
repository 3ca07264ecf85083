"""Training steps of a Llama with random weights, timed on a GPU (or tried on a CPU): the rows of `gpu_suite`.

Imports torch, transformers and peft, bitsandbytes for QLoRA, and of the kit only modules that need no more than these.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import get_peft_model
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10: its row fails and says so
    varlen_attn = None

from kit import process
from kit.train.encode.batches import IGNORED, summed_loss
from kit.train.models.adapters import low_rank
from kit.train.models.quantise import quantise_in_place
from kit.train.plan import settings
from kit.train.plan.flops import ModelFlops, model_flops

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
KERNELS = [getattr(SDPBackend, f"{k}_ATTENTION") for k in ("CUDNN", "FLASH", "EFFICIENT")] + [SDPBackend.MATH]
# heads of keys and values are fewer than those of queries; 2.11 takes that as it comes, later ones want to be told
SHARED = {"enable_gqa": True} if "enable_gqa" in (getattr(varlen_attn, "__kwdefaults__", None) or {}) else {}
LORA = {"rank": 16, "alpha": 32}


@dataclass(frozen=True)
class StepCase:
    """`rows` of `length` tokens a step, each of `docs` equal documents, on a Llama of `sizes`.

    `attention`: sdpa, cudnn (sdpa's), flex_attention or varlen. Logits exist for `chunk` tokens at a time, 0: for all.
    Adapters in float32, and the weights of method full, compute in bfloat16 by autocast.
    """

    sizes: dict[str, Any]
    method: str = "lora"
    rows: int = 1
    length: int = 4096
    docs: int = 1
    attention: str = "cudnn"
    compile: bool = True
    checkpointing: bool = False
    chunk: int = 2048
    fused: bool = True
    adapters: str = "float32"
    warm: int = 3
    steps: int = 8


def sync() -> float:
    """The time when the device has done what it was told."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def memory() -> tuple[int, int]:
    """Bytes allocated on the GPU now and at most since `free`; without one, the process's resident bytes."""
    now = torch.cuda.memory_allocated() if GPU else process.resident_bytes()
    return now, torch.cuda.max_memory_allocated() if GPU else now


def free() -> None:
    """Give back what nobody holds, compiled code too."""
    torch.compiler.reset()
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_model(sizes: dict[str, Any], dtype: str) -> torch.nn.Module:
    """A Llama with random weights, made where it will run."""
    torch.manual_seed(0)
    with DEVICE:
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=getattr(torch, dtype))


def varlen(module: Any, query: Any, key: Any, value: Any, mask: Any, **kw: Any) -> tuple[torch.Tensor, None]:
    """Causal attention inside documents, without a mask, by torch's FlashAttention (2.11); as transformers calls it."""
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]  # [tokens, heads, width]
    ends, longest = kw["cu_seq_lens_q"], kw["max_length_q"]
    out = varlen_attn(*flat, ends, ends, longest, longest, scale=kw["scaling"], window_size=(-1, 0), **SHARED)
    return out.unflatten(0, (len(query), -1)), None


AttentionInterface.register("varlen", varlen)


def loss_sum(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Σ −log p(label) in nats of `hidden` [tokens, width], by the head's `weight` [vocabulary, width]."""
    return summed_loss(F.linear(hidden, weight), labels)


def backward(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int, piece: Any, cast: Any
) -> torch.Tensor:
    """Mean loss of `hidden` [tokens, width] against `labels` [tokens], and all gradients, a chunk at a time.

    A chunk's gradient is taken at once, so that no logits are computed twice, as checkpointed ones would be.
    """
    leaf, total = hidden.detach().requires_grad_(), torch.zeros((), device=hidden.device)
    for start in range(0, len(labels), chunk or len(labels)):
        end = start + (chunk or len(labels))
        with cast:
            loss = piece(leaf[start:end], weight, labels[start:end]) / (labels != IGNORED).sum()
        loss.backward()
        total += loss.detach()
    hidden.backward(leaf.grad)
    return total


def measure_case(case: StepCase, peak: float) -> dict[str, Any]:
    """Speed, memory and utilisation of one case; after its warm-up steps the median and quartiles of the others.

    `peak` in FLOP/s is what MFU and HFU are held against. Raises `torch.OutOfMemoryError`.
    """
    full = case.method == "full"
    base = tuned = make_model(case.sizes, "float32" if full else "bfloat16")
    parameters = sum(p.numel() for p in base.parameters())
    if case.method == "qlora":
        quantise_in_place(base, "nf4_double", torch.bfloat16, DEVICE)
    if not full:
        tuned = get_peft_model(base, low_rank(**LORA))
        base.enable_input_require_grads()  # the first layer like the others: one graph to compile
    trained = [p for p in tuned.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.to(getattr(torch, case.adapters))
    counted = model_flops(tuned)
    base.set_attn_implementation(case.attention.replace("cudnn", "sdpa"))
    if case.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    free()  # what building took is no part of the peak
    times, loss = run_steps(case, base, tuned.train(), trained)
    static, most = memory()
    return {
        "loss": loss,
        "first_step_seconds": times[0][0],
        "peak_bytes": most,
        "static_bytes": static,
        "parameters": parameters,
        "trained_parameters": sum(p.numel() for p in trained),
        **rates(case, counted, times[case.warm :], peak),
    }


def run_steps(
    case: StepCase, base: torch.nn.Module, tuned: torch.nn.Module, trained: list[torch.nn.Parameter]
) -> tuple[list[tuple[float, float]], float]:
    """Seconds of each step, and of its forward and backward passes alone; and the last loss."""
    full_or_wide = case.method == "full" or case.adapters == "float32"
    prepared_settings = {"adapter_inputs": "autocast", "autocast": full_or_wide, "compile": case.compile}
    piece = torch.compile(loss_sum) if case.compile else loss_sum
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=case.fused)
    cast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=full_or_wide)
    size, head, times = case.length // case.docs, base.get_output_embeddings().weight, []
    ids = torch.randint(1, base.config.vocab_size, (case.rows, case.length), device=DEVICE)
    labels = F.pad(ids[:, 1:], (0, 1), value=IGNORED)
    labels[:, size - 1 :: size] = IGNORED  # a document does not predict the next one
    batch: dict[str, Any] = {"position_ids": torch.arange(size, device=DEVICE).repeat(case.rows, case.docs)}
    if case.attention == "varlen":
        ends = torch.arange(0, ids.numel() + 1, size, device=DEVICE, dtype=torch.int32)
        batch |= {"cu_seq_lens_q": ends, "max_length_q": size}
    kernels = sdpa_kernel(KERNELS[case.attention != "cudnn" :], set_priority=True)
    with kernels, settings.prepared(tuned, prepared_settings):
        for _ in range(case.warm + case.steps):
            began = sync()
            with cast:
                hidden = base.model(ids, **batch, use_cache=False).last_hidden_state
            loss = backward(hidden.flatten(0, 1), head, labels.flatten(), case.chunk, piece, cast)
            computed = sync()
            optimizer.step()
            optimizer.zero_grad()
            times.append((sync() - began, computed - began))
            del hidden
    return times, loss.item()


def rates(
    case: StepCase, counted: ModelFlops, times: list[tuple[float, float]], peak: float
) -> dict[str, Any]:
    """Tokens/s, MFU (attention causal, and full, as others count it) and HFU of the median step."""
    low, step, high = statistics.quantiles([whole for whole, _ in times], n=4)
    tokens, lengths = case.rows * case.length, [case.length // case.docs] * case.docs * case.rows
    flops, full = counted.total(lengths), replace(counted, causal=False).total(lengths)
    return {
        "tokens_per_s": tokens / step,
        "mfu": flops / step / peak,
        "mfu_full_attention": full / step / peak,
        "hfu": counted.hardware(lengths, checkpointing=case.checkpointing) / step / peak,
        "step_seconds": step,
        "step_seconds_quartiles": [low, high],
        "optimizer_seconds": statistics.median(whole - computed for whole, computed in times),
        "flops_per_token": flops / tokens,
        "convention": counted.convention,
    }
