"""From a run to step.onnx (programs: a folder of two): gfrnn-to-onnx, python export/to_onnx.py RUN."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gfrnn.cli import check_writable, parse, run, say
from gfrnn.config import PROGRAM_SYMBOLS, TARGET_SYMBOLS, Corpus, Settings, UserError
from gfrnn.shipped import is_shipped
from gfrnn_onnx.names import DECODER, ENCODER, WEIGHTS, Kind, Metadata, is_utf8
from gfrnn_onnx.precision import MEANING, Precision

if TYPE_CHECKING:
    from gfrnn.data import Bytes
    from gfrnn.data.program_batches import ProgramBatch
    from gfrnn.nn import Model
    from gfrnn.nn.language_model import SymbolRNN
    from gfrnn_onnx.runner import Step
    from gfrnn_onnx.verify import Differences

_PIECES = 32  # that held-out text is read in, side by side
_THERE: Corpus = "enwik8-1m"  # ships with the package
_PROGRAMS = 256  # held out, that a program model is checked on
_MOST_UNROLL = 256
_OTHER_FORMATS = (".json", ".onnxjson", ".onnxtext", ".onnxtxt", ".ort", ".pbtxt", ".prototxt", ".textproto", ".txtpb")
"""Endings that mean another format to onnx, or to ONNX Runtime."""
_MOST_COST = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.01, "int8": 0.01, "int4": 0.5}
"""Bits a character that a precision may add before the export counts as failed."""
_MOST_ROUNDINGS = 10
"""Times what a net's own rounding does to it over 200 steps, where that is more than the tolerance."""


@dataclass(frozen=True)
class ExportSettings:
    """Write the step of a trained model for ONNX Runtime, checked against the model."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder (its best checkpoint), a checkpoint folder, or the name of a model that ships (docs/models.md)."""
    output: Path | None = None
    """The file to write; of a model of programs the folder for encoder.onnx and decoder.onnx. Default: step.onnx, or
    the folder step."""
    precision: Precision = "fp32"
    """Of the products. int8: a quarter of the file, 3 times the speed on a CPU; int4: an eighth, fastest for one
    sequence, least exact; fp16: half the file, and CUDA's fast products; bf16: half the file, no speed."""
    unroll: int = 1
    """Symbols that one run reads: token is [batch, K], logits [batch, K, symbols]. To score, not to generate."""
    gates: bool = False
    """Add an output: the global gates [batch, layers, layers] of each step (gated feedback)."""
    text_file: Path | None = None
    """Check on this text instead of the run's validation text."""
    corpus_file: Path | None = None
    """The corpus the run was trained on, if it has moved since."""
    data_dir: Path | None = None
    """Where corpora are kept as Arrow, if not where the run had them."""
    check_bytes: int = 16384
    """Bytes of held-out text that the export is checked on."""
    tolerance: float = 1e-4
    """Largest difference of a logit from the trained model's, in fp32, each step and over 200."""
    max_cost: float | None = None
    """Most bits a character that the precision may cost. Default: 0.0001 in fp32, 0.5 in int4, 0.01 in the others."""
    register: str | None = None
    """Also log the model to the run's MLflow run, and register it under this name."""
    triton: Path | None = None
    """Also write a model repository for Triton into this folder."""
    json: Path | None = None
    """Also write the figures to this file."""


def main() -> None:
    """gfrnn-to-onnx."""
    run(_main)


def _main() -> None:
    settings = parse(ExportSettings, sys.argv[1:])
    from gfrnn.runs import checkpoint_origin, find_checkpoint, write_json
    from gfrnn.shipped import is_shipped

    checkpoint = find_checkpoint(settings.run)
    trained, corpus_md5 = checkpoint_origin(checkpoint)  # a wrong path answers before torch
    if settings.register is not None and is_shipped(checkpoint):
        raise UserError(f"--register: {settings.run} ships, and no MLflow run is its own; register a run of yours")
    output = _validate(settings, trained)
    results = export(settings, checkpoint, trained, corpus_md5, output)
    if settings.json is not None:
        with _naming(settings.json):
            write_json(settings.json.resolve(), results)
    _print(results)


def _validate(settings: ExportSettings, trained: Settings) -> Path:
    """Refuses what cannot work before anything is loaded; where the model goes. Raises UserError."""
    if not 1 <= settings.unroll <= _MOST_UNROLL:
        raise UserError(f"--unroll is {settings.unroll}; it must be from 1 to {_MOST_UNROLL}")
    if settings.check_bytes < _PIECES:
        raise UserError(f"--check-bytes is {settings.check_bytes}; it must be at least {_PIECES}")
    for flag, value in (("--tolerance", settings.tolerance), ("--max-cost", settings.max_cost)):
        if value is not None and not value > 0:  # nor nan
            raise UserError(f"{flag} is {value}; it must be above 0")
    if settings.gates and (trained.model.feedback != "gated" or trained.model.unit == "mrnn"):
        raise UserError("--gates: this model has no gated feedback, so no global gates; leave --gates out")
    programs = trained.task == "programs"
    if programs and settings.triton is not None:
        raise UserError(
            "--triton: a decoder of programs starts from its encoder's state, which Triton cannot hand over"
        )
    if programs and settings.text_file is not None:
        say("note: --text-file has no effect on a model of programs")
    output = (settings.output or Path("step" if programs else "step.onnx")).resolve()
    if not is_utf8(str(output)):
        raise UserError(f"--output {output}: its name is not UTF-8; give another name")
    if programs and output.is_file():
        raise UserError(f"--output {output}: a model of programs is a folder of two files, and there a file is")
    if not programs and output.is_dir():
        raise UserError(f"--output {output}: is a folder; give the name of a file")
    if not programs and output.suffix in _OTHER_FORMATS:
        raise UserError(f"--output {output}: its ending means another format; give a name that ends in .onnx")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output}: cannot be written: give a name in a folder that exists")
    if settings.json is not None:
        check_writable("--json", settings.json)
    if settings.triton is not None:
        from gfrnn_onnx.triton import check_target

        check_target(output, settings.triton)
    return output


def export(
    settings: ExportSettings, checkpoint: Path, trained: Settings, corpus_md5: str | None, output: Path
) -> dict[str, Any]:
    """Builds, checks, and only then puts in place. Returns the figures by name; raises UserError if a check fails."""
    from gfrnn.runs import hidden_folder, load_model, sync

    held_out = _held_out(settings, checkpoint, trained, corpus_md5)  # what cannot be found is said before the work
    model, _, _ = load_model(checkpoint, "fp32")
    with hidden_folder(output) as hidden, _naming(output):
        folder = hidden / "new"
        folder.mkdir()
        results = _write(settings, model, checkpoint, trained, held_out, folder, output.name)
        programs = trained.task == "programs"
        if programs:
            output.mkdir(exist_ok=True)
        place = output if programs else output.parent
        made = sorted(file.name for file in folder.iterdir())
        for name in made:  # before the renaming, or a power cut may leave an empty file there
            sync(folder / name)
        for name in reversed(made):  # weights beside a file come before it
            (folder / name).replace(place / name)
        for name in made:  # those of an earlier, larger model
            if not name.endswith(WEIGHTS) and name + WEIGHTS not in made:
                (place / (name + WEIGHTS)).unlink(missing_ok=True)
    if settings.triton is not None:
        from gfrnn_onnx.triton import write_triton

        with _naming(settings.triton):
            results["triton"] = str(write_triton(output, settings.triton))
    if settings.register is not None:
        from gfrnn_onnx.mlflow_model import register

        results["registered"] = register(output, settings.register, checkpoint.resolve().parent.parent)
    return {"output": str(output), **results}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Of an OSError that names no file, as one of a write on a full disk: names this."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _write(
    settings: ExportSettings,
    model: Model,
    checkpoint: Path,
    trained: Settings,
    held_out: list[bytes] | ProgramBatch,
    folder: Path,
    name: str,
) -> dict[str, Any]:
    """Writes the files (of text one, `name`) into a folder, checked. Returns the figures."""
    from gfrnn.nn import EncoderDecoder
    from gfrnn_onnx.runner import Step
    from gfrnn_onnx.session import Session
    from gfrnn_onnx.step import add_bpc, build_step, save_step
    from gfrnn_onnx.verify import check_operators, exported_program_bpc, program_bpc, text_bpc

    metadata = _metadata(settings, checkpoint, trained)
    steps: dict[str, Step] = {}
    worst: list[Differences] = []
    for file, (net, kind, symbols) in _nets(model, name).items():
        shape = dataclasses.asdict(net.settings)
        own = dataclasses.replace(metadata, kind=kind, symbols=symbols, settings=shape, bpc={})
        say(f"{file}: {settings.precision}, {MEANING[settings.precision]}")
        built = build_step(net, precision=settings.precision, unroll=settings.unroll, gates=settings.gates)
        save_step(built, own, folder / file)
        check_operators(folder / file, settings.precision)
        steps[file] = Step(folder / file, "cpu")
        worst.append(_check(settings, steps[file], net))

    say("comparing bits a character")
    if isinstance(model, EncoderDecoder):
        assert not isinstance(held_out, list)
        characters = int(held_out.target_lengths_B.sum())
        trained_bpc = program_bpc(model, held_out)
        exported_bpc = exported_program_bpc(steps[ENCODER], steps[DECODER], held_out)
    else:
        assert isinstance(held_out, list)
        characters = sum(map(len, held_out))
        trained_bpc = text_bpc(model, held_out)
        session = Session(folder / name, "cpu")
        exported_bpc = sum(bits_N.sum() for bits_N in session.score(held_out)) / characters
    cost = exported_bpc - trained_bpc
    most = _MOST_COST[settings.precision] if settings.max_cost is None else settings.max_cost
    if not cost <= most or (settings.precision == "fp32" and not abs(cost) <= most):
        raise UserError(
            f"{settings.precision} changes {trained_bpc:.4f} bits a character by {cost:+.4f}, more than {most:g}: not "
            "written; take another --precision, or allow it with --max-cost"
        )
    bpc = {**metadata.bpc, "trained": trained_bpc, "exported": exported_bpc}
    for file in steps:  # to the files that were checked
        add_bpc(folder / file, bpc)
    return {
        "precision": settings.precision,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(each.stat().st_size for each in folder.iterdir()),
        "difference_one_step": max(each.one_step for each in worst),
        "difference_carried": max(each.carried for each in worst),
        "characters": characters,
        "trained_bpc": trained_bpc,
        "exported_bpc": exported_bpc,
        "cost_bpc": cost,
    }


def _check(settings: ExportSettings, step: Step, net: SymbolRNN) -> Differences:
    """Raises UserError if a step in fp32 computes anything else than its net."""
    from gfrnn_onnx.verify import differences, rounding

    found = differences(step, net)
    if settings.precision != "fp32" or max(found) <= settings.tolerance:
        return found
    # a trained net may amplify the last bit of a state, and then any two ways to compute it part
    own = rounding(step, net) if found.one_step <= settings.tolerance else 0.0
    if own > settings.tolerance and found.carried <= _MOST_ROUNDINGS * own:
        say(f"note: this net amplifies rounding: after 200 steps it is {own:.0e} away from itself in fp64")
        return found
    raise UserError(
        f"{step.path.name} differs from the trained model by {found.one_step:.1e} in a step and {found.carried:.1e} "
        f"over 200, more than --tolerance {settings.tolerance:g}: not written"
    )


def _nets(model: Model, name: str) -> dict[str, tuple[SymbolRNN, Kind, str]]:
    """By the name of their file (of text: `name`) the nets of a model, what they are, what their symbols stand for."""
    from gfrnn.nn import EncoderDecoder

    if isinstance(model, EncoderDecoder):
        return {
            ENCODER: (model.encoder, "encoder", PROGRAM_SYMBOLS),
            DECODER: (model.decoder, "decoder", TARGET_SYMBOLS),
        }
    return {name: (model, "text", "bytes")}


def _metadata(settings: ExportSettings, checkpoint: Path, trained: Settings) -> Metadata:
    """What is known before the check, of the run as a whole."""
    from gfrnn.runs import checkpoint_results, versions

    run_id, name, bpc = checkpoint_results(checkpoint)
    found = versions() | {name: importlib.metadata.version(name) for name in ("onnx", "onnx-ir")}
    return Metadata(
        kind="text",
        symbols="bytes",
        settings=dataclasses.asdict(trained.model),
        precision=settings.precision,
        unroll=settings.unroll,
        run_id=run_id,
        checkpoint=name,
        bpc=bpc,
        versions=found,
    )


def _held_out(
    settings: ExportSettings, checkpoint: Path, trained: Settings, corpus_md5: str | None
) -> list[bytes] | ProgramBatch:
    """What the export is checked on: pieces of text, or validation programs. Raises UserError if it is not there."""
    if trained.task == "programs":
        import numpy as np
        import torch

        from gfrnn.data.program_batches import pad
        from gfrnn.data.programs import ProgramTable, Recipe

        made = trained.programs
        recipe = Recipe(made.length, made.nesting, seed=made.program_seed, split="valid")
        table = ProgramTable.of(recipe.programs(0, _PROGRAMS * settings.unroll))
        fitting = np.flatnonzero(table.source_lengths % settings.unroll == 0)[:_PROGRAMS]
        if not len(fitting):
            K = settings.unroll
            raise UserError(f"--unroll {K}: no validation program has a length that {K} divides; take a smaller one")
        return pad(table, fitting, torch.device("cpu"))
    from gfrnn.data import read_bytes

    if settings.text_file is not None:
        text = read_bytes(settings.text_file)
    else:
        text = _validation_text(settings, checkpoint, trained, corpus_md5)
    size = min(len(text), settings.check_bytes) // _PIECES
    if size == 0:
        raise UserError(f"the text to check on has {len(text)} bytes; give at least {_PIECES} with --text-file")
    return [bytes(text[k * size : (k + 1) * size]) for k in range(_PIECES)]


def _validation_text(settings: ExportSettings, checkpoint: Path, trained: Settings, corpus_md5: str | None) -> Bytes:
    """The run's; for a model that ships, where its corpus cannot be had here, that of the corpus that ships."""
    from gfrnn.data import load_text

    data = trained.data.moved(settings.corpus_file, settings.data_dir)
    try:
        corpus = load_text(data)
    except UserError as error:
        if data.corpus_file is not None or not is_shipped(checkpoint):
            raise UserError(f"{error}; --text-file takes any other text") from error
        say(f"note: {data.corpus} cannot be had here: checked on a part of {_THERE}, which the model may have learned")
        return load_text(dataclasses.replace(data, corpus=_THERE)).valid
    if corpus_md5 not in (None, corpus.md5):
        raise UserError(f"{corpus.name} is not the text that the run was trained on: give one with --text-file")
    return corpus.valid


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("precision", "file", "one step", "200 steps", "characters", "trained BPC", "exported BPC", "cost"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    table.add_row(
        results["precision"],
        f"{results['bytes'] / 1e6:,.1f} MB",
        f"{results['difference_one_step']:.1e}",
        f"{results['difference_carried']:.1e}",
        f"{results['characters']:,}",
        f"{results['trained_bpc']:.4f}",
        f"{results['exported_bpc']:.4f}",
        f"{results['cost_bpc']:+.5f}",
    )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(results["output"], markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    for name in ("triton", "registered"):
        if name in results:
            console.print(f"{name}: {results[name]}", markup=False, highlight=False, soft_wrap=True)
