"""Comparing what people write."""

import unicodedata


def fold(text: str) -> str:
    """`text` for comparing: compatibility forms joined, case folded, runs of space made one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
