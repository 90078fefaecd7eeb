"""What test_shards.py runs in real processes: train a small network under DeepSpeed, save, load, go on.

    python shards_worker.py FOLDER
    deepspeed --num_gpus N shards_worker.py FOLDER

FOLDER/plan.json is [[processes, [job, ...]], ...], one process group after the other; the launcher's processes do the
jobs of its only entry. What happened is written to FOLDER/JOB.json.

Importing DeepSpeed takes seconds, so without the launcher it is imported once and every rank is forked from there.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from gfrnn.config import BatchSettings, OptimizerSettings, Settings
from gfrnn.training.ds_config import load_ds_config, resolve_ds_config
from gfrnn.training.engine import build_optimizer, init_distributed, initialize
from gfrnn.training.network import free_port
from gfrnn.training.shards import Average, Shards, set_learning_rate, step

ROOT = Path(__file__).resolve().parents[2]
ROWS, SAVED_AT, EMA_DECAY = 12, 5, 0.8

_SMALL = {"stage3_param_persistence_threshold": 10, "sub_group_size": 50}
_CPU = {"device": "cpu"}
CONFIGS: dict[str, dict[str, Any]] = {
    **{f"z{stage}_bf16": {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}} for stage in (1, 2, 3)},
    "z2_bf16_fp32grads": {
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    **{f"z{s}_wire": {"zero_optimization": {"stage": s}, "communication_data_type": "bf16"} for s in (0, 2)},
    "z1_predivide": {"zero_optimization": {"stage": 1}, "gradient_predivide_factor": 2.0},
    "z2_reordered": {"zero_optimization": {"stage": 2, "round_robin_gradients": True, "parameter_alignment": True}},
    "z3_pieces": {"zero_optimization": {"stage": 3, **_SMALL}},
    "z3_offload": {"zero_optimization": {"stage": 3, "offload_optimizer": _CPU, "offload_param": _CPU, **_SMALL}},
}


@dataclass
class Job:
    """One engine. Either it trains from the start for 2 x SAVED_AT updates and saves in the middle, or it loads files,
    one after another (the first into a fresh engine), and from each goes on where the file was saved.
    """

    name: str
    config: str
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    accumulation: int = 1
    save: str = ""
    loads: tuple[str, ...] = ()
    forget: str = ""
    """State key to zero when loading: a mistake that the test must see."""


class Net(nn.Module):
    """Odd sizes, so that slices cut parameters anywhere and padding is needed; one parameter is the root module's."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.first = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.middle = nn.Linear(13, 11, bias=False)
        self.last = nn.Linear(11, 5)

    def forward(self, x_RI: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.middle(self.norm(torch.tanh(self.first(x_RI)))))) * self.gain


def settings_of(job: Job) -> Settings:
    optimization = OptimizerSettings(optimizer=job.optimizer, clip=0.5, weight_decay=0.05, eps=1e-6)
    return Settings(batch=BatchSettings(rows=ROWS, accumulation=job.accumulation), optimization=optimization)


def learning_rate(update: int) -> float:
    return 1e-2 * 0.9**update


def batch(update: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [R, 7] and targets [R, 5] of an update."""
    generator = torch.Generator().manual_seed(update)
    return torch.randn(ROWS, 7, generator=generator), torch.randn(ROWS, 5, generator=generator)


def new_model() -> Net:
    torch.manual_seed(0)
    return Net()


def run(job: Job) -> dict[str, Any]:
    """Losses and gradient norms by file loaded ("" for none), an update each; the last weights and averages."""
    settings = settings_of(job)
    config = CONFIGS.get(job.config) or load_ds_config(ROOT / "ds_configs" / f"{job.config}.json")
    model = new_model()
    optimizer = build_optimizer(model, settings.optimization)
    engine = initialize(model, optimizer, resolve_ds_config(config, settings, world_size=dist.get_world_size()))
    shards = Shards(engine)
    averages = {"ema": Average(shards, EMA_DECAY), "mean": Average(shards, None)}
    runs = {}
    for path in job.loads or ("",):
        if path:
            load(path, job.forget, shards, averages)
        runs[path] = train(job, shards, averages, SAVED_AT if path else 0)
    full = {"weights": shards.weights()} | {name: average.weights() for name, average in averages.items()}
    result = {
        "runs": runs,
        "restored": swap(engine, shards, averages["ema"], dtype_of(job)),
        "final": {kind: {name: tensor.tolist() for name, tensor in of.items()} for kind, of in full.items()},
    }
    engine.destroy()
    return result


def dtype_of(job: Job) -> torch.dtype:
    return torch.bfloat16 if "bf16" in job.config else torch.float32


def train(job: Job, shards: Shards, averages: dict[str, Average], first: int) -> dict[str, list[float]]:
    engine, rank, world_size = shards.engine, dist.get_rank(), dist.get_world_size()
    losses, norms = [], []
    mine = torch.arange(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    for update in range(first, 2 * SAVED_AT):
        x_RI, y_RO = batch(update)
        set_learning_rate(engine, learning_rate(update))
        total, norm = torch.zeros(()), None
        for part in mine.chunk(job.accumulation):
            assert norm is None  # only the last micro-batch is a boundary
            loss = (engine(x_RI[part].to(dtype_of(job))).float() - y_RO[part]).square().mean()
            engine.backward(loss)
            norm = step(engine)
            total += loss.detach() / job.accumulation / world_size
        assert norm is not None
        dist.all_reduce(total)
        losses.append(total.item())
        norms.append(norm.item())
        for average in averages.values():
            average.update()
        if update == SAVED_AT - 1 and job.save:
            save(job, shards, averages)
    return {"losses": losses, "norms": norms}


def load(path: str, forget: str, shards: Shards, averages: dict[str, Average]) -> None:
    saved = torch.load(path)
    if forget:
        saved["moments"][forget] = {name: torch.zeros_like(tensor) for name, tensor in saved["moments"][forget].items()}
    shards.load_weights(saved["weights"])
    shards.load_optimizer_state(saved["moments"], saved["step"])
    for name, average in averages.items():
        average.load(saved[name], saved["count"])


def save(job: Job, shards: Shards, averages: dict[str, Average]) -> None:
    moments, count = shards.optimizer_state(on_all_ranks=False)
    content = {
        "weights": shards.weights(on_all_ranks=False),
        "moments": moments,
        "step": count,
        "count": averages["ema"].count,
        **{name: average.weights(on_all_ranks=False) for name, average in averages.items()},
    }
    if dist.get_rank() == 0:
        torch.save(content, job.save)
    else:
        assert not content["weights"]
    dist.barrier()


def swap(engine: Any, shards: Shards, average: Average, dtype: torch.dtype) -> bool:
    """Whether the engine computes with weights loaded into it, here averages, and as before with those from before."""
    x_RI, _ = batch(99)
    reference = new_model()
    with torch.no_grad():
        before = engine(x_RI.to(dtype))
        weights, full = shards.weights(), average.weights()
        reference.load_state_dict(full)
        shards.load_weights(full)
        averaged = engine(x_RI.to(dtype))
        shards.load_weights(weights)
        after = engine(x_RI.to(dtype))
        expected = reference.to(dtype)(x_RI.to(dtype))
    close = torch.allclose(averaged, expected, rtol=1e-5, atol=1e-6) and not torch.allclose(averaged, before, rtol=1e-3)
    good = torch.tensor(float(close and torch.equal(before, after)))
    dist.all_reduce(good, op=dist.ReduceOp.MIN)
    return bool(good)


def run_all(jobs: list[dict[str, Any]], folder: Path) -> None:
    init_distributed()
    for values in jobs:
        job = Job(**values)
        result = run(job)
        if dist.get_rank() == 0:
            (folder / f"{job.name}.json").write_text(json.dumps(result))


def fork_group(world_size: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    port = free_port()
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            status = 1
            try:
                run_all(jobs, folder)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit(f"a group of {world_size} failed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[-1])
    plan = json.loads((folder / "plan.json").read_text())
    if "RANK" in os.environ:
        run_all(plan[0][1], folder)
        sys.stdout.flush()
        os._exit(0)  # as our programs end (cli.run): gloo's threads now and then abort an interpreter's tear-down
    else:
        for world_size, jobs in plan:
            fork_group(world_size, jobs, folder)
