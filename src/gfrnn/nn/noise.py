"""Where random masks come from: a function of names, not of the order in which they are asked for.

A row's dropout mask depends on (seed, update, place, global row) alone, so the same row gets the same mask whichever
process or micro-batch it falls to. Rows' masks are counter-based hashes of those numbers, evaluated with integer tensor
operations, so they are the same on every device. Masks of weights depend on (seed, update, place) alone and come from
the device's own generator: the same for every process, but others on CUDA than on the CPU.

Shapes: B rows, N units of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

# Places of masks: one number a mask, and those of rows and of weights apart. BELOW and WEIGHT begin a range.
PLACE_INPUT, PLACE_OUTPUT, PLACE_BELOW, PLACE_WEIGHT = 0, 1, 100, 1000

_MASK = 0xFFFFFFFF
_Bits = TypeVar("_Bits", int, torch.Tensor)


def _mix(x: _Bits) -> _Bits:
    """A 32-bit integer hash (the finaliser of MurmurHash3), of an int or of int64 tensors that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def hash_numbers(*numbers: int) -> int:
    """A 32-bit hash of integers, in order."""
    state = 0x9E3779B9
    for number in numbers:
        state = _mix((state * 31 + (number & _MASK) + 0x7F4A7C15) & _MASK)
        state = _mix((state ^ (number >> 32 & _MASK)) & _MASK)
    return state


@dataclass(frozen=True)
class Noise:
    """The random numbers of one update.

    rows_B: int64 global row numbers of the batch at hand.
    """

    seed: int
    update: int
    rows_B: torch.Tensor

    @staticmethod
    def fresh(batch: int, device: torch.device) -> Noise:
        """Masks no one needs to reproduce, drawn from torch's global generator: what nn.Dropout does."""
        seed = int(torch.randint(2**31, ()).item())
        return Noise(seed, 0, torch.arange(batch, device=device))

    def row_mask(self, place: int, units: int, probability: float) -> torch.Tensor:
        """[B, N] of 0 and 1 / (1 - probability): one mask a row, for all steps (locked dropout)."""
        device = self.rows_B.device
        key_B = _mix((self.rows_B + hash_numbers(self.seed, self.update, place)) & _MASK)
        unit_N = _mix(torch.arange(units, device=device) * 0x9E3779B1 & _MASK)
        # two rounds after adding, so that neighbouring rows and units share no pattern
        bits_BN = _mix(_mix((key_B[:, None] + unit_N[None, :]) & _MASK) ^ key_B[:, None])
        return (bits_BN >= int(probability * 2**32)).to(torch.float32) / (1 - probability)

    def weight_mask(self, place: int, like: torch.Tensor, probability: float) -> torch.Tensor:
        """A mask of `like`'s shape, the same for every row, process and micro-batch of the update."""
        generator = torch.Generator(like.device).manual_seed(hash_numbers(self.seed, self.update, place))
        kept = torch.empty_like(like).bernoulli_(1 - probability, generator=generator)
        return kept / (1 - probability)
