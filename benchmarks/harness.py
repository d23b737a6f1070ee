"""Ours against a plain alternative in one run: alternating calls, medians, memory, agreement."""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib import device

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("case", "ours", "plain", "ratio", "equal within", "memory")


@dataclass(frozen=True)
class Timing:
    """Medians of seconds over ``pairs`` pairs of calls, and the values of the first pair."""

    ours: float
    plain: float
    pairs: int
    values: tuple


@dataclass(frozen=True)
class Case:
    """One line of a table; the ratio is plain over ours, so that more than 1 speaks for ours.

    ``difference`` above ``tolerance`` is the one thing that makes a benchmark fail. ``memory`` is
    in MiB, None where it could not be measured. Cases of one ``group`` differ in ``size`` only.
    """

    name: str
    ours: float = math.nan
    plain: float = math.nan
    unit: str = "s"
    difference: float = math.nan
    tolerance: float = math.nan
    memory: tuple[float | None, float | None] | None = None
    note: str = ""
    group: str = ""
    size: int = 0

    @property
    def ratio(self) -> float:
        return self.plain / self.ours if self.ours else math.nan

    @property
    def checked(self) -> bool:
        return not math.isnan(self.tolerance)

    @property
    def agrees(self) -> bool:
        """False when the values differ by more than stated; NaN is a disagreement."""
        return not self.checked or self.difference <= self.tolerance


def compare(
    ours: Callable[[], object],
    plain: Callable[[], object],
    repeats: int = 5,
    patience: float = 20.0,
    clock: Callable[[], float] | None = None,
) -> Timing:
    """Time both in turn, A B A B, and return the medians of ``clock`` (``compute_clock()``).

    The first pair warms up and gives the values; when it takes longer than ``patience`` seconds
    it also is the measurement, for then warming up matters little. Later pairs stop at
    ``repeats`` or when ``patience`` is used up.
    """
    clock = clock or compute_clock()
    a, value = _timed(ours, clock)
    b, plain_value = _timed(plain, clock)
    pairs, used = ([(a, b)], a + b) if a + b > patience else ([], 0.0)
    while len(pairs) < repeats and used < patience:
        pairs.append((_timed(ours, clock)[0], _timed(plain, clock)[0]))
        used += sum(pairs[-1])
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    return Timing(*medians, len(pairs), (value, plain_value))


def compute_clock() -> Callable[[], float]:
    """Seconds of CPU on one thread, which other work on the machine does not lengthen; else wall.

    Several threads work side by side, so that their sum says nothing.
    """
    import torch

    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _timed(work: Callable[[], object], clock: Callable[[], float]) -> tuple[float, object]:
    start = clock()
    value = work()
    return clock() - start, value


def relative(a: object, b: object) -> float:
    """Largest difference over the largest magnitude of the second: arrays, tensors or numbers."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        return math.inf
    return float(np.abs(a - b).max() / np.abs(b).max())


def timed_case(
    name: str,
    ours: Callable[[], object],
    plain: Callable[[], object],
    *,
    tolerance: float,
    difference: Callable[[object, object], float] = relative,
    repeats: int = 5,
    clock: Callable[[], float] | None = None,
    **details,
) -> Case:
    """A Case of seconds from ``compare``; ``details`` are further fields of it."""
    timing = compare(ours, plain, repeats, clock=clock)
    note = ", ".join(filter(None, [details.pop("note", ""), f"n = {timing.pairs}"]))
    return Case(
        name,
        timing.ours,
        timing.plain,
        difference=difference(*timing.values),
        tolerance=tolerance,
        note=note,
        **details,
    )


def peak(module: str, function: str, *arguments) -> float | None:
    """MiB that ``function(*arguments)()`` takes at its peak, beyond what is held before the call.

    Measured by ``benchmarks.peak`` in a process of its own, which gives freed memory back: the
    peak of this one would hide it. None where the system does not tell (it takes Linux).
    """
    environment = {k: v for k, v in os.environ.items() if k not in device.KEPT_MEMORY}
    command = [sys.executable, "-m", "benchmarks.peak", module, function, json.dumps(arguments)]
    options = dict(cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    done = subprocess.run(command, **options)
    return json.loads(done.stdout)


def table(cases: Sequence[Case]) -> str:
    """The cases as a Markdown table, and a line on the growth of each group."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---:|---:|---:|---:|---:|"]
    lines += ["| " + " | ".join(_cells(case)) + " |" for case in cases]
    return "\n".join([*lines, *_growth(cases)])


def _cells(case: Case) -> list[str]:
    name = f"{case.name} ({case.note})" if case.note else case.name
    ratio = "" if math.isnan(case.ratio) else f"{case.ratio:.2f}"
    values = [_amount(value, case.unit) for value in (case.ours, case.plain)]
    equal = f"{case.difference:.1e} (<= {case.tolerance:g})" if case.checked else ""
    return [name, *values, ratio, equal, _memory(case.memory)]


def _amount(value: float, unit: str) -> str:
    if math.isnan(value):
        return ""
    if unit == "s" and value < 0.1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def _memory(memory: tuple[float | None, float | None] | None) -> str:
    if memory is None:
        return ""
    return " / ".join("?" if m is None else f"{m:.0f}" for m in memory) + " MiB"


def _growth(cases: Sequence[Case]) -> list[str]:
    """Exponents p of seconds ~ size^p, and of memory where it was measured, one line a group."""
    lines = []
    for group in dict.fromkeys(case.group for case in cases if case.group):
        members = [case for case in cases if case.group == group]
        if len(members) < 2:
            continue
        size = [case.size for case in members]
        seconds = [(case.ours, case.plain) for case in members]
        text = f"Growth: time ~ ({group})^p, {_powers(size, seconds)}"
        if all(case.memory and all(case.memory) for case in members):
            text += f"; memory, {_powers(size, [case.memory for case in members])}"
        lines += ["", f"{text}."]
    return lines


def _powers(size: Sequence[int], amounts: Sequence[tuple[float, float]]) -> str:
    """Least squares on logarithms, for either side."""
    ours, plain = np.polyfit(np.log(size), np.log(amounts), 1)[0]
    return f"p = {ours:.2f} ours, {plain:.2f} plain"


def machine() -> str:
    """One line on what the numbers were measured on, and on how busy it was."""
    import torch

    cores = os.cpu_count()
    seconds = "CPU seconds" if compute_clock() is time.process_time else "wall seconds"
    return (
        f"{device.cpu_name()}, {cores} cores, {torch.get_num_threads()} threads used, torch "
        f"{torch.__version__}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}; "
        f"{seconds}"
    )
