"""One point, measured by every process of its group: real training, timed update by update in steady state.

    env RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as the DeepSpeed launcher, run.py and srun set them

On a CPU a process waits in its collectives, which are timed where they are called. On a GPU they run beside other work:
what nothing hides of them is read from a profiler's trace of a few updates more (exposed.py). All else is the same.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from gfrnn.config import Stopped, UserError
from gfrnn.scaling.folder import Result, StudyFolder
from gfrnn.scaling.grid import How, config_path, prepared, round_of, updates_in_a_row
from gfrnn.scaling.records import PARTS, Machine, Measurement, Point, Products
from gfrnn.scaling.volume import predicted
from gfrnn.training.ds_config import load_ds_config
from gfrnn.training.memory import estimate

if TYPE_CHECKING:
    import torch

    from gfrnn.scaling.phases import Stopwatch
    from gfrnn.training.loop import Trainer

_TRACED = 3  # updates in a profiler's trace, on a GPU
_PRODUCTS_SECONDS = 1.0  # after each row of updates
_NOISE_DECAY = 0.95


@dataclass
class Own:
    """What one process saw of its updates."""

    seconds: list[float] = field(default_factory=list)
    """Of each timed update, in order."""
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    """Seconds by part, of all of them."""
    peak_flops: list[float] = field(default_factory=list)
    """FLOP/s of large products, after each row of updates."""
    products: list[Products] = field(default_factory=list)
    """After each row of updates, of the point's rows and of others."""
    memory: int = 0
    """Bytes at most."""
    joules: float | None = 0.0
    """Of all timed updates."""

    def update(self, stopwatch: Stopwatch, trainer: Trainer) -> None:
        """Makes an update and adds it."""
        parts = stopwatch.timed(lambda: one_update(trainer))
        self.seconds.append(sum(parts.values()))
        for name, seconds in parts.items():
            self.parts[name] += seconds

    def uncover(self, exposed: dict[str, float]) -> None:
        """Moves seconds an update that collectives alone took, by phase, to their own part."""
        for name, seconds in exposed.items():
            moved = min(self.parts[name], seconds * len(self.seconds))
            self.parts[name] -= moved
            self.parts["communication"] += moved


def measure(study: StudyFolder, point: Point) -> None:
    """As one process of the point's group; the first writes the result. Raises UserError for what cannot be."""
    from gfrnn.scaling.collectives import Watch

    watch = Watch()  # before the process group

    import torch
    import torch.distributed as dist

    from gfrnn.data import load_corpus
    from gfrnn.runs import RunFolder
    from gfrnn.scaling.phases import Stopwatch
    from gfrnn.scaling.sweep import sweep
    from gfrnn.training.engine import init_distributed
    from gfrnn.training.loop import Trainer

    how, folder = study.how, study.of(point) / "run"
    written = load_ds_config(config_path(point.ds_config))
    settings, config = prepared(point, how, folder)
    theory = copy.deepcopy(config)  # DeepSpeed changes its own
    corpus = load_corpus(settings)
    corpus.prepare(settings.batch)
    device = init_distributed(timedelta(minutes=how.limit))
    if dist.get_world_size() != point.world_size:
        raise UserError(f"{point.name} is for {point.world_size} processes, these are {dist.get_world_size()}")

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    stopwatch = Stopwatch(watch, settle)
    trainer = Trainer(settings, config, RunFolder(folder), corpus, device, stopwatch)
    own = timed(trainer, stopwatch, how)
    traffic = watch.traffic
    if device.type == "cuda":
        own.uncover(_traced(trainer))
    everyone: list[Own | None] = [None] * point.world_size
    dist.all_gather_object(everyone, own)
    trained = _trained(trainer, how.train_updates) if how.train_updates else {}
    network = sweep(device, nodes=point.nodes, seconds=how.sweep_seconds) if how.sweep_seconds else []
    if dist.get_rank() != 0:
        dist.barrier()  # the first must be able to write: a launcher ends all with the first that ends
        return
    counted = len(own.seconds)
    shapes = list(trainer.shards.shapes.values())
    elements = [shape.numel() for shape in shapes]
    memory = estimate(settings, theory, point.world_size, updates_alone=True)
    measurement = Measurement(
        point,
        machine(device, how),
        **combined([each for each in everyone if each is not None], round_of(settings)),
        calls={kind: each.calls // counted for kind, each in traffic.items()},
        bytes={kind: each.bytes // counted for kind, each in traffic.items()},
        predicted_bytes=predicted(theory, elements, settings, shapes=shapes, world_size=point.world_size),
        predicted_memory_bytes=memory.total,
        characters=trainer.task.characters(trainer.position.step),
        flops=trainer.task.flops(trainer.position.step),
        parameters=trainer.parameters,
        config=written,
        **trained,
    )
    study.write(Result(measurement, tuple(network)))
    dist.barrier()


def one_update(trainer: Trainer) -> None:
    """Raises Stopped if somebody asks for it."""
    stop = trainer.update().stop
    if stop:
        raise Stopped(f"{stop}; the point is measured again by the same command")


def timed(trainer: Trainer, stopwatch: Stopwatch, how: How) -> Own:
    """Warms up, then times rows of updates; collective."""
    import torch.distributed as dist

    from gfrnn.nn import LanguageModel
    from gfrnn.scaling.energy import EnergyCounter
    from gfrnn.scaling.products import ProductTimer
    from gfrnn.training.flops import gemm_peak

    own, watch, counter = Own(), stopwatch.watch, EnergyCounter(trainer.device)
    batch = trainer.settings.batch
    dtype = trainer.products_dtype
    timer: ProductTimer | None = None
    rows = math.ceil(math.ceil(batch.rows / dist.get_world_size()) / batch.accumulation)
    for _ in range(how.warm_up):
        one_update(trainer)
    watch.traffic = {}
    for _ in range(how.repeats):
        gc.collect()
        one_update(trainer)  # all begin together: it ends with a collective, but for local updates
        before = counter.joules()
        watch.on = True
        for _ in range(updates_in_a_row(trainer.settings, how)):
            own.update(stopwatch, trainer)
        watch.on = False
        after = counter.joules()
        spent = None if before is None or after is None else after - before
        own.joules = None if own.joules is None or spent is None else own.joules + spent
        own.memory = own.memory or trainer.peak_memory()  # of training: products come after
        dist.barrier()
        own.peak_flops.append(gemm_peak(trainer.device, dtype))  # all at once, as they train
        if timer is None:  # its copies of the weights must not count as training's memory
            assert isinstance(trainer.plain_model, LanguageModel)
            timer = ProductTimer(trainer.plain_model, dtype)
        own.products += timer.times(rows, _PRODUCTS_SECONDS)
    return own


def _trained(trainer: Trainer, updates: int) -> dict[str, Any]:
    """Fields of a Measurement after so many updates in all; collective.

    The noise scale is looked at from here on: what that takes is not in the updates that were timed.
    """
    from gfrnn.training.noise_scale import NoiseScale, PartNorms

    if trainer.world_size > 1 and trainer.settings.communication.compression == "none":
        trainer.noise, trainer.parts = NoiseScale(_NOISE_DECAY), PartNorms(trainer.shards.parameters.values())
    while trainer.position.step < updates:
        one_update(trainer)
    return {
        "bpc": trainer.score()["bpc"],
        "noise_scale": trainer.noise.value if trainer.parts is not None else None,
        "trained_updates": updates,
    }


def _traced(trainer: Trainer) -> dict[str, float]:
    """Seconds an update that collectives alone took, by phase, from a trace."""
    from torch.profiler import ProfilerActivity, profile

    from gfrnn.scaling.exposed import exposed
    from gfrnn.scaling.phases import TIMED

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(_TRACED):
            one_update(trainer)
    return {name: seconds / _TRACED for name, seconds in exposed(trace.events(), TIMED).items()}


def combined(everyone: list[Own], together: int = 1) -> dict[str, Any]:
    """Fields of a Measurement that come from all processes, in the order of their ranks.

    together: updates that are alike only in sum, and within which processes do not wait for each other; quartiles are
    of their means.
    """
    updates = len(everyone[0].seconds)
    means = [
        [statistics.fmean(own.seconds[first : first + together]) for first in range(0, updates, together)]
        for own in everyone
    ]
    rounds = [max(each) for each in zip(*means, strict=True)]
    low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else rounds * 3
    joules = [own.joules for own in everyone if own.joules is not None]
    return {
        "updates": updates,
        "step_seconds": middle,
        "step_seconds_low": low,
        "step_seconds_high": high,
        "parts": {name: statistics.fmean(own.parts[name] for own in everyone) / updates for name in PARTS},
        "busy_seconds": tuple((sum(own.seconds) - own.parts["communication"]) / updates for own in everyone),
        "memory_bytes": max(own.memory for own in everyone),
        "peak_flops": sum(statistics.median(own.peak_flops) for own in everyone),
        "products": _products(everyone),
        "joules": sum(joules) / updates if len(joules) == len(everyone) else None,
    }


def _products(everyone: list[Own]) -> tuple[Products, ...]:
    """Of the rows that all processes have got to: means over them of medians."""
    by_rows: dict[int, list[Products]] = {}
    for own in everyone:
        for rows in {each.rows for each in own.products}:
            times = [each for each in own.products if each.rows == rows]
            by_rows.setdefault(rows, []).append(Products.summary(times, statistics.median))
    return tuple(
        Products.summary(medians, statistics.fmean)
        for _, medians in sorted(by_rows.items())
        if len(medians) == len(everyone)
    )


def machine(device: torch.device, how: How) -> Machine:
    """This one."""
    import deepspeed
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Machine(name, torch.get_num_threads(), how.network, torch.__version__, deepspeed.__version__)


def failed(study: StudyFolder, point: Point, reason: str) -> Result:
    """A point that has no figures; on the machine that others of the study were measured on, if there are any."""
    done = [result.measurement for other in study.points if (result := study.result(other)) is not None]
    known = [measurement.machine for measurement in done if not measurement.failed]
    where = known[0] if known else Machine("", study.how.threads, study.how.network)
    return Result(Measurement(point, where, failed=" ".join(reason.split()) or "no reason was given"))
