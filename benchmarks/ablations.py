"""What each trick of a recipe is worth: the whole recipe and each trick off in turn, trained as long, scored alike.

    python benchmarks/ablations.py run runs/ablations --preset demo --updates 500 --seeds 3
    python benchmarks/ablations.py report runs/ablations --markdown ablations.md --csv ablations.csv

`ABLATIONS` says which tricks there are and what turns them off; two that a recipe may do without are tried on instead.
Where a recipe has nothing to turn off, or on, that is left out, with a word. Every training is src/train.py and reads
as many characters in as many updates. Started again, `run` goes on where it was. What follows after -- goes to every
training: -- --embedding-size 64.

Validation text chooses a run's checkpoint and the step size of dynamic evaluation, run by run; test text is scored with
what was chosen. `report` takes what is there so far. A difference is that of test BPC to the whole recipe with the same
seed: above 0, the trick helped. With several seeds it is their mean, with the smallest and the largest. --json merges
into a file that may hold other recipes' ablations.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gfrnn import cli
from gfrnn.config import BatchSettings, RunFailed, Settings, UserError, matched_stack, preset, validate
from gfrnn.data import load_text
from gfrnn.runs import RunFolder, replace_file, versions, write_json
from gfrnn.training.evaluate import EvaluateSettings, evaluate
from trainings import ROOT, train

WHOLE = "whole"
PLAN = "ablations.json"
RESULTS = ROOT / "benchmarks/results/ablations.json"
OWN = ("--preset", "--seed", "--output-dir", "--max-updates", "--patience")
SCORES = ("valid", "test", "valid_dynamic", "test_dynamic")


def half_segments(batch: BatchSettings) -> list[str]:
    """With twice the rows: as many characters an update, and of a row from one reset of the state to the next."""
    flags = ["--steps", str(batch.steps // 2), "--rows", str(2 * batch.rows)]
    if batch.reset_every:
        flags += ["--reset-every", str(2 * batch.reset_every)]
    return [*flags, "--reset-probability", repr(batch.reset_probability / 2)]


ABLATIONS: dict[str, Callable[[Settings], list[str]]] = {
    WHOLE: lambda s: [],
    "no layer norm": lambda s: ["--no-layer-norm"],
    "no locked dropout": lambda s: ["--dropout", "0", "--input-dropout", "0", "--output-dropout", "0"],
    "no weight dropout": lambda s: ["--weight-dropout", "0"],
    "no averaging": lambda s: ["--average", "none"],
    "half segments": lambda s: half_segments(s.batch),
    "no input-gate cap": lambda s: ["--no-cap-input-gate"],
    "one-hot input": lambda s: ["--embedding-size", "0"],
    "with input-gate cap": lambda s: ["--cap-input-gate"] if s.model.unit == "lstm" else [],
    "with an embedding of 64": lambda s: [] if s.model.embedding_size else ["--embedding-size", "64"],
    "every gate 1": lambda s: ["--feedback", "full"] if s.model.feedback == "gated" else [],
    "no feedback": lambda s: ["--feedback", "none"],
    "no feedback, as many parameters": lambda s: (
        ["--feedback", "none", "--hidden-size", str(matched_stack(s).model.hidden_size)]
    ),
}
"""Flags that turn a trick off, or on where the name says so, after those of the recipe."""


def main() -> None:
    cli.run(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    run_ = actions.add_parser("run", help="train and score")
    run_.add_argument("folder", type=Path)
    run_.add_argument("--preset", default="demo", help="the recipe")
    run_.add_argument("--updates", type=int, required=True, help="of every training")
    run_.add_argument("--seeds", type=int, default=1)
    run_.add_argument("--only", nargs="+", metavar="NAME", help="some of the ablations; the whole recipe comes too")
    run_.add_argument("--launcher", default=sys.executable, help='what starts src/train.py: "deepspeed --num_gpus 4"')
    run_.add_argument("--streams", type=int, default=32, help="of evaluation")
    run_.add_argument("--bytes", type=int, default=0, help="score the first so many of each text; 0: all")
    run_.add_argument(
        "--rates", type=float, nargs="*", default=[1e-4, 3e-4], help="of dynamic evaluation; none: skip it"
    )
    run_.add_argument(
        "--no-averages", dest="averages", action="store_false", help="score the weights, not their averages"
    )
    run_.add_argument("--device", default="auto", help="of evaluation")
    report_ = actions.add_parser("report", help="tables of what is there")
    report_.add_argument("folder", type=Path)
    report_.add_argument("--markdown", type=Path)
    report_.add_argument("--csv", type=Path)
    report_.add_argument("--json", type=Path, nargs="?", const=RESULTS, help=f"default: {RESULTS.relative_to(ROOT)}")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)  # argparse itself loses what follows an option and a --
    args = parser.parse_args(words[:end])
    args.training = words[end + 1 :]
    if args.action == "run":
        run_all(args)
    else:
        report(args)


# ------------------------------------------------------------------------------------------------- run


def ablations_of(name: str, flags: list[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(flags by ablation, why by ablation that there is not). Raises UserError for a recipe that cannot be."""
    for own in OWN:
        if any(flag == own or flag.startswith(f"{own}=") for flag in flags):
            raise UserError(f"{own} is this script's own: leave it out")
    recipe = cli.parse(Settings, flags, default=preset(name))
    if recipe.task != "text":
        raise UserError(f"--preset {name} is a model of {recipe.task}: give one of text")
    known = {
        f.name for group in vars(recipe).values() if dataclasses.is_dataclass(group) for f in dataclasses.fields(group)
    }
    found: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    for ablation, off in ABLATIONS.items():
        own_flags = off(recipe)
        unknown = [flag for flag in own_flags if flag.startswith("--") and not known & set(field_names(flag))]
        if unknown:
            missing[ablation] = f"this version of gfrnn has no {unknown[0]}"
            continue
        settings = cli.parse(Settings, [*flags, *own_flags], default=preset(name))
        if settings == recipe and ablation != WHOLE:
            missing[ablation] = (
                "the recipe has it, or cannot" if ablation.startswith("with ") else "the recipe does without it"
            )
            continue
        validate(settings)
        found[ablation] = own_flags
    return found, missing


def field_names(flag: str) -> tuple[str, str]:
    """The settings' names that a flag may mean."""
    name = flag.removeprefix("--").replace("-", "_")
    return name, name.removeprefix("no_")


def run_all(args: argparse.Namespace) -> None:
    """Trains and scores what is not there yet."""
    for name, value, least in (("--seeds", args.seeds, 1), ("--updates", args.updates, 1), ("--bytes", args.bytes, 0)):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    found, missing = ablations_of(args.preset, args.training)
    if not args.averages and found.pop("no averaging", None) is not None:
        missing["no averaging"] = "weights are scored without"
    if args.only is not None:
        unknown = [name for name in args.only if name not in ABLATIONS]
        if unknown:
            raise UserError(f"--only {unknown[0]!r} is unknown: there are {', '.join(ABLATIONS)}")
        found = {name: flags for name, flags in found.items() if name == WHOLE or name in args.only}
        missing = {name: why for name, why in missing.items() if name in args.only}
    for name, why in missing.items():
        cli.say(f"note: {name} is left out: {why}")
    keep_plan(args)
    failed: list[str] = []
    for seed in range(args.seeds):  # the whole recipe and all ablations with a seed, then the next
        for name, flags in found.items():
            run = folder_of(args.folder, name, seed)
            own = ["--preset", args.preset, *args.training, *flags, "--seed", str(seed), "--patience", "0"]
            try:
                train(args.launcher, [*own, "--max-updates", str(args.updates)], run, args.updates)
                score(run, args)
            except RunFailed as error:  # the others can still be compared
                cli.say(f"note: {name}, seed {seed}: {error}")
                failed.append(run.name)
    if failed:
        raise RunFailed(f"{', '.join(failed)} failed: the report leaves out what has no figures")


def keep_plan(args: argparse.Namespace) -> None:
    """Writes what makes runs comparable; raises UserError if the folder has runs of something else."""
    plan = {
        name: getattr(args, name) for name in ("preset", "updates", "training", "streams", "bytes", "rates", "averages")
    }
    path = args.folder / PLAN
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in plan.items():
            old = before.get(name, True)  # a folder of before there was a choice of averages has no word of it
            if old != value:
                raise UserError(f"{args.folder} was begun with {name} {old}, not {value}: give another folder")
    args.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)


def folder_of(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(',', '').replace(' ', '-')}-seed-{seed}"


def score(run: Path, args: argparse.Namespace) -> None:
    """BPC of a finished run, static and dynamic, into files beside it: what is there already is not done again."""
    corpus = load_text(RunFolder(run).read_settings().data)
    texts = {"valid": corpus.valid, "test": corpus.test}
    for split, text in texts.items():
        replace_file(args.folder / split, text[: args.bytes or None].tobytes())
    for split in texts:
        bpc_of(run, split, None, args)
    if args.rates:
        valid = {rate: bpc_of(run, "valid", rate, args) for rate in args.rates}
        bpc_of(run, "test", min(valid, key=lambda rate: valid[rate]), args)


def bpc_of(run: Path, split: str, rate: float | None, args: argparse.Namespace) -> float:
    """BPC of one text as evaluate.py finds it; dynamic with a rate."""
    path = score_file(run, split, rate)
    if not path.exists():
        settings = EvaluateSettings(
            str(run),
            text_file=args.folder / split,
            streams=args.streams,
            device=args.device,
            averages=args.averages,
        )
        if rate is not None:
            settings = dataclasses.replace(settings, dynamic=True, dynamic_learning_rate=rate)
        with contextlib.redirect_stdout(sys.stderr):  # its tables are this program's progress
            write_json(path, _figures(settings))
    return read_bpc(path)


def _figures(settings: EvaluateSettings) -> dict[str, Any]:
    """What evaluate.py finds; no BPC where what dynamic evaluation learns spoils the model altogether."""
    try:
        return evaluate(settings)
    except RunFailed as error:
        if not settings.dynamic:
            raise
        return {"bpc": None, "failed": str(error)}


def read_bpc(path: Path) -> float:
    """Infinite where there is none."""
    bpc = json.loads(path.read_text())["bpc"]
    return math.inf if bpc is None else float(bpc)


def score_file(run: Path, split: str, rate: float | None) -> Path:
    return run.with_name(f"{run.name}.{split}{f'-dynamic-{rate:g}' if rate is not None else ''}.json")


# ---------------------------------------------------------------------------------------------- report


def read(folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """(the plan, by ablation what is known of each seed's run). Raises UserError if the whole recipe is not there."""
    if not (folder / PLAN).is_file():
        raise UserError(f"{folder} has no {PLAN} in it: give a folder that `ablations.py run` has written")
    plan = json.loads((folder / PLAN).read_text())
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ABLATIONS:
        seed = 0
        while (known := read_run(folder_of(folder, name, seed), seed, plan)) is not None:
            found.setdefault(name, []).append(known)
            seed += 1
    if WHOLE not in found:
        raise UserError(f"{folder}: the whole recipe is not trained and scored yet, and all else is compared with it")
    return plan, found


def read_run(run: Path, seed: int, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Scores of a run; None if it has not all of them."""

    def bpc(split: str, rate: float | None = None) -> float | None:
        path = score_file(run, split, rate)
        return read_bpc(path) if path.exists() else None

    scores: dict[str, Any] = {"valid": bpc("valid"), "test": bpc("test")}
    if plan["rates"]:
        valid = {rate: bpc("valid", rate) for rate in plan["rates"]}
        if None in valid.values():
            return None
        rate = min(valid, key=lambda each: valid[each] or 0.0)
        scores |= {"valid_dynamic": valid[rate], "test_dynamic": bpc("test", rate), "dynamic_learning_rate": rate}
    if None in scores.values():
        return None
    summary = json.loads(RunFolder(run).summary_path.read_text())
    kept = {name: summary[name] for name in ("parameters", "step", "best_step", "characters", "wall_clock_s")}
    return {"seed": seed, **scores, **kept}


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """By ablation: means, and differences to the whole recipe with the same seeds."""
    rows = []
    for name, runs in found.items():
        row: dict[str, Any] = {"ablation": name, "seeds": len(runs), "parameters": runs[0]["parameters"]}
        for score_name in SCORES:
            if score_name in runs[0]:
                row[score_name] = statistics.mean(each[score_name] for each in runs)
        for score_name in ("test", "test_dynamic"):
            pairs = zip(runs, found[WHOLE], strict=False)  # seeds that both have
            gaps = [own[score_name] - whole[score_name] for own, whole in pairs if score_name in own]
            if gaps and name != WHOLE:
                kind = {"mean": statistics.mean(gaps), "least": min(gaps), "most": max(gaps)}
                row |= {f"{score_name}_difference_{what}": value for what, value in kind.items()}
        rows.append(row)
    return rows


def report(args: argparse.Namespace) -> None:
    for flag, file in (("--markdown", args.markdown), ("--csv", args.csv), ("--json", args.json)):
        if file is not None:
            cli.check_writable(flag, file)
    plan, found = read(args.folder)
    rows = rows_of(found)
    columns, cells = shown(rows)
    title = f"{plan['preset']}, {plan['updates']} updates" + "".join(f" {flag}" for flag in plan["training"])
    table = Table(title=f"Ablations of {title}", caption="BPC; differences of test BPC to the whole recipe")
    for column in columns:
        table.add_column(column, justify="left" if column == "ablation" else "right")
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if args.markdown is not None:
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *cells]
        replace_file(args.markdown.resolve(), "".join(f"| {' | '.join(line)} |\n" for line in lines).encode())
    if args.csv is not None:
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
        replace_file(args.csv.resolve(), text.getvalue().encode())
    if args.json is not None:
        before = json.loads(args.json.read_text()) if args.json.exists() else {}
        about = {"plan": plan, "versions": versions(), "date": time.strftime("%F")}
        write_json(args.json.resolve(), {**before, title: {"about": about, "ablations": rows, "runs": found}})


def shown(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(columns, cells) as people read them."""
    scores = [name for name in SCORES if name in rows[0]]
    gaps = [name for name in ("test", "test_dynamic") if name in scores]
    columns = ["ablation", "seeds", "parameters", *(name.replace("_", ", ") for name in scores)]
    columns += [f"{name.replace('_', ', ')}: difference" for name in gaps]
    cells = []
    for row in rows:
        line = [row["ablation"], str(row["seeds"]), f"{row['parameters']:,}", *(f"{row[name]:.4f}" for name in scores)]
        for name in gaps:
            mean, least, most = (row.get(f"{name}_difference_{what}") for what in ("mean", "least", "most"))
            spread = f" ({least:+.4f} to {most:+.4f})" if mean is not None and least != most else ""
            line.append("" if mean is None else f"{mean:+.4f}{spread}")
        cells.append(line)
    return columns, cells


if __name__ == "__main__":
    main()
