"""Files on a disk or on `s3://`: written under new names, hashed, and a store's refusal told in one line."""

from __future__ import annotations

import errno
import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from kit import resolve_path
from kit.errors import LakeError, ParamError
from kit.lake.manifest import Output

WHOLE_FILE_HASH_BYTES = 64 << 20


@dataclass(frozen=True)
class PartWriter:
    """Writes the files of one attempt at a stage, from whichever process it was sent to: it can be pickled.

    Every file gets a name that no other attempt or retried task uses, and counts once the stage's manifest lists it.
    """

    lake_uri: str
    folder: str
    """The stage's folder on the lake's file system."""
    attempt: str

    def table(self, name: str, table: pa.Table) -> Output:
        """Write one Parquet file, `name.parquet`."""
        return self.bytes(f"{name}.parquet", parquet_bytes(table), table.num_rows)

    def bytes(self, name: str, data: bytes, rows: int = 0) -> Output:
        """Write one file of any kind."""
        fs, _ = fsspec.core.url_to_fs(self.lake_uri)
        head, _, tail = name.rpartition("/")
        # files of a folder (a model) keep their names, inside a folder of their attempt's own
        unique = f"{_stem(tail)}-{uuid.uuid4().hex[:8]}{_suffix(tail)}"
        path = f"{self.attempt}/{head}/{tail}" if head else unique
        full = f"{self.folder}/{path}"
        with store_errors(f"cannot write {name}"):
            fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(full, data)
        return Output(
            name=name, path=path, rows=rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file (zstd), without the Arrow schema: the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue().to_pybytes()


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _suffix(name: str) -> str:
    return name[len(_stem(name)) :]


@contextmanager
def store_errors(what: str) -> Iterator[None]:
    """Turn a store's refusal into a `LakeError` of one line."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise LakeError(f"{what}: the disk is full") from None
        raise LakeError(f"{what}: {error.strerror or error}") from None
    except (pa.ArrowInvalid, ValidationError) as error:
        raise LakeError(f"{what}: {str(error).splitlines()[-1].strip()}") from None
    except Exception as error:
        # an object store's client has errors of its own (no credentials, nobody there), which are no OSError
        if type(error).__module__.partition(".")[0] not in {"botocore", "aiobotocore", "aiohttp"}:
            raise
        raise LakeError(f"{what}: {error}") from None


def fingerprint(uri: str) -> str:
    """Content hash of something outside the lake: small files by content, large or remote ones by size and tag."""
    fs, path = fsspec.core.url_to_fs(resolve_path(uri))
    digest = hashlib.sha256()
    try:
        files = sorted(fs.find(path)) or [path]
        for file in files:
            info = fs.info(file)
            digest.update(file.removeprefix(path).encode())
            if "://" not in uri and info["size"] <= WHOLE_FILE_HASH_BYTES:
                digest.update(fs.cat_file(file))
            else:
                tag = info.get("ETag") or info.get("mtime") or ""
                digest.update(f"{info['size']} {tag}".encode())
    except FileNotFoundError:
        raise ParamError(f"'{uri}' does not exist") from None
    return digest.hexdigest()


def no_space(error: BaseException) -> bool:
    """Whether an error, or what it came from, says that the disk is full."""
    chain = [error, error.__cause__, error.__context__]
    full = {errno.ENOSPC, errno.EDQUOT}
    return any(getattr(e, "errno", None) in full or "No space left" in str(e) for e in chain if e)
