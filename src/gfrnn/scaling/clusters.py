"""A cluster as a small YAML file describes it, from data sheets; cluster_presets/ has common ones to copy.

    name: 8xH100, 400 Gbit/s a GPU
    gpus_per_node: 8
    nvlink_gbytes_per_second: 450      # each way, a GPU
    nvlink_latency_us: 3
    network_gbit_per_second: 400       # each way, a GPU: a node's divided by its GPUs
    network_latency_us: 8
    bf16_tflops: 989                   # of dense products
    fp32_tflops: 67
    memory_gbytes: 80
    memory_gbytes_per_second: 3350
    dollars_per_gpu_hour: 2.5          # may be missing
    gpu: H100                          # words of its name as torch has it, by which it is known; may be missing

Units are in the keys, thousands are 1000. Anything missing, unknown, or no number that is positive and finite is a
UserError of one line with file, key and mend. Imports PyYAML when a file is read.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from gfrnn.config import UserError
from gfrnn.scaling.network import NCCL, Link, Network

_NUMBERS = {
    "gpus_per_node": "GPUs a node",
    "nvlink_gbytes_per_second": "GB/s a GPU each way to the others of its node",
    "nvlink_latency_us": "microseconds of a small message in the node",
    "network_gbit_per_second": "Gbit/s a GPU each way between nodes",
    "network_latency_us": "microseconds of a small message between nodes",
    "bf16_tflops": "TFLOP/s of dense bf16 products",
    "fp32_tflops": "TFLOP/s of fp32 products",
    "memory_gbytes": "GB of memory a GPU",
    "memory_gbytes_per_second": "GB/s that a GPU reads its memory with",
}
_PRICE, _GPU = "dollars_per_gpu_hour", "gpu"
_PRESETS = files("gfrnn.scaling") / "cluster_presets"


@dataclass(frozen=True)
class Cluster:
    """In seconds, bytes, bytes/s and FLOP/s, a GPU."""

    name: str
    gpus_per_node: int
    intra: Link
    """To the others of its node."""
    inter: Link
    """To other nodes: a GPU's share when all of a node send."""
    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    memory_bytes_per_second: float
    dollars_per_gpu_hour: float | None = None
    gpu: str = ""
    """Words of the GPU's name; "": not said."""

    def has(self, device: str) -> bool:
        """Whether its GPUs are such a device, by torch's name for it: H100 is NVIDIA H100 80GB HBM3, L4 is no L40."""
        own, words = (set(re.split("[ -]+", name)) for name in (self.gpu, device))
        return bool(self.gpu) and own <= words

    @property
    def network(self) -> Network:
        """By the data sheets, with NCCL's algorithms; how far data sheets are to be trusted is prediction.py's."""
        return Network(self.intra, self.inter, algorithms=NCCL)

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of a GPU. dtype: fp32 or bf16."""
        return {"fp32": self.fp32_flops, "bf16": self.bf16_flops}[dtype]


def cluster_presets() -> tuple[str, ...]:
    """Names that `load_cluster` knows."""
    return tuple(sorted(file.name.removesuffix(".yaml") for file in _PRESETS.iterdir() if file.name.endswith(".yaml")))


def load_cluster(name: str) -> Cluster:
    """A preset by name, or a YAML file by path."""
    if name in cluster_presets():
        return _read(_PRESETS / f"{name}.yaml", name)
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise UserError(f"{name} is no cluster; give a YAML file or one of {', '.join(cluster_presets())}")
    return _read(path, name)


def _read(file: Traversable, name: str) -> Cluster:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(cluster_presets())
        raise UserError(f"{name}: {error.strerror}; give a YAML file or one of {known}") from None
    except UnicodeDecodeError:
        raise UserError(f"{name}: not UTF-8 text; give a YAML file with lines such as gpus_per_node: 8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "a character that YAML does not have"
        raise UserError(f"{name}{where}: not YAML: {problem}; write lines such as gpus_per_node: 8") from None
    except (ValueError, RecursionError):  # a date that is none, brackets as deep
        raise UserError(f"{name}: not YAML that can be read; write lines such as gpus_per_node: 8") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: no keys with values; write lines such as gpus_per_node: 8")
    return _cluster(content, name)


def _cluster(content: dict[Any, Any], file: str) -> Cluster:
    known = ("name", *_NUMBERS, _PRICE, _GPU)
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            mend = f"did you mean {near[0]}?" if near else f"remove it; there are {', '.join(known)}"
            raise UserError(f"{file}: {key!r} is unknown; {mend}")
    for key in ("name", *_NUMBERS):
        if content.get(key) is None:
            raise UserError(f"{file}: {key} is missing; add {key}: {_NUMBERS.get(key, 'what you call the cluster')}")
    numbers = {key: _number(file, key, content[key]) for key in _NUMBERS}
    if numbers["gpus_per_node"] % 1:
        raise UserError(f"{file}: gpus_per_node is {content['gpus_per_node']!r}; give a whole number")
    price, gpu = content.get(_PRICE), content.get(_GPU)
    return Cluster(
        name=str(content["name"]),
        gpus_per_node=int(numbers["gpus_per_node"]),
        intra=Link(numbers["nvlink_latency_us"] * 1e-6, numbers["nvlink_gbytes_per_second"] * 1e9),
        inter=Link(numbers["network_latency_us"] * 1e-6, numbers["network_gbit_per_second"] * 1e9 / 8),
        bf16_flops=numbers["bf16_tflops"] * 1e12,
        fp32_flops=numbers["fp32_tflops"] * 1e12,
        memory_bytes=numbers["memory_gbytes"] * 1e9,
        memory_bytes_per_second=numbers["memory_gbytes_per_second"] * 1e9,
        dollars_per_gpu_hour=None if price is None else _number(file, _PRICE, price),
        gpu="" if gpu is None else str(gpu).strip(),
    )


def _number(file: str, key: str, value: Any) -> float:
    """A positive one; YAML reads 1e-3 as text, so text that is a number is one."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        unit = _NUMBERS.get(key, "dollars")
        raise UserError(f"{file}: {key} is {value!r}; give a number greater than 0 ({unit})")
    return number
