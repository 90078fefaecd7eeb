"""A run's best weights as a model that ships with the package: gfrnn-ship, python src/ship.py RUN NAME.

Everything is written and measured in a hidden folder beside its place; one rename puts it there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from gfrnn import shipped
from gfrnn.cli import parse, run, say
from gfrnn.config import DataSettings, Settings, UserError
from gfrnn.shipped import CARD, CONFIG, STEP, WEIGHTS, Rounding

LARGEST = 8_000_000
"""Bytes that a model may have in all: what ships is a part of the repository for good."""
_STEP_TEXT = 1 << 14  # bytes of validation text that step.onnx is checked on


@dataclass(frozen=True)
class ShipSettings:
    """Make a finished run of text a model that ships: its best weights, rounded and measured, with a model card."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder; its best checkpoint is taken."""
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """What the model is called from now on."""
    precision: Rounding = "bf16"
    """Of the matrices on disk. int8: half of bf16, one scale a row. Vectors stay fp32."""
    notes: str = ""
    """More for the card, where it speaks of the training: the hardware, say."""
    models_dir: Path | None = None
    """Folder of models to put it into. Default: the environment's GFRNN_MODELS, else the package's own."""
    onnx: bool = True
    """Also ship the step in int8 for ONNX Runtime, so that it is served without torch."""
    max_cost: float = 0.01
    """Most bits a byte that rounding may cost, on validation or test text."""
    corpus_file: Path | None = None
    """The corpus the run was trained on, if it has moved since."""
    data_dir: Path | None = None
    """Where corpora are kept as Arrow, if not where the run had them."""
    streams: int = 32
    """Of the evaluation, as in evaluate.py."""
    warmup: int = 1000
    """Of the evaluation, as in evaluate.py."""
    device: str = "auto"
    """That evaluates: cpu, cuda, cuda:N, or auto: cuda where there is one."""


def main() -> None:
    """gfrnn-ship."""
    run(_main)


def _main() -> None:
    settings = parse(ShipSettings, sys.argv[1:])
    target = _target(settings)
    from gfrnn.runs import RunFolder

    trained = RunFolder(Path(settings.run))
    summary = _finished(trained, settings.run)
    figures = ship(settings, trained.read_settings(), summary, target)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {size / 1e6:.2f} MB, {settings.precision}")
    for split in ("valid", "test"):
        was, now = figures["run"][split], figures["shipped"][split]
        print(f"{split:5}  {was:.4f} BPC, as it ships {now:.4f} ({now - was:+.5f})")


def _target(settings: ShipSettings) -> Path:
    """Where the model will be; raises UserError for what cannot be before anything is loaded."""
    shipped.check_name(settings.name)
    if not settings.max_cost >= 0:  # nor nan
        raise UserError(f"--max-cost is {settings.max_cost}; it must not be negative")
    if settings.streams < 1 or settings.warmup < 0:
        raise UserError(f"--streams {settings.streams} --warmup {settings.warmup}: give at least 1 and 0")
    if settings.onnx and importlib.util.find_spec("onnx_ir") is None:
        raise UserError("step.onnx needs what is not installed: pip install '.[export]', or give --no-onnx")
    folder = settings.models_dir or shipped.own_models() or shipped.MODELS
    target = folder / settings.name
    if os.path.lexists(target):
        raise UserError(f"{target} is there already; remove it, or give another name")
    folder.mkdir(parents=True, exist_ok=True)
    return target


def _finished(folder: Any, name: str) -> dict[str, Any]:
    """The summary of a run; raises UserError if it has not come to its end."""
    trained: Settings = folder.read_settings()
    if trained.task != "text":
        raise UserError(f"{name} is a model of {trained.task}; only models of text ship")
    summary: dict[str, Any] | None = folder.read_summary()
    if summary is None or not summary["finished"]:
        raise UserError(f"{name} is not finished: the command that it was started with goes on to its end")
    return summary


def ship(settings: ShipSettings, trained: Settings, summary: dict[str, Any], target: Path) -> dict[str, Any]:
    """Rounds, measures, writes. Returns BPC by split of the run's weights and of those that ship, as in config.json.

    Raises UserError for a model that is too large, or that rounding makes worse than --max-cost allows.
    """
    from gfrnn.data import load_text
    from gfrnn.data.corpus import KNOWN
    from gfrnn.runs import (
        checkpoint_origin,
        checkpoint_step,
        find_checkpoint,
        git_commit,
        hidden_folder,
        load_checkpoint,
        save_tensors,
        versions,
        write_json,
    )
    from gfrnn.training.card import write_card

    checkpoint = find_checkpoint(settings.run)
    _, corpus_md5 = checkpoint_origin(checkpoint)
    data = trained.data.moved(settings.corpus_file, settings.data_dir)
    corpus = load_text(data)
    # what is said of it from now on has no paths of this machine in it
    own_file = None if corpus.md5 in (each.md5 for each in KNOWN.values()) else Path(corpus.name)
    public = DataSettings(corpus=corpus.name if own_file is None else trained.data.corpus, corpus_file=own_file)  # type: ignore[arg-type]
    origin = dataclasses.replace(
        trained,
        output_dir=Path("runs") / settings.name,
        data=public,
        start_from=Path(trained.start_from.name) if trained.start_from is not None else None,
        deepspeed=Path("ds_configs") / trained.deepspeed.name if trained.deepspeed is not None else None,
    )
    config: dict[str, Any] = {
        "name": settings.name,
        "precision": settings.precision,
        "step": checkpoint_step(checkpoint),
        "bpc": {},
        "settings": origin.to_json(),
        "corpus": corpus.name,
        "corpus_md5": corpus_md5 or corpus.md5,
        "training": {name: summary[name] for name in ("wall_clock_s", "characters", "world_size", "zero_stage")},
        "parameters": summary["parameters"],
        "notes": settings.notes,
        "git_commit": git_commit(),
        "versions": versions(),
    }
    with hidden_folder(target) as private:
        folder = private / target.name  # inside: the private one is nobody else's to read
        folder.mkdir()
        saved = load_checkpoint(checkpoint)
        moments = saved.optimizer.get("exp_avg_sq", saved.optimizer.get("square_avg"))
        save_tensors(folder / WEIGHTS, shipped.pack(saved.best_weights, moments, settings.precision))
        _check_size(folder, settings)
        write_json(folder / CONFIG, config)
        measured = {
            "run": _measure(settings, str(checkpoint), data, "the run's weights"),
            "shipped": _measure(settings, str(folder), data, f"the same in {settings.precision}"),
        }
        found = {whose: {split: of[f"{split}_bpc"] for split in ("valid", "test")} for whose, of in measured.items()}
        for split, bpc in found["shipped"].items():
            cost = bpc - found["run"][split]
            if not cost <= settings.max_cost:
                raise UserError(
                    f"{settings.precision} makes the {split} text {cost:+.4f} bits a byte worse, more than "
                    f"{settings.max_cost:g}: not written; take another --precision, or allow it with --max-cost"
                )
        config |= {"bpc": found["shipped"], "bpc_of_run": found["run"]}
        config["measured"] = {name: measured["shipped"][name] for name in ("streams", "warmup")}  # as they were used
        write_json(folder / CONFIG, config)
        if settings.onnx:
            text = private / "text"
            text.write_bytes(corpus.valid[:_STEP_TEXT].tobytes())
            config["onnx"] = _write_step(folder, text)
            write_json(folder / CONFIG, config)
        write_card(folder / CARD, config)
        _check_size(folder, settings)
        folder.rename(target)
    return found


def _check_size(folder: Path, settings: ShipSettings) -> None:
    parts = {file.name: file.stat().st_size for file in folder.iterdir()}
    size = sum(parts.values())
    if size > LARGEST:
        listed = ", ".join(f"{name} {part / 1e6:.2f}" for name, part in sorted(parts.items()))
        mends = ["--precision int8"] * (settings.precision != "int8") + ["--no-onnx"] * (STEP in parts)
        raise UserError(
            f"{settings.name} would have {size / 1e6:.2f} MB ({listed}), {(size - LARGEST) / 1e6:.2f} more than a "
            f"model that ships may: give {' or '.join([*mends, 'a smaller model'])}"
        )


def _measure(settings: ShipSettings, weights: str, data: DataSettings, what: str) -> dict[str, Any]:
    """What evaluate.py finds."""
    from gfrnn.training.evaluate import EvaluateSettings, evaluate

    say(f"scoring {what}")
    return evaluate(
        EvaluateSettings(
            run=weights,
            corpus_file=data.corpus_file,
            data_dir=data.data_dir,
            streams=settings.streams,
            warmup=settings.warmup,
            device=settings.device,
        )
    )


def _write_step(folder: Path, text: Path) -> dict[str, Any]:
    """step.onnx of the rounded weights; what to_onnx.py has measured of it. Raises UserError if it is no good.

    A program of its own, as for anyone else: nothing in here imports gfrnn_onnx.
    """
    say("writing step.onnx in int8")
    figures = text.with_name("figures.json")
    # "-c": to_onnx.py is no part of an installed package
    command = [sys.executable, "-c", "from gfrnn_onnx.export import main; main()", str(folder), "--precision", "int8"]
    command += ["--output", str(folder / STEP), "--text-file", str(text), "--json", str(figures)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 2:
        raise UserError(f"step.onnx: {done.stderr.splitlines()[-1].removeprefix('error: ')}; or give --no-onnx")
    if done.returncode != 0:
        raise RuntimeError(f"to_onnx.py ended with status {done.returncode}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(figures.read_bytes())
    return {name: found[name] for name in ("precision", "characters", "trained_bpc", "exported_bpc", "cost_bpc")}
