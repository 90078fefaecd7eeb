"""How fast a GPU is that nobody measured: from its data sheet and stated assumptions, with intervals as wide as those.

    arithmetic   large products reach 0.7 of the peak, +- 0.25: what an H100 gives to plain bf16 products
    weights      a time step and direction, the longer of two: its weights read from memory once, at 0.8 of the memory's
                 figure; or 4 L launches, one after another, of 2.5 us each: two products and two kernels a layer, as
                 CUDA graphs (docs/performance.md)
    parameter    Adam and the gradient's norm pass over 40 bytes an element
    offloaded    8 bytes an element over PCIe and the host's Adam: 1 ns together
    gather       0.2 ms of Python in DeepSpeed for each
    update       3 ms: the loop, DeepSpeed's hooks, the batch

Each of these but the first is assumed with a standard deviation of half of it.
"""

from __future__ import annotations

import numpy as np

from gfrnn.config import Settings, sizes
from gfrnn.scaling.clusters import Cluster
from gfrnn.scaling.compute import Compute, Part

_REACHED, _REACHED_DEVIATION = 0.7, 0.25
_READ = 0.8
_LAUNCH = 2.5e-6
_LAUNCHES = 4  # a layer, time step and direction
_OPTIMIZER_BYTES = 40
_OFFLOADED = 1e-9
_GATHER = 2e-4
_UPDATE = 3e-3
_DEVIATION = 0.5
_WIDTHS = {"fp32": 4, "bf16": 2}


def assumed_compute(cluster: Cluster, settings: Settings, dtype: str) -> Compute:
    """Of the settings' model on one of the cluster's GPUs. dtype: of products, fp32 or bf16."""
    weights = sizes(settings).train_flops / 6
    read = weights * _WIDTHS[dtype] / (_READ * cluster.memory_bytes_per_second)
    step = max(read, _LAUNCHES * settings.model.num_layers * _LAUNCH) / weights
    flop = 1 / (_REACHED * cluster.peak_flops(dtype))  # of 6 a weight 2 are forward's
    element = _OPTIMIZER_BYTES / cluster.memory_bytes_per_second
    parts = {
        "forward": {"arithmetic": flop / 3, "weights": step, "gather": _GATHER / 2},
        "backward": {"arithmetic": flop * 2 / 3, "weights": step, "gather": _GATHER / 2},
        "optimizer": {"parameter": element, "offloaded": _OFFLOADED},
        "other": {"update": _UPDATE},
    }
    return Compute({name: _part(terms) for name, terms in parts.items()}, weights)


def _part(terms: dict[str, float]) -> Part:
    coefficients = np.array(list(terms.values()))
    relative = [_REACHED_DEVIATION / _REACHED if name == "arithmetic" else _DEVIATION for name in terms]
    return Part(tuple(terms), coefficients, np.diag((np.array(relative) * coefficients) ** 2))
