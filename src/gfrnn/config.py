"""Every setting as dataclasses, the named presets, and what sizes they imply.

Imports nothing heavy: ``--help``, ``--preset list`` and a user's errors must answer before torch is loaded.
Settings own sizes, optimizer, schedule and clipping; a DeepSpeed config file owns the strategy only.
"""

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
    dropout: float = 0.0
    """Locked dropout between layers: one mask a row and segment."""
    input_dropout: float = 0.0
    """Locked dropout on the input (whole symbols of a row when one-hot)."""
    output_dropout: float = 0.0
    """Locked dropout on what the softmax reads."""
    weight_dropout: float = 0.0
    """Dropout on the recurrent weights, one mask an update."""


@dataclass(frozen=True)
class DataSettings:
    """The text."""

    corpus: Literal["enwik8", "text8", "enwik8-1m"] = "enwik8"
    """enwik8 and text8 are downloaded; enwik8-1m (the first 1,000,000 bytes of enwik8) ships with the package."""
    corpus_file: Path | None = None
    """Use this file instead: plain, .gz, .xz or .zip; any text or binary file, read as bytes."""
    data_dir: Path = Path("~/.cache/gfrnn")
    """Where corpora are downloaded to and kept as Arrow."""


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
    """A new run goes on from this checkpoint of another run of the same model (after a loss that exploded, say)."""
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


# ---------------------------------------------------------------------------------------------- validation


def validate(settings: Settings) -> None:
    """Refuse settings that contradict themselves; raises UserError with one line."""
    m, p, b, o, r = settings.model, settings.programs, settings.batch, settings.optimization, settings.run
    task = preset(settings.preset).task
    if task != settings.task:
        other = TASK_PRESETS[settings.task]
        raise UserError(
            f"--task {settings.task} does not go with --preset {settings.preset}, of task {task}: try {other}"
        )
    for group in (settings, m, settings.data, p, b, o, r):
        for name, value in vars(group).items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{flag} is {value}; it must be a finite number")
            most = 2**63 if name == "seed" else 2**31
            if isinstance(value, int) and value >= most:
                raise UserError(f"{flag} is {value}; it must be less than 2^{most.bit_length() - 1}")
    positive = {
        "--num-layers": m.num_layers,
        "--hidden-size": m.hidden_size,
        "--vocab-size": m.vocab_size,
        "--num-programs": p.num_programs,
        "--level-programs": p.level_programs,
        "--valid-programs": p.valid_programs,
        "--rows": b.rows,
        "--steps": b.steps,
        "--accumulation": b.accumulation,
        "--learning-rate": o.learning_rate,
        "--eps": o.eps,
        "--keep-last": r.keep_last,
        "--collective-timeout": r.collective_timeout,
        "--log-every": r.log_every,
        "--eval-streams": r.eval_streams,
    }
    for flag, value in positive.items():
        if not value > 0:
            raise UserError(f"{flag} is {value}; it must be greater than 0")
    not_negative = {
        "--embedding-size": m.embedding_size,
        "--reset-every": b.reset_every,
        "--recompute": b.recompute,
        "--profile": r.profile,
        "--weight-decay": o.weight_decay,
        "--clip": o.clip,
        "--halve-on-explosion": o.halve_on_explosion,
        "--warmup-updates": o.warmup_updates,
        "--final-learning-rate": o.final_learning_rate,
        "--average-from": o.average_from,
        "--max-updates": r.max_updates,
        "--max-epochs": r.max_epochs,
        "--time-limit": r.time_limit,
        "--valid-every": r.valid_every,
        "--valid-bytes": r.valid_bytes,
        "--eval-warmup": r.eval_warmup,
        "--patience": r.patience,
        "--checkpoint-every": r.checkpoint_every,
        "--checkpoint-minutes": r.checkpoint_minutes,
        "--sample-length": r.sample_length,
        "--program-seed": p.program_seed,
        "--seed": settings.seed,
    }
    for flag, value in not_negative.items():
        if not value >= 0:
            raise UserError(f"{flag} is {value}; it must not be negative")
    fractions = {
        "--dropout": m.dropout,
        "--input-dropout": m.input_dropout,
        "--output-dropout": m.output_dropout,
        "--weight-dropout": m.weight_dropout,
        "--reset-probability": b.reset_probability,
        "--beta1": o.beta1,
        "--beta2": o.beta2,
        "--rms-decay": o.rms_decay,
        "--momentum": o.momentum,
        "--average-decay": o.average_decay,
    }
    for flag, value in fractions.items():
        if not 0 <= value < 1:
            raise UserError(f"{flag} is {value}; it must be at least 0 and less than 1")
    if m.vocab_size != VOCABULARY_SIZES[settings.task]:
        what = {"text": "text is bytes", "programs": "programs have their own characters"}[settings.task]
        raise UserError(f"--vocab-size is {m.vocab_size}, but {what}: leave it at {VOCABULARY_SIZES[settings.task]}")
    check_difficulty(p.nesting, p.length)
    if settings.task == "programs":
        if settings.batch.rows > p.num_programs:
            raise UserError(
                f"--rows {b.rows} is more than --num-programs {p.num_programs}: an update would have too few"
            )
        if p.curriculum in LADDERS and not r.valid_every:
            raise UserError(f"--curriculum {p.curriculum} goes on by validations: --valid-every must not be 0")
        if p.curriculum in LADDERS and b.rows > p.level_programs:
            raise UserError(f"--rows {b.rows} is more than --level-programs {p.level_programs}: raise the latter")
    if m.unit == "mrnn" and (m.num_layers != 1 or m.feedback != "none" or m.layer_norm):
        raise UserError(
            "--unit mrnn has one layer, no feedback and no layer norm: "
            "add --num-layers 1 --feedback none --no-layer-norm --forget-bias 0"
        )
    if m.hidden_bias and m.unit != "gru":
        raise UserError(f"--hidden-bias belongs to --unit gru, not {m.unit}")
    if m.forget_bias and m.unit != "lstm":
        raise UserError(f"--forget-bias belongs to --unit lstm, not {m.unit}")
    if not r.experiment.strip():
        raise UserError("--experiment is empty; give a name")
    if not r.max_updates and not r.max_epochs:
        raise UserError("--max-updates and --max-epochs are both 0: give one of them, or nothing is trained")
    if o.final_learning_rate > o.learning_rate:
        raise UserError(
            f"--final-learning-rate {o.final_learning_rate} is above --learning-rate {o.learning_rate}: schedules fall"
        )


def check_difficulty(nesting: int, length: int) -> None:
    """Raises UserError for programs that there cannot be."""
    for flag, value, most in (("--nesting", nesting, MOST_NESTING), ("--length", length, MOST_LENGTH)):
        if not 1 <= value <= most:
            raise UserError(f"{flag} is {value}; programs have 1 to {most}")


def without_effect(settings: Settings) -> list[str]:
    """Options that these settings ask for and that change nothing, each with its reason."""
    m = settings.model
    asked = {
        "--dropout": m.dropout > 0,
        "--residual": m.residual,
        "--output-skips": m.output_skips,
        "--input-skips": m.input_skips,
    }
    found = []
    if m.num_layers == 1 and m.unit != "mrnn":  # a single layer reads the input and feeds the softmax anyway
        found += [f"{flag} has no effect on a single layer" for flag in list(asked)[:3] if asked[flag]]
    if m.unit == "mrnn":
        asked["--recompute"] = settings.batch.recompute > 0
        found += [f"{flag} has no effect on --unit mrnn" for flag, given in asked.items() if given]
    if m.unit_gates == "own" and (m.feedback == "none" or m.unit == "tanh"):
        found.append("--unit-gates own has no effect without feedback, or with --unit tanh")
    other = {
        "text": (settings.programs,),
        "programs": (settings.data, settings.batch, settings.run),
    }[settings.task]
    for group in other:
        for f in dataclasses.fields(group):
            if (settings.task == "text" or f.name in _OF_TEXT) and getattr(group, f.name) != _default(f):
                found.append(f"--{f.name.replace('_', '-')} has no effect on --task {settings.task}")
    p = settings.programs
    levels = p.level_programs != ProgramSettings.level_programs
    if settings.task == "programs" and levels and p.curriculum not in LADDERS:
        found.append(f"--level-programs has no effect on --curriculum {p.curriculum}, which has no levels")
    return found


_OF_TEXT = {
    "corpus",
    "corpus_file",
    "steps",
    "reset_every",
    "reset_probability",
    "valid_bytes",
    "sample_length",
    "eval_streams",
    "eval_warmup",
}
"""Settings that only text has, outside its own groups."""


# ------------------------------------------------------------------------------------------------ sizes


@dataclass(frozen=True)
class Sizes:
    """Parameter counts of a model, by the formula (a test holds them against the modules)."""

    recurrent: int
    """Weights of the recurrent part with its input weights and global gates, no biases: the paper's count."""
    looked_up: int
    """Those of them that only ever multiply a one-hot symbol: a look-up, no arithmetic."""
    embedding: int
    softmax: int
    """Output weights, without their bias."""
    biases: int
    """All biases and the gains of layer norm."""

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def total(self) -> int:
        return self.recurrent + self.embedding + self.softmax + self.biases

    @property
    def train_flops(self) -> int:
        """Floating-point operations a character to train: 6 a multiplied weight (2 forward, 4 backward)."""
        return 6 * (self.recurrent - self.looked_up + self.softmax)


def sizes(settings: Settings) -> Sizes:
    """Parameter counts of what the settings train."""
    first, *others = networks(settings)
    return sum(others, start=first)


def networks(settings: Settings) -> tuple[Sizes, ...]:
    """Parameter counts network by network: the language model's, or the encoder's and the decoder's of programs."""
    if settings.task == "text":
        return (model_sizes(settings.model),)
    targets = len(TARGET_SYMBOLS)
    return model_sizes(settings.model, outputs=0), model_sizes(settings.model, targets)


def model_sizes(model: ModelSettings, vocab_size: int | None = None, *, outputs: int | None = None) -> Sizes:
    """Parameter counts of `model` with another alphabet if `vocab_size` is given, and as many outputs or `outputs`."""
    vocab = vocab_size or model.vocab_size
    outputs = vocab if outputs is None else outputs
    layers, hidden = model.num_layers, model.hidden_size
    embedding = vocab * model.embedding_size
    inputs = model.embedding_size or vocab
    one_hot = not model.embedding_size
    softmax = outputs * hidden * (layers if model.output_skips else 1)
    if model.unit == "mrnn":  # W_hx, W_mx: H x inputs each; W_hm, W_mh: H x H each
        from_input = 2 * hidden * inputs
        return Sizes(
            recurrent=from_input + 2 * hidden * hidden,
            looked_up=from_input if one_hot else 0,
            embedding=embedding,
            softmax=softmax,
            biases=hidden + outputs,
        )
    unit_gates = GATES[model.unit] - 1
    gates = layers if model.feedback == "gated" else 0  # global gates a layer
    rows = (1 + unit_gates) * hidden + gates
    reads_input = layers if model.input_skips else 1
    below = (layers - 1) * rows * hidden
    candidate = hidden * hidden * (1 if model.feedback == "none" else layers)
    gated_by_all = model.feedback != "none" and model.unit_gates == "all"
    unit = unit_gates * hidden * hidden * (layers if gated_by_all else 1)
    recurrent = reads_input * rows * inputs + below + layers * (candidate + unit + gates * layers * hidden)
    biases = layers * rows + outputs
    if model.unit == "gru" and model.hidden_bias:
        biases += layers * hidden
    if model.layer_norm:
        biases += layers * (1 + unit_gates) * hidden + (2 * layers * hidden if model.unit == "lstm" else 0)
    return Sizes(
        recurrent=recurrent,
        looked_up=reads_input * rows * inputs if one_hot else 0,
        embedding=embedding,
        softmax=softmax,
        biases=biases,
    )


def matched_stack(settings: Settings) -> Settings:
    """The same settings for a stack, without feedback, of as many units as come nearest to the same parameter count."""
    wanted = sizes(settings).total
    stack = dataclasses.replace(settings.model, feedback="none", unit_gates="all")

    def of(hidden_size: int) -> Settings:
        return dataclasses.replace(settings, model=dataclasses.replace(stack, hidden_size=hidden_size))

    larger = settings.model.hidden_size
    while sizes(of(larger)).total < wanted:
        larger += 1
    return min(of(larger - 1), of(larger), key=lambda found: abs(sizes(found).total - wanted))


# ---------------------------------------------------------------------------------------------- presets


def _paper(
    unit: Unit, num_layers: int, hidden_size: int, feedback: Feedback
) -> tuple[ModelSettings, OptimizerSettings]:
    """A model of the paper's Table 1 in its faithful form, with Table 2's optimizer."""
    model = ModelSettings(unit=unit, num_layers=num_layers, hidden_size=hidden_size, feedback=feedback)
    if unit == "mrnn":
        model = dataclasses.replace(model, input_skips=False)
    optimizer = OptimizerSettings(
        optimizer="rmsprop",
        learning_rate=5e-5 if unit == "tanh" else 1e-3,
        eps=1e-4,
        halve_on_explosion=10.0,
    )
    return model, optimizer


_PAPER_MODELS: dict[str, tuple[Unit, int, int, Feedback]] = {
    "tanh-1x1000": ("tanh", 1, 1000, "none"),
    "tanh-3x390": ("tanh", 3, 390, "none"),
    "gf-tanh-3x303": ("tanh", 3, 303, "gated"),
    "gru-1x540": ("gru", 1, 540, "none"),
    "gru-3x228": ("gru", 3, 228, "none"),
    "gf-gru-3x165": ("gru", 3, 165, "gated"),
    "gf-gru-3x228": ("gru", 3, 228, "gated"),
    "lstm-1x456": ("lstm", 1, 456, "none"),
    "lstm-3x191": ("lstm", 3, 191, "none"),
    "gf-lstm-3x140": ("lstm", 3, 140, "gated"),
    "gf-lstm-3x191": ("lstm", 3, 191, "gated"),
    "full-lstm-3x140": ("lstm", 3, 140, "full"),
    "mrnn-1x679": ("mrnn", 1, 679, "none"),
}

_PROGRAM_MODELS: dict[str, tuple[Unit, int, Feedback]] = {
    "programs-gf-lstm-3x200": ("lstm", 200, "gated"),
    "programs-lstm-3x200": ("lstm", 200, "none"),
    "programs-lstm-3x295": ("lstm", 295, "none"),
    "programs-gf-gru-3x230": ("gru", 230, "gated"),
    "programs-gru-3x230": ("gru", 230, "none"),
    "programs-gru-3x339": ("gru", 339, "none"),
}
TASK_PRESETS: dict[Task, str] = {"text": "gf-lstm-5x700", "programs": "programs-gf-lstm-3x200"}
"""What a task means without --preset."""

_NOTES = {
    "demo": "what `make train` trains: small, on the text that ships here",
    "gf-lstm-5x700": "the paper's large model, 1.58 BPC on enwik8",
    "full-lstm-3x140": "every gate fixed to 1, the paper's ablation",
    "gf-gru-3x228": "GF-L: as many units as the stack",
    "gf-lstm-3x191": "GF-L: as many units as the stack",
    "mrnn-1x679": "multiplicative RNN of 1.2 M parameters",
    "programs-gf-lstm-3x200": "encoder and decoder of the paper's program evaluation",
    "programs-gf-gru-3x230": "encoder and decoder of the paper's program evaluation",
    "programs-lstm-3x200": "the paper's stack: as many units",
    "programs-gru-3x230": "the paper's stack: as many units",
    "programs-lstm-3x295": "a stack of as many parameters as the GF net",
    "programs-gru-3x339": "a stack of as many parameters as the GF net",
    "programs-demo": "small programs, learned in 5 minutes on 2 cores",
}


def presets() -> dict[str, Settings]:
    """Every named preset, the paper's table first."""
    table: dict[str, Settings] = {}
    for name, sizes_ in _PAPER_MODELS.items():
        model, optimizer = _paper(*sizes_)
        table[name] = Settings(
            preset=name,
            output_dir=Path("runs") / name,
            model=model,
            batch=BatchSettings(reset_every=100),
            optimization=optimizer,
        )
    table["gf-lstm-5x700"] = Settings(
        model=ModelSettings(output_skips=True),
        batch=BatchSettings(reset_every=100),
    )
    table["demo"] = Settings(
        preset="demo",
        output_dir=Path("runs/demo"),
        model=ModelSettings(num_layers=3, hidden_size=128, output_skips=True, layer_norm=True, forget_bias=1.0),
        data=DataSettings(corpus="enwik8-1m"),
        batch=BatchSettings(rows=32, steps=50),
        optimization=OptimizerSettings(
            learning_rate=8e-3,
            clip=1.0,
            schedule="cosine",
            warmup_updates=20,
            final_learning_rate=1e-4,
            average="ema",
            average_decay=0.98,
        ),
        run=RunSettings(max_updates=500, valid_every=125, checkpoint_every=125, eval_streams=32, eval_warmup=200),
    )
    for name, (unit, hidden_size, feedback) in _PROGRAM_MODELS.items():
        table[name] = Settings(
            preset=name,
            task="programs",
            output_dir=Path("runs") / name,
            model=ModelSettings(
                unit=unit,
                num_layers=3,
                hidden_size=hidden_size,
                feedback=feedback,
                vocab_size=VOCABULARY_SIZES["programs"],
            ),
            batch=BatchSettings(rows=128),
            optimization=OptimizerSettings(beta1=0.99),
            run=RunSettings(max_epochs=30, valid_every=2500, patience=5),
        )
    table["programs-demo"] = Settings(
        preset="programs-demo",
        task="programs",
        output_dir=Path("runs/programs-demo"),
        model=ModelSettings(
            num_layers=2, hidden_size=96, forget_bias=1.0, vocab_size=VOCABULARY_SIZES["programs"], layer_norm=True
        ),
        programs=ProgramSettings(nesting=2, length=2, num_programs=100_000, valid_programs=1000),
        batch=BatchSettings(rows=64),
        optimization=OptimizerSettings(
            learning_rate=4e-3, clip=1.0, schedule="cosine", warmup_updates=50, final_learning_rate=1e-4
        ),
        run=RunSettings(max_updates=2500, valid_every=500, checkpoint_every=500),
    )
    return table


def preset_note(name: str) -> str:
    return _NOTES.get(name, "")


def preset(name: str) -> Settings:
    """The preset of that name; raises UserError naming the nearest ones."""
    table = presets()
    if name not in table:
        import difflib

        near = difflib.get_close_matches(name, table, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"--preset {name!r} is unknown; {hint}--preset list prints all {len(table)}")
    return table[name]


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
        default = _default(known[name])
        if dataclasses.is_dataclass(default):
            built[name] = _build(type(default), value)
        elif "Path" in str(known[name].type):
            built[name] = None if value is None else Path(str(value))
        elif type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise UserError(f"setting {name} is {value!r} in a file; it must be {type(default).__name__}: damaged?")
        else:
            built[name] = value
    return cls(**built)


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
