"""Settings that contradict themselves, and those that change nothing."""

from __future__ import annotations

import dataclasses
import math

from gfrnn.config.presets import TASK_PRESETS, preset
from gfrnn.config.settings import (
    LADDERS,
    MOST_LENGTH,
    MOST_NESTING,
    VOCABULARY_SIZES,
    CommunicationSettings,
    ProgramSettings,
    Settings,
    UserError,
    default_of,
)


def validate(settings: Settings) -> None:
    """Refuse settings that contradict themselves; raises UserError with one line."""
    m, p, b, o, r = settings.model, settings.programs, settings.batch, settings.optimization, settings.run
    c = settings.communication
    task = preset(settings.preset).task
    if task != settings.task:
        other = TASK_PRESETS[settings.task]
        raise UserError(
            f"--task {settings.task} does not go with --preset {settings.preset}, of task {task}: try {other}"
        )
    for group in (settings, m, settings.data, p, b, o, c, r):
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
        "--compression-rank": c.compression_rank,
        "--compression-share": c.compression_share,
        "--local-updates": c.local_updates,
        "--keep-last": r.keep_last,
        "--collective-timeout": r.collective_timeout,
        "--log-every": r.log_every,
        "--eval-streams": r.eval_streams,
    }
    for flag, value in positive.items():
        if not value > 0:
            raise UserError(f"{flag} is {value}; it must be greater than 0")
    if 0 < o.halve_on_explosion <= 1:
        raise UserError(f"--halve-on-explosion is {o.halve_on_explosion}; it must be 0 or greater than 1")
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
        "--noise-scale": r.noise_scale,
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
        raise UserError(f"--hidden-bias belongs to --unit gru, not {m.unit}: add --no-hidden-bias")
    if m.forget_bias and m.unit != "lstm":
        raise UserError(f"--forget-bias belongs to --unit lstm, not {m.unit}: add --forget-bias 0")
    if m.cap_input_gate and m.unit != "lstm":
        raise UserError(f"--cap-input-gate belongs to --unit lstm, not {m.unit}: leave it out")
    if c.compression_share > 1:
        raise UserError(f"--compression-share is {c.compression_share}; a share is 1 at most")
    if r.noise_scale and c.compression != "none":
        raise UserError(
            f"--noise-scale needs the gradient of the whole batch, which --compression {c.compression} does not have"
        )
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
    if m.scale_feedback and (m.feedback == "none" or m.num_layers == 1):
        found.append("--scale-feedback has no effect without feedback")
    if m.unit_gates == "own" and (m.feedback == "none" or m.unit == "tanh"):
        found.append("--unit-gates own has no effect without feedback, or with --unit tanh")
    other = {
        "text": (settings.programs,),
        "programs": (settings.data, settings.batch, settings.run),
    }[settings.task]
    for group in other:
        for f in dataclasses.fields(group):
            if (settings.task == "text" or f.name in _OF_TEXT) and getattr(group, f.name) != default_of(f):
                found.append(f"--{f.name.replace('_', '-')} has no effect on --task {settings.task}")
    p, c = settings.programs, settings.communication
    for name, kind in _OF_COMPRESSION.items():
        if c.compression != kind and getattr(c, name) != getattr(CommunicationSettings, name):
            found.append(f"--{name.replace('_', '-')} has no effect on --compression {c.compression}")
    o, usual = settings.optimization, preset(settings.preset).optimization
    for names, use, why in (
        (("average_decay",), o.average == "ema", f"with --average {o.average}"),
        (("average_from",), o.average != "none", "without --average"),
        (("final_learning_rate",), o.schedule != "constant", "with --schedule constant"),
        (("rms_decay", "momentum"), o.optimizer == "rmsprop", f"with --optimizer {o.optimizer}"),
        (("beta1", "beta2"), o.optimizer != "rmsprop", "with --optimizer rmsprop"),
    ):
        given = [name for name in names if getattr(o, name) != getattr(usual, name)]
        found += [f"--{name.replace('_', '-')} has no effect {why}" for name in given if not use]
    if o.average != "none" and 0 < settings.run.max_updates <= o.average_from:
        found.append(f"--average {o.average} has no effect with --average-from {o.average_from}, after the last update")
    if settings.run.patience and not settings.run.valid_every:
        found.append("--patience has no effect with --valid-every 0: it counts validations")
    levels = p.level_programs != ProgramSettings.level_programs
    if settings.task == "programs" and levels and p.curriculum not in LADDERS:
        found.append(f"--level-programs has no effect on --curriculum {p.curriculum}, which has no levels")
    return found


_OF_COMPRESSION = {"compression_rank": "powersgd", "compression_share": "topk", "local_updates": "local"}
_OF_TEXT = {
    "corpus",
    "corpus_file",
    "steps",
    "reset_every",
    "reset_probability",
    "valid_bytes",
    "gates",
    "sample_length",
    "eval_streams",
    "eval_warmup",
}
"""Settings that only text has, outside its own groups."""
