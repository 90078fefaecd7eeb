"""One process of W on a real gloo group that applies compressors to known gradients, without any engine.

argv: where the first process writes what came out, as JSON. RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the
environment.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gfrnn.training.compression import Exchange, LocalUpdates, PowerSGD, TopK, average

SHAPES = {"wide": (12, 40), "tall": (30, 9), "bias": (17,), "tiny": (2, 3)}
RANK_SENT, SHARE = 2, 0.1


def parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}


def gradients(update: int, rank: int) -> dict[str, torch.Tensor]:
    """A signal that all share, and noise of each process."""
    signal, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(1000 * update + rank)
    return {
        name: torch.randn(shape, generator=signal) + torch.randn(shape, generator=noise)
        for name, shape in SHAPES.items()
    }


def mean(update: int) -> dict[str, torch.Tensor]:
    of = [gradients(update, rank) for rank in range(dist.get_world_size())]
    return {name: torch.stack([each[name] for each in of]).mean(0) for name in SHAPES}


def distance(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Relative, over all elements."""
    flat = [torch.cat([full[name].double().flatten() for name in SHAPES]) for full in (got, want)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def applied(exchange: Exchange, update: int) -> dict[str, torch.Tensor]:
    """What `reduce` makes of an update's gradients."""
    own = gradients(update, dist.get_rank())
    for name, parameter in exchange.parameters.items():
        parameter.grad = own[name]
    exchange.reduce()
    return {name: p.grad.clone() for name, p in exchange.parameters.items() if p.grad is not None}


def once(exchange: Exchange) -> float:
    return distance(applied(exchange, 0), mean(0))


def low_rank_once() -> float:
    """Gradients whose mean has the rank that is sent, though each process's own has more."""
    exchange = PowerSGD({"wide": torch.nn.Parameter(torch.zeros(12, 40))}, RANK_SENT)
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(12, RANK_SENT, generator=generator) @ torch.randn(RANK_SENT, 40, generator=generator)
    noise = torch.randn(12, 40, generator=generator)
    signs = {0: 1.0, 1: -1.0}  # they cancel in the mean
    own = common + signs.get(dist.get_rank(), 0.0) * noise
    exchange.parameters["wide"].grad = own
    exchange.reduce()
    got = exchange.parameters["wide"].grad
    return float((got - common).norm() / common.norm())


def fed_back(exchange: Exchange) -> dict[str, Any]:
    """How far the sum of what was applied is from that of the true means, as updates go by; what memory explains."""
    done = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    true = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    found = {}
    for update in range(300):
        for total, part in ((done, applied(exchange, update)), (true, mean(update))):
            for name in SHAPES:
                total[name] += part[name]
        if update + 1 in (1, 30, 300):
            found[str(update + 1)] = distance(done, true)
    memory = exchange.gather()["error"]
    explained = {name: done[name] + memory.get(name, torch.zeros(SHAPES[name])) for name in SHAPES}
    return {"off": found, "unexplained": distance(explained, true)}


def handed_on(make: Callable[[], Exchange]) -> dict[str, float]:
    """By how much a fresh one given another's state differs: in what is left to be sent, in the next update."""
    old, new, fresh = make(), make(), make()
    for update in range(5):
        applied(old, update)
    new.load(old.gather())
    left = [torch.cat([t.flatten() for t in each.gather()["error"].values()]) for each in (new, old)]
    next_update = applied(old, 5)
    return {
        "left": float((left[0] - left[1]).norm() / left[1].norm()),
        "next": distance(applied(new, 5), next_update),
        "without": distance(applied(fresh, 5), next_update),
    }


def same_everywhere(exchange: Exchange) -> float:
    """Largest difference of what processes got."""
    got = applied(exchange, 0)
    copy = {name: tensor.clone() for name, tensor in got.items()}
    for tensor in copy.values():
        dist.broadcast(tensor, 0)
    return max(float((got[name] - copy[name]).abs().max()) for name in got)


def local() -> dict[str, Any]:
    """Two parameters under Adam, averaged every 3 updates; weights, and moments, by process after each update."""
    held = parameters()
    optimizer = torch.optim.Adam(held.values(), lr=0.1)
    averages = [torch.full((4,), float(dist.get_rank()))]
    exchange = LocalUpdates(held, optimizer, 3, averages)
    spreads: list[float] = []
    for update in range(7):
        for name, gradient in gradients(update, dist.get_rank()).items():
            held[name].grad = gradient
        exchange.reduce()
        optimizer.step()
        exchange.stepped()
        spreads.append(spread([p.data for p in held.values()] + moments(optimizer)))
    before = [p.data.clone() for p in held.values()]
    average(before)
    exchange.settle()
    settled = max(float((p.data - b).abs().max()) for p, b in zip(held.values(), before, strict=True))
    last = spread([p.data for p in held.values()] + moments(optimizer) + averages)
    return {"spreads": spreads, "off_the_mean": settled, "settled": last, "averages": averages[0].tolist()}


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]


def spread(tensors: list[torch.Tensor]) -> float:
    """Largest distance of any process's elements from the first one's."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    first = flat.clone()
    dist.broadcast(first, 0)
    worst = (flat - first).abs().max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def main() -> None:
    dist.init_process_group("gloo")
    makes: dict[str, Callable[[], Exchange]] = {
        "powersgd": lambda: PowerSGD(parameters(), RANK_SENT),
        "topk": lambda: TopK(parameters(), SHARE),
    }
    found = {
        "whole": {
            "powersgd": once(PowerSGD(parameters(), 64)),
            "topk": once(TopK(parameters(), 1.0)),
        },
        "low_rank": low_rank_once(),
        "once": {name: once(make()) for name, make in makes.items()},
        "fed_back": {name: fed_back(make()) for name, make in makes.items()},
        "handed_on": {name: handed_on(make) for name, make in makes.items()},
        "same": {name: same_everywhere(make()) for name, make in makes.items()},
        "local": local(),
    }
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found["same"])
    found["same"] = every
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a tear-down


if __name__ == "__main__":
    main()
