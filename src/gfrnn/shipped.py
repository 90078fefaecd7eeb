"""Models that ship with the package, found by their name. Imports nothing heavy: a runtime without torch asks too.

    models/NAME/config.json          settings, MD5 of the text, update, BPC, versions
    models/NAME/weights.safetensors  weights, rounded; what dynamic evaluation has to know
    models/NAME/card.md              what it is, for people
    models/NAME/step.onnx            the step in int8, for ONNX Runtime

A user's own models may lie in another folder, laid out alike: the environment's GFRNN_MODELS names it, and what is
there comes before what ships.

weights.safetensors has, of a matrix, NAME in bf16; or NAME in int8 and NAME.scale, one fp32 a row. Of a vector (biases,
gains) NAME in fp32. Of the gradients' root mean squares in training, which dynamic evaluation divides by, it has a
vector's as they are and of a matrix the means of rows and columns, gradient_rms/NAME.rows and .columns: the matrix of
rank 1 with these means stands for it, as in Shazeer and Stern 2018 (Adafactor), there of the mean squares.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gfrnn.config import UserError

if TYPE_CHECKING:
    from torch import Tensor

    TensorsByName = dict[str, Tensor]

Rounding = Literal["bf16", "int8"]
MODELS = Path(__file__).with_name("models")
VARIABLE = "GFRNN_MODELS"
CONFIG, WEIGHTS, CARD, STEP = "config.json", "weights.safetensors", "card.md", "step.onnx"

_RMS = "gradient_rms/"
_SCALE, _ROWS, _COLUMNS = ".scale", ".rows", ".columns"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_MOST = 127  # of int8, the same on both sides of 0


# ------------------------------------------------------------------------------------------------- finding


def check_name(name: str) -> None:
    """Raises UserError for what no model may be called."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name for a model: give letters, digits, - and _, a letter or digit first")


def own_models() -> Path | None:
    """The user's own folder of models; None if the environment names none."""
    folder = os.environ.get(VARIABLE)
    return Path(folder).expanduser() if folder else None


def shipped_models() -> dict[str, Path]:
    """Every model's folder, by its name."""
    found: dict[str, Path] = {}
    for folder in (MODELS, own_models()):
        if folder is not None and folder.is_dir():
            found |= {path.name: path for path in sorted(folder.iterdir()) if is_shipped(path)}
    return found


def is_shipped(path: Path) -> bool:
    """Whether a folder holds a model as it ships: neither a run nor a checkpoint."""
    return _NAME.fullmatch(path.name) is not None and (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def find_shipped(name: str | Path) -> Path | None:
    """The folder of the model of that name; None for what is a path (there, or with a '/') and for unknown names."""
    return None if "/" in str(name) or os.path.lexists(name) else shipped_models().get(str(name))


def names_known(name: str | Path) -> str:
    """What to say of an unknown name beside why it is no path: the nearest names, and all of them."""
    names = sorted(shipped_models())
    if not names or "/" in str(name):
        return ""
    import difflib

    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ";"
    return f"{hint} models that ship: {', '.join(names)}"


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model's folder. Raises UserError if it is damaged or another version's."""
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_bytes())
        if not {"settings", "precision", "step", "corpus_md5", "bpc"} <= config.keys():
            raise ValueError("names are missing in it")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path / CONFIG} is damaged ({error}); install gfrnn again, or ship the model again"
        ) from error
    return config


# ------------------------------------------------------------------------------------------------- tensors


def pack(weights: TensorsByName, second_moments: TensorsByName | None, precision: Rounding) -> TensorsByName:
    """What weights.safetensors holds of fp32 weights and of the mean squares of their gradients in training."""
    import torch

    packed: TensorsByName = {}
    for name, w in weights.items():
        if w.dim() < 2:
            packed[name] = w.float()
        elif precision == "bf16":
            packed[name] = w.bfloat16()
        else:
            scale_R = w.float().abs().amax(1) / _MOST
            packed[name + _SCALE] = scale_R
            packed[name] = (w / scale_R.where(scale_R > 0, 1.0).unsqueeze(1)).round().to(torch.int8)
    for name, moment in (second_moments or {}).items():
        rms = moment.float().sqrt()
        if rms.dim() < 2:
            packed[_RMS + name] = rms
        else:
            packed[_RMS + name + _ROWS], packed[_RMS + name + _COLUMNS] = rms.mean(1), rms.mean(0)
    return packed


def unpack(packed: TensorsByName) -> tuple[TensorsByName, TensorsByName]:
    """(weights, second moments) by parameter name, fp32 and in full; no second moments if there were none."""
    weights: TensorsByName = {}
    moments: TensorsByName = {}
    for full, tensor in packed.items():
        name = full.removeprefix(_RMS)
        if name == full:
            if not name.endswith(_SCALE):
                scale_R = packed.get(name + _SCALE)
                weights[name] = tensor.float() if scale_R is None else tensor.float() * scale_R.unsqueeze(1)
        elif name.endswith(_ROWS):
            name = name.removesuffix(_ROWS)
            mean = tensor.mean().clamp(min=1e-30)  # of a matrix that never had a gradient: zeros stay zeros
            moments[name] = (tensor.unsqueeze(1) * (packed[_RMS + name + _COLUMNS] / mean)).square()
        elif not name.endswith(_COLUMNS):
            moments[name] = tensor.square()
    return weights, moments
