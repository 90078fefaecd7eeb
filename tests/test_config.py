"""Settings: what is refused, and that they survive JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from gfrnn.config import (
    DataSettings,
    ProgramSettings,
    Settings,
    UserError,
    matched_stack,
    preset,
    presets,
    sizes,
    validate,
    without_effect,
)

GROUPS = ("model", "data", "batch", "optimization", "communication", "run")


def changed(**values: Any) -> Settings:
    """The demo with settings replaced by name, in whichever group they are."""
    settings = preset("demo")
    for name, value in values.items():
        owner = next((g for g in GROUPS if hasattr(getattr(settings, g), name)), None)
        if owner is None:
            settings = dataclasses.replace(settings, **{name: value})
        else:
            group = dataclasses.replace(getattr(settings, owner), **{name: value})
            settings = dataclasses.replace(settings, **{owner: group})
    return settings


def refusal(settings: Settings) -> str:
    with pytest.raises(UserError) as caught:
        validate(settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


POSITIVE = [
    "num_layers",
    "hidden_size",
    "rows",
    "steps",
    "accumulation",
    "learning_rate",
    "eps",
    "compression_rank",
    "compression_share",
    "local_updates",
    "keep_last",
    "log_every",
    "eval_streams",
]
NOT_NEGATIVE = [
    "embedding_size",
    "reset_every",
    "weight_decay",
    "clip",
    "halve_on_explosion",
    "warmup_updates",
    "final_learning_rate",
    "average_from",
    "max_updates",
    "max_epochs",
    "time_limit",
    "valid_every",
    "valid_bytes",
    "eval_warmup",
    "patience",
    "checkpoint_every",
    "checkpoint_minutes",
    "sample_length",
    "seed",
]
FRACTIONS = [
    "dropout",
    "input_dropout",
    "output_dropout",
    "weight_dropout",
    "reset_probability",
    "beta1",
    "beta2",
    "rms_decay",
    "momentum",
    "average_decay",
    "noise_scale",
]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in POSITIVE for value in (0, -1)]
    + [(name, -1) for name in NOT_NEGATIVE]
    + [(name, value) for name in FRACTIONS for value in (-0.1, 1.0, 1.5)]
    + [(name, math.nan) for name in ("learning_rate", "clip", "dropout")],
)
def test_out_of_range_is_refused_by_flag_and_value(name: str, value: float) -> None:
    message = refusal(changed(**{name: value}))
    assert message.startswith(f"--{name.replace('_', '-')} is {value};")


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"vocab_size": 205}, "--vocab-size"),
        ({"unit": "mrnn"}, "--num-layers 1 --feedback none"),
        ({"unit": "gru", "forget_bias": 1.0}, "add --forget-bias 0"),
        ({"hidden_bias": True}, "add --no-hidden-bias"),
        (
            {"unit": "gru", "forget_bias": 0.0, "cap_input_gate": True},
            "--cap-input-gate belongs to --unit lstm, not gru",
        ),
        ({"max_updates": 0, "max_epochs": 0}, "--max-updates and --max-epochs"),
        ({"final_learning_rate": 0.1}, "--final-learning-rate"),
        ({"compression": "topk", "compression_share": 1.1}, "--compression-share is 1.1"),
        ({"compression": "powersgd", "noise_scale": 0.9}, "--compression powersgd"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], flag: str) -> None:
    assert flag in refusal(changed(**values))


def test_the_ends_of_the_ranges_are_allowed() -> None:
    zero = dict.fromkeys([*NOT_NEGATIVE, *FRACTIONS], 0) | {"max_updates": 1}
    validate(changed(**zero))
    validate(changed(**dict.fromkeys(FRACTIONS, 0.999)))


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_valid_and_survives_json(name: str) -> None:
    settings = preset(name)
    validate(settings)
    assert settings.preset == name
    assert settings.output_dir == Path("runs") / name
    again = Settings.from_json(json.loads(json.dumps(settings.to_json())))
    assert again == settings
    assert type(again.output_dir) is type(settings.output_dir)


@pytest.mark.parametrize("feedback", ["programs-gf-lstm-3x200", "programs-gf-gru-3x230"])
def test_a_stack_of_as_many_parameters_is_a_preset(feedback: str) -> None:
    stack = matched_stack(preset(feedback))
    assert abs(sizes(stack).total / sizes(preset(feedback)).total - 1) < 0.003
    assert any(settings.model == stack.model for settings in presets().values())


def test_the_task_goes_with_the_preset() -> None:
    with pytest.raises(UserError, match="--task programs does not go with --preset demo, of task text"):
        validate(dataclasses.replace(preset("demo"), task="programs"))
    programs = preset("programs-demo")
    asked = dataclasses.replace(programs, batch=dataclasses.replace(programs.batch, steps=7))
    assert without_effect(asked) == ["--steps has no effect on --task programs"]
    asked = dataclasses.replace(programs, run=dataclasses.replace(programs.run, gates=True))
    assert without_effect(asked) == ["--gates has no effect on --task programs"]
    text = dataclasses.replace(preset("demo"), programs=ProgramSettings(nesting=3))
    assert without_effect(text) == ["--nesting has no effect on --task text"]


def test_paths_survive_json() -> None:
    settings = Settings(deepspeed=Path("z2.json"), data=DataSettings(corpus_file=Path("a/b.xz")))
    again = Settings.from_json(json.loads(json.dumps(settings.to_json())))
    assert again == settings
    assert again.data.corpus_file == Path("a/b.xz")
    assert Settings.from_json(json.loads(json.dumps(Settings().to_json()))).data.corpus_file is None


def test_unknown_settings_are_refused() -> None:
    values = preset("demo").to_json()
    with pytest.raises(UserError, match="unknown setting 'colour' for Settings"):
        Settings.from_json({**values, "colour": 1})
    with pytest.raises(UserError, match="unknown setting 'girth' for ModelSettings"):
        Settings.from_json({**values, "model": {**values["model"], "girth": 1}})


def test_a_setting_that_an_older_version_lacked_gets_its_default() -> None:
    values = preset("demo").to_json()
    del values["model"]["residual"], values["model"]["cap_input_gate"], values["run"]["gates"]
    assert Settings.from_json(values) == preset("demo")


def test_unknown_presets_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--preset 'gf-lstm-5x70' is unknown; did you mean .*gf-lstm-5x700"):
        preset("gf-lstm-5x70")
    with pytest.raises(UserError, match=f"'zzz' is unknown; --preset list prints all {len(presets())}"):
        preset("zzz")


def test_options_without_effect_are_named() -> None:
    assert without_effect(preset("demo")) == []
    single = changed(num_layers=1, dropout=0.5, output_skips=False)
    assert without_effect(single) == ["--dropout has no effect on a single layer"]
    mrnn = changed(unit="mrnn", num_layers=1, feedback="none", output_skips=False)
    assert without_effect(mrnn) == ["--input-skips has no effect on --unit mrnn"]
    own = changed(feedback="none", unit_gates="own")
    assert without_effect(own) == ["--unit-gates own has no effect without feedback, or with --unit tanh"]
    scaled = changed(feedback="none", scale_feedback=True)
    assert without_effect(scaled) == ["--scale-feedback has no effect without feedback"]
    late = dataclasses.replace(preset("demo").optimization, average_from=500)
    assert without_effect(dataclasses.replace(preset("demo"), optimization=late)) == [
        "--average ema has no effect with --average-from 500, after the last update"
    ]
    share = changed(compression="powersgd", compression_rank=2, compression_share=0.2)
    assert without_effect(share) == ["--compression-share has no effect on --compression powersgd"]
    demo = preset("demo")
    plain = dataclasses.replace(demo.optimization, average="none", schedule="constant")
    assert without_effect(dataclasses.replace(demo, optimization=plain)) == []  # what it leaves out is the preset's
    asked = dataclasses.replace(plain, average_decay=0.5, final_learning_rate=1e-9, momentum=0.5, beta1=0.5)
    patient = dataclasses.replace(demo.run, patience=3, valid_every=0)
    assert without_effect(dataclasses.replace(demo, optimization=asked, run=patient)) == [
        "--average-decay has no effect with --average none",
        "--final-learning-rate has no effect with --schedule constant",
        "--momentum has no effect with --optimizer adam",
        "--patience has no effect with --valid-every 0: it counts validations",
    ]
    for name, settings in presets().items():
        assert without_effect(settings) == [], name
