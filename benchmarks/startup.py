"""Start: wall seconds until the command line answers, beside Python or its largest import alone"""

import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks import harness

UP_TO_DATE = "up to date"


def run(*arguments: str) -> Callable[[], int]:
    """A call of this Python in the repository that returns the exit status."""
    command = [sys.executable, *arguments]
    return lambda: subprocess.run(command, cwd=harness.ROOT, capture_output=True).returncode


def case(name: str, ours: tuple[str, ...], plain: tuple[str, ...], target: float) -> harness.Case:
    """Wall time of two commands; both must end with status 0."""
    return harness.timed_case(
        f"{name}; plain: {' '.join(plain)}",
        run(*ours),
        run(*plain),
        difference=lambda a, b: float(a != 0 or b != 0),
        tolerance=0.0,
        clock=time.perf_counter,
        note=f"target {target:g} s",
    )


def pipeline() -> harness.Case:
    """`dvc repro` with nothing to do, as a dry run, which compares the same files.

    A real one would train if a file changed in between. Skipped unless everything is up to date.
    """
    name = "dvc repro report@quick, nothing to do"
    dry = ("-m", "dvc", "repro", "--dry", "report@quick")
    done = subprocess.run([sys.executable, *dry], cwd=harness.ROOT, capture_output=True, text=True)
    if done.returncode or UP_TO_DATE not in done.stdout:
        said = (done.stderr + done.stdout).strip().splitlines()
        stale = next((line for line in said if line.startswith(("ERROR", "Running"))), said[-1])
        return harness.Case(name, note=f"skipped, quick is not up to date: {stale}")
    return case(name, dry, ("-m", "dvc", "--version"), 3)


def cases(full: bool) -> list[harness.Case]:
    """Imports, help, and the pipeline."""
    return [
        case("import lib.cli", ("-c", "import lib.cli"), ("-c", "pass"), 2),
        case("import lib.train.runs", ("-c", "import lib.train.runs"), ("-c", "import torch"), 2),
        case("python -m lib --help", ("-m", "lib", "--help"), ("-c", "pass"), 2),
        pipeline(),
    ]
