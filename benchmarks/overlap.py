"""What it is worth that weight gradients are made a layer at a time: two processes over a slow link, in turns.

    sudo python benchmarks/overlap.py --json overlap.json --plot overlap.png     # two network namespaces, 1 Gbit/s
    python benchmarks/overlap.py --rate 0                                        # this machine's loopback, no root
    python benchmarks/overlap.py --engine deepspeed --stage 2

"apart": a node of the graph for each layer, as gfrnn.nn has it. "together": the same gradients, handed on when the last
is made, as from one node for all. In one run, alternating, the same bytes in the same messages. The engine is
torch's DDP, whose gloo runs beside the computation; DeepSpeed's calls wait for gloo, and overlap on CUDA streams alone:
with it this shows when each reduction is asked for. A step is forward and backward, reductions included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gfrnn.cli import keep_freed_memory
from gfrnn.config import Settings, preset
from gfrnn.nn import LanguageModel, build_language_model, gradients
from gfrnn.runs import versions
from hosts import Host, two_hosts
from ranks import printed_by_first

MODES = ("apart", "together")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Gradients of all layers are made before the first is handed on."""
    take = gradients.WeightGradients.take
    made: dict[int, Any] = {}

    def take_all(self: gradients.WeightGradients, layer: int) -> Any:
        if layer not in made:
            made.update({j: take(self, j) for j in sorted(self.left, reverse=True)})
        return made.pop(layer)

    with mock.patch.object(gradients.WeightGradients, "take", take_all):
        yield


class Loss(nn.Module):
    """Of one segment."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, symbols: Tensor) -> Tensor:
        logits, _ = self.model(symbols[:-1])
        return F.cross_entropy(logits.flatten(0, 1), symbols[1:].flatten())


class Timeline:
    """Seconds from the start of a step at which things began and ended."""

    def __init__(self) -> None:
        self.start = 0.0
        self.spans: list[tuple[str, float, float]] = []

    def begin(self) -> None:
        self.start, self.spans = time.perf_counter(), []

    def now(self) -> float:
        return time.perf_counter() - self.start

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = self.now()
        yield
        self.spans.append((name, begin, self.now()))


def watch_layers(timeline: Timeline) -> None:
    """Every layer's weight gradients, as they are made."""
    layer = gradients._Products.layer

    def watched(self: Any, j: int, *args: Any) -> Any:
        with timeline.span(f"layer {j + 1}"):
            return layer(self, j, *args)

    gradients._Products.layer = watched  # type: ignore[method-assign]


def with_ddp(loss: Loss, timeline: Timeline) -> Any:
    """step() by torch's DistributedDataParallel, a bucket about a layer."""
    layer = sum(p.numel() for n, p in loss.named_parameters() if n.endswith("_l1")) * 4
    engine = nn.parallel.DistributedDataParallel(loss, bucket_cap_mb=layer / 2**20, gradient_as_bucket_view=True)

    def reduce(_, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are text
        begin = timeline.now()
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        assert work is not None

        def done(future: Any) -> Tensor:
            timeline.spans.append(("reduction", begin, timeline.now()))
            return future.value()[0]

        return work.get_future().then(done)

    engine.register_comm_hook(None, reduce)

    def step(symbols: Tensor) -> None:
        engine(symbols).backward()
        loss.zero_grad(set_to_none=False)

    return step


def with_deepspeed(loss: Loss, timeline: Timeline, settings: Settings, stage: int) -> Any:
    """step() by DeepSpeed, its buckets as gfrnn sets them."""
    import deepspeed.comm

    from gfrnn.training.ds_config import resolve_ds_config
    from gfrnn.training.engine import build_optimizer, initialize

    config = resolve_ds_config({"zero_optimization": {"stage": stage}}, settings, world_size=dist.get_world_size())
    engine = initialize(loss, build_optimizer(loss, settings.optimization), config)
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter_fn"):
        call = getattr(deepspeed.comm, name)

        def watched(*args: Any, call: Any = call, **kwargs: Any) -> Any:
            with timeline.span("reduction"):
                return call(*args, **kwargs)

        setattr(deepspeed.comm, name, watched)

    def step(symbols: Tensor) -> None:
        engine.backward(engine(symbols))
        engine.optimizer.zero_grad() if stage else engine.zero_grad()

    return step


def work(args: argparse.Namespace) -> None:
    """One process. The first prints what it measured as JSON."""
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    if args.engine == "ddp":
        dist.init_process_group("gloo")
    else:
        from gfrnn.training.engine import init_distributed

        init_distributed()
    timeline = Timeline()
    watch_layers(timeline)
    settings = preset(args.preset)
    loss = Loss(build_language_model(settings.model, "fp32", 0))
    step = with_ddp(loss, timeline) if args.engine == "ddp" else with_deepspeed(loss, timeline, settings, args.stage)
    symbols = torch.randint(0, 256, (args.steps + 1, args.rows))
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    spans: dict[str, list[tuple[str, float, float]]] = {}
    for repeat in range(-2, args.repeats):  # DDP arranges its buckets after the first
        for mode in MODES:
            dist.barrier()
            timeline.begin()
            with together() if mode == "together" else contextlib.nullcontext():
                step(symbols)
            took = timeline.now()
            if repeat >= 0:
                seconds[mode].append(took)
                if took <= min(seconds[mode]):
                    spans[mode] = timeline.spans
    if dist.get_rank() == 0:
        print(json.dumps({"seconds": seconds, "spans": spans}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a tear-down


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both processes; what the first measured."""
    here = contextlib.nullcontext([Host("", "127.0.0.1", "lo")] * 2)
    with here if args.rate == "0" else two_hosts(args.rate) as hosts:
        processes = []
        for rank, host in enumerate(hosts):
            where = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": 2,
                "MASTER_ADDR": hosts[0].address,
                "MASTER_PORT": args.port,
            }
            names = {"GLOO_SOCKET_IFNAME": host.interface, "OMP_NUM_THREADS": args.threads}
            environment = os.environ | {name: str(value) for name, value in (where | names).items()}
            command = [*host.prefix, sys.executable, *sys.argv, "--work"]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        found: dict[str, Any] = printed_by_first(processes)
    return found


def summarize(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By mode: the median step and its spread; of the fastest step, when reductions begin, when the last layer's
    gradients are made, and how long reductions take after that."""
    results = {}
    for mode, seconds in found["seconds"].items():
        spans = found["spans"][mode]
        computed = max(end for name, _, end in spans if name != "reduction")
        reductions = [(begin, end) for name, begin, end in spans if name == "reduction"]
        results[mode] = {
            "step_s": statistics.median(seconds),
            "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
            "first_reduction_s": min(begin for begin, _ in reductions),
            "last_layer_s": computed,
            "waited_s": max(0.0, max(end for _, end in reductions) - computed),
        }
    return results


def plot(found: dict[str, Any], title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 2.9), layout="constrained")
    rows, labels = [], []
    for number, mode in enumerate(MODES):
        for offset, kind, color in ((0, "layer", "#2f6fb0"), (1, "reduction", "#c8743c")):
            y = -(number * 2.4 + offset)
            rows.append(y)
            labels.append(f"{mode}: {'weight gradients' if kind == 'layer' else 'reductions'}")
            for name, begin, end in found["spans"][mode]:
                if name.startswith(kind):
                    axes.barh(y, end - begin, left=begin, height=0.8, color=color, edgecolor="white", linewidth=0.8)
                    if kind == "layer":
                        axes.text(
                            (begin + end) / 2, y, name.split()[1], ha="center", va="center", color="w", fontsize=8
                        )
    axes.set_yticks(rows, labels)
    axes.set_xlim(left=0.95 * min(begin for mode in MODES for _, begin, _ in found["spans"][mode]))
    axes.set_xlabel("seconds from the start of a step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gf-lstm-5x700")
    parser.add_argument("--rows", type=int, default=32, help="of each process")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--rate", default="1gbit", help="of the link, as tc has it; 0: loopback")
    parser.add_argument("--engine", choices=("ddp", "deepspeed"), default="ddp")
    parser.add_argument("--stage", type=int, default=2, help="of DeepSpeed")
    parser.add_argument("--port", type=int, default=29533)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a .png, .svg or .pdf")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    found = run(args)
    results = summarize(found)
    engine = f"DeepSpeed stage {args.stage}" if args.engine == "deepspeed" else "DDP"
    link = "loopback" if args.rate == "0" else args.rate
    title = f"{args.preset}, 2 x {args.rows} rows x {args.steps} steps, {engine}, gloo, {link}"
    table = Table(
        title=title, caption="s from the start of a step; waited: reductions after the last layer's gradients"
    )
    for column in ("gradients made", "step s", "±", "first reduction s", "last layer s", "waited s"):
        table.add_column(column, justify="left" if column == "gradients made" else "right")
    for mode, result in results.items():
        figures = (result[key] for key in ("first_reduction_s", "last_layer_s", "waited_s"))
        table.add_row(mode, f"{result['step_s']:.3g}", f"{result['spread']:.0%}", *(f"{f:.3g}" for f in figures))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if args.json is not None:
        about = {
            name: getattr(args, name)
            for name in ("preset", "rows", "steps", "repeats", "threads", "rate", "engine", "stage")
        }
        about |= {"versions": versions(), "date": time.strftime("%Y-%m-%d")}
        args.json.write_text(json.dumps({"about": about, "results": results, **found}, indent=1) + "\n")
    if args.plot is not None:
        plot(found, title, args.plot)


if __name__ == "__main__":
    main()
