"""Parameters of measuring what was trained: 80 and 90."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kit.params.stage import Strings
from kit.params.train import Scoring, Training


class BenchmarkTraining(Training):
    """80: speed, MFU and memory of the run just made."""

    stage: ClassVar[str] = "80_benchmark_training"
    zone: ClassVar[str] = "reports"
    needs: ClassVar[tuple[str, ...]] = ("60_finetune_sft", "70_align_dpo")

    peak_matmul: int = Field(2048, description="edge of the matmul that measures this machine's peak", ge=64)
    grid: Strings = Field(
        [
            "kit",
            "packing=false",
            "activation_checkpointing=true",
            "attention=eager",
            "max_tokens=32 sft_batch_size=1",
            "stock",
        ],
        description="cells: words name=value of 60 or kit.train.plan.settings, a|b for each of them, kit, stock (TRL's own)",
    )
    grid_layers: int = Field(
        4, description="the first layers of base_model that the grid trains, 0 = all", ge=0
    )
    grid_batch_size: int = Field(2, description="rows of a pass, where a cell says nothing else", ge=0)
    grid_warmup: int = Field(1, description="first steps of a cell that are left out", ge=0)
    grid_steps: int = Field(3, description="steps of a cell that are measured", ge=1)


class CompareGenerations(Training, Scoring):
    """90: base | tuned | aligned, side by side."""

    stage: ClassVar[str] = "90_compare_generations"
    zone: ClassVar[str] = "reports"
    needs: ClassVar[tuple[str, ...]] = ("50_build_datasets", "60_finetune_sft", "70_align_dpo")

    prompts: Strings = Field(
        [
            "The review of movie 'A Woman of Paris: A Drama of Fate' is",
            "The review of movie 'The Last Lighthouse Keeper' is",
            "The review of movie 'Robots on Holiday' is",
            "The review of movie 'Midnight in the Archive' is",
        ],
        description="what the three models complete",
    )
    max_new_tokens: int = Field(56, description="length of a completion", ge=1)
    temperature: float = Field(0.3, description="0 = greedy", ge=0)
