"""Parameters of what is made of documents, 50–52, and of 81, which measures the data half."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kit.params.data import Cores, MainText
from kit.params.stage import PATH, Stage, Strings


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
