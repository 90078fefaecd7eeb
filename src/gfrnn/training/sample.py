"""Continue a prompt: gfrnn-sample, python src/sample.py RUN --prompt TEXT."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from gfrnn.cli import parse, run
from gfrnn.config import UserError

if TYPE_CHECKING:
    from gfrnn.nn import LanguageModel


@dataclass(frozen=True)
class SampleSettings:
    """Continue a prompt with a trained model."""

    run: Annotated[str, tyro.conf.Positional]
    """A run folder (its best checkpoint) or a checkpoint folder."""
    prompt: str = ""
    """Text to continue; empty starts a text."""
    length: int = 500
    """Bytes to write."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely byte."""
    top_p: float = 1.0
    """Draw only from the most likely bytes that together have this probability."""
    seed: int = 0
    """The same seed gives the same text."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


def generate(
    model: LanguageModel, prompt: bytes, length: int, *, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
) -> bytes:
    """`length` bytes that continue the prompt, one drawn after another from the model."""
    import torch

    device = next(model.parameters()).device
    # drawn on the CPU, so that a seed means the same text on every device
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    written = bytearray()
    symbols = list(b"\n" + prompt)  # every text starts as if after one newline
    state = None
    with torch.inference_mode():
        for _ in range(length):
            logits_TBV, state = model(torch.tensor(symbols, device=device).unsqueeze(1), state)
            logits_V = logits_TBV[-1, 0].double().cpu()
            if temperature == 0:
                symbol = int(logits_V.argmax())
            else:
                probability_V, order_V = torch.softmax(logits_V / temperature, 0).sort(descending=True)
                # keep the first whose predecessors' sum is still below top_p: at least one
                probability_V[probability_V.cumsum(0) - probability_V >= top_p] = 0
                symbol = int(order_V[torch.multinomial(probability_V, 1, generator=generator)])
            written.append(symbol)
            symbols = [symbol]
    return bytes(written)


def device_of(name: str) -> str:
    """The device that --device means; raises UserError if it is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not on this machine ({str(error).splitlines()[0]})") from error
    return name


def main() -> None:
    """gfrnn-sample."""
    run(_main)


def _main() -> None:
    settings = parse(SampleSettings, sys.argv[1:])
    if settings.length < 0:
        raise UserError(f"--length is {settings.length}; it must not be negative")
    if settings.temperature < 0:
        raise UserError(f"--temperature is {settings.temperature}; it must not be negative")
    if not 0 < settings.top_p <= 1:
        raise UserError(f"--top-p is {settings.top_p}; it must be above 0 and at most 1")
    from gfrnn.runs import find_checkpoint, load_model

    find_checkpoint(settings.run)  # a wrong path answers before torch is loaded
    model, _, _ = load_model(settings.run)
    model.to(device_of(settings.device))
    prompt = settings.prompt.encode("utf-8", "surrogateescape")  # bytes of the command line as they came
    text = generate(
        model, prompt, settings.length, temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed
    )
    sys.stdout.buffer.write(prompt + text + b"\n")
