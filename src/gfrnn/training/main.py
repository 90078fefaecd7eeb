"""Train: gfrnn-train, deepspeed src/train.py. From the command line to a finished run."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from gfrnn import cli
from gfrnn.config import (
    PAPER_SYMBOLS,
    Settings,
    UserError,
    preset,
    preset_note,
    presets,
    sizes,
    validate,
    without_effect,
)
from gfrnn.runs import RunFolder
from gfrnn.training import stopping  # early: it looks who started this process
from gfrnn.training.ds_config import load_ds_config, resolve_ds_config, stage_of
from gfrnn.training.memory import estimate


def main() -> None:
    """gfrnn-train."""
    stopping.end_on_signals()
    cli.run(_main)


def _main() -> None:
    name = _preset_name(sys.argv[1:])
    if name == "list":
        print_presets()
        return
    settings = cli.parse(Settings, sys.argv[1:], default=preset(name))
    validate(settings)
    world_size = cli.world_size()
    if world_size > settings.batch.rows:
        raise UserError(
            f"{world_size} processes cannot share --rows {settings.batch.rows}: start fewer, or raise --rows"
        )
    ds_config = resolve_ds_config(load_ds_config(settings.deepspeed), settings, world_size=world_size)
    run = RunFolder(settings.output_dir)
    if not settings.prepare:
        run.check(settings)
    for notice in without_effect(settings):
        cli.say(f"note: {notice}")
    if settings.dry_run:
        print_settings(settings, ds_config, world_size)
        return
    from gfrnn.data import load_text

    if settings.prepare:
        text = load_text(settings.data)
        parts = f"{len(text.train):,} training, {len(text.valid):,} validation, {len(text.test):,} test"
        cli.say(f"{text.name} is ready: {parts} bytes")
        return
    train(settings, ds_config, run)


def train(settings: Settings, ds_config: dict[str, Any], run: RunFolder) -> None:
    """Trains, or says that the run in this folder is finished. Raises UserError, RunFailed, Stopped."""
    _share_cores()
    from gfrnn.data import load_text, segments_per_epoch
    from gfrnn.training.tracking import Tracker

    text = load_text(settings.data)
    run.check(settings, text.md5)
    run.mlflow_run_id()  # if its file is damaged, better now than at the first checkpoint
    finished = _finished(run, settings)
    if finished is not None:
        cli.say(f"{run.path} is finished already; give another --output-dir, or a larger --max-updates to go on")
        if cli.rank() == 0:
            if settings.run.mlflow:  # what a server that was down has missed
                Tracker.start(run.path, settings.run.experiment).finish()
            _print_results(finished, settings, run)
        return
    segments_per_epoch(len(text.train), settings.batch.rows, settings.batch.steps)  # what cannot work answers at once
    run.check_writable()

    import torch.distributed as dist

    from gfrnn.training.checkpoint import on_first_process
    from gfrnn.training.engine import init_distributed
    from gfrnn.training.loop import Trainer

    device = init_distributed()
    with on_first_process("take the run folder", device) as first:
        if first:
            run.lock()
            run.check(settings, text.md5)  # again: another training may have begun here and ended
            latest = run.named_checkpoint("latest")
            run.create(settings, ds_config, text.md5)
            run.truncate_metrics(int(latest.name.removeprefix("step-")) if latest is not None else 0)
            run.summary_path.unlink(missing_ok=True)
    tracked = settings.run.mlflow and dist.get_rank() == 0
    tracker = Tracker.start(run.path, settings.run.experiment) if tracked else None
    trainer = Trainer(settings, ds_config, run, text, device)
    with trainer.stop.listening():  # until MLflow has it all: a launcher ends the rest when the first process is gone
        try:
            summary = trainer.fit()
        except FileNotFoundError as error:
            if run.config_path.exists():
                raise
            raise UserError(f"--output-dir {run.path} was removed while it was trained in; start again") from error
        finally:
            if tracker is not None:
                tracker.finish(timeout=20)
    if dist.get_rank() == 0:
        _print_results(summary, settings, run)
    dist.barrier()  # a process that leaves early breaks the connections of the rest


def _finished(run: RunFolder, settings: Settings) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do, else None."""
    summary = run.read_summary()
    if summary is None:
        return None
    gave_up = 0 < settings.run.patience <= summary["without_best"]
    more = settings.run.max_updates > summary["step"] and not gave_up
    return summary if summary["finished"] and not more else None


def _share_cores() -> None:
    """Without a word from the user, the processes of a node share its cores (read by OpenMP when torch is imported)."""
    here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or cli.world_size())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // here)))


# ------------------------------------------------------------------------------------------- what is printed


def _print_results(summary: dict[str, Any], settings: Settings, run: RunFolder) -> None:
    from gfrnn.training.tracking import ui_command

    print(f"test {summary['test_bpc']:.4f} BPC, validation {summary['valid_bpc']:.4f} at update {summary['best_step']}")
    print(f"a sample ({settings.run.sample_length} bytes, temperature 0.8):")
    sample = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in summary["sample"])
    print("    " + sample.strip("\n").replace("\n", "\n    "))
    print(f"run folder: {run.path}")
    if sys.prefix != sys.base_prefix and "VIRTUAL_ENV" not in os.environ:  # started by `make train`, say
        print(f"first:      . {os.path.relpath(sys.prefix)}/bin/activate")
    if settings.run.mlflow:
        print(f"its curves: {ui_command(run.path)}")
    path = shlex.quote(str(run.path))
    print(f"score it:   python src/evaluate.py {path}")
    print(f"more text:  python src/sample.py {path} --prompt 'The '")
    if settings.preset == "demo":
        print("full size:  deepspeed src/train.py --deepspeed ds_configs/z2.json   (gf-lstm-5x700 on enwik8, for GPUs)")


def print_presets() -> None:
    """Every preset with its size, counted as the paper does."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Presets at {PAPER_SYMBOLS} symbols (text is bytes, so a run has 256)",
        caption="recurrent: weights with global gates, no biases, no softmax. FLOP: to train, a character; look-ups of "
        "one-hot symbols cost none",
    )
    for column in ("preset", "recurrent", "softmax", "MFLOP a character", ""):
        table.add_column(column, justify="left" if column in ("preset", "") else "right", no_wrap=column == "preset")
    for name, settings in presets().items():
        count = sizes(settings.model, PAPER_SYMBOLS)
        flops = f"{count.train_flops / 1e6:.2f}"
        table.add_row(name, f"{count.recurrent:,}", f"{count.softmax:,}", flops, preset_note(name))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def print_settings(settings: Settings, ds_config: dict[str, Any], world_size: int) -> None:
    """What a run with these flags would do."""
    count = sizes(settings.model)
    flat = settings.to_json()
    for group in (flat, *(flat[f.name] for f in dataclasses.fields(settings) if isinstance(flat[f.name], dict))):
        for name, value in group.items():
            if not isinstance(value, dict):
                print(f"--{name.replace('_', '-'):24} {value}")
    print(f"parameters                 {count.total:,} ({count.recurrent:,} recurrent weights)")
    print(f"FLOP a character           {count.train_flops:,} to train")
    print(f"processes                  {world_size}, ZeRO stage {stage_of(ds_config)}")
    print(f"DeepSpeed config           {json.dumps(ds_config)}")
    memory = estimate(settings, ds_config, world_size)
    how = f"ZeRO stage {stage_of(ds_config)}, W = {world_size}, --recompute {settings.batch.recompute}"
    print(f"memory of a process        {how}; fullest at: {memory.moment}")
    for part, size in {**memory.parts, "total": memory.total}.items():
        print(f"    {part:22} {size / 1e6:9,.0f} MB")


def _preset_name(argv: Sequence[str]) -> str:
    """The value of --preset: it is the default for every other flag, so it is needed first. The last one counts."""
    name = Settings().preset
    for position, arg in enumerate(argv):
        if arg.startswith("--preset="):
            name = arg.removeprefix("--preset=")
        if arg == "--preset" and position + 1 < len(argv):
            name = argv[position + 1]
    return name
