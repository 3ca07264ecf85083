"""Near-deduplication in the data benchmark: stage 40 on Spark, and its peers with the same settings.

Word 5-grams, 14 buckets of 8, 64-bit hashes; each job in a process of its own. The peers do not verify what they
remove. text-dedup cannot share an environment with the others: it is measured where somebody put it.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from kit.measure.data.data_jobs import datatrove_counts
from kit.measure.data.process_tree import mark


def near_corpus(archive: str, most: int, corpus: str) -> None:
    """Write the texts of an archive's pages, and a changed copy of every tenth, as Parquet (id, text).

    Copies have up to 30 % of their words replaced by others of the page, seeded.
    """
    import random

    import pyarrow as pa
    import pyarrow.parquet as pq
    from resiliparse.extract.html2text import extract_plain_text

    from kit.data.read import archive as archives
    from kit.data.read.charset import decode

    texts: list[str] = []
    for record in archives.records(archive, archive):
        if len(texts) < most and isinstance(record, archives.Record) and record.type == "response":
            texts.append(extract_plain_text(decode(record.payload, None)[0], main_content=True))
    texts, pick = [t for t in texts if t.strip()], random.Random(1)
    for text in texts[::10]:
        words, share = text.split(" "), pick.uniform(0, 0.3)
        texts.append(" ".join(pick.choice(words) if pick.random() < share else w for w in words))
    pick.shuffle(texts)
    pq.write_table(pa.table({"id": [f"{i:020d}" for i in range(len(texts))], "text": texts}), corpus)


def near_kit(corpus: str, lake: str, cores: int) -> dict[str, int]:
    """Stage 40 over the texts, as if refining had let them through in eight parts; no boilerplate, as in its peers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from kit.data.dedup import dedup
    from kit.data.engine import spark
    from kit.lake.manifest import Counts
    from kit.lake.store import Lake
    from kit.params import Cores, Deduplicate, RefineText

    to, texts = Lake(lake), pq.read_table(corpus).rename_columns(["doc_id", "text"])
    n = len(texts)
    for name in ("url", "payload_digest", "drop_reason", "host", "fetch_time"):
        kind = pa.timestamp("ms") if name == "fetch_time" else pa.string()
        texts = texts.append_column(name, pa.nulls(n, kind))
    step = -(-n // 8)
    with to.stage(RefineText(run="benchmark", lake=lake)) as out:
        for start in range(0, n, step):
            out.table(f"part-{start:05d}", texts.slice(start, step))
        out.commit(Counts(records_in=n, records_out=n))
    del texts
    spark.run_tasks(Cores(cores=cores), _load, [(1, 0)] * 2 * cores, "start", "tasks")
    p = Deduplicate(run="benchmark", lake=lake, cores=cores, survivor="longest", boilerplate_pages=0)
    mark("start")
    deduplicated = dedup.deduplicate(p, to)
    mark("end")
    return {"units": n, "kept": deduplicated.counts.records_out}


def _load(_: int) -> dict[str, int]:
    import kit.data.dedup.dedup  # noqa: F401

    time.sleep(0.5)  # so that no worker takes two of these tasks
    return {"done": 1}


def near_datatrove(corpus: str, work: str) -> dict[str, int]:
    """datatrove's four stages, one process."""
    import xxhash
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline import dedup
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter

    # it hands over text, and from its version 4 on xxhash takes bytes only
    digest = xxhash.xxh64_intdigest
    xxhash.xxh64_intdigest = lambda value, *seed: digest(
        value.encode() if isinstance(value, str) else value, *seed
    )
    read = ParquetReader(str(Path(corpus).parent), glob_pattern=Path(corpus).name, recursive=False)
    stages = (
        ([read, dedup.MinhashDedupSignature(f"{work}/s")], 1),
        ([dedup.MinhashDedupBuckets(f"{work}/s", f"{work}/d")], 14),
        ([dedup.MinhashDedupCluster(f"{work}/d", f"{work}/r")], 1),
        ([read, dedup.MinhashDedupFilter(f"{work}/r"), ParquetWriter(f"{work}/kept")], 1),
    )
    mark("start")
    for number, (steps, tasks) in enumerate(stages):
        LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=f"{work}/logs{number}").run()
    mark("end")
    return datatrove_counts(Path(work, "logs3"))


def near_rensa(corpus: str) -> dict[str, int]:
    """rensa: MinHash and LSH in Rust over word 5-grams made in Python; what is near an earlier text goes."""
    import pyarrow.parquet as pq
    from rensa import RMinHash, RMinHashLSH

    mark("start")
    texts = pq.read_table(corpus)["text"].to_pylist()
    lsh, kept = RMinHashLSH(threshold=0.72, num_perm=112, num_bands=14), 0
    for number, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        signature = RMinHash(num_perm=112, seed=1)
        signature.update(list({" ".join(words[i : i + 5]) for i in range(len(words) - 4)}))
        kept += len(words) < 5 or not lsh.query(signature)
        if len(words) >= 5:  # all shorter ones would be alike
            lsh.insert(number, signature)
    mark("end")
    return {"units": len(texts), "kept": kept}


def near_textdedup(corpus: str, work: str) -> dict[str, int]:
    """text-dedup's own command, with its xxh3 hashes; the start of that process counts."""
    import subprocess
    import sys

    import pyarrow.parquet as pq
    import text_dedup.minhash  # noqa: F401
    from datasets import load_from_disk

    same = {"ngram": 5, "min_length": 5, "b": 14, "r": 8, "num_perm": 112, "hash_func": "xxh3", "num_proc": 1}
    data = {
        "path": "parquet",
        "data_files": corpus,
        "split": "train",
        "column": "text",
        "output": f"{work}/out",
    }
    options = data | same | {"cache_dir": f"{work}/cache"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    mark("start")
    subprocess.run(
        [sys.executable, "-m", "text_dedup.minhash", *words], check=True, capture_output=True, cwd=work
    )
    mark("end")
    kept = len(load_from_disk(f"{work}/out"))
    return {"units": pq.read_metadata(corpus).num_rows, "kept": kept}
