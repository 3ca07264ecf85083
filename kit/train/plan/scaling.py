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


def predict(work: StepWork, links: Links, strategy: str, ranks: int, tensor: int = 1) -> Prediction:
    """One step on `ranks` devices; `tensor`: size of the tensor-parallel groups of `tensor_data`. Raises `ModelError`."""
    if strategy not in STRATEGIES or min(ranks, tensor) < 1:
        raise ModelError(f"no strategy '{strategy}' on {ranks} ranks; known: {', '.join(STRATEGIES)}")
    s = ranks if strategy == "pipeline" else 1
    t = {"tensor": ranks, "tensor_ddp": tensor, "tensor_data": tensor}.get(strategy, 1)
    shared = (work.layers, "layers", s), (work.heads, "KV heads", t), (ranks, "ranks", t)
    for what, name, by in shared:
        near = min((n for n in range(1, what + 1) if what % n == 0), key=lambda n: abs(n - by))
        if near != by:
            return Prediction(strategy, ranks, f"{by} cannot share {what} {name}; {near} can")
    d, m = ranks // (s * t), work.microbatches
    shards, chunks = d if strategy in ("fsdp", "tensor_data") else 1, (work.chunks or m) if s > 1 else m
    most = math.ceil(work.rows / d)  # rows of the fullest rank
    share = most / work.rows if work.rows else 1 / d
    passes = math.ceil(share * m - 1e-9)
    one = work.flops / links.flops_per_s + m * work.pass_s
    stage = work.flops / s + (1 - 1 / s) * work.end_flops  # the slowest: its layers and one end
    compute = stage * share / t / links.flops_per_s + (passes if s == 1 else 1) * work.pass_s
    volume, taken, exposed, over = 0.0, 0.0, 0.0, {}
    for sent, starts, group, apart, behind in _sends(work, s, t, d, shards, share, passes, compute):
        link, speed = links.ring(group, apart)
        seconds = sent / speed + starts * links.latency_s
        volume, taken, over[link] = volume + sent, taken + seconds, True
        exposed += seconds - min(links.overlap * seconds, behind)
    bubble = (compute + exposed) / chunks * (s - 1)
    step = compute + exposed + bubble
    part = (1 / s + (1 - 1 / s) * work.end / work.parameters) / t / shards
    # FSDP2 holds this layer and the next whole, or one end; gradients are whole until the last pass scatters them
    gathered = (shards > 1) * max(work.end, 2 * (work.parameters - work.end) / work.layers) / t * work.wire
    kept = work.activations * min(1.0, share * m / passes) * m / chunks * min(s, chunks) / s
    kept *= work.replicated + (1 - work.replicated) / t
    memory = {
        "weights": work.parameters * work.weight * part + gathered,
        "gradients": work.trained * work.gradient * part * (shards if passes > 1 else 1),
        "optimizer": work.trained * work.optimizer * part,
        "activations": max(kept, work.trained * work.update * part),
    }
    link, took = "both" if len(over) > 1 else "".join(over), (compute, taken, exposed, bubble, step)
    idle = d - math.ceil(work.rows / most) if work.rows else 0
    return Prediction(strategy, ranks, "", memory, volume, link, *took, one / step, one / step / ranks, idle)


def _sends(
    work: StepWork, s: int, t: int, d: int, shards: int, share: float, passes: int, compute: float
) -> Iterator[tuple[float, float, int, int, float]]:
    """Bytes that a rank sends, in how many collectives, ranks of a ring and their distance, seconds to hide it behind."""
    gradients, each = work.trained * work.gradient / t, work.positions * share * work.hidden * work.value
    if shards > 1:
        sent = (d - 1) / d * (2 * passes * work.parameters / t * work.wire + gradients)
        yield sent, (2 * passes + 1) * (work.layers + 1), d, t, compute
    elif d > 1:  # behind the last pass's backward part, two thirds of it
        yield 2 * (d - 1) / d * gradients, math.ceil(gradients / BUCKET), d, t, compute / passes * 2 / 3
    if t > 1:
        sums = work.reductions * work.layers
        yield 2 * (t - 1) / t * sums * each, sums * passes, t, 1, 0.0
    if s > 1:
        yield 2 * each, 2 * (work.chunks or work.microbatches), s, 1, 0.0


def work_of(setup: Setup) -> StepWork:
    """A step of a training, every text as long as it may be, from the plan for its machine. Raises `ModelError`."""
    from kit.train.plan import dry  # with TRL and PEFT; a rank that only measures its links does without
    from kit.train.plan import fit as plan

    seen, fit, machine, dtype = setup.seen, setup.fit, setup.machine, setup.dtype
    made = plan.plan_training(setup)
    config = dry.read_config(setup.base_model, setup.trust_remote_code).get_text_config()
    # a plan's activations are the room that AdamW's update takes where that is more; in 8 bits it takes none
    forward = plan.plan_training(replace(setup, optimizer="adamw_8bit")).parts["activations"]
    passes, saved = fit.accumulation, max(forward * plan.MB, 1.0)
    texts = fit.step_rows * fit.texts
    parameters = seen.linear + seen.other + seen.trained * (not setup.full)
    weight = sum(made.parts.get(x, 0) for x in ("weights", "trained", "reference")) * plan.MB / parameters
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
        flops=(made.seconds / fit.steps - passes * plan.PASS_S) * speed,
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
        x, seconds = torch.zeros(size // 4, device=device), []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            dist.all_reduce(x)
            x[0].item()  # on a GPU: waits for it
            seconds.append(time.perf_counter() - began)
        taken.append(statistics.median(seconds[1:]))  # the first opens connections
    agreed = torch.tensor(taken, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    slope, start = np.polyfit(SIZES, agreed.tolist(), 1)
    speed = 2 * (n - 1) / n / max(float(slope), 1e-15) / 1e9
    return Links(speed, speed, flops_per_s, n, max(float(start), 0.0), overlap)
