"""One process of W that trains under every kind of --compression, and resumes each; some under another kind.

Before that, to clipped.json: how local updates clip gradients of different lengths.
argv: folder. Settings are those of invariance_worker.py, whose 5 rows make unequal shares.
RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import torch
import torch.distributed as dist
from invariance_worker import end, settings_for, train

from gfrnn.config import CommunicationSettings
from gfrnn.training.compression import make_exchange
from gfrnn.training.engine import init_distributed, initialize
from gfrnn.training.shards import Shards, step

KINDS = get_args(get_type_hints(CommunicationSettings)["compression"])
OTHERS = [("local", "none"), ("powersgd", "topk"), ("none", "powersgd")]
"""Compression, and the kind of the run that is gone on from."""


def clipped(device: torch.device) -> list[tuple[float, float]]:
    """Of each process: its gradient's norm, and how far plain descent at rate 1, clipped at 1, moves its weights."""
    model = torch.nn.Linear(3, 2, bias=False)
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True}
    zero = {"stage": 0, "memory_efficient_linear": False}
    engine = initialize(model, torch.optim.SGD(model.parameters(), lr=1.0), config | {"zero_optimization": zero})
    exchange = make_exchange(CommunicationSettings(compression="local"), Shards(engine))
    before = model.weight.detach().clone()
    wanted = [0.5, 4.0][dist.get_rank() % 2]
    engine.backward(engine(torch.ones(1, 3, device=device)).sum() * wanted / 6**0.5)  # of six ones
    norm = step(engine, exchange)
    assert norm is not None
    every: list[tuple[float, float]] = [(0.0, 0.0)] * dist.get_world_size()
    dist.all_gather_object(every, (norm.item(), (model.weight.detach() - before).norm().item()))
    engine.destroy()
    return every


def main() -> None:
    folder = Path(sys.argv[1])
    device = init_distributed()
    found = clipped(device)
    if dist.get_rank() == 0:
        (folder / "clipped.json").write_text(json.dumps(found))
    jobs = [(kind, "") for kind in KINDS] + [(kind, kind) for kind in KINDS] + OTHERS
    for kind, source in jobs:
        name = kind if not source else f"{kind}-from-{source}"
        settings = settings_for(folder / name, "text", 1, "fp32")
        sending = CommunicationSettings(compression=kind, compression_share=0.05, local_updates=4)
        whole = dataclasses.replace(settings.run, noise_scale=0.0)  # no compression has the whole gradient
        settings = dataclasses.replace(settings, communication=sending, run=whole)
        train(settings, "0", device, folder / source if source else None)
    end()


if __name__ == "__main__":
    main()
