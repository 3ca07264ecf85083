"""From Common Crawl to a fine-tuned language model: the helper package under the notebooks.

Floors, lowest first; an upper floor may call a lower one, never the other way round:
`errors` → `params` → `lake` → `process`, `progress`, `show`, `estimate` → `data/` and `train/` (never each other) →
`measure/`, `launch/` → `pipeline`, `report`, `doctor`, `maintain/` → `cli`. In `data/`: `engine`, `text` → `read` → a
folder a stage → `job`, `trace`. In `train/`: `models` → `encode` → `plan` → `loop` → a folder a stage. A stage's folder
imports no other stage's, except its `schema`. `pipeline` runs notebooks and imports no stage, `report` tells of what it
ran. `tests/test_floors.py` holds it.
"""

from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: relative paths in recipes and notebooks start here."""


def resolve_path(path: str) -> str:
    """Absolute form of a local `path` (relative ones start at the checkout); URLs pass unchanged."""
    return path if "://" in path else str((ROOT / Path(path).expanduser()).resolve())
