"""Fine-tuning on a tiny random model: what is learned, counted, dropped, refused and reproduced."""

import errno
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from support import TEXT, make_lake, no_network, outputs, review, sft_params, tiny_model

from kit import ROOT
from kit.errors import ModelError
from kit.train.encode.encode import Rows, perplexity, prepare
from kit.train.loop import meter, run
from kit.train.models import adapters, load
from kit.train.models.methods import METHODS
from kit.train.plan import settings
from kit.train.tune import sft
from kit.train.tune.sft import finetune


def test_a_run_learns_and_says_what_ran(tmp_path, monkeypatch):
    attempts = no_network(monkeypatch)
    lake = make_lake(tmp_path)
    manifest = finetune(sft_params(lake, sft_steps=20, sft_learning_rate=1e-2), lake)
    assert attempts == []
    m = manifest.metrics
    assert len(m["losses"]) == 20
    assert m["perplexity_after"] < 0.8 * m["perplexity_before"]
    assert m["padded_tokens"] >= m["tokens"] > 0
    assert m["trainable"] == m["what_ran"]["trainable"] < m["what_ran"]["parameters"]
    assert m["what_ran"]["trainer"] == "SFTTrainer"
    assert not m["what_ran"]["checkpointing"]
    steps = lake.table(manifest, "steps").to_pylist()
    assert [s["step"] for s in steps] == list(range(1, 21))
    assert {"loss", "grad_norm", "learning_rate", "seconds", "tokens"} <= set(steps[0])
    assert steps[0]["learning_rate"] > 0, "the first step must not be lost to a warm-up that starts at zero"
    tuned = load.load_model(tiny_model(), dtype="float32", adapters=[lake.local_folder(manifest, "model")])
    tokenizer = load.load_tokenizer(tiny_model())
    rows = prepare(
        lake.table(lake.need("sample", "50_build_datasets"), "heldout").to_pylist(), tokenizer, 48
    ).rows
    assert perplexity(tuned, tokenizer, rows)[0] == pytest.approx(m["perplexity_after"], rel=1e-3)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_gives_the_same_bytes_twice(tmp_path, method):
    lake = make_lake(tmp_path)
    p = sft_params(lake, method=method)
    first = finetune(p, lake)
    assert outputs(finetune(p, lake)) == outputs(first)
    assert finetune(sft_params(lake, method=method, seed=1), lake).content_sha256 != first.content_sha256
    text = json.dumps([o.name for o in first.outputs])
    assert ("adapter_model" in text) == (method != "full")


KILLED = """
import os, signal, sys
from kit.lake.store import Lake
from kit.params import FinetuneSft
from kit.train.loop import meter
from kit.train.tune import sft
p, say, lives = FinetuneSft.model_validate_json(sys.argv[1]), meter.Live.on_log, [int(x) for x in sys.argv[2:]]
def on_log(self, args, state, control, logs=None, **kw):
    say(self, args, state, control, logs=logs, **kw)
    if state.global_step == dies_after:
        os.kill(os.getpid(), signal.SIGKILL)
meter.Live.on_log = on_log
for dies_after in lives:  # each life is a process of its own; the imports are paid once
    child = os.fork()
    if not child:
        sft.finetune(p, Lake(p.lake))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WTERMSIG(status) == (signal.SIGKILL if dies_after else 0), status
    assert os.WEXITSTATUS(status) == 0, status
    assert (Lake(p.lake).manifest("sample", "60_finetune_sft") is None) == bool(dies_after)
"""


def live_and_die(p, *steps: int) -> None:
    """`finetune` again and again, killed when it has logged the step given; 0 = it may end."""
    # another hash seed: PEFT keeps its target modules in a set
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, p.model_dump_json(), *map(str, steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_at_random_steps_it_goes_on_to_the_same_weights_and_losses(tmp_path, method):
    # five rows, four a step: epochs end in the middle, and their order must be found again
    rows = [review(i, f" {TEXT[i % 3]}"[: 20 + 7 * i]) for i in range(5)]
    options = {"method": method, "sft_steps": 9, "gradient_accumulation": 2, "checkpoint_steps": 2}
    undisturbed = make_lake(tmp_path / "a", train=rows)
    whole = finetune(sft_params(undisturbed, **options), undisturbed)
    other = make_lake(tmp_path / "b", train=rows)
    kills = sorted(random.sample(range(1, 9), 3 if method == "lora" else 1))
    print("killed after steps", kills)
    live_and_die(sft_params(other, **options), *kills, 0)
    resumed = other.need("sample", "60_finetune_sft")
    assert resumed.metrics["resumed_at"] == kills[-1] // 2 * 2 - (0 if kills[-1] % 2 else 2)
    assert resumed.metrics["losses"] == whole.metrics["losses"]
    assert outputs(resumed) == outputs(whole)
    steps = other.table(resumed, "steps").to_pylist()
    assert [s["step"] for s in steps] == list(range(1, 10))
    assert sum(s["tokens"] for s in steps) == whole.metrics["tokens"]
    assert not list((tmp_path / "b").rglob("checkpoint-*")), "a run that succeeded leaves no checkpoints"


def test_a_checkpoint_of_other_work_is_not_used(tmp_path):
    lake = make_lake(tmp_path)
    p = sft_params(lake, sft_steps=4, checkpoint_steps=1)
    live_and_die(p, 3)
    assert list(tmp_path.rglob("checkpoint-2/whole"))
    other = finetune(sft_params(lake, sft_steps=4, checkpoint_steps=1, sft_learning_rate=5e-4), lake)
    assert other.metrics["resumed_at"] == 0


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step, whole in ((2, True), (4, True), (6, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / meter.WHOLE).touch()
    assert run.last_checkpoint(tmp_path).name == "checkpoint-4"
    assert run.last_checkpoint(tmp_path / "checkpoint-4") is None


def test_a_full_disk_while_saving_keeps_the_last_whole_checkpoint(tmp_path, monkeypatch):
    lake = make_lake(tmp_path)
    save = adapters.save_adapter

    def full_disk(model, folder, *args):
        if "checkpoint-3" in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(model, folder, *args)

    monkeypatch.setattr(adapters, "save_adapter", full_disk)
    p = sft_params(lake, sft_steps=4, checkpoint_steps=1)
    with pytest.raises(ModelError, match=r"disk is full, while saving step 3; checkpoint-2 is whole"):
        finetune(p, lake)
    assert lake.manifest("sample", "60_finetune_sft") is None
    monkeypatch.setattr(adapters, "save_adapter", save)
    assert finetune(p, lake).metrics["resumed_at"] == 2


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_learns_and_says_what_ran(tmp_path, method):
    lake = make_lake(tmp_path)
    rate = {
        "full": 1e-2,
        "lora": 1e-2,
        "qlora": 1e-2,
        "dora": 1e-2,
        "prompt": 0.3,
        "ptuning": 0.03,
        "prefix": 0.3,
    }
    m = finetune(sft_params(lake, method=method, sft_steps=12, sft_learning_rate=rate[method]), lake).metrics
    assert m["perplexity_after"] < 0.95 * m["perplexity_before"]
    ran = m["what_ran"]
    assert ran["method"] == method
    assert (ran["trainable"] == ran["parameters"]) == (method == "full")
    assert ran["base"] == ("nf4_double" if method == "qlora" else "none")
    assert (ran["dtype"] == "nf4 double") == (method == "qlora")
    assert ran["computes_in"] == "float32"
    assert set(m["estimate"]) == {"memory_mb", "seconds", "memory_error", "seconds_error"}


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_learned_prompt_is_loaded_in_front_of_the_model(tmp_path, method):
    lake = make_lake(tmp_path)
    manifest = finetune(sft_params(lake, method=method, sft_steps=6, sft_learning_rate=0.1), lake)
    folder = lake.local_folder(manifest, "model")
    tuned = load.load_model(tiny_model(), dtype="float32", adapters=[folder])
    tokenizer = load.load_tokenizer(tiny_model())
    rows = prepare([review(i, f" {TEXT[i]}") for i in range(3)], tokenizer, 48).rows
    assert perplexity(tuned, tokenizer, rows)[0] == pytest.approx(
        manifest.metrics["perplexity_after"], rel=1e-3
    )
    with pytest.raises(ModelError, match="learned prompt, which cannot be merged"):
        load.load_model(tiny_model(), dtype="float32", adapters=[folder, folder])


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4_double"])
def test_lora_over_a_quantised_base(tmp_path, kind):
    lake = make_lake(tmp_path)
    m = finetune(sft_params(lake, quantization=kind, sft_steps=8, sft_learning_rate=1e-2), lake).metrics
    assert m["perplexity_after"] < 0.95 * m["perplexity_before"]
    assert m["what_ran"]["base"] == kind
    assert m["what_ran"]["parameters"] > m["what_ran"]["trainable"] > 0


def test_all_weights_of_a_quantised_base_cannot_be_trained(tmp_path):
    lake = make_lake(tmp_path)
    with pytest.raises(ModelError, match="method=qlora"):
        finetune(sft_params(lake, method="full", quantization="nf4"), lake)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    lake = make_lake(tmp_path)
    whole = finetune(sft_params(lake, sft_batch_size=4), lake).metrics
    parts = finetune(sft_params(lake, sft_batch_size=2, gradient_accumulation=2), lake).metrics
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert parts["tokens"] == whole["tokens"]
    assert parts["samples_per_s"] > 0


def test_checkpointed_activations_change_nothing_but_memory_and_time(tmp_path):
    lake = make_lake(tmp_path)
    plain = finetune(sft_params(lake), lake)
    again = finetune(sft_params(lake, activation_checkpointing=True), lake)
    assert again.metrics["losses"] == pytest.approx(plain.metrics["losses"], rel=1e-5)
    assert again.metrics["what_ran"]["checkpointing"]


def test_eight_bit_adam_learns(tmp_path):
    lake = make_lake(tmp_path)
    m = finetune(sft_params(lake, optimizer="adamw_8bit", sft_steps=8, sft_learning_rate=1e-2), lake).metrics
    assert m["perplexity_after"] < 0.95 * m["perplexity_before"]
    assert "8bit" in m["what_ran"]["optimizer"]


def test_packed_rows_hold_whole_documents_and_no_padding(tmp_path):
    rows = [review(i, f" {TEXT[i % 3]}"[: 12 + 5 * i]) for i in range(9)]
    lake = make_lake(tmp_path, train=rows)
    m = finetune(sft_params(lake, packing=True, max_tokens=64, sft_steps=2, sft_batch_size=1), lake).metrics
    assert m["padding_share"] == 0
    assert 0 < m["packed_rows"] < 9
    assert "kept apart" in m["what_ran"]["packing"]


def test_a_learned_prompt_is_not_packed_and_it_is_said(tmp_path, capsys):
    lake = make_lake(tmp_path)
    m = finetune(sft_params(lake, packing=True, method="prompt"), lake).metrics
    assert m["packed_rows"] == 0
    said = "none: a learned prompt would stand before one row only"
    assert m["what_ran"]["packing"] == said
    assert said.replace(":", ",") in capsys.readouterr().out


def test_one_row_is_enough_and_a_context_too_long_is_refused(tmp_path):
    lake = make_lake(tmp_path, train=[review(0, f" {TEXT[0]}")], heldout=[review(1, f" {TEXT[1]}")])
    assert finetune(sft_params(lake, sft_steps=2), lake).counts.records_out == 1
    with pytest.raises(ModelError, match="max_tokens=4096 is longer than the model's context of 2048"):
        finetune(sft_params(lake, max_tokens=4096), lake)


def test_every_row_is_accounted_for(tmp_path):
    long_prompt = "The film is " * 40
    rows = [
        *(review(i, f" {TEXT[i % 3]}") for i in range(9)),
        review(10, ""),
        review(11, "  \n "),
        review(12, " fine", prompt=long_prompt),
        review(13, " fine" * 100, prompt=""),
    ]
    lake = make_lake(tmp_path, train=rows)
    manifest = finetune(sft_params(lake, sft_steps=3, packing=False), lake)
    assert manifest.counts.records_in == 13
    assert manifest.counts.records_out == 6
    assert manifest.counts.dropped == {
        "empty": 2,
        "prompt fills max_tokens": 1,
        "not reached in sft_steps": 4,
    }
    assert manifest.metrics["truncated_rows"] == 1


def test_more_steps_than_rows_go_on_for_more_epochs(tmp_path):
    lake = make_lake(tmp_path, train=[review(i, f" {TEXT[i]}") for i in range(3)])
    manifest = finetune(sft_params(lake, sft_steps=5), lake)
    assert len(manifest.metrics["losses"]) == 5
    assert manifest.metrics["epochs"] > 2
    assert manifest.counts.records_out == 3
    assert manifest.counts.dropped == {}


def test_what_the_counts_say_was_trained_was_trained():
    # five rows, batches of two: an epoch is three steps, the last of one row
    rows = Rows([{"input_ids": [1, 2], "labels": [1, 2]}] * 5)
    assert [rows.counts(steps, 2, "s").records_out for steps in (1, 2, 3, 4)] == [2, 4, 5, 5]


def test_tokens_are_counted_without_padding_and_all_of_a_row_without_prompt_counts(tmp_path):
    rows = [review(0, f" {TEXT[0]}"), review(1, " short", prompt="")]
    lake = make_lake(tmp_path, train=rows)
    manifest = finetune(sft_params(lake, sft_steps=1, packing=False), lake)
    tokenizer = load.load_tokenizer(tiny_model())
    lengths = [len(r["input_ids"]) for r in prepare(rows, tokenizer, 48).rows]
    assert manifest.metrics["tokens"] == sum(lengths)
    assert manifest.metrics["padded_tokens"] == 2 * max(lengths)
    assert manifest.metrics["squares"] == sum(n * n for n in lengths)


@pytest.mark.parametrize("rows", [[], [review(0, "")], [review(0, " fine", prompt="The film is " * 40)]])
def test_nothing_to_train_on_is_an_error_and_no_result(tmp_path, rows):
    lake = make_lake(tmp_path, train=rows)
    with pytest.raises(ModelError, match="no usable train row"):
        finetune(sft_params(lake), lake)
    assert lake.manifest("sample", "60_finetune_sft") is None


def test_no_heldout_row_is_an_error(tmp_path):
    lake = make_lake(tmp_path, heldout=[])
    with pytest.raises(ModelError, match="no usable heldout row"):
        finetune(sft_params(lake), lake)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    lake = make_lake(tmp_path)
    load_model = load.load_model

    def broken(*args, **kwargs):
        model = load_model(*args, **kwargs)
        monkeypatch.setattr(sft, "perplexity", lambda *a, **k: (1.0, 1))
        torch.nn.init.constant_(model.model.norm.weight, float("nan"))
        return model

    monkeypatch.setattr(load, "load_model", broken)
    with pytest.raises(ModelError, match="the loss is nan at step 1"):
        finetune(sft_params(lake), lake)
    assert lake.manifest("sample", "60_finetune_sft") is None


def test_the_tiles_of_the_chunked_loss_change_nothing_but_speed(tmp_path, monkeypatch):
    losses = []
    for tile in (64, 32768):
        monkeypatch.setattr(settings, "CPU_TILE", tile)
        lake = make_lake(tmp_path / str(tile))
        losses.append(finetune(sft_params(lake), lake).metrics["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    import trl.trainer.utils

    assert trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE == 32768, "the library is left as it was found"
