"""Fine-tuning on a tiny random model: what is learned, counted, dropped, refused and reproduced."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pytest
import torch
from test_models import TEXT, no_network, tiny_model

from kit import ROOT, params
from kit.lake import Counts, Lake
from kit.train import loop, models, sft
from kit.train.encode import Rows, perplexity, prepare
from kit.train.methods import METHODS
from kit.train.models import ModelError
from kit.train.sft import finetune


def review(i, completion, prompt="The film is"):
    return {
        "row_id": f"r{i}",
        "doc_id": f"d{i}",
        "kind": "review",
        "prompt": prompt,
        "completion": completion,
        "language": "en",
    }


def pair(i, chosen, rejected, prompt="The film is", split="train"):
    return {
        "pair_id": f"p{i}",
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "item": "film",
        "split": split,
    }


def make_lake(uri, train=None, heldout=None, pairs=None) -> Lake:
    """A lake whose stage 50 holds these rows; eight short reviews and four pairs by default."""
    train = [review(i, f" {TEXT[i % 3]}") for i in range(8)] if train is None else train
    heldout = [review(i, f" {TEXT[i]}") for i in range(3)] if heldout is None else heldout
    pairs = (
        [pair(i, f" {TEXT[i % 3]}", f" {TEXT[(i + 1) % 3]}") for i in range(4)] if pairs is None else pairs
    )
    shape = pa.schema([(key, pa.string()) for key in review(0, "")])
    shape_of_pairs = pa.schema([(key, pa.string()) for key in pair(0, "", "")])
    lake = Lake(str(uri))
    with lake.stage(params.BuildDatasets(lake=str(uri))) as out:
        out.table("train", pa.Table.from_pylist(train, schema=shape))
        out.table("heldout", pa.Table.from_pylist(heldout, schema=shape))
        out.table("preferences", pa.Table.from_pylist(pairs, schema=shape_of_pairs))
        out.commit(Counts(records_in=1, records_out=1))
    return lake


def sft_params(lake, **values):
    small = {"sft_steps": 3, "sft_batch_size": 2, "max_tokens": 48, "lora_r": 4, "eval_rows": 3, "threads": 1}
    return params.FinetuneSft(
        **{"lake": lake.uri, "base_model": tiny_model(), "dtype": "float32", **small, **values}
    )


def outputs(manifest):
    return {o.name: o.sha256 for o in manifest.outputs if not o.measured}


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
    tuned = models.load_model(tiny_model(), dtype="float32", adapters=[lake.local_folder(manifest, "model")])
    tokenizer = models.load_tokenizer(tiny_model())
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


def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(tmp_path):
    lake = make_lake(tmp_path / "a")
    whole = finetune(sft_params(lake, sft_steps=6), lake)
    other = make_lake(tmp_path / "b")
    code = (
        "import sys, time\nfrom kit.lake import Lake\nfrom kit.params import FinetuneSft\n"
        "from kit.train import loop, sft\n"
        "class Slow(loop.Live):\n"
        "    def on_step_end(self, *a, **k):\n"
        "        super().on_step_end(*a, **k); print('step', flush=True); time.sleep(float(sys.argv[3]))\n"
        "loop.Live = Slow\nsft.finetune(FinetuneSft.model_validate_json(sys.argv[2]), Lake(sys.argv[1]))\n"
    )
    p = sft_params(other, sft_steps=6).model_dump_json()
    # another hash seed in each process: PEFT keeps its target modules in a set
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, other.uri, p]
    first = subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, env=env, text=True)
    while "step" not in first.stdout.readline():
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert other.manifest("sample", "60_finetune_sft") is None
    subprocess.run([*command, "0"], check=True, env={**env, "PYTHONHASHSEED": "8"}, capture_output=True)
    assert outputs(other.need("sample", "60_finetune_sft")) == outputs(whole)


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
    manifest = finetune(sft_params(lake, sft_steps=3), lake)
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
    manifest = finetune(sft_params(lake, sft_steps=1), lake)
    tokenizer = models.load_tokenizer(tiny_model())
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
    load = models.load_model

    def broken(*args, **kwargs):
        model = load(*args, **kwargs)
        monkeypatch.setattr(sft, "perplexity", lambda *a, **k: (1.0, 1))
        torch.nn.init.constant_(model.model.norm.weight, float("nan"))
        return model

    monkeypatch.setattr(models, "load_model", broken)
    with pytest.raises(ModelError, match="the loss is nan at step 1"):
        finetune(sft_params(lake), lake)
    assert lake.manifest("sample", "60_finetune_sft") is None


def test_the_tiles_of_the_chunked_loss_change_nothing_but_speed(tmp_path, monkeypatch):
    losses = []
    for tile in (64, 32768):
        monkeypatch.setattr(loop, "CPU_TILE", tile)
        lake = make_lake(tmp_path / str(tile))
        losses.append(finetune(sft_params(lake), lake).metrics["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    import trl.trainer.utils

    assert trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE == 32768, "the library is left as it was found"
