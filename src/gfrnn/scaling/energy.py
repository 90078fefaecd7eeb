"""The energy that a GPU has taken, from its own counter, by NVIDIA's management library; none where there is none."""

from __future__ import annotations

import ctypes

import torch

_DONE = 0  # NVML_SUCCESS


class EnergyCounter:
    """Of one device. Unverified on GPUs that share a counter; parts of a GPU (MIG) have none."""

    def __init__(self, device: torch.device) -> None:
        self._library: ctypes.CDLL | None = None
        if device.type != "cuda":
            return
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self._handle = ctypes.c_void_p()
        found = library.nvmlInit_v2() == _DONE and (
            library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(self._handle)) == _DONE
        )
        self._library = library if found else None

    def joules(self) -> float | None:
        """Since the driver was loaded; none where the device does not say."""
        if self._library is None:
            return None
        millijoules = ctypes.c_ulonglong()
        status = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3 if status == _DONE else None
