"""Model FLOPs, right for every way to tune; those that the hardware does beside them; and what a machine can reach.

The convention. A weight matrix of N parameters costs 2N FLOPs a position forward; backward 2N for its own gradient,
only if it is trained, and 2N for the gradient of its input, only if something trainable lies before it. So full
fine-tuning costs 6N; LoRA 4·N_frozen + 6·N_trained; and what lies below the lowest trainable layer costs 2N. The
embedding lookup is free; a tied head is one matmul. Attention has no weights: 4·H forward and 8·H backward a layer and
attended pair: L² pairs in a row of L, half of it when causal, and w·L - w²/2 causal in a sliding window of w < L. A
learned prompt's positions count in every row, a prefix's keys and values as pairs of every query. Padding,
recomputation, dequantising, and what is done once a batch are no model FLOPs: P-tuning's network (below 0.01 %), and
DoRA's norms (1.2 % of 4 × 256 tokens of SmolLM2-135M, 0.4 % of 4,096 of Llama-3-8B); `hardware` has them.
(Kaplan et al. 2020, appendix B; Chowdhery et al. 2022, PaLM, appendix B; the frozen case follows from both.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel, PeftType
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

PROBE_TOKENS = 7
"""Length of the probe: a matmul of as many inputs is one of positions; of one input, of rows (a pooler); else of a batch."""


class Cost(NamedTuple):
    """FLOPs of a position, of an attended pair, of one in the sliding window, of a row, of a batch; or their numbers."""

    position: float = 0.0
    pair: float = 0.0
    near: float = 0.0
    row: float = 0.0
    batch: float = 0.0

    def of(self, work: Cost) -> float:
        """FLOPs of so many positions, pairs, rows and batches."""
        return float(sum(map(mul, self, work)))


@dataclass(frozen=True)
class ModelFlops:
    """What training costs, as FLOPs of each: `step` forward and backward, `forward` alone (evaluation, a reference).

    `again` is what activation checkpointing computes a second time. `trained`, `frozen` and `head` are parameters of
    matmuls; the head's logits are computed twice by chunked losses. A row stands behind `virtual` positions of a
    learned prompt, or behind `prefix` keys and values; `window`: 0 for none. Not covered: windows of several sizes.
    """

    trained: float
    frozen: float
    head: float
    step: Cost
    forward: Cost
    again: Cost
    virtual: float
    prefix: float
    window: float
    causal: bool

    @property
    def weights(self) -> float:
        """FLOPs of a position's matmuls with weights, forward and backward."""
        return self.step.position

    @property
    def convention(self) -> str:
        """The rule these numbers follow, in words."""
        attention = "causal (half)" if self.causal else "full"
        attention += f", windows of {self.window}" if self.window else ""
        return (
            "6 FLOPs per trained and 4 per frozen matmul parameter (no weight gradient), 2 below the lowest "
            f"trainable layer; attention {attention}; padding and recomputation excluded; tied head counted "
            "once; dense peak"
        )

    def total(self, lengths: Sequence[float], *, forward_only: bool = False) -> float:
        """Model FLOPs of texts of these lengths in tokens; documents of a packed row each count by themselves."""
        return (self.forward if forward_only else self.step).of(self._work(lengths))

    def hardware(self, lengths: Sequence[float], padded: float = 0, checkpointing: bool = False) -> float:
        """FLOPs that run for one batch: the model's, on `padded` positions if more, DoRA's norms; recomputed.

        Checkpointing as transformers does it, not reentrant: of a layer, what comes before the last tensor that autograd
        keeps runs again. Not covered: models that end a layer with dropout (GPT-2: 8 % more), what attention kernels
        compute beside the attended pairs.
        """
        work = self._work(lengths)
        work = work._replace(position=work.position + max(0, padded - sum(lengths)), batch=1)
        return self.step.of(work) + self.again.of(work) * checkpointing

    def per_token(self, length: float) -> float:
        """FLOPs of one token of a text of `length` tokens; those of its learned prompt are shared out among them."""
        return self.total([length]) / length

    def _work(self, lengths: Sequence[float]) -> Cost:
        # a learned prompt stands before every row, and its positions are computed like any other
        rows = np.asarray(lengths, dtype=float) + self.virtual
        return Cost(rows.sum(), self._pairs(rows, math.inf), self._pairs(rows, self.window), len(rows))

    def _pairs(self, rows: np.ndarray, window: float) -> float:
        def half(n: np.ndarray | float) -> Any:  # Σ min(i, window) over positions, the diagonal counted half
            near = np.minimum(n, window)
            return near * n - near * near / 2

        # a prefix's keys are seen by every query, but it asks nothing itself
        seen = half(rows + self.prefix) - half(self.prefix)
        return (seen if self.causal else seen + half(rows)).sum()


def deeper(one: ModelFlops, two: ModelFlops, layers: int) -> ModelFlops:
    """FLOPs of a model of `layers` like layers, from those of its copies with one and with two."""

    # embedding and head are in both, so the difference of the two is one layer
    def grown(a: Any, b: Any) -> Any:
        return Cost(*map(grown, a, b)) if isinstance(a, Cost) else a + (b - a) * (layers - 1)

    parts = ("trained", "frozen", "step", "forward", "again")
    return replace(two, **{name: grown(getattr(one, name), getattr(two, name)) for name in parts})


@dataclass
class _Matmul:
    """One that the probe saw; `each`: what it is done for each of; `kept`: tensors that autograd had when it was done."""

    each: str
    forward: float
    step: float
    kept: int
    parameters: int = 0
    trained: bool = False
    again: bool = False


def model_flops(model: nn.Module, *, causal: bool | None = None) -> ModelFlops:
    """Count by looking: a probe of a few tokens tells which matrices are used and where gradients flow.

    So it holds for any architecture made of linear layers and for any set of trainable ones. `causal` None: as the
    attention modules say of themselves. Norms, activations, rotary embeddings and the optimizer are not covered: below
    1 % for models of useful size; nor are mixtures of experts, cross-attention, attention without softmax.
    """
    seen, attended = _probe(model)
    costs = {kind: dict.fromkeys(Cost._fields, 0.0) for kind in ("step", "forward", "again")}
    for matmul in seen:
        each = (matmul.step, matmul.forward, matmul.again * matmul.forward)
        for kind, flops in zip(costs, each, strict=True):
            costs[kind][matmul.each] += flops
    # what is done once a batch has no parameters of the model's own: a prompt's network, DoRA's norms
    used = [matmul for matmul in seen if matmul.each != "batch"]
    head = model.get_output_embeddings()
    return ModelFlops(
        trained=sum(m.parameters for m in used if m.trained),
        frozen=sum(m.parameters for m in used if not m.trained),
        head=_size(head) if head is not None else 0,
        **{kind: Cost(**flops) for kind, flops in costs.items()},
        virtual=virtual_tokens(model),
        prefix=virtual_tokens(model, prefix=True),
        window=max((window for window, _ in attended), default=0),
        causal=all(looks_back for _, looks_back in attended) if causal is None else causal,
    )


PARTS = (("q_proj", "query", "q_lin"), ("k_proj", "key", "k_lin"), ("v_proj", "value", "v_lin"))
"""What models call the projections to queries, keys and values; others make all three in one."""


class _Probe:
    """Hooks that note every matmul of one row's forward pass, and of every attention its window and whether it is causal.

    Used as a context: the hooks are gone when it ends.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[_Matmul] = []
        self.attended: list[tuple[int, bool]] = []
        self.begun: dict[nn.Module, int] = {}
        """Of each layer that can be recomputed, how many matmuls had been seen when it began."""
        self.flows: dict[nn.Module, bool] = {}
        """Of each projection to queries, keys or values, whether a gradient flows back through its output."""
        self.kept = 0
        """Tensors that autograd has saved so far for the backward pass."""
        self.virtual, self.prefix = virtual_tokens(model), virtual_tokens(model, prefix=True)
        self.config = model.config.get_text_config()
        heads = self.config.num_attention_heads
        head = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        self.pair = 2.0 * heads * head  # FLOPs of one of the two matmuls of a query and a key, all heads
        self.hooks = [hook for module in model.modules() for hook in self._hooks(module)]

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _hooks(self, module: nn.Module) -> Iterator[Any]:
        # a PEFT wrapper holds the linear layers it adds to; those are counted, the wrapper is not
        if isinstance(module, (nn.Linear, Conv1D)) and not hasattr(module, "base_layer"):
            yield module.register_forward_hook(self._linear)
        named = hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention")
        if named or any(hasattr(module, name) for name in PARTS[0]):
            for part in (getattr(module, n) for names in PARTS for n in names if hasattr(module, n)):
                yield part.register_forward_hook(
                    lambda m, _, output: self.flows.update({m: output.requires_grad})
                )
            yield module.register_forward_hook(self._attention)
        if isinstance(module, GradientCheckpointingLayer):
            yield module.register_forward_pre_hook(lambda m, _: self.begun.update({m: len(self.seen)}))
            yield module.register_forward_hook(self._layer_end)

    def keep(self, saved: torch.Tensor) -> torch.Tensor:
        """What autograd calls for each tensor that it saves."""
        self.kept += 1
        return saved

    def _linear(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        """A layer with weights: 2N forward, and as much for each gradient that flows back from it."""
        inputs = args[0].numel() // args[0].shape[-1]
        trained = module.weight.requires_grad
        each = {PROBE_TOKENS + self.virtual: "position", 1: "row"}.get(inputs, "batch")
        # once a batch: P-tuning's network makes the prompt; DoRA sends an identity through adapters, no gradient back
        forward = 2.0 * _size(module) * (inputs if each == "batch" else 1)
        back = trained + args[0].requires_grad if each != "batch" or inputs == self.virtual else 0
        self.seen.append(_Matmul(each, forward, forward * (1 + back), self.kept, _size(module), trained))

    def _attention(self, module: nn.Module, args: tuple, output: tuple) -> None:
        """Queries times keys, and weights times values: no parameters, and FLOPs for each attended pair."""
        parts = (next((getattr(module, n) for n in names if hasattr(module, n)), None) for names in PARTS)
        q, k, v = (self.flows.get(part, output[0].requires_grad) for part in parts)
        # a learned prefix is trained, and stands among the keys and values of every layer
        k, v = k or self.prefix > 0, v or self.prefix > 0
        # gradients of the queries, the keys, the values, and of the weights that the first two share
        matmuls = 2 + q + k + v + (q or k)
        window = getattr(module, "sliding_window", getattr(self.config, "sliding_window", None)) or 0
        # models that mix both kinds say of each layer which it is, and give all of them the window
        kinds = getattr(self.config, "layer_types", None)
        if kinds and kinds[len(self.attended)] != "sliding_attention":
            window = 0
        self.seen.append(_Matmul("near" if window else "pair", 2 * self.pair, matmuls * self.pair, self.kept))
        self.attended.append((window, getattr(module, "is_causal", True)))

    def _layer_end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Of a layer, what is done before the last tensor that the backward pass needs is recomputed."""
        for matmul in self.seen[self.begun[module] :]:
            matmul.again |= self.kept > matmul.kept


def _probe(model: nn.Module) -> tuple[list[_Matmul], list[tuple[int, bool]]]:
    """Every matmul of one row's forward pass; of every attention its window, and whether it is causal."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()  # saved tensors are counted, and dropout would save its masks
    try:
        with _Probe(model) as probe:
            ids = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=device)
            cache = {"use_cache": False} if hasattr(probe.config, "use_cache") else {}
            # on a GPU adapters may be in another type than what they are added to, until autocast makes them one
            mixed = torch.autocast(device.type, enabled=device.type == "cuda")
            saved = torch.autograd.graph.saved_tensors_hooks(probe.keep, lambda tensor: tensor)
            with torch.enable_grad(), mixed, saved:
                model(input_ids=ids, **cache)
    finally:
        model.train(was_training)
    return probe.seen, probe.attended


def virtual_tokens(model: nn.Module, *, prefix: bool = False) -> int:
    """Positions that a learned prompt puts before every row; or those of a prefix: keys and values only."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if config is None or not config.is_prompt_learning:
        return 0
    return config.num_virtual_tokens if prefix == (config.peft_type == PeftType.PREFIX_TUNING) else 0


def _size(module: nn.Module) -> int:
    # 4-bit layers pack their weights: the shape is the truth, the number of stored elements is not
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return module.weight.numel()


def naive_6n(model: nn.Module) -> float:
    """6 × all parameters: what most tools print, up to 1.5 times too much for LoRA."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return 6.0 * sum(p.numel() for p in base.parameters())
