"""90: base | tuned | aligned, side by side: what they write, and how well they predict what people wrote."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kit import show
from kit.errors import ModelError
from kit.lake.manifest import Counts, Manifest
from kit.lake.store import Lake
from kit.params import CompareGenerations
from kit.progress import progress
from kit.train.encode.encode import perplexity, prepare
from kit.train.models import load
from kit.train.models.generate import for_readers, generate

STEPS: dict[str, tuple[str, ...]] = {
    "base": (),
    "tuned": ("60_finetune_sft",),
    "aligned": ("60_finetune_sft", "70_align_dpo"),
}
"""The three models: the stages whose weights go onto the base, in order."""


def compare_generations(p: CompareGenerations, lake: Lake) -> Manifest:
    """Commit tables `completions` and `perplexity` and a page `report.html`.

    The models run one after another, so memory holds one; every prompt gets the same random numbers from
    each. Perplexity is over the completion tokens of the first `p.eval_rows` held-out rows, as in 60.
    Counts: prompts. Raises `ModelError` when no prompt holds a word, or no held-out row can be scored.
    """
    load.set_threads(p.threads)
    with lake.stage(p) as out:
        data = out.read("50_build_datasets")
        folders = {s: lake.local_folder(out.read(s), "model") for s in STEPS["aligned"]}
        prompts = [prompt for prompt in p.prompts if prompt.strip()]
        if not prompts:
            raise ModelError("parameter 'prompts' holds no prompt")
        tokenizer = load.load_tokenizer(p.base_model)
        heldout = prepare(lake.table(data, "heldout").to_pylist()[: p.eval_rows], tokenizer, p.max_tokens)
        heldout.require("heldout")
        said: dict[str, list[str]] = {}
        scores: list[dict[str, Any]] = []
        with progress(len(STEPS), "compare", "models") as bar:
            for name, stages in STEPS.items():
                model = load.load_model(p.base_model, dtype=p.dtype, adapters=[folders[s] for s in stages])
                said[name] = complete_all(model, tokenizer, prompts, p)
                value, tokens = perplexity(model, tokenizer, heldout.rows)
                scores.append({"model": name, "perplexity": value, "tokens": tokens})
                del model
                load.release()
                bar.update()
                bar.note(f"{name}: perplexity {value:.1f}")
        rows = [{"prompt": q, **{name: said[name][i] for name in STEPS}} for i, q in enumerate(prompts)]
        out.rows("completions", rows)
        out.rows("perplexity", scores)
        out.bytes("report.html", comparison_page(rows, scores, p).encode(), rows=len(rows))
        blank = len(p.prompts) - len(prompts)
        counts = Counts(
            records_in=len(p.prompts), records_out=len(rows), dropped={"empty": blank} if blank else {}
        )
        return out.commit(counts, {"perplexity": {s["model"]: s["perplexity"] for s in scores}})


def complete_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], p: CompareGenerations
) -> list[str]:
    """One completion a prompt, generated as one batch, from `p.seed`.

    What is sampled and when it ends is the same for every model, whatever their own generation settings say.
    """
    settings = for_readers(tokenizer, p.temperature)
    encoded = tokenizer(list(prompts))["input_ids"]
    torch.manual_seed(p.seed)
    written = generate(model, tokenizer, encoded, p.max_new_tokens, **settings)
    return [text.strip() for text in tokenizer.batch_decode(written.tokens, skip_special_tokens=True)]


def complete(prompt: str, model: str, p: CompareGenerations, lake: Lake) -> str:
    """Complete one prompt with `base`, `tuned` or `aligned`, live; the model asked last stays in memory.

    Raises `ModelError` for another model's name and `MissingInput` when its stage has not run.
    """
    if model not in STEPS:
        raise ModelError(f"no model '{model}': choose one of {', '.join(STEPS)}")
    if not prompt.strip():
        return ""
    manifests = [lake.need(p.run, stage) for stage in STEPS[model]]
    folders = tuple(lake.local_folder(m, "model") for m in manifests)
    return complete_all(*_loaded(p.base_model, p.dtype, folders), [prompt], p)[0]


@lru_cache(maxsize=1)
def _loaded(
    base: str, dtype: str, folders: tuple[str, ...]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    load.set_threads()
    return load.load_model(base, dtype=dtype, adapters=folders), load.load_tokenizer(base)


# ---------------------------------------------------------------- the page

HEADS = {"base": "base", "tuned": "tuned (SFT)", "aligned": "aligned (SFT + DPO)"}
STYLE = (
    "<style>.trio{display:grid;grid-template-columns:repeat(3,1fr);gap:1rem}.trio div{border-top:3px solid "
    f"{show.PALE};padding:.5rem 0;white-space:pre-wrap;overflow-wrap:anywhere}}.trio b{{color:{show.ACCENT};"
    "font-weight:600;display:block}@media(max-width:50rem){.trio{grid-template-columns:1fr}}</style>"
)


def comparison_page(
    rows: Sequence[Mapping[str, str]], scores: Sequence[Mapping[str, Any]], p: CompareGenerations
) -> str:
    """The page: perplexities, then every prompt with its three completions. All text is escaped."""
    base = next(s["perplexity"] for s in scores if s["model"] == "base")
    table = show.Table(
        [
            {
                "model": HEADS[s["model"]],
                "held-out perplexity": s["perplexity"],
                "to base": f"{s['perplexity'] / base - 1:+.1%}",
                "tokens": s["tokens"],
            }
            for s in scores
        ]
    )
    how = f"sampled at temperature {p.temperature}, seed {p.seed}" if p.temperature else "greedy"
    note = (
        f"<p class='note'>{html.escape(p.base_model)}; run {html.escape(p.run)}; {how}, at most "
        f"{p.max_new_tokens} tokens. Perplexity: between how many tokens the model hesitates on texts it "
        "has never seen; lower is better.</p>"
    )
    parts = [STYLE, note, "<h2>Perplexity</h2>", table._repr_html_(), "<h2>Completions</h2>"]
    return show.html_page("base | tuned | aligned", *parts, *(_trio(row) for row in rows))


def _trio(row: Mapping[str, str]) -> str:
    texts = {name: html.escape(show.printable(row[name])) or "<i>(nothing)</i>" for name in STEPS}
    columns = "".join(f"<div><b>{html.escape(HEADS[name])}</b>{texts[name]}</div>" for name in STEPS)
    return f"<h3>{html.escape(show.printable(row['prompt']))} …</h3><div class='trio'>{columns}</div>"
