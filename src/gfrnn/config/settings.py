"""Every setting, as dataclasses; how programs end; what programs are written with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Unit = Literal["lstm", "gru", "tanh", "mrnn"]
Feedback = Literal["gated", "full", "none"]
UnitGates = Literal["all", "own"]
Task = Literal["text", "programs"]
Corpus = Literal["enwik8", "text8", "enwik8-1m", "enwik8-4m"]
Curriculum = Literal["baseline", "naive", "mix", "blend"]

EXIT_FINISHED = 0
EXIT_USER = 2
EXIT_FAILED = 3
EXIT_STOPPED = 75  # BSD's EX_TEMPFAIL: stopped early with a checkpoint, start me again

GATES = {"tanh": 1, "gru": 3, "lstm": 4}  # G of each unit
"""Rows of pre-activation a unit has, candidate included, in multiples of its size."""

MOST_NESTING = 10  # a name an operation at most, a to j
MOST_LENGTH = 15  # digits of an operand
LADDERS = ("naive", "blend")  # curricula with levels
PAPER_SYMBOLS = 205  # distinct bytes in enwik8, the alphabet of the paper's parameter counts
PROGRAM_SYMBOLS = "".join(sorted({*"0123456789 \n()*+-:<=>", *"abcdefghij", *"print for x in range if else"}))
"""Characters that occur in programs: the encoder's vocabulary."""
TARGET_SYMBOLS = "0123456789-."
"""Characters of what programs print: the decoder's vocabulary. '.' ends a target, and stands before it."""
VOCABULARY_SIZES = {"text": 256, "programs": len(PROGRAM_SYMBOLS)}


class UserError(Exception):
    """Something a user can get wrong. Shown as one line (what, where, the mend) with exit status 2."""


class Stopped(Exception):
    """The run stopped early with a checkpoint (a signal, a time limit); exit status 75."""


class RunFailed(Exception):
    """The run itself failed, for example a loss that is not finite. Shown as one line with exit status 3."""


def at_home(path: Path) -> Path:
    """With its `~` as the home folder. Raises UserError for a user without one."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        if path.parts[0] != "~":  # a name that begins so
            return path
        raise UserError(f"{path}: there is no home folder here; give another path") from error


@dataclass(frozen=True)
class ModelSettings:
    """The network."""

    unit: Unit = "lstm"
    """Recurrent unit; mrnn is the multiplicative RNN (one layer, no feedback)."""
    num_layers: int = 5
    """Layers L."""
    hidden_size: int = 700
    """Units a layer H."""
    feedback: Feedback = "gated"
    """gated: every layer at t-1 feeds every layer at t through a learned scalar gate; full: gates of 1; none: stack."""
    unit_gates: UnitGates = "all"
    """Which layers at t-1 the unit's own gates read (no effect without feedback or with tanh)."""
    input_skips: bool = True
    """Every layer reads the input symbol, not only the first."""
    output_skips: bool = False
    """The softmax reads every layer, not only the last."""
    residual: bool = False
    """A layer passes up its output plus its input (from the second layer on)."""
    vocab_size: int = 256
    """Symbols V; text is bytes, so 256; programs have 39."""
    embedding_size: int = 0
    """Width of a learned embedding; 0 feeds symbols one-hot."""
    layer_norm: bool = False
    """Normalise every pre-activation over a layer's units, and the LSTM's cell before its tanh."""
    hidden_bias: bool = False
    """GRU: a second bias inside the product with the reset gate, as torch.nn.GRU has."""
    forget_bias: float = 0.0
    """LSTM: initial bias of the forget gate."""
    scale_feedback: bool = False
    """Divide initial recurrent weights that are read from n layers by sqrt(n), so that their sum, before any gate,
    begins as large as a stack's. No effect without feedback."""
    cap_input_gate: bool = False
    """LSTM: the input gate is at most 1 - the forget gate, so that the cell stays in -1 to 1."""
    dropout: float = 0.0
    """Locked dropout between layers: one mask a row and segment."""
    input_dropout: float = 0.0
    """Locked dropout on the input (whole symbols of a row when one-hot)."""
    output_dropout: float = 0.0
    """Locked dropout on what the softmax reads."""
    weight_dropout: float = 0.0
    """Dropout on the recurrent weights (not those of global gates), one mask an update."""


@dataclass(frozen=True)
class DataSettings:
    """The text."""

    corpus: Corpus = "enwik8"
    """enwik8 and text8 are downloaded; enwik8-1m (the first 1,000,000 bytes of enwik8) ships with the package;
    enwik8-4m (the first 4,000,000) is cut from the download."""
    corpus_file: Path | None = None
    """Use this file instead: plain, .gz, .xz or .zip; any text or binary file, read as bytes."""
    data_dir: Path = Path("~/.cache/gfrnn")
    """Where corpora are downloaded to and kept as Arrow."""

    def moved(self, corpus_file: Path | None, data_dir: Path | None) -> DataSettings:
        """The same text, where it is now if it has moved."""
        return dataclasses.replace(
            self, corpus_file=corpus_file or self.corpus_file, data_dir=data_dir or self.data_dir
        )


@dataclass(frozen=True)
class ProgramSettings:
    """The programs (--task programs)."""

    nesting: int = 5
    """Most operations composed in a program, 1 to 10."""
    length: int = 10
    """Most digits of an operand, 1 to 15."""
    curriculum: Curriculum = "mix"
    """How hard training's programs are. baseline: as hard as can be; naive: a ladder up to that; mix: anything up to
    it, program by program; blend: mix one time in five, else the ladder's level."""
    num_programs: int = 320_000
    """Training programs, an epoch."""
    level_programs: int = 20_000
    """naive, blend: programs made at a time for a level, anew for as long as it lasts."""
    valid_programs: int = 2000
    """Validation programs, and as many test programs."""
    program_seed: int = 0
    """Of the programs."""

    @property
    def longest(self) -> tuple[int, int]:
        """About the most characters of a program and of its target: every operation is the longest, with all digits."""
        operation = max(3 * self.length + 17, self.length + 27)  # an if, a loop
        source = self.nesting * operation + self.length + 7
        return source, round(self.length + self.nesting * math.log10(4 * self.length)) + 2


@dataclass(frozen=True)
class BatchSettings:
    """How text becomes updates. None of it depends on the number of processes."""

    rows: int = 100
    """Global rows R: contiguous, equal pieces of the training text (or so many programs) that all processes together
    read in parallel."""
    steps: int = 100
    """Segment length T of truncated backpropagation through time (text)."""
    accumulation: int = 1
    """Micro-batches an update: each process reads its rows in this many parts, one after another."""
    recompute: int = 0
    """Keep the state of every so many steps and compute the rest again in backward: less memory, more time. 0: no."""
    reset_every: int = 0
    """Zero the carried state every so many updates; 0: only when an epoch starts."""
    reset_probability: float = 0.0
    """Zero the carried state of all rows before an update with this probability."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the recurrence's products. Parameters, optimizer, cell state and gradients stay fp32."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer, its schedule, clipping and averaging."""

    optimizer: Literal["adam", "adamw", "rmsprop"] = "adam"
    learning_rate: float = 1e-3
    beta1: float = 0.9
    """Adam: decay of the mean gradient."""
    beta2: float = 0.99
    """Adam: decay of the mean squared gradient."""
    rms_decay: float = 0.95
    """RMSProp (centred): decay of the moments."""
    momentum: float = 0.9
    """RMSProp: momentum."""
    eps: float = 1e-8
    weight_decay: float = 0.0
    """AdamW: decoupled, on matrices only; adam and rmsprop: L2 on matrices only."""
    clip: float = 5.0
    """Largest global gradient norm; 0 does not clip."""
    halve_on_explosion: float = 0.0
    """Halve the learning rate when the gradient norm exceeds this many times its running mean; 0: never."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after warm-up, down to final_learning_rate at the last update."""
    warmup_updates: int = 0
    """Updates over which the learning rate rises linearly from 0."""
    final_learning_rate: float = 0.0
    """Where cosine and linear end."""
    average: Literal["none", "ema", "arithmetic"] = "none"
    """Averaged weights, used for validation, best, sampling and export."""
    average_decay: float = 0.999
    """ema: decay an update."""
    average_from: int = 0
    """First update that enters the average."""


@dataclass(frozen=True)
class CommunicationSettings:
    """Sending less than whole gradients, at ZeRO stage 0."""

    compression: Literal["none", "powersgd", "topk", "local"] = "none"
    """Of gradients between processes. powersgd: low rank; topk: the largest elements; both send what they left out
    later. local: none are sent, each process updates alone, and weights and moments are averaged now and then."""
    compression_rank: int = 4
    """powersgd: rank of what is sent of a matrix."""
    compression_share: float = 0.01
    """topk: share of the elements that is sent, up to 1."""
    local_updates: int = 8
    """local: updates from one averaging to the next."""


@dataclass(frozen=True)
class RunSettings:
    """When to stop, look, save and report."""

    max_updates: int = 0
    """Updates in all; 0: as many as max_epochs gives."""
    max_epochs: int = 100
    """Passes over the training text, when max_updates is 0."""
    time_limit: float = 0.0
    """Minutes after which to checkpoint and end with status 75; 0: none."""
    collective_timeout: float = 30.0
    """Minutes that processes wait for one another before they give up."""
    valid_every: int = 1000
    """Updates between validations; 0: only at the end."""
    valid_bytes: int = 0
    """Score only so many bytes of the validation text while training; 0: all."""
    eval_streams: int = 64
    """Parallel streams in validation and test while training."""
    eval_warmup: int = 500
    """Bytes read before a stream's first scored one."""
    gates: bool = False
    """With each validation, record every global gate's mean and every layer's timescale (text; metrics.jsonl)."""
    patience: int = 0
    """End after so many validations without a new best; 0: never."""
    checkpoint_every: int = 1000
    """Updates between checkpoints; 0: none."""
    checkpoint_minutes: float = 30.0
    """Minutes between checkpoints; 0: none."""
    keep_last: int = 2
    """Checkpoints kept, besides the best."""
    profile: int = 0
    """Trace so many updates of this start into profile/ of the run folder, for ui.perfetto.dev; 0: none."""
    log_every: int = 10
    """Updates between lines of metrics.jsonl."""
    noise_scale: float = 0.0
    """Measure the gradient noise scale, in characters, as a running mean of this decay an update (0.99, say); 0: no."""
    sample_length: int = 400
    """Characters sampled at the end, into summary.json and MLflow."""
    mlflow: bool = True
    """Track the run in MLflow (MLFLOW_TRACKING_URI, else mlflow.db beside the run folder)."""
    experiment: str = "gfrnn"
    """MLflow experiment."""


@dataclass(frozen=True)
class Settings:
    """Train a gated-feedback RNN. With no flags: gf-lstm-5x700 on enwik8."""

    preset: str = "gf-lstm-5x700"
    """Named settings to start from; 'list' prints them."""
    task: Task = "text"
    """text: a language model of bytes; programs: what short Python programs print. It goes with the preset."""
    output_dir: Path = Path("runs/gf-lstm-5x700")
    """Run folder. Starting again with the same folder resumes."""
    start_from: Path | None = None
    """A new run goes on from this checkpoint of another run of the same model (after a loss that exploded, say), or
    begins with the weights of a model that ships."""
    deepspeed: Path | None = None
    """DeepSpeed config file (ds_configs/*.json); none: stage 0."""
    seed: int = 0
    """Of initial weights, dropout and resets."""
    dry_run: bool = False
    """Check and print the settings, train nothing."""
    prepare: bool = False
    """Fetch and build the corpus, train nothing (for login nodes)."""
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    programs: ProgramSettings = field(default_factory=ProgramSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimization: OptimizerSettings = field(default_factory=OptimizerSettings)
    communication: CommunicationSettings = field(default_factory=CommunicationSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, nested as the dataclasses are."""
        values: dict[str, Any] = _plain(dataclasses.asdict(self))
        return values

    @staticmethod
    def from_json(values: dict[str, Any]) -> Settings:
        """The inverse of to_json. Raises UserError for unknown names (another version's) and values of another type."""
        settings: Settings = _build(Settings, values)
        return settings


# ------------------------------------------------------------------------------------------------- JSON


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _build(cls: type, values: Any) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{cls.__name__} are {values!r} in a file; they must be an object: damaged?")
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"unknown setting {unknown[0]!r} for {cls.__name__}: written by another version of gfrnn?")
    built: dict[str, Any] = {}
    for name, value in values.items():
        default = default_of(known[name])
        if dataclasses.is_dataclass(default):
            built[name] = _build(type(default), value)
        elif "Path" in str(known[name].type):
            built[name] = None if value is None else Path(str(value))
        elif type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise UserError(f"setting {name} is {value!r} in a file; it must be {type(default).__name__}: damaged?")
        else:
            built[name] = value
    return cls(**built)


def default_of(f: dataclasses.Field[Any]) -> Any:
    """Of a field of a dataclass."""
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
