"""What an exported step and whoever runs it agree on: names, and the properties that a file carries."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

NEWLINE = 10
"""The byte that every text starts after, from a zero state (gfrnn.data.NEWLINE)."""

TOKEN, H, C = "token", "h", "c"
LOGITS, H_NEXT, C_NEXT, GATES = "logits", "h_next", "c_next", "gates"
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
"""The two files of a program model's folder."""
WEIGHTS = ".data"
"""What follows a file's name in that of its weights, where they are too large to be inside."""

PREFIX = "gfrnn."
"""Of the names of properties."""
FORMAT = 1
"""Of the properties; a file with another number is of another version of this package."""

Kind = Literal["text", "encoder", "decoder"]


class ModelError(ValueError):
    """A file that cannot be run: missing, damaged, not exported by this package, or not fit for what is asked of it."""


def is_utf8(text: str) -> bool:
    """Whether it can be encoded: a word of a command line or the environment may have bytes in it that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_model(model: str | Path) -> Path:
    """The file or folder that is meant: what is there under this path, else the step of the model that ships so named.

    Raises ModelError where neither is.
    """
    if Path(model).exists():
        if not is_utf8(str(model)):
            raise ModelError(f"{model}: its name is not UTF-8, as ONNX Runtime wants it; give the file another")
        return Path(model)
    from gfrnn import shipped  # here: a path needs nothing but this package

    folder = shipped.find_shipped(model)
    if folder is None:
        raise ModelError(f"{model} is not there: give a file that to_onnx.py has written{shipped.names_known(model)}")
    if not (folder / shipped.STEP).is_file():
        raise ModelError(f"{model} ships without {shipped.STEP}: write one with to_onnx.py {model}")
    return folder / shipped.STEP


@dataclass(frozen=True)
class Metadata:
    """What a step says about itself, in the file's metadata_props, each name with PREFIX before it."""

    kind: Kind
    """Of text, or which half of a program model."""
    symbols: str
    """"bytes", or the characters that symbols 0, 1, .. stand for."""
    settings: dict[str, Any]
    """The model's (gfrnn.config.ModelSettings)."""
    precision: str = "fp32"
    """Of its products."""
    unroll: int = 1
    """Symbols that a run reads."""
    run_id: str = ""
    """Of the training run: MLflow's, or the run folder's name."""
    checkpoint: str = ""
    """The checkpoint's name, which says the update."""
    bpc: dict[str, float] = field(default_factory=dict)
    """Bits a character: of the training run on its splits (valid, test); on the text that the export was checked with,
    of the trained model (trained) and of this file (exported)."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of what made the file."""

    def to_properties(self) -> dict[str, str]:
        """As a file carries it; no bpc yet where it is empty."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        if not self.bpc:
            del values["bpc"]
        return {PREFIX + name: v if isinstance(v, str) else json.dumps(v) for name, v in values.items()}

    @classmethod
    def from_properties(cls, properties: dict[str, str]) -> Metadata:
        """The reverse. Raises ModelError for a file of another kind or version."""
        found = {name.removeprefix(PREFIX): v for name, v in properties.items() if name.startswith(PREFIX)}
        if "format" not in found:
            raise ModelError("was not exported by gfrnn: it has no gfrnn.format among its properties")
        if found.pop("format") != str(FORMAT):
            raise ModelError("was exported by another version of gfrnn: export it again")
        texts = {f.name for f in dataclasses.fields(cls) if f.type in ("str", "Kind")}
        try:
            values: dict[str, Any] = {name: v if name in texts else json.loads(v) for name, v in found.items()}
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ModelError(f"has damaged properties ({error}): export it again") from error
