"""A DeepSpeed config file as this package reads it: strategy only, checked before anything heavy is imported.

Settings own sizes, optimizer, schedule and clipping; the file owns how the work is spread (ZeRO stage, offload,
precision on the wire). "auto" means "from the settings", as in Hugging Face's files. DeepSpeed 0.19.8
ignores unknown top-level keys and answers wrong values with tracebacks, so names are checked here; a test holds the
lists below against DeepSpeed's own.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from gfrnn.config import Settings, UserError, networks


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys of the file that reach DeepSpeed as they are.
PASSED = _keys(
    """
    zero_optimization bf16 fp16 communication_data_type data_types prescale_gradients
    gradient_predivide_factor wall_clock_breakdown disable_python_gc
    """
)

# Of those, values that DeepSpeed does not check: what they may be, and the test.
_BOOLEANS = _keys("prescale_gradients wall_clock_breakdown disable_python_gc")
_WIRE = ("fp32", "bf16", "fp16")

# Keys whose value follows from the settings, or from what gfrnn is; a file may say the same or "auto".
OWNED = _keys(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
    gradient_allreduce_op gradient_clipping optimizer scheduler steps_per_print
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    """
)

_GONE = "it is gone from DeepSpeed 0.19.8"

# Keys that DeepSpeed knows and this package does not run with, by reason. Disabled ones are dropped.
_REFUSED = {
    _GONE: """
        amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula
        progressive_layer_drop quantize_training sparse_attention sparse_gradients
        """,
    "the recurrence is trained with data parallelism alone": """
        pipeline tensor_parallel expert_parallel sequence_parallel_size seq_parallel_communication_data_type
        use_data_before_expert_parallelism
        """,
    "gfrnn reads the text and writes the checkpoints itself": """
        checkpoint datastates_ckpt dataloader_drop_last data_efficiency
        """,
    "it has no effect here": """
        activation_checkpointing aio autotuning compile disable_allgather hybrid_engine vocabulary_size
        weight_quantization
        """,
    "runs are tracked in MLflow": "tensorboard wandb comet csv_monitor",
    "speed, time and FLOP are in metrics.jsonl": "flops_profiler timers",
    "logs are quiet": "comms_logger dump_state log_level",
    "it resets the peak of memory that summary.json reports": "memory_breakdown",
    "its name is bf16": "bfloat16",
    "the recurrence chooses its own dtypes, use --dtype bf16": "torch_autocast",
}
REFUSED = {key: reason for reason, keys in _REFUSED.items() for key in keys.split()}

# Keys of nested sections: the fields, with their stage3_ aliases, of DeepSpeed's own models.
NESTED = {
    "zero_optimization": _keys(
        """
        stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
        elastic_checkpoint
        offload_param offload_optimizer zenflow sub_group_size cpu_offload cpu_offload_param cpu_offload_use_pin_memory
        prefetch_bucket_size stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold
        model_persistence_threshold stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters
        max_reuse_distance stage3_max_reuse_distance module_granularity_threshold stage3_module_granularity_threshold
        gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save
        stage3_gather_fp16_weights_on_model_save use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params
        allgather_sequential stage3_allgather_sequential ignore_unused_parameters legacy_stage1 round_robin_gradients
        parameter_alignment zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights
        zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply
        log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module
        """
    ),
    "zero_optimization.offload_optimizer": _keys(
        """
        device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload
        cpuadam_cores_perc
        """
    ),
    "zero_optimization.offload_param": _keys("device nvme_path buffer_count buffer_size max_in_cpu pin_memory"),
    "bf16": _keys(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "fp16": _keys(
        """
        enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads
        """
    ),
    "data_types": _keys("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
}

# Keys of zero_optimization that would change what is trained, be compiled at first use, or are an old spelling.
_NOT_SUPPORTED = {
    "zero_optimization.zenflow": "it updates with stale gradients",
    "zero_optimization.offload_optimizer.super_offload": "it is compiled at first use",
    "zero_optimization.zero_quantized_weights": "it quantizes what is trained",
    "zero_optimization.zero_quantized_nontrainable_weights": "it quantizes what is trained",
    "zero_optimization.zero_quantized_gradients": "it quantizes what is trained",
    "zero_optimization.legacy_stage1": _GONE,
    "zero_optimization.mics_shard_size": _GONE,
    "zero_optimization.mics_hierarchical_params_gather": _GONE,
    "zero_optimization.zeropp_loco_param": _GONE,
    "zero_optimization.cpu_offload": 'it is written "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'it is written "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": 'it is written "offload_optimizer": {"pin_memory": true}',
}

# Keys of zero_optimization that count elements.
_COUNTS = _keys(
    """
    reduce_bucket_size allgather_bucket_size sub_group_size
    prefetch_bucket_size stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold
    model_persistence_threshold stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters
    max_reuse_distance stage3_max_reuse_distance
    """
)

_SMALLEST_BUCKET = 2**19  # elements: 2 MiB
_QUIET = 10**9  # steps between DeepSpeed's own progress lines: never


def load_ds_config(path: Path | None) -> dict[str, Any]:
    """The file's content, unchecked but for its form; None is stage 0. Raises UserError if it is no JSON object."""
    if path is None:
        return {"zero_optimization": {"stage": 0}}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"--deepspeed {path}: {reason}; give a JSON file such as ds_configs/z2.json") from None
    try:
        config = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets as deep
        raise UserError(f"{path}: not a config: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a JSON object {{...}} is needed, this is {type(config).__name__}")
    return config


def stage_of(config: dict[str, Any]) -> int:
    """The ZeRO stage, 0 to 3, of a config (loaded or resolved)."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if stage == "auto":
        return 0
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage <= 3:
        raise UserError(f"zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    return stage


def resolve_ds_config(config: dict[str, Any], settings: Settings, *, world_size: int) -> dict[str, Any]:
    """What deepspeed.initialize gets: `config` with "auto" and null dropped and the settings' sizes and clipping added.

    Each of the `world_size` W processes owns ceil(R / W) rows, read in A micro-batches of ceil(ceil(R / W) / A) rows;
    rows missing to fill them up are padding of weight 0. Raises UserError, in one line, for unknown keys, for values
    that contradict the settings and for what cannot run.
    """
    return _Resolver(str(settings.deepspeed or "ds_config"), settings, world_size).resolve(config)


class _Resolver:
    def __init__(self, file: str, settings: Settings, world_size: int) -> None:
        self.file, self.settings, self.world_size = file, settings, world_size

    def refuse(self, text: str) -> NoReturn:
        raise UserError(f"{self.file}: {text}")

    def resolve(self, config: dict[str, Any]) -> dict[str, Any]:
        self.names("", config, PASSED | OWNED | set(REFUSED))
        for key, reason in REFUSED.items():
            if key in config and not _is_off(config[key]):
                self.refuse(f"{key} is not supported: {reason}; remove it")
        sections = {key: value for key, value in config.items() if key in PASSED}
        resolved: dict[str, Any] = _without_auto(sections)
        for path, known in NESTED.items():
            self.names(path, _at(config, path), known)
        try:
            stage = stage_of(config)
        except UserError as error:
            self.refuse(str(error))
        zero = resolved.setdefault("zero_optimization", {})
        if not isinstance(zero, dict):
            self.refuse(f'zero_optimization is {zero!r}; write {{"stage": {int(zero)}}}')
        zero["stage"] = stage
        self.zero(zero)
        self.scalars(resolved)
        self.precision(resolved, stage)
        self.owned(config)
        self.processes(resolved, stage)
        if stage >= 2 and (resolved.get("gradient_predivide_factor", 1.0) != 1.0 or resolved.get("prescale_gradients")):
            self.refuse(f"gradient_predivide_factor and prescale_gradients do not go with stage {stage}; remove them")
        zero["memory_efficient_linear"] = False  # true replaces torch's F.linear for the whole process
        if stage:  # a layer's gradients are reduced while the next layer's are computed
            zero.setdefault("reduce_bucket_size", self.layer_size)
            zero.setdefault("overlap_comm", True)
        return resolved | {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.settings.batch.accumulation,
            "gradient_clipping": self.settings.optimization.clip,
            "steps_per_print": _QUIET,
            "zero_allow_untested_optimizer": True,  # torch's, all elementwise: right on flat slices
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's is compiled at first use
        }

    @property
    def micro_batch(self) -> int:
        """Rows a process reads at once."""
        batch = self.settings.batch
        return math.ceil(math.ceil(batch.rows / self.world_size) / batch.accumulation)

    @property
    def layer_size(self) -> int:
        """Elements of about a layer's gradients, not so few that messages are all latency."""
        return max(
            _SMALLEST_BUCKET, max(part.recurrent for part in networks(self.settings)) // self.settings.model.num_layers
        )

    def names(self, path: str, section: Any, known: Iterable[str]) -> None:
        """Refuse names that DeepSpeed does not have; the section itself may be missing."""
        if section is None or (path == "zero_optimization" and not isinstance(section, dict)):
            return  # zero_optimization: true is an old form, named where the stage is read
        if not isinstance(section, dict):
            self.refuse(f"{path} is {section!r}; it must be an object {{...}}")
        for key in section:
            if key not in known and f"{path}.{key}" not in _NOT_SUPPORTED:
                near = difflib.get_close_matches(key, list(known), n=1)
                hint = f"did you mean {near[0]}?" if near else "DeepSpeed has no such key; remove it"
                self.refuse(f"{f'{path}.' if path else ''}{key} is unknown; {hint}")

    def zero(self, zero: dict[str, Any]) -> None:
        for path, reason in _NOT_SUPPORTED.items():
            section, _, key = path.rpartition(".")
            if not _is_off(_at({"zero_optimization": zero}, section, key)):
                self.refuse(f"{path} is not supported: {reason}; remove it")
            zero.pop(key, None)
        for key in sorted(_COUNTS & set(zero)):
            value, least = zero[key], int(key == "reduce_bucket_size")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or value % 1 != 0 or value < least:
                self.refuse(
                    f"zero_optimization.{key} is {value!r}; it must be a whole number of elements, {least} or more"
                )
        if zero.get("compute_grad_norm", True) is not True:
            self.refuse("zero_optimization.compute_grad_norm must stay true: runs report the gradient norm; remove it")
        if zero.get("zero_hpz_partition_size", 1) not in (0, 1):
            self.refuse("zero_optimization.zero_hpz_partition_size above 1 is not supported; remove it")
        for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
            offload = zero.get(key) or {}
            device = offload.get("device", "none")
            if device not in ("none", "cpu"):
                self.refuse(f"zero_optimization.{key}.device is {device!r}; only cpu and none are supported")
            if device == "cpu" and zero["stage"] < lowest:
                self.refuse(f"zero_optimization.{key} needs stage {lowest} or higher, the stage is {zero['stage']}")
            if offload.get("ratio", 1.0) != 1.0:
                self.refuse(f"zero_optimization.{key}.ratio is {offload['ratio']}; only all of it, 1.0, is supported")

    def scalars(self, resolved: dict[str, Any]) -> None:
        for key, value in resolved.items():
            if key in _BOOLEANS and not isinstance(value, bool):
                self.refuse(f"{key} is {value!r}; it must be true or false")
        wire = resolved.get("communication_data_type", "fp32")
        if wire not in _WIRE:
            self.refuse(f"communication_data_type is {wire!r}; it must be one of {', '.join(_WIRE)}")
        factor = resolved.get("gradient_predivide_factor", 1.0)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
            self.refuse(f"gradient_predivide_factor is {factor!r}; it must be a number greater than 0")

    def precision(self, resolved: dict[str, Any], stage: int) -> None:
        for section in ("bf16", "fp16"):
            enabled = resolved.get(section, {}).get("enabled", False)
            if not isinstance(enabled, bool):
                self.refuse(f"{section}.enabled is {enabled!r}; it must be true or false")
        if resolved.pop("fp16", {}).get("enabled"):
            self.refuse("fp16.enabled is true, but the recurrence has fp32 and bf16; remove it and use --dtype bf16")
        bf16 = resolved.get("bf16", {})
        types = resolved.get("data_types", {})
        accumulate, parameters = types.get("grad_accum_dtype"), types.get("param_dtype")
        ours = "bf16" if bf16.get("enabled") else "fp32"
        if parameters not in (None, ours):
            self.refuse(f"data_types.param_dtype is {parameters!r}, but bf16.enabled makes it {ours}; remove it")
        if accumulate not in (None, "fp32", ours):
            self.refuse(f"data_types.grad_accum_dtype is {accumulate!r}; it must be fp32 or {ours}, or be removed")
        if not bf16.get("enabled"):
            return
        if stage == 0:
            self.refuse(
                "bf16.enabled does not go with stage 0, where DeepSpeed starts with a step on zero gradients; "
                "use stage 1, or --dtype bf16 instead"
            )
        for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
            if bf16.get(key):
                self.refuse(f"bf16.{key} is not supported: checkpoints hold fp32 weights and moments; remove it")
        if stage == 1 and accumulate == "fp32":
            self.refuse("data_types.grad_accum_dtype fp32 with bf16 does not go with stage 1; use stage 2 or remove it")

    def owned(self, config: dict[str, Any]) -> None:
        """Values that follow from the settings may be repeated in the file, not contradicted."""
        batch, clip = self.settings.batch, self.settings.optimization.clip
        total = self.micro_batch * batch.accumulation * self.world_size
        how = f"with --rows {batch.rows}, --accumulation {batch.accumulation} and {self.world_size} processes it is"
        expected: list[tuple[str, tuple[Any, ...], str]] = [
            ("gradient_clipping", (clip,), f"--clip is {clip}"),
            ("gradient_accumulation_steps", (batch.accumulation,), f"--accumulation is {batch.accumulation}"),
            ("train_micro_batch_size_per_gpu", (self.micro_batch,), f"{how} {self.micro_batch}"),
            ("train_batch_size", (total, batch.rows), f"{how} {total}"),
            ("gradient_allreduce_op", ("mean",), "the loss is scaled for the mean"),
            ("managed_gradient_accumulation", (True,), "--accumulation is the boundary"),
            ("zero_allow_untested_optimizer", (True,), "the optimizer is torch's"),
            ("zero_force_ds_cpu_optimizer", (False,), "the optimizer is torch's"),
        ]
        for key, accepted, reason in expected:
            value = config.get(key, "auto")
            if value != "auto" and value not in accepted:
                self.refuse(f"{key} is {value!r}, but {reason}; remove it from the file{_flag(key, value)}")
        if _at(config, "zero_optimization", "memory_efficient_linear") is True:
            self.refuse("zero_optimization.memory_efficient_linear replaces torch's linear for all modules; remove it")
        self.section("optimizer", config, _optimizer_values(self.settings), "--optimizer, --learning-rate, ...")
        self.section("scheduler", config, _scheduler_values(self.settings), "--schedule, --warmup-updates, ...")

    def processes(self, resolved: dict[str, Any], stage: int) -> None:
        """What the number of processes and their parts of an update make impossible."""
        kind = self.settings.communication.compression
        if kind != "none":
            if stage:
                self.refuse(f"--compression {kind} is for stage 0, where gradients are whole; this is stage {stage}")
            if self.world_size == 1:
                raise UserError(f"--compression {kind} is for several processes, and this is one; leave it out")
            neutral = {"communication_data_type": "fp32", "prescale_gradients": False, "gradient_predivide_factor": 1.0}
            for key, value in neutral.items():
                if resolved.get(key, value) != value:
                    self.refuse(f"{key} is for DeepSpeed's all-reduce, which --compression {kind} replaces; remove it")
        parts = min(self.settings.batch.rows, self.world_size * self.settings.batch.accumulation)
        if self.settings.run.noise_scale and parts < 2:
            raise UserError("--noise-scale compares parts of a batch; on one process add --accumulation 2 and --rows 2")

    def section(self, name: str, config: dict[str, Any], ours: dict[str, Any], flags: str) -> None:
        """Refuse an optimizer or scheduler section unless it repeats `ours`; it does not reach DeepSpeed either way."""
        section = config.get(name)
        if section is None or section == "auto":
            return
        if not isinstance(section, dict) or not isinstance(section.get("params", {}), dict):
            self.refuse(f"{name} must be an object {{...}}; remove the section and use {flags}")
        values = {"type": section.get("type", "auto")} | section.get("params", {})
        for key, value in values.items():
            given = value.lower() if isinstance(value, str) else value
            if given != "auto" and (key not in ours or given != ours[key]):
                instead = f", the settings say {ours[key]!r}" if key in ours else ""
                self.refuse(f"{name}: {key} is {value!r}{instead}; remove the section and use {flags}")


def _optimizer_values(settings: Settings) -> dict[str, Any]:
    """An optimizer section that says what the settings say, by DeepSpeed's names."""
    o = settings.optimization
    values: dict[str, Any] = {"type": o.optimizer, "lr": o.learning_rate, "eps": o.eps, "weight_decay": o.weight_decay}
    if o.optimizer == "rmsprop":
        return values | {"alpha": o.rms_decay, "momentum": o.momentum, "centered": True}
    return values | {"betas": [o.beta1, o.beta2], "torch_adam": True, "adam_w_mode": o.optimizer == "adamw"}


def _scheduler_values(settings: Settings) -> dict[str, Any]:
    o = settings.optimization
    kind = {"constant": "warmuplr", "linear": "warmupdecaylr", "cosine": "warmupcosinelr"}[o.schedule]
    values = {"type": kind, "warmup_num_steps": o.warmup_updates, "total_num_steps": settings.run.max_updates}
    return values | {"warmup_min_lr": 0, "warmup_max_lr": o.learning_rate, "warmup_type": "linear"}


def _flag(key: str, value: Any) -> str:
    """The other mend: the flag that makes the settings say what the file says."""
    flags = {"gradient_clipping": "clip", "gradient_accumulation_steps": "accumulation", "train_batch_size": "rows"}
    return f" or add --{flags[key]} {value}" if key in flags else ""


def _at(config: Any, path: str, key: str | None = None) -> Any:
    """The value at a dotted path, or None."""
    for name in [*path.split("."), *([key] if key else [])]:
        config = config.get(name) if isinstance(config, dict) else None
    return None if config == "auto" else config


def _is_off(value: Any) -> bool:
    return value in (None, False, "auto") or (isinstance(value, dict) and value.get("enabled", True) in (False, "auto"))


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item is not None and item != "auto"}
    return value


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f"{path}: {key} is there twice; remove one")
        found[key] = value
    return found
