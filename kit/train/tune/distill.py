"""73: a smaller student learns from a larger or tuned teacher, beside the same student that learns alone.

Not one of TRL's two trainers for this, but its SFT trainer with GKD's divergence: `DistillationTrainer` always has
the student write and knows no cross-entropy, `GKDTrainer` holds all logits of both models and leaves its temperature
out; both take prompts, not rows whose labels say what counts. (Hinton et al. 2015; Agarwal et al. 2024, GKD.)
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from kit.errors import ModelError
from kit.lake.manifest import Manifest
from kit.lake.store import Lake, StageWriter
from kit.params import Distill
from kit.train.encode.batches import IGNORED, padded_batch, predicted_tokens, summed_loss
from kit.train.encode.encode import Rows, prepare
from kit.train.loop.meter import Metered, steps_table
from kit.train.loop.run import quiet, run_training
from kit.train.models import adapters, load
from kit.train.models.describe import describe, with_layers
from kit.train.models.generate import generate
from kit.train.plan.setup import resolve_setup, trainer_arguments

with warnings.catch_warnings(action="ignore"):  # that it is experimental: a test holds its formula
    from trl.experimental.gkd import GKDTrainer

CHUNK = 256  # positions whose logits exist at a time: 50 MB a matrix for a vocabulary of 49,152
WAYS = {"alone": (False, False), "off_policy": (True, False), "on_policy": (True, True)}
"""How a student learns: whether it sees the teacher, and whether its last steps are on texts it wrote itself."""


def distill(p: Distill, lake: Lake) -> Manifest:
    """Train one student in each of `WAYS` and commit the best (held-out loss), with its tokenizer, as `model/`.

    All have one start, the same rows in the same order, as many steps. Table `students`: size, held-out loss and
    perplexity, KL(teacher ‖ model) in nats a token and top-1 agreement, of teacher, untrained `start` and students.
    Metrics: the same with speeds (`models`), runs, `best`. Counts: train rows in; out those trained on. Raises
    `ModelError` for another vocabulary, too many layers, scaled logits, nothing to learn from. One process only.
    """
    load.set_threads(p.threads)
    with lake.stage(p) as out, tempfile.TemporaryDirectory(prefix="kit-distill-") as temp:
        data = out.read("50_build_datasets")
        teacher, start, tokenizer = load_pair(p, lake, out)
        train = prepare(lake.table(data, "train").to_pylist(), tokenizer, p.max_tokens)
        held = prepare(lake.table(data, "heldout").to_pylist()[: p.eval_rows], tokenizer, p.max_tokens)
        train.require("train"), held.require("heldout")
        rows, runs, steps, judge = [], {}, [], batches(teacher, tokenizer, held)
        rows.append({"model": "teacher", **student_scores(teacher, teacher, judge)})
        for name in ("start", *WAYS):
            model = copy.deepcopy(start)
            if name in WAYS:
                trainer = student_trainer(p, name, model, teacher, tokenizer, train, Path(temp, name))
                runs[name] = run_training(trainer, f"distill {name}")
                steps += [{"student": name, **row} for row in steps_table(trainer).to_pylist()]
            # what is judged is what is kept: weights as they lie on the disk
            rows.append({"model": name, **student_scores(load.cast(model, teacher.dtype), teacher, judge)})
            if name in WAYS and rows[-1]["loss"] == min(r["loss"] for r in rows[2:]):
                best = name
                adapters.save_adapter(model, Path(temp, "model"), p.student or p.base_model)
        tokenizer.save_pretrained(Path(temp, "model"))
        out.folder("model", Path(temp, "model"))
        out.rows("students", rows)
        out.rows("steps", steps, measured=True)
        speeds = [writing_speed(m, tokenizer, held.rows[:4], p.distill_tokens) for m in (teacher, model)]
        for row in rows:  # students differ in their weights, not in what a token costs
            row["write_tokens_per_s"] = speeds[row["model"] != "teacher"]
            row["train_tokens_per_s"] = runs.get(row["model"], {}).get("tokens_per_s")
        metrics = {"best": best, "models": rows, "runs": runs}
        return out.commit(train.counts(p.distill_steps, p.distill_batch_size, "distill_steps"), metrics)


def load_pair(p: Distill, lake: Lake, out: StageWriter) -> tuple[PreTrainedModel, PreTrainedModel, Any]:
    """Teacher, untrained student (float32), and their tokenizer; raises `ModelError` where they share none."""
    name = p.base_model if p.teacher in ("tuned", "base") else p.teacher
    folders = [lake.local_folder(out.read("60_finetune_sft"), "model")] if p.teacher == "tuned" else []
    trust = {"trust_remote_code": p.trust_remote_code}
    teacher = load.load_model(name, dtype=p.dtype, adapters=folders, **trust).requires_grad_(False)
    if hasattr(teacher, "peft_config"):
        raise ModelError("60 learned a prompt, which cannot be merged and so not be taught: teacher=base")
    given = p.student and load.load_model(p.student, dtype="float32", **trust)
    student = given or thin(teacher, p.student_layers)
    tokenizers = [load.load_tokenizer(n, **trust) for n in (name, p.student or name)]
    heads = [m.get_output_embeddings() for m in (teacher, student)]
    words = [(t.get_vocab(), len(h.weight)) for t, h in zip(tokenizers, heads, strict=True)]
    if words[0] != words[1]:
        raise ModelError(f"student '{p.student}' has another vocabulary than the teacher: take its family")
    ids = torch.zeros((1, 2), dtype=torch.long, device=teacher.device)
    for model, head in zip((teacher, student), heads, strict=True):
        hidden = scored(model.eval(), ids, torch.ones_like(ids), ids)[0]
        if not torch.allclose(head(hidden), model(ids).logits[0, :1], rtol=0.02, atol=0.02):
            raise ModelError(f"'{model.name_or_path}' scales its logits, which 73_distill does not cover")
    return teacher, student, tokenizers[0]


def thin(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy in float32 with `layers` layers, evenly spaced, first and last among them, and all else as it was.

    DistilBERT's start (Sanh et al. 2019, section 3). Embeddings and head stay the teacher's and are not trained: they
    fit already, and are the costliest matrix. Raises `ModelError` for more layers than there are.
    """
    had = model.config.num_hidden_layers
    if layers > had:
        raise ModelError(f"student_layers={layers}: the teacher has only {had}")
    kept = [round(i * (had - 1) / max(1, layers - 1)) for i in range(layers)]
    config, weights = with_layers(model.config, kept), {}
    config.dtype = torch.float32
    for key, value in model.state_dict().items():
        number = re.search(r"(?<=\.)\d+(?=\.)", key)  # the first number in a name is the layer's
        if number is None or int(number[0]) in kept:
            weights[
                key[: number.start()] + str(kept.index(int(number[0]))) + key[number.end() :]
                if number
                else key
            ] = value
    student = type(model)(config).to(model.device)
    student.load_state_dict(weights)
    student.get_input_embeddings().requires_grad_(False)
    student.get_output_embeddings().requires_grad_(False)
    return student


def scored(model: PreTrainedModel, ids: Any, mask: Any, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [n, width] before every token that counts, and these tokens [n]; prompts do not count."""
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return predicted_tokens(hidden, labels)


def distillation_losses(
    student: Any, teacher: Any, labels: Any, t: float = 1, beta: float = 0
) -> torch.Tensor:
    """Cross-entropy and T² · divergence (0 without a teacher), summed over positions, in nats: a tensor of two.

    Logits [n, vocabulary]. `beta` 0: KL(teacher ‖ student), 1: KL(student ‖ teacher), between: generalised
    Jensen-Shannon (Agarwal et al. 2024, equation 1). T² keeps the gradient's size (Hinton et al. 2015, 2.1).
    """
    student, apart = student.float(), torch.zeros((), device=student.device)
    if teacher is not None:
        apart = t**2 * GKDTrainer.generalized_jsd_loss(student, teacher.float(), None, beta, t, "sum")
    return torch.stack([summed_loss(student, labels), apart])


class DistillTrainer(Metered, SFTTrainer):
    """TRL's trainer, metered; `student_trainer` gives it parameters, a teacher or None, and the first step on own texts."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """One step; from `own_from` on, the student first writes its own completions to the prompts of the rows."""
        if self.state.global_step >= self.own_from:
            rows = [inputs[name].tolist() for name in ("input_ids", "labels")]
            with torch.random.fork_rng(), self.accelerator.autocast():  # the order of rows must not change
                torch.manual_seed(self.p.seed * 1_000_003 + self.state.global_step)
                how = {"do_sample": True, "top_k": 0}
                tokens = self.p.distill_tokens
                inputs = self.data_collator(
                    written_answers(self.model, self.processing_class, *rows, tokens, **how)
                )
        return super().training_step(model, inputs, *args)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Mean over the tokens that count of (1 - α) · cross-entropy + α · KL; on own texts the divergence only.

        `CHUNK` positions at a time go back to the hidden states at once; the trainer's backward pass begins there.
        """
        own = self.state.global_step >= self.own_from
        temperature, beta = self.p.distill_temperature, self.p.on_policy_beta if own else 0.0
        # the teacher's share: none without one, all of it on texts that the student has written itself
        share_with_teacher = 1.0 if own else self.p.distill_alpha
        alpha = share_with_teacher if self.teacher else 0.0

        batch = [inputs[name] for name in ("input_ids", "attention_mask", "labels")]
        total = torch.zeros(2, device=model.device)  # cross-entropy and divergence, nats a token
        with self.accelerator.autocast():
            hidden, labels = scored(model, *batch)  # [n, width], [n]: the n positions that count
            taught = scored(self.teacher, *batch)[0] if self.teacher else hidden
            # Logits [n, vocabulary] of both models would be the largest tensors of the step. So the graph is cut at the
            # hidden states: each chunk's logits go back to `cut.grad` and are freed before the next is made.
            cut = hidden.detach().requires_grad_()
            chunks = zip(cut.split(CHUNK), taught.split(CHUNK), labels.split(CHUNK), strict=True)
            for own_hidden, teacher_hidden, said in chunks:
                logits = model.get_output_embeddings()(own_hidden)
                aim = self.teacher.get_output_embeddings()(teacher_hidden) if self.teacher else None
                losses = distillation_losses(logits, aim, said, temperature, beta) / len(labels)
                ((1 - alpha) * losses[0] + alpha * losses[1]).backward()
                total += losses.detach()

        # a model's loss on its own text says nothing about the data
        for name, value, is_logged in (("text_loss", 0, not own), ("divergence", 1, self.teacher)):
            self._metrics["train"][name].append(total[value].item() if is_logged else math.nan)
        # what is returned has the loss's value and, as d(back)/d(hidden) = cut.grad, its gradient
        back = (hidden * cut.grad).sum()
        return (1 - alpha) * total[0] + alpha * total[1] + back - back.detach()


def student_trainer(
    p: Distill, way: str, student: Any, teacher: Any, tokenizer: Any, train: Rows, folder: Path
) -> Any:
    """The trainer of one student; all of `WAYS` see the same rows in the same order."""
    setup = resolve_setup(p)
    args = SFTConfig(
        dataset_kwargs={"skip_prepare_dataset": True},
        completion_only_loss=False,  # the labels already say which tokens count
        **trainer_arguments(setup, student, folder),
    )
    with quiet():
        rows = datasets.Dataset.from_list(train.rows)
        trainer = DistillTrainer(student, args, train_dataset=rows, processing_class=tokenizer)
    sees_teacher, writes = WAYS[way]
    trainer.p, trainer.teacher = p, teacher if sees_teacher else None
    # last, not mixed in: what a thinned student writes at first is noise
    steps = setup.fit.steps
    trainer.own_from = steps - round(steps * p.on_policy_share * writes)
    return trainer


def written_answers(
    model: Any, tokenizer: Any, ids: list, labels: list, tokens: int, **how: Any
) -> list[dict[str, list]]:
    """The prompts of encoded rows with what `model` writes after them, as such rows again; in one batch.

    `tokens` at most each, up to the end token where it comes; `how`: see `kit.train.models.generate`.
    """
    firsts = (next(i for i, label in enumerate(row) if label != IGNORED) for row in labels)
    given = [row[: max(1, first)] for row, first in zip(ids, firsts, strict=True)]
    end = tokenizer.eos_token_id
    written = generate(model, tokenizer, given, tokens, eos_token_id=end, **how).tokens
    answers = (row[: row.index(end) + 1] if end in row else row for row in written)
    pairs = zip(given, answers, strict=True)
    return [{"input_ids": q + a, "labels": [IGNORED] * len(q) + a} for q, a in pairs]


def writing_speed(model: PreTrainedModel, tokenizer: Any, rows: list[dict], tokens: int) -> float:
    """Tokens/s of greedy generation, `tokens` after the prompt of each row, in one batch; measured."""
    ids, labels, began = [r["input_ids"] for r in rows], [r["labels"] for r in rows], time.perf_counter()
    written_answers(model, tokenizer, ids, labels, tokens, do_sample=False, min_new_tokens=tokens)
    return round(len(rows) * tokens / (time.perf_counter() - began), 1)


@torch.no_grad()
def batches(teacher: PreTrainedModel, tokenizer: Any, held: Rows) -> list[tuple[Any, torch.Tensor]]:
    """Held-out rows as tensors, each batch with the teacher's hidden states: computed once for all students."""
    rows = (held.rows[start : start + 4] for start in range(0, len(held.rows), 4))
    tensors = [[t.to(teacher.device) for t in padded_batch(r, tokenizer.pad_token_id)] for r in rows]
    return [(batch, scored(teacher.eval(), *batch)[0]) for batch in tensors]


@torch.no_grad()
def student_scores(model: PreTrainedModel, teacher: PreTrainedModel, held: Any) -> dict[str, Any]:
    """Size of `model`, and over all tokens of `held` (`batches`) its loss, KL and agreement with `teacher`."""
    total = torch.zeros(4).double()
    for batch, taught in held:
        hidden, labels = scored(model.eval(), *batch)
        for mine, theirs, said in zip(
            *(tensor.split(CHUNK) for tensor in (hidden, taught, labels)), strict=True
        ):
            a, b = model.get_output_embeddings()(mine), teacher.get_output_embeddings()(theirs)
            same = (a.argmax(-1) == b.argmax(-1)).sum()
            total += (
                torch.stack([*distillation_losses(a, b, said), same, torch.tensor(len(said))]).double().cpu()
            )
    loss, apart, same = (total[:3] / total[3]).tolist()
    size = sum(w.numel() * w.element_size() for w in model.parameters()) / 1e6
    about = {"parameters": describe(model)["parameters"], "mb": round(size, 1)}
    return {**about, "perplexity": math.exp(min(loss, 700.0)), "loss": loss, "kl": apart, "agreement": same}
