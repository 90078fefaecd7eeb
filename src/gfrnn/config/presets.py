"""The named presets: the paper's models and ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gfrnn.config.settings import (
    VOCABULARY_SIZES,
    BatchSettings,
    DataSettings,
    Feedback,
    ModelSettings,
    OptimizerSettings,
    ProgramSettings,
    RunSettings,
    Settings,
    Task,
    Unit,
    UserError,
)


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
    "enwik8-small": "the model that ships: the first 4,000,000 bytes of enwik8, an hour on 2 cores",
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
    table["enwik8-small"] = Settings(
        preset="enwik8-small",
        output_dir=Path("runs/enwik8-small"),
        model=ModelSettings(
            num_layers=3,
            hidden_size=240,
            output_skips=True,
            layer_norm=True,
            forget_bias=1.0,
            dropout=0.2,
            output_dropout=0.2,
            weight_dropout=0.2,
        ),
        data=DataSettings(corpus="enwik8-4m"),
        batch=BatchSettings(rows=64, dtype="bf16"),
        optimization=OptimizerSettings(
            learning_rate=4e-3,
            clip=1.0,
            schedule="cosine",
            warmup_updates=100,
            final_learning_rate=4e-5,
            average="ema",
            average_decay=0.998,
        ),
        run=RunSettings(
            max_updates=8000,
            valid_every=400,
            checkpoint_every=400,
            eval_streams=32,
            eval_warmup=200,
            gates=True,
            log_every=50,
        ),
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
