"""The encoder-decoder: a padded batch is its rows one by one, and the two nets are what they are alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from gfrnn.config import ModelSettings, Settings, preset
from gfrnn.nn import EncoderDecoder, Noise, build_model

MODELS: dict[str, dict[str, Any]] = {
    "GF-LSTM": {},
    "GF-GRU": {"unit": "gru"},
    "stack": {"feedback": "none", "residual": True},
    "full, own gates": {"feedback": "full", "unit_gates": "own"},
    "tanh, embedding": {"unit": "tanh", "embedding_size": 5},
    "mRNN": {"unit": "mrnn", "num_layers": 1, "feedback": "none"},
    "all options": {"layer_norm": True, "output_skips": True, "forget_bias": 1.0},
}


def settings_of(**changes: Any) -> Settings:
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 6, "vocab_size": 39, **changes}
    return dataclasses.replace(preset("programs-demo"), model=ModelSettings(**sizes))


def make(**changes: Any) -> EncoderDecoder:
    model = build_model(settings_of(**changes))
    assert isinstance(model, EncoderDecoder)
    return model.double()


LENGTHS = torch.tensor([7, 3, 9, 1])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(39, (9, 4), generator=generator), torch.randint(12, (5, 4), generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_is_its_rows(name: str) -> None:
    model = make(**MODELS[name])
    sources, inputs = batch()
    together = model(sources, LENGTHS, inputs)
    together.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    model.zero_grad()
    for row, length in enumerate(LENGTHS.tolist()):
        alone = model(sources[:length, row : row + 1], None, inputs[:, row : row + 1])
        torch.testing.assert_close(alone[:, 0], together[:, row])
        alone.square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-12)


def test_the_decoder_is_a_language_model_that_starts_where_the_encoder_ended() -> None:
    model = make()
    sources, inputs = batch()
    _, state = model.encoder.rnn(sources[:7, :1])
    logits, _ = model.decoder(inputs[:, :1], state)
    torch.testing.assert_close(model(sources, LENGTHS, inputs)[:, :1], logits)


def test_the_order_of_a_program_matters() -> None:
    model = make()
    sources, inputs = batch()
    changed = sources.clone()
    changed[0, 2], changed[1, 2] = sources[1, 2], sources[0, 2]
    assert sources[0, 2] != sources[1, 2]
    before, after = model(sources, LENGTHS, inputs), model(changed, LENGTHS, inputs)
    assert not torch.equal(before[:, 2], after[:, 2])
    assert torch.equal(before[:, 0], after[:, 0])


def test_masks_depend_on_rows_alone_and_differ_between_the_nets() -> None:
    model = make(dropout=0.5, hidden_size=64)
    sources, inputs = batch()
    noise = Noise(1, 2, torch.arange(4))
    whole = model(sources, LENGTHS, inputs, noise=noise)
    half = model(sources[:, 2:], LENGTHS[2:], inputs[:, 2:], noise=Noise(1, 2, torch.tensor([2, 3])))
    torch.testing.assert_close(half, whole[:, 2:])
    seen: list[torch.Tensor] = []
    for net in (model.encoder.rnn, model.decoder.rnn):
        net.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["noise"].row_mask(1, 64, 0.5)), with_kwargs=True
        )
    model(sources, LENGTHS, inputs, noise=noise)
    assert len(seen) == 2
    assert not torch.equal(*seen)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = (build_model(dataclasses.replace(settings_of(), seed=seed)) for seed in (1, 1, 2))
    for name, p in first.state_dict().items():
        assert torch.equal(p, second.state_dict()[name])
    assert not torch.equal(first.encoder.rnn.weight_hc_l0, other.encoder.rnn.weight_hc_l0)  # type: ignore[union-attr]
    assert not torch.equal(first.encoder.rnn.weight_hc_l0, first.decoder.rnn.weight_hc_l0)  # type: ignore[union-attr]
