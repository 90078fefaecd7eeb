"""The grid of a study, from its flags to points; and a point as settings and a DeepSpeed config that train it.

Loads no torch: what contradicts itself is refused at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gfrnn.config import Corpus, Settings, UserError, preset, validate
from gfrnn.scaling.records import Point
from gfrnn.training.ds_config import load_ds_config, resolve_ds_config, stage_of

_CONFIGS = Path(__file__).parents[1] / "ds_configs"  # in a checkout a link to its folder of that name
_FOREVER = 10**9  # updates: how many are made is the measurement's to say

Dtype = Literal["fp32", "bf16"]
Changed = tuple[Settings, dict[str, Any]]


def _wire_bf16(settings: Settings, config: dict[str, Any]) -> Changed:
    if "communication_data_type" in config:
        raise UserError(
            f"--compressions bf16: {settings.deepspeed} says communication_data_type itself; take --compressions none"
        )
    return settings, config | {"communication_data_type": "bf16"}


def _compressed(kind: Literal["powersgd", "topk", "local"]) -> Callable[[Settings, dict[str, Any]], Changed]:
    def changed(settings: Settings, config: dict[str, Any]) -> Changed:
        communication = dataclasses.replace(settings.communication, compression=kind)
        return dataclasses.replace(settings, communication=communication), config

    return changed


COMPRESSIONS: dict[str, Callable[[Settings, dict[str, Any]], Changed]] = {
    "none": lambda settings, config: (settings, config),
    "bf16": _wire_bf16,
    "powersgd": _compressed("powersgd"),
    "topk": _compressed("topk"),
    "local": _compressed("local"),
}
"""What each makes of the settings and the content of a ds_config; another kind is a line here."""
_OF_WHOLE_GRADIENTS = ("powersgd", "topk", "local")  # between several processes, at stage 0


@dataclass(frozen=True)
class Grid:
    """Every combination of these is a point, but for processes that cannot be spread evenly on the nodes, or are too
    many for them, and for compressions of ZeRO stage 0 elsewhere, or with one process."""

    presets: tuple[str, ...] = ("gf-lstm-5x700",)
    """Models, of text."""
    ds_configs: tuple[str, ...] = ("z0",)
    """Files of ds_configs/ by their stems (z0 z1 z2 z3 z2_offload), or paths."""
    world_sizes: tuple[int, ...] = (1,)
    """Processes W."""
    nodes: tuple[int, ...] = (1,)
    """Nodes that they are on."""
    node_size: int = 0
    """Most processes that a node takes, its GPUs, say; 0: any number."""
    rows: tuple[int, ...] = ()
    """Global rows R of an update. Default: the preset's."""
    rows_per_process: tuple[int, ...] = ()
    """For weak scaling: rows R / W."""
    steps: tuple[int, ...] = ()
    """Segment lengths T. Default: the preset's."""
    dtypes: tuple[Dtype, ...] = ("fp32",)
    """What products are computed in."""
    compressions: tuple[str, ...] = ("none",)
    """Of gradients on the wire: none, bf16; at ZeRO stage 0 also powersgd, topk, local (docs/performance.md)."""
    scaling: Literal["strong", "weak", "both"] = "strong"
    """strong: the global rows stay as processes are added; weak: those of a process do."""


@dataclass(frozen=True)
class How:
    """How each point of a study is measured."""

    warm_up: int = 5
    """Updates before any is timed."""
    updates: int = 10
    """Updates timed in a row, or what makes whole rounds of local updates."""
    repeats: int = 3
    """Such rows, with an update and the products' peak between them."""
    sweep_seconds: float = 4.0
    """Time for single collectives of 1 KB to 64 MB, beside each point; 0: none."""
    train_updates: int = 0
    """Train each point on to so many updates, and note its validation BPC and gradient noise scale; 0: no. It is
    what less on the wire costs, and what rows are worth."""
    limit: Annotated[float, tyro.conf.arg(metavar="MINUTES")] = 30.0
    """A point that takes longer is given up."""
    threads: int = 1
    """Threads of a process for products, on a CPU. Under SLURM: --cpus-per-task."""
    corpus: Corpus = "enwik8-1m"
    """What is read: enwik8-1m comes with the package."""
    corpus_file: Path | None = None
    """A text of your own."""
    network: str = ""
    """What you call the machines or their network: 10gbit, say."""

    def check(self) -> None:
        """Raises UserError."""
        for name, least in (
            ("updates", 1),
            ("repeats", 1),
            ("threads", 1),
            ("warm_up", 0),
            ("sweep_seconds", 0),
            ("train_updates", 0),
        ):
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} is {getattr(self, name)}; it must be {least} or more")
        if not self.limit > 0:
            raise UserError(f"--limit is {self.limit}; it must be more than 0 minutes")


def expand(grid: Grid, how: How) -> list[Point]:
    """The grid's points, each once, in the order of its flags. Raises UserError, in one line, for contradictions."""
    _check(grid)
    found: dict[Point, None] = {}
    for name in grid.presets:
        settings = preset(name)
        if settings.task != "text":
            raise UserError(f"--presets {name} is a model of programs; a study measures models of text")
        for config in grid.ds_configs:
            for nodes in grid.nodes:
                for world_size in grid.world_sizes:
                    if not _fits(grid, world_size, nodes):
                        continue
                    compressions = _compressions(grid, world_size, config)
                    for rows in _rows(grid, settings, world_size):
                        for steps in grid.steps or (settings.batch.steps,):
                            for dtype in grid.dtypes:
                                for compression in compressions:
                                    point = Point(
                                        name, _spelled(config), world_size, nodes, rows, steps, dtype, compression
                                    )
                                    found[point] = None
    points = list(found)
    if not points:
        raise UserError("nothing is left in the grid: give each flag at least one value")
    for point in points:
        prepared(point, how, Path("study"))
    return points


def _fits(grid: Grid, world_size: int, nodes: int) -> bool:
    """Whether so many processes have equal shares on so many nodes, and none too many."""
    return world_size % nodes == 0 and (grid.node_size == 0 or world_size // nodes <= grid.node_size)


def _check(grid: Grid) -> None:
    if grid.node_size < 0:
        raise UserError(f"--node-size is {grid.node_size}; it must be 0 or more")
    for name in ("world_sizes", "nodes", "rows", "rows_per_process", "steps"):
        for number in getattr(grid, name):
            if number < 1:
                raise UserError(f"--{name.replace('_', '-')} has {number}; it must be 1 or more")
    for world_size in grid.world_sizes:
        nodes = " ".join(map(str, grid.nodes))
        if grid.nodes and all(world_size % number for number in grid.nodes):
            few = "fewer processes than nodes" if world_size < min(grid.nodes) else "no equal share for each"
            raise UserError(f"--world-sizes {world_size} on --nodes {nodes}: {few}; take a multiple of the nodes")
        if grid.nodes and not any(_fits(grid, world_size, number) for number in grid.nodes):
            raise UserError(
                f"--world-sizes {world_size} on --nodes {nodes}: more than --node-size {grid.node_size} on each; "
                "take more nodes"
            )
    for compression in grid.compressions:
        if compression not in COMPRESSIONS:
            raise UserError(f"--compressions {compression} is unknown; there are {', '.join(COMPRESSIONS)}")
    if grid.scaling != "strong" and not grid.rows_per_process:
        raise UserError(f"--scaling {grid.scaling} needs --rows-per-process, the rows that stay")
    if grid.scaling == "strong" and grid.rows_per_process:
        raise UserError("--rows-per-process has no effect on --scaling strong; add --scaling weak or both")
    if grid.scaling == "weak" and grid.rows:
        raise UserError("--rows has no effect on --scaling weak; remove it, or take --scaling both")


def _rows(grid: Grid, settings: Settings, world_size: int) -> list[int]:
    """Global rows for so many processes."""
    fixed = list(grid.rows or (settings.batch.rows,)) if grid.scaling != "weak" else []
    for rows in fixed:
        if rows < world_size:
            raise UserError(f"{world_size} processes cannot share --rows {rows}: fewer --world-sizes, or more rows")
    own = grid.rows_per_process if grid.scaling != "strong" else ()
    return fixed + [rows * world_size for rows in own]


def _compressions(grid: Grid, world_size: int, config: str) -> list[str]:
    """Those of the grid that go with a config for so many processes."""
    fit = world_size > 1 and stage_of(load_ds_config(config_path(config))) == 0
    return [compression for compression in grid.compressions if fit or compression not in _OF_WHOLE_GRADIENTS]


def config_path(name: str) -> Path:
    """The file of a ds_config by its stem or path. Raises UserError."""
    if "/" in name or name.endswith(".json"):
        return Path(name)
    places = dict.fromkeys([Path("ds_configs").absolute(), _CONFIGS])
    for folder in places:
        if (folder / f"{name}.json").is_file():
            return folder / f"{name}.json"
    known = sorted({path.stem for folder in places for path in folder.glob("*.json")})
    raise UserError(f"--ds-configs {name} is unknown; there are {', '.join(known)}; or give a path")


def _spelled(config: str) -> str:
    """A path in full, as processes may be started elsewhere; a stem as it is."""
    path = config_path(config)
    return config if path.stem == config else str(path.absolute())


def prepared(point: Point, how: How, folder: Path, config: dict[str, Any] | None = None) -> Changed:
    """Settings and a resolved ds_config that train the point in a folder. Raises UserError for what cannot be.

    config: the content of the point's ds_config, where it is known without the file.
    """
    settings = preset(point.preset)
    batch = dataclasses.replace(settings.batch, rows=point.rows, steps=point.steps, dtype=_dtype(point.dtype))
    updates = how.train_updates or _FOREVER
    run = dataclasses.replace(settings.run, max_updates=updates, mlflow=False, checkpoint_minutes=0.0, time_limit=0.0)
    data = dataclasses.replace(settings.data, corpus=how.corpus, corpus_file=how.corpus_file)
    path = config_path(point.ds_config) if config is None else Path(point.ds_config)
    settings = dataclasses.replace(settings, output_dir=folder, deepspeed=path, batch=batch, run=run, data=data)
    if point.compression not in COMPRESSIONS:
        raise UserError(f"compression {point.compression} is unknown; there are {', '.join(COMPRESSIONS)}")
    written = load_ds_config(path) if config is None else config
    settings, changed = COMPRESSIONS[point.compression](settings, written)
    validate(settings)
    least = updates_for_timing(settings, how)
    if 0 < how.train_updates < least:
        raise UserError(f"--train-updates is {how.train_updates}; {least} are made for the timing alone")
    return settings, resolve_ds_config(changed, settings, world_size=point.world_size)


def round_of(settings: Settings) -> int:
    """Updates that belong together: of local ones those up to an averaging."""
    sent = settings.communication
    return sent.local_updates if sent.compression == "local" else 1


def updates_in_a_row(settings: Settings, how: How) -> int:
    """That are timed: whole rounds."""
    together = round_of(settings)
    return math.ceil(how.updates / together) * together


def updates_for_timing(settings: Settings, how: How) -> int:
    """In all: to warm up, and before each row."""
    return how.warm_up + how.repeats * (updates_in_a_row(settings, how) + 1)


def _dtype(name: str) -> Dtype:
    found: dict[str, Dtype] = {"fp32": "fp32", "bf16": "bf16"}
    if name not in found:
        raise UserError(f"dtype {name} is unknown; it must be fp32 or bf16")
    return found[name]
