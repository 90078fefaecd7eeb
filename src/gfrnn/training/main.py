"""Train: gfrnn-train, deepspeed src/train.py. From the command line to a finished run."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from gfrnn import cli
from gfrnn.config import (
    EXIT_STOPPED,
    PAPER_SYMBOLS,
    TASK_PRESETS,
    Settings,
    UserError,
    model_sizes,
    networks,
    preset,
    preset_note,
    presets,
    sizes,
    validate,
    without_effect,
)
from gfrnn.runs import RunFolder, TakenOver, checkpoint_origin, find_checkpoint
from gfrnn.training import stopping  # early: it looks who started this process
from gfrnn.training.ds_config import load_ds_config, resolve_ds_config, stage_of
from gfrnn.training.heartbeat import Heartbeat, measured_network
from gfrnn.training.memory import estimate


def main() -> None:
    """gfrnn-train."""
    stopping.end_on_signals()
    cli.run(_recorded)


def _recorded() -> None:
    heart = Heartbeat()
    try:
        _main(heart)
    except BaseException as error:
        heart.end(error)
        raise
    heart.end(None)


def _main(heart: Heartbeat) -> None:
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
    if settings.start_from is not None and run.named_checkpoint("latest") is None:  # else it goes on from its own
        other = checkpoint_origin(find_checkpoint(settings.start_from))[0]
        if other.task != settings.task:
            raise UserError(f"--start-from {settings.start_from} is a model of {other.task}, not of {settings.task}")
        for name in ("residual", "cap_input_gate"):  # what differs otherwise has other weights
            if getattr(other.model, name) != getattr(settings.model, name):
                flag = f"--{'no-' * getattr(settings.model, name)}{name.replace('_', '-')}"
                raise UserError(f"--start-from {settings.start_from} is another model: it takes {flag}")
    for notice in without_effect(settings):
        cli.say(f"note: {notice}")
    if settings.dry_run:
        print_settings(settings, ds_config, world_size)
        return
    if settings.prepare:
        from gfrnn.data import load_corpus

        corpus = load_corpus(settings)
        cli.say(f"{corpus.name} is ready: {corpus.prepare(settings.batch)}")
        return
    train(settings, ds_config, run, heart)


def train(settings: Settings, ds_config: dict[str, Any], run: RunFolder, heart: Heartbeat) -> None:
    """Trains, or says that the run in this folder is finished. Raises UserError, RunFailed, Stopped."""
    _share_cores()
    from gfrnn.data import load_corpus
    from gfrnn.training.tracking import Tracker

    corpus = load_corpus(settings)
    run.check(settings, corpus.md5)
    run.mlflow_run_id()  # if its file is damaged, better now than at the first checkpoint
    finished = _finished(run, settings)
    if finished is not None:
        cli.say(f"{run.path} is finished already; give another --output-dir, or a larger --max-updates to go on")
        if cli.rank() == 0:
            if settings.run.mlflow:  # what a server that was down has missed
                Tracker.start(run.path, settings.run.experiment).finish()
            _print_results(finished, settings, run)
        return
    corpus.prepare(settings.batch)  # what cannot work answers at once, and what must be made is made before the group
    run.check_writable()

    import torch.distributed as dist

    from gfrnn.training.checkpoint import on_first_process
    from gfrnn.training.engine import init_distributed
    from gfrnn.training.loop import Trainer

    heart.at("meeting")
    device = init_distributed(timedelta(minutes=settings.run.collective_timeout))
    heart.at("loading")
    with on_first_process("take the run folder", device) as first:
        if first:
            run.lock()
            run.check(settings, corpus.md5)  # again: another training may have begun here and ended
            latest = run.named_checkpoint("latest")
            run.create(settings, ds_config, corpus.md5)
            step = int(latest.name.removeprefix("step-")) if latest is not None else 0
            run.truncate_metrics(step)
            network = measured_network()
            if network:
                run.append_metrics({"step": step, **network})
            run.summary_path.unlink(missing_ok=True)
            heart.each_beat(lambda: _end_if_taken_over(run, heart))
    tracked = settings.run.mlflow and dist.get_rank() == 0
    tracker = Tracker.start(run.path, settings.run.experiment) if tracked else None
    # until MLflow has it all: a launcher ends the rest when the first process is gone
    with contextlib.ExitStack() as listening:
        try:
            trainer = Trainer(settings, ds_config, run, corpus, device, heart)
            listening.enter_context(trainer.stop.listening())
            summary = trainer.fit()
        except FileNotFoundError as error:
            if run.config_path.exists():
                raise
            raise UserError(f"--output-dir {run.path} was removed while it was trained in; start again") from error
        finally:
            if tracker is not None:
                tracker.finish(timeout=20)  # or it may still write to the folder when another start has it
    if dist.get_rank() == 0:
        _print_results(summary, settings, run)
    dist.barrier()  # a process that leaves early breaks the connections of the rest


def _end_if_taken_over(run: RunFolder, heart: Heartbeat) -> None:
    """Also where the main thread waits for processes that will never answer."""
    try:
        run.check_owned()
    except TakenOver as error:
        heart.end(error)
        cli.end(f"stopped: {error}", EXIT_STOPPED)


def _finished(run: RunFolder, settings: Settings) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do, else None."""
    summary = run.read_summary()
    if summary is None:
        return None
    gave_up = 0 < settings.run.patience <= summary["without_best"]
    more = (settings.run.max_updates or summary.get("total_updates", 0)) > summary["step"] and not gave_up
    return summary if summary["finished"] and not more else None


def _share_cores() -> None:
    """Without a word from the user, the processes of a node share its cores (read by OpenMP when torch is imported)."""
    here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or cli.world_size())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cli.cores() // here)))


# ------------------------------------------------------------------------------------------- what is printed


def _print_results(summary: dict[str, Any], settings: Settings, run: RunFolder) -> None:
    from gfrnn.training.tracking import ui_command

    print(f"test {summary['test_bpc']:.4f} BPC, validation {summary['valid_bpc']:.4f} at update {summary['best_step']}")
    if settings.task == "text":
        print(f"a sample ({settings.run.sample_length} bytes, temperature 0.8):")
    else:
        print(f"{summary['test_accuracy']:.1%} of test characters right, {summary['test_exact']:.1%} of whole targets")
        print("test programs, what they print, and what the model says:")
    sample = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in summary["sample"])
    print("    " + sample.strip("\n").replace("\n", "\n    "))
    print(f"run folder: {run.path}")
    if sys.prefix != sys.base_prefix and "VIRTUAL_ENV" not in os.environ:  # started by `make train`, say
        print(f"first:      . {os.path.relpath(sys.prefix)}/bin/activate")
    if settings.run.mlflow:
        print(f"its curves: {ui_command(run.path)}")
    path = shlex.quote(str(run.path))
    print(f"score it:   {_command('evaluate')} {path}")
    if settings.task == "text":
        print(f"more text:  {_command('sample')} {path} --prompt 'The '")
    else:
        print(f"predict:    {_command('sample')} {path} --program FILE")
    if settings.preset == "demo" and _IN_CHECKOUT:
        print("full size:  deepspeed src/train.py --deepspeed ds_configs/z2.json   (gf-lstm-5x700 on enwik8, for GPUs)")
    if settings.preset == "programs-demo" and _IN_CHECKOUT:
        print("full size:  deepspeed src/train.py --task programs --deepspeed ds_configs/z2.json   (for GPUs)")


_IN_CHECKOUT = (Path(__file__).parents[2] / "evaluate.py").is_file()


def _command(name: str) -> str:
    """What starts another program of ours."""
    return f"python src/{name}.py" if _IN_CHECKOUT else f"gfrnn-{name}"


def print_presets() -> None:
    """Every preset with its size, counted as the paper does."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Presets; weights of those of text at the paper's {PAPER_SYMBOLS} symbols, FLOP at 256, as a run has",
        caption="recurrent: weights with global gates, no biases, no softmax; of programs those of both "
        "nets. FLOP: to train, a character (of the target, for programs); look-ups of one-hot symbols cost none",
    )
    for column in ("preset", "recurrent", "softmax", "MFLOP a character", ""):
        table.add_column(column, justify="left" if column in ("preset", "") else "right", no_wrap=column == "preset")
    for name, settings in presets().items():
        count = model_sizes(settings.model, PAPER_SYMBOLS) if settings.task == "text" else sizes(settings)
        flops = f"{networks(settings)[-1].train_flops / 1e6:.2f}"
        table.add_row(name, f"{count.recurrent:,}", f"{count.softmax:,}", flops, preset_note(name))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def print_settings(settings: Settings, ds_config: dict[str, Any], world_size: int) -> None:
    """What a run with these flags would do."""
    count = sizes(settings)
    flat = settings.to_json()
    if settings.task == "text":
        del flat["programs"]
    for group in (flat, *(group for group in flat.values() if isinstance(group, dict))):
        for name, value in group.items():
            if not isinstance(value, dict):
                print(f"--{name.replace('_', '-'):24} {value}")
    print(f"parameters                 {count.total:,} ({count.recurrent:,} recurrent weights)")
    labels = (
        ("FLOP a character",) if settings.task == "text" else ("FLOP a source character", "FLOP a target character")
    )
    for label, network in zip(labels, networks(settings), strict=True):
        print(f"{label:26} {network.train_flops:,} to train")
    print(f"processes                  {world_size}, ZeRO stage {stage_of(ds_config)}")
    print(f"DeepSpeed config           {json.dumps(ds_config)}")
    memory = estimate(settings, ds_config, world_size)
    how = f"ZeRO stage {stage_of(ds_config)}, W = {world_size}, --recompute {settings.batch.recompute}"
    print(f"memory of a process        {how}; fullest at: {memory.moment}")
    for part, size in {**memory.parts, "total": memory.total}.items():
        print(f"    {part:22} {size / 1e6:9,.0f} MB")


def _preset_name(argv: Sequence[str]) -> str:
    """The value of --preset, or the task's own: it is the default for every other flag, so it is needed first."""
    name = _value(argv, "--preset")
    if name is not None:
        return name
    return next((own for task, own in TASK_PRESETS.items() if task == _value(argv, "--task")), Settings().preset)


def _value(argv: Sequence[str], flag: str) -> str | None:
    """What a flag is given, as `FLAG VALUE` or `FLAG=VALUE`; None if it is not. The last one counts."""
    found = None
    for position, arg in enumerate(argv):
        if arg.startswith(f"{flag}="):
            found = arg.removeprefix(f"{flag}=")
        if arg == flag and position + 1 < len(argv):
            found = argv[position + 1]
    return found
