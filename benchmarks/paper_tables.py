"""The paper's Table 1 at a budget that one machine can pay, and its curves; through the real trainer, and resumable.

    python benchmarks/paper_tables.py tune   runs/paper --units lstm --corpus-file FILE
    python benchmarks/paper_tables.py run    runs/paper --corpus-file FILE --seeds 0 1 2 --alone \\
        --models lstm-3x191 gf-lstm-3x140 gf-lstm-3x191 full-lstm-3x140 --json benchmarks/results/paper_tables.json
    python benchmarks/paper_tables.py report benchmarks/results/paper_tables.json --output report

The models are the presets, in the paper's form. Only optimizer, learning rate and schedule are chosen: by `tune`, on
the STACK of each unit, at a fifth of the budget, by the best validation BPC, with a seed that `run` does not use;
models with feedback get what suits the stack. No choice looks at test bytes. Or by hand (--optimizer,
--learning-rate), or as the paper has it (--published).

`run` trains a seed's models in turns of --turn minutes: the training that has done the least of its budget goes on, is
stopped by the trainer's own --time-limit with a checkpoint, and goes on bit for bit later (paper/turns.py). So what
else the machine does falls on all models alike. Seconds are those of updates alone (train_seconds of metrics.jsonl):
no start, validation or checkpoint. Only trainings that had the machine to themselves in every turn, by your word
(--alone), feed figures of seconds. Kill it at any time; the same command goes on. What follows after -- goes to every
training: -- --valid-bytes 50000.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from gfrnn import cli
from gfrnn.config import RunFailed, UserError, preset
from gfrnn.runs import write_json
from paper.plan import OPTIMIZERS, SCHEDULES, TUNING_SHARE, Budget, Choice, Plan, published_choice, units_of
from paper.published import BASELINES, MODELS, UNITS
from paper.report import shown, write_report
from paper.rows import (
    EXPERIMENT,
    TOLD,
    Row,
    about,
    from_folder,
    from_folders,
    from_mlflow,
    merged,
    read_rows,
    tag,
    write_rows,
)
from paper.turns import Interrupts, Notes, Training, take_turns, this_machine, training

CHARACTERS = 9_000_000.0  # of models of 1.2 M parameters about ten minutes on two cores
RATES = {"rmsprop": (1 / 3, 1.0, 3.0), "adam": (1e-3, 3e-3, 1e-2)}
"""Learning rates that are tried: of RMSProp times the preset's."""
TUNING_SEED = 100


class Parser(argparse.ArgumentParser):
    """A mistake is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists all flags")


def main() -> None:
    cli.run(_main)


def _main() -> None:
    own, more = _split(sys.argv[1:])
    flags = _parser().parse_args(own)
    if flags.command == "report":
        if more:
            raise UserError(f"report trains nothing: leave out -- {' '.join(more)}")
        report(flags)
        return
    _check(flags)
    data_flags = [] if flags.corpus_file is None else ["--corpus-file", str(flags.corpus_file)]
    plan = Plan(flags.folder, _budget(flags), data_flags, more)
    try:
        with FileLock(flags.folder / ".lock", timeout=0):
            (tune if flags.command == "tune" else run)(flags, plan)
    except Timeout as error:
        raise UserError(f"{flags.folder} is trained in by another paper_tables.py: wait for it") from error


# ------------------------------------------------------------------------------------------------------------ tune


def tune(flags: argparse.Namespace, plan: Plan) -> None:
    """Tries what is asked for on each unit's stack and keeps, of all that was ever tried, the best in tuned.json."""
    rates = flags.learning_rates
    if rates is not None and len(flags.optimizers) > 1:
        raise UserError("--learning-rates are of one optimizer: give it with --optimizers")
    trials: list[Training] = []
    for unit in dict.fromkeys(flags.units):
        model = BASELINES[unit]
        for optimizer in flags.optimizers:
            scale = preset(model).optimization.learning_rate if optimizer == "rmsprop" else 1.0
            for rate in rates or [float(f"{factor * scale:.2g}") for factor in RATES[optimizer]]:
                choice = Choice(optimizer, rate, flags.schedule, "tuned")
                name = f"tune-{model}-{optimizer}-{rate:g}-{flags.schedule}-seed-{flags.seed}"
                trials.append(
                    training(
                        *[plan, model, flags.seed, choice],
                        part=TUNING_SHARE,
                        valid_every=flags.valid_every,
                        experiment=f"{EXPERIMENT}-tune",
                        name=name,
                    )
                )
    notes = Notes(plan.folder, this_machine(flags.threads), alone=False)
    with Interrupts().listening() as interrupts:
        for trial in trials:
            if _exploded(plan, trial):
                continue
            take_turns([trial], 0.0, flags.threads, notes, interrupts)
            _keep_trial(plan, trial)
    for unit in dict.fromkeys(flags.units):
        found = plan.choice(unit)
        edge = _edge(unit, plan.tuned()[unit])
        print(f"{UNITS[unit]}: {found} for all its models (validation of {BASELINES[unit]}){edge}")


def _keep_trial(plan: Plan, trial: Training) -> None:
    """Enters a trial into tuned.json, with its validation alone."""
    unit = MODELS[trial.model].unit
    summary = trial.folder.read_summary() or {}
    entry = _named(trial) | {"budget": str(trial.budget)}
    entry["valid_bpc"] = summary["valid_bpc"] if trial.finished else None  # None: the loss exploded
    found = plan.tuned()
    tried = [each for each in found.get(unit, {}).get("tried", []) if not _named(trial).items() <= each.items()]
    tried = sorted([*tried, entry], key=lambda each: [str(each["optimizer"]), each["learning_rate"]])
    good = [each for each in tried if each["valid_bpc"] is not None]
    best: dict[str, Any] = min(good, key=lambda each: each["valid_bpc"]) if good else {}
    write_json(plan.folder / "tuned.json", found | {unit: {"model": trial.model, **best, "tried": tried}})


def _named(trial: Training) -> dict[str, Any]:
    """What tells a unit's trials apart."""
    names = ("optimizer", "learning_rate", "schedule")
    return {name: getattr(trial.choice, name) for name in names} | {"seed": trial.seed}


def _exploded(plan: Plan, trial: Training) -> bool:
    """Whether it has been tried and would come to the same end."""
    tried = plan.tuned().get(MODELS[trial.model].unit, {}).get("tried", [])
    return any(each["valid_bpc"] is None and _named(trial).items() <= each.items() for each in tried)


def _edge(unit: str, found: dict[str, Any]) -> str:
    """A warning if the best of the rates that were tried is the lowest or the highest."""
    same = [each for each in found["tried"] if all(each[n] == found[n] for n in ("optimizer", "schedule", "seed"))]
    rates = sorted(each["learning_rate"] for each in same)
    if found["learning_rate"] not in (rates[0], rates[-1]):
        return ""
    further = found["learning_rate"] / 3 if found["learning_rate"] == rates[0] else 3 * found["learning_rate"]
    more = f"--units {unit} --optimizers {found['optimizer']} --learning-rates {further:.2g}"
    more += f" --schedule {found['schedule']}" * (found["schedule"] != "constant")
    more += f" --seed {found['seed']}" * (found["seed"] != TUNING_SEED)
    return f"; it is at the edge of what was tried: try {more} too"


# ------------------------------------------------------------------------------------------------------------- run


def run(flags: argparse.Namespace, plan: Plan) -> None:
    """Trains the models of a seed in turns, seed after seed, and enters each finished one into the JSON and MLflow."""
    choices = {model: _choice(flags, plan, model) for model in dict.fromkeys(flags.models)}
    notes = Notes(plan.folder, this_machine(flags.threads), alone=flags.alone)
    failed: list[Training] = []
    with Interrupts().listening() as interrupts:
        for seed in dict.fromkeys(flags.seeds):
            trainings = [
                training(plan, model, seed, choice, valid_every=flags.valid_every, experiment=EXPERIMENT)
                for model, choice in choices.items()
            ]
            failed += take_turns(trainings, flags.turn, flags.threads, notes, interrupts)
            _enter([each for each in trainings if each not in failed], plan, flags)
    if failed:
        names = ", ".join(each.folder.path.name for each in failed)
        raise RunFailed(f"{names}: the loss is not finite; a lower --learning-rate needs another folder")


def _choice(flags: argparse.Namespace, plan: Plan, model: str) -> Choice:
    if flags.published:
        if flags.optimizer or flags.learning_rate is not None or flags.schedule:
            raise UserError("--published is an optimizer, a rate and a schedule: leave out the others")
        return published_choice(model)
    if flags.learning_rate is None:
        if flags.optimizer or flags.schedule:
            raise UserError("--optimizer and --schedule by hand go with --learning-rate: add it")
        return plan.choice(MODELS[model].unit)
    if not flags.optimizer:
        raise UserError("--learning-rate by hand goes with --optimizer: add rmsprop or adam")
    return Choice(flags.optimizer, flags.learning_rate, flags.schedule or "constant")


def _enter(finished: Sequence[Training], plan: Plan, flags: argparse.Namespace) -> None:
    rows = []
    for each in finished:
        told = about(plan, each)
        write_json(each.folder.path / TOLD, told)
        rows.append(from_folder(told, each.folder))
        if "--no-mlflow" not in plan.flags and (why := tag(told, each.folder.path)):
            cli.say(f"note: MLflow does not know what {each.folder.path.name} is of: {why}")
    if flags.json is not None:
        write_rows(flags.json, rows)
    print(shown(merged(rows)))


# ---------------------------------------------------------------------------------------------------------- report


def report(flags: argparse.Namespace) -> None:
    rows: list[Row] = []
    for source in flags.sources:
        rows += from_folders(source) if source.is_dir() else read_rows(source)
    for uri in flags.tracking_uris:
        rows += from_mlflow(uri, flags.experiment)
    if not flags.sources and not flags.tracking_uris:
        raise UserError("nothing to report: give a folder, a JSON file of rows, or --tracking-uris")
    rows = merged(rows)
    write_report(rows, flags.output, flags.levels)
    print(shown(rows))
    print(f"report: {flags.output / 'results.md'}")


# ----------------------------------------------------------------------------------------------------------- flags


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("tune", "an optimizer and a learning rate for each unit, on its stack"),
        ("run", "train models of the table"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("folder", type=Path)
        command.add_argument("--corpus-file", type=Path, help="the text (default: enwik8, which is fetched)")
        budget = command.add_mutually_exclusive_group()
        for kind, help_ in (
            ("characters", f"to train each model on (default {CHARACTERS:,.0f})"),
            ("updates", "of each model"),
            ("epochs", "of each model"),
            ("seconds", "of updates of each model"),
        ):
            budget.add_argument(f"--{kind}", type=float, help=f"{help_}; tune takes a fifth")
        command.add_argument("--valid-every", type=int, default=0, help="updates (default: 20 times in all)")
        command.add_argument("--threads", type=int, default=cli.cores(), help="of a training")
        if name == "tune":
            command.add_argument("--units", nargs="+", default=list(BASELINES))
            command.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
            command.add_argument("--learning-rates", type=float, nargs="+", help="added to what was tried before")
            command.add_argument("--schedule", choices=SCHEDULES, default="constant")
            command.add_argument("--seed", type=int, default=TUNING_SEED, help="one that run does not use")
            continue
        command.add_argument("--models", nargs="+", default=list(MODELS))
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        command.add_argument("--optimizer", choices=OPTIMIZERS, help="by hand, for these models")
        command.add_argument("--learning-rate", type=float, help="by hand")
        command.add_argument("--schedule", choices=SCHEDULES, help="by hand (default constant)")
        command.add_argument("--published", action="store_true", help="the presets' optimizer and rate")
        command.add_argument("--turn", type=float, default=2.0, help="minutes; 0: each model to its end")
        command.add_argument("--alone", action="store_true", help="your word: nothing else runs on this machine")
        command.add_argument("--json", type=Path, help="file of rows to add to")
    command = commands.add_parser("report", help="tables and pictures of what has finished")
    command.add_argument("sources", type=Path, nargs="*", help="folders of run, and JSON files of rows")
    command.add_argument("--tracking-uris", nargs="+", default=[])
    command.add_argument("--experiment", default=EXPERIMENT)
    command.add_argument("--levels", type=float, nargs="+", default=[], help="validation BPCs (default: from the data)")
    command.add_argument("--output", type=Path, default=Path("report"))
    return parser


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """This script's flags, and those after --."""
    place = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])


def _budget(flags: argparse.Namespace) -> Budget:
    for kind in ("characters", "updates", "epochs", "seconds"):
        if getattr(flags, kind) is not None:
            return Budget(kind, getattr(flags, kind))
    return Budget("characters", CHARACTERS)


def _check(flags: argparse.Namespace) -> None:
    """Raises UserError for what is wrong whatever the folder."""
    for name, least in (("threads", 1), ("valid_every", 0), ("turn", 0)):
        value = getattr(flags, name, least)
        if not value >= least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    json_file = getattr(flags, "json", None)
    if json_file is not None:
        cli.check_writable("--json", json_file)
        if json_file.exists():
            read_rows(json_file)
    for model in getattr(flags, "models", []):
        if model not in MODELS:
            raise UserError(f"{model} is no model of the paper's table; give some of {' '.join(MODELS)}")
    units_of(getattr(flags, "units", []))


if __name__ == "__main__":
    main()
