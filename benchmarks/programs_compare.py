"""GF against stacked on programs, at equal parameters and equal updates: accuracy by nesting and length.

    python benchmarks/programs_compare.py --json benchmarks/results/programs_compare.json --plot docs/programs.png
    python benchmarks/programs_compare.py --preset programs-gf-lstm-3x200 --output-dir runs/compare   # for a GPU

Trains the preset and a stack of as many parameters (as near as whole units come) through src/train.py, with each seed
of initial weights, on the same programs in the same order; then scores them all on the same test programs. Started
again it goes on where it was. What follows after -- goes to every training: -- --max-updates 500.

Gains are GF less stacked, in points, a seed's GF against the same seed's stack; intervals are of the mean over seeds
(t distribution), so they say how much the initial weights matter, and nothing without a second seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from gfrnn import cli
from gfrnn.config import Settings, UserError, matched_stack, preset, sizes, validate
from gfrnn.nn import EncoderDecoder
from gfrnn.runs import RunFolder, load_model, versions, write_json
from gfrnn.training.evaluate import progress_bar
from gfrnn.training.grid import Cell, Share, score_grid
from gfrnn.training.heat_map import Panel, draw
from trainings import train

MEASURES = {"accuracy": "characters", "exact": "whole targets"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="programs-demo", help="the GF net, its programs and its training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/programs-compare"))
    parser.add_argument("--launcher", default=sys.executable, help='what starts src/train.py: "deepspeed --num_gpus 4"')
    parser.add_argument("--programs", type=int, default=1000, help="test programs a cell")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("training", nargs="*", help="flags of src/train.py, after --")
    flags = parser.parse_args()
    if flags.seeds < 1:
        parser.error(f"--seeds is {flags.seeds}; it must be at least 1")
    try:
        nets = nets_of(flags.preset, flags.training)
    except UserError as error:
        parser.error(str(error))
    runs = {name: [flags.output_dir / f"{name}-seed-{seed}" for seed in range(flags.seeds)] for name in nets}
    for seed in range(flags.seeds):  # alternating, so that what is there at any time can be compared
        for name, settings in nets.items():
            train_net(flags.launcher, settings, runs[name][seed], seed, flags.training)
    trained = RunFolder(runs["gf"][0]).read_settings()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [load(run, device) for name in nets for run in runs[name]]  # all of GF, then all of stacked
    with progress_bar("scoring") as bar:
        cells = score_grid(
            models,
            trained.data.data_dir.expanduser(),
            nesting=trained.programs.nesting,
            length=trained.programs.length,
            programs=flags.programs,
            progress=bar,
        )
    results = summarize(cells, flags.seeds)
    results["nets"] = {name: net(settings, runs[name]) for name, settings in nets.items()}
    results |= {"preset": flags.preset, "seeds": flags.seeds, "programs_per_cell": flags.programs}
    results |= {"training": flags.training, "device": device, "versions": versions()}
    show(results)
    if flags.json is not None:
        write_json(flags.json, results)
    if flags.plot is not None:
        panels = {what: gains(results, name) for name, what in MEASURES.items()}
        draw(panels, flags.plot, f"GF less stacked, {flags.seeds} seeds", gain=True)


def nets_of(name: str, flags: list[str]) -> dict[str, Settings]:
    """The preset's net with these flags, and its stack. Both end after the same updates: nothing ends them early."""
    for own in ("--preset", "--seed", "--output-dir", "--feedback", "--patience"):
        if any(flag == own or flag.startswith(f"{own}=") for flag in flags):
            raise UserError(f"{own} is this script's own: leave it out")
    settings = cli.parse(Settings, flags, default=preset(name))
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, patience=0))
    if settings.task != "programs" or settings.model.feedback == "none":
        raise UserError(f"--preset {name} is no net of programs with feedback: give one such as programs-demo")
    validate(settings)
    return {"gf": settings, "stack": matched_stack(settings)}


def train_net(launcher: str, settings: Settings, run: Path, seed: int, flags: list[str]) -> None:
    """One run, unless it is finished. In a folder of other settings it ends this program."""
    model = settings.model
    own = [
        "--hidden-size",
        str(model.hidden_size),
        "--feedback",
        model.feedback,
        "--patience",
        "0",
        "--seed",
        str(seed),
    ]
    train(launcher, ["--preset", settings.preset, *flags, *own], run, settings.run.max_updates)


def load(run: Path, device: str) -> EncoderDecoder:
    model = load_model(run)[0]
    assert isinstance(model, EncoderDecoder)
    return model.to(device)


def net(settings: Settings, runs: list[Path]) -> dict[str, Any]:
    """What was trained, and what came of it by seed."""
    summaries = [json.loads(RunFolder(run).summary_path.read_text()) for run in runs]
    kept = ("step", "best_step", "valid_bpc", "test_bpc", "test_accuracy", "test_exact", "wall_clock_s")
    return {
        "units": settings.model.hidden_size,
        "parameters": sizes(settings).total,
        **{name: [summary[name] for summary in summaries] for name in kept},
    }


def summarize(cells: list[Cell], seeds: int) -> dict[str, Any]:
    """By cell and over all cells: means over seeds, gains and their intervals."""
    rows = []
    for cell in cells:
        row: dict[str, Any] = {"nesting": cell.nesting, "length": cell.length}
        for name in MEASURES:
            values = [getattr(cell, name)(model).value for model in range(2 * seeds)]
            row[name] = {"gf": values[:seeds], "stack": values[seeds:]}
        rows.append(row)
    results: dict[str, Any] = {"cells": rows}
    for name in MEASURES:
        means = {
            who: [statistics.mean(row[name][who][s] for row in rows) for s in range(seeds)] for who in ("gf", "stack")
        }
        results[name] = means
        for row in (*rows, results):
            row[f"{name}_gain"] = mean_gain(row[name])._asdict()
    return results


def mean_gain(values: dict[str, list[float]]) -> Share:
    """Of GF over stacked, seed by seed, with the 95 % interval of its mean."""
    found = [ours - theirs for ours, theirs in zip(values["gf"], values["stack"], strict=True)]
    mean = statistics.mean(found)
    if len(found) < 2:
        return Share(mean, -1.0, 1.0)
    half = student.ppf(0.975, len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return Share(mean, mean - half, mean + half)


def gains(results: dict[str, Any], name: str) -> Panel:
    return {(row["nesting"], row["length"]): Share(**row[f"{name}_gain"]) for row in results["cells"]}


def show(results: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    for who, found in results["nets"].items():
        shares = {what: [100 * share for share in found[f"test_{name}"]] for name, what in MEASURES.items()}
        console.print(
            f"{who}: {found['units']} units a layer, {found['parameters']:,} parameters, updates {found['step']}; "
            f"test {_row(found['test_bpc'], 3)} BPC, right: "
            + ", ".join(f"{_row(values, 1)} % of {what}" for what, values in shares.items()),
            markup=False,
        )
    for name, what in MEASURES.items():
        lengths = sorted({row["length"] for row in results["cells"]})
        table = Table(title=f"{what} right, %: GF, stacked (gain)", title_justify="left")
        for column in ("nesting", *(f"length {length}" for length in lengths)):
            table.add_column(column, justify="right")
        for nesting in sorted({row["nesting"] for row in results["cells"]}):
            shown = []
            for row in (row for row in results["cells"] if row["nesting"] == nesting):
                ours, theirs = (100 * statistics.mean(row[name][who]) for who in ("gf", "stack"))
                shown.append(f"{ours:.1f} {theirs:.1f} ({ours - theirs:+.1f})")
            table.add_row(str(nesting), *shown)
        console.print(table)
        gain = Share(**results[f"{name}_gain"])
        interval = f" [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]" if results["seeds"] > 1 else ""
        console.print(f"mean gain {100 * gain.value:+.2f} points{interval}", markup=False)


def _row(values: list[float], digits: int) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)


if __name__ == "__main__":
    main()
