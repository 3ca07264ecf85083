"""74: adapter into base, sharded, reloaded, compared, served; with a model card written from the manifests."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available

from kit import show
from kit.errors import ModelError
from kit.lake.code import code_identity, environment
from kit.lake.manifest import Manifest, counts_line
from kit.lake.store import Lake
from kit.params import MergeAndExport
from kit.progress import Progress, progress
from kit.train.encode.batches import IGNORED, padded_batch, predicted_tokens, summed_loss
from kit.train.encode.encode import prepare
from kit.train.loop.meter import peak_memory
from kit.train.models import adapters, load, shipped
from kit.train.models.consolidate import file_errors, open_sharded
from kit.train.models.generate import generate
from kit.train.models.methods import METHODS

CHAIN = {"60_finetune_sft": ("60_finetune_sft",), "70_align_dpo": ("60_finetune_sft", "70_align_dpo")}
LIMIT = {"none": 1e-3, "nf4": 1e-2, "nf4_double": 1e-2, "int8": 0.1}
"""Largest relative change of the logits by a merge, over each kind of base; int8 rounds activations, too."""


def merge_and_export(p: MergeAndExport, lake: Lake) -> Manifest:
    """Merge the adapters up to `p.export_from` into the base; commit `model/`: safetensors, tokenizer, card.

    Tables: `drift` (logits after every step against base + adapter), `answers` (beside the truth), `shards`. Counts:
    held-out rows. Raises `ModelError` for what cannot merge, a merge or file that changes the model, a server that
    does not answer, and a full disk.
    """
    load.set_threads(p.threads)
    open_base = functools.partial(load.load_model, p.base_model, trust_remote_code=p.trust_remote_code)
    with lake.stage(p) as out, tempfile.TemporaryDirectory(prefix="kit-export-") as temp:
        folder, tuned = Path(temp, "model"), [out.read(stage) for stage in CHAIN[p.export_from]]
        require_mergeable(tuned)
        adapter_folders = [lake.local_folder(m, "model") for m in tuned]
        tokenizer = load.load_tokenizer(p.base_model, trust_remote_code=p.trust_remote_code)
        heldout = lake.table(out.read("50_build_datasets"), "heldout").to_pylist()
        rows = prepare(heldout, tokenizer, p.max_tokens, tuned[0].params.get("task", "completion"))
        rows.require("heldout")
        with peak_memory() as peak, progress(6, "export", "steps") as bar:
            probe = Probe(rows.rows[: p.export_rows], tokenizer, p.export_tokens, bar)
            kind = adapters.tuned_on(adapter_folders[-1])["quantization"]
            trained_in = tuned[-1].metrics["what_ran"].get("computes_in", "float32")
            probe.look("attached", attached(open_base, adapter_folders, kind, trained_in))
            probe.look("base", open_base(dtype="float32"), answer=True)
            model = open_base(dtype="float32", adapters=adapter_folders)
            drift = probe.look("merged", model, answer=True)
            if not drift < LIMIT[kind]:
                raise ModelError(
                    f"the merge changes the logits by {drift:.2g} (limit {LIMIT[kind]}, base in {kind})"
                )
            probe.look("cast", load.cast(model, getattr(torch, p.export_dtype)))
            with file_errors("the merged model cannot be saved"):
                model.save_pretrained(folder, max_shard_size=f"{p.export_shard_mb}MB")
                tokenizer.save_pretrained(folder)
            verify_export(folder, model)
            model = None  # room for the next one
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=p.export_dtype).to(load.device())
            probe.look("reloaded", model, answer=True)
            question = tokenizer.decode(probe.prompts[0])
            expected = probe.greedy(model, [tokenizer(question)["input_ids"]])[0]
            model, served = None, {"engine": "not asked"}
            if p.serve:
                served = serve(folder, question, p.export_tokens)
                served["expected"] = tokenizer.decode(expected, skip_special_tokens=True)
            bar.update()
        out.folder("model", folder)
        shards = [{"file": f.name, "mb": f.stat().st_size / 1e6} for f in sorted(folder.iterdir())]
        for name, table in (("drift", probe.steps), ("answers", probe.answers()), ("shards", shards)):
            out.rows(name, table)
        # the card names this commit and these versions: no part of what the model is
        out.bytes("model/README.md", card(p, lake, probe.steps).encode(), measured=True)
        metrics = {"served": served, "peak_rss_mb": peak["mb"]}
        return out.commit(rows.counts(p.export_rows, 1, "export_rows"), metrics)


def require_mergeable(tuned: Sequence[Manifest]) -> None:
    """Raise `ModelError` for a stage that learned a prompt or a prefix: no weight can hold it."""
    for stage, method in ((m.stage, m.params.get("method", "lora")) for m in tuned):
        if not METHODS[method].merges:
            raise ModelError(f"{stage} learned with method={method} what no weight can hold: use method=lora")


def attached(open_base: Any, folders: list[str], kind: str, trained_in: str) -> torch.nn.Module:
    """What was trained: the last adapter beside its base, quantised from weights in `trained_in` if it was then.

    In float32 arithmetic, or rounding would hide what a merge changes. After method full: the weights themselves.
    """
    if not Path(folders[-1], "adapter_config.json").exists():
        return open_base(dtype="float32", adapters=folders)
    dtype = "float32" if kind == "none" else trained_in
    model = open_base(dtype=dtype, adapters=folders[:-1], quantization=kind)
    for module in (m for m in model.modules() if hasattr(m, "compute_dtype")):
        module.compute_dtype = torch.float32
    for weight in (w for w in model.parameters() if w.is_floating_point()):
        weight.data = weight.data.float()
    return PeftModel.from_pretrained(model, folders[-1])


def verify_export(folder: Path, model: torch.nn.Module) -> None:
    """Raise `ModelError` unless the files hold every tensor of `model`, bit by bit; of tied ones, one."""
    (tensors, read), state = open_sharded(folder), model.state_dict()
    held = {state[n].data_ptr() for n in tensors if n in state and torch.equal(read(n), state[n].cpu())}
    lost = [n for n in {**state, **tensors} if n not in state or state[n].data_ptr() not in held]
    if lost:
        raise ModelError(f"the files do not hold the merged model: {lost[0]} is another one there")


class Probe:
    """What each model on the way is asked: logits of the held-out rows, greedy answers to their prompts."""

    def __init__(self, rows: list[dict[str, list[int]]], tokenizer: Any, tokens: int, bar: Progress) -> None:
        self.rows, self.tokenizer, self.tokens, self.bar = rows, tokenizer, tokens, bar
        self.steps, self.said = [], {}
        # a row without prompt is continued from its beginning
        cuts = [r["labels"].count(IGNORED) or min(8, len(r["labels"]) // 2) for r in rows]
        self.prompts = [r["input_ids"][:cut] for r, cut in zip(rows, cuts, strict=True)]

    @torch.no_grad()
    def look(self, step: str, model: torch.nn.Module, answer: bool = False) -> float:
        """Relative L2 change of the scored logits against the first model's; with `answer`, answers are kept."""
        scored = []
        for row in self.rows:  # one at a time, without padding: nothing but the weights can make a difference
            ids, _, labels = padded_batch([row], self.tokenizer.pad_token_id)
            answered = model.eval()(input_ids=ids.to(model.device), use_cache=False).logits
            scored.append(predicted_tokens(answered.cpu(), labels))
        logits = torch.cat([before.float() for before, _ in scored])
        tokens = torch.cat([said for _, said in scored])
        self.first = self.first if self.steps else logits
        facts = {
            "relative": (logits - self.first).norm() / self.first.norm(),
            "largest": (logits - self.first).abs().max(),
            "same_top_token": (logits.argmax(-1) == self.first.argmax(-1)).float().mean(),
            "perplexity": (summed_loss(logits, tokens) / len(tokens)).exp(),
        }
        self.steps.append({"step": step, **{name: value.item() for name, value in facts.items()}})
        if answer:
            self.said[step] = self.greedy(model, self.prompts)
        self.bar.update()
        return self.steps[-1]["relative"]

    def greedy(self, model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
        """The likeliest answers, as one batch; they end where the model's own settings say, as when it is served."""
        return generate(model, self.tokenizer, prompts, self.tokens, do_sample=False).tokens

    def answers(self) -> list[dict[str, Any]]:
        """Answers beside the truth; `same_tokens`: share of the reloaded model's tokens that the merged one gives."""
        table = []
        for i, (row, prompt) in enumerate(zip(self.rows, self.prompts, strict=True)):
            ids = {
                "prompt": prompt,
                "truth": row["input_ids"][len(prompt) :],
                **{k: v[i] for k, v in self.said.items()},
            }
            same = [a == b for a, b in zip(ids["merged"], ids["reloaded"], strict=False)]
            texts = {
                name: self.tokenizer.decode(tokens, skip_special_tokens=True) for name, tokens in ids.items()
            }
            table.append({**texts, "same_tokens": sum(same) / len(same)})
        return table


def serve(folder: Path, question: str, tokens: int, wait_s: float = 300) -> dict[str, Any]:
    """The answer of `transformers serve` to an OpenAI client's question.

    The server runs on a free port of this machine only, and is always stopped. Raises `ModelError`.
    """
    if not is_serve_available():
        return {"engine": "not served", "answer": "pip install -c constraints.txt '.[serve]' brings a server"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        folder.name,
        "--port",
        str(port),
    ]
    command += ["--host", "127.0.0.1", "--device", str(load.device())]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    body = json.dumps({"model": folder.name, "prompt": question, "max_tokens": tokens, "temperature": 0})
    began, reply = time.perf_counter(), {}
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, cwd=folder.parent, env=env, stdout=log, stderr=log)
        try:
            while not reply and server.poll() is None and time.perf_counter() - began < wait_s:
                time.sleep(0.2)
                with contextlib.suppress(ConnectionRefusedError):  # it listens once the model is loaded
                    line = http.client.HTTPConnection("127.0.0.1", port, timeout=wait_s)
                    line.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                    reply = json.load(line.getresponse())
        finally:
            server.kill()
            server.wait()
            log.seek(0)
            last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
    if "choices" not in reply:
        raise ModelError(f"transformers serve gave no answer: {str(reply or last)[:200]}")
    seconds = round(time.perf_counter() - began, 2)
    return {"engine": "transformers serve", "answer": reply["choices"][0]["text"], "seconds": seconds}


def card(p: MergeAndExport, lake: Lake, steps: list[dict[str, Any]]) -> str:
    """The model card: base and licences, ways of tuning, where records went, what was measured, what made it."""
    manifests, todo = {}, list(CHAIN[p.export_from])
    while todo:
        if manifest := lake.manifest(p.run, todo.pop()):
            manifests[manifest.stage] = manifest
            todo += [i.uri.rpartition("/")[2] for i in manifest.inputs if i.manifest_sha256]
    known = p.base_model == shipped.SHIPPED
    base = "HuggingFaceTB/SmolLM2-135M-Instruct" if known else Path(p.base_model).name
    ways = ", then ".join(
        f"{s[3:]} by {manifests[s].params.get('method', 'lora')}" for s in CHAIN[p.export_from]
    )
    scores = [
        (s, k, v) for s, m in sorted(manifests.items()) for k, v in m.metrics.items() if "perplexity_" in k
    ]
    lines = [
        f"---\nbase_model: {base}\nlicense: {'apache-2.0' if known else 'other'}\npipeline_tag: text-generation\n---",
        f"# {p.run}: {base}, tuned\n\n{ways}; adapters merged in float32, saved as {p.export_dtype}.",
        "## Data\n\nWeb pages and files; licences are their owners', mostly unknown (see `card.md` of stage 50).\n",
        *(f"- {s}: {show.escape(counts_line(m.counts))}" for s, m in sorted(manifests.items())),
        "\n## Measured\n",
        *(f"- {s}: {k} = {v:.4g}" for s, k, v in scores),
        *(f"- {s['step']}: logits {s['relative']:.2g} off, perplexity {s['perplexity']:.4g}" for s in steps),
        f"\n## Made by\n\ncommit {code_identity(p.stage)['git_sha']}",
        *(f"- {name} {version}" for name, version in environment().items()),
    ]
    return "\n".join(lines) + "\n"
