"""Which of an update's R global rows fall to which process and micro-batch: of every kind of corpus.

A process owns ceil(R / W) consecutive rows and reads them in A micro-batches of B rows; rows that do not exist are
padding. So what an update reads depends on neither the number of processes W nor the accumulation A.
"""

from __future__ import annotations

import torch

from gfrnn.config import UserError

PADDING = -1
"""The global row id of rows that do not exist."""


class RowShare:
    """One process's rows. Raises UserError if W > R.

    rows: global rows R; rank of world_size W processes; accumulation: micro-batches A an update.
    `first`, `stop`: the range of global rows that are this process's; `per_micro` is B; `rows_AB`: global row ids of
    the micro-batches, int64 [A, B], PADDING (-1) for rows that do not exist.
    """

    def __init__(self, rows: int, *, world_size: int = 1, rank: int = 0, accumulation: int = 1):
        if world_size > rows:
            raise UserError(
                f"{world_size} processes cannot share --rows {rows}: "
                f"use at most {rows} processes or --rows of at least {world_size}"
            )
        owned = -(-rows // world_size)
        self.rows, self.per_micro = rows, -(-owned // accumulation)
        self.first, self.stop = min(rank * owned, rows), min((rank + 1) * owned, rows)
        row_AB = torch.arange(accumulation * self.per_micro).view(accumulation, self.per_micro) + self.first
        self.rows_AB = torch.where(row_AB < self.stop, row_AB, PADDING)
