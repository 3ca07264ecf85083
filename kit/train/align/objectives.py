"""Ways to learn from preferences, as one table: TRL's trainer, its settings, and the loss that it must begin with.

Where policy = reference, the loss before the first update follows from the formula alone. It is checked, so nobody has to
wonder what the reference is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from kit.errors import ModelError
from kit.train.loop.meter import Metered

TOLERANCE = 1e-3
"""Of the first loss, in bfloat16 too: an adapter that is zero adds exact zeros (measured: 2e-9)."""


def check_first_loss(loss: float, expected: float = math.log(2)) -> None:
    """Raise `ModelError` unless the loss before the first update is what policy = reference gives (DPO: ln 2)."""
    if not abs(loss - expected) < TOLERANCE * max(1.0, expected):
        raise ModelError(
            f"the first preference loss is {loss:.4f}, not {expected:.4f}: the reference is not the model that "
            "training starts from"
        )


class _Checked(Metered):
    """A trainer whose first loss must be the one that follows from policy = reference."""

    first_loss: float | None = None

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; the first is checked."""
        result = super().compute_loss(model, *args, **kwargs)
        if self.model.training and self.state.global_step == 0 and self.first_loss is not None:
            check_first_loss(
                float((result[0] if isinstance(result, tuple) else result).detach()), self.first_loss
            )
        return result


class PreferenceTrainer(_Checked, DPOTrainer):
    """TRL's trainer for pairs, metered."""


class JudgementTrainer(_Checked, KTOTrainer):
    """TRL's trainer for single texts, good or bad, metered."""


class OddsTrainer(_Checked, ORPOTrainer):
    """TRL's trainer without a reference, metered."""


@dataclass(frozen=True)
class Objective:
    """A way to learn from preferences: TRL's trainer and settings; the loss at step 0 as a function of β."""

    trainer: type
    config: type
    about: str
    settings: Mapping[str, Any]
    first_loss: Callable[[float], float] | None = None
    paired: bool = True


OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(
        PreferenceTrainer,
        DPOConfig,
        "−log σ(β · margin) (Rafailov et al. 2023, equation 7)",
        {"loss_type": ["sigmoid"]},
        lambda beta: math.log(2),
    ),
    "ipo": Objective(
        PreferenceTrainer,
        DPOConfig,
        "(margin − 1/2β)², which does not run away on clear pairs (Azar et al. 2023)",
        {"loss_type": ["ipo"]},
        lambda beta: 1 / (4 * beta * beta),
    ),
    "kto": Objective(
        JudgementTrainer,
        KTOConfig,
        "each text against the mean, losses weigh more than gains (Ethayarajh et al. 2024)",
        {},
        lambda beta: 0.5,
        paired=False,
    ),
    "orpo": Objective(
        OddsTrainer,
        ORPOConfig,
        "likelihood of the better plus the odds between the two, no reference (Hong et al. 2024)",
        {},
    ),
}
