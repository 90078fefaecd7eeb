"""An exported step held against the model that it came from: the same logits, the same bits.

Legend: T steps, B rows, V symbols, K symbols a run reads, S and T steps of programs' sources and targets.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from gfrnn.data import NEWLINE
from gfrnn.data.program_batches import ProgramBatch
from gfrnn.nn import EncoderDecoder, LanguageModel
from gfrnn.nn.language_model import SymbolRNN
from gfrnn.training.evaluation import bits_TB
from gfrnn.training.program_evaluation import row_sums
from gfrnn_onnx.precision import OPERATORS, Precision
from gfrnn_onnx.runner import Step
from gfrnn_onnx.state import State

Symbols = npt.NDArray[np.int64]

_SEGMENT = 512  # steps of held-out text at once: the logits of all would be gigabytes


class Differences(NamedTuple):
    """The largest |difference| over random symbols."""

    one_step: float
    """Of logits and next states, each step from the trained model's own state."""
    carried: float
    """Of logits (an encoder: states) where each carries its own state from the first step to the last."""


@torch.no_grad()
def differences(step: Step, net: SymbolRNN, *, steps: int = 200, rows: int = 3, seed: int = 0) -> Differences:
    """How far a step is from the net that it was made of, over `steps` steps of `rows` rows."""
    symbols_TB = _random_symbols(step, steps, rows, seed)
    own: State | None = None
    theirs: tuple[Tensor, ...] | None = None
    one_step = carried = 0.0
    for begin, symbols in _runs(symbols_TB, step.metadata.unroll):
        before = None if theirs is None else State.of(*(part.transpose(0, 1).numpy() for part in theirs))
        expected, theirs = _read(net, symbols_TB[begin : begin + step.metadata.unroll], theirs)
        found = step(symbols, before)
        logits, own = step(symbols, own)
        for ours, other in zip(_outputs(*found), [*expected, *(part.transpose(0, 1) for part in theirs)], strict=True):
            one_step = max(one_step, _distance(ours, other))
        compared = expected or [part.transpose(0, 1) for part in theirs]
        for ours, other in zip([logits] if logits is not None else own.arrays(), compared, strict=True):
            carried = max(carried, _distance(ours, other))
    return Differences(one_step, carried)


@torch.no_grad()
def rounding(step: Step, net: SymbolRNN, *, steps: int = 200, rows: int = 3, seed: int = 0) -> float:
    """How far the net itself is, in fp32, from what it computes in fp64, over the same symbols: at any step at most.

    A net that amplifies every difference of its states is far from itself.
    """
    symbols_TB, wide = _random_symbols(step, steps, rows, seed), copy.deepcopy(net).double()
    worst, state, wide_state = 0.0, None, None
    for symbols_B in symbols_TB:
        logits, state = _read(net, symbols_B[None], state)
        wide_logits, wide_state = _read(wide, symbols_B[None], wide_state)
        for narrow, exact in zip(logits or state, wide_logits or wide_state, strict=True):
            worst = max(worst, (narrow - exact).abs().max().item())
    return worst


def _random_symbols(step: Step, steps: int, rows: int, seed: int) -> Symbols:
    """[T, B], T a multiple of what a run reads."""
    unroll = step.metadata.unroll
    return np.random.default_rng(seed).integers(0, step.vocabulary, (-(-steps // unroll) * unroll, rows))


def _read(
    net: SymbolRNN, symbols_KB: Symbols, state: tuple[Tensor, ...] | None
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """([logits [B, V] or [B, K, V] as the step has them] or [], the parts of the state [L, B, H])."""
    before: Any = state if state is None or len(state) > 1 else state[0]
    given = torch.from_numpy(symbols_KB)
    logits: list[Tensor] = []
    if isinstance(net, LanguageModel):
        logits_KBV, after = net(given, before)
        logits = [logits_KBV[0] if len(given) == 1 else logits_KBV.transpose(0, 1)]
    else:
        _, after = net.read(given, before)
    return logits, after if isinstance(after, tuple) else (after,)


def _outputs(logits: npt.NDArray[np.float32] | None, state: State) -> list[npt.NDArray[np.float32]]:
    return [*([] if logits is None else [logits]), *state.arrays()]


def _distance(ours: npt.NDArray[np.float32], theirs: Tensor) -> float:
    difference = float(np.abs(ours - theirs.numpy()).max())
    return difference if np.isfinite(difference) else float("inf")


@torch.no_grad()
def text_bpc(model: LanguageModel, pieces: Sequence[bytes]) -> float:
    """Bits a byte that pieces of equal length cost the model, each a text of its own."""
    symbols_TB = torch.tensor([[NEWLINE, *piece] for piece in pieces]).T
    model.eval()
    bits, state = 0.0, None
    for begin in range(0, len(symbols_TB) - 1, _SEGMENT):
        part_TB = symbols_TB[begin : begin + _SEGMENT + 1]
        logits_TBV, state = model(part_TB[:-1], state)
        bits += bits_TB(logits_TBV, part_TB[1:]).double().sum().item()
    return bits / symbols_TB[1:].numel()


@torch.no_grad()
def program_bpc(model: EncoderDecoder, batch: ProgramBatch) -> float:
    """Bits a character that programs' targets cost the model, each character given those before it."""
    return _target_bpc(model.eval()(batch.sources_SB, batch.source_lengths_B, batch.inputs_TB), batch)


def exported_program_bpc(encoder: Step, decoder: Step, batch: ProgramBatch) -> float:
    """The same of two exported steps. Unrolled: programs of lengths that K divides."""
    state = encoder.zero_state(batch.sources_SB.shape[1])
    lengths_B = batch.source_lengths_B.numpy()
    for begin, symbols in _runs(batch.sources_SB.numpy(), encoder.metadata.unroll):
        _, after = encoder(symbols, state)
        going_B11 = (lengths_B > begin)[:, None, None]
        state = State.of(*(np.where(going_B11, *pair) for pair in zip(after.arrays(), state.arrays(), strict=True)))
    found = []
    for _, symbols in _runs(batch.inputs_TB.numpy(), decoder.metadata.unroll):
        logits, state = decoder(symbols, state)
        assert logits is not None
        found.append(logits[None] if logits.ndim == 2 else logits.transpose(1, 0, 2))
    logits_TBV = torch.from_numpy(np.concatenate(found)[: len(batch.inputs_TB)])
    return _target_bpc(logits_TBV, batch)


def _runs(symbols_TB: Symbols, unroll: int) -> Iterator[tuple[int, Symbols]]:
    """(step, what a run from there reads): [B], unrolled [B, K] with zeros past the end."""
    for begin in range(0, len(symbols_TB), unroll):
        part_KB = symbols_TB[begin : begin + unroll]
        padded_KB = np.pad(part_KB, ((0, unroll - len(part_KB)), (0, 0)))
        yield begin, padded_KB[0] if unroll == 1 else padded_KB.T


def _target_bpc(logits_TBV: Tensor, batch: ProgramBatch) -> float:
    bits_B, _ = row_sums(logits_TBV, batch)
    return (bits_B.double().sum() / batch.target_lengths_B.sum()).item()


def check_operators(path: Path, precision: Precision) -> None:
    """Raises AssertionError unless the file's products are of the precision's operator, and none is of another's."""
    found = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    products = {name for name in set(OPERATORS.values()) if found[name]}
    assert products == {OPERATORS[precision]}, f"{path} has {dict(found)}"
