"""Starting DeepSpeed: the process group, the optimizer and the engine, quietly and without compiling anything.

DeepSpeed is imported here, so import this module late: --help and a user's errors must answer before it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gfrnn.config import OptimizerSettings, UserError
from gfrnn.training import network

# Chosen before the import: DeepSpeed's own detection warns where there is no GPU, and would take Apple's. The question
# goes to the driver's library: CUDA itself, once asked, does not work in forked processes.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\b")

# DeepSpeed's autotuner, which nothing here calls, imports MLflow if it can: a third of what a start imports.
_hidden = {"mlflow": None} if "mlflow" not in sys.modules else {}
sys.modules.update(_hidden)  # type: ignore[arg-type]
import deepspeed  # noqa: E402

for _name in _hidden:
    del sys.modules[_name]
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError  # noqa: E402

_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def init_distributed(timeout: timedelta = timedelta(minutes=30)) -> torch.device:
    """Join the process group that the launcher's environment describes (none: this process alone); returns the device.

    NCCL on CUDA, where LOCAL_RANK picks the device, else gloo. `timeout` is how long a collective waits for a missing
    rank. Calling it again changes nothing.
    """
    _quiet()
    if "RANK" not in os.environ:
        os.environ.update(_ALONE, MASTER_PORT=str(network.free_port()))
    missing = [name for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set, but not {missing[0]}; start with the deepspeed command, or unset RANK")
    cuda = os.environ["DS_ACCELERATOR"] == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    network.choose_interface()
    # The shared-memory all-reduce for CPUs is compiled at first use (71 s, a hang after a killed build); gloo does.
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    # DeepSpeed makes groups of its own, for gradients too, and these take torch's default
    defaults = vars(importlib.import_module("torch.distributed.distributed_c10d"))
    defaults["default_pg_timeout"] = defaults["default_pg_nccl_timeout"] = timeout
    try:
        deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{network.here()} cannot meet the other processes at {where} ({reason}); "
            "give another port, --master_port, or the right interface, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error
    return device


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The torch optimizer of the settings. Weight decay reaches matrices alone, in a parameter group of their own.

    Call it before `initialize`, which at stage 3 leaves parameters without a shape.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if settings.weight_decay:
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
    lr, betas, eps = settings.learning_rate, (settings.beta1, settings.beta2), settings.eps
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=betas, eps=eps)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0)
    decay, momentum = settings.rms_decay, settings.momentum
    return torch.optim.RMSprop(groups, lr=lr, alpha=decay, eps=eps, momentum=momentum, centered=True)


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any]) -> Any:
    """The DeepSpeed engine of `model` for a config from resolve_ds_config, after `init_distributed`.

    Rank 0's weights become every rank's. Raises UserError for values that DeepSpeed refuses.
    """
    try:
        DeepSpeedConfig(ds_config)
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        raise UserError(f"--deepspeed: DeepSpeed refuses the config: {_one_line(error)}") from None
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    return engine


def _one_line(error: Exception) -> str:
    if hasattr(error, "errors"):  # pydantic: name the key
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return str(error).split("\n")[0]


def _quiet() -> None:
    """DeepSpeed's log, errors only, goes to stderr: stdout is for results."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
