"""How programs become batches: R of about one length, padded, an update.

A pass over a table of programs is a permutation of it, cut into pools of some updates; in a pool programs are sorted by
length and cut into batches, and all batches come in random order. Pass and order are functions of a seed, and rows fall
to processes and micro-batches as rows.py has it: what an update reads depends on nothing else.

Legend: S, T steps of the longest source and target of a global batch, B rows of a micro-batch, P programs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gfrnn.config import TARGET_SYMBOLS, UserError
from gfrnn.data.rows import PADDING, RowShare

if TYPE_CHECKING:
    from gfrnn.data.programs import ProgramTable

Numbers = npt.NDArray[np.int64]
END = TARGET_SYMBOLS.index(".")
"""Ends every target, and is what the decoder reads before the first of its characters."""

_POOL = 32  # batches that are sorted together: little padding, and lengths that vary from update to update
_SHAPES = 8  # numbers of steps on CUDA: as many graphs as a net keeps


class ProgramBatch(NamedTuple):
    """A micro-batch on its device. Padding rows have no symbols at all."""

    sources_SB: Tensor
    """int64 [S, B], as PROGRAM_SYMBOLS' indices."""
    source_lengths_B: Tensor
    """int64 [B]."""
    inputs_TB: Tensor
    """int64 [T, B], as TARGET_SYMBOLS' indices: the targets a character later."""
    targets_TB: Tensor
    """int64 [T, B]."""
    target_lengths_B: Tensor
    """int64 [B]."""


class ProgramBatches:
    """One process's share of one pass over a table.

    Args:
        table: the programs. rows: R, an update. seed: of the order.
        world_size, rank, accumulation: as RowShare's.

    `updates` is how many a pass has; the programs that are left over, less than R, differ from pass to pass.
    Raises UserError if there are fewer programs than rows, or more processes.
    """

    def __init__(
        self,
        table: ProgramTable,
        rows: int,
        *,
        seed: int,
        world_size: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        device: str | torch.device = "cpu",
    ):
        self.table, self.device = table, torch.device(device)
        self.updates = len(table) // rows
        if self.updates == 0:
            raise UserError(f"{len(table)} programs are too few for --rows {rows}: use fewer rows, or more programs")
        self._rows_AB = RowShare(rows, world_size=world_size, rank=rank, accumulation=accumulation).rows_AB
        random = np.random.RandomState(seed % 2**32)  # whose numbers are the same in every version of numpy
        order_P = random.permutation(len(table))[: self.updates * rows]
        length_P = table.source_lengths[order_P]
        pool_P = np.arange(len(order_P)) // (_POOL * rows)
        sorted_P = order_P[np.lexsort((length_P, pool_P))]  # stable: equal lengths stay in random order
        self._programs_UR: Numbers = sorted_P.reshape(self.updates, rows)[random.permutation(self.updates)]

    def micro_rows(self, micro: int) -> Tensor:
        """Global row ids of a micro-batch: int64 [B], on the device; PADDING (-1) for rows that do not exist."""
        return self._rows_AB[micro].to(self.device)

    def source_characters(self, update: int) -> int:
        """Characters of the global batch's programs."""
        return int(self.table.source_lengths[self._programs_UR[update]].sum())

    def target_characters(self, update: int) -> int:
        """Of their targets: what an update counts."""
        return int(self.table.target_lengths[self._programs_UR[update]].sum())

    def counted(self, update: int, micro: int) -> int:
        """Those of a micro-batch."""
        rows_B = self._rows_AB[micro].numpy()
        return int(self.table.target_lengths[self._programs_UR[update][rows_B[rows_B != PADDING]]].sum())

    def batch(self, update: int, micro: int) -> ProgramBatch:
        """A micro-batch of update 0 .. updates - 1."""
        programs_R = self._programs_UR[update]
        rows_B = self._rows_AB[micro].numpy()
        programs_B = np.where(rows_B == PADDING, PADDING, programs_R[rows_B])
        longest = self.table.source_lengths[programs_R].max(), self.table.target_lengths[programs_R].max()
        return pad(self.table, programs_B, self.device, longest)


def pad(
    table: ProgramTable, programs_B: Numbers, device: torch.device, longest: tuple[int, int] | None = None
) -> ProgramBatch:
    """A batch of the table's programs of these numbers; PADDING is a row without any symbols.

    longest: characters of a source and of a target that there is room for; None: those of the batch.
    """
    exists_B = programs_B != PADDING
    source_lengths_B = np.where(exists_B, table.source_lengths[programs_B], 0)
    target_lengths_B = np.where(exists_B, table.target_lengths[programs_B], 0)
    S, T = longest or (source_lengths_B.max(), target_lengths_B.max())
    if device.type == "cuda":  # graphs are captured by shape: let there be few
        S, T = room(table.source_lengths, int(S)), room(table.target_lengths, int(T))
    sources_BS = _rows(table.sources, table.source_offsets[programs_B], source_lengths_B, int(S))
    targets_BT = _rows(table.targets, table.target_offsets[programs_B], target_lengths_B, int(T))
    inputs_BT = np.concatenate([np.full((len(targets_BT), 1), END), targets_BT[:, :-1]], axis=1)

    def on_device(values: Numbers) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values.T)).to(device)

    return ProgramBatch(*map(on_device, (sources_BS, source_lengths_B, inputs_BT, targets_BT, target_lengths_B)))


def room(length_P: Numbers, steps: int) -> int:
    """`steps`, rounded up to one of few numbers of steps for texts of these lengths."""
    multiple = -(-int(length_P.max()) // _SHAPES)
    return -(-steps // multiple) * multiple


def _rows(symbols: npt.NDArray[np.uint8], begin_B: Numbers, length_B: Numbers, width: int) -> Numbers:
    """[B, width] of the symbols from each begin on, zeros past each length."""
    step = np.arange(width)
    inside = step < length_B[:, None]
    found = symbols[np.where(inside, begin_B[:, None] + step, 0)]
    return np.where(inside, found, 0).astype(np.int64)
