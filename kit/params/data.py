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


class BuildDatasets(Stage):
    """50: documents → training rows."""

    stage: ClassVar[str] = "50_build_datasets"
    zone: ClassVar[str] = "curated"
    needs: ClassVar[tuple[str, ...]] = ("30_refine_text", "40_deduplicate")

    train_languages: Strings = Field(["en"], description="languages of training rows, empty = all")
    prefer_reviews: bool = Field(
        True, description="train on reviews where the crawl has them, on whole documents where it has none"
    )
    item_types: Strings = Field(["Movie"], description="schema.org types of reviewed things, empty = all")
    prompt_template: str = Field(
        "The review of movie '{item}' is", description="what comes before a review; {item} = its subject"
    )
    drop_boilerplate: bool = Field(True, description="leave lines that a site repeats out of whole documents")
    formats: Strings = Field(
        ["text", "instruction", "chat", "sentiment"],
        description="JSON Lines to write beside Parquet: text, instruction, chat, sentiment",
    )
    instruction_files: Strings = Field(
        [],
        description="JSON Lines of instruction, context or input, response or output: rows of their own",
        json_schema_extra=PATH,
    )
    preference_files: Strings = Field(
        [],
        description="JSON Lines of prompt, chosen, rejected, such as votes of 90: pairs of their own",
        json_schema_extra=PATH,
    )
    shard_mb: float = Field(64.0, description="size of one shard of the output, uncompressed", gt=0)
    heldout_share: float = Field(0.15, description="share of groups kept for evaluation", gt=0, lt=1)
    min_votes: int = Field(5, description="fewest votes of a review in a preference pair", ge=1)
    min_helpful_gap: float = Field(0.3, description="least difference in helpful share of a pair", ge=0, le=1)


class AugmentText(Cores):
    """51: more training rows out of few."""

    stage: ClassVar[str] = "51_augment_text"
    zone: ClassVar[str] = "curated"
    needs: ClassVar[tuple[str, ...]] = ("50_build_datasets",)

    operations: Strings = Field(
        ["synonym_replacement", "synonym_insertion", "word_swap", "word_deletion"],
        description="EDA operations to apply, each to its own copies",
    )
    changed_share: float = Field(
        0.1, description="share of a row's words that an operation changes", gt=0, le=1
    )
    copies: int = Field(1, description="augmented copies of a row for each operation", ge=1)


class BalanceTokenization(Cores):
    """52: tokenising with even partitions, then packing into rows of one length."""

    stage: ClassVar[str] = "52_balance_tokenization"
    zone: ClassVar[str] = "curated"
    needs: ClassVar[tuple[str, ...]] = ("50_build_datasets",)

    tokenizer: str = Field("smollm2", description="smollm2 (shipped), a hub id or a local folder")
    partitions: int = Field(64, description="partitions to spread the tokenising load over", ge=1)
    balance: Literal["huffman", "longest_first", "round_robin", "hash"] = Field(
        "huffman", description="how documents are put into partitions"
    )
    packed_tokens: int = Field(1024, description="length of a packed row, in tokens", ge=8)


class BenchmarkData(Cores, MainText):
    """81: what the data half does per core, side by side with its peers, and what a whole crawl would take."""

    stage: ClassVar[str] = "81_benchmark_data"
    zone: ClassVar[str] = "reports"
    needs: ClassVar[tuple[str, ...]] = ("10_explore_index",)

    benchmark_archive: str = Field(
        "", description="WARC of real pages to measure on; empty = the sample crawl", json_schema_extra=PATH
    )
    gold: str = Field("", description="JSONL with the gold texts of those pages", json_schema_extra=PATH)
    benchmark_pages: int = Field(100, description="pages to measure on, at most", ge=1)
    benchmark_rounds: int = Field(
        2, description="how often each row is measured, in alternating order; the median counts", ge=1
    )
    spark_archive: str = Field(
        "",
        description="larger archive to hold Spark against a plain loop on; empty = on the same pages",
        json_schema_extra=PATH,
    )
    spark_pages: int = Field(20_000, description="pages of spark_archive, at most", ge=20)
    count_index: str = Field(
        "data_samples/cc-index/table/cc-main/warc/crawl=CC-SAMPLE-2026-05",
        description="folder of Parquet files of an index, to count pages by language in",
        json_schema_extra=PATH,
    )
    peers_venv: str = Field(
        ".cache/peers",
        description="virtual environment with the extra 'peers' (it cannot share the kit's own)",
        json_schema_extra=PATH,
    )
    crawl_pages: int = Field(
        2_616_796_857, description="pages of a whole crawl; the default is CC-MAIN-2025-43", ge=1
    )
    crawl_tb: float = Field(107.5, description="its compressed WARC files, TB (97.73 TiB)", gt=0)
    within_days: float = Field(7.0, description="time in which it is to be done", gt=0)
    usd_per_vcpu_hour: float = Field(0.052624, description="EMR Serverless, x86, us-east-1", ge=0)
    usd_per_gb_hour: float = Field(0.0057785, description="EMR Serverless memory, x86, us-east-1", ge=0)
    memory_gb_per_core: float = Field(4.0, description="memory of a worker for each of its cores", gt=0)
