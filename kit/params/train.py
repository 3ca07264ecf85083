"""Parameters of the training half: 60–74, 80 and 90."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from pydantic import Field

from kit.params.fit import Fit
from kit.params.stage import Stage, Strings

Method = Literal["full", "lora", "qlora", "dora", "prompt", "ptuning", "prefix"]
METHODS = get_args(Method)
"""Ways to tune a model; `kit.train.models.methods` says what each of them is."""
Quantization = Literal["auto", "none", "int8", "nf4", "nf4_double"]
DType = Literal["auto", "float32", "bfloat16"]
PASS_TOKENS = 16_384
"""Tokens of one forward and backward pass that keep a GPU's matrix units busy; more need memory and gain nothing."""


class Computing(Stage):
    """What every stage takes that computes with a model: in which type, on how much of a text."""

    dtype: DType = Field("auto", description="auto: bfloat16 where it is fast")
    max_tokens: int = Field(256, description="longest row, prompt included, in tokens", ge=8)


class Accumulating(Stage):
    """Stages whose optimizer steps may be made of several passes."""

    gradient_accumulation: int = Field(
        1, description="forward and backward passes per step; a step's batch is this times as large", ge=1
    )


class Scoring(Stage):
    """Stages that measure perplexity on held-out rows."""

    eval_rows: int = Field(12, description="held-out rows for perplexity", ge=1)


class Training(Computing):
    """What every stage that runs a model takes."""

    zone: ClassVar[str] = "models"

    base_model: str = Field(
        "smollm2", description="smollm2 (shipped), a hub id, a local folder or a GGUF file"
    )
    trust_remote_code: bool = Field(
        False, description="run code that a model brings along; yes only for authors you trust"
    )
    threads: int = Field(
        0, description="CPU threads, 0 = OMP_NUM_THREADS or all; results are exact for a given number", ge=0
    )


class Adapting(Training):
    """The sizes of what a method adds to a model."""

    lora_r: int = Field(16, description="rank of a LoRA, QLoRA or DoRA adapter", ge=1)
    lora_alpha: int = Field(32, description="its scale", ge=1)
    virtual_tokens: int = Field(16, description="length of a learned prompt or prefix, in tokens", ge=1)


class Tuning(Adapting, Accumulating):
    """What every stage takes that trains a model, or an adapter of one, by a method of choice."""

    method: Method = Field("lora", description="what is trained")
    quantization: Quantization = Field(
        "auto", description="of the frozen base; auto: nf4_double for qlora, else none"
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw: fused; adamw_8bit keeps its state in a quarter of the memory"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="kernel; auto: flash_attention_2 where it is installed and runs, else sdpa"
    )
    compile_model: Literal["auto", "on", "off"] = Field(
        "auto", description="compile the layers; auto: on a GPU, in a run of 100 steps or more"
    )
    activation_checkpointing: bool = Field(
        False, description="compute activations a second time instead of keeping them"
    )


class FinetuneSft(Tuning, Scoring):
    """60: base → adapter."""

    stage: ClassVar[str] = "60_finetune_sft"
    needs: ClassVar[tuple[str, ...]] = ("50_build_datasets",)

    task: Literal["completion", "text", "instruction", "chat"] = Field(
        "completion",
        description="completion: the answer counts; text: all of it; instruction: ###; chat: template",
    )
    packing: bool = Field(True, description="fill every row to max_tokens with whole documents, no padding")
    sft_steps: int = Field(8, description="optimizer steps", ge=1)
    sft_batch_size: int = Field(
        4, description="rows per forward and backward pass, 0 = as many as the memory takes", ge=0
    )
    sft_learning_rate: float = Field(0.0, description="peak learning rate, 0 = the method's own", ge=0)
    checkpoint_steps: int = Field(
        0, description="steps between checkpoints; a run that is killed goes on from its last; 0 = none", ge=0
    )

    def fits(self) -> tuple[Fit]:
        """The adapter, or all weights."""
        return (
            Fit(
                "sft",
                rows=self.sft_batch_size or max(1, PASS_TOKENS // self.max_tokens),
                steps=self.sft_steps,
                batch_field="sft_batch_size",
                tokens=self.max_tokens,
                learning_rate=self.sft_learning_rate,
                accumulation=self.gradient_accumulation,
                fill_memory=not self.sft_batch_size,
                checkpoint_steps=self.checkpoint_steps,
            ),
        )


class ComparePeft(Adapting):
    """61: every way to tune, on the same rows with the same budget."""

    stage: ClassVar[str] = "61_compare_peft_methods"
    zone: ClassVar[str] = "reports"
    needs: ClassVar[tuple[str, ...]] = ("50_build_datasets",)

    methods: Strings = Field(list(METHODS), description="what is compared")
    compare_packing: bool = Field(
        False, description="packing for all; learned prompts cannot have it, so they would see other rows"
    )
    compare_steps: int = Field(3, description="optimizer steps of each", ge=1)
    compare_batch_size: int = Field(2, description="rows of each step", ge=1)
    compare_eval_rows: int = Field(4, description="held-out rows for the loss", ge=1)


class ContinuePretraining(Training, Scoring):
    """62: a small model from scratch, and the shipped one trained further on the curated text."""

    stage: ClassVar[str] = "62_continue_pretraining"
    needs: ClassVar[tuple[str, ...]] = ("30_refine_text", "40_deduplicate", "50_build_datasets")

    pretrain_vocab: int = Field(2048, description="entries of the new tokenizer", ge=300)
    pretrain_hidden: int = Field(128, description="width of the new model", ge=32, multiple_of=32)
    pretrain_layers: int = Field(4, description="its layers", ge=1)
    pretrain_steps: int = Field(200, description="optimizer steps from scratch", ge=1)
    pretrain_batch_size: int = Field(2, description="packed rows per step", ge=1)
    pretrain_learning_rate: float = Field(4e-3, description="peak learning rate", gt=0)
    continue_steps: int = Field(10, description="optimizer steps of the continued model", ge=1)
    continue_batch_size: int = Field(2, description="packed rows per step", ge=1)
    continue_learning_rate: float = Field(8e-4, description="peak learning rate", gt=0)
    replay_share: float = Field(
        0.0,
        description="share of general text among the rows it goes on with, against forgetting",
        ge=0,
        lt=1,
    )
    general_heldout_share: float = Field(
        0.5, description="share of the sites of general text kept to measure forgetting on", gt=0, le=1
    )

    def fits(self) -> tuple[Fit, Fit]:
        """The model from scratch, and the one that goes on from `base_model`."""
        scratch = Fit(
            "scratch",
            rows=self.pretrain_batch_size,
            steps=self.pretrain_steps,
            batch_field="pretrain_batch_size",
            tokens=self.max_tokens,
            learning_rate=self.pretrain_learning_rate,
        )
        continued = Fit(
            "model",
            rows=self.continue_batch_size,
            steps=self.continue_steps,
            batch_field="continue_batch_size",
            tokens=self.max_tokens,
            learning_rate=self.continue_learning_rate,
        )
        return scratch, continued


class ClassifySentiment(Computing, Accumulating):
    """63: a review's label, trained under four kinds of parallelism."""

    stage: ClassVar[str] = "63_classify_sentiment"
    zone: ClassVar[str] = "models"
    needs: ClassVar[tuple[str, ...]] = ("50_build_datasets",)

    encoder: str = Field("minilm", description="minilm (shipped), a hub id or a local folder of a BERT")
    strategies: Strings = Field(
        ["ddp", "fsdp", "pipeline", "tensor", "tensor_data"],
        description="ways to share the work, beside one process",
    )
    ranks: int = Field(2, description="processes of each way, on a GPU each where there are any", ge=1)
    tensor_ranks: int = Field(2, description="tensor_data: processes that share every layer", ge=1)
    data_ranks: int = Field(2, description="tensor_data: groups of them, each with rows of its own", ge=1)
    rank_threads: int = Field(1, description="CPU threads of each process", ge=1)
    rank_timeout_s: float = Field(300.0, description="longest wait for another process", gt=0)
    classify_steps: int = Field(12, description="optimizer steps of each way", ge=1)
    classify_batch_size: int = Field(16, description="rows of a pass, over all processes", ge=1)
    classify_learning_rate: float = Field(2e-4, description="peak learning rate", gt=0)
    check_steps: int = Field(2, description="steps in float32 beforehand, whose losses are compared", ge=1)

    def fits(self) -> tuple[Fit]:
        """The classifier; every way of sharing the work trains the same one."""
        return (
            Fit(
                "classifier",
                rows=self.classify_batch_size,
                steps=self.classify_steps,
                batch_field="classify_batch_size",
                tokens=self.max_tokens,
                learning_rate=self.classify_learning_rate,
                accumulation=self.gradient_accumulation,
            ),
        )


class Distill(Training, Scoring):
    """73: a smaller student learns from a tuned teacher's distribution."""

    stage: ClassVar[str] = "73_distill"
    needs: ClassVar[tuple[str, ...]] = ("50_build_datasets", "60_finetune_sft")

    teacher: str = Field("tuned", description="tuned (60's model), base, a hub id or a local folder")
    student: str = Field(
        "", description="hub id or local folder; empty = the teacher's own layers, thinned out"
    )
    student_layers: int = Field(20, description="layers kept of the teacher, when student is empty", ge=1)
    distill_steps: int = Field(5, description="optimizer steps of each student", ge=1)
    distill_batch_size: int = Field(3, description="rows per step", ge=1)
    distill_learning_rate: float = Field(5e-4, description="peak learning rate", gt=0)
    distill_temperature: float = Field(1.0, description="softens both distributions", gt=0)
    distill_alpha: float = Field(
        0.9, description="share of the teacher in the loss; the rest is the text", ge=0, le=1
    )
    on_policy_share: float = Field(
        0.4, description="share of steps, the last ones, on texts that the student wrote itself", ge=0, le=1
    )
    on_policy_beta: float = Field(
        1.0,
        description="divergence there: 0 KL(teacher, student), 1 the reverse, else Jensen-Shannon",
        ge=0,
        le=1,
    )
    distill_tokens: int = Field(32, description="length of a text the student writes", ge=1)

    def fits(self) -> tuple[Fit]:
        """The student; those that learn in other ways differ in what they see, not in how much."""
        return (
            Fit(
                "student",
                rows=self.distill_batch_size,
                steps=self.distill_steps,
                batch_field="distill_batch_size",
                tokens=self.max_tokens,
                learning_rate=self.distill_learning_rate,
            ),
        )


class MergeAndExport(Training):
    """74: adapter into base, sharded, reloaded, compared, served."""

    stage: ClassVar[str] = "74_merge_and_export"
    needs: ClassVar[tuple[str, ...]] = ("50_build_datasets", "60_finetune_sft")

    export_from: Literal["60_finetune_sft", "70_align_dpo"] = Field(
        "60_finetune_sft", description="last stage whose weights are merged"
    )
    export_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="type of the saved weights"
    )
    export_shard_mb: int = Field(100, description="largest file, MB", ge=1)
    serve: bool = Field(True, description="serve the result once and ask it, as a client would")
    export_tokens: int = Field(24, description="length of the answers that are compared", ge=1)
    export_rows: int = Field(4, description="held-out rows whose answers are compared with the truth", ge=1)

    def reads(self) -> tuple[str, ...]:
        """`needs`, and the last stage whose weights are merged."""
        return tuple(dict.fromkeys((*self.needs, self.export_from)))
