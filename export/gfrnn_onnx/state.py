"""The carried state of sequences, as a value: a step makes a new one and leaves the old one as it was.

Legend: B sequences, L layers, H units.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from onnxruntime import OrtValue

from gfrnn_onnx.names import ModelError

Array = npt.NDArray[np.float32]


class State:
    """h [B, L, H], for the LSTM also c, on the device of whoever made it."""

    def __init__(self, parts: Sequence[OrtValue]):
        self._parts = tuple(parts)

    @classmethod
    def of(cls, *parts: Array) -> State:
        """From arrays [B, L, H] in the computer's memory: h, for the LSTM also c."""
        copies = [np.array(part, np.float32, order="C") for part in parts]  # ONNX Runtime makes none on the CPU
        return cls([OrtValue.ortvalue_from_numpy(part) for part in copies])

    @property
    def values(self) -> tuple[OrtValue, ...]:
        """As ONNX Runtime has them."""
        return self._parts

    def arrays(self) -> tuple[Array, ...]:
        """Copies in the computer's memory: (h,) or (h, c), [B, L, H]."""
        return tuple(np.array(part.numpy()) for part in self._parts)

    def __len__(self) -> int:
        """B."""
        return int(self._parts[0].shape()[0])

    def fork(self, copies: int) -> State:
        """Each sequence `copies` times, side by side [B * copies, L, H], to go on in different ways."""
        return State.of(*(part.repeat(copies, axis=0) for part in self.arrays()))

    def row(self, index: int) -> State:
        """One of the sequences, [1, L, H]."""
        return State.of(*(part[index][None] for part in self.arrays()))

    @staticmethod
    def stack(states: Sequence[State]) -> State:
        """Sequences of several states in one."""
        return State.of(*(np.concatenate(parts) for parts in zip(*(s.arrays() for s in states), strict=True)))

    def save(self, file: str | Path | BinaryIO) -> None:
        """Writes an .npz file with h and c, under the name given."""
        named: dict[str, Any] = dict(zip("hc", self.arrays(), strict=False))
        with Path(file).open("wb") if isinstance(file, str | Path) else contextlib.nullcontext(file) as opened:
            np.savez(opened, **named)

    @staticmethod
    def load(file: str | Path | BinaryIO) -> State:
        """The reverse of save. Raises ModelError for another file."""
        try:
            found = np.load(file, allow_pickle=False)
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            with found:
                parts = [found[name] for name in "hc" if name in found]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ModelError(f"{file} is not a saved state ({error})") from error
        if not parts or any(part.ndim != 3 or part.dtype != np.float32 for part in parts):
            raise ModelError(f"{file} is not a saved state: it has no h [batch, layers, hidden]")
        return State.of(*parts)
