"""One process of W that trains every (stage, accumulation) asked for, one after another, each in its own run folder.

argv: folder, task, dtype, then STAGE:ACCUMULATION[:RESUME_FROM] ...
RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment.
"""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Literal, cast

import torch
import torch.distributed as dist

from gfrnn.config import OptimizerSettings, ProgramSettings, Settings, Task, preset
from gfrnn.data import load_corpus
from gfrnn.runs import RunFolder
from gfrnn.training import curriculum
from gfrnn.training.ds_config import load_ds_config, resolve_ds_config
from gfrnn.training.engine import init_distributed
from gfrnn.training.heartbeat import Heartbeat
from gfrnn.training.loop import Trainer

Dtype = Literal["fp32", "bf16"]
CONFIGS = Path(__file__).parents[2] / "ds_configs"


def settings_for(output_dir: Path, task: Task, accumulation: int, dtype: Dtype) -> Settings:
    """Everything random or stateful switched on; 5 rows, so that 2 and 3 processes need padding."""
    demo = preset("demo" if task == "text" else "programs-demo")
    return dataclasses.replace(
        demo,
        output_dir=output_dir,
        seed=3,
        data=dataclasses.replace(demo.data, data_dir=output_dir.parent / "data"),
        programs=ProgramSettings(nesting=2, length=3, curriculum="blend", level_programs=60, valid_programs=40),
        model=dataclasses.replace(
            demo.model,
            num_layers=2,
            hidden_size=16,
            output_skips=True,
            layer_norm=False,
            dropout=0.2,
            input_dropout=0.1,
            output_dropout=0.1,
            weight_dropout=0.1,
            forget_bias=1.0,
        ),
        batch=dataclasses.replace(
            demo.batch, rows=5, steps=12, accumulation=accumulation, reset_every=17, reset_probability=0.05, dtype=dtype
        ),
        optimization=OptimizerSettings(
            optimizer="adamw",
            weight_decay=0.01,
            learning_rate=8e-3,
            clip=0.6,
            schedule="cosine",
            warmup_updates=10,
            average="ema",
            average_decay=0.9,
            average_from=5,
        ),
        run=dataclasses.replace(
            demo.run,
            max_updates=60,
            valid_every=20 if task == "text" else 4,  # a curriculum's checks
            valid_bytes=2000,
            eval_streams=48,
            eval_warmup=30,
            checkpoint_every=25,
            keep_last=9,
            log_every=1,
            sample_length=10,
            noise_scale=0.9 if dist.get_world_size() * accumulation > 1 else 0.0,
        ),
    )


def train(settings: Settings, stage: str, device: torch.device, source: Path | None = None) -> None:
    """The whole of it. source: another run's folder, to go on as if this one had been that one's first 25 updates."""
    corpus = load_corpus(settings)
    ds_config = resolve_ds_config(
        load_ds_config(CONFIGS / f"z{stage}.json"), settings, world_size=dist.get_world_size()
    )
    run = RunFolder(settings.output_dir)
    if dist.get_rank() == 0:
        run.create(settings, ds_config, corpus.md5)
        if source is not None:
            saved = source / "checkpoints" / "step-00000025"
            shutil.copytree(saved, run.checkpoints / saved.name)
            (run.checkpoints / "latest").write_text(saved.name)
    dist.barrier()
    Trainer(settings, ds_config, run, corpus, device, Heartbeat()).fit()


def end() -> None:
    """Of this process, once all have come here."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as our programs end (cli.run): gloo's threads now and then abort an interpreter's tear-down


def main() -> None:
    folder, task, dtype, jobs = Path(sys.argv[1]), cast(Task, sys.argv[2]), cast(Dtype, sys.argv[3]), sys.argv[4:]
    curriculum.LEARNED = 0.4  # so that a level takes few updates
    device = init_distributed()
    for job in jobs:
        stage, accumulation, *resume = job.split(":")
        output_dir = folder / f"z{stage}-w{dist.get_world_size()}-a{accumulation}{'-resumed' * bool(resume)}"
        settings = settings_for(output_dir, task, int(accumulation), dtype)
        train(settings, stage, device, folder / resume[0] if resume else None)
    end()


if __name__ == "__main__":
    main()
