"""The GPU suite, tried on the CPU with tiny shapes: every row runs, alone of the kit's other needs."""

import json
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from kit import ROOT
from kit.measure.gpu import suite as gpu_suite
from kit.measure.gpu.steps import backward, loss_sum

MISSING = ("pydantic", "duckdb", "pyspark", "warcio")
"""Libraries that a bare GPU machine need not have."""


def suite(folder, *words: str, without: tuple[str, ...] = MISSING) -> dict[str, dict]:
    """Rows by name of a run in a process that cannot import `without`, nor the rest of the kit."""
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in (*without, "kit.params", "kit.lake"))
    code = f"import sys\n{block}from kit.measure.gpu.suite import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-W", "ignore", "-c", code, "--tiny", "--out", str(folder), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "gpu_suite.jsonl").read_text("utf-8").splitlines()]
    for row in rows:  # what was not done is said again at the end
        assert row["status"] == "done" or f"{row['status']}: {row['row']}: {row['why']}" in done.stdout
    return {row["row"]: row for row in rows}


def test_a_missing_library_skips_its_rows_and_no_other(tmp_path) -> None:
    names = ["machine", "lora_8b", "qlora_8b", "trl_kit"]
    rows = suite(tmp_path, "--only", ",".join(names), without=(*MISSING, "pyarrow", "bitsandbytes"))
    assert list(rows) == [n for n in gpu_suite.ROWS if n in names] + ["ratios"]
    assert [rows[n]["status"] for n in names] == ["done", "done", "skipped", "skipped"]
    assert "bitsandbytes" in rows["qlora_8b"]["why"] and "pyarrow" in rows["trl_kit"]["why"]
    lora = rows["lora_8b"]
    assert 0 < lora["mfu"] < lora["mfu_full_attention"] and lora["convention"] and lora["versions"]["torch"]


@pytest.mark.slow
@pytest.mark.skipif(gpu_suite.GPU, reason="what runs differs there")
def test_every_row_runs_or_says_why_not(tmp_path) -> None:
    rows = suite(tmp_path)
    assert list(rows) == list(gpu_suite.ROWS)
    not_done = {name for name, row in rows.items() if row["status"] != "done"}
    assert not_done == {n for n in rows if n.endswith(("_flex", "_varlen"))} | {"unsloth", "ddp"}
    for row in (r for r in rows.values() if "mfu" in r):
        assert 0 < row["mfu"] <= row["hfu"] < 1.2, row["row"]
    assert rows["qlora_1b"]["trained_parameters"] == rows["lora_1b"]["trained_parameters"]
    assert rows["full_1b"]["flops_per_token"] > rows["lora_1b"]["flops_per_token"]
    assert abs(rows["lora_8b_whole_logits"]["loss"] - rows["lora_8b_eager"]["loss"]) < 1e-3
    both = rows["ratios"]
    assert abs(both["lora_compiled_loss_less_eager_loss"]) < 1e-3
    assert abs(both["kit_loss_less_stock_loss"]) < 1e-2
    parts = both["lora_over_full_by"]
    assert parts["flops"] * parts["optimizer"] * parts["rest"] == pytest.approx(both["lora_over_full"])


def test_a_row_that_does_not_fit_is_a_result(monkeypatch) -> None:
    tried = []

    def full(case, peak):
        tried.append(case.checkpointing)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(gpu_suite.steps, "measure_case", full)
    row = gpu_suite.attempt(gpu_suite.Suite(tiny=True), "lora_8b", left=99)
    assert row["status"] == "failed" and "no room" in row["why"] and tried == [False, True]
    late = gpu_suite.attempt(gpu_suite.Suite(tiny=True), "lora_8b", left=5)
    assert late["status"] == "skipped" and "5 s are left" in late["why"]


@pytest.mark.skipif(gpu_suite.GPU, reason="there is a GPU")
def test_without_a_gpu_one_line_and_status_2(capsys) -> None:
    assert gpu_suite.main([]) == 2
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("chunk", [7, 32, 0])
def test_chunked_loss_and_its_gradients_are_those_of_the_whole(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(32, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (32,)).masked_fill(torch.arange(32) % 5 == 0, -100)
    whole = cross_entropy(linear(hidden, weight), labels)
    wanted = torch.autograd.grad(whole, (hidden, weight))
    below = hidden * 1  # the loss stands on what has a gradient of its own
    found = backward(below, weight, labels, chunk, loss_sum, torch.autocast("cpu", enabled=False))
    torch.testing.assert_close(found, whole.detach(), rtol=1e-5, atol=1e-5)
    for got, want in zip((hidden.grad, weight.grad), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
