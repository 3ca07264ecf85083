"""Rows written in shards of one size, as Parquet and as JSON Lines."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pyarrow as pa

from kit.data.datasets.formats import FORMATS, ROW, Row, jsonl
from kit.data.datasets.preferences import PAIR
from kit.lake.store import StageWriter


class Shards:
    """Parquet (rows) and JSON Lines (bytes) files of at most `shard_mb`, one row at least, written as they fill."""

    def __init__(self, out: StageWriter, shard_mb: float) -> None:
        self.out, self.limit = out, shard_mb * 1e6
        self.items: dict[str, list[Any]] = defaultdict(list)
        self.sizes, self.files, self.rows = Counter[str](), Counter[str](), Counter[str]()

    def add_row(self, row: Row, formats: list[str]) -> None:
        """Put a row into its split, as it is and in each of `formats` that it can be written in."""
        self.add(f"{row['split']}.parquet", row)
        for name in formats:
            line = FORMATS[name](row)
            if line:
                self.add(
                    f"{name}-{row['split']}.jsonl",
                    jsonl(line | {k: row[k] or "" for k in ("row_id", "doc_id")}),
                )

    def add(self, name: str, item: Row | bytes) -> None:
        """Put a row or a line into the set `name`."""
        size = len(item if isinstance(item, bytes) else jsonl(item))
        if self.items[name] and self.sizes[name] + size > self.limit:
            self.flush(name)
        self.items[name].append(item)
        self.sizes[name] += size
        self.rows[name] += 1

    def flush(self, *names: str) -> None:
        """Write what the sets hold."""
        for name in names:
            items, (stem, _, suffix) = self.items.pop(name), name.rpartition(".")
            file = f"{stem}-{self.files[name]:05d}"
            if suffix == "parquet":
                schema = PAIR if stem == "preferences" else ROW
                self.out.table(file, pa.Table.from_pylist(items, schema=schema))
            else:
                self.out.bytes(f"{file}.{suffix}", b"".join(items), rows=len(items))
            self.files[name] += 1
            self.sizes[name] = 0
