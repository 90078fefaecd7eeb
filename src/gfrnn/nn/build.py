"""From settings to a model; the same seed gives the same weights on every machine and process."""

from __future__ import annotations

from typing import TypeVar

import torch

from gfrnn.config import ModelSettings, Settings
from gfrnn.nn.encoder_decoder import EncoderDecoder
from gfrnn.nn.language_model import LanguageModel

Model = LanguageModel | EncoderDecoder
Made = TypeVar("Made", LanguageModel, EncoderDecoder)


def build_model(settings: Settings, dtype: str | None = None, *, cuda: str = "graphs") -> Model:
    """The task's model, freshly initialised.

    dtype: "fp32" or "bf16", of products; None: the settings'. cuda: GatedFeedbackRNN's.
    """
    dtype, recompute = dtype or settings.batch.dtype, settings.batch.recompute
    if settings.task == "text":
        return _build(LanguageModel, settings.model, dtype, settings.seed, recompute, cuda)
    return _build(EncoderDecoder, settings.model, dtype, settings.seed, recompute, cuda)


def build_language_model(settings: ModelSettings, dtype: str, seed: int, *, recompute: int = 0) -> LanguageModel:
    """A freshly initialised language model."""
    return _build(LanguageModel, settings, dtype, seed, recompute, "graphs")


def _build(make: type[Made], settings: ModelSettings, dtype: str, seed: int, recompute: int, cuda: str) -> Made:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        compute_dtype = torch.bfloat16 if dtype == "bf16" else None
        return make(settings, compute_dtype=compute_dtype, recompute=recompute, cuda=cuda)
