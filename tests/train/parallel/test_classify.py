"""A classifier trained by real processes in every way: the same losses, the same accuracy, whole checkpoints."""

import functools
import json
import os
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, RobertaConfig

from kit.errors import ModelError, ParamError
from kit.lake.manifest import Counts
from kit.lake.store import Lake
from kit.params import BuildDatasets, ClassifySentiment
from kit.train.parallel import classify, rank, rank_job
from kit.train.parallel.classify import labelled
from kit.train.parallel.ranks import jobs, launch, require

GOOD, BAD = "a warm and funny film with a cast that works", "a dull and slow film with a plot that fails"
WAYS = ["ddp", "fsdp", "pipeline", "tensor", "tensor_data"]


@functools.cache
def tiny_bert(**options) -> str:
    """A folder with a random BERT of four layers and a WordPiece tokenizer trained here."""
    folder = Path(tempfile.mkdtemp(prefix="kit-bert-"))
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw.train_from_iterator(
        [GOOD, BAD], trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(vocab_size=200, max_position_embeddings=64, **{**shape, **options})
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def reviews(n, labels=(0, 1)):
    words = ["plot", "cast", "film", "warm", "dull", "funny", "slow", "works", "fails", "and", "a", "with"]
    rows = []
    for i in range(n):
        label = labels[i % len(labels)]
        more = " ".join(words[(i * 7 + j) % len(words)] for j in range(i % 11))
        rows.append({"row_id": str(i), "completion": f" {(BAD, GOOD)[label]} {more}", "label": label})
    return rows


def classify_lake(folder, train=None, held=None) -> Lake:
    """A lake whose stage 50 holds labelled reviews."""
    lake = Lake(str(folder))
    with lake.stage(BuildDatasets(lake=str(folder))) as out:
        out.table("train", pa.Table.from_pylist(train or reviews(44)))
        out.table("heldout", pa.Table.from_pylist(held or reviews(12)))
        out.commit(Counts(records_in=1, records_out=1))
    return lake


def params_for(lake, **more):
    usual = {
        "encoder": tiny_bert(), "dtype": "float32", "max_tokens": 32, "classify_steps": 12, "classify_batch_size": 8,
        "gradient_accumulation": 2, "check_steps": 3, "classify_learning_rate": 3e-3, "rank_timeout_s": 60,
    }  # fmt: skip
    return ClassifySentiment(lake=lake.uri, **{**usual, **more})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    lake = classify_lake(tmp_path_factory.mktemp("lake"))
    return lake, classify.classify(params_for(lake), lake)


def test_every_way_has_the_losses_of_one_process(done):
    lake, manifest = done
    losses = lake.table(manifest, "losses").to_pydict()
    assert list(losses) == ["one", *WAYS]
    assert len(losses["one"]) == 3 + 12
    assert losses["one"][-1] < 0.9 * losses["one"][3]  # something is learned
    for way in WAYS:
        assert losses[way] == pytest.approx(losses["one"], abs=1e-4), way
    assert all(m["loss_difference"] < 1e-4 for m in manifest.metrics["strategies"])


def test_the_same_accuracy_out_of_each_consolidated_checkpoint(done):
    _, manifest = done
    found = {m["strategy"]: m["accuracy"] for m in manifest.metrics["strategies"]}
    assert set(found.values()) == {found["one"]}
    assert found["one"] == 1.0 > manifest.metrics["majority_accuracy"]
    assert 0 < manifest.metrics["baseline_accuracy"] <= 1


def test_it_says_what_ran_on_which_ranks_with_which_shards(done):
    lake, manifest = done
    ranks = {(r["strategy"], r["rank"]): r for r in lake.table(manifest, "ranks").to_pylist()}
    assert len(ranks) == 1 + 2 * 4 + 4
    query = "bert.encoder.layer.0.attention.self.query.weight"
    for way, local in (
        ("ddp", [64, 64]),
        ("fsdp", [32, 64]),
        ("tensor", [32, 64]),
        ("tensor_data", [16, 64]),
    ):
        assert f"{query} {local} of [64, 64]" in ranks[way, 1]["shards"], way
    assert query in ranks["pipeline", 0]["shards"]
    assert query not in ranks["pipeline", 1]["shards"]
    assert "classifier" in ranks["pipeline", 1]["shards"]
    assert ranks["tensor_data", 3]["place"] == "data 1, tensor 1"
    whole = ranks["one", 0]["parameters_here"]
    assert ranks["ddp", 0]["parameters_here"] == whole
    assert sum(ranks["fsdp", i]["parameters_here"] for i in (0, 1)) == whole
    assert sum(ranks["pipeline", i]["parameters_here"] for i in (0, 1)) == whole
    assert (
        whole / 4
        <= ranks["tensor_data", 0]["parameters_here"]
        < ranks["tensor", 0]["parameters_here"]
        < whole
    )


def test_rates_are_of_the_same_steps_and_rows_add_up(done):
    _, manifest = done
    for m in manifest.metrics["strategies"]:
        assert m["seconds"] > 0 and m["speed_up"] > 0 and m["mfu"] > 0
        assert (m["communication"] > 0) == (m["strategy"] != "one")
        assert 0 < m["predicted"] <= m["ranks"]
    assert (
        manifest.metrics["strategies"][0]["speed_up"] == manifest.metrics["strategies"][0]["predicted"] == 1
    )
    counts = manifest.counts
    assert counts.records_in == 44
    assert counts.records_out + sum(counts.dropped.values()) == 44
    assert any(o.name.startswith("model/model.safetensors") for o in manifest.outputs)


def test_rows_of_one_label_teach_nothing(tmp_path):
    lake = classify_lake(tmp_path, train=reviews(20, labels=(1,)))
    with pytest.raises(ModelError, match="all 20 are positive"):
        classify.classify(params_for(lake), lake)
    with pytest.raises(ModelError, match="none has a rating"):
        labelled([{"completion": "x", "label": None}], "train")


def test_more_rows_than_there_are_and_more_tokens_than_the_context(tmp_path):
    lake = classify_lake(tmp_path)
    with pytest.raises(ModelError, match="fewer than a step takes"):
        classify.classify(params_for(lake, classify_batch_size=200), lake)
    with pytest.raises(ModelError, match="context of 64"):
        classify.classify(params_for(lake, max_tokens=100), lake)
    with pytest.raises(ParamError, match="did you mean 'fsdp'"):
        classify.classify(params_for(lake, strategies=["fspd"]), lake)


@pytest.mark.parametrize(
    "way, more, said",
    [
        ("tensor", {"ranks": 3}, "4 attention heads cannot be shared by 3; 2 would do"),
        ("tensor_data", {"tensor_ranks": 8}, "4 attention heads cannot be shared by 8; 4 would do"),
        ("pipeline", {"ranks": 3, "classify_batch_size": 9}, "4 layers cannot be shared by 3; 2 would do"),
        (
            "pipeline",
            {"ranks": 4, "classify_batch_size": 7},
            "14 rows of a step cannot be shared by 8; 7 would do",
        ),
        ("ddp", {"ranks": 3}, "8 rows of a pass cannot be shared by 3; 2 would do"),
    ],
)
def test_a_world_that_does_not_divide_is_refused_before_anything_starts(tmp_path, way, more, said):
    job, ranks = jobs(params_for(Lake(str(tmp_path)), **more), way)
    with pytest.raises(ModelError, match=said):
        require(way, job, ranks, BertConfig.from_pretrained(tiny_bert()))


def test_an_encoder_that_is_no_bert_trains_by_ddp_only(tmp_path):
    job, ranks = jobs(params_for(Lake(str(tmp_path))), "pipeline")
    with pytest.raises(ModelError, match="not a roberta: take ddp"):
        require("pipeline", job, ranks, RobertaConfig(num_hidden_layers=4))


class Bar:
    """Counts, and tells when the first step is done."""

    def __init__(self):
        self.begun = threading.Event()

    def update(self, n=1):
        self.begun.set()

    def note(self, text):
        pass


def long_job(tmp_path, **more):
    lake = classify_lake(tmp_path / "lake")
    p = params_for(lake, classify_steps=100_000, **more)
    folder = tmp_path / "job"
    folder.mkdir()
    tokenizer = classify.AutoTokenizer.from_pretrained(p.encoder)
    classify.write_start(p, tokenizer, folder / rank_job.START)
    rows = labelled(reviews(44), "train")
    rank_job.save_rows(
        folder / rank_job.ROWS,
        classify.encode_texts(tokenizer, [t for t, _ in rows], 32),
        [n for _, n in rows],
    )
    return folder, *jobs(p, "ddp")


def ranks_running(folder):
    """Process ids of the ranks that train in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and b"torch.distributed.run" not in words and words[0]:
            found.append(int(path.parent.name))
    return sorted(found)


def test_a_rank_that_dies_stops_the_others_within_seconds(tmp_path):
    folder, job, ranks = long_job(tmp_path)
    bar, killed = Bar(), []

    def kill():
        bar.begun.wait(60)
        os.kill(ranks_running(folder)[-1], signal.SIGKILL)
        killed.append(time.monotonic())

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(
        ModelError, match=r"ddp on 2 ranks stopped: rank \d was killed, most likely for want of memory"
    ):
        launch(folder, job, ranks, bar)
    assert time.monotonic() - killed[0] < 30
    assert not ranks_running(folder)


def test_a_rank_that_fails_is_named_with_its_own_error(tmp_path):
    folder, job, ranks = long_job(tmp_path)
    held = rank_job.load_file(folder / rank_job.ROWS)
    held["labels"][::2] = 7  # no such label
    rank_job.save_file(held, folder / rank_job.ROWS)
    with pytest.raises(ModelError, match=r"rank \d: IndexError: Target 7 is out of bounds"):
        launch(folder, job, ranks, Bar())


def test_mixed_devices_are_refused():
    rank.same_devices(["NVIDIA H100", "NVIDIA H100"])
    with pytest.raises(RuntimeError, match="mixed devices: rank 0: cpu, rank 1: NVIDIA H100"):
        rank.same_devices(["cpu", "NVIDIA H100"])


def test_steps_take_every_row_before_any_again():
    lengths = [5 + i % 9 for i in range(50)]
    steps = list(rank_job.steps_of(lengths, 10, 10, seed=1))
    assert (
        steps
        == list(rank_job.steps_of(lengths, 10, 10, seed=1))
        != list(rank_job.steps_of(lengths, 10, 10, seed=2))
    )
    for epoch in (steps[:5], steps[5:]):
        assert sorted(i for step in epoch for i in step) == list(range(50))
    assert all([lengths[i] for i in s] == sorted((lengths[i] for i in s), reverse=True) for s in steps)
    assert json.dumps(steps[:5]) != json.dumps(steps[5:])


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_process_behind(tmp_path):
    folder, job, ranks = long_job(tmp_path)

    class Impatient(Bar):
        def update(self, n=1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(folder, job, ranks, Impatient())
    assert not ranks_running(folder)


@pytest.mark.slow
def test_passes_in_bfloat16_add_up_in_slices_too(tmp_path):
    folder, job, _ = long_job(tmp_path)
    losses = {}
    for name, ranks in (("one", 1), ("fsdp", 2)):
        told = replace(job, strategy=name, steps=12, check_steps=1, dtype="bfloat16")
        losses[name] = launch(folder, told, ranks, Bar())[0]["losses"]
    assert losses["one"][-1] < 0.9 * losses["one"][0]
    assert losses["fsdp"] == pytest.approx(losses["one"], abs=0.01)
