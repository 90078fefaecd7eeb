"""One process of W that trains under every kind of --compression, and resumes each; some under another kind.

argv: folder. Settings are those of invariance_worker.py, whose 5 rows make unequal shares.
RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment.
"""

import dataclasses
import sys
from pathlib import Path
from typing import get_args, get_type_hints

from invariance_worker import end, settings_for, train

from gfrnn.config import CommunicationSettings
from gfrnn.training.engine import init_distributed

KINDS = get_args(get_type_hints(CommunicationSettings)["compression"])
OTHERS = [("local", "none"), ("powersgd", "topk"), ("none", "powersgd")]
"""Compression, and the kind of the run that is gone on from."""


def main() -> None:
    folder = Path(sys.argv[1])
    device = init_distributed()
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
