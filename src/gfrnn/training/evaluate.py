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

from gfrnn.cli import check_writable, parse, run, say
from gfrnn.config import Settings, UserError

if TYPE_CHECKING:
    from gfrnn.data import Bytes
    from gfrnn.nn import Model
    from gfrnn.training.evaluation import Score

_MOST = 10**7  # of whatever is counted
_SECONDS_BETWEEN_LINES = 30.0  # of progress, where stderr is no terminal
_SEAM_BYTES = 1000  # that a stream reads on into the next piece, to measure what starting it in mid-text adds


@dataclass(frozen=True)
class EvaluateSettings:
    """Bits per character of a trained model on held-out text; of a model of programs, its accuracy by difficulty."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder (its best checkpoint), a checkpoint folder, or the name of a model that ships (docs/models.md)."""
    other: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[OTHER]")] = ""
    """Programs: a second run; what the first gains over it is shown too."""
    text_file: Path | None = None
    """Score this file (plain, .gz, .xz, .zip) instead of the corpus' validation and test parts."""
    corpus_file: Path | None = None
    """The corpus the run was trained on, if it has moved since."""
    data_dir: Path | None = None
    """Where corpora are kept as Arrow, if not where the run had them."""
    streams: int = 32
    """Read the text as so many pieces side by side; 1 is exact."""
    warmup: int = 1000
    """Bytes each stream reads before its piece, unscored."""
    dynamic: bool = False
    """Dynamic evaluation: learn from each segment after scoring it. A figure of another kind: its row says so."""
    dynamic_learning_rate: float = 1e-4
    """Step size of dynamic evaluation, in multiples of each gradient's root mean square in training."""
    dynamic_decay: float = 1e-3
    """Pull to the trained weights, a segment."""
    dynamic_steps: int = 20
    """Segment length of dynamic evaluation."""
    nesting: int = 0
    """Programs: cells of nesting 1 to this; 0: what the run was trained for."""
    length: int = 0
    """Programs: cells of length 1 to this; 0: what the run was trained for."""
    cell_programs: int = 2000
    """Programs: so many a cell."""
    show: int = 0
    """Programs: also print so many, each with its target and what is predicted."""
    csv: Path | None = None
    """Programs: also write the cells to this file."""
    heat_map: Path | None = None
    """Programs: also draw the cells, or what the first run gains in each, into this file (.png, .svg, .pdf)."""
    mlflow: bool = True
    """Programs: log figures, files and heat map to the run's MLflow run, if it has one."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    averages: bool = True
    """Score the averages of the weights, where the run kept them; else the weights themselves."""
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
    from gfrnn.runs import checkpoint_origin, find_checkpoint, write_json

    trained, _ = checkpoint_origin(find_checkpoint(settings.run))  # a wrong path answers before torch
    for notice in without_effect(settings, trained.task):
        say(f"note: {notice}")
    if trained.task == "programs":
        from gfrnn.training.evaluate_programs import evaluate_programs

        evaluate_programs(settings, trained)
        return
    if settings.other:
        raise UserError(f"{settings.run} is a model of text; a second run is compared on programs alone")
    results = evaluate(settings)
    if settings.json is not None:
        write_json(settings.json.resolve(), results)  # a link stays one


_OF_PROGRAMS = ("nesting", "length", "cell_programs", "show", "csv", "heat_map", "mlflow")
_OF_TEXT = ("text_file", "corpus_file", "streams", "warmup", "dynamic")
_OF_DYNAMIC = ("dynamic_learning_rate", "dynamic_decay", "dynamic_steps")


def without_effect(settings: EvaluateSettings, task: str) -> list[str]:
    """Flags that are given and change nothing, each with its reason."""
    reasons = dict.fromkeys(_OF_TEXT if task == "programs" else _OF_PROGRAMS, f"on a model of {task}")
    if not settings.dynamic:
        reasons |= dict.fromkeys(_OF_DYNAMIC, "without --dynamic")
    defaults = {f.name: f.default for f in dataclasses.fields(settings)}
    given = [name for name in reasons if getattr(settings, name) != defaults[name]]
    return [f"--{name.replace('_', '-')} has no effect {reasons[name]}" for name in given]


def _validate(settings: EvaluateSettings) -> None:
    """Refuses what cannot work before anything is loaded; raises UserError."""
    for flag, value, least in (
        ("--cell-programs", settings.cell_programs, 1),
        ("--nesting", settings.nesting, 0),
        ("--length", settings.length, 0),
        ("--show", settings.show, 0),
        ("--streams", settings.streams, 1),
        ("--warmup", settings.warmup, 0),
        ("--dynamic-steps", settings.dynamic_steps, 1),
        ("--dynamic-learning-rate", settings.dynamic_learning_rate, 0),
        ("--dynamic-decay", settings.dynamic_decay, 0),
    ):
        if not least <= value < math.inf:
            raise UserError(f"{flag} is {value}; it must be at least {least}, and finite")
        if value > _MOST:
            raise UserError(f"{flag} is {value}; it must be at most {_MOST:,}")
    if settings.dynamic_decay > 1:
        raise UserError(f"--dynamic-decay is {settings.dynamic_decay}; it must be at most 1")
    if settings.text_file is not None and settings.corpus_file is not None:
        raise UserError("--corpus-file has no effect beside --text-file: leave one of them out")
    for flag, file in (("--json", settings.json), ("--csv", settings.csv), ("--heat-map", settings.heat_map)):
        if file is not None:
            check_writable(flag, file)
    files = [file.resolve() for file in (settings.json, settings.csv, settings.heat_map) if file is not None]
    if len(set(files)) < len(files):
        raise UserError("--json, --csv and --heat-map name one file twice: give each its own")
    if settings.heat_map is not None and settings.heat_map.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--heat-map {settings.heat_map}: give a name that ends in .png, .svg or .pdf")


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Scores the text that the settings ask for, prints a table, returns the figures by name."""
    from rich.console import Console
    from rich.table import Table

    from gfrnn.runs import checkpoint_origin, find_checkpoint, load_checkpoint
    from gfrnn.training.sample import device_of

    texts = _texts(settings, *checkpoint_origin(find_checkpoint(settings.run)))
    device = device_of(settings.device)
    from gfrnn.nn import LanguageModel
    from gfrnn.training.evaluation import score, score_dynamic

    model, path = load(settings.run, settings)
    assert isinstance(model, LanguageModel)
    model.to(device)
    moments = None
    if settings.dynamic:
        optimizer = load_checkpoint(path).optimizer
        moments = optimizer.get("exp_avg_sq", optimizer.get("square_avg"))

    results: dict[str, Any] = {"checkpoint": str(path), "device": device, "dynamic": settings.dynamic}
    table = Table()
    for column in ("text", "bytes", "BPC", "streams", "warm-up", "added by streams", "bytes/s"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, text in texts.items():
        begin = time.perf_counter()
        found: Score
        with progress_bar(name) as bar:
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
        if settings.dynamic and found.bpc > math.log2(model.softmax.out_features):
            rate = f"--dynamic-learning-rate {settings.dynamic_learning_rate:g}"
            say(f"note: {rate} spoils the model: {name} at {found.bpc:.2f} BPC is worse than guessing; lower it")
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
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(
        f"{path} on {device}", markup=False, highlight=False, soft_wrap=True
    )  # a path may have brackets in it
    console.print(table)
    return results


def _texts(settings: EvaluateSettings, trained: Settings, corpus_md5: str | None) -> dict[str, Bytes]:
    """What to score, by name: the file given, else the corpus' validation and test parts."""
    from gfrnn.data import load_text, read_bytes

    if settings.text_file is not None:
        return {"text": read_bytes(settings.text_file)}
    corpus = load_text(trained.data.moved(settings.corpus_file, settings.data_dir))
    if corpus_md5 not in (None, corpus.md5):
        raise UserError(
            f"{corpus.name} is not the text that the run was trained on; score it with --text-file, "
            "or give that text with --corpus-file"
        )
    return {"valid": corpus.valid, "test": corpus.test}


def load(run: str, settings: EvaluateSettings) -> tuple[Model, Path]:
    """The model of a run as the settings have it, and its checkpoint's folder."""
    from gfrnn.runs import load_model

    dtype = None if settings.dtype == "run" else settings.dtype
    model, _, path = load_model(run, dtype, averages=settings.averages)
    return model, path


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr, where that is no terminal a line now and then: yields what to call with the part done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(name)
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(name, total=1.0)
        yield lambda part: progress.update(task, completed=part)


def _lines(name: str) -> Callable[[float], None]:
    last = time.monotonic()

    def show(part: float) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(f"{name}: {part:.0%} scored")

    return show
