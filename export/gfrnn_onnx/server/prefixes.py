"""States of prompts that have been read, found again by how a new prompt begins."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict

import numpy as np
import numpy.typing as npt

Parts = tuple[npt.NDArray[np.float32], ...]
"""A row's state: h, for the LSTM also c, [layers, hidden]."""


class Prefixes:
    """States by the symbols before them, the longest unused thrown out first. For one thread.

    most_bytes: of all states together; 0 keeps none.
    """

    def __init__(self, most_bytes: int):
        self.most_bytes, self.bytes = most_bytes, 0
        self._states: OrderedDict[bytes, tuple[int, Parts]] = OrderedDict()  # by digest: (symbols, state)
        self._lengths: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._states)

    def keep(self, symbols: bytes, parts: Parts) -> None:
        """Keeps the state after these symbols."""
        size = sum(part.nbytes for part in parts)
        if size > self.most_bytes:
            return
        key = hashlib.blake2b(symbols, digest_size=16).digest()
        if key in self._states:
            self._states.move_to_end(key)
            return
        while self.bytes + size > self.most_bytes:
            _, (length, old) = self._states.popitem(last=False)
            self.bytes -= sum(part.nbytes for part in old)
            self._lengths -= Counter([length])  # also drops what is 0
        self._states[key] = (len(symbols), parts)
        self._lengths[len(symbols)] += 1
        self.bytes += size

    def longest(self, symbols: bytes) -> tuple[int, Parts | None]:
        """(how many of the first symbols a state is known of, that state); (0, None) if none is."""
        digest, position, found = hashlib.blake2b(digest_size=16), 0, None
        for length in sorted(self._lengths):
            if length > len(symbols):
                break
            digest.update(symbols[position:length])
            position = length
            key = digest.copy().digest()
            if key in self._states:
                found = key
        if found is None:
            return 0, None
        self._states.move_to_end(found)
        return self._states[found]


def common_length(a: bytes, b: bytes) -> int:
    """How many bytes two texts have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # a comparison of slices is one of memory
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
