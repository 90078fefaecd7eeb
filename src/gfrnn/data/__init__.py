"""Corpora and how they become batches. Importing this loads neither torch nor datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gfrnn.data.corpus import NEWLINE, Bytes, Text, load_text, read_bytes, segments_per_epoch

if TYPE_CHECKING:
    from gfrnn.data.streams import Streams

__all__ = ["NEWLINE", "Bytes", "Streams", "Text", "load_text", "read_bytes", "segments_per_epoch"]


def __getattr__(name: str) -> Any:
    if name == "Streams":  # needs torch; fetching a corpus on a login node does not
        from gfrnn.data.streams import Streams

        return Streams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
