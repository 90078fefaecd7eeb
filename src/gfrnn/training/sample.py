"""Continue a prompt, or predict what a program prints: gfrnn-sample, python src/sample.py RUN."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gfrnn.cli import parse, run, say
from gfrnn.config import PROGRAM_SYMBOLS, UserError
from gfrnn.data import NEWLINE
from gfrnn.data.programs import encode

if TYPE_CHECKING:
    from gfrnn.nn import LanguageModel, State

_PROMPT_BYTES_AT_A_TIME = 1024  # of all rows


@dataclass(frozen=True)
class SampleSettings:
    """Continue a prompt with a trained model, or predict what a program prints."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder (its best checkpoint), a checkpoint folder, or the name of a model that ships (docs/models.md)."""
    program: Path | None = None
    """For a model of programs: print what it takes this file's program to print; - reads standard input."""
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
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""


def generate(
    model: LanguageModel, prompt: bytes, length: int, *, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
) -> bytes:
    """`length` bytes that continue the prompt, one drawn after another; puts the model in eval mode.

    Args:
        temperature: divides the logits; 0 takes the most likely byte, the first of equals.
        top_p: draw only from the most likely bytes that together have this probability, 0 < top_p <= 1.
        seed: the same one gives the same bytes; 0 to 2^63 - 1.
    """
    return generate_all(model, [prompt], length, temperature=temperature, top_p=top_p, seed=seed)[0]


def generate_all(
    model: LanguageModel,
    prompts: Sequence[bytes],
    length: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> list[bytes]:
    """As `generate`, of prompts of one length side by side, each with draws of its own: the same prompts, order and
    seed give the same texts. progress: called with the part done, 0 to 1.
    """
    import numpy as np
    import torch

    if len({len(prompt) for prompt in prompts}) > 1:
        raise ValueError("prompts that are continued side by side must have one length")
    device = next(model.parameters()).device
    # drawn on the CPU, so that a seed means the same text on every device
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    B = len(prompts)
    written_NB = torch.zeros(length, B, dtype=torch.uint8)
    state: State | None = None
    with torch.no_grad():
        read_B = [np.frombuffer(bytes([NEWLINE]) + prompt, np.uint8) for prompt in prompts]
        symbols_TB = torch.from_numpy(np.stack(read_B, 1)).long()
        for position in range(length):
            for part_TB in symbols_TB.split(max(1, _PROMPT_BYTES_AT_A_TIME // B)):
                logits_TBV, state = model(part_TB.to(device), state)
            logits_BV = logits_TBV[-1].double().cpu()
            if temperature == 0:
                symbols_B = logits_BV.argmax(1)
            else:
                # the largest one is 0, so that no temperature is too small
                largest_B1 = logits_BV.amax(1, keepdim=True)
                probability_BV = torch.softmax((logits_BV - largest_B1) / temperature, 1)
                probability_BV, order_BV = probability_BV.sort(descending=True, stable=True)
                # keep the first whose predecessors' sum is still below top_p: at least one
                probability_BV[probability_BV.cumsum(1) - probability_BV >= top_p] = 0
                symbols_B = order_BV.gather(1, torch.multinomial(probability_BV, 1, generator=generator)).squeeze(1)
            written_NB[position] = symbols_B
            symbols_TB = symbols_B.unsqueeze(0)
            if progress is not None:
                progress((position + 1) / length)
    return [row.numpy().tobytes() for row in written_NB.T.contiguous()]


def device_of(name: str) -> str:
    """The device that --device means; raises UserError if it is not there."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name} is unknown: give cpu, cuda, cuda:N or auto")
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not on this machine ({reason}): give cpu or auto") from error
    return name


def main() -> None:
    """gfrnn-sample."""
    run(_main)


def _main() -> None:
    settings = parse(SampleSettings, sys.argv[1:])
    if not 0 <= settings.length < 2**40:
        raise UserError(f"--length is {settings.length}; it must be from 0 to 2^40 - 1")
    if not settings.temperature >= 0:  # nor nan
        raise UserError(f"--temperature is {settings.temperature}; it must not be negative")
    if not 0 < settings.top_p <= 1:
        raise UserError(f"--top-p is {settings.top_p}; it must be above 0 and at most 1")
    if not 0 <= settings.seed < 2**63:
        raise UserError(f"--seed is {settings.seed}; it must be from 0 to 2^63 - 1")
    from gfrnn.runs import checkpoint_origin, find_checkpoint, load_model

    trained, _ = checkpoint_origin(find_checkpoint(settings.run))  # a wrong path answers before torch is loaded
    if trained.task == "text" and settings.program is not None:
        raise UserError(f"{settings.run} is a model of text: give it --prompt, or a model of programs its --program")
    if trained.task == "programs" and settings.program is None:
        raise UserError(f"{settings.run} is a model of programs: give it one, --program FILE")
    if settings.program is not None:
        for name in ("prompt", "length", "temperature", "top_p", "seed"):
            if getattr(settings, name) != getattr(SampleSettings, name):
                say(f"note: --{name.replace('_', '-')} has no effect with --program")
    program = _read_program(settings.program) if settings.program is not None else ""
    device = device_of(settings.device)
    from gfrnn.nn import EncoderDecoder

    model, _, _ = load_model(settings.run)
    model.to(device)
    if isinstance(model, EncoderDecoder):
        from gfrnn.training.program_evaluation import predict

        print(predict(model, program))
        return
    prompt = os.fsencode(settings.prompt)  # the bytes of the command line, whatever they are
    text = generate(
        model, prompt, settings.length, temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed
    )
    sys.stdout.buffer.write(prompt + text + b"\n")


def _read_program(path: Path) -> str:
    """The program in a file, without the newlines at its end; raises UserError for what no model has characters for."""
    if str(path) == "-" and sys.stdin is None:
        raise UserError("--program -: standard input is closed; give a file")
    try:
        source = sys.stdin.read() if str(path) == "-" else path.read_text()
    except OSError as error:
        raise UserError(f"--program {path}: {error.strerror}; give a readable file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--program {path} is not text ({error.reason}); give a Python program") from error
    source = source.rstrip("\n")
    if not source:
        raise UserError(f"--program {path} is empty; give a Python program")
    try:
        encode(source, PROGRAM_SYMBOLS)
    except UserError as error:
        raise UserError(f"--program {path}: {error}") from None
    return source
