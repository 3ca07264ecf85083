"""Pre-training on a tiny lake: what is read for what, what is learned, forgotten, refused and reproduced."""

import math
import random
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from support import logits, no_network, outputs, review, tiny_model

from kit import params
from kit.errors import ModelError
from kit.lake.manifest import Counts
from kit.lake.store import Lake
from kit.train.models import load
from kit.train.plan.setup import resolve_setup
from kit.train.tune import pretrain
from kit.train.tune.pretrain import passage_scores, wrap


def prose(seed):
    rng = random.Random(seed)  # sixty words that no other seed gives
    stems = ["the", "film", "end", "cast", "scene", "plot", "slow", "river", "bridge", "train", "soup"]
    return " ".join(rng.choice(stems) + rng.choice(("", "", "s", "ed")) for _ in range(60)) + "."


def document(i, host, text, **more):
    return {"doc_id": f"d{i}", "host": host, "lang": "en", "text": text, "reviews": [], "keep": True} | more


TRAIN = [review(i, f" {prose(i)}") for i in range(12)]
HELDOUT = [review(i, f" {prose(i)}") for i in range(20, 24)]
FILMS = [document(0, "films", prose(0)), document(200, "films", prose(200))]
OTHERS = [document(100 + i, f"site{i % 4}", prose(100 + i)) for i in range(8)]


def make_lake(uri, documents=(*OTHERS, *FILMS), train=TRAIN, heldout=HELDOUT) -> Lake:
    """Twelve reviews and four held-out ones, all of the site films, and other documents."""
    lake = Lake(str(uri))
    types = {"reviews": pa.list_(pa.string()), "keep": pa.bool_()}
    stages = (
        (params.RefineText, {"part": [*documents, document(9, "x", "30 drops it")]}, OTHERS[0]),
        (params.Deduplicate, {"part": documents}, ["doc_id", "keep"]),
        (params.BuildDatasets, {"train": train, "heldout": heldout}, [*TRAIN[0], "host"]),
    )
    for stage, tables, columns in stages:
        schema = pa.schema([(key, types.get(key, pa.string())) for key in columns])
        with lake.stage(stage(lake=str(uri))) as out:
            for name, rows in tables.items():
                out.table(name, pa.Table.from_pylist([{"host": "films", **row} for row in rows], schema))
            out.commit(Counts(records_in=1, records_out=1))
    return lake


def small(lake, **values):
    fixed = {"pretrain_vocab": 300, "pretrain_hidden": 32, "pretrain_layers": 1, "pretrain_batch_size": 2}
    fixed |= {"continue_batch_size": 2, "eval_rows": 4, "threads": 1, "max_tokens": 64, "dtype": "float32"}
    fixed |= {"pretrain_steps": 4, "continue_steps": 2, "lake": lake.uri, "base_model": tiny_model()}
    return params.ContinuePretraining(**{**fixed, **values})


def texts_of(p, lake):
    return pretrain.gather(p, lake, SimpleNamespace(read=lambda stage: lake.need("sample", stage)))[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A longer run; and what was measured on, with which logits: before and after, from scratch and continued."""
    lake, looks = make_lake(tmp_path_factory.mktemp("lake")), []
    p = small(lake, pretrain_steps=30, pretrain_learning_rate=1e-2, continue_learning_rate=3e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pretrain,
            "passage_scores",
            lambda m, t, x: looks.append((x, logits(m))) or passage_scores(m, t, x),
        )
        attempts = no_network(patch)
        manifest = pretrain.pretrain(p, lake)
    return p, lake, manifest, looks, attempts


def test_both_learn_and_both_folders_load_as_what_was_measured(made):
    _, lake, manifest, looks, attempts = made
    assert attempts == []
    for name, (held, after), steps in (("scratch", looks[1], 30), ("model", looks[3], 2)):
        m, folder = manifest.metrics[name], lake.local_folder(manifest, name)
        assert len(m["losses"]) == steps == lake.table(manifest, f"steps-{name}").num_rows
        assert m["after"]["domain"]["bits_per_byte"] < m["before"]["domain"]["bits_per_byte"]
        model, tokenizer = load.load_model(folder, dtype="float32"), load.load_tokenizer(folder)
        assert torch.equal(logits(model), after)
        assert passage_scores(model, tokenizer, held) == m["after"]
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
    first, *_, last = manifest.metrics["scratch"]["losses"]
    assert first == pytest.approx(math.log(300), rel=0.05) and last < 0.8 * first, "it knew nothing"


def test_forgetting_is_measured_on_text_that_no_step_saw(made):
    p, lake, _, looks, _ = made
    texts = texts_of(p, lake)
    trained = " ".join([*texts["domain"].values(), *texts["general"].values()])
    for held, _ in looks:
        assert {name: len(found) for name, found in held.items()} == {"domain": 4, "general": 4}
        assert all(passage[:40] not in trained for found in held.values() for passage in found)
    sides = [{int(key[1:]) % 4 for key in texts[use]} for use in ("general", "held out: general")]
    assert all(sides) and not sides[0] & sides[1], "a site is on one side"


def test_every_row_and_document_is_accounted_for(made, tmp_path):
    counts, uses = made[2].counts, ("read as rows of 50_build_datasets", "site of the domain")
    assert (counts.records_in, counts.records_out) == (26, 16), "ten documents, sixteen rows"
    assert counts.dropped == {"held out: domain": 4, "held out: general": 4} | dict.fromkeys(uses, 1)
    documents = [
        document(401, "site1", prose(900), keep=False),
        document(402, "site1", prose(901), lang="de"),
        document(403, "site2", prose(902), reviews=["good"]),
        document(404, "site3", "Here is what a reader sent us: " + prose(3)),
        # on every site: whichever is trained on would repeat one that is measured
        *(document(300 + i, f"site{i}", "A note. " + prose(999)) for i in range(4)),
    ]
    lake = make_lake(tmp_path, [*OTHERS[:4], *documents], [*TRAIN[:4], review(50, "  ")])
    p = small(lake, pretrain_steps=1, pretrain_batch_size=1, continue_steps=1, continue_batch_size=1)
    counts = pretrain.pretrain(p, lake).counts
    one = ("copy of another document", "language not trained on", "holds reviews", "repeats a row", "empty")
    assert {counts.dropped[reason] for reason in one} == {1}
    assert counts.dropped["repeats a held-out document"] == 2
    assert counts.dropped["not reached in pretrain_steps"] == 6 - counts.records_out > 0
    assert counts.records_in == len(documents) + 4 + 9


def test_the_same_bytes_twice_and_others_with_another_seed(tmp_path):
    lake = make_lake(tmp_path)
    runs = [outputs(pretrain.pretrain(small(lake, replay_share=0.5, seed=seed), lake)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("share, rows", [(0.0, 0), (0.25, 2), (0.5, 4)])
def test_the_share_of_replayed_rows_is_what_was_asked_for(tmp_path, share, rows):
    lake = make_lake(tmp_path)
    p = small(lake, replay_share=share, continue_steps=4)
    trainer, ran, _ = pretrain.fit_texts(
        p, resolve_setup(p, p.fits()[1]), texts_of(p, lake), tmp_path / "work"
    )
    general = wrap(texts_of(p, lake)["general"], trainer.processing_class, 64)[0]
    seen = [ids in general for ids in trainer.train_dataset["input_ids"]]
    assert len(seen) == 8 and sum(seen) == rows == ran["replayed_rows"]
    assert sum(seen[:4]) == rows / 2, "evenly spread"
    alone = pretrain.fit_texts(
        p, resolve_setup(p, p.fits()[0]), texts_of(p, lake) | {"held out: general": {}}, tmp_path
    )[1]["after"]
    assert set(alone) == {"domain"}, "what is not there is not measured"


WRONG = [
    ({"pretrain_vocab": 5000}, {}, "too little text.*lower pretrain_vocab=5000"),
    ({"max_tokens": 4000}, {}, "too little text.*max_tokens=4000: lower it"),
    ({"replay_share": 0.5}, {"documents": FILMS}, "replay_share=0.5: set it to 0"),
    ({}, {"heldout": []}, "no held-out row"),
    ({}, {"train": []}, "too little text"),
]


@pytest.mark.parametrize("values, there, told", WRONG)
def test_what_cannot_be_done_is_one_clear_line(tmp_path, values, there, told):
    lake = make_lake(tmp_path, **there)
    with pytest.raises(ModelError, match=told):
        pretrain.pretrain(small(lake, **values), lake)
    assert lake.manifest("sample", "62_continue_pretraining") is None


def test_bits_per_byte_asks_every_tokenizer_for_the_same_bytes(made):
    lake, manifest = made[1:3]
    new, known = (manifest.metrics[name]["after"]["general"] for name in ("scratch", "model"))
    assert new["bytes"] == known["bytes"] and new["tokens"] != known["tokens"]
    folder, text = lake.local_folder(manifest, "scratch"), " ist schön"
    model, tokenizer = load.load_model(folder, dtype="float32"), load.load_tokenizer(folder)
    torch.nn.init.zeros_(model.lm_head.weight)  # each of 300 entries is as likely
    found, tokens = (
        passage_scores(model, tokenizer, {"x": ["Größe" + text]})["x"],
        len(tokenizer(text)["input_ids"]),
    )
    assert (found["bytes"], found["tokens"]) == (len(text.encode()), tokens)
    assert found["bits_per_byte"] == pytest.approx(math.log2(300) * tokens / len(text.encode()), rel=1e-5)
