"""Weights, optimizer state and averages move between every ZeRO stage and world size, in real processes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import shards_worker as worker

from gfrnn.config import OptimizerSettings
from gfrnn.training.engine import build_optimizer
from launch import environment, free_port

WORLD_SIZES = (1, 2, 3)
STAGES = ("z0", "z1", "z2", "z3")
FP32 = (*STAGES, "z2_offload", "z1_predivide", "z2_reordered", "z3_pieces", "z3_offload")
BF16 = ("z1_bf16", "z2_bf16", "z3_bf16", "z2_bf16_fp32grads", "z0_wire", "z2_wire")
# Other jobs: their own optimizer or accumulation, so only files of their kind fit.
RMSPROP = tuple(f"{stage}-rmsprop" for stage in STAGES)
ACCUMULATED = ("z0-accumulated", "z2-accumulated")

FP32_CLOSE = 1e-5
BF16_CLOSE = 5e-3
"""Relative. bf16 gradients summed over other ranks are rounded otherwise (2^-8) on the wire, at every update."""

ENVIRONMENT = environment(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")


def job(kind: str, **more: Any) -> dict[str, Any]:
    config, _, variant = kind.partition("-")
    options = {"": {}, "rmsprop": {"optimizer": "rmsprop"}, "accumulated": {"accumulation": 2}}[variant]
    return {"config": config, **options, **more}


def partners(kind: str) -> tuple[str, ...]:
    """Whose files a kind loads besides its own."""
    for family in (BF16, RMSPROP, ACCUMULATED):
        if kind in family:
            return family
    return STAGES


KINDS = (*FP32, *BF16, *RMSPROP, *ACCUMULATED)


def loaded(kind: str, world_size: int) -> list[str]:
    """Whose files a job loads: its own first, then each partner's at one world size; all of them over all jobs."""
    own, turn = f"{kind}@{world_size}", KINDS.index(kind) + world_size
    others = [f"{k}@{WORLD_SIZES[(turn + i) % len(WORLD_SIZES)]}" for i, k in enumerate(partners(kind))]
    return [own, *(name for name in others if name != own)]


Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results by job: KIND@W saves; load-KIND@W loads its own file and those of its partners."""
    folder = tmp_path_factory.mktemp("shards")
    plan: list[Any] = []
    for world_size in WORLD_SIZES:
        names = {kind: f"{kind}@{world_size}" for kind in KINDS}
        plan.append([world_size, [job(k, name=n, save=f"{folder}/{n}.pt") for k, n in names.items()]])
    for world_size in WORLD_SIZES:
        jobs = []
        for kind in KINDS:
            loads = [f"{folder}/{name}.pt" for name in loaded(kind, world_size)]
            jobs.append(job(kind, name=f"load-{kind}@{world_size}", loads=loads))
        jobs.append(job("z2", name=f"forget@{world_size}", loads=[f"{folder}/z2@{world_size}.pt"], forget="exp_avg"))
        plan.append([world_size, jobs])
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, worker.__file__, folder]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert not done.stdout  # for results, not for DeepSpeed's log
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*@*.json")}
    for result in found.values():
        result["runs"] = {Path(path).stem: run for path, run in result["runs"].items()}
    return found | {"folder": {"path": folder}}


def assert_close(run: dict[str, list[float]], expected: dict[str, list[float]], tolerance: float) -> None:
    for key in ("losses", "norms"):
        assert run[key] == pytest.approx(expected[key][-len(run[key]) :], rel=tolerance, abs=0), key


def bound(kind: str) -> float:
    return BF16_CLOSE if kind in BF16 else FP32_CLOSE


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """The same training in plain torch, with all rows in one process: losses, norms, weights and averages."""
    settings = worker.settings_of(worker.Job("", "z0"))
    model = worker.new_model()
    optimizer = build_optimizer(model, settings.optimization)
    losses, norms, seen = [], [], []
    for update in range(2 * worker.SAVED_AT):
        x_RI, y_RO = worker.batch(update)
        for group in optimizer.param_groups:
            group["lr"] = worker.learning_rate(update)
        loss = (model(x_RI) - y_RO).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimization.clip)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
    ema = dict(seen[0])
    for count, weights in enumerate(seen[1:], start=2):
        part = max(1 / count, 1 - worker.EMA_DECAY)
        ema = {name: old + part * (weights[name] - old) for name, old in ema.items()}
    mean = {name: torch.stack([weights[name] for weights in seen]).mean(0) for name in ema}
    return {"losses": losses, "norms": norms, "final": {"weights": seen[-1], "ema": ema, "mean": mean}}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("kind", [*FP32, *ACCUMULATED])
def test_trains_as_plain_torch_does(results: Results, reference: dict[str, Any], kind: str, world_size: int) -> None:
    assert max(reference["norms"]) > 0.5  # so clipping took part
    for name in (f"{kind}@{world_size}", f"load-{kind}@{world_size}"):  # averages survive saving and loading
        result = results[name]
        for run in result["runs"].values():
            assert_close(run, reference, FP32_CLOSE)
        for average, expected in reference["final"].items():
            assert result["final"][average].keys() == expected.keys()
            for parameter, values in result["final"][average].items():
                torch.testing.assert_close(torch.tensor(values), expected[parameter], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_same_stage_and_ranks_go_on_bit_for_bit(results: Results, kind: str, world_size: int) -> None:
    name = f"{kind}@{world_size}"
    uninterrupted, resumed = results[name]["runs"][""], results[f"load-{name}"]["runs"][name]
    for key in ("losses", "norms"):
        assert resumed[key] == uninterrupted[key][worker.SAVED_AT :]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_other_stages_and_ranks_go_on_closely(results: Results, kind: str, world_size: int) -> None:
    runs = results[f"load-{kind}@{world_size}"]["runs"]
    assert list(runs) == loaded(kind, world_size)
    for source, run in runs.items():
        assert_close(run, results[source]["runs"][""], bound(kind))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_forgotten_moment_would_be_seen(results: Results, world_size: int) -> None:
    expected = results[f"z2@{world_size}"]["runs"][""]["losses"][worker.SAVED_AT :]
    losses = next(iter(results[f"forget@{world_size}"]["runs"].values()))["losses"]
    assert losses[0] == expected[0]  # the weights were right
    assert max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)) > 100 * FP32_CLOSE


def test_files_are_the_same_whoever_wrote_them(results: Results) -> None:
    folder = results["folder"]["path"]
    first = torch.load(folder / "z0@1.pt")
    assert first["step"] == first["count"] == worker.SAVED_AT
    assert set(first["moments"]) == {"exp_avg", "exp_avg_sq"}
    assert set(torch.load(folder / "z3-rmsprop@3.pt")["moments"]) == {"grad_avg", "momentum_buffer", "square_avg"}
    for kind, world_size in itertools.product(FP32, WORLD_SIZES):
        other = torch.load(folder / f"{kind}@{world_size}.pt")
        assert (other["step"], other["count"]) == (worker.SAVED_AT, worker.SAVED_AT)
        for key in ("weights", "ema", "mean"):
            torch.testing.assert_close(other[key], first[key], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other["moments"], first["moments"], rtol=1e-4, atol=1e-6)


def test_an_engine_computes_with_weights_loaded_into_it(results: Results) -> None:
    swapped = [result["restored"] for name, result in results.items() if name != "folder"]
    assert len(swapped) == 2 * 3 * 21 + 3
    assert all(swapped)


def test_under_the_launcher(results: Results, tmp_path: Path) -> None:
    folder = results["folder"]["path"]
    _, other, *_ = names = loaded("z2", 2)
    loads = [f"{folder}/{name}.pt" for name in names[:2]]
    (tmp_path / "plan.json").write_text(json.dumps([[2, [job("z2", name="launched", loads=loads)]]]))
    launcher = Path(sys.executable).with_name("deepspeed")
    subprocess.run(
        [sys.executable, launcher, "--num_gpus", "2", "--master_port", str(free_port()), worker.__file__, tmp_path],
        env=ENVIRONMENT,
        check=True,
        timeout=200,
    )
    runs = json.loads((tmp_path / "launched.json").read_text())["runs"]
    expected = results["load-z2@2"]["runs"]
    assert runs[loads[0]] == expected["z2@2"]
    assert runs[loads[1]] == expected[other]


ALONE = """
import math, sys, torch
from gfrnn.config import OptimizerSettings, UserError
from gfrnn.training.engine import build_optimizer, init_distributed, initialize
from gfrnn.training.shards import Shards, step
import deepspeed.comm.comm as comm

assert init_distributed() == torch.device("cpu")
init_distributed()
assert comm.cdb.shm_comm_op is None  # nothing was compiled
config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0}
for stage, value in ((0, math.nan), (1, math.inf), (2, math.nan), (3, math.nan)):
    model = torch.nn.Linear(3, 2)
    zero = {"stage": stage, "memory_efficient_linear": False}
    engine = initialize(model, build_optimizer(model, OptimizerSettings()), config | {"zero_optimization": zero})
    shards = Shards(engine)
    assert shards.optimizer_state() == ({}, 0)
    engine.backward(engine(torch.ones(1, 3)).sum())
    assert math.isfinite(step(engine))
    before = shards.weights()
    engine.backward(engine(torch.ones(1, 3)).sum() * value)
    assert not math.isfinite(step(engine))
    if stage:
        assert all(torch.equal(before[name], after) for name, after in shards.weights().items())
    engine.destroy()
for wrong in ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, {"communication_data_type": "fp8"}):
    try:
        initialize(model, None, config | wrong)
    except UserError as error:
        print(error)
"""


def test_one_process_without_a_launcher() -> None:
    """Plain python is one process; a gradient that is not finite shows at every stage; wrong values are user errors."""
    done = subprocess.run([sys.executable, "-c", ALONE], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    first, second = done.stdout.splitlines()
    assert "reduce_bucket_size" in first
    assert "communication_data_type" in second
    assert "fp8" in second


def test_optimizers_decay_matrices_only() -> None:
    model = worker.new_model()
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("rmsprop", torch.optim.RMSprop)):
        plain = build_optimizer(model, OptimizerSettings(optimizer=name))  # type: ignore[arg-type]
        assert type(plain) is kind
        assert [group["weight_decay"] for group in plain.param_groups] == [0.0]
        decayed = build_optimizer(model, OptimizerSettings(optimizer=name, weight_decay=0.1))  # type: ignore[arg-type]
        assert [group["weight_decay"] for group in decayed.param_groups] == [0.1, 0.0]
        assert [{p.ndim for p in group["params"]} for group in decayed.param_groups] == [{2}, {1}]
        assert sum(len(group["params"]) for group in decayed.param_groups) == len(list(model.parameters()))
    assert decayed.defaults["centered"]


def test_files_of_every_kind_and_world_size_are_loaded_by_every_kind() -> None:
    for kind in KINDS:
        found = {name for world_size in WORLD_SIZES for name in loaded(kind, world_size)}
        assert found >= {f"{k}@{w}" for k, w in itertools.product(partners(kind), WORLD_SIZES)}
