"""How many bits a byte a model needs for a text: each byte scored once.

A text starts as if after one newline from a zero state. One stream reads it from end to end: exact, and slow. S streams
cut it into S pieces and read them side by side; each first reads `warmup` bytes before its piece, unscored, so that it
has a state to begin with. What that approximation costs is measured, not assumed (`Score.seam_bpc`): every stream
goes on for a while into the next one's piece, where it has its full past and the next stream only its warm-up.

Legend: T steps, B streams of this process, V symbols, N bytes of text, n bytes of a stream's piece.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gfrnn.nn import LanguageModel, State

NEWLINE = 10
Bytes = NDArray[np.uint8]


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
    """The text as S side-by-side pieces, and what of it each process reads."""

    def __init__(self, text: Bytes, streams: int, warmup: int, rank: int, world_size: int, device: torch.device):
        # a piece shorter than the warm-up would start before the text does
        self.streams = max(1, min(streams, len(text) // max(warmup, 1)))
        self.warmup = warmup if self.streams > 1 else 0
        self.length = math.ceil(len(text) / self.streams)
        self.size = len(text)
        self.rows = torch.arange(rank, self.streams, world_size, device=device)
        self.text = torch.from_numpy(np.concatenate([np.array([NEWLINE], dtype=np.uint8), text])).to(device)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions start..stop of every stream, 0 being the first of its piece: inputs, targets, inside; [T, B]."""
        position_T1 = torch.arange(start, stop, device=self.text.device).unsqueeze(1)
        position_TB = position_T1 + self.rows * self.length
        inside_TB = (position_TB >= 0) & (position_TB < self.size)
        position_TB = position_TB.clamp(0, self.size - 1)
        return self.text[position_TB].long(), self.text[position_TB + 1].long(), inside_TB


def bits_TB(logits_TBV: Tensor, targets_TB: Tensor) -> Tensor:
    """-log2 p(target), fp32, [T, B]."""
    nll = F.cross_entropy(logits_TBV.float().flatten(0, 1), targets_TB.flatten(), reduction="none")
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
) -> Score:
    """Scores every byte of text once.

    With several processes each reads its share of the streams; add up `Score.bits` and `characters` over them.

    Args:
        streams: pieces read in parallel; 1 is exact.
        warmup: bytes read before a piece, unscored.
        steps: read at a time (memory only, not the result).
        seam: bytes that each stream reads on into the next piece, to measure seam_bpc; 0 does not.
        progress: called with the part done, 0 to 1.
    """
    device = next(model.parameters()).device
    pieces = _Pieces(text, streams, warmup, rank, world_size, device)
    model.eval()
    bits, characters = 0.0, 0
    if not len(pieces.rows):
        return Score(0.0, 0, pieces.streams, pieces.warmup)
    state: State | None = None
    end = pieces.length + (min(seam, pieces.length) if pieces.streams > 1 else 0)
    heads: list[Tensor] = []  # bits of the first bytes of each piece: read with no more than the warm-up ...
    tails: list[Tensor] = []  # ... and with the whole past, by the stream before

    def read(start: int, stop: int) -> Tensor:
        nonlocal state
        inputs_TB, targets_TB, inside_TB = pieces.read(start, stop)
        logits_TBV, state = model(inputs_TB, state)
        return torch.where(inside_TB, bits_TB(logits_TBV, targets_TB), 0.0)

    for start in range(-pieces.warmup, 0, steps):
        read(start, min(start + steps, 0))
    if state is not None and rank == 0:  # the first stream has nothing before its piece
        for part in state if isinstance(state, tuple) else (state,):
            part[:, 0] = 0
    cuts = sorted({*range(0, end, steps), pieces.length, end - pieces.length if seam else 0, end} - {0})
    start = 0
    for stop in cuts:
        chunk = read(start, stop)
        if stop <= pieces.length:
            bits += chunk.double().sum().item()
            if stop <= end - pieces.length:
                heads.append(chunk)
        else:
            tails.append(chunk)
        if progress is not None:
            progress(stop / end)
        start = stop
    piece_sizes = (pieces.size - pieces.rows * pieces.length).clamp(0, pieces.length)
    characters = int(piece_sizes.sum().item())
    seam_bpc = None
    if tails and world_size == 1:
        head, tail = torch.cat(heads)[:, 1:], torch.cat(tails)[:, :-1]
        seam_bpc = (head.double().sum() - tail.double().sum()).item() / pieces.size
    return Score(bits, characters, pieces.streams, pieces.warmup, seam_bpc)


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

    Krause et al. 2018, Dynamic Evaluation of Neural Sequence Models, their RMS rule with a global step: gradients are
    divided by the root of the mean squared gradient of training (an optimizer's second moments, if given; else plain
    gradient descent), and weights are pulled back to where they started. The model given is left as it was.

    Args:
        learning_rate: step size. decay: pull to the starting weights an update, 0 to 1.
        second_moments: parameter name -> mean squared gradient.
        streams, warmup: as in `score`; all streams learn together into one set of weights.
    """
    model = copy.deepcopy(model).eval()
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    anchors = {name: p.detach().clone() for name, p in parameters.items()}
    scale = _step_scales(parameters, second_moments)
    pieces = _Pieces(text, streams, warmup, 0, 1, device)
    state: State | None = None
    bits = 0.0
    for start in range(-pieces.warmup, pieces.length, steps):
        stop = min(start + steps, pieces.length if start >= 0 else 0)
        inputs_TB, targets_TB, inside_TB = pieces.read(start, stop)
        if start == 0 and state is not None:
            for part in state if isinstance(state, tuple) else (state,):
                part[:, 0] = 0
        logits_TBV, state = model(inputs_TB, state)
        state = detach(state)
        losses_TB = torch.where(inside_TB, bits_TB(logits_TBV, targets_TB), 0.0)
        if start < 0:
            continue
        total = losses_TB.sum()
        bits += total.item()
        gradients = torch.autograd.grad(total / inside_TB.sum().clamp(min=1), list(parameters.values()))
        with torch.no_grad():
            for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
                p.addcmul_(gradient, scale[name], value=-learning_rate)
                p.lerp_(anchors[name], decay)
        if progress is not None:
            progress(stop / pieces.length)
    return Score(bits, pieces.size, pieces.streams, pieces.warmup)


def _step_scales(parameters: dict[str, torch.nn.Parameter], moments: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """What each gradient is multiplied by, of mean 1 over all weights; ones without second moments."""
    if moments is None:
        return {name: torch.ones_like(p) for name, p in parameters.items()}
    inverse = {name: 1 / (moments[name].to(p.device).sqrt() + 1e-8) for name, p in parameters.items()}
    # a weight whose gradient was always tiny (a byte that never occurs) must not take a giant step
    typical = torch.cat([t.flatten() for t in inverse.values()]).median()
    return {name: (t / typical).clamp(max=10.0) for name, t in inverse.items()}


def detach(state: State) -> State:
    """The state without its history."""
    return (state[0].detach(), state[1].detach()) if isinstance(state, tuple) else state.detach()
