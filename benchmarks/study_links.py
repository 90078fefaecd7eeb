"""A scaling study over two hosts whose cable is slower in turn, 10 Gbit/s to 100 Mbit/s, and whether the models hold.

    sudo python benchmarks/study_links.py runs/links                     # measures what is not done yet, then checks
    sudo python benchmarks/study_links.py runs/links --json links.json
    python src/study.py report --tracking-uris sqlite:///runs/links/mlflow.db --preset demo
    sudo python benchmarks/study_links.py runs/less --rates 100mbit --ds-configs z0 --rows 32 \
        --compressions none bf16 powersgd topk local --train-updates 300     # what sending less costs, and gains

Each rate is a study of its own (runs/links/1gbit, as study.py has them), all in one MLflow experiment; the hosts are
network namespaces with a process each, of one thread. Then groups are held out: a rate, the ZeRO configs 1 and 2, the
largest rows. What is predicted of a group comes from the others' points; of a rate's network, from collectives
that are timed on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gfrnn.runs import versions
from gfrnn.scaling import network_fit
from gfrnn.scaling.folder import Result, StudyFolder
from gfrnn.scaling.grid import Grid, How, expand
from gfrnn.scaling.group import Place, measured_here
from gfrnn.scaling.model import Model
from gfrnn.scaling.network import GLOO
from gfrnn.scaling.prediction import Residual, fit, residuals
from gfrnn.scaling.records import Measurement, Timed
from gfrnn.scaling.report_predicted import ds_config_of
from gfrnn.scaling.run import collect
from gfrnn.scaling.store import Store
from hosts import two_hosts

KEPT = ("step_seconds", "communication_share", "characters_per_second", "bytes", "bpc", "trained_updates")
"""Of a point, in the JSON."""

Results = dict[str, list[Result]]
Checked = dict[str, list[Residual]]
"""By rate: points beside what a model says that has not seen them."""


def measure(folder: Path, rate: str, args: argparse.Namespace) -> list[Result]:
    """The study of one rate; points that are done are not run again."""
    how = How(
        warm_up=3,
        updates=args.updates,
        repeats=args.repeats,
        sweep_seconds=args.sweep_seconds,
        train_updates=args.train_updates,
        network=rate,
        threads=1,
    )
    grid = Grid(
        presets=(args.preset,),
        ds_configs=tuple(args.ds_configs),
        world_sizes=(2,),
        nodes=(2,),
        rows=tuple(args.rows),
        compressions=tuple(args.compressions),
    )
    alone = dataclasses.replace(grid, world_sizes=(1,), nodes=(1,), ds_configs=("z0",), compressions=("none",))
    study = StudyFolder(folder / rate)
    study.begin([*expand(alone, how), *expand(grid, how)], how)
    store = Store(study.path, "gfrnn-study")
    with two_hosts(rate) as hosts:
        places = [Place(tuple(host.prefix), host.address, local_rank=0) for host in hosts]
        for number, point in enumerate(study.points, 1):
            if study.result(point) is not None:
                continue
            collect(study, number, measured_here(study, number, "plain", places), store)
    found = [study.result(point) for point in study.points]
    return [each for each in found if each is not None and not each.measurement.failed]


def points_table(found: Results) -> Table:
    """What each point took and, if it was trained, learned."""
    table = Table(title="Points")
    for column in ("point", "rate", "ms an update", "waiting", "MB an update", "characters/s", "BPC"):
        table.add_column(column, justify="left" if column in ("point", "rate") else "right")
    for rate, results in found.items():
        for each in (result.measurement for result in results):
            bpc = "" if each.bpc is None else f"{each.bpc:.3f}"
            sent, speed = f"{sum(each.bytes.values()) / 1e6:.2f}", f"{each.characters_per_second:,.0f}"
            step, share = f"{1e3 * each.step_seconds:.0f}", f"{each.communication_share:.0%}"
            table.add_row(each.point.name, rate, step, share, sent, speed, bpc)
    return table


# ------------------------------------------------------------------------------------------------------- held out


def model_of(results: Sequence[Result]) -> Model:
    """Of one rate's points."""
    return fit([each.measurement for each in results], sweep_of(results), ds_config_of)


def sweep_of(results: Sequence[Result]) -> list[Timed]:
    return [timed for each in results for timed in each.sweep]


def rates(found: Results) -> Checked:
    """Each rate from the others: how fast processes compute, and what they wait for beyond the network."""
    checked: Checked = {}
    for held, results in found.items() if len(found) > 1 else ():
        rest = [other for rate, other in found.items() if rate != held]
        others = [model_of(other) for other in rest]
        pooled = [  # what processes compute does not depend on the network
            dataclasses.replace(each.measurement, machine=dataclasses.replace(each.measurement.machine, network=""))
            for other in rest
            for each in other
        ]
        network = network_fit.fit(sweep_of(results), GLOO)
        model = dataclasses.replace(
            fit(pooled, sweep_of(rest[0]), ds_config_of),
            network=network,
            layouts=network_fit.fit_layouts(sweep_of(results), network, GLOO),
            exposed=least([model.exposed for model in others]),
            copying=least([model.copying for model in others]),  # what more a slow network shows is its own
        )
        checked[held] = check(model, results)
    return checked


def least(several: Sequence[dict[str, float]]) -> dict[str, float]:
    """By key."""
    return {key: min(each[key] for each in several) for key in several[0]}


def within(found: Results, held: Callable[[Measurement], bool]) -> Checked:
    """At each rate, points that are held out from those that are not."""
    checked: Checked = {}
    for rate, results in found.items():
        rest = [each for each in results if not held(each.measurement)]
        if not rest or len(rest) == len(results):
            continue
        model = fit([each.measurement for each in rest], sweep_of(rest), ds_config_of)
        checked[rate] = check(model, [each for each in results if held(each.measurement)])
    return checked


def check(model: Model, results: Sequence[Result]) -> list[Residual]:
    return residuals(model, [each.measurement for each in results], ds_config_of)


def groups(found: Results) -> dict[str, Checked]:
    largest = max(each.measurement.point.rows for results in found.values() for each in results)
    return {
        "a rate, from the other two": rates(found),
        "z1 and z2 on two hosts, from the rest": within(found, is_in_between),
        "the most rows, from fewer": within(found, lambda each: each.point.rows == largest),
    }


def is_in_between(each: Measurement) -> bool:
    return each.point.ds_config in ("z1", "z2") and each.point.world_size > 1


def off(found: Results) -> float:
    """Most that theory's bytes are off those counted."""
    several = [e.measurement for results in found.values() for e in results if e.measurement.point.world_size > 1]
    return max(abs(sum(each.predicted_bytes.values()) / sum(each.bytes.values()) - 1) for each in several)


def sizes(errors: Sequence[float]) -> list[str]:
    """The median's and the worst's."""
    return [f"{statistics.median(map(abs, errors)):.1%}", f"{max(map(abs, errors)):.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rates", nargs="+", default=["10gbit", "1gbit", "100mbit"])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--ds-configs", nargs="+", default=["z0", "z1", "z2", "z3"])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--compressions", nargs="+", default=["none"])
    parser.add_argument("--train-updates", type=int, default=0)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sweep-seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {rate: measure(args.folder, rate, args) for rate in args.rates}
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(points_table(found))
    caption = f"bytes: theory is {off(found):.2%} off those counted at most"
    table = Table(title="Held out", caption=caption)
    for column in ("what", "rate", "points", "median error", "worst", "inside 90 %"):
        table.add_column(column, justify="left" if column in ("what", "rate") else "right")
    kept: dict[str, Any] = {}
    for what, by_rate in groups(found).items():
        everywhere: list[float] = []
        for rate, checked in by_rate.items():
            errors = [each.error for each in checked]
            everywhere += errors
            inside = sum(each.inside for each in checked)
            table.add_row(what, rate, str(len(checked)), *sizes(errors), str(inside))
            kept.setdefault(what, {})[rate] = [
                {
                    "point": each.measurement.point.name,
                    "measured_s": each.measurement.step_seconds,
                    "predicted_s": each.prediction.step_seconds,
                    "low_s": each.prediction.low,
                    "high_s": each.prediction.high,
                    "error": each.error,
                }
                for each in checked
            ]
        if everywhere:
            table.add_row("", "all", str(len(everywhere)), *sizes(everywhere))
        table.add_section()
    if kept:
        console.print(table)
    if args.json is not None:
        about = {"versions": versions(), "date": time.strftime("%Y-%m-%d"), "bytes_off": off(found)}
        points = [
            {"rate": rate, "point": each.point.name, **{name: getattr(each, name) for name in KEPT}}
            for rate, results in found.items()
            for each in (result.measurement for result in results)
        ]
        args.json.write_text(json.dumps({"about": about, "points": points, "held_out": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
