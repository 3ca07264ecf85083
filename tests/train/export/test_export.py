"""Merging, saving, reloading, consolidating and serving: nothing of it may change the model that was tuned."""

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import logits, make_lake, outputs, sft_params, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from kit import ROOT, params
from kit.errors import LakeError, ModelError
from kit.train.export import export
from kit.train.export.export import merge_and_export
from kit.train.models import adapters, load
from kit.train.models import consolidate as shards
from kit.train.models.consolidate import consolidate
from kit.train.tune.sft import finetune

# two real processes: FSDP2 on gloo, as `dcp.save` writes it, nested with an optimizer's state, flat, or as slices
# of safetensors; argv: model, target, what to write
FSDP2 = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
def rank(r, model, target):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{target}.rendezvous", rank=r, world_size=2)
    m = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for layer in m.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(m, mesh=init_device_mesh("cpu", (2,)))
    state = m.state_dict()
    dcp.save({"model": state, "optim": {"state": {"exp_avg": state["model.norm.weight"]}}}, checkpoint_id=f"{target}/nested")
    dcp.save(state, checkpoint_id=f"{target}/flat")
    state.pop("lm_head.weight")
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(f"{target}/slices", save_distributed=True))
    dist.destroy_process_group()
if __name__ == "__main__":
    mp.spawn(rank, sys.argv[1:3], nprocs=2)
"""
MEASURED = """
import json, sys, time
from pathlib import Path
import psutil
from kit.train.models.consolidate import consolidate
from kit.train.loop.meter import peak_memory
consolidate(Path(sys.argv[3]), Path(sys.argv[2] + "-warm"), 100)
before = psutil.Process().memory_info().rss / 2**20
with peak_memory(0.002) as peak:
    consolidate(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4]), Path(sys.argv[5]))
print(json.dumps(peak["mb"] - before))
"""


def run_python(code, tmp_path, *argv):
    script = tmp_path / "script.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, *map(str, argv)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def weights(folder):
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def drift(found, truth):
    return float((found - truth).norm() / truth.norm())


def export_params(lake, **values):
    small = {"max_tokens": 48, "export_rows": 2, "export_tokens": 6, "threads": 1, "serve": False}
    return params.MergeAndExport(**{"lake": lake.uri, "base_model": tiny_model(), **small, **values})


def tuned_lake(path, **values):
    lake = make_lake(path)
    finetune(sft_params(lake, sft_learning_rate=1e-2, **values), lake)
    return lake


@pytest.mark.parametrize(
    ("method", "limit"), [("lora", 1e-3), ("dora", 1e-3), ("full", 1e-3), ("qlora", 1e-2)]
)
def test_the_exported_model_is_the_tuned_one(tmp_path, method, limit):
    lake = tuned_lake(tmp_path, method=method)
    manifest = merge_and_export(export_params(lake, export_dtype="float32"), lake)
    steps = {s["step"]: s for s in lake.table(manifest, "drift").to_pylist()}
    assert steps["merged"]["relative"] < limit < 0.05 < steps["base"]["relative"]
    assert steps["reloaded"] == {**steps["cast"], "step": "reloaded"}
    assert steps["reloaded"]["same_top_token"] == 1
    assert steps["merged"]["perplexity"] == pytest.approx(steps["attached"]["perplexity"], rel=1e-4)
    folder = lake.local_folder(manifest, "model")
    assert (
        drift(
            logits(load.load_model(folder, dtype="float32")),
            logits(
                load.load_model(
                    tiny_model(),
                    dtype="float32",
                    adapters=[lake.local_folder(lake.need("sample", "60_finetune_sft"), "model")],
                )
            ),
        )
        == 0
    )
    answers = lake.table(manifest, "answers").to_pylist()
    assert len(answers) == manifest.counts.records_out == 2
    assert all(a["merged"] == a["reloaded"] and a["same_tokens"] == 1 and a["truth"] for a in answers)
    assert manifest.metrics["served"] == {"engine": "not asked"}


def test_trap_merging_into_a_4_bit_base_quantises_again(tmp_path):
    torch.manual_seed(1)
    base = load.load_model(tiny_model(), dtype="float32", quantization="nf4")
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    folder = adapters.save_adapter(model, tmp_path, tiny_model(), "nf4")
    truth = logits(
        export.attached(lambda **how: load.load_model(tiny_model(), **how), [folder], "nf4", "float32")
    )
    assert drift(logits(model), truth) < 1e-6
    assert drift(logits(load.load_model(tiny_model(), dtype="float32", adapters=[folder])), truth) < 1e-2
    assert drift(logits(model.merge_and_unload()), truth) > 0.05, (
        "the library has mended this: merge directly"
    )
    plain = adapters.merge_adapter(load.load_model(tiny_model(), dtype="float32"), folder)
    assert drift(logits(plain), truth) > 0.05, "nor is the base before quantisation the one that was tuned"


def test_trap_an_adapter_belongs_to_the_base_quantised_in_the_type_it_was_trained_in(tmp_path):
    lake = tuned_lake(tmp_path, method="qlora", dtype="bfloat16")
    manifest = merge_and_export(export_params(lake), lake)
    steps = {s["step"]: s for s in lake.table(manifest, "drift").to_pylist()}
    assert steps["merged"]["relative"] < 1e-2


def test_a_merge_that_drifts_is_not_exported(tmp_path, monkeypatch):
    lake = tuned_lake(tmp_path)
    merge = adapters.merge_adapter

    def wrong(model, folder):
        merged = merge(model, folder)
        merged.model.norm.weight.data *= 1.01
        return merged

    monkeypatch.setattr(load, "merge_adapter", wrong)
    with pytest.raises(ModelError, match="the merge changes the logits by 0.01"):
        merge_and_export(export_params(lake), lake)
    assert lake.manifest("sample", "74_merge_and_export") is None


@pytest.mark.parametrize("method", ["prompt", "ptuning", "prefix"])
def test_what_cannot_be_merged_is_one_clear_line(tmp_path, method):
    lake = tuned_lake(tmp_path, method=method, sft_steps=1)
    with pytest.raises(ModelError, match=f"method={method} what no weight can hold: use method=lora"):
        merge_and_export(export_params(lake), lake)


def test_shards_index_bytes_and_card(tmp_path):
    from support import dpo_params

    from kit.train.align.preference import align

    lake = tuned_lake(tmp_path, packing=False)
    align(dpo_params(lake, dpo_steps=1), lake)
    p = export_params(lake, export_from="70_align_dpo")
    manifest = merge_and_export(p, lake)
    assert outputs(merge_and_export(p, lake)) == outputs(manifest)
    folder = Path(lake.local_folder(lake.need("sample", "74_merge_and_export"), "model"))
    assert {t.dtype for t in weights(folder).values()} == {torch.bfloat16}
    card = (folder / "README.md").read_text()
    assert "finetune_sft by lora, then align_dpo by lora" in card
    assert "- 60_finetune_sft: 8 in, 6 out (2 not reached in sft_steps)" in card
    assert "- 60_finetune_sft: perplexity_after = " in card and "- torch 2." in card and "\ncommit " in card
    for file in folder.iterdir():
        assert not any(place in file.read_bytes() for place in (b"/tmp/", b"/work/", b"/home/", b"/root/")), (
            file
        )


def test_a_changed_file_is_noticed(tmp_path, monkeypatch):
    lake = tuned_lake(tmp_path)
    keep = PreTrainedModel.save_pretrained

    def other(self, folder, **how):
        keep(self, folder, **how)
        if "kit-export" in str(folder):
            held = load_file(folder / "model.safetensors")
            held["model.norm.weight"][0] += 1
            save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", other)
    with pytest.raises(ModelError, match="model.norm.weight is another one there"):
        merge_and_export(export_params(lake), lake)


def test_a_full_disk_leaves_the_last_good_result(tmp_path, monkeypatch):
    lake = tuned_lake(tmp_path)
    first = merge_and_export(export_params(lake), lake)

    def full(*args, **how):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m, pytest.raises(ModelError, match="cannot be saved: the disk is full"):
        m.setattr(PreTrainedModel, "save_pretrained", full)
        merge_and_export(export_params(lake, export_rows=1), lake)
    with monkeypatch.context() as m, pytest.raises(LakeError, match="the disk is full"):
        m.setattr(type(lake.fs), "pipe_file", full)
        merge_and_export(export_params(lake, export_rows=1), lake)
    with (
        monkeypatch.context() as m,
        pytest.raises(ModelError, match="'x' cannot be written: the disk is full"),
    ):
        m.setattr(shards, "save_file", full)
        consolidate(Path(tiny_model()), tmp_path / "x", 1)
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.part").exists()
    assert lake.need("sample", "74_merge_and_export").content_sha256 == first.content_sha256


@pytest.mark.slow
def test_shards_of_two_processes_become_the_same_model(tmp_path):
    run_python(FSDP2, tmp_path, tiny_model(), tmp_path)
    truth = weights(tiny_model())
    for kind in ("nested", "flat", "slices"):
        files = consolidate(tmp_path / kind, tmp_path / f"{kind}-whole", 1, Path(tiny_model()))
        assert sum(files.values()) == len(truth)
        assert same(weights(tmp_path / f"{kind}-whole"), truth), kind
        assert torch.equal(
            logits(load.load_model(str(tmp_path / f"{kind}-whole"), dtype="float32")),
            logits(load.load_model(tiny_model(), dtype="float32")),
        )
    for lost in ("nested/__1_0.distcp", "slices/shard-00001-model-00001-of-00001.safetensors"):
        (tmp_path / lost).unlink()
        with pytest.raises(ModelError, match="cannot be read|is not whole"):
            consolidate((tmp_path / lost).parent, tmp_path / "never", 1, Path(tiny_model()))
    assert not (tmp_path / "never").exists()


def test_many_files_become_few_and_few_many(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    consolidate(tmp_path / "many", tmp_path / "one", 1)
    assert [f.name for f in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert same(weights(tmp_path / "one"), weights(tiny_model()))
    next((tmp_path / "many").glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="is not whole: files with weights are missing"):
        consolidate(tmp_path / "many", tmp_path / "other", 1)


def test_a_checkpoint_that_could_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match="posix.system, which could run code"):
        consolidate(tmp_path, tmp_path / "x", 1)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flat", "slices", "many"])
def test_memory_holds_one_file_of_the_result(tmp_path, kind):
    config = AutoModelForCausalLM.from_pretrained(tiny_model()).config
    config.update(
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 4096}
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "many", max_shard_size="30MB")
    if kind != "many":
        run_python(FSDP2, tmp_path, tmp_path / "many", tmp_path)
    whole, about = tmp_path / "whole", tmp_path / "many"
    grown = float(run_python(MEASURED, tmp_path, tmp_path / kind, whole, tiny_model(), 100, about))
    sizes = [f.stat().st_size / 2**20 for f in whole.glob("*.safetensors")]
    print(
        f"{kind}: {sum(sizes):.0f} MiB, largest file {max(sizes):.0f}, peak {grown:.0f} MiB above the start"
    )
    assert sum(sizes) > 200 and len(sizes) > 2
    assert grown < 1.3 * max(sizes)


@pytest.mark.slow
def test_a_server_gives_the_answer_of_this_process(tmp_path, monkeypatch):
    lake = tuned_lake(tmp_path)
    served = merge_and_export(export_params(lake, serve=True), lake).metrics["served"]
    assert served["engine"] == "transformers serve"
    assert served["answer"] == served["expected"] != ""
    (tmp_path / "broken").mkdir()
    with pytest.raises(ModelError, match="transformers serve gave no answer: "):
        export.serve(tmp_path / "broken", "The film is", 4)
    monkeypatch.setattr(export, "is_serve_available", lambda: False)
    assert export.serve(tmp_path, "The film is", 4)["engine"] == "not served"
