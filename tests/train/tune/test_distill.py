"""Distillation on a tiny random model: the loss, the thinned start, what is learned, counted and refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import make_lake, no_network, outputs, review, sft_params, tiny_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kit import params
from kit.errors import ModelError
from kit.train.encode.batches import IGNORED, padded_batch
from kit.train.encode.encode import perplexity, prepare
from kit.train.models import load
from kit.train.tune import distill as stage
from kit.train.tune.distill import WAYS, distill, distillation_losses, student_trainer, thin
from kit.train.tune.sft import finetune

SMALL = {"distill_steps": 3, "distill_batch_size": 2, "max_tokens": 48, "eval_rows": 3, "threads": 1}
SMALL |= {"student_layers": 1, "distill_tokens": 4, "teacher": "base", "dtype": "float32"}
BATCH = ("input_ids", "attention_mask", "labels")


def distill_params(lake, **values):
    return params.Distill(**{"lake": lake.uri, "base_model": tiny_model(), **SMALL, **values})


def heldout_perplexity(lake, model, tokenizer):
    held = lake.table(lake.need("sample", "50_build_datasets"), "heldout").to_pylist()
    return perplexity(model, tokenizer, prepare(held, tokenizer, 48).rows)[0]


def sums(s, t, labels, temperature, beta):
    """The formulas by hand: cross-entropy, and T² times the generalised JSD."""

    def kl(a, b):
        return (a * (a / b).log()).sum()

    p, q = torch.softmax(t / temperature, -1), torch.softmax(s / temperature, -1)
    m = beta * p + (1 - beta) * q
    apart = kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, m) + (1 - beta) * kl(q, m)
    entropy = -torch.softmax(s, -1).log()[torch.arange(len(labels)), labels].sum()
    return torch.stack([entropy, temperature**2 * apart])


@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.0), (2.5, 0.0), (2.5, 0.3), (2.5, 1.0)])
def test_the_divergence_is_the_formula(temperature, beta):
    torch.manual_seed(0)
    s, t, labels = torch.randn(7, 11), torch.randn(7, 11), torch.randint(0, 11, (7,))
    torch.testing.assert_close(
        distillation_losses(s, t, labels, temperature, beta), sums(s, t, labels, temperature, beta)
    )
    assert distillation_losses(s, s, labels, temperature, beta)[1] == pytest.approx(0, abs=1e-5)
    assert distillation_losses(s, None, labels)[1] == 0


def trainer_of(folder, **values):
    """A trainer of a one-layer student with a trained head, and a batch of rows of unlike lengths and prompts."""
    p = params.Distill(**{"base_model": tiny_model(), **SMALL, **values})
    teacher, tokenizer = load.load_model(tiny_model(), dtype="float32"), load.load_tokenizer(tiny_model())
    rows = prepare([review(0, " fine work"), review(1, " no", prompt="A warm, funny picture")], tokenizer, 48)
    student = thin(teacher, 1).requires_grad_(True)
    trainer = student_trainer(
        p, "off_policy", student, teacher.requires_grad_(False), tokenizer, rows, folder
    )
    return trainer, dict(zip(BATCH, padded_batch(rows.rows, tokenizer.pad_token_id), strict=True))


@pytest.mark.parametrize("chunk", [1, 2, 256])
def test_loss_and_gradients_in_chunks_are_those_on_full_logits(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(stage, "CHUNK", chunk)
    trainer, batch = trainer_of(tmp_path, distill_temperature=2.0, distill_alpha=0.7)
    keep = batch["labels"][:, 1:] != IGNORED
    both = [m(batch["input_ids"], batch["attention_mask"]).logits for m in (trainer.model, trainer.teacher)]
    s, t = (logits[:, :-1][keep] for logits in both)
    entropy, apart = sums(s, t, batch["labels"][:, 1:][keep], 2.0, 0.0) / keep.sum()
    expected = 0.3 * entropy + 0.7 * apart
    expected.backward()
    wanted = {name: w.grad.clone() for name, w in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-4, atol=1e-7)


def test_prompt_and_padding_do_not_count(tmp_path):
    trainer, batch = trainer_of(tmp_path)
    before = trainer.compute_loss(trainer.model, batch)
    padding = batch["attention_mask"] == 0
    assert padding.any()
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(padding, 9)}
    torch.testing.assert_close(trainer.compute_loss(trainer.model, other), before)
    labels = stage.scored(trainer.model, *(batch[name] for name in BATCH))[1]
    assert labels.tolist() == batch["labels"][batch["labels"] != IGNORED].tolist()


def test_a_student_that_is_its_teacher_is_no_distance_away(tmp_path):
    lake = make_lake(tmp_path)
    p = distill_params(lake, student=tiny_model(), distill_learning_rate=1e-12)
    rows = distill(p, lake).metrics["models"]
    assert all((row["kl"], row["agreement"]) == (pytest.approx(0, abs=1e-6), 1.0) for row in rows)
    tokenizer, model = load.load_tokenizer(tiny_model()), load.load_model(tiny_model(), dtype="float32")
    assert rows[0]["perplexity"] == pytest.approx(heldout_perplexity(lake, model, tokenizer), rel=1e-5)


def test_thinning_keeps_evenly_spaced_layers_and_nothing_else_changes():
    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=7, **small))
    model.config.layer_types = [f"kind {i}" for i in range(7)]
    student, kept = thin(model, 4), (0, 2, 4, 6)
    assert student.config.num_hidden_layers == len(student.model.layers) == 4
    assert student.config.layer_types == [f"kind {i}" for i in kept]
    for at, had in enumerate(kept):
        assert student.model.layers[at].self_attn.layer_idx == at
        for name, weight in model.model.layers[had].state_dict().items():
            assert torch.equal(student.model.layers[at].state_dict()[name], weight)
    assert torch.equal(student.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(student.lm_head.weight, model.lm_head.weight)
    assert not student.lm_head.weight.requires_grad
    with pytest.raises(ModelError, match="student_layers=8: the teacher has only 7"):
        thin(model, 8)


def test_a_taught_student_is_nearer_to_its_teacher_and_the_best_is_kept(tmp_path, monkeypatch):
    attempts, lake = no_network(monkeypatch), make_lake(tmp_path)
    finetune(sft_params(lake, method="full", sft_steps=60, sft_learning_rate=1e-2), lake)
    how = {"distill_steps": 40, "distill_learning_rate": 1e-2, "distill_alpha": 1.0, "on_policy_share": 0.25}
    manifest = distill(distill_params(lake, teacher="tuned", **how), lake)
    assert attempts == []
    rows = {row["model"]: row for row in manifest.metrics["models"]}
    assert list(rows) == ["teacher", "start", *WAYS]
    assert rows["off_policy"]["kl"] < 0.9 * rows["alone"]["kl"] < rows["start"]["kl"]
    assert rows["off_policy"]["parameters"] < rows["teacher"]["parameters"]
    best = rows[manifest.metrics["best"]]
    assert best["loss"] == min(rows[way]["loss"] for way in WAYS)
    folder = lake.local_folder(manifest, "model")
    kept, tokenizer = load.load_model(folder, dtype="float32"), load.load_tokenizer(folder)
    assert heldout_perplexity(lake, kept, tokenizer) == pytest.approx(best["perplexity"], rel=1e-4)
    assert best["mb"] == round(
        sum(w.nbytes for w in load_file(f"{folder}/model.safetensors").values()) / 1e6, 1
    )
    steps = lake.table(manifest, "steps").to_pylist()
    tokens = {way: [s["tokens"] for s in steps if s["student"] == way] for way in WAYS}
    assert tokens["alone"] == tokens["off_policy"]
    assert tokens["on_policy"][:30] == tokens["alone"][:30]
    assert tokens["on_policy"][30:] != tokens["alone"][30:]


def test_same_bytes_twice_other_bytes_from_another_seed(tmp_path):
    lake = make_lake(tmp_path)
    first = distill(distill_params(lake), lake)
    assert outputs(distill(distill_params(lake), lake)) == outputs(first)
    assert distill(distill_params(lake, seed=1), lake).content_sha256 != first.content_sha256


def test_a_student_with_another_vocabulary_is_refused(tmp_path):
    other = shutil.copytree(tiny_model(), tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    lake = make_lake(tmp_path / "lake")
    with pytest.raises(ModelError, match="has another vocabulary than the teacher"):
        distill(distill_params(lake, student=str(other)), lake)


def test_every_row_is_accounted_for(tmp_path):
    rows = [*(review(i, " fine work") for i in range(8)), review(8, ""), review(9, "x", prompt="The " * 60)]
    lake = make_lake(tmp_path, train=rows)
    counts = distill(distill_params(lake), lake).counts
    assert (counts.records_in, counts.records_out) == (10, 6)
    assert counts.dropped == {"empty": 1, "prompt fills max_tokens": 1, "not reached in distill_steps": 2}
