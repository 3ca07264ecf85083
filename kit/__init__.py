"""From Common Crawl to a fine-tuned language model: the helper package under the notebooks.

Floors, lowest first; an upper floor may call a lower one, never the other way round:
`params`, `lake`, `reference`, `cost`, `process` → `show` → `data/` and `train/` (never each other) → `measure/`, `launch/`.
`pipeline` runs notebooks and imports no stage; `doctor`, `cli` and `refresh` stand on top and talk to people.
"""

from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: relative paths in recipes and notebooks start here."""


class KitError(Exception):
    """A problem the user can act on: one clear line instead of a traceback.

    `exit_status` is what the `kit` command ends with: 1 a stage failed, 2 wrong words or parameters.
    """

    exit_status = 1

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in a notebook: the line, not the stack (IPython's own hook name)."""
        return [f"{type(self).__name__}: {self}"]


def resolve(path: str) -> str:
    """Absolute form of a local `path` (relative ones start at the checkout); URLs pass unchanged."""
    return path if "://" in path else str((ROOT / Path(path).expanduser()).resolve())
