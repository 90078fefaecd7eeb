"""How a text becomes batches: R global rows read in parallel, a segment of T steps at a time.

The text's N bytes are cut into R contiguous rows of n = N // R bytes; update number k of an epoch reads bytes
k * T .. (k + 1) * T of every row. rows.py says who reads which.

Inputs are the targets shifted by one byte: position t of row r has target text[r * n + t] and input
text[r * n + t - 1]; the byte before the text is a newline.

Shapes: T steps, B rows a micro-batch (with padding), A micro-batches, P rows of a process that exist, n bytes a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gfrnn.data.corpus import NEWLINE, Bytes, segments_per_epoch
from gfrnn.data.rows import PADDING, RowShare


class Streams:
    """One process's share of a text, cut into segments.

    text: uint8 [N]; rows: global rows R; steps: segment length T; rank of world_size W processes;
    accumulation: micro-batches A an update. Raises UserError if W > R or if a row is shorter than T.

    The process's rows are copied once, to the device where they fill less than a quarter of its free memory, else to
    host memory. `segments_per_epoch` is S = n // T; `dropped_bytes` counts the bytes of the text that no segment
    holds; `rows_per_micro` is B; `count_per_update` = R * T is the global number of symbols an update counts.
    """

    def __init__(
        self,
        text: Bytes,
        rows: int,
        steps: int,
        *,
        world_size: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        n = len(text) // rows
        self.segments_per_epoch = segments_per_epoch(len(text), rows, steps)
        self.rows, self.steps, self.device = rows, steps, torch.device(device)
        self.dropped_bytes = len(text) - rows * self.segments_per_epoch * steps
        self.count_per_update = rows * steps

        share = RowShare(rows, world_size=world_size, rank=rank, accumulation=accumulation)
        self.rows_per_micro = share.per_micro
        self._rows_AB = share.rows_AB.to(self.device)
        self._counted_A: list[int] = [int((rows_B != PADDING).sum()) * steps for rows_B in share.rows_AB]
        self._weights_AB = (self._rows_AB != PADDING).float()

        first, last = share.first, share.stop
        own = np.empty((last - first) * n + 1, np.uint8)  # with the byte before it
        own[0] = text[first * n - 1] if first else NEWLINE
        own[1:] = text[first * n : last * n]
        own_N = torch.from_numpy(own)
        if self.device.type == "cuda" and torch.cuda.mem_get_info(self.device)[0] > 4 * own.nbytes:
            own_N = own_N.to(self.device)
        # Row r is bytes r * n .. r * n + n of the share: its inputs, and one more for the last target.
        self._text_Pn = own_N.as_strided((last - first, n + 1), (n, 1))

    def micro_rows(self, micro: int) -> Tensor:
        """Global row ids of a micro-batch: int64 [B], PADDING (-1) for rows that do not exist, whose symbols are 0."""
        return self._rows_AB[micro]

    def weights(self, micro: int) -> Tensor:
        """Weights of a micro-batch's rows: float32 [B], 1, or 0 for rows that do not exist."""
        return self._weights_AB[micro]

    def counted(self, micro: int) -> int:
        """Symbols of a micro-batch that count."""
        return self._counted_A[micro]

    def batch(self, segment: int, micro: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [T, B] each, on the device: views of one new tensor, a step apart.

        segment in 0 .. S - 1, micro in 0 .. A - 1.
        """
        start, first = segment * self.steps, micro * self.rows_per_micro
        symbols_BT = self._text_Pn[first : first + self.rows_per_micro, start : start + self.steps + 1]
        if len(symbols_BT) < self.rows_per_micro:
            symbols_BT = F.pad(symbols_BT, (0, 0, 0, self.rows_per_micro - len(symbols_BT)))
        if symbols_BT.device != self._rows_AB.device:  # pinned, so that the copy does not stop the device
            symbols_BT = symbols_BT.contiguous().pin_memory().to(self.device, non_blocking=True)
        symbols_TB = symbols_BT.t().to(torch.int64, memory_format=torch.contiguous_format)
        return symbols_TB[:-1], symbols_TB[1:]
