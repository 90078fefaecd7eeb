"""What a study is made of: points of its grid, what was measured at them, and timed collectives.

Point        what is trained, on how many processes, and how
Machine      where it was measured
Measurement  both, and the figures; or why there are none
Products     what a time step's products took there and then, by rows
Timed        one collective of one size, on the same machines
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

PARTS = ("forward", "backward", "communication", "optimizer", "other")
"""Of an update's time, one after another. communication: what the process waited for it, not what others hid."""


@dataclass(frozen=True)
class Point:
    """One point of the grid."""

    preset: str = "gf-lstm-5x700"
    ds_config: str = "z0"
    """A file of ds_configs/ by its stem, or a path."""
    world_size: int = 1
    """Processes, evenly on the nodes."""
    nodes: int = 1
    rows: int = 100
    """Global rows R."""
    steps: int = 100
    """Segment length T."""
    dtype: str = "fp32"
    compression: str = "none"
    """Of gradients on the wire: none, bf16, powersgd, topk; or local: updates of each process alone, then averaged."""

    @property
    def name(self) -> str:
        """Fit for a folder."""
        return (
            f"{self.preset}-{self.ds_config.replace('/', '_')}-{self.nodes}x{self.world_size // self.nodes}"
            f"-rows{self.rows}-steps{self.steps}-{self.dtype}"
            + ("" if self.compression == "none" else f"-{self.compression}")
        )


@dataclass(frozen=True)
class Machine:
    """Where points were measured. Measurements with the same `network` and `device` may be compared."""

    device: str
    """cpu, or the GPU's name."""
    threads: int
    """Threads a process has for products (CPU)."""
    network: str = ""
    """What the user calls the machine or its network: 10gbit, say."""
    torch: str = ""
    deepspeed: str = ""


@dataclass(frozen=True)
class Products:
    """Of one time step, a micro-batch of so many rows and one process, while all did the same: seconds."""

    rows: int
    forward: float
    backward: float
    """Those that a time step waits for: the states' gradients, not the weights'."""

    @staticmethod
    def summary(several: Sequence[Products], of: Callable[[Sequence[float]], float]) -> Products:
        """Of one or more times of the same rows: their mean, or median, by side."""
        return Products(
            several[0].rows, of([each.forward for each in several]), of([each.backward for each in several])
        )


@dataclass(frozen=True)
class Measurement:
    """A point's figures, of an update in steady state."""

    point: Point
    machine: Machine
    failed: str = ""
    """Why there are no figures: a point that cannot run is a result as well."""
    updates: int = 0
    """That were timed."""
    step_seconds: float = 0.0
    """Median of an update, of the slowest process; with local updates of means over as many as have one averaging."""
    step_seconds_low: float = 0.0
    """Lower quartile."""
    step_seconds_high: float = 0.0
    """Upper quartile."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds by part (PARTS), means over the processes; they add up to the update's mean."""
    busy_seconds: tuple[float, ...] = ()
    """By rank: an update without what it waited for the others. How far they lie apart is what stragglers cost."""
    calls: dict[str, int] = field(default_factory=dict)
    """Collectives an update, by kind (volume.py)."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Of whole messages an update, by kind."""
    predicted_bytes: dict[str, int] = field(default_factory=dict)
    """The same by theory."""
    memory_bytes: int = 0
    """Peak of the process that took most."""
    predicted_memory_bytes: int = 0
    characters: int = 0
    """An update, of all processes."""
    flops: int = 0
    """An update, of all processes: by formula, counted once."""
    peak_flops: float = 0.0
    """FLOP/s of large products there and then, of all processes."""
    products: tuple[Products, ...] = ()
    """By rows, in rising order: of the point's own rows of a micro-batch and of others. None: not timed."""
    parameters: int = 0
    joules: float | None = None
    """An update, of all GPUs; none where they do not report it."""
    noise_scale: float | None = None
    """Gradient noise scale in characters, if the point was trained for it."""
    bpc: float | None = None
    """Validation bits a character after `trained_updates`, if the point was trained for it."""
    trained_updates: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    """The content of the point's ds_config; earlier versions did not keep it."""

    @property
    def characters_per_second(self) -> float:
        return self.characters / self.step_seconds

    @property
    def mfu(self) -> float:
        """Share of the products' peak."""
        return self.flops / self.step_seconds / self.peak_flops

    @property
    def communication_share(self) -> float:
        """Of an update's time."""
        return self.parts["communication"] / sum(self.parts.values())


@dataclass(frozen=True)
class Timed:
    """A collective's time: median seconds of messages of `bytes` (whole ones, as volume.py counts them)."""

    kind: str
    bytes: int
    world_size: int
    nodes: int
    seconds: float
