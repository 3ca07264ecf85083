"""What a machine can reach: data sheets, and a matmul measured here."""

import torch

from kit.train.plan import peak
from kit.train.plan.peak import PEAKS, TYPES, measured_peak, peak_of


def test_peaks_are_those_of_data_sheets_and_unknown_gpus_have_none():
    assert peak_of("NVIDIA H200") == peak_of("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989.4e12
    assert [peak_of("NVIDIA A100-SXM4-80GB", t) for t in ("tf32", torch.float8_e5m2)] == [156e12, None]
    others = ("NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 D", "T40")
    assert not any(peak_of(name) for name in others)
    assert peak_of("Tesla T4") is None and peak_of("Tesla T4", "float16") == 65e12
    for row in PEAKS.values():
        assert len(row) == len(TYPES) and sorted(filter(None, row)) == [*filter(None, row)]
    assert measured_peak(64, torch.float32, seconds=0.01) > 0


def test_the_peak_is_looked_for_as_layers_multiply_too(monkeypatch) -> None:
    transposed = []

    def mm(a, b, out):
        transposed.append(not b.is_contiguous())
        return out

    monkeypatch.setattr(peak.torch, "mm", mm)
    measured_peak(8, torch.float32, seconds=0.0)
    assert transposed.count(True) >= 2 and transposed.count(False) >= 2, "each twice: the first warms up"
