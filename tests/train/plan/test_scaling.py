"""Scaling on paper: what is conserved, answers by hand, published weak spots, and links measured between processes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import torch.multiprocessing
from support import tiny_model

from kit.errors import ModelError
from kit.params import FinetuneSft
from kit.train.plan import fit, scaling
from kit.train.plan.machine import GPUS
from kit.train.plan.scaling import STRATEGIES, Links, StepWork, measured_links, predict, work_of
from kit.train.plan.setup import resolve_setup

GB = 1e9
# 250M float32 weights, all trained: a gradient of 1 GB; 12 passes
WORK = StepWork(250e6, 250e6, 48, 8, 1024, 10_000, 12_000, flops=2.4e12, activations=3e9, microbatches=12)
LINKS = Links(inside=100, between=10, flops_per_s=1e12, devices_per_node=8, latency_s=0, overlap=0)


def made(strategy, ranks, work=WORK, links=LINKS, tensor=1):
    return predict(work, links, strategy, ranks, tensor)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_device_is_the_run_itself(strategy):
    work = replace(WORK, rows=12, pass_s=0.1, end=20e6, end_flops=1e11, update=4)
    one = made(strategy, 1, work, replace(LINKS, latency_s=1))
    assert one.speed_up == one.efficiency == 1 and one.volume + one.exposed_seconds + one.bubble_seconds == 0
    assert one.step_seconds == pytest.approx(2.4 + 12 * 0.1) and one.link == "" and one.idle == 0
    assert one.memory == {"weights": GB, "gradients": GB, "optimizer": 2 * GB, "activations": 3 * GB}


def test_volumes_by_hand():
    whole = replace(WORK, microbatches=1)
    assert made("ddp", 8).volume == pytest.approx(1.75 * GB)
    assert made("fsdp", 8, whole).volume == pytest.approx(3 * 7 / 8 * GB)
    # adapters of 1 %: only they are reduced, but frozen weights are gathered, too
    lora = replace(whole, trained=2.5e6)
    assert made("ddp", 8, lora).volume == pytest.approx(0.0175 * GB)
    assert made("fsdp", 8, lora).volume == pytest.approx(7 / 8 * 2.01 * GB)
    # two passes a rank gather twice and scatter once; gradients wait whole
    twice = made("fsdp", 8, replace(WORK, microbatches=16))
    assert twice.volume == pytest.approx(7 / 8 * 5 * GB) and twice.memory["gradients"] == GB
    sums = 48 * 12_000 * 1024 * 4
    assert made("tensor", 4).volume == pytest.approx(2 * 3 / 4 * 4 * sums)
    assert made("tensor", 4, replace(WORK, reductions=6)).volume == pytest.approx(2 * 3 / 4 * 6 * sums)
    assert made("pipeline", 4).volume == 2 * 12_000 * 1024 * 4
    both = made("tensor_ddp", 8, tensor=4)
    assert both.volume == pytest.approx(2 * 3 / 4 * 4 * sums / 2 + 2 * 1 / 2 * GB / 4)
    assert made("ddp", 8).volume < both.volume < made("tensor", 8).volume


@pytest.mark.parametrize("stages, chunks, share", [(4, 12, 0.2), (2, 1, 0.5), (8, 57, 7 / 64)])
def test_a_pipelines_bubble_is_gpipes(stages, chunks, share):
    for work in (replace(WORK, microbatches=chunks), replace(WORK, chunks=chunks)):
        found = made("pipeline", stages, work)
        assert found.bubble_seconds / found.step_seconds == pytest.approx(share)
    assert found.compute_seconds == pytest.approx(2.4 / stages)
    # the stage with the head sets the pace
    found = made("pipeline", 4, replace(WORK, end=50e6, end_flops=0.4e12))
    assert (found.compute_seconds, found.memory["weights"]) == (pytest.approx(0.9), pytest.approx(0.4 * GB))
    assert found.memory["activations"] == pytest.approx(3 * GB)  # 4 of 12 passes under way, a quarter of each


def test_what_is_divided_is_whole_again_over_all_ranks():
    for n in (2, 4, 8):
        for strategy in ("pipeline", "tensor", "fsdp"):
            memory = made(strategy, n, replace(WORK, microbatches=1)).memory
            assert n * memory["optimizer"] == 2 * GB and n * memory["gradients"] == GB
            assert n * (memory["weights"] - 2 / 48 * GB * (strategy == "fsdp")) == pytest.approx(GB)
        assert made("ddp", n).memory["weights"] == GB
        assert 2 * n * made("tensor_data", 2 * n, tensor=2).memory["optimizer"] == 2 * GB
    sizes = [sum(made("fsdp", n).memory.values()) for n in (1, 2, 4, 8, 16, 32)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 2
    # of a layer's 34 units of activations tensor parallelism divides 24; an update's room comes after them
    assert made("tensor", 8).memory["activations"] == pytest.approx(3 * GB * (10 + 24 / 8) / 34)
    assert made("ddp", 4, replace(WORK, update=16)).memory["activations"] == 4 * GB


def test_tensor_parallelism_across_nodes_is_slower_than_data_between_and_tensors_inside():
    """Narayanan et al. 2021, takeaway 1: tensor parallelism up to the devices of a node, something else between nodes."""
    work = replace(WORK, heads=16)
    across, mixed = made("tensor", 16, work), made("tensor_ddp", 16, work, tensor=8)
    assert across.link == "between" and mixed.link == "both" and made("tensor", 8).link == "inside"
    assert across.step_seconds > 2 * mixed.step_seconds and across.speed_up < made("tensor", 8).speed_up
    # eight rings leave the node at once; together they bring no more through than one
    assert LINKS.ring(2, 8) == ("between", 10e9 / 8) and LINKS.ring(8, 1) == ("inside", 100e9)


def test_arithmetic_hides_no_more_than_it_lasts():
    links = replace(LINKS, overlap=0.8)
    slow = made("ddp", 8, links=replace(links, inside=1.75))  # two passes, the last one's backward 0.1 s
    assert slow.communication_seconds == pytest.approx(1) and slow.exposed_seconds == pytest.approx(0.9)
    assert made("ddp", 8, links=replace(links, inside=175)).exposed_seconds == pytest.approx(0.2 * 0.01)
    late = replace(LINKS, latency_s=1e-3)
    exposed = [made("tensor", 2, links=x).exposed_seconds for x in (LINKS, links, late)]
    assert exposed[0] == exposed[1] == pytest.approx(exposed[2] - 4 * 48 * 12 * 1e-3)


def test_what_cannot_be_shared_says_so_with_the_nearest_that_can():
    assert made("tensor", 16).why_not == "16 cannot share 8 KV heads; 8 can"
    assert made("pipeline", 32).why_not == "32 cannot share 48 layers; 24 can"
    assert made("tensor_data", 12, tensor=8).why_not == "8 cannot share 12 ranks; 6 can"
    rows = [made("ddp", n, replace(WORK, rows=12)) for n in (8, 32)]  # the fullest rank has two, and one
    assert [r.idle for r in rows] == [2, 20] and rows[0].speed_up < 6 < rows[1].speed_up < 12
    with pytest.raises(ModelError, match="no strategy 'zero' on 2 ranks; known: ddp"):
        made("zero", 2)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("method, optimizer", [("full", "adamw"), ("lora", "adamw"), ("qlora", "adamw_8bit")])
def test_on_one_gpu_it_is_the_plan(method, optimizer, again):
    passes = {"gradient_accumulation": 3, "activation_checkpointing": again, "sft_steps": 10}
    p = FinetuneSft(base_model=tiny_model(), method=method, optimizer=optimizer, **passes)
    machine = GPUS["h100"]
    setup = resolve_setup(p, machine=machine)
    work, usual = work_of(setup), fit.plan_training(setup)
    one = predict(work, Links(450, 50, machine.flops_per_s * fit.EFFICIENCY["gpu"]), "ddp", 1)
    assert 10 * one.step_seconds == pytest.approx(usual.seconds) and work.rows == 12
    assert sum(one.memory.values()) == pytest.approx((usual.memory_mb - usual.parts["evaluation"]) * fit.MB)
    assert work.tokens == 12 * p.max_tokens and 0 < work.replicated <= 1
    assert set(scaling.GB_PER_S) == set(GPUS)


def test_links_are_a_line_through_what_two_sizes_took(monkeypatch):
    clock = [0.0]
    all_reduce = lambda x, op=None: clock.append(clock[-1] + 1e-3 + x.nbytes / 2e9)  # noqa: E731
    four = {"get_world_size": lambda: 4, "get_backend": lambda: "gloo", "ReduceOp": dist.ReduceOp}
    monkeypatch.setattr(scaling, "dist", SimpleNamespace(all_reduce=all_reduce, **four))
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: clock[-1])
    found = measured_links(1e9)
    assert found.latency_s == pytest.approx(1e-3, rel=1e-3) and found.overlap == 0
    assert found.inside == found.between == pytest.approx(2e9 * 2 * 3 / 4 / 1e9, rel=1e-3)


def _measure(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = measured_links(3e9, repeats=3)
    (folder / str(rank)).write_text(json.dumps(vars(found)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_on_what_connects_them(tmp_path):
    torch.multiprocessing.spawn(_measure, (tmp_path,), nprocs=2)
    mine, theirs = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert mine == theirs and mine["devices_per_node"] == 2 and mine["flops_per_s"] == 3e9
    assert 0 < mine["inside"] < 1e4 and 0 <= mine["latency_s"] < 1
