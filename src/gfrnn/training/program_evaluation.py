"""How well a model says what programs print: bits and accuracy, program by program.

Accuracy is of characters, each the most likely one given the right ones before it (teacher forcing), as in Zaremba and
Sutskever 2014. A target whose characters are all right is what the model writes by itself when it takes the most likely
one each time: so exact match needs no second reading.

Legend: S, T steps, B rows, V characters of targets, P programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gfrnn.config import PROGRAM_SYMBOLS, TARGET_SYMBOLS
from gfrnn.data.program_batches import END, ProgramBatch, pad, room
from gfrnn.data.programs import ProgramTable, decode, encode
from gfrnn.nn import EncoderDecoder
from gfrnn.training.evaluation import bits_TB

_SYMBOLS_AT_A_TIME = 1 << 15  # S * B
_MOST_CHARACTERS = 64  # of a prediction: more than any target of the largest settings has


class Sums(NamedTuple):
    """By row [B] of a batch."""

    bits_B: Tensor
    """Of the target's characters, with history."""
    right_B: Tensor
    """Characters of the target that were the most likely ones."""


def row_sums(logits_TBV: Tensor, batch: ProgramBatch) -> Sums:
    """What each row's target takes, and how much of it is right; nothing of a row of padding."""
    targets_TB = batch.targets_TB
    inside_TB = torch.arange(len(targets_TB), device=targets_TB.device).unsqueeze(1) < batch.target_lengths_B
    bits = torch.where(inside_TB, bits_TB(logits_TBV, targets_TB), 0.0)
    right_TB = (logits_TBV.argmax(-1) == targets_TB) & inside_TB
    return Sums(bits.sum(0), right_TB.sum(0))


@dataclass(frozen=True)
class ProgramScores:
    """By program [P], of those that this process scored, in the table's order."""

    program: npt.NDArray[np.int64]
    """Its number in the table."""
    bits: npt.NDArray[np.float64]
    characters: npt.NDArray[np.int64]
    """Of its target."""
    right: npt.NDArray[np.int64]
    """Of them right."""

    @property
    def exact(self) -> npt.NDArray[np.bool_]:
        """Whether the whole target is right."""
        return np.equal(self.right, self.characters)


@torch.no_grad()
def score_programs(
    model: EncoderDecoder,
    table: ProgramTable,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> ProgramScores:
    """Scores every program once; puts the model in eval mode. With several processes each scores its share."""
    model.eval()
    device = next(model.parameters()).device
    own_P = np.argsort(table.source_lengths, kind="stable")[::-1][rank::world_size]  # the longest first
    found: list[tuple[npt.NDArray[np.int64], Sums]] = []
    begin = 0
    while begin < len(own_P):
        # as many rows for any length that is padded to the same one: few shapes, for CUDA graphs
        at_once = max(1, _SYMBOLS_AT_A_TIME // room(table.source_lengths, int(table.source_lengths[own_P[begin]])))
        programs_B = own_P[begin : begin + at_once]
        batch = pad(table, programs_B, device)
        logits_TBV = model(batch.sources_SB, batch.source_lengths_B, batch.inputs_TB)
        found.append((programs_B, row_sums(logits_TBV, batch)))
        begin += at_once
    programs = np.concatenate([np.empty(0, np.int64), *(numbers for numbers, _ in found)])
    bits = np.concatenate([np.empty(0), *(sums.bits_B.double().cpu().numpy() for _, sums in found)])
    right = np.concatenate([np.empty(0, np.int64), *(sums.right_B.cpu().numpy() for _, sums in found)])
    order = programs.argsort()
    return ProgramScores(programs[order], bits[order], table.target_lengths[programs[order]], right[order])


@torch.no_grad()
def predict(model: EncoderDecoder, program: str) -> str:
    """What the model takes a program to print: the most likely character each time, up to the '.' (left out).

    Raises UserError for a character that no program has.
    """
    model.eval()
    device = next(model.parameters()).device
    source_S1 = torch.from_numpy(encode(program, PROGRAM_SYMBOLS).astype(np.int64)).to(device).unsqueeze(1)
    state = model.encode(source_S1)
    written: list[int] = []
    symbol = END
    while len(written) < _MOST_CHARACTERS:
        logits_TBV, state = model.decoder(torch.tensor([[symbol]], device=device), state)
        symbol = int(logits_TBV[0, 0].argmax())
        if symbol == END:
            break
        written.append(symbol)
    return decode(np.array(written, np.uint8), TARGET_SYMBOLS)
