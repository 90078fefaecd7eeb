"""Score a run of programs: the part of gfrnn-evaluate that makes its tables, files and pictures of them."""

from __future__ import annotations

import csv
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfrnn.cli import say
from gfrnn.config import Settings, UserError, at_home, check_difficulty
from gfrnn.runs import (
    RunFolder,
    checkpoint_origin,
    checkpoint_step,
    find_checkpoint,
    replace_file,
    write_json,
)

if TYPE_CHECKING:
    from gfrnn.nn import EncoderDecoder
    from gfrnn.training.evaluate import EvaluateSettings
    from gfrnn.training.grid import Cell, Share


def evaluate_programs(settings: EvaluateSettings, trained: Settings) -> None:
    """Scores the grid that the settings ask for, prints tables, writes files, logs to MLflow."""
    nesting, length = settings.nesting or trained.programs.nesting, settings.length or trained.programs.length
    check_difficulty(nesting, length)
    RunFolder(find_checkpoint(settings.run).parent.parent).mlflow_run_id()  # if its file is damaged, better now
    runs = [settings.run, *([settings.other] if settings.other else [])]
    for run in runs:
        if checkpoint_origin(find_checkpoint(run))[0].task != "programs":
            raise UserError(f"{run} is a model of text; give one of programs (train.py --task programs)")
    from gfrnn.nn import EncoderDecoder
    from gfrnn.training.evaluate import load, progress_bar
    from gfrnn.training.grid import score_grid
    from gfrnn.training.sample import device_of

    data_dir = at_home(settings.data_dir or trained.data.data_dir)
    device = device_of(settings.device)
    models, paths = [], []
    for run in runs:
        model, path = load(run, settings)
        assert isinstance(model, EncoderDecoder)
        models.append(model.to(device))
        paths.append(path)
    with progress_bar("programs") as bar:
        cells = score_grid(
            models,
            data_dir,
            nesting=nesting,
            length=length,
            programs=settings.cell_programs,
            seed=trained.programs.program_seed,
            progress=bar,
        )
    results: dict[str, Any] = {
        "checkpoint": str(paths[0]),
        "device": device,
        "programs_per_cell": settings.cell_programs,
    }
    if settings.other:
        results["other"] = str(paths[1])
    rows = [cell.to_json() for cell in cells]
    results |= {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name in _MEANS}
    results["cells"] = rows
    _write(settings, results, cells, paths)  # first: whoever reads what is printed may leave early
    _print_tables(cells, [str(path) for path in paths], settings.cell_programs)
    if settings.show:
        _show(models, trained, data_dir, settings.show)


_MEANS = ("accuracy", "exact", "bpc", "other_accuracy", "other_exact", "accuracy_gain", "exact_gain")


def _write(settings: EvaluateSettings, results: dict[str, Any], cells: list[Cell], checkpoints: list[Path]) -> None:
    """The files asked for, and all of it to the MLflow run that follows the first run's folder."""
    if settings.json is not None:
        write_json(settings.json.resolve(), results)
    if settings.csv is not None:
        _write_csv(settings.csv, results)
    if settings.heat_map is not None:
        _draw(cells, settings.heat_map.resolve(), checkpoints)
    run = RunFolder(checkpoints[0].parent.parent)
    if not settings.mlflow or run.mlflow_run_id() is None:
        return
    from gfrnn.training.tracking import add_to_run

    gain = len(checkpoints) > 1
    stem = "programs-gain" if gain else "programs"
    figures = {f"{stem}/{name}": results[name] for name in _MEANS if name in results}
    for row in results["cells"]:
        for name in ("accuracy_gain", "exact_gain") if gain else ("accuracy", "exact"):
            figures[f"{stem}/{name}_nesting_{row['nesting']}_length_{row['length']}"] = row[name]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{stem}.{kind}" for kind in ("json", "csv", "png")]
        write_json(files[0], results)
        _write_csv(files[1], results)
        _draw(cells, files[2], checkpoints)
        add_to_run(run.path, figures, files, step=checkpoint_step(checkpoints[0]))


def _write_csv(path: Path, results: dict[str, Any]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, results["cells"][0])
    table.writeheader()
    table.writerows(results["cells"])
    replace_file(path.resolve(), text.getvalue().encode())


def _draw(cells: list[Cell], path: Path, checkpoints: list[Path]) -> None:
    from gfrnn.training.heat_map import draw

    gain = len(checkpoints) > 1
    panels = {
        "characters": {(c.nesting, c.length): c.accuracy_gain() if gain else c.accuracy() for c in cells},
        "whole targets": {(c.nesting, c.length): c.exact_gain() if gain else c.exact() for c in cells},
    }
    names = [f"{path.parent.parent.name} at {checkpoint_step(path)}" for path in map(Path.absolute, checkpoints)]
    draw(panels, path, " less ".join(names), gain=gain)


# ---------------------------------------------------------------------------------------------- what is printed


def _print_tables(cells: list[Cell], names: list[str], programs: int) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    shown: dict[str, Callable[[Cell], Share]] = {}
    for model, name in enumerate(names):
        shown[f"{name}: characters right, %"] = lambda cell, model=model: cell.accuracy(model)  # type: ignore[misc]
        shown[f"{name}: whole targets right, %"] = lambda cell, model=model: cell.exact(model)  # type: ignore[misc]
    if len(names) > 1:
        shown["gain of the first: characters, points"] = lambda cell: cell.accuracy_gain()
        shown["gain of the first: whole targets, points"] = lambda cell: cell.exact_gain()
    for title, share in shown.items():
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        console.print(_table(cells, share, signed=title.startswith("gain")))
    console.print(
        f"{programs:,} test programs a cell; half the width of a 95 % interval after each figure", markup=False
    )


def _table(cells: list[Cell], share: Callable[[Cell], Share], *, signed: bool) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    lengths = sorted({cell.length for cell in cells})
    table = Table(box=SIMPLE, padding=0, collapse_padding=True)
    table.add_column("nesting", justify="right")
    for length in lengths:
        table.add_column(f"length {length}" if length == lengths[0] else f"{length:>6}", justify="right")
    for nesting in sorted({cell.nesting for cell in cells}):
        found = [share(cell) for cell in cells if cell.nesting == nesting]
        figures = [f"{100 * s.value:{'+' if signed else ''}.1f} ±{50 * (s.high - s.low):.1f}" for s in found]
        table.add_row(str(nesting), *figures)
    return table


def _show(models: list[EncoderDecoder], trained: Settings, data_dir: Path, count: int) -> None:
    """Some test programs, as hard as training's, with what they print and what each model says."""
    from gfrnn.data import ProgramCorpus
    from gfrnn.training.program_evaluation import predict

    table = ProgramCorpus(trained.programs, data_dir).test
    if count > len(table):
        say(f"note: --show {count} is more than the run's {len(table)} test programs: these are all")
    for number in range(min(count, len(table))):
        target = table.target(number).removesuffix(".")
        print(table.program(number))
        said = [predict(model, table.program(number)) for model in models]
        judged = ", ".join(f"{text} ({'right' if text == target else 'wrong'})" for text in said)
        print(f"    prints {target}; predicted {judged}\n")
