"""Parameters of the data half: 00–52, and 81, which measures it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from kit.params.stage import PATH, Stage, Strings


class Cores(Stage):
    """Stages that run on Spark."""

    cores: int = Field(0, description="Spark's local cores, 0 = all this machine has", ge=0)
    part_mb: float = Field(
        0.5, description="compressed input MB per task and output part; 64 for a real crawl", gt=0
    )


class Contact(Stage):
    """Stages that ask servers of other people."""

    contact: str = Field(
        "",
        description="e-mail address or URL that the user agent names to servers; Common Crawl asks for one",
        pattern=r"^[!-'*-\[\]-~]*$",
    )


class Fetching(Contact):
    """Stages that fetch so much that it is to be bounded."""

    requests_per_s: float = Field(4.0, description="HTTP requests a second of the whole job, at most", gt=0)
    retries: int = Field(6, description="how often a request that fails for a while is tried again", ge=0)


class IndexTable(Stage):
    """Stages that ask the index of a crawl."""

    crawl: str = Field("CC-SAMPLE-2026-05", description="partition of the index to read")
    index_path: str = Field(
        "data_samples/cc-index/table/cc-main/warc",
        description="cc-index table: folder or URL above crawl=…",
        json_schema_extra=PATH,
    )
    athena_usd_per_tb: float = Field(5.0, description="Athena's price of a TB scanned, us-east-1", ge=0)


class MainText(Stage):
    """Stages that look for the main text of a page."""

    extractor: Literal["auto", "resiliparse", "trafilatura"] = Field(
        "auto",
        description="auto classifies blocks; resiliparse is the fastest, trafilatura the field's usual",
    )


class StartHere(Stage):
    """00: what this machine can do, and the chain in one picture."""

    stage: ClassVar[str] = "00_start_here"
    zone: ClassVar[str] = "reports"


class ExploreIndex(IndexTable, Contact):
    """10: index → selection."""

    stage: ClassVar[str] = "10_explore_index"

    archive_base: str = Field(
        "data_samples",
        description="what warc_filename is relative to: folder, s3://commoncrawl or https://…",
        json_schema_extra=PATH,
    )
    archive_paths: Strings = Field(
        [],
        description="your own files or folders, instead of an index: WARC/WET/ARC, or CSV, TSV, text, JSON Lines",
        json_schema_extra=PATH,
    )
    domains: Strings = Field([], description="registered domains to keep, empty = all")
    languages: Strings = Field([], description="index languages to keep (ISO 639-3), empty = all")
    mimes: Strings = Field(
        ["text/html", "application/xhtml+xml", "text/plain"],
        description="detected MIME types to keep, empty = all",
    )
    statuses: Strings = Field(["200"], description="HTTP statuses to keep, empty = all")
    min_record_kb: float = Field(0.0, description="shorter compressed records are left out", ge=0)
    max_record_mb: float = Field(8.0, description="longer compressed records are left out", gt=0)
    keep_truncated: bool = Field(True, description="keep pages that the crawler cut off (content_truncated)")
    index_files: Strings = Field(
        [],
        description="Parquet files of the index, or lists of them (….paths.gz); empty = all below index_path",
        json_schema_extra=PATH,
    )
    max_scan_gb: float = Field(
        5.0, description="a question that would read more of the index is refused", gt=0
    )
    max_pages: int = Field(0, description="stop after so many pages for a quick trial, 0 = all", ge=0)


class QueryWithAthena(IndexTable):
    """11: the same questions, as Athena SQL."""

    stage: ClassVar[str] = "11_query_with_athena"
    zone: ClassVar[str] = "reports"
    needs: ClassVar[tuple[str, ...]] = ("10_explore_index",)

    athena_database: str = Field("ccindex", description="Athena database to create", pattern=r"^\w+$")
    athena_output: str = Field("s3://your-bucket/athena/", description="where Athena writes its results")
    site: str = Field(
        "reelnotes.example", description="site to find: a domain, a host, or how its URLs begin"
    )


JUDGES = {"judges": True}
"""Marks a field that only judges what was measured: moving it touches no text."""


class Keeping(Stage):
    """What a document must be to be kept: 30 and 31 judge by it, and a prefilter asks in advance."""

    min_words: int = Field(50, description="Gopher: fewest words", ge=0, json_schema_extra=JUDGES)
    keep_languages: Strings = Field(
        [], description="languages to keep (ISO 639-1), empty = all", json_schema_extra=JUDGES
    )

    @classmethod
    def judging(cls) -> frozenset[str]:
        """Names of the parameters that only judge."""
        return frozenset(k for k, f in cls.model_fields.items() if (f.json_schema_extra or {}).get("judges"))


class Extracting(MainText, Keeping):
    """What it takes to turn a page into a document, on a cluster or on arrival."""

    page_timeout_s: float = Field(20.0, description="a page that takes longer is killed, and counted", gt=0)
    page_memory_mb: float = Field(1024.0, description="a page that takes more is killed, and counted", gt=0)
    max_page_mb: float = Field(4.0, description="larger decoded pages are given up, and counted", gt=0)
    keep_links: bool = Field(False, description="keep the links of each page, too (1 ms a page, and room)")
    prefilter: bool = Field(
        False,
        description="drop a page before its main text is looked for where all its text rules it out (min_words, keep_languages)",
    )


class Refining(Keeping):
    """What it takes to tag, mask and judge a document, on a cluster or on arrival."""

    quality_rules: Strings = Field(
        ["gopher_quality", "gopher_repetition"],
        description="rule sets that may drop a document: url, gopher_quality, gopher_repetition, c4, fineweb",
        json_schema_extra=JUDGES,
    )
    tag_rules: Strings = Field(
        ["url", "c4", "fineweb"],
        description="rule sets that are measured, too, but drop nothing",
        json_schema_extra=JUDGES,
    )
    thresholds: Strings = Field(
        [],
        description="other bounds of rules: 'c4: sentences >= 3', 'fineweb: short_lines <= 0.8'",
        json_schema_extra=JUDGES,
    )
    min_lang_score: float = Field(
        0.65, description="least confidence of the language id", ge=0, le=1, json_schema_extra=JUDGES
    )
    max_words: int = Field(100_000, description="Gopher: most words", ge=1, json_schema_extra=JUDGES)
    max_duplicate_lines: float = Field(
        0.3, description="Gopher: share of repeated lines", ge=0, le=1, json_schema_extra=JUDGES
    )
    blocked_urls: str = Field(
        "",
        description="file of domains, hosts or URLs to drop, one a line; empty = none",
        json_schema_extra=PATH,
    )
    c4_lines: bool = Field(
        False, description="keep only the lines that C4 keeps (no menus, no line without a full stop)"
    )
    mask_pii: bool = Field(True, description="replace personal data by placeholders such as <EMAIL>")
    pii_types: Strings = Field(
        ["email", "iban", "card", "ipv6", "ipv4", "phone", "national_id", "address"],
        description="personal data to look for; empty = none",
    )
    features: Strings = Field(
        ["keywords", "entities", "summary", "reading_ease"],
        description="what else to tell of a document (5 ms each); empty = nothing, and nothing is computed",
    )
    entity_models: Strings = Field(
        [],
        description="installed spaCy pipelines to find names with, each for its language; empty = by rules",
    )


class ExtractText(Cores, Extracting, Fetching):
    """20: pages → documents."""

    stage: ClassVar[str] = "20_extract_text"
    needs: ClassVar[tuple[str, ...]] = ("10_explore_index",)

    text_column: str = Field("", description="column of your own files with the text, empty = by its name")
    rating_column: str = Field("", description="column with the rating, empty = by its name")

    def identity(self) -> dict[str, Any]:
        """Without a prefilter its thresholds decide nothing here, and moving them must not read a page again."""
        unused = frozenset() if self.prefilter else self.judging()
        return {k: v for k, v in super().identity().items() if k not in unused}


class WriteYourOwnJob(Cores, Fetching):
    """21: one function of a record, over archives."""

    stage: ClassVar[str] = "21_write_your_own_job"
    needs: ClassVar[tuple[str, ...]] = ("10_explore_index",)

    job: str = Field(
        "notebooks/jobs/server_header.py",
        description="Python file with one function `record`",
        json_schema_extra=PATH,
    )
    max_records: int = Field(0, description="stop after so many records for a quick trial, 0 = all", ge=0)


class RefineText(Cores, Refining):
    """30: documents with tags, masks and a verdict."""

    stage: ClassVar[str] = "30_refine_text"
    needs: ClassVar[tuple[str, ...]] = ("20_extract_text",)


class RefineOnArrival(Extracting, Refining):
    """31: a file that lands in the drop zone is refined at once."""

    stage: ClassVar[str] = "31_refine_on_arrival"

    arrivals: Strings = Field(
        ["data_samples/crawl-data"],
        description="archives whose pages the notebook drops into the raw zone, a file each",
        json_schema_extra=PATH,
    )
    max_arrivals: int = Field(24, description="pages that the notebook drops, at most", ge=1)
    workers: int = Field(0, description="files refined at the same time, 0 = all this machine's cores", ge=0)
    max_file_mb: float = Field(256.0, description="a larger file is for the batch chain: quarantined", gt=0)
    file_timeout_s: float = Field(300.0, description="time for one file, then its other pages are lost", gt=0)

    def identity(self) -> dict[str, Any]:
        """How many files at a time decides nothing about any of them."""
        return {k: v for k, v in super().identity().items() if k not in {"workers"}}


class Deduplicate(Cores):
    """40: clusters of copies, one kept."""

    stage: ClassVar[str] = "40_deduplicate"
    needs: ClassVar[tuple[str, ...]] = ("30_refine_text",)

    exact: Strings = Field(
        ["url", "payload", "text"], description="what makes two documents the same: url, payload, text"
    )
    ngram: int = Field(5, description="words per shingle", ge=1)
    buckets: int = Field(14, description="LSH bands", ge=1)
    hashes_per_bucket: int = Field(8, description="rows per LSH band", ge=1)
    min_jaccard: float = Field(0.7, description="true Jaccard from which two texts are copies", gt=0, le=1)
    survivor: Literal["richest", "longest", "earliest", "latest"] = Field(
        "richest",
        description="which copy stays: most marked-up reviews and longest, longest, first or last fetched",
    )
    boilerplate_pages: int = Field(
        4, description="a line on so many pages of a host may be boilerplate, 0 = look for none", ge=0
    )
    boilerplate_share: float = Field(
        0.3, description="and it is if it is on this share of the host's pages", gt=0, le=1
    )
