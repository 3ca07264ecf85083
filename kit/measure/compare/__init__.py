"""Compare what models write (90)."""
