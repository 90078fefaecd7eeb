"""Bytes as text: whole characters only, and tokens' names.

A token is a byte. In text, bytes that are no UTF-8 show as U+FFFD, as everywhere on the web.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence


def name(symbol: int) -> str:
    """A byte's name among tokens: its character, or (of bytes that are part of one) bytes:\\xNN."""
    return chr(symbol) if symbol < 128 else f"bytes:\\x{symbol:02x}"


def decode(text: bytes) -> str:
    """Bytes as characters."""
    return text.decode("utf-8", errors="replace")


class Characters:
    """Text as it comes: `add` bytes, and get the characters that are whole."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, text: bytes, *, final: bool = False) -> str:
        """Characters that are complete; final: what is left of one, too."""
        return self._decoder.decode(text, final)

    @property
    def unfinished(self) -> int:
        """Bytes of a character that is not whole yet."""
        return len(self._decoder.getstate()[0])


def offsets(symbols: Iterable[int]) -> list[int]:
    """Of each byte, the number of characters before the one that it is part of."""
    characters = Characters()
    found, count = [], 0
    for symbol in symbols:
        count += len(characters.add(bytes([symbol])))
        found.append(count if characters.unfinished else count - 1)
    return found


def held_back(text: bytes | bytearray, stops: Sequence[bytes]) -> int:
    """How many of the last bytes may be the beginning of a stop, or all of one, and must not be shown yet."""
    longest = 0
    for stop in stops:
        tail = bytes(text[-len(stop) :])
        begin = tail.find(stop[:1])
        while begin >= 0 and not stop.startswith(tail[begin:]):
            begin = tail.find(stop[:1], begin + 1)
        if begin >= 0:
            longest = max(longest, len(tail) - begin)
    return longest
