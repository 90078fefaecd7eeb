"""Corpora and how they become batches. Importing this loads neither torch nor datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gfrnn.data.corpus import NEWLINE, Bytes, Text, load_text, read_bytes, segments_per_epoch
from gfrnn.data.program_corpus import Corpus, ProgramCorpus, load_corpus
from gfrnn.data.programs import Program, ProgramTable, generate_programs

if TYPE_CHECKING:
    from gfrnn.data.program_batches import ProgramBatch, ProgramBatches
    from gfrnn.data.program_dataset import Programs, ProgramsConfig
    from gfrnn.data.streams import Streams

__all__ = [
    "NEWLINE",
    "Bytes",
    "Corpus",
    "Program",
    "ProgramBatch",
    "ProgramBatches",
    "ProgramCorpus",
    "ProgramTable",
    "Programs",
    "ProgramsConfig",
    "Streams",
    "Text",
    "generate_programs",
    "load_corpus",
    "load_text",
    "read_bytes",
    "segments_per_epoch",
]

# Need torch, or datasets; fetching a corpus on a login node does not.
_LATE = {
    "ProgramBatch": "program_batches",
    "ProgramBatches": "program_batches",
    "Programs": "program_dataset",
    "ProgramsConfig": "program_dataset",
    "Streams": "streams",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        import importlib

        return getattr(importlib.import_module(f"gfrnn.data.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
