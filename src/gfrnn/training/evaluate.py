"""Score a run: gfrnn-evaluate, python src/evaluate.py RUN. Results to stdout, progress to stderr."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gfrnn.cli import parse, run
from gfrnn.config import Settings, UserError

if TYPE_CHECKING:
    from gfrnn.data import Bytes
    from gfrnn.training.evaluation import Score

_SEAM_BYTES = 1000  # that a stream reads on into the next piece, to measure what starting it in mid-text adds


@dataclass(frozen=True)
class EvaluateSettings:
    """Bits per character of a trained model on held-out text."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder (its best checkpoint) or a checkpoint folder."""
    text_file: Path | None = None
    """Score this file (plain, .gz, .xz, .zip) instead of the corpus' validation and test parts."""
    corpus_file: Path | None = None
    """The corpus the run was trained on, if it has moved since."""
    streams: int = 32
    """Read the text as so many pieces side by side; 1 is exact."""
    warmup: int = 1000
    """Bytes each stream reads before its piece, unscored."""
    dynamic: bool = False
    """Dynamic evaluation: learn from each segment after scoring it. Its figure is its own column."""
    dynamic_learning_rate: float = 1e-4
    """Step size of dynamic evaluation, in multiples of each gradient's root mean square in training."""
    dynamic_decay: float = 1e-3
    """Pull to the trained weights, a segment."""
    dynamic_steps: int = 20
    """Segment length of dynamic evaluation."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    dtype: Literal["run", "fp32", "bf16"] = "run"
    """Of the recurrence's products; run: as it was trained."""
    json: Path | None = None
    """Also write the results to this file."""


def main() -> None:
    """gfrnn-evaluate."""
    run(_main)


def _main() -> None:
    settings = parse(EvaluateSettings, sys.argv[1:])
    _validate(settings)
    from gfrnn.runs import write_json

    results = evaluate(settings)
    if settings.json is not None:
        write_json(settings.json.resolve(), results)  # a link stays one


def _validate(settings: EvaluateSettings) -> None:
    """Refuses what cannot work before anything is loaded; raises UserError."""
    for flag, value, least in (
        ("--streams", settings.streams, 1),
        ("--warmup", settings.warmup, 0),
        ("--dynamic-steps", settings.dynamic_steps, 1),
        ("--dynamic-learning-rate", settings.dynamic_learning_rate, 0),
        ("--dynamic-decay", settings.dynamic_decay, 0),
    ):
        if not least <= value < math.inf:
            raise UserError(f"{flag} is {value}; it must be at least {least}, and finite")
    if settings.dynamic_decay > 1:
        raise UserError(f"--dynamic-decay is {settings.dynamic_decay}; it must be at most 1")
    if settings.text_file is not None and settings.corpus_file is not None:
        raise UserError("--corpus-file has no effect beside --text-file: leave one of them out")
    if settings.json is not None:
        path = settings.json.resolve()
        if not path.parent.is_dir() or (path.exists() and not path.is_file()):
            raise UserError(f"--json {settings.json}: cannot be written: give a file in a folder that exists")


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Scores what the settings ask for, prints a table, returns the figures by name."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gfrnn.runs import checkpoint_origin, find_checkpoint, load_checkpoint, load_model
    from gfrnn.training.sample import device_of

    texts = _texts(settings, *checkpoint_origin(find_checkpoint(settings.run)))  # a wrong path answers before torch
    device = device_of(settings.device)
    from gfrnn.training.evaluation import score, score_dynamic

    model, _, path = load_model(settings.run, None if settings.dtype == "run" else settings.dtype)
    model.to(device)
    moments = None
    if settings.dynamic:
        optimizer = load_checkpoint(path).optimizer
        moments = optimizer.get("exp_avg_sq", optimizer.get("square_avg"))

    results: dict[str, Any] = {"checkpoint": str(path), "device": device, "dynamic": settings.dynamic}
    table = Table(title=Text(f"{path} on {device}"), title_justify="left")  # a path may have brackets in it
    for column in ("text", "bytes", "BPC", "streams", "warm-up", "added by streams", "bytes/s"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, text in texts.items():
        begin = time.perf_counter()
        found: Score
        with _bar(name) as bar:
            if settings.dynamic:
                found = score_dynamic(
                    model,
                    text,
                    learning_rate=settings.dynamic_learning_rate,
                    decay=settings.dynamic_decay,
                    second_moments=moments,
                    streams=settings.streams,
                    warmup=settings.warmup,
                    steps=settings.dynamic_steps,
                    progress=bar,
                )
            else:
                found = score(
                    model, text, streams=settings.streams, warmup=settings.warmup, seam=_SEAM_BYTES, progress=bar
                )
        seconds = time.perf_counter() - begin
        key = "bpc" if name == "text" else f"{name}_bpc"
        results |= {key: found.bpc, "streams": found.streams, "warmup": found.warmup}
        results["characters"] = results.get("characters", 0) + found.characters
        exact = "0 (exact)" if found.streams == 1 else "not measured"
        seam = exact if found.seam_bpc is None else f"{found.seam_bpc:+.5f}"
        if found.seam_bpc is not None:
            results[f"{key}_added_by_streams"] = found.seam_bpc
        label = f"{name}, dynamic" if settings.dynamic else name
        table.add_row(
            label,
            f"{found.characters:,}",
            f"{found.bpc:.4f}",
            str(found.streams),
            str(found.warmup),
            seam,
            f"{found.characters / seconds:,.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return results


def _texts(settings: EvaluateSettings, trained: Settings, corpus_md5: str | None) -> dict[str, Bytes]:
    """What to score, by name: the file given, else the corpus' validation and test parts."""
    from gfrnn.data import load_text, read_bytes

    if settings.text_file is not None:
        return {"text": read_bytes(settings.text_file)}
    data = trained.data
    if settings.corpus_file is not None:
        data = dataclasses.replace(data, corpus_file=settings.corpus_file)
    corpus = load_text(data)
    if corpus_md5 not in (None, corpus.md5):
        raise UserError(
            f"{corpus.name} is not the text that the run was trained on; score it with --text-file, "
            "or give that text with --corpus-file"
        )
    return {"valid": corpus.valid, "test": corpus.test}


@contextmanager
def _bar(name: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr, silent where that is no terminal: yields what to call with the part done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=1.0)
        yield lambda part: progress.update(task, completed=part)
