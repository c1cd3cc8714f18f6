"""Text as a bag of hashed n-grams: no vocabulary, any language, the same on every machine."""

from __future__ import annotations

import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt


def hash_ngrams(texts: Sequence[str], buckets: int = 1024) -> npt.NDArray[np.float32]:
    """Signed hashed bag of words and character n-grams, float32 [len(texts), buckets].

    An n-gram adds +-sqrt(count) to the bucket that its CRC-32 names; the sign is another bit of the hash, which
    makes the bag zero on average and its inner products unbiased (Weinberger et al. 2009, "Feature hashing for
    large scale multitask learning", eq. 1). Each row has length sqrt(buckets), so that a value's mean square
    is 1; a text without any n-gram is a row of zeros.

    Args:
        texts: Texts in any language; case and compatibility forms are folded.
        buckets: Width of the bag.
    """
    out = np.zeros((len(texts), buckets), dtype=np.float64)
    for row, text in zip(out, texts, strict=True):
        for gram, count in Counter(ngrams(text)).items():
            code = zlib.crc32(gram.encode())
            row[(code >> 1) % buckets] += (1.0 if code & 1 else -1.0) * count**0.5
    norm = np.sqrt((out**2).sum(axis=1, keepdims=True))
    scaled: npt.NDArray[np.float32] = (out * (buckets**0.5 / np.where(norm > 0, norm, 1.0))).astype(np.float32)
    return scaled


def ngrams(text: str) -> Iterator[str]:
    """Words, their character trigrams with word ends marked, and single letters of caseless scripts (CJK, Hangul)."""
    for word in _words(text):
        yield word
        marked = f"<{word}>"
        yield from (marked[start : start + 3] for start in range(len(marked) - 2))
        if len(word) > 1:
            yield from (char for char in word if unicodedata.category(char) == "Lo")


def _words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char if char.isalnum() or unicodedata.combining(char) else " " for char in folded).split()
