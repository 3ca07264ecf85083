"""Scaling on paper: one training step, its rows and so its loss unchanged, dealt to n devices by each strategy.

What a rank sends. DDP: a ring all-reduce, 2(n−1)/n of the gradients (Patarasuk & Yuan 2009), behind the last backward
pass. FSDP2: gathers weights forward and backward in every pass, and scatters gradients in the last, (n−1)/n of each: of
one pass that trains all of them 3(n−1)/n (Rajbhandari et al. 2020, ZeRO-3); frozen weights are gathered, too. Tensor: 2
all-reduces forward and 2 back a layer, of positions × hidden (Shoeybi et al. 2019, Megatron-LM), 2 more to recompute;
nothing hides them. Pipeline: activations over a boundary, gradients back; s stages idle (s−1)/(m+s−1) of the time for m
chunks (Huang et al. 2019, GPipe), hold min(s, m) (Narayanan et al. 2021, 1F1B) and wait for the one with the head. Not
covered: slower small matmuls, stragglers, sequence parallelism, perplexity, DDP's copy of gradients if it makes one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from kit.errors import ModelError

if TYPE_CHECKING:
    from kit.train.plan.setup import Setup

STRATEGIES = ("ddp", "fsdp", "pipeline", "tensor", "tensor_ddp", "tensor_data")
"""`tensor_ddp` and `tensor_data`: tensor-parallel groups, whose gradients are reduced, or all is sharded (FSDP2)."""
GB_PER_S = {"h200": 450.0, "h100": 450.0, "a100": 300.0, "l40s": 25.0, "rtx4090": 25.0}
"""One way between GPUs of a node, data sheets: NVLink 4 and 3 (900 and 600 both ways); PCIe 4 × 16, 25 of its 31.5."""
MODEL = """sent: DDP 2(n-1)/n x gradients; FSDP2 (n-1)/n x (2 x weights a pass + gradients); tensor: a layer 4
all-reduces (6 if recomputing) of positions x hidden; pipeline: boundary activations. bubble (s-1)/(rows+s-1)"""
BUCKET, SIZES = 25 * 2**20, (2**16, 2**24)
"""Bytes that DDP reduces at a time (torch: `bucket_cap_mb`); bytes of the all-reduces that are measured."""


@dataclass(frozen=True)
class StepWork:
    """One optimizer step of the whole batch as one device would do it.

    Bytes of a `weight`, on its way to be gathered (`wire`), of a trained one's `gradient`, `optimizer` state and passing
    `update`, of an activation's `value`. `activations`: bytes kept of one microbatch, of which tensor parallelism leaves
    a share `replicated` (10/34 of a layer: Korthikanti et al. 2022); `reductions`: its all-reduces a layer and pass.
    `flops`: as `Links.flops_per_s` counts them; `pass_s`: seconds around a pass that no strategy divides. `end`: weights
    of the embedding or the head, one of which a pipeline's fullest rank has, too; `end_flops`: the head's. `chunks`: of a
    pipeline (0: microbatches). `rows`: dealt out whole (0: any share). `heads`: of keys and values (KV).
    """

    parameters: float
    trained: float
    layers: int
    heads: int
    hidden: int
    tokens: float
    positions: float
    flops: float
    activations: float
    rows: int = 0
    microbatches: int = 1
    chunks: int = 0
    weight: float = 4.0
    wire: float = 4.0
    gradient: float = 4.0
    optimizer: float = 8.0
    update: float = 0.0
    value: float = 4.0
    replicated: float = 10 / 34
    reductions: int = 4
    end: float = 0.0
    end_flops: float = 0.0
    pass_s: float = 0.0


@dataclass(frozen=True)
class Links:
    """GB/s of a rank `inside` its node and of a node to others, sustained FLOP/s of a rank, seconds to start a collective.

    `overlap`: share of DDP's and FSDP's communication that enough arithmetic hides; it and latency assume NCCL.
    """

    inside: float
    between: float
    flops_per_s: float
    devices_per_node: int = 8
    latency_s: float = 30e-6
    overlap: float = 0.8

    def ring(self, ranks: int, apart: int) -> tuple[str, float]:
        """The link that bounds a ring of every `apart`-th rank, beside which as many others run; bytes/s of a rank."""
        if ranks * apart <= self.devices_per_node:
            return "inside", self.inside * 1e9
        return "between", self.between * 1e9 / min(apart, self.devices_per_node)


@dataclass(frozen=True)
class Prediction:
    """A step: bytes kept and sent by the fullest rank, seconds, and the speed-up over one device as if all fitted there."""

    strategy: str
    ranks: int
    why_not: str = ""  # then no numbers follow
    memory: dict[str, float] = field(default_factory=dict)
    volume: float = 0.0
    link: str = ""
    compute_seconds: float = math.nan
    communication_seconds: float = math.nan
    exposed_seconds: float = math.nan  # the part of it that arithmetic does not hide
    bubble_seconds: float = math.nan
    step_seconds: float = math.nan
    speed_up: float = math.nan
    efficiency: float = math.nan
    idle: int = 0  # ranks without a row


@dataclass(frozen=True)
class _Layout:
    """How `ranks` devices are shared out: pipeline stages × tensor-parallel ranks × copies that share the rows."""

    stages: int
    tensor: int
    copies: int
    shards: int
    """Ranks that a weight is sharded over: all copies under FSDP2, else 1."""


def _layout(work: StepWork, strategy: str, ranks: int, tensor: int) -> _Layout | str:
    """The layout of a strategy, or why the work cannot be shared so."""
    stages = ranks if strategy == "pipeline" else 1
    group = {"tensor": ranks, "tensor_ddp": tensor, "tensor_data": tensor}.get(strategy, 1)
    # a stage holds whole layers, a tensor-parallel rank whole heads, and every group has as many ranks
    shared = (work.layers, "layers", stages), (work.heads, "KV heads", group), (ranks, "ranks", group)
    for number, name, by in shared:
        near = min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - by))
        if near != by:
            return f"{by} cannot share {number} {name}; {near} can"
    copies = ranks // (stages * group)
    return _Layout(stages, group, copies, copies if strategy in ("fsdp", "tensor_data") else 1)


def predict(work: StepWork, links: Links, strategy: str, ranks: int, tensor: int = 1) -> Prediction:
    """One step on `ranks` devices; `tensor`: size of the tensor-parallel groups of `tensor_data`. Raises `ModelError`.

    step = compute + exposed + bubble, in seconds of the slowest rank. Exposed is what is sent (bytes / link + starts)
    less what arithmetic hides of it: DDP's all-reduce behind the last backward pass, FSDP2's gathering and scattering
    behind all of the compute, `Links.overlap` of it at most; of tensor and pipeline parallelism nothing is hidden. The
    bubble is (compute + exposed) / chunks × (stages − 1).
    """
    if strategy not in STRATEGIES or min(ranks, tensor) < 1:
        raise ModelError(f"no strategy '{strategy}' on {ranks} ranks; known: {', '.join(STRATEGIES)}")
    layout = _layout(work, strategy, ranks, tensor)
    if isinstance(layout, str):
        return Prediction(strategy, ranks, layout)
    stages, copies = layout.stages, layout.copies

    # rows are dealt out whole, so the fullest rank decides: its share of the batch, and the passes it needs
    most = math.ceil(work.rows / copies)
    share = most / work.rows if work.rows else 1 / copies
    # less a hair: a share of exactly one pass must not round up to two
    passes = math.ceil(share * work.microbatches - 1e-9)
    chunks = (work.chunks or work.microbatches) if stages > 1 else work.microbatches

    # seconds of arithmetic: on one device, and on the slowest rank, whose stage has its layers and one end
    one = work.flops / links.flops_per_s + work.microbatches * work.pass_s
    stage = work.flops / stages + (1 - 1 / stages) * work.end_flops
    compute = stage * share / layout.tensor / links.flops_per_s
    compute += (passes if stages == 1 else 1) * work.pass_s
    # bytes and seconds of what is sent, and the seconds of it that nothing hides
    volume, taken, exposed = 0.0, 0.0, 0.0
    over: dict[str, bool] = {}
    for sent, starts, group, apart, behind in _sends(work, layout, share, passes, compute):
        link, speed = links.ring(group, apart)
        seconds = sent / speed + starts * links.latency_s
        volume, taken, over[link] = volume + sent, taken + seconds, True
        exposed += seconds - min(links.overlap * seconds, behind)
    bubble = (compute + exposed) / chunks * (stages - 1)
    step = compute + exposed + bubble
    memory = _memory(work, layout, share, passes, chunks)
    link = "both" if len(over) > 1 else "".join(over)
    idle = copies - math.ceil(work.rows / most) if work.rows else 0
    seconds = (compute, taken, exposed, bubble, step)
    return Prediction(
        strategy, ranks, "", memory, volume, link, *seconds, one / step, one / step / ranks, idle
    )


def _memory(work: StepWork, layout: _Layout, share: float, passes: int, chunks: int) -> dict[str, float]:
    """Bytes at the peak of the fullest rank, by what they hold."""
    stages, tensor, shards = layout.stages, layout.tensor, layout.shards
    # a pipeline's fullest stage has one end beside its layers; tensor parallelism and sharding divide all of it
    part = (1 / stages + (1 - 1 / stages) * work.end / work.parameters) / tensor / shards
    # FSDP2 holds this layer and the next whole, or one end; gradients are whole until the last pass scatters them
    two_layers = 2 * (work.parameters - work.end) / work.layers
    gathered = (shards > 1) * max(work.end, two_layers) / tensor * work.wire
    # 1F1B: as many chunks as there are stages are on their way at most
    kept = work.activations * min(1.0, share * work.microbatches / passes)
    kept *= work.microbatches / chunks * min(stages, chunks) / stages
    kept *= work.replicated + (1 - work.replicated) / tensor
    return {
        "weights": work.parameters * work.weight * part + gathered,
        "gradients": work.trained * work.gradient * part * (shards if passes > 1 else 1),
        "optimizer": work.trained * work.optimizer * part,
        # AdamW's update needs its room when activations are gone
        "activations": max(kept, work.trained * work.update * part),
    }


def _sends(
    work: StepWork, layout: _Layout, share: float, passes: int, compute: float
) -> Iterator[tuple[float, float, int, int, float]]:
    """Bytes that a rank sends, in how many collectives, ranks of a ring and their distance, seconds to hide it behind."""
    stages, tensor, copies = layout.stages, layout.tensor, layout.copies
    gradients = work.trained * work.gradient / tensor
    each = work.positions * share * work.hidden * work.value  # bytes of one layer's output
    if layout.shards > 1:
        sent = (copies - 1) / copies * (2 * passes * work.parameters / tensor * work.wire + gradients)
        yield sent, (2 * passes + 1) * (work.layers + 1), copies, tensor, compute
    elif copies > 1:  # behind the last pass's backward part, two thirds of it
        sent = 2 * (copies - 1) / copies * gradients
        yield sent, math.ceil(gradients / BUCKET), copies, tensor, compute / passes * 2 / 3
    if tensor > 1:
        sums = work.reductions * work.layers
        yield 2 * (tensor - 1) / tensor * sums * each, sums * passes, tensor, 1, 0.0
    if stages > 1:
        yield 2 * each, 2 * (work.chunks or work.microbatches), stages, 1, 0.0


def work_of(setup: Setup) -> StepWork:
    """A step of a training, every text as long as it may be, from the plan for its machine. Raises `ModelError`."""
    from kit.train.plan import dry  # with TRL and PEFT; a rank that only measures its links does without
    from kit.train.plan import fit as plan

    seen, fit, machine, dtype = setup.seen, setup.fit, setup.machine, setup.dtype
    estimate = plan.plan_training(setup)
    config = dry.read_config(setup.base_model, setup.trust_remote_code).get_text_config()
    # a plan's activations are the room that AdamW's update takes where that is more; in 8 bits it takes none
    forward = plan.plan_training(replace(setup, optimizer="adamw_8bit")).parts["activations"]
    passes, saved = fit.accumulation, max(forward * plan.MB, 1.0)
    texts = fit.step_rows * fit.texts
    parameters = seen.linear + seen.other + seen.trained * (not setup.full)
    weight = (
        sum(estimate.parts.get(part, 0) for part in ("weights", "trained", "reference"))
        * plan.MB
        / parameters
    )
    positions = texts * (fit.tokens + seen.virtual)
    again = setup.activation_checkpointing
    inputs = again * seen.layers * seen.hidden * dtype.itemsize * positions / passes / saved
    speed = machine.flops_per_s * plan.EFFICIENCY["gpu" if machine.gpu else dtype]
    return StepWork(
        parameters=parameters,
        trained=seen.trained,
        layers=seen.layers,
        heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        hidden=seen.hidden,
        tokens=texts * fit.tokens,
        positions=positions,
        flops=(estimate.seconds / fit.steps - passes * plan.PASS_S) * speed,
        activations=saved,
        rows=texts,
        microbatches=passes,
        chunks=texts,
        weight=weight,
        wire=min(weight, dtype.itemsize),
        optimizer=plan.OPTIMIZER[setup.optimizer],
        update=4.0 * (machine.gpu and setup.optimizer == "adamw"),
        value=dtype.itemsize,
        replicated=min(1.0, inputs + (1 - inputs) * 10 / 34),
        reductions=4 + 2 * again,
        end=seen.flops.head,
        end_flops=(6 + 2 * setup.full) * seen.flops.head * positions,
        pass_s=plan.PASS_S,
    )


def measured_links(flops_per_s: float, overlap: float = 0.0, repeats: int = 9) -> Links:
    """A line through the seconds of two sizes of all-reduce in the open process group of two ranks or more.

    Every rank must call it. `flops_per_s`: what one makes of `Work.flops`, measured before. Nodes are not told apart.
    """
    n, taken = dist.get_world_size(), []
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    for size in SIZES:
        tensor = torch.zeros(size // 4, device=device)
        seconds: list[float] = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            dist.all_reduce(tensor)
            tensor[0].item()  # on a GPU: waits for it
            seconds.append(time.perf_counter() - began)
        taken.append(statistics.median(seconds[1:]))  # the first opens connections
    # the slowest rank is what all wait for, and every rank must come to the same line
    agreed = torch.tensor(taken, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    slope, start = np.polyfit(SIZES, agreed.tolist(), 1)
    speed = 2 * (n - 1) / n / max(float(slope), 1e-15) / 1e9
    return Links(speed, speed, flops_per_s, n, max(float(start), 0.0), overlap)
