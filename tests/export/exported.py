"""Small models, exported: what the tests of runtime and server run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from gfrnn.config import PROGRAM_SYMBOLS, TARGET_SYMBOLS, ModelSettings
from gfrnn.nn import EncoderDecoder, LanguageModel
from gfrnn.nn.language_model import SymbolRNN
from gfrnn_onnx import step
from gfrnn_onnx.names import DECODER, ENCODER, Kind, Metadata
from gfrnn_onnx.precision import Precision

SMALL = ModelSettings(num_layers=3, hidden_size=24, output_skips=True)


def language_model(settings: ModelSettings = SMALL, *, seed: int = 0, spread: float = 2.0) -> LanguageModel:
    """With weights large enough for its texts to wander."""
    torch.manual_seed(seed)
    model = LanguageModel(settings).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(spread)
            if p.dim() == 1 or name.startswith("softmax"):
                p.add_(torch.randn_like(p) * 0.3)
    return model


def encoder_decoder(seed: int = 0, **settings: Any) -> EncoderDecoder:
    torch.manual_seed(seed)
    model = EncoderDecoder(dataclasses.replace(SMALL, vocab_size=len(PROGRAM_SYMBOLS), **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    return model


def save_step(
    net: SymbolRNN,
    path: Path,
    *,
    precision: Precision = "fp32",
    unroll: int = 1,
    gates: bool = False,
    kind: Kind = "text",
    symbols: str = "bytes",
    run_id: str = "a-run",
) -> Path:
    """The step of a net as a file, as to_onnx.py writes it."""
    model = step.build_step(net, precision=precision, unroll=unroll, gates=gates)
    settings = dataclasses.asdict(net.settings)
    metadata = Metadata(kind, symbols, settings, precision=precision, unroll=unroll, run_id=run_id)
    step.save_step(model, metadata, path)
    return path


def save_programs(model: EncoderDecoder, folder: Path, **options: Any) -> Path:
    """A model of programs as its folder of two files."""
    folder.mkdir()
    save_step(model.encoder, folder / ENCODER, kind="encoder", symbols=PROGRAM_SYMBOLS, **options)
    save_step(model.decoder, folder / DECODER, kind="decoder", symbols=TARGET_SYMBOLS, **options)
    return folder
