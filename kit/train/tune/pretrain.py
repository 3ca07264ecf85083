"""62: curated text → a small model from scratch, and `base_model` trained further, with what it forgot measured.

Domain text is what 50 made rows of; general text is what else 40 kept in their languages, from other sites. Rows are
wrapped: documents one after the other, each closed by the end token, cut every `max_tokens`; nothing is padded, and
attention may look back into the document before (as GPT-3 was trained: Brown et al. 2020, appendix B).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from trl import SFTConfig

from kit.errors import ModelError
from kit.lake.manifest import Counts, Manifest
from kit.lake.store import Lake, StageWriter
from kit.params import ContinuePretraining
from kit.train.encode.batches import IGNORED
from kit.train.encode.encode import perplexity
from kit.train.loop.meter import steps_table
from kit.train.loop.run import quiet, run_training
from kit.train.models import adapters, load
from kit.train.plan.setup import Setup, resolve_setup, trainer_arguments
from kit.train.tune.sft import SftTrainer

Texts = dict[str, str]
DOMAIN, GENERAL, HELD = "domain", "general", "held out: "
SHARED_WORDS = 13
"""A text with as many words in a row from another one is no fresh text (Brown et al. 2020, appendix C)."""


def pretrain(p: ContinuePretraining, lake: Lake) -> Manifest:
    """Train a tokenizer and a Llama on all curated text (`scratch/`), and `p.base_model` on the domain's (`model/`).

    Both folders load as models. Metrics `scratch` and `model`: losses, speed, what really ran, and `before` and
    `after` it perplexity and bits per byte on held-out domain and general text (see `passage_scores`). The same parameters,
    threads and machine give the same bytes. All text is held in memory. Raises `ModelError` for too little text,
    replay without general text, a loss that is not finite, and a full disk.
    """
    threads, metrics, trained = load.set_threads(p.threads), {}, set()
    with lake.stage(p) as out, tempfile.TemporaryDirectory(prefix="kit-pretrain-") as temp:
        texts, lost, total = gather(p, lake, out)
        for setup in (resolve_setup(p, each) for each in p.fits()):
            name = setup.fit.name
            trainer, metrics[name], reached = fit_texts(p, setup, texts, Path(temp, name))
            folder, base = Path(temp, name, "made"), p.base_model if name == "model" else ""
            adapters.save_adapter(trainer.model, folder, base)
            trainer.processing_class.save_pretrained(folder)
            out.folder(name, folder)
            out.table(f"steps-{name}", steps_table(trainer), measured=True)
            metrics[name]["what_ran"] |= {"threads": threads, "packing": "wrapped"}
            trained |= reached
        lost += Counter({use: len(texts[use]) for use in (HELD + DOMAIN, HELD + GENERAL)})
        lost["not reached in pretrain_steps"] = len(texts[DOMAIN]) + len(texts[GENERAL]) - len(trained)
        return out.commit(Counts(records_in=total, records_out=len(trained), dropped=+lost), metrics)


def gather(
    p: ContinuePretraining, lake: Lake, out: StageWriter
) -> tuple[dict[str, Texts], Counter[str], int]:
    """Texts by use and id, in an order that `seed` decides; the others by reason; all rows of 50 and documents of 40.

    General text is split by site. What repeats a row (a quotation, a copy too loose for 40) is no general text, and
    what repeats a held-out document is not trained on. Raises `ModelError` when a set that is needed is empty.
    """
    refined, decided, data = map(out.read, ("30_refine_text", "40_deduplicate", "50_build_datasets"))
    texts, lost, both, general = {}, Counter[str](), [], {}
    for split, use in (("train", DOMAIN), ("heldout", HELD + DOMAIN)):
        both += (rows := shuffled(lake.table(data, split).to_pylist(), "row_id", p.seed))
        # a review's prompt is our own template: any model would predict it after a few steps
        said = {r["row_id"]: (r["prompt"] or "") * (r["kind"] != "review") + r["completion"] for r in rows}
        texts[use] = {key: text.strip() for key, text in said.items() if text.strip()}
        lost["empty"] += len(rows) - len(texts[use])
    used, hosts, languages = ({row[key] for row in both} for key in ("doc_id", "host", "language"))
    kept = {r["doc_id"]: r["keep"] for r in lake.table(decided, "part", ["doc_id", "keep"]).to_pylist()}
    documents = lake.table(refined, "part", ["doc_id", "host", "lang", "text", "reviews"]).to_pylist()
    for doc in shuffled((d for d in documents if d["doc_id"] in kept), "doc_id", p.seed):
        reasons = {
            "copy of another document": not kept[doc["doc_id"]],
            "read as rows of 50_build_datasets": doc["doc_id"] in used,
            "language not trained on": doc["lang"] not in languages,
            "site of the domain": doc["host"] in hosts,
            "holds reviews": bool(doc["reviews"]),
        }
        reason = next((name for name, holds in reasons.items() if holds), None)
        lost[reason or "repeats a row"] += 1
        general |= {} if reason else {doc["doc_id"]: doc}
    fresh = unlike({key: d["text"] for key, d in general.items()}, texts[DOMAIN] | texts[HELD + DOMAIN])
    sites = list(dict.fromkeys(d["host"] for d in shuffled((general[k] for k in fresh), "host", p.seed)))
    held = set(sites[: math.ceil(len(sites) * p.general_heldout_share)])
    lost["repeats a row"] -= len(fresh)
    texts[HELD + GENERAL] = {key: text for key, text in fresh.items() if general[key]["host"] in held}
    rest = {key: text for key, text in fresh.items() if general[key]["host"] not in held}
    texts[GENERAL] = unlike(rest, texts[HELD + GENERAL])
    lost["repeats a held-out document"] = len(rest) - len(texts[GENERAL])
    if not texts[HELD + DOMAIN]:
        raise ModelError("50_build_datasets holds no held-out row to measure on: see its heldout_share")
    if p.replay_share and not texts[GENERAL]:
        raise ModelError(f"there is no general text for replay_share={p.replay_share}: set it to 0")
    return texts, lost, len(both) + len(kept)


def shuffled(rows: Iterable[Any], key: Any, seed: int) -> list[Any]:
    """Rows in an order that only `seed` and what they hold under `key` decide."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {row[key]}".encode()).digest())


def unlike(texts: Texts, known: Texts) -> Texts:
    """Those of `texts` that share no `SHARED_WORDS` words in a row with any of `known`."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return set(zip(*(words[i:] for i in range(SHARED_WORDS)), strict=False))

    known_runs = set().union(*map(runs, known.values()))
    return {key: text for key, text in texts.items() if known_runs.isdisjoint(runs(text))}


def wrap(texts: Texts, tokenizer: Any, length: int) -> tuple[list[list[int]], dict[str, int]]:
    """Texts as rows of `length` tokens, the last one filled up from the first text; the row in which each begins.

    Raises `ModelError` when all of them do not fill a row.
    """
    ids, begins = [], {}
    for key, text in texts.items():
        begins[key] = len(ids) // length
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + [
            tokenizer.eos_token_id
        ]
    if len(ids) < length:
        raise ModelError(
            f"too little text: {len(ids)} tokens do not fill a row of max_tokens={length}: lower it"
        )
    ids += ids[: -len(ids) % length]
    return [ids[i : i + length] for i in range(0, len(ids), length)], begins


def new_model(p: ContinuePretraining, texts: Iterable[str]) -> tuple[Any, Any]:
    """A Llama with random weights and tied embeddings, and a byte-level BPE tokenizer trained on `texts`.

    Raises `ModelError` when the texts do not hold `pretrain_vocab` entries.
    """
    blank = transformers.GPT2Tokenizer(pad_token="<|pad|>")  # it ends texts with <|endoftext|>
    tokenizer = blank.train_new_from_iterator(texts, p.pretrain_vocab, show_progress=False)
    if (size := len(tokenizer)) < p.pretrain_vocab:
        raise ModelError(
            f"too little text for more than {size} entries: lower pretrain_vocab={p.pretrain_vocab}"
        )
    torch.manual_seed(p.seed)
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=p.pretrain_hidden,
        intermediate_size=p.pretrain_hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=p.pretrain_layers,
        num_attention_heads=p.pretrain_hidden // 32,
        max_position_embeddings=p.max_tokens,
        tie_word_embeddings=True,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    return transformers.LlamaForCausalLM(config).to(load.device()), tokenizer


def passage_scores(
    model: Any, tokenizer: Any, held: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Perplexity and bits per byte on each set of passages.

    Bits per byte = Σ -log₂ p(token | the passage before it) / Σ UTF-8 bytes of these tokens, over all tokens after
    the first word, which is given: tokenizers that cut at spaces are asked for the very same bytes. Perplexity is a
    mean per token, so it compares models of one tokenizer only.
    """
    scores = {}
    for name, texts in held.items():
        rows, size = [], 0
        for text in texts:
            given, coded = text.split(maxsplit=1)[0], tokenizer(text, return_offsets_mapping=True)
            ids, spans = coded["input_ids"], coded["offset_mapping"]
            labels = [i if start >= len(given) else IGNORED for i, (start, _) in zip(ids, spans, strict=True)]
            rows.append({"input_ids": ids, "labels": labels})
            size += len(text[max(end for start, end in spans if start < len(given)) :].encode())
        ppl, tokens = perplexity(model, tokenizer, rows)
        bits = math.log2(ppl) * tokens / size
        scores[name] = {"perplexity": ppl, "bits_per_byte": bits, "tokens": tokens, "bytes": size}
    return scores


def fit_texts(
    p: ContinuePretraining, setup: Setup, texts: dict[str, Texts], folder: Path
) -> tuple[Any, Any, Any]:
    """Train `scratch` or `model` in the order of the text, from its beginning again where it ends.

    Returns the trainer, metrics, and the ids of texts that a step saw something of.
    """
    main, share = texts[DOMAIN], p.replay_share
    if setup.fit.name == "scratch":
        both, share = main | texts[GENERAL], 0.0
        main = {key: both[key] for (key,) in shuffled(zip(both), 0, p.seed)}
        model, tokenizer = new_model(p, main.values())
    else:  # in float32, as all weights are that are trained
        setup.require_context()
        tokenizer, model = setup.tokenizer(), setup.model()
    rows, begins = wrap(main, tokenizer, setup.fit.tokens)
    again, begins_again = wrap(texts[GENERAL], tokenizer, setup.fit.tokens) if share else ([], {})
    # replayed rows evenly among the others (Ibrahim et al. 2024)
    taken = range(setup.fit.steps * setup.fit.step_rows)
    which = [int((i + 1) * share + 1e-9) > int(i * share + 1e-9) for i in taken]
    turns = itertools.cycle(range(len(rows))), itertools.cycle(range(len(rows), len(rows + again)))
    every = datasets.Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows + again])
    arguments = trainer_arguments(setup, model, folder)
    arguments |= {"train_sampling_strategy": "sequential", "completion_only_loss": False}
    with quiet():
        args = SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, **arguments)
        data = every.select([next(turns[replay]) for replay in which])
        trainer = SftTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    held = passages(p, texts)
    amp = torch.autocast(model.device.type, torch.bfloat16, enabled=arguments["bf16"])
    before = amp(passage_scores)(model, tokenizer, held)
    ran = run_training(trainer, setup.fit.name)
    ran |= {
        "before": before,
        "after": amp(passage_scores)(model, tokenizer, held),
        "replayed_rows": sum(which),
    }
    trained = ((begins, len(which) - sum(which)), (begins_again, sum(which)))
    reached = {key for begins, n in trained for key, row in begins.items() if row < n}
    ran |= {"documents": len(reached), "epochs": round((len(which) - sum(which)) / len(rows), 3)}
    size = sum(len(text.encode()) for text in main.values())
    ran["bytes_per_token"] = round(size / len(rows) / setup.fit.tokens, 4)
    return trainer, ran, reached


def passages(p: ContinuePretraining, texts: Mapping[str, Texts]) -> dict[str, list[str]]:
    """The beginnings of held-out texts, by use, cut at a space to a window for any tokenizer: two characters a token."""
    beginning = re.compile(rf"\S+\s.{{0,{2 * p.max_tokens}}}(?!\S)", re.DOTALL)
    held = {}
    for use in (u for u in (DOMAIN, GENERAL) if texts[HELD + u]):
        cut = (beginning.match(text) for text in texts[HELD + use].values())
        held[use] = [passage[0] for passage in cut if passage][: p.eval_rows]
    return held
