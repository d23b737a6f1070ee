"""Freed memory: kept by the process, beside given back to the system after every use"""

import ctypes
import platform
from collections.abc import Callable

from benchmarks import energy, harness
from lib import device

# Where glibc's thresholds come to rest once large blocks were freed: bytes.
OWN = {"MALLOC_MMAP_THRESHOLD_": 32 * 2**20, "MALLOC_TRIM_THRESHOLD_": 64 * 2**20}


def give_back() -> None:
    """Set glibc's own thresholds: blocks beyond 32 MiB go back at once."""
    for name, (parameter, _) in device.KEPT_MEMORY.items():
        ctypes.CDLL(None).mallopt(parameter, OWN[name])


def within(policy: Callable[[], None], work: Callable[[], object]) -> Callable[[], object]:
    """``work`` under a policy; the last one set stays, so every call sets its own."""

    def run() -> object:
        policy()
        return work()

    return run


def case(name: str, work: Callable[[], object]) -> harness.Case:
    """The same work under both policies, equal to the last bit."""
    ours, plain = (within(policy, work) for policy in (device.keep_freed_memory, give_back))
    found = harness.timed_case(name, ours, plain, tolerance=0.0, repeats=2)
    device.keep_freed_memory()
    return found


def cases(full: bool) -> list[harness.Case]:
    """Batches of 16 as in lite, where glibc is the system's library."""
    if platform.libc_ver()[0] != "glibc":
        return []
    found = [
        case(f"{energy.WANDER} steps of ours", energy.wander(32, 16, False)),
        case("gradient of 3DWINN's critic", energy.update(32, 16, True, "bfloat16")),
    ]
    if full:
        found.append(case(f"{energy.CLIMB} steps of 3DWINN's sampler", energy.climb(32, 16, False)))
    return found
