"""What an update sends: counted in real training, beside what the theory says, for each DeepSpeed config.

    python benchmarks/volume.py --processes 2 --json volume.json
    python benchmarks/volume.py --configs ds_configs/z2.json ds_configs/z3.json --accumulation 4

Processes of this machine train a small model for a few updates under each config in turn. "a process sends" is a
ring's bytes, which no other way is below.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gfrnn.runs import versions
from gfrnn.scaling.volume import predicted, sent
from ranks import printed_by_first

ROOT = Path(__file__).parents[1]
SLICES = {"use_multi_rank_bucket_allreduce": False}
SENDING = "communication"  # in a config here: CommunicationSettings, which go with stage 0
CONFIGS: dict[str, dict[str, Any]] = {
    "stage 0": {"zero_optimization": {"stage": 0}},
    "stage 1": {"zero_optimization": {"stage": 1}},
    "stage 2": {"zero_optimization": {"stage": 2}},
    "stage 1, use_multi_rank_bucket_allreduce false": {"zero_optimization": {"stage": 1, **SLICES}},
    "stage 2, use_multi_rank_bucket_allreduce false": {"zero_optimization": {"stage": 2, **SLICES}},
    "stage 3": {"zero_optimization": {"stage": 3}},
    "stage 0, communication_data_type bf16": {
        "zero_optimization": {"stage": 0},
        "communication_data_type": "bf16",
    },
    "stage 2, both": {"zero_optimization": {"stage": 2, **SLICES}, "communication_data_type": "bf16"},
    "stage 3, communication_data_type bf16": {
        "zero_optimization": {"stage": 3},
        "communication_data_type": "bf16",
    },
    "stage 3, bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    "stage 0, --compression powersgd, rank 4": {SENDING: {"compression": "powersgd"}},
    "stage 0, --compression topk, share 0.01": {SENDING: {"compression": "topk"}},
    "stage 0, --compression local, every 3 updates": {SENDING: {"compression": "local", "local_updates": 3}},
}
WARM, COUNTED = 2, 3  # updates; local ones are averaged once in as many


def work(args: argparse.Namespace) -> None:
    """One process. The first prints what it counted as JSON, a list for the configs in their order."""
    from gfrnn.scaling.collectives import Traffic, Watch

    watch = Watch()
    import dataclasses

    import torch.distributed as dist

    from gfrnn.config import CommunicationSettings, preset
    from gfrnn.data import load_corpus
    from gfrnn.runs import RunFolder
    from gfrnn.training.ds_config import resolve_ds_config
    from gfrnn.training.engine import init_distributed
    from gfrnn.training.heartbeat import Heartbeat
    from gfrnn.training.loop import Trainer

    device = init_distributed(timedelta(minutes=5))
    demo, found = preset("demo"), []
    for number, config in enumerate(json.loads(args.work)):
        sending = CommunicationSettings(**config.pop(SENDING, {}))
        settings = dataclasses.replace(
            demo,
            communication=sending,
            output_dir=args.folder / str(number),
            model=dataclasses.replace(demo.model, hidden_size=args.hidden_size),
            batch=dataclasses.replace(
                demo.batch, rows=dist.get_world_size() * args.accumulation, steps=8, accumulation=args.accumulation
            ),
        )
        corpus = load_corpus(settings)
        corpus.prepare(settings.batch)
        resolved = resolve_ds_config(config, settings, world_size=dist.get_world_size())
        theory = copy.deepcopy(resolved)
        trainer = Trainer(settings, resolved, RunFolder(settings.output_dir), corpus, device, Heartbeat())
        watch.traffic = {}
        for update in range(WARM + COUNTED):
            watch.on = update >= WARM
            trainer.update()
        watch.on = False
        each = {
            kind: Traffic(traffic.calls // COUNTED, traffic.bytes // COUNTED) for kind, traffic in watch.traffic.items()
        }
        shapes = list(trainer.shards.shapes.values())
        elements = [shape.numel() for shape in shapes]
        found.append(
            {
                "parameters": sum(elements),
                "counted": {kind: traffic.bytes for kind, traffic in each.items()},
                "calls": {kind: traffic.calls for kind, traffic in each.items()},
                "predicted": predicted(theory, elements, settings, shapes=shapes, world_size=dist.get_world_size()),
            }
        )
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a tear-down


def count(configs: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """All processes; what the first counted."""
    from gfrnn.training.network import free_port

    with tempfile.TemporaryDirectory(prefix="gfrnn-") as folder:
        flags = ["--hidden-size", str(args.hidden_size), "--accumulation", str(args.accumulation)]
        command = [sys.executable, __file__, *flags, "--folder", folder, "--work", json.dumps(configs)]
        group = {"WORLD_SIZE": str(args.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **group, "RANK": str(n), "LOCAL_RANK": str(n), "OMP_NUM_THREADS": "1"}
                | {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")},
                stdout=subprocess.PIPE,
                text=True,
            )
            for n in range(args.processes)
        ]
        found: list[dict[str, Any]] = printed_by_first(processes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches an update")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the demo's 3 layers")
    parser.add_argument("--configs", type=Path, nargs="+", help="DeepSpeed config files; default: one of each kind")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    configs = {str(path): json.loads(path.read_text()) for path in args.configs} if args.configs else CONFIGS
    found = dict(zip(configs, count(list(configs.values()), args), strict=True))
    largest = max(abs(off(result)) for result in found.values())
    least = min(sent(result["counted"], args.processes) for result in found.values())
    parameters = next(iter(found.values()))["parameters"]
    table = Table(
        title=f"An update of {parameters:,} parameters, {args.processes} processes, {args.accumulation} micro-batches",
        caption=f"bytes a parameter; theory is off by {largest:.2%} at most",
    )
    for column in ("config", "collectives", "calls", "theory", "a process sends", "x least"):
        table.add_column(column, justify="left" if column in ("config", "collectives") else "right")
    for name, result in found.items():
        own = sent(result["counted"], args.processes)
        kinds = [kind for kind in result["counted"] if kind in result["predicted"]]
        table.add_row(
            name,
            "\n".join(f"{kind} {result['counted'][kind] / parameters:.2f}" for kind in kinds),
            "\n".join(str(result["calls"][kind]) for kind in kinds),
            "\n".join(f"{result['predicted'][kind] / parameters:.2f}" for kind in kinds),
            f"{own / parameters:.2f}",
            f"{own / least:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if args.json is not None:
        about = {name: getattr(args, name) for name in ("processes", "accumulation", "hidden_size")}
        about |= {"versions": versions(), "date": time.strftime("%Y-%m-%d")}
        args.json.write_text(json.dumps({"about": about, "results": found}, indent=1) + "\n")


def off(result: dict[str, Any]) -> float:
    """By how much the bytes that theory gives are off those counted, relative to these."""
    counted = sum(result["counted"].values())
    return float(sum(result["predicted"].values()) - counted) / counted


if __name__ == "__main__":
    main()
