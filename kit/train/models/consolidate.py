"""Sharded checkpoints → one model, tensor by tensor: memory holds one file of the result and one slice more."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from kit.errors import ModelError
from kit.lake.files import no_space

INDEX = "model.safetensors.index.json"
ALLOWED = re.compile(
    r"torch\.(Size|b?float\d+|u?int\d+|serialization\._get_layout)|pathlib\.(Posix|Windows)Path"
    r"|torch\.distributed\.checkpoint\.(filesystem\._StorageInfo|metadata\.(\w+Metadata|Metadata(Index)?"
    r"|StorageMeta|TensorProperties|_MEM_FORMAT_ENCODING))"
)
"""What the `.metadata` of a torch.distributed.checkpoint (DCP) folder may name: it is a pickle, which can run code."""


class Metadata(pickle.Unpickler):
    """The table of contents of a DCP folder."""

    def find_class(self, module: str, name: str) -> Any:
        """The class that is asked for; raises `ModelError` for any but `ALLOWED`."""
        if not ALLOWED.fullmatch(f"{module}.{name}"):
            raise ModelError(f"the .metadata of this checkpoint names {module}.{name}, which could run code")
        return super().find_class(module, name)


@contextlib.contextmanager
def file_errors(what: str) -> Iterator[None]:
    """Turn a full disk and unreadable files into one `ModelError` line."""
    try:
        yield
    except (OSError, SafetensorError, pickle.UnpicklingError, EOFError, dcp.CheckpointException) as error:
        why = "the disk is full" if no_space(error) else str(error).strip().splitlines()[0][:200]
        raise ModelError(f"{what}: {why}") from None


def open_sharded(folder: Path) -> tuple[dict[str, torch.Tensor], Callable[[str], torch.Tensor]]:
    """The tensors of a folder of shards, on the meta device (shape and type, no memory), and what reads one.

    Safetensors in any number of files, and DCP folders (slices, a file or more a rank: FSDP2, tensor parallelism,
    any DTensor): of these the model, not the optimizer. Raises `ModelError` for a folder that is not whole.
    """
    with file_errors(f"'{folder.name}' cannot be read"):
        if (folder / ".metadata").exists():
            reader, about = dcp.FileSystemReader(folder), Metadata((folder / ".metadata").open("rb")).load()
        else:
            reader = dcp.HuggingFaceStorageReader(str(folder))
            about = reader.read_metadata()
    # read once, here: DCP would do so for every tensor, and unpickle whatever is named
    reader.read_metadata = lambda *_, **__: about
    keys = {}
    for key, stored in about.state_dict_metadata.items():
        path = (about.planner_data or {}).get(key) or (key,)
        if hasattr(stored, "chunks") and (len(path) == 1 or "model" in path[:-1]):
            keys[path[-1]] = key, stored.size, stored.properties.dtype
            if sum(math.prod(c.sizes) for c in stored.chunks) != math.prod(stored.size):
                raise ModelError(f"'{folder.name}' is not whole: slices of {path[-1]} are missing or doubled")
    listed = json.loads((folder / INDEX).read_text())["weight_map"] if (folder / INDEX).exists() else keys
    if not keys or set(listed) - set(keys):
        raise ModelError(f"'{folder.name}' is not whole: files with weights are missing")

    def read(name: str) -> torch.Tensor:
        key, size, dtype = keys[name]
        state = {key: torch.empty(size, dtype=dtype)}
        with file_errors(f"{name} of '{folder.name}' cannot be read"):
            dcp.load(state, storage_reader=reader, no_dist=True)
        return state[key]

    return {n: torch.empty(size, dtype=dtype, device="meta") for n, (_, size, dtype) in keys.items()}, read


def consolidate(source: Path, target: Path, shard_mb: int, config_from: Path | None = None) -> dict[str, int]:
    """Write the shards in `source` as safetensors of at most `shard_mb` MB (or one tensor) with an index.

    `config_from` holds configuration and tokenizer, where `source` does not. The folder appears when it is whole.
    Returns the number of tensors of each file. Raises `ModelError`, also for a full disk.
    """
    about, work, (tensors, read) = config_from or source, Path(f"{target}.part"), open_sharded(source)
    with file_errors(f"'{target.name}' cannot be written"), contextlib.ExitStack() as stack:
        if json.loads((about / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings"):
            tensors.pop("lm_head.weight", None)  # the embeddings again: a state_dict() names them twice
        plan = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_mb * 10**6)
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        work.mkdir(parents=True)
        for file, names in plan.filename_to_tensors.items():
            save_file({name: read(name) for name in names}, work / file, metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (work / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        for path in about.iterdir():
            if path.suffix in {".json", ".jinja", ".txt", ".model"} and path.name != INDEX:
                shutil.copy(path, work)
        work.rename(target)
    return {file: len(names) for file, names in plan.filename_to_tensors.items()}
