"""How many bits a byte a model needs for a text: each byte scored once.

A text starts as if after one newline from a zero state. One stream reads it from end to end: exact, and slow. S streams
cut it into S pieces and read them side by side; each first reads `warmup` bytes before its piece, unscored, so that it
has a state to begin with. What that approximation costs is measured, not assumed (`Score.seam_bpc`): every stream
goes on for a while into the next one's piece, where it has its full past and the next stream only its warm-up.

Legend: T steps, B streams of this process, V symbols, N bytes of text, n bytes of a stream's piece.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gfrnn.config import RunFailed
from gfrnn.data import NEWLINE, Bytes
from gfrnn.nn import LanguageModel, State
from gfrnn.training.dynamics import Dynamics

_SYMBOLS_AT_A_TIME = 1 << 15  # T * B at most: 32 MiB of logits, however many streams
_SMALLEST_RMS = 0.1  # that dynamic evaluation divides a gradient by, as a part of the mean one


@dataclass(frozen=True)
class Score:
    """Bits that a model needs for a text."""

    bits: float
    characters: int
    streams: int
    warmup: int
    seam_bpc: float | None = None
    """BPC that starting streams in mid-text adds, by measurement (None: not asked for, or one stream: 0)."""

    @property
    def bpc(self) -> float:
        """Bits a character."""
        return self.bits / self.characters


class _Pieces:
    """The text as S side-by-side pieces of equal length (the last may be shorter), and those that a process reads."""

    def __init__(self, text: Bytes, streams: int, warmup: int, rank: int, world_size: int, device: torch.device):
        # a piece shorter than the warm-up would make its stream start before the text does
        streams = max(1, min(streams, len(text) // max(warmup, 1)))
        self.length = math.ceil(len(text) / streams)
        self.streams = math.ceil(len(text) / self.length)  # rounding up may have left the last ones nothing
        self.warmup = warmup if self.streams > 1 else 0
        self.size = len(text)
        self.rows = torch.tensor(range(rank, self.streams, world_size), dtype=torch.long, device=device)
        self.has_first = rank == 0
        self.text = torch.from_numpy(np.concatenate([np.array([NEWLINE], dtype=np.uint8), text])).to(device)

    @property
    def characters(self) -> int:
        """Bytes in the pieces that this process reads."""
        return int((self.size - self.rows * self.length).clamp(max=self.length).sum().item())

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions start..stop of every stream, 0 being the first of its piece: inputs, targets, inside; [T, B]."""
        position_T1 = torch.arange(start, stop, device=self.text.device).unsqueeze(1)
        position_TB = position_T1 + self.rows * self.length
        inside_TB = (position_TB >= 0) & (position_TB < self.size)
        position_TB = position_TB.clamp(0, self.size - 1)
        return self.text[position_TB].long(), self.text[position_TB + 1].long(), inside_TB

    def begin(self, state: State | None) -> State | None:
        """The state at position 0, after the warm-up: the text's first stream had nothing to read before it."""
        if state is not None and self.has_first:
            for part in state if isinstance(state, tuple) else (state,):
                part[:, 0] = 0
        return state


def _spans(marks: set[int], steps: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of at most `steps` positions each, from the first mark to the last, none across a mark."""
    for begin, end in itertools.pairwise(sorted(marks)):
        for start in range(begin, end, steps):
            yield start, min(start + steps, end)


def bits_TB(logits_TBV: Tensor, targets_TB: Tensor) -> Tensor:
    """-log2 p(target), [T, B], in fp32 (fp64 of fp64 logits)."""
    logits_TBV = logits_TBV.to(torch.promote_types(logits_TBV.dtype, torch.float32))
    nll = F.cross_entropy(logits_TBV.flatten(0, 1), targets_TB.flatten(), reduction="none")
    return nll.view(targets_TB.shape) / math.log(2)


@torch.no_grad()
def score(
    model: LanguageModel,
    text: Bytes,
    *,
    streams: int,
    warmup: int,
    steps: int = 128,
    seam: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[float], None] | None = None,
    dynamics: Dynamics | None = None,
) -> Score:
    """Scores every byte of text once; puts the model in eval mode.

    With several processes each reads its share of the streams; add up `Score.bits` and `characters` over them.

    Args:
        text: at least one byte.
        streams: pieces read in parallel; 1 is exact. Fewer where the text has not `warmup` bytes for each.
        warmup: bytes read before a piece, unscored.
        steps: read at most so many at a time (memory only, not the result).
        seam: bytes that each stream reads on into the next piece, to measure seam_bpc; 0 does not. One process only:
            neighbouring streams belong to different ones.
        progress: called with the part done, 0 to 1.
        dynamics: a new one, which looks on where bytes are scored.
    """
    device = next(model.parameters()).device
    pieces = _Pieces(text, streams, warmup, rank, world_size, device)
    model.eval()
    if dynamics is not None:
        dynamics.begin(pieces.rows, pieces.length, pieces.size)
    if not len(pieces.rows):
        return Score(0.0, 0, pieces.streams, pieces.warmup)
    steps = max(1, min(steps, _SYMBOLS_AT_A_TIME // len(pieces.rows)))
    length = pieces.length
    seam = min(seam, length) if pieces.streams > 1 and world_size == 1 else 0
    bits = 0.0
    heads: list[Tensor] = []  # bits of each piece's first bytes, read with no more past than the warm-up ...
    tails: list[Tensor] = []  # ... and with all of the stream before
    state: State | None = None
    for start, stop in _spans({-pieces.warmup, 0, seam, length, length + seam}, steps):
        inputs_TB, targets_TB, inside_TB = pieces.read(start, stop)
        if start == 0:
            state = pieces.begin(state)
        scored = 0 <= start < length
        watch = dynamics.watch(start, inside_TB) if dynamics is not None and scored else None
        logits_TBV, state = model(inputs_TB, state, watch=watch)
        if start >= 0:
            found_TB = torch.where(inside_TB, bits_TB(logits_TBV, targets_TB), 0.0).double()
            if scored:
                bits += found_TB.sum().item()
            if start < seam:
                heads.append(found_TB)
            if start >= length:
                tails.append(found_TB)
        if progress is not None:
            progress((stop + pieces.warmup) / (length + seam + pieces.warmup))
    seam_bpc = None
    if seam:
        head_TB, tail_TB = torch.cat(heads)[:, 1:], torch.cat(tails)[:, :-1]
        seam_bpc = (head_TB - tail_TB).sum().item() / pieces.size
    return Score(bits, pieces.characters, pieces.streams, pieces.warmup, seam_bpc)


def score_dynamic(
    model: LanguageModel,
    text: Bytes,
    *,
    learning_rate: float,
    decay: float,
    second_moments: dict[str, Tensor] | None,
    streams: int = 1,
    warmup: int = 0,
    steps: int = 20,
    progress: Callable[[float], None] | None = None,
) -> Score:
    """Scores a text while learning from it: each segment is scored first, then learned.

    Krause et al. 2018, Dynamic Evaluation of Neural Sequence Models, their rule with RMS and a global prior: a gradient
    is divided by its root mean square in training (of the optimizer's second moments), and a weight is pulled back to
    where it started, the more so the larger that is. Without second moments: plain gradient descent and an even pull.
    The model given is left as it was.

    Args:
        text: at least one byte.
        learning_rate: a step in multiples of the RMS. decay: pull to the starting weights an update, 0 to 1.
        second_moments: parameter name -> mean squared gradient.
        streams, warmup: as in `score`; all streams learn together into one set of weights.
        steps: bytes of a stream learned at a time, which is part of the result.

    Raises RunFailed where what it learns makes the loss infinite or no number.
    """
    model = copy.deepcopy(model).eval()
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    anchors = {name: p.detach().clone() for name, p in parameters.items()}
    inverse_rms, pull = _rms_rule(parameters, second_moments, decay)
    pieces = _Pieces(text, streams, warmup, 0, 1, device)
    state: State | None = None
    bits = 0.0
    for start, stop in _spans({-pieces.warmup, 0, pieces.length}, steps):
        inputs_TB, targets_TB, inside_TB = pieces.read(start, stop)
        if start == 0:
            state = pieces.begin(state)
        with torch.set_grad_enabled(start >= 0):
            logits_TBV, state = model(inputs_TB, state)
        state = detach(state)
        if start >= 0:
            total = torch.where(inside_TB, bits_TB(logits_TBV, targets_TB), 0.0).sum()
            bits += total.item()
            if not math.isfinite(bits):
                raise RunFailed(f"the loss is not finite after {start:,} bytes of a stream: lower the learning rate")
            gradients = torch.autograd.grad(total / inside_TB.sum().clamp(min=1), list(parameters.values()))
            with torch.no_grad():
                for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
                    p.lerp_(anchors[name], pull[name])
                    p.addcmul_(gradient, inverse_rms[name], value=-learning_rate)
        if progress is not None:
            progress((stop + pieces.warmup) / (pieces.length + pieces.warmup))
    return Score(bits, pieces.size, pieces.streams, pieces.warmup)


def _rms_rule(
    parameters: dict[str, torch.nn.Parameter], moments: dict[str, Tensor] | None, decay: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By parameter name: what its gradient is multiplied by, and the part of the way back that it goes an update."""
    if moments is None:
        ones = {name: torch.ones_like(p) for name, p in parameters.items()}
        return ones, {name: decay * one for name, one in ones.items()}
    rms = {name: moments[name].to(p.device).sqrt() for name, p in parameters.items()}
    mean = sum(r.sum().item() for r in rms.values()) / sum(r.numel() for r in rms.values())
    # a weight whose gradient was always tiny (of a byte that never occurred) must not take a giant step
    inverse = {name: 1 / (r + _SMALLEST_RMS * mean) for name, r in rms.items()}
    return inverse, {name: (decay * r / mean).clamp(max=1.0) for name, r in rms.items()}


def detach(state: State) -> State:
    """The state without its history."""
    return (state[0].detach(), state[1].detach()) if isinstance(state, tuple) else state.detach()
