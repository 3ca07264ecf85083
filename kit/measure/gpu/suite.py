"""Every check that needs a GPU, in one run of under 9 minutes on one H100 or H200, without network.

    python -m kit.measure.gpu.suite --out FOLDER [--minutes 9] [--only NAME,…] [--tiny]

Needs torch, transformers and peft; trl, datasets and bitsandbytes for their rows; of the kit only modules that need no
more. Random weights: right for speed and memory. Each row is one line of `FOLDER/gpu_suite.jsonl` at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import time
from dataclasses import asdict, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from kit import process
from kit.measure.gpu import steps
from kit.measure.gpu.steps import DEVICE, GPU, StepCase, free, sync
from kit.train.plan import settings
from kit.train.plan.peak import measured_peak, peak_of

PUBLISHED = 12_473
"""Tokens/s of NeMo AutoModel: Llama-3-8B, LoRA, one H100, rows of 4,096 tokens."""
LIBRARIES = {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "triton"}
# fmt: off
LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192}
LLAMA_8B = LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14_336}
LLAMA_1B = LLAMA | {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "tie_word_embeddings": True}
TINY = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
SWITCHES = ("packing", "activation_checkpointing", "compile", "weights", "attention", "optimizer", "adapter_inputs")
# fmt: on
LORA_8B, FULL_1B = StepCase(LLAMA_8B), StepCase(LLAMA_1B, "full", rows=2)
EAGER_8B = replace(LORA_8B, compile=False, attention="sdpa")
KIT = settings.recipe(full=False, compile_model="on" if GPU else "off")
ROWS: dict[str, Any] = {
    "machine": None,
    "lora_8b": LORA_8B,
    "lora_8b_eager": EAGER_8B,
    "qlora_8b": replace(LORA_8B, method="qlora"),
    "trl_stock": settings.STOCK,
    "trl_kit": KIT,
    "trl_kit_flex": KIT | {"attention": "flex_attention"},
    "qlora_8b_eager": replace(EAGER_8B, method="qlora"),
    "lora_8b_2_rows": replace(LORA_8B, rows=2),
    "full_1b": FULL_1B,
    "lora_1b": replace(FULL_1B, method="lora"),
    "qlora_1b": replace(FULL_1B, method="qlora"),
    "full_1b_most": FULL_1B,
    "lora_1b_most": replace(FULL_1B, method="lora"),
    "lora_8b_packed_flex": replace(LORA_8B, docs=8, attention="flex_attention"),
    "lora_8b_packed_varlen": replace(LORA_8B, docs=8, attention="varlen"),
    "lora_8b_packed_mask": replace(LORA_8B, docs=8, attention="sdpa"),
    **{f"trl_kit_stock_{k}": KIT | {k: settings.STOCK[k]} for k in SWITCHES if KIT[k] != settings.STOCK[k]},
    "lora_8b_flash": replace(LORA_8B, attention="sdpa"),
    "lora_8b_4_rows": replace(LORA_8B, rows=4),
    "lora_8b_bf16_adapters": replace(LORA_8B, adapters="bfloat16"),
    "lora_8b_whole_logits": replace(EAGER_8B, chunk=0),
    "lora_8b_unfused_adamw": replace(EAGER_8B, fused=False),
    "unsloth": "loads models from folders; this suite has none",
    "ddp": "needs several GPUs: torchrun --nproc-per-node N -m kit.train.parallel.rank FOLDER, of notebook 63",
    "ratios": None,
}
"""The most important first: a case to measure, settings of TRL's trainer, or why it is not for this suite."""
SECONDS = {"machine": 10, "lora_8b": 60, "lora_8b_eager": 20, "qlora_8b_eager": 25, "trl_stock": 30}
SECONDS |= dict.fromkeys(("unsloth", "ddp", "ratios"), 0)
"""What a row may take, to be skipped where less is left; 40 where not named."""


class Skip(Exception):
    """Why a row cannot run here."""


class Suite:
    """The sizes of a run, and what its rows have found so far."""

    def __init__(self, tiny: bool) -> None:
        self.tiny, self.found = tiny, {}
        self.edge, self.seconds = (256, 0.1) if tiny else (8192, 1.0)
        self.measured = measured_peak(self.edge, torch.bfloat16, self.seconds)
        self.sheet = peak_of(torch.cuda.get_device_name()) if GPU else None
        self.memory = torch.cuda.mem_get_info()[1] if GPU else process.memory_bytes()

    def run(self, name: str) -> dict[str, Any]:
        """One row by its name. Raises `Skip`, and whatever goes wrong."""
        what = ROWS[name]
        if what is None:
            return self.machine() if name == "machine" else ratios(self.found)
        if isinstance(what, str):
            if name == "unsloth":
                importlib.import_module(name)
            raise Skip(what)
        attention = what.attention if isinstance(what, StepCase) else what["attention"]
        if attention in ("flex_attention", "varlen") and not GPU:
            raise Skip(f"{attention} trains on GPUs only")
        if isinstance(what, dict):
            trl = importlib.import_module("kit.measure.gpu.trainer")
            return trl.epoch(
                TINY if self.tiny else LLAMA_1B, what, *((64, 64, 1) if self.tiny else (4096, 512, 2))
            )
        if name.endswith("_most"):
            what = replace(what, rows=self.fitting(name.removesuffix("_most")))
        if self.tiny:
            what = replace(what, sizes=TINY, length=64, warm=1, steps=2)
        return self.train(what)

    def fitting(self, name: str) -> int:
        """As many rows as memory allows, by what another row took; 16 at most."""
        if not (one := self.found.get(name)):
            raise Skip(f"needs a result of {name}")
        each = (one["peak_bytes"] - one["static_bytes"]) / one["rows"] + 1
        fits = int((0.9 * self.memory - one["static_bytes"]) / each)
        return 3 if self.tiny else max(1, min(16, fits))

    def train(self, case: StepCase) -> dict[str, Any]:
        """Measure a case; where it does not fit, once more with checkpointed activations."""
        note, peak = {}, self.sheet or self.measured
        try:
            row = steps.measure_case(case, peak)
        except torch.OutOfMemoryError:
            row = None  # and on outside of the handler, whose traceback holds the tensors
        if row is None:
            free()
            case = replace(case, checkpointing=True)
            row, note = steps.measure_case(case, peak), {"note": "does not fit without checkpointing"}
        return asdict(case) | row | {"mfu_of_measured_peak": row["mfu"] * peak / self.measured} | note

    def machine(self) -> dict[str, Any]:
        """Peaks of matmuls of random data, and of a copy in device memory, bytes read and written."""
        peaks, times = {"bfloat16": self.measured, "bfloat16_datasheet": self.sheet}, []
        for kind, precision in (("tf32", "high"), ("float32", "highest")):
            torch.set_float32_matmul_precision(precision)
            peaks[kind] = measured_peak(self.edge, torch.float32, self.seconds)
        a = torch.empty(self.edge**2 * 64, dtype=torch.uint8, device=DEVICE).random_()
        b = torch.empty_like(a)
        for _ in range(10):
            began = sync()
            b.copy_(a)
            times.append(sync() - began)
        rate = 2 * len(a) / min(times)
        return {"flops_per_s": peaks, "copy_bytes_per_s": rate, "memory_bytes": self.memory}


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the rows say together. LoRA's speed over full tuning's: FLOPs × optimizer × rest; and with all memory used.

    Memory of full tuning is computed: 16 bytes a weight (float32 weights, gradients, AdamW), without activations.
    """
    rate: dict[str, float] = {k: row["tokens_per_s"] for k, row in rows.items() if "tokens_per_s" in row}
    pairs = {"qlora_over_lora": ("qlora_8b", "lora_8b"), "lora_over_full": ("lora_1b", "full_1b")}
    pairs |= {
        "kit_over_stock": ("trl_kit", "trl_stock"),
        "kit_flex_over_stock": ("trl_kit_flex", "trl_stock"),
    }
    pairs |= {"lora_over_full_all_memory": ("lora_1b_most", "full_1b_most")}
    pairs |= {f"gain_of_{k.removeprefix('trl_kit_stock_')}": ("trl_kit", k) for k in rate if "_stock_" in k}
    out = {k: rate[a] / rate[b] for k, (a, b) in pairs.items() if a in rate and b in rate}
    if "lora_8b" in rows:
        out["lora_over_published"] = rate["lora_8b"] / PUBLISHED
    if {"lora_8b", "lora_8b_eager"} <= rows.keys():  # compiled and by another kernel: the same arithmetic
        out["lora_compiled_loss_less_eager_loss"] = rows["lora_8b"]["loss"] - rows["lora_8b_eager"]["loss"]
    if "qlora_8b" in rows:
        one = rows["qlora_8b"]
        out["qlora_memory_below_full_computed"] = 1 - one["peak_bytes"] / (16 * one["parameters"])
    if "kit_over_stock" in out:
        out["kit_loss_less_stock_loss"] = rows["trl_kit"]["loss_after"] - rows["trl_stock"]["loss_after"]
    if "lora_over_full" in out:
        full, lora = rows["full_1b"], rows["lora_1b"]
        passes = [1 - row["optimizer_seconds"] / row["step_seconds"] for row in (full, lora)]
        flops, optimizer = full["flops_per_token"] / lora["flops_per_token"], passes[1] / passes[0]
        rest = out["lora_over_full"] / flops / optimizer
        out["lora_over_full_by"] = {"flops": flops, "optimizer": optimizer, "rest": rest}
    return out


def attempt(suite: Suite, name: str, left: float) -> dict[str, Any]:
    """A row with its status: done, skipped or failed, and why."""
    began, needed = time.perf_counter(), SECONDS.get(name, 40)
    row: dict[str, Any] = {"row": name, "status": "done"}
    try:
        if left < needed:
            raise Skip(f"may take {needed} s, {left:.0f} s are left")
        suite.found[name] = suite.run(name)
        row |= suite.found[name]
    except (Skip, ImportError) as why:
        row |= {"status": "skipped", "why": str(why)}
    except Exception as error:  # a failed row is a result
        row |= {"status": "failed", "why": f"{type(error).__name__}: {error}"[:500]}
    return row | {"seconds": round(time.perf_counter() - began, 2)}


def main(argv: list[str] | None = None) -> int:
    """Run the rows, the most important first, as long as there is time. Returns 2 without a GPU and `--tiny`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_suite"), help="folder of gpu_suite.jsonl")
    parser.add_argument("--minutes", type=float, default=9.0, help="rows that no longer fit are skipped")
    parser.add_argument("--only", default="", help="names of rows, by commas: " + ", ".join(ROWS))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: does it run?")
    p, began = parser.parse_args(argv), time.perf_counter()
    only = {*filter(None, p.only.split(","))}
    if unknown := only - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if not GPU and not p.tiny:
        print("no GPU here: --tiny tries every row on the CPU, with tiny shapes")
        return 2
    torch.compiler.set_stance("default" if GPU else "force_eager")
    p.out.mkdir(parents=True, exist_ok=True)
    status, driver = subprocess.getstatusoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    machine = f"{torch.cuda.get_device_name()}, driver {'?' if status else driver}" if GPU else "CPU"
    versions = {d.name: d.version for d in distributions() if d.name in LIBRARIES}
    status, commit = subprocess.getstatusoutput("git rev-parse HEAD")
    here = {"machine": machine, "commit": None if status else commit, "versions": versions}
    suite, missing = Suite(p.tiny), []
    with (p.out / "gpu_suite.jsonl").open("w", encoding="utf-8") as file:
        for name in [n for n in ROWS if not only or n in only | {"ratios"}]:
            row = attempt(suite, name, p.minutes * 60 - (time.perf_counter() - began))
            file.write(json.dumps(row | here) + "\n")
            file.flush()
            short = [f"{k} {row[k]:,.3g}" for k in ("tokens_per_s", "mfu", "peak_bytes") if row.get(k)]
            print(f"{name}: {row['status']}", *short, f"{row['seconds']} s", flush=True)
            missing += [f"{row['status']}: {name}: {row['why']}"] if "why" in row else []
            free()
    print(json.dumps(suite.found.get("ratios"), indent=1), *missing, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
