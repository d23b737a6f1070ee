"""The one place that decides where and how numbers are computed.

Threads and determinism stand in the section ``device`` of a profile, dtype and layout in that of
the model, chosen by the benchmarks; what is left to decide depends on the machine. ``STUDY_DEVICE``
overrides it, as ``STUDY_DEVICE="where=cpu threads=4 fused=false"``, in every command and notebook;
what was used is in a run's provenance. The paths for GPUs have not been run on one yet.

``environment`` must act before torch is imported, so this module imports torch only inside.
"""

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from lib.config import Device, Profile, section
from lib.errors import StudyError

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

# glibc gives blocks beyond 32 MiB back to the system as soon as they are freed, and the next step
# faults them in anew, page by page: a quarter of our chains' time. The numbers are those of mallopt
# (malloc.h).
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": (-3, 2**30), "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1)}

# What STUDY_DEVICE may set.
CHOICES = {
    "where": {"cpu": "cpu", "cuda": "cuda"},
    "fused": {"true": True, "false": False},
    "threads": {str(n): n for n in range(1, 1025)},
}


def overridden(device: Device) -> dict[str, str | int | bool]:
    """What ``STUDY_DEVICE`` sets: where, threads, fused. StudyError when it is not readable.

    Deterministic profiles cannot be overridden: their bytes must repeat.
    """
    found = {}
    for word in os.environ.get("STUDY_DEVICE", "").split():
        name, _, value = word.partition("=")
        if value not in CHOICES.get(name, {}):
            raise StudyError(
                f"STUDY_DEVICE: {word!r} is not understood; write where=cpu or cuda, threads=N, "
                "fused=true or false, with spaces between"
            )
        found[name] = CHOICES[name][value]
    if found and device.deterministic:
        raise StudyError(
            "STUDY_DEVICE is set, but smoke and quick are computed in one way only; unset it"
        )
    return found


def environment(device: Device) -> dict[str, str]:
    """Variables for threads and memory, and in deterministic profiles the instruction set."""
    threads = str(overridden(device).get("threads", device.threads))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    kept = {name: str(value) for name, (_, value) in KEPT_MEMORY.items()}
    pinned = PINNED_ISA | {"PYTHONHASHSEED": "0"} if device.deterministic else {}
    return dict.fromkeys(names, threads) | kept | pinned


def apply_environment(device: Device) -> None:
    """Set the variables in this process; what the user has set stays unless bytes must repeat."""
    keeps = KEPT_MEMORY.keys().isdisjoint(os.environ)
    for name, value in environment(device).items():
        if device.deterministic or name not in os.environ:
            os.environ[name] = value
    if keeps:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let this process use freed memory again; for it the environment's variables come too late."""
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in KEPT_MEMORY.values():
            ctypes.CDLL(None).mallopt(parameter, value)


def pick(device: Device) -> "torch.device":
    """The device to compute on: a GPU where there is one, else the CPU.

    float32 is float32 on a GPU too, without TF32.
    """
    import torch

    chosen = overridden(device).get("where", "cuda" if torch.cuda.is_available() else "cpu")
    if device.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(device.threads)
        return torch.device("cpu")
    if chosen == "cuda":
        if not torch.cuda.is_available():
            raise StudyError("STUDY_DEVICE: where=cuda, but torch sees no GPU here")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        # Pays where batches keep their size, as in training; a sampler that shrinks its batch
        # pays a search for every new size.
        torch.backends.cudnn.benchmark = True
    return torch.device(chosen)


def fused(device: Device, where: "torch.device") -> bool:
    """Whether an optimizer takes each step in one kernel: on a GPU, unless overridden."""
    return bool(overridden(device).get("fused", where.type == "cuda"))


def fuse(optimizer: "torch.optim.Optimizer", wanted: bool) -> None:
    """Let an optimizer take its steps in one kernel, or not, whatever state it has taken up."""
    import torch

    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = True if wanted else None  # None leaves the choice to torch
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            # The kernel walks through memory: moments must lie as the parameter does.
            for name, moment in state.items():
                if torch.is_tensor(moment) and moment.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
            if "step" in state:  # counted where the kernel is
                place = parameter.device if wanted else "cpu"
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=place)


def policy(profile: Profile, model: str, where: "torch.device") -> dict[str, str | int | bool]:
    """What was decided for a model of a profile on a device, for the provenance of a run."""
    import torch

    chosen = section(profile, model)
    return {
        "where": where.type,
        "dtype": chosen["dtype"],
        "rounded": rounds(where, chosen["dtype"]),
        "layout": chosen["layout"],
        "threads": torch.get_num_threads(),
        "fused": fused(profile.device, where),
    }


@contextlib.contextmanager
def autocast(where: "torch.device", dtype: str) -> Iterator[None]:
    """A context that computes convolutions in ``dtype`` (``float32`` or ``bfloat16``)."""
    import torch

    half = torch.autocast(where.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
    with half, arithmetic(where, dtype):
        yield


def arithmetic(where: "torch.device", dtype: str) -> AbstractContextManager:
    """A context for networks whose weights are of ``dtype`` already.

    Where a CPU has no instructions for bfloat16, its products are computed on float32 operands
    rounded to bfloat16: the same products, summed in float32 as the instructions do. torch's own
    way there is a reference loop, 10 to 100 times slower than float32.
    """
    return rounded_operands() if rounds(where, dtype) else contextlib.nullcontext()


def differentiated_twice(where: "torch.device") -> AbstractContextManager:
    """A context for gradients of gradients, within ``autocast``: float32 on CPUs that have AMX.

    There the second derivatives of bfloat16 convolutions by their weights are wrong: off by .4 to
    .8 of their norm in three layers of 3DWINN, by .01 with the same instructions but AMX.
    """
    import torch

    if where.type == "cpu" and has_bfloat16() and has_amx():
        return torch.autocast("cpu", enabled=False)
    return contextlib.nullcontext()


def rounds(where: "torch.device", dtype: str) -> bool:
    """Whether ``dtype`` is computed on rounded float32 operands here, see ``arithmetic``."""
    return dtype == "bfloat16" and where.type == "cpu" and not has_bfloat16()


@functools.cache
def has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 faster than by a reference loop (oneDNN's test)."""
    import torch

    available = torch.backends.mkldnn.is_available()
    return available and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def has_amx() -> bool:
    """Whether this CPU multiplies tiles of bfloat16 (AMX)."""
    import torch

    return torch.cpu._is_amx_tile_supported()


def rounded_operands() -> AbstractContextManager:
    """The context of ``arithmetic``: products of rounded float32 operands, rounded themselves."""
    return _mode()()


@functools.cache
def _mode() -> type[AbstractContextManager]:
    import torch
    from torch.overrides import TorchFunctionMode

    products = {torch.conv2d, torch.conv3d, torch.conv_transpose3d, torch.nn.functional.linear}

    class RoundedOperands(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function not in products:
                return function(*args, **(kwargs or {}))
            args, kwargs = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda v: v.bfloat16().float(), (args, kwargs or {})
            )
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs).bfloat16()

    return RoundedOperands


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
    """The device in words, for the provenance of a run: kinds of CPUs round differently."""
    import torch

    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    kind = cpu_name() + (", AMX" if has_amx() else "")
    return f"{kind}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The maker's name of the CPU where Linux tells it, else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, f"{platform.machine()} CPU")
