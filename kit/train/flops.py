"""Model FLOPs per token, right for LoRA and DoRA as well as for full fine-tuning; and a machine's measured
peak.

The convention. A weight matrix of N parameters costs 2N FLOPs a token forward; backward 2N for its own
gradient, only if it is trained, and 2N for the gradient of its input, only if something trainable lies
before it. So full fine-tuning costs 6N; LoRA 4·N_frozen + 6·N_trained; and what lies below the lowest
trainable layer costs 2N. The embedding lookup is free; a tied head is one matmul. Attention has no weights:
4·H·T forward and 8·H·T backward a layer and token over T attended positions, half of T when causal. Padding
and recomputation are no model FLOPs.

(Kaplan et al. 2020, appendix B; Chowdhery et al. 2022, PaLM, appendix B; the frozen case follows from both.)
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from peft import PeftModel, PeftType
from torch import nn
from transformers.pytorch_utils import Conv1D

PROBE_TOKENS = 7
"""Length of the probe: DoRA also sends identity matrices through its adapters, whose rows must not count."""


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one trained token. Weights: `weights`. Attention: `attention` × attended positions.

    `forward_weights` and `forward_attention` are the forward parts alone (evaluation, a DPO reference model);
    `head` are the parameters of the output matrix, which chunked losses compute a second time.
    """

    trained: int
    frozen: int
    head: int
    weights: float
    attention: float
    forward_weights: float
    forward_attention: float
    causal: bool

    @property
    def convention(self) -> str:
        """The rule these numbers follow, in words."""
        return (
            "6 FLOPs per trained and 4 per frozen matmul parameter (no weight gradient), 2 below the lowest "
            f"trainable layer; attention {'causal (half)' if self.causal else 'full'}; padding and "
            "recomputation excluded; tied head counted once; dense peak"
        )

    def total(self, tokens: float, squares: float, *, forward_only: bool = False) -> float:
        """FLOPs of rows with `tokens` tokens in all and Σ L² = `squares` over their lengths L."""
        pairs = squares / 2 if self.causal else squares
        if forward_only:
            return self.forward_weights * tokens + self.forward_attention * pairs
        return self.weights * tokens + self.attention * pairs

    def per_token(self, length: float) -> float:
        """FLOPs of one token in a row of `length` tokens."""
        return self.total(length, length * length) / length


@dataclass
class _Matmul:
    parameters: int
    trained: bool
    input_needs_grad: bool

    @property
    def flops(self) -> int:
        return 2 * self.parameters * (1 + self.trained + self.input_needs_grad)


def model_flops(model: nn.Module, *, causal: bool = True) -> ModelFlops:
    """Count by looking: a probe of a few tokens tells which matrices are used and where gradients flow.

    So it holds for any architecture made of linear layers and for any set of trainable ones. Norms,
    activations, rotary embeddings, DoRA's column norms (once a step, not once a token) and the optimizer are
    not covered: below 1 % for models of useful size.
    """
    matmuls, attended = _probe(model)
    width = _attention_width(model)
    head = model.get_output_embeddings()
    return ModelFlops(
        trained=sum(m.parameters for m in matmuls if m.trained),
        frozen=sum(m.parameters for m in matmuls if not m.trained),
        head=_size(head) if head is not None else 0,
        weights=float(sum(m.flops for m in matmuls)),
        attention=float(sum(2 * width * matmuls_of for matmuls_of in attended)),
        forward_weights=float(sum(2 * m.parameters for m in matmuls)),
        forward_attention=float(4 * width * len(attended)),
        causal=causal,
    )


def _probe(model: nn.Module) -> tuple[list[_Matmul], list[int]]:
    """Every linear layer that a token passes; for every attention its matmuls: 2 forward, up to 4 back."""
    matmuls: list[_Matmul] = []
    attended: list[int] = []

    positions = PROBE_TOKENS + virtual_tokens(model)

    def linear(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if args[0].numel() // args[0].shape[-1] == positions:
            matmuls.append(_Matmul(_size(module), module.weight.requires_grad, args[0].requires_grad))

    flows: dict[nn.Module, bool] = {}

    def projection(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        flows[module] = output.requires_grad

    def attention(module: nn.Module, args: tuple, output: tuple) -> None:
        parts = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        q, k, v = (flows.get(part, output[0].requires_grad) for part in parts)
        # gradients of the queries, the keys, the values, and of the weights that the first two share
        attended.append(2 + q + k + v + (q or k))

    hooks = []
    for name, module in model.named_modules():
        if _is_linear(module):
            hooks.append(module.register_forward_hook(linear))
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            hooks.append(module.register_forward_hook(projection))
        if hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention"):
            hooks.append(module.register_forward_hook(attention))
    was_training = model.training
    model.eval()
    try:
        ids = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=next(model.parameters()).device)
        with torch.enable_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return matmuls, attended


def virtual_tokens(model: nn.Module) -> int:
    """Positions that a learned prompt puts before every row; those of a prefix are keys and values only."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    learned = config is not None and config.is_prompt_learning and config.peft_type != PeftType.PREFIX_TUNING
    return config.num_virtual_tokens if learned else 0


def _is_linear(module: nn.Module) -> bool:
    # a PEFT wrapper holds the linear layers it adds to; those are counted, the wrapper is not
    return isinstance(module, (nn.Linear, Conv1D)) and not hasattr(module, "base_layer")


def _size(module: nn.Module) -> int:
    # 4-bit layers pack their weights: the shape is the truth, the number of stored elements is not
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return module.weight.numel()


def _attention_width(model: nn.Module) -> int:
    """Heads × size of a head: what the scores of one query cost per attended position, halved."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head


def naive_6n(model: nn.Module) -> float:
    """6 × all parameters: what most tools print, up to 1.5 times too much for LoRA."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return 6.0 * sum(p.numel() for p in base.parameters())


def measured_peak(edge: int, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOP/s of the best [edge × edge] matmul seen in about `seconds`: the dense peak that this machine
    reaches.

    With the threads that torch uses now, on the GPU where there is one. A datasheet's peak is higher.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    out = torch.empty(edge, edge, device=device, dtype=dtype)
    best, end, tries = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < end or tries < 3:  # the first one warms up
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best, tries = min(best, time.perf_counter() - began), tries + 1
    return 2 * edge**3 / best
