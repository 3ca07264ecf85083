"""Machines that a training may run on: this one, and the GPUs that `kit estimate --gpu` knows."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kit import process
from kit.train.plan.peak import measured_peak, peak_of

MB = 2**20
CPU_GB_PER_S = 10.0
"""Taken for every CPU."""


@dataclass(frozen=True)
class Machine:
    """Where a run would be: free memory (MB), FLOP/s of a large matmul in the type it computes in, read speed (GB/s)."""

    name: str
    memory_mb: float
    flops_per_s: float
    gb_per_s: float
    gpu: bool = True


GPUS = {
    "h200": Machine("H200", 143_771, peak_of("NVIDIA H200"), 4800),
    "h100": Machine("H100 SXM", 81_559, peak_of("NVIDIA H100 80GB HBM3"), 3350),
    "a100": Machine("A100 80 GB", 81_920, peak_of("NVIDIA A100-SXM4-80GB"), 2039),
    "l40s": Machine("L40S", 46_068, peak_of("NVIDIA L40S"), 864),
    "rtx4090": Machine("RTX 4090", 24_564, peak_of("NVIDIA GeForce RTX 4090"), 1008),
}
"""NVIDIA's data sheets: memory as the driver shows it, dense bfloat16 (`peak.PEAKS`), and the memory's speed."""


def this_machine(dtype: torch.dtype) -> Machine:
    """The GPU where there is one, else the CPU, computing in `dtype`; memory that is free now, or already this process's own."""
    peak = machine_peak(str(dtype).removeprefix("torch."))
    if torch.cuda.is_available():
        free, name = torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return Machine(name, free / MB, peak, GPUS["a100"].gb_per_s)
    memory = process.free_bytes() + process.resident_bytes()
    return Machine("this machine", memory / MB, peak, CPU_GB_PER_S, gpu=False)


@functools.cache
def machine_peak(dtype: str) -> float:
    """FLOP/s of a matmul in `dtype` here and now; half a second, once a process."""
    return measured_peak(1024 if not torch.cuda.is_available() else 8192, getattr(torch, dtype), seconds=0.5)
