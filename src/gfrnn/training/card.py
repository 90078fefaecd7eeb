"""The model card of a model that ships: Markdown, all of it from what the run and its measurement have left.

Sections as in Mitchell et al. 2019, Model Cards for Model Reporting.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from gfrnn.config import Settings, preset, sizes

_WIKIPEDIA = (
    "{name}: text of the English Wikipedia, 3 March 2006, as the Large Text Compression Benchmark has it "
    "(<https://mattmahoney.net/dc/textdata.html>); {bytes}. Its licence is Wikipedia's, Creative Commons "
    "Attribution-ShareAlike (CC BY-SA) and the GNU Free Documentation License; its authors are the contributors of the "
    "articles. The weights are made from that text, and can give parts of it back."
)
_EXTENTS = {
    "enwik8": "the first 100,000,000 bytes of its XML dump",
    "enwik8-1m": "the first 1,000,000 bytes of its XML dump",
    "enwik8-4m": "the first 4,000,000 bytes of its XML dump",
    "text8": "100,000,000 bytes of letters and spaces alone",
}
_UNITS = {"lstm": "LSTM", "gru": "GRU", "tanh": "tanh", "mrnn": "multiplicative RNN"}
_FEEDBACK = {
    "gated": "gated feedback (Chung et al. 2015): every layer reads every layer's last state through a learned gate",
    "full": "full feedback: every layer reads every layer's last state",
    "none": "a stack, no feedback",
}


def write_card(path: Path, config: dict[str, Any]) -> None:
    """card.md, of a model's config.json."""
    from gfrnn.runs import replace_file

    replace_file(path, card(config).encode())


def card(config: dict[str, Any]) -> str:
    """The card as Markdown."""
    settings, name = Settings.from_json(config["settings"]), config["name"]
    m, count, trained = settings.model, sizes(settings), config["training"]
    seconds = trained["wall_clock_s"]
    time = f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"
    processes = f"{trained['world_size']} process{'es' * (trained['world_size'] > 1)}"
    was, now, measured = config["bpc_of_run"], config["bpc"], config["measured"]
    corpus = config["corpus"]
    if corpus in _EXTENTS:
        data = _WIKIPEDIA.format(name=corpus, bytes=_EXTENTS[corpus])
    else:
        data = f"{corpus}, a text of the trainer's own: its licence is not known here."
    rounding = {"bf16": "bfloat16", "int8": "8-bit integers with one scale a row"}[config["precision"]]
    lines = [
        f"# {name}",
        "",
        f"A language model of bytes, made by gfrnn {config['versions']['gfrnn']}: {m.num_layers} layers of "
        f"{m.hidden_size} units ({_UNITS[m.unit]}), {_FEEDBACK[m.feedback]}.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {count.total:,} |",
        f"| of these recurrent weights | {count.recurrent:,} |",
        f"| symbols | {m.vocab_size} (bytes); {_input(m.embedding_size)} |",
        f"| weights on disk | matrices as {rounding}, vectors fp32 |",
        "",
        "## Figures",
        "",
        f"Bits a byte (BPC) by `evaluate.py`, {measured['streams']} streams, warm-up {measured['warmup']}, the text "
        "cut 90 / 5 / 5 in its order; no dynamic evaluation. Validation text chose the checkpoint, test text nothing.",
        "",
        "| weights | validation BPC | test BPC |",
        "|---|---|---|",
        f"| of the run (fp32) | {was['valid']:.4f} | {was['test']:.4f} |",
        f"| these ({config['precision']}) | {now['valid']:.4f} | {now['test']:.4f} |",
        "",
    ]
    if "onnx" in config:
        onnx = config["onnx"]
        lines += [
            f"`step.onnx` has its products in {onnx['precision']}, which changes the {onnx['characters']:,} first "
            f"bytes of the validation text by {onnx['cost_bpc']:+.4f} BPC.",
            "",
        ]
    lines += [
        "## Data",
        "",
        data,
        "",
        "## Training",
        "",
        f"    {command(settings, trained['world_size'])}",
        "",
        f"{trained['characters']:,} bytes read in {time} on {processes}, ZeRO stage {trained['zero_stage']}; the "
        f"weights are those after update {config['step']:,}. " + _versions(config),
        "",
    ]
    if config["notes"]:
        lines += [config["notes"], ""]
    lines += [
        "## Use",
        "",
        f"    python src/evaluate.py {name} --text-file FILE       # add --dynamic to learn while reading",
        f"    python src/sample.py {name} --prompt 'The '",
        f"    python src/train.py --start-from {name} --corpus-file FILE {shlex.join(_model_flags(settings))}",
    ]
    if "onnx" in config:
        lines.append(f"    python export/serve.py {name}                       # needs no torch")
    lines += [
        "",
        "It is here to be measured, compared with, built upon, and to show what such nets learn: a baseline of "
        "byte-level language modelling and compression.",
        "",
        "## Limits",
        "",
        "- What it writes looks like the text it was trained on, and is made up: names, dates, links and figures are "
        "not facts, and it follows no instructions. It is not made to inform or to talk with people.",
        "- It knows the kind of text, the languages and the markup that its training text has. Other text costs more "
        "bits; measure yours.",
        "- What is unfair or wrong in the training text is in the model too; nothing was filtered.",
        "- It can repeat passages of the training text word by word: mind the licence above when you publish what it "
        "writes.",
        "",
    ]
    return "\n".join(lines)


def command(settings: Settings, processes: int = 1) -> str:
    """The command line that trains with these settings: the preset, and what differs from it."""
    flags = ["--preset", settings.preset]
    flags += _differences(preset(settings.preset), settings, {"preset", "output_dir", "dry_run", "prepare"})
    launcher = f"deepspeed --num_gpus {processes}" if processes > 1 else "python"
    return f"{launcher} src/train.py {shlex.join(flags)}"


def _model_flags(settings: Settings) -> list[str]:
    """That make another run's model this one."""
    return ["--preset", settings.preset, *_differences(preset(settings.preset).model, settings.model, set())]


def _differences(usual: Any, given: Any, left_out: set[str]) -> list[str]:
    """Flags for every field of a dataclass that has another value."""
    flags: list[str] = []
    for f in dataclasses.fields(given):
        was, now = getattr(usual, f.name), getattr(given, f.name)
        if dataclasses.is_dataclass(now):
            flags += _differences(was, now, {"data_dir", "mlflow", "experiment"})
        elif was != now and f.name not in left_out and now is not None:
            flag = f.name.replace("_", "-")
            flags += [f"--{flag}" if now else f"--no-{flag}"] if isinstance(now, bool) else [f"--{flag}", str(now)]
    return flags


def _input(embedding_size: int) -> str:
    return f"an embedding of width {embedding_size}" if embedding_size else "read one-hot"


def _versions(config: dict[str, Any]) -> str:
    found = {name: version for name, version in config["versions"].items() if name in ("torch", "deepspeed", "python")}
    commit = f"; gfrnn at {config['git_commit']}" if config["git_commit"] else ""
    return "Shipped with " + ", ".join(f"{name} {version}" for name, version in sorted(found.items())) + commit + "."
