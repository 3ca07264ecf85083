"""Parameters of training on preferences: 70–72."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kit.params.fit import Fit
from kit.params.stage import PATH, Strings
from kit.params.train import Scoring, Training, Tuning


class AlignDpo(Tuning):
    """70: adapter → aligned."""

    stage: ClassVar[str] = "70_align_dpo"
    needs: ClassVar[tuple[str, ...]] = ("50_build_datasets", "60_finetune_sft")

    preference_loss: Literal["dpo", "ipo", "kto", "orpo"] = Field(
        "dpo",
        description="dpo and ipo compare with a reference, kto judges texts one by one, orpo needs none",
    )
    preferences_from: Literal["50_build_datasets", "72_constitutional_feedback"] = Field(
        "50_build_datasets", description="stage whose preference pairs are used"
    )
    dpo_beta: float = Field(0.1, description="how strongly the reference holds the policy", gt=0)
    dpo_steps: int = Field(4, description="optimizer steps", ge=1)
    dpo_batch_size: int = Field(2, description="pairs per forward and backward pass", ge=1)
    dpo_learning_rate: float = Field(
        0.0, description="peak learning rate, 0 = a fifth of the method's own", ge=0
    )
    sweep_betas: Strings = Field(
        ["1.0"], description="other values of dpo_beta to train beside it, for a figure"
    )

    def reads(self) -> tuple[str, ...]:
        """`needs`, and where the pairs come from."""
        return tuple(dict.fromkeys((*self.needs, self.preferences_from)))

    def fits(self) -> tuple[Fit]:
        """The policy; a row is a pair of texts."""
        return (
            Fit(
                "policy",
                rows=self.dpo_batch_size,
                steps=self.dpo_steps,
                batch_field="dpo_batch_size",
                tokens=self.max_tokens,
                learning_rate=self.dpo_learning_rate,
                texts=2,
                accumulation=self.gradient_accumulation,
                reference=self.preference_loss != "orpo",
            ),
        )


class RewardAndPolicy(Tuning, Scoring):
    """71: a reward model from comparisons, and a policy optimised against it."""

    stage: ClassVar[str] = "71_reward_and_policy"
    needs: ClassVar[tuple[str, ...]] = ("50_build_datasets", "60_finetune_sft")

    reward_steps: int = Field(24, description="optimizer steps of the reward model", ge=1)
    reward_batch_size: int = Field(2, description="pairs per step", ge=1)
    reward_tokens: int = Field(
        64, description="what the reward model reads of a text, prompt included, in tokens", ge=8
    )
    reward_learning_rate: float = Field(1e-3, description="peak learning rate", gt=0)
    policy_objective: Literal["rloo", "grpo"] = Field("grpo", description="how rewards become advantages")
    policy_steps: int = Field(4, description="optimizer steps of the policy", ge=1)
    policy_prompts: int = Field(2, description="prompts per step", ge=1)
    policy_generations: int = Field(4, description="answers to each prompt, compared with each other", ge=2)
    policy_iterations: int = Field(1, description="updates on each batch of answers", ge=1)
    policy_learning_rate: float = Field(1e-3, description="peak learning rate", gt=0)
    policy_clip: float = Field(0.2, description="how far the ratio of new to old probability counts", gt=0)
    policy_kl_beta: float = Field(0.05, description="price of moving away from the reference", ge=0)
    policy_tokens: int = Field(24, description="length of an answer", ge=1)
    reward_eval_pairs: int = Field(
        32, description="held-out pairs that score the reward model, at most", ge=1
    )

    def fits(self) -> tuple[Fit, Fit]:
        """The reward model, a row of which is a pair; and the policy, a row of which is the answers to one prompt."""
        reward = Fit(
            "reward",
            rows=self.reward_batch_size,
            steps=self.reward_steps,
            batch_field="reward_batch_size",
            tokens=self.reward_tokens,
            learning_rate=self.reward_learning_rate,
            tokens_field="reward_tokens",
            texts=2,
            accumulation=self.gradient_accumulation,
        )
        policy = Fit(
            "policy",
            rows=self.policy_prompts,
            steps=self.policy_steps,
            batch_field="policy_prompts",
            tokens=self.reward_tokens,  # a prompt leaves room there for its answer
            learning_rate=self.policy_learning_rate,
            tokens_field="reward_tokens",
            texts=self.policy_generations,
            accumulation=self.gradient_accumulation,
            reference=self.policy_kl_beta > 0,
            judged=True,
            written=self.policy_tokens,
        )
        return reward, policy


class ConstitutionalFeedback(Training):
    """72: principles → critique → revision → preference pairs."""

    stage: ClassVar[str] = "72_constitutional_feedback"
    needs: ClassVar[tuple[str, ...]] = ("50_build_datasets",)

    principles_file: str = Field(
        "data_samples/principles.yaml", description="the principles, a list in YAML", json_schema_extra=PATH
    )
    feedback_prompts: int = Field(8, description="prompts of the training rows that are answered", ge=1)
    feedback_principles: int = Field(
        3, description="principles under which each answer is revised, all used alike", ge=1
    )
    endpoint: str = Field("", description="OpenAI-compatible URL, …/v1; empty = base_model in this process")
    endpoint_model: str = Field("", description="model to ask for there")
    endpoint_key_from: str = Field("OPENAI_API_KEY", description="environment variable that holds the key")
    endpoint_timeout_s: float = Field(60.0, description="longest wait for one answer of the endpoint", gt=0)
    feedback_tokens: int = Field(40, description="length of an answer", ge=1)
    feedback_temperature: float = Field(
        0.7, description="of first answers; critique and judgement are greedy", ge=0
    )
