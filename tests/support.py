"""What several test modules share: the `kit` command as a newcomer's machine runs it."""

import functools
import gzip
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from contextlib import suppress
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pyarrow as pa

from kit import params
from kit.lake.manifest import Counts
from kit.lake.store import Lake
from kit.params import RefineText

KIT = [sys.executable, "-m", "kit.cli"]
# a network namespace of its own has no way out; loopback must be up for the kernel's sockets
OFFLINE = ["unshare", "--net", "--", sys.executable, "-c",
           "import fcntl, os, socket, struct, sys\n"
           "s = socket.socket(); fcntl.ioctl(s, 0x8914, struct.pack('16sh14x', b'lo', 0x41))\n"
           "os.execvp(sys.argv[1], sys.argv[1:])"]  # fmt: skip
SITE = "http://site.example/"
TEXT = [
    "The film is a slow burn, and the ending is worth the wait.",
    "I walked out after an hour; the plot made no sense to me at all.",
    "A warm, funny picture with a cast that clearly enjoyed the work.",
    "The review of movie 'Robots on Holiday' is",
]


@functools.cache
def bare_environment() -> dict[str, str]:
    """No java on the PATH, no JAVA_HOME: what a machine without Java has, everything else in its place."""
    bare = Path(tempfile.mkdtemp(prefix="kit-path-"))
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in folder.iterdir() if folder.is_dir() else ():
            link = bare / program.name
            if not program.name.startswith("java") and not os.path.lexists(link):
                link.symlink_to(program)
    kept = {k: v for k, v in os.environ.items() if k not in ("JAVA_HOME", "SPARK_SUBMIT_OPTS")}
    return kept | {"PATH": str(bare)}


def kit(*words: str, cwd: Path, offline: bool = False) -> tuple[int, str, str]:
    """Run the `kit` command in `cwd`, without Java: its exit status, what it printed, and its errors."""
    prefix = OFFLINE if offline and _can_unshare() else []
    done = subprocess.run(
        [*prefix, *KIT, *words], cwd=cwd, env=bare_environment(), capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def _can_unshare() -> bool:
    probe = subprocess.run([*OFFLINE, "true"], env=bare_environment(), capture_output=True, check=False)
    if probe.returncode:
        print("no network namespace to be had here: the chain runs with the network on")
    return probe.returncode == 0


def page(number: int, size: int = 300) -> bytes:
    """A page of `size` letters that do not compress to nothing."""
    return b"<html>" + bytes(random.Random(number).choices(b"abcdefghij ", k=size)) + b"</html>"


def record(number: int, body: bytes | None = None, head: bytes = b"") -> bytes:
    """One WARC response, written out by hand so that a test can break it."""
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n" + head + b"\r\n"
    block = http + (page(number) if body is None else body)
    return (
        b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Date: 2026-01-02T03:04:05Z\r\n"
        b"WARC-Target-URI: %s%d\r\nContent-Type: application/http; msgtype=response\r\n"
        b"Content-Length: %d\r\n\r\n%s\r\n\r\n" % (SITE.encode(), number, len(block), block)
    )


def arc(number: int) -> bytes:
    """One ARC record."""
    block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page(number)
    return b"%s%d 192.0.2.1 20260102030405 text/html %d\n%s\n" % (SITE.encode(), number, len(block), block)


MEMBERS = [gzip.compress(record(i)) for i in range(4)]


FORMS = {
    "plain.warc": b"".join(record(i) for i in range(4)),
    "members.warc.gz": b"".join(MEMBERS),
    "whole.warc.gz": gzip.compress(b"".join(record(i) for i in range(4))),
    "plain.arc": b"".join(arc(i) for i in range(4)),
    "members.arc.gz": b"".join(gzip.compress(arc(i)) for i in range(4)),
    "whole.arc.gz": gzip.compress(b"".join(arc(i) for i in range(4))),
    "bare-lf.warc": b"".join(record(i).replace(b"\r\n", b"\n", 6) for i in range(4)),
}


def bomb(size: int) -> bytes:
    """A gzip member of one response whose page is `size` zero bytes."""
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = record(0, b"").replace(b"Content-Length: 59", b"Content-Length: %d" % (size + 59))
    assert b"%d" % (size + 59) in head
    parts = [pack.compress(head.removesuffix(b"\r\n\r\n"))]
    parts += [pack.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, pack.compress(b"\r\n\r\n"), pack.flush()])


@functools.cache
def tiny_model() -> str:
    """A folder with a random Llama (0.2M parameters, float32) and a byte-level tokenizer trained here."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(tempfile.mkdtemp(prefix="kit-tiny-"))
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[:2]})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def no_network(monkeypatch):
    """Let every attempt to reach another machine fail; returns the list of attempts, empty so far.

    A library may swallow the error, so a test must look at the list. Offline mode is off: it would hide them.
    """
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    attempts, connect = [], socket.socket.connect

    def refuse(*args, **kwargs):
        address = args[-1]
        if (
            isinstance(address, tuple) and address[0] == "127.0.0.1"
        ):  # the gateway of a Spark session that another test left
            return connect(*args)
        attempts.append(address)
        raise OSError("network touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


def adapter_folder(folder: Path, seed: int = 1) -> Path:
    """A LoRA adapter with random, non-zero weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    from kit.train.models import adapters, load

    torch.manual_seed(seed)
    model = get_peft_model(
        load.load_model(tiny_model(), dtype="float32"),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return adapters.save_adapter(model, folder, "somewhere")


def logits(model):
    import torch

    ids = torch.arange(20).reshape(2, 10)
    return model.eval()(input_ids=ids).logits.float()


def store(lake: Lake, run: str, docs: list[dict], parts: int = 1) -> None:
    """`docs` as if refining had let them through, dealt out to `parts`."""
    whole = {"fetch_time": datetime(2026, 1, 1), "payload_digest": None, "reviews": [], "host": "a.example"}
    rows = [whole | {"url": f"https://a.example/{d['doc_id']}", "drop_reason": None} | d for d in docs]
    review = pa.list_(pa.struct([("item", pa.string()), ("body", pa.string())]))
    names = ("doc_id", "url", "payload_digest", "text", "host", "drop_reason")
    schema = pa.schema(
        [(n, pa.string()) for n in names] + [("fetch_time", pa.timestamp("ms")), ("reviews", review)]
    )
    table, n = pa.Table.from_pylist(rows, schema), len(rows)
    with lake.stage(RefineText(run=run, lake=lake.uri)) as out:
        for i in range(parts):
            out.table(f"part-{i:05d}", table.take(list(range(i, n, parts))))
        out.commit(Counts(records_in=n, records_out=n))


class Server(BaseHTTPRequestHandler):
    """Serves the sample crawl by ranges; each request first meets the next of `server.faults`, if any is left.

    A fault is a status, a (status, headers) pair, or one of the names below; a function of (path, start, end) too.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        from conftest import SAMPLE

        from kit.data.read import polite

        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = int(asked[1]), int(asked[2]) + 1
        self.server.seen.append((self.path, start, end, polite.clock(), dict(self.headers)))
        fault = next(self.server.faults, None)
        fault = fault(self.path, start, end) if callable(fault) else fault
        path = SAMPLE / self.path.lstrip("/").partition("?")[0]
        if fault is None and not path.is_file():
            fault = 404
        if isinstance(fault, int):
            fault = (fault, {})
        if isinstance(fault, tuple):
            return self.answer(fault[0], {"Content-Length": "0"} | fault[1])
        data = path.read_bytes()
        size, data = len(data), data[start:end]
        if not data:
            return self.answer(416, {"Content-Length": "0", "Content-Range": f"bytes */{size}"})
        head = {"Content-Length": len(data), "Content-Range": f"bytes {start}-{start + len(data) - 1}/{size}"}
        head |= {"ETag": self.server.etag, "Last-Modified": "Mon, 12 Jan 2026 10:00:00 GMT"}
        if fault == "range ignored":
            self.answer(200, {"Content-Length": 1 << 40})
            self.server.sent = 0
            while self.server.sent < 1 << 26:
                self.server.sent += self.wfile.write(bytes(1 << 16))
            return None
        if fault in ("wrong start", "wrong end"):
            first, last = (start + 1, start + len(data) - 1) if fault == "wrong start" else (start, start + 5)
            head["Content-Range"] = f"bytes {first}-{last}/{size}"
        if fault == "no Content-Range":
            del head["Content-Range"]
        if fault == "silence":
            return self.hang()
        if fault == "dripping head":
            return self.drip(b"HTTP/1.1 206 Partial Content\r\n" + b"X-Slow: yes\r\n" * 90)
        self.answer(206, head)
        if fault == "dripping body":
            return self.drip(data)
        if fault == "wrong bytes":
            data = data[: len(data) // 2] + bytes(b ^ 1 for b in data[len(data) // 2 :])
        if fault in ("stall", "reset", "short body"):
            data = data[: len(data) // 2]
        self.wfile.write(data)
        if fault == "stall":
            return self.hang()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = fault in ("reset", "short body")
        if fault == "reset":
            self.connection.close()
        return None

    def answer(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def hang(self):
        self.server.let_go.wait(20)
        self.close_connection = True

    def drip(self, data):
        for byte in data:
            self.wfile.write(bytes([byte]))
            if self.server.let_go.wait(0.02):
                break
        self.close_connection = True

    def handle(self):
        with suppress(OSError):  # the client hung up on a fault, as it should
            super().handle()

    def finish(self):
        with suppress(OSError):
            super().finish()


def plain_set(text: str, ngram: int = 5) -> set[tuple[str, ...]]:
    """The word n-grams of a text, the slow way."""
    from kit.data.dedup.minhash import WORD, normalise

    words = WORD.findall(normalise(text))
    n = min(ngram, len(words))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if n else set()


def naive(a: str, b: str, ngram: int = 5) -> float:
    """Jaccard index over sets of word tuples."""
    one, other = plain_set(a, ngram), plain_set(b, ngram)
    return len(one & other) / len(one | other) if one | other else 0.0


def dpo_params(lake, **values):
    small = {
        "dpo_steps": 3,
        "dpo_batch_size": 2,
        "max_tokens": 48,
        "lora_r": 4,
        "threads": 1,
        "sweep_betas": [],
    }
    return params.AlignDpo(
        **{"lake": lake.uri, "base_model": tiny_model(), "dtype": "float32", **small, **values}
    )


def tuned_lake(path, **data):
    from kit.train.tune.sft import finetune

    lake = make_lake(path, **data)
    finetune(sft_params(lake, sft_learning_rate=1e-2), lake)
    return lake


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
