"""What a machine can reach: the FLOP/s that a data sheet promises, and those of the best matmul measured here."""

from __future__ import annotations

import re
import time

import torch

TYPES = ("float32", "tf32", "float16", "bfloat16", "fp8")
PEAKS: dict[str, tuple[float, ...]] = {
    "B200": (75, 1100, 2250, 2250, 4500),
    "H200": (66.9, 494.7, 989.4, 989.4, 1978.9),
    "H100 80GB HBM3": (66.9, 494.7, 989.4, 989.4, 1978.9),
    "H100 PCIe": (51, 378, 756, 756, 1513),
    r"A100[- ](SXM4-[48]0GB|PCIE-40GB|80GB PCIe)": (19.5, 156, 312, 312, 0),
    "L40S": (91.6, 183, 362, 362, 733),
    "RTX 4090": (82.6, 82.6, 165.2, 165.2, 330.3),
    "A10G": (35, 35, 70, 70, 0),
    "L4": (30.3, 60, 121, 121, 242.5),
    "T4": (8.1, 0, 65, 0, 0),
}
"""Dense TFLOP/s of `TYPES` (0: none) by what torch calls a GPU, a pattern; tensor cores with float32 sums.

NVIDIA's data sheets, half of what they say with sparsity; H100 SXM and H200: Hopper whitepaper, table 2; RTX 4090: Ada
whitepaper, appendix A; B200: HGX B200's data sheet. `float32` is without TF32.
"""


def peak_of(device_name: str, dtype: torch.dtype | str = "bfloat16") -> float | None:
    """The data sheet's FLOP/s of a GPU that torch calls so; None for another, a slice of one, a type it has not."""
    kind = re.sub(r"^float8.*", "fp8", str(dtype).removeprefix("torch."))
    named = (p for n, p in PEAKS.items() if re.fullmatch(rf"(NVIDIA |GeForce |Tesla )*{n}", device_name))
    return dict(zip(TYPES, next(named, ()), strict=False)).get(kind, 0) * 1e12 or None


def measured_peak(edge: int, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOP/s of the best [edge × edge] matmul seen in about `seconds`: the dense peak of this machine.

    With the threads that torch uses now, on the GPU where there is one. A data sheet's peak is higher.
    """
    # The second matrix as it lies and transposed, as in a linear layer: a CPU without bfloat16 multiplies the first
    # at 1 GFLOP/s and the other at 10, and a training that reaches five times the "peak" would follow.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    out = torch.empty(edge, edge, device=device, dtype=dtype)
    best, end, tries = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < end or tries < 4:  # the first of either kind warms up
        began = time.perf_counter()
        torch.mm(a, b.T if tries % 2 else b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best, tries = min(best, time.perf_counter() - began), tries + 1
    return 2 * edge**3 / best
