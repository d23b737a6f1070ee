"""Background: a step of 3D-GAN beside niced training on one thread (ours), and alone (plain)"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks import harness, training

READY = "trains"


@contextlib.contextmanager
def niced_training(side: int, batch: int) -> Iterator[None]:
    """Another process that trains at the lowest priority, until the end of the block."""
    command = [sys.executable, "-m", "benchmarks.background", str(side), str(batch)]
    child = subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        if child.stdout.readline().strip() != READY:
            raise RuntimeError("the training in the background did not start")
        yield
    finally:
        child.kill()
        child.communicate()


def main(side: str, batch: str) -> None:
    """Train without end on one thread, at the lowest priority once the first step is done."""
    import torch

    torch.set_num_threads(1)
    step = training.step(int(side), int(batch), False)
    step()
    os.nice(19)
    print(READY, flush=True)
    while True:
        step()


def work(side: int, batch: int, steps: int) -> tuple[float, tuple[float, float]]:
    """Wall seconds of ``steps`` training steps from the same start, and the last one's losses."""
    step = training.step(side, batch, False)
    start = time.perf_counter()
    losses = [step() for _ in range(steps)]
    return time.perf_counter() - start, losses[-1]


def case(side: int, batch: int, steps: int) -> harness.Case:
    """The same steps twice; the ratio is the speed that is left to the work in front."""
    with niced_training(side, batch):
        ours, found = work(side, batch, steps)
    plain, other = work(side, batch, steps)
    return harness.Case(
        f"{steps} steps at {side}^3, batch {batch}, beside training under nice",
        ours,
        plain,
        difference=harness.relative(found, other),
        tolerance=training.TOLERANCE,
        note="wall seconds",
    )


def cases(full: bool) -> list[harness.Case]:
    """One, longer in full."""
    return [case(32, 16, 60 if full else 15)]


if __name__ == "__main__":
    main(*sys.argv[1:])
