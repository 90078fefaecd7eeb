"""How many parameters settings imply, by the formula."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gfrnn.config.settings import GATES, TARGET_SYMBOLS, ModelSettings, Settings


@dataclass(frozen=True)
class Sizes:
    """Parameter counts of a model, by the formula (a test holds them against the modules)."""

    recurrent: int
    """Weights of the recurrent part with its input weights and global gates, no biases: the paper's count."""
    looked_up: int
    """Those of them that only ever multiply a one-hot symbol: a look-up, no arithmetic."""
    embedding: int
    softmax: int
    """Output weights, without their bias."""
    biases: int
    """All biases and the gains of layer norm."""

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def total(self) -> int:
        return self.recurrent + self.embedding + self.softmax + self.biases

    @property
    def train_flops(self) -> int:
        """Floating-point operations a character to train: 6 a multiplied weight (2 forward, 4 backward)."""
        return 6 * (self.recurrent - self.looked_up + self.softmax)


def sizes(settings: Settings) -> Sizes:
    """Parameter counts of what the settings train."""
    first, *others = networks(settings)
    return sum(others, start=first)


def networks(settings: Settings) -> tuple[Sizes, ...]:
    """Parameter counts network by network: the language model's, or the encoder's and the decoder's of programs."""
    if settings.task == "text":
        return (model_sizes(settings.model),)
    targets = len(TARGET_SYMBOLS)
    return model_sizes(settings.model, outputs=0), model_sizes(settings.model, targets)


def model_sizes(model: ModelSettings, vocab_size: int | None = None, *, outputs: int | None = None) -> Sizes:
    """Parameter counts of `model` with another alphabet if `vocab_size` is given, and as many outputs or `outputs`."""
    vocab = vocab_size or model.vocab_size
    outputs = vocab if outputs is None else outputs
    layers, hidden = model.num_layers, model.hidden_size
    embedding = vocab * model.embedding_size
    inputs = model.embedding_size or vocab
    one_hot = not model.embedding_size
    softmax = outputs * hidden * (layers if model.output_skips else 1)
    if model.unit == "mrnn":  # W_hx, W_mx: H x inputs each; W_hm, W_mh: H x H each
        from_input = 2 * hidden * inputs
        return Sizes(
            recurrent=from_input + 2 * hidden * hidden,
            looked_up=from_input if one_hot else 0,
            embedding=embedding,
            softmax=softmax,
            biases=hidden + outputs,
        )
    unit_gates = GATES[model.unit] - 1
    gates = layers if model.feedback == "gated" else 0  # global gates a layer
    rows = (1 + unit_gates) * hidden + gates
    reads_input = layers if model.input_skips else 1
    below = (layers - 1) * rows * hidden
    candidate = hidden * hidden * (1 if model.feedback == "none" else layers)
    gated_by_all = model.feedback != "none" and model.unit_gates == "all"
    unit = unit_gates * hidden * hidden * (layers if gated_by_all else 1)
    recurrent = reads_input * rows * inputs + below + layers * (candidate + unit + gates * layers * hidden)
    biases = layers * rows + outputs
    if model.unit == "gru" and model.hidden_bias:
        biases += layers * hidden
    if model.layer_norm:
        biases += layers * (1 + unit_gates) * hidden + (2 * layers * hidden if model.unit == "lstm" else 0)
    return Sizes(
        recurrent=recurrent,
        looked_up=reads_input * rows * inputs if one_hot else 0,
        embedding=embedding,
        softmax=softmax,
        biases=biases,
    )


def matched_stack(settings: Settings) -> Settings:
    """The same settings for a stack, without feedback, of as many units as come nearest to the same parameter count."""
    wanted = sizes(settings).total
    stack = dataclasses.replace(settings.model, feedback="none", unit_gates="all")

    def of(hidden_size: int) -> Settings:
        return dataclasses.replace(settings, model=dataclasses.replace(stack, hidden_size=hidden_size))

    larger = settings.model.hidden_size
    while sizes(of(larger)).total < wanted:
        larger += 1
    return min(of(larger - 1), of(larger), key=lambda found: abs(sizes(found).total - wanted))
