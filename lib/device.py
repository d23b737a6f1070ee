"""The one place that decides where and how numbers are computed.

``environment`` must act before torch is imported, so this module imports torch only inside.
"""

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from lib.config import Device

if TYPE_CHECKING:
    import torch

# One instruction set for every library: the same training gave three different hashes under three
# settings, and AVX2 is what every x86 machine of the last decade has.
PINNED_ISA = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2,STRICT",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}


def environment(device: Device) -> dict[str, str]:
    """Variables that fix threads, and in deterministic profiles the instruction set."""
    threads = str(device.threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    pinned = PINNED_ISA | {"PYTHONHASHSEED": "0"} if device.deterministic else {}
    return dict.fromkeys(names, threads) | pinned


def apply_environment(device: Device) -> None:
    """Set the variables in this process; threads that the user has set stay as they are."""
    for name, value in environment(device).items():
        if device.deterministic or name not in os.environ:
            os.environ[name] = value


def pick(device: Device) -> "torch.device":
    """The device to compute on: a GPU where there is one, else the CPU."""
    import torch

    if device.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(device.threads)
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(where: "torch.device", dtype: str) -> AbstractContextManager:
    """A context that computes convolutions in ``dtype`` (``float32`` or ``bfloat16``)."""
    import torch

    return torch.autocast(where.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def dtype(name: str) -> "torch.dtype":
    """``float32`` or ``bfloat16`` as torch names it."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def memory_format(layout: str) -> "torch.memory_format":
    """``channels_last`` or ``contiguous`` as torch names it for 5-D tensors."""
    import torch

    formats = {"channels_last": torch.channels_last_3d, "contiguous": torch.contiguous_format}
    return formats[layout]


def describe(where: "torch.device") -> str:
    """The device in words, for the provenance of a run."""
    import platform

    import torch

    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
