"""A DeepSpeed config is strategy only: what it may say, what it may not, and how that is told."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gfrnn.config import (
    BatchSettings,
    CommunicationSettings,
    OptimizerSettings,
    RunSettings,
    Settings,
    UserError,
    preset,
)
from gfrnn.nn import GatedFeedbackRNN
from gfrnn.training import ds_config
from gfrnn.training.ds_config import load_ds_config, resolve_ds_config, stage_of

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
SETTINGS = Settings(
    deepspeed=Path("my.json"),
    batch=BatchSettings(rows=10, accumulation=2),
    optimization=OptimizerSettings(optimizer="adamw", learning_rate=0.002, clip=0.5, schedule="cosine"),
    run=RunSettings(max_updates=100),
)


def resolve(config: dict[str, Any], world_size: int = 3, settings: Settings = SETTINGS) -> dict[str, Any]:
    return resolve_ds_config(config, settings, world_size=world_size)


def refused(config: dict[str, Any], **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve(config, **more)
    message = str(caught.value)
    assert message.startswith("my.json: ")
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_files_hold_strategy_alone(path: Path) -> None:
    config = load_ds_config(path)
    assert set(config) == {"zero_optimization"}
    assert stage_of(config) == int(path.stem[1])
    resolved = resolve(config)
    assert stage_of(resolved) == int(path.stem[1])
    assert ("offload_optimizer" in resolved["zero_optimization"]) == path.stem.endswith("offload")


def test_the_files_are_there() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} >= {"z0", "z1", "z2", "z3", "z2_offload"}
    assert stage_of(load_ds_config(None)) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"bf16": {},\n  "zero_optimization": two}', ":2:24: not JSON"),
        ("", ":1:1: not JSON"),
        ("[1]", "a JSON object"),
        ('{"bf16": {}, "bf16": {}}', "bf16 is there twice"),
        ('{"zero_optimization": {"stage": %s}}' % ("1" * 5000), "not a config"),
        ("[" * 200_000, "not a config"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        load_ds_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{")
    for name, reason in (("missing.json", "No such file"), (".", "Is a directory"), ("binary.json", "UTF-8")):
        with pytest.raises(UserError, match=reason):
            load_ds_config(tmp_path / name)


def test_neither_torch_nor_deepspeed_is_imported() -> None:
    code = "import sys, gfrnn.training.ds_config; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# ---------------------------------------------------------------------------------------- what it is filled to


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_buckets_are_of_a_layer_where_the_file_is_silent(stage: int) -> None:
    zero = resolve({"zero_optimization": {"stage": stage}}, settings=preset("gf-lstm-5x700"))["zero_optimization"]
    model = GatedFeedbackRNN(256, 700, 5, input_skips=True, device="meta")
    layer = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_l1"))
    if stage:
        assert 0.95 * layer < zero["reduce_bucket_size"] < 1.05 * layer
        assert zero["overlap_comm"] is True
    else:
        assert "reduce_bucket_size" not in zero


def test_settings_own_sizes_and_clipping() -> None:
    config = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}, "communication_data_type": "bf16"}
    assert resolve(config) == {
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": 1000,
            "overlap_comm": True,
            "memory_efficient_linear": False,
        },
        "communication_data_type": "bf16",
        "train_micro_batch_size_per_gpu": 2,  # 10 rows, 3 processes: 4 each, 2 micro-batches
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    assert config == {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}, "communication_data_type": "bf16"}


@pytest.mark.parametrize(
    ("rows", "world_size", "accumulation"), [(10, 1, 1), (10, 3, 1), (10, 3, 2), (7, 7, 1), (5, 4, 3)]
)
def test_micro_batches_hold_all_rows(rows: int, world_size: int, accumulation: int) -> None:
    settings = replace(SETTINGS, batch=BatchSettings(rows=rows, accumulation=accumulation))
    micro = resolve({}, world_size, settings)["train_micro_batch_size_per_gpu"]
    assert micro == math.ceil(math.ceil(rows / world_size) / accumulation)
    assert micro * accumulation * world_size >= rows


def test_auto_means_from_the_settings() -> None:
    hugging_face = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "amp": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_param": {"device": "none"}},
    }
    assert resolve(hugging_face) == resolve({"bf16": {}} | zero(3, offload_param={"device": "none"}))


def test_a_file_may_repeat_the_settings() -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "betas": [0.9, 0.99], "torch_adam": True}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 100, "warmup_num_steps": 0}},
    }
    for rows in (12, 10):  # as DeepSpeed counts, and as --rows does
        assert resolve(config | {"train_batch_size": rows}) == resolve({})


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"gradient_clipping": 1.0}, ["gradient_clipping is 1.0", "--clip is 0.5", "add --clip 1.0"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps is 1", "--accumulation is 2"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["is 4", "--rows 10", "3 processes it is 2"]),
        ({"train_batch_size": 32}, ["is 32", "it is 12", "add --rows 32"]),
        ({"optimizer": {"type": "Adam"}}, ["type is 'Adam'", "'adamw'", "--optimizer"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, ["lr is 0.1", "0.002", "--learning-rate"]),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, ["amsgrad is True", "--optimizer"]),
        ({"optimizer": "adam"}, ["optimizer must be an object"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["type is 'WarmupLR'", "'warmupcosinelr'", "--schedule"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op is 'sum'", "mean"]),
        ({"managed_gradient_accumulation": False}, ["managed_gradient_accumulation is False"]),
        ({"zero_force_ds_cpu_optimizer": True}, ["zero_force_ds_cpu_optimizer is True"]),
    ],
)  # fmt: skip
def test_contradictions(config: dict[str, Any], parts: list[str]) -> None:
    message = refused(config)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation is unknown; did you mean zero_optimization?"),
        ({"stage": 2}, "stage is unknown"),
        ({"zero_optimization": {"stag": 2}}, "zero_optimization.stag is unknown; did you mean stage?"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise is unknown; did you mean device?",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"ratio": 1}}}, "zero_optimization.offload_param.ratio"),
        ({"bf16": {"enable": True}}, "bf16.enable is unknown; did you mean enabled?"),
        ({"fp16": {"enable": True}}, "fp16.enable is unknown; did you mean enabled?"),
        ({"data_types": {"grad_dtype": "fp32"}}, "data_types.grad_dtype is unknown"),
        ({"bf16": True}, "bf16 is True; it must be an object"),
    ],
)
def test_unknown_names(config: dict[str, Any], hint: str) -> None:
    assert hint in refused(config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"comms_logger": {"prof_all": True}}, "comms_logger is not supported: logs are quiet; remove it"),
        ({"dump_state": True}, "dump_state is not supported: logs are quiet; remove it"),
        ({"memory_breakdown": True}, "memory_breakdown is not supported: it resets the peak of memory that summary"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0; it must be a number greater than 0"),
        ({"gradient_predivide_factor": "x"}, "gradient_predivide_factor is 'x'"),
        ({"communication_data_type": 5}, "communication_data_type is 5; it must be one of fp32, bf16, fp16"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown is 'yes'; it must be true or false"),
        ({"wandb": {"enabled": True}}, "wandb is not supported: runs are tracked in MLflow; remove it"),
        ({"flops_profiler": {"enabled": True}}, "flops_profiler is not supported: speed, time and FLOP are in metrics"),
    ],
)
def test_values_that_deepspeed_does_not_check(config: dict[str, Any], said: str) -> None:
    assert said in refused(config)


@pytest.mark.parametrize("stage", [-1, 4, "2", 2.0, True])
def test_stages(stage: Any) -> None:
    assert f"zero_optimization.stage is {stage!r}" in refused({"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("value", ["5e8", "abc", True, 0.5, -1, math.inf, math.nan, [1]])
@pytest.mark.parametrize("key", ["reduce_bucket_size", "sub_group_size", "stage3_max_live_parameters"])
def test_counts_of_elements(key: str, value: Any) -> None:
    least = int(key == "reduce_bucket_size")
    said = f"zero_optimization.{key} is {value!r}; it must be a whole number of elements, {least} or more"
    assert refused(zero(3, **{key: value})) == f"my.json: {said}"
    for good in (1, 5e8, 2**62):
        assert resolve(zero(3, **{key: good}))["zero_optimization"][key] == good
    assert resolve(zero(3, **{key: "auto"})) == resolve(zero(3))


def test_a_bucket_of_none_and_a_threshold_of_none() -> None:
    assert "reduce_bucket_size is 0; it must be" in refused(zero(2, reduce_bucket_size=0))
    assert resolve(zero(3, param_persistence_threshold=0))


@pytest.mark.parametrize("value", [True, 2])
def test_the_old_form_of_zero(value: Any) -> None:
    assert "zero_optimization" in refused({"zero_optimization": value})


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (zero(2) | {"fp16": {"enabled": True}}, "fp16.enabled"),
        (zero(2) | {"bf16": {"enabled": 1}}, "bf16.enabled is 1"),
        (zero(0) | {"bf16": {"enabled": True}}, "bf16.enabled does not go with stage 0"),
        (zero(2) | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16_master_weights_and_grads"),
        (zero(1) | {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "grad_accum_dtype fp32"),
        (zero(2) | {"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype is 'bf16'"),
        (zero(2) | {"data_types": {"param_dtype": "bf16"}}, "param_dtype is 'bf16'"),
        (zero(2, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}), "offload_optimizer.device is 'nvme'"),
        (zero(0, offload_optimizer={"device": "cpu"}), "offload_optimizer needs stage 1"),
        (zero(2, offload_param={"device": "cpu"}), "offload_param needs stage 3"),
        (zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), "ratio is 0.5"),
        (zero(3, offload_optimizer={"device": "cpu", "super_offload": True}), "super_offload"),
        (zero(3, zero_hpz_partition_size=2), "zero_hpz_partition_size"),
        (zero(3, zero_quantized_weights=True), "zero_quantized_weights"),
        (zero(3, zero_quantized_gradients=True), "zero_quantized_gradients"),
        (zero(3, mics_shard_size=2), "mics_shard_size"),
        (zero(2, zenflow={"topk_ratio": 0.1}), "zenflow"),
        (zero(2, cpu_offload=True), '"offload_optimizer": {"device": "cpu"}'),
        (zero(2, compute_grad_norm=False), "compute_grad_norm"),
        (zero(3, memory_efficient_linear=True), "memory_efficient_linear"),
        (zero(2) | {"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
        (zero(3) | {"prescale_gradients": True}, "prescale_gradients"),
        *(({key: {"enabled": True}}, f"{key} is not supported") for key in sorted(ds_config.REFUSED)),
    ],
)
def test_what_cannot_run(config: dict[str, Any], key: str) -> None:
    assert key in refused(config)


@pytest.mark.parametrize("kind", ["powersgd", "topk", "local"])
def test_compression_is_for_stage_0_and_several_processes(kind: Any) -> None:
    settings = replace(SETTINGS, communication=CommunicationSettings(compression=kind))
    assert resolve(zero(0) | {"communication_data_type": "fp32"}, settings=settings)
    for stage in (1, 2, 3):
        assert f"--compression {kind} is for stage 0" in refused(zero(stage), settings=settings)
    for key, value in {"communication_data_type": "bf16", "gradient_predivide_factor": 2.0}.items():
        said = f"{key} is for DeepSpeed's all-reduce, which --compression {kind} replaces; remove it"
        assert refused({key: value}, settings=settings) == f"my.json: {said}"
    with pytest.raises(UserError, match=f"--compression {kind} is for several processes, and this is one"):
        resolve(zero(0), 1, settings)


def test_a_noise_scale_needs_two_parts_of_a_batch() -> None:
    measured = replace(SETTINGS, run=RunSettings(max_updates=100, noise_scale=0.9))
    for accumulation, world_size in ((2, 1), (1, 2)):
        settings = replace(measured, batch=BatchSettings(rows=10, accumulation=accumulation))
        assert resolve({}, world_size, settings)
    for accumulation, rows in ((1, 10), (2, 1)):
        settings = replace(measured, batch=BatchSettings(rows=rows, accumulation=accumulation))
        with pytest.raises(UserError, match="add --accumulation 2 and --rows 2"):
            resolve({}, 1, settings)


def test_what_is_switched_off_is_dropped() -> None:
    off = {key: {"enabled": False} for key in ds_config.REFUSED} | {"sparse_gradients": False, "autotuning": None}
    off |= {"memory_breakdown": False, "dump_state": "auto"}
    switches = {"zero_quantized_weights": False, "cpu_offload": False, "mics_shard_size": None}
    assert resolve(off | zero(1, **switches)) == resolve(zero(1))


def test_bf16_of_deepspeed_goes_with_stages_1_to_3_and_either_dtype() -> None:
    for stage in (1, 2, 3):
        for dtype in ("fp32", "bf16"):
            settings = replace(SETTINGS, batch=replace(SETTINGS.batch, dtype=dtype))
            assert resolve(zero(stage) | {"bf16": {"enabled": True}}, settings=settings)["bf16"] == {"enabled": True}


# ----------------------------------------------------------------------------------- held against DeepSpeed itself

ASK_DEEPSPEED = """
import json, sys
from deepspeed.runtime import config, precision_config
from deepspeed.runtime.zero import config as zero_config, offload_config

read = set()

class Recorder(dict):
    def get(self, key, default=None):
        read.add(key)
        return super().get(key, default)
    def __getitem__(self, key):
        read.add(key)
        return super().__getitem__(key)
    def __contains__(self, key):
        read.add(key)
        return super().__contains__(key)
    def keys(self):
        return self

config.DeepSpeedConfig(Recorder(train_micro_batch_size_per_gpu=1))

def names(model):
    return [name for key, field in model.model_fields.items() for name in (key, field.alias) if name]

print(json.dumps({
    "": sorted(read),
    "zero_optimization": names(zero_config.DeepSpeedZeroConfig),
    "zero_optimization.offload_optimizer": names(offload_config.DeepSpeedZeroOffloadOptimizerConfig),
    "zero_optimization.offload_param": names(offload_config.DeepSpeedZeroOffloadParamConfig),
    "bf16": names(precision_config.DeepSpeedBF16Config),
    "fp16": names(precision_config.DeepSpeedFP16Config),
    "removed": sorted(config._REMOVED_ZERO_CONFIG_KEYS),
}))
"""


def test_the_lists_are_deepspeeds_own() -> None:
    """Which keys DeepSpeed looks up is recorded from its own reading; sections are its pydantic models."""
    answer = subprocess.check_output([sys.executable, "-c", ASK_DEEPSPEED], text=True, stderr=subprocess.DEVNULL)
    theirs = json.loads(answer.splitlines()[-1])
    read, removed = set(theirs.pop("")), theirs.pop("removed")
    known = ds_config.PASSED | ds_config.OWNED | set(ds_config.REFUSED)
    assert read - known == set()
    assert known - read == {"sequence_parallel_size"}  # read where a process group exists
    assert {f"zero_optimization.{key}" for key in removed} <= set(ds_config._NOT_SUPPORTED)
    for section, names in theirs.items():
        assert set(names) == ds_config.NESTED[section], section
