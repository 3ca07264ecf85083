"""From training rows to models: loading, fine-tuning, preference alignment, and what it costs in FLOPs.

Stands on `kit.params`, `kit.lake`, `kit.estimate` and `kit.show`; imports nothing of `kit.data`, no Spark, no
DuckDB.
"""

import logging
import os
import warnings

# OpenMP threads that spin while they wait make training ten times slower as soon as anything else runs on the
# same cores (measured on two cores: 22 instead of 227 tokens/s). Read when torch is loaded, so set before it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Said by libraries about each other, on every import or load; nothing a reader of a notebook can act on:
# bitsandbytes misses an optional package, peft and trl still use transformers' older name of a setting.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated", category=FutureWarning)
