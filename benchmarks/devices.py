"""Devices: a training step shared by two processes (ours), beside the same step in one (plain)"""

import json
import subprocess
import sys
import time

import numpy as np

from benchmarks import harness
from lib import config, device, rng
from lib.data import Split

# Of what the first step logs: the order of sums differs, and chains of later steps, whose moves
# are divided by the size of the gradient, make much of a rounding.
TOLERANCE = 2e-3


def task(model: str, profile: config.Profile):
    """A task of a profile on random shapes; no data set is needed."""
    from lib.train import runs

    draw = rng.numpy_generator(0, "benchmark", "shapes")
    voxels = draw.random((64, 30, 30, 30)) < 0.1
    none = np.zeros(len(voxels), dtype=bool)
    split = Split(voxels, none, none, none, none)
    return runs.model(model).task(profile, split, 0, device.pick(profile.device))


def main(model: str, name: str, steps: str) -> None:
    """Train some steps in this process, or in its share of a pair; the first one prints."""
    import torch

    from lib.train import ranks

    torch.set_num_threads(1)
    together, own = ranks.start(1), task(model, config.load(name))
    own.ranks = together
    for optimizer in own.optimizers.values():
        together.join_gradients(optimizer, own.gradients)
    logged = own.step(0)  # warms up
    start = time.perf_counter()
    for step in range(1, 1 + int(steps)):
        own.step(step)
    seconds = (time.perf_counter() - start) / int(steps)
    if together.rank == 0:
        print("RESULT" + json.dumps({"seconds": seconds, "logged": list(logged.values())}))


def measured(n: int, *arguments: str) -> dict:
    """What ``main`` prints when n processes share the work."""
    module = ["-m", "benchmarks.devices", *arguments]
    pair = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    command = [sys.executable, *(pair if n > 1 else []), *module]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.split("RESULT")[1])


def case(model: str, profile: str, steps: int) -> harness.Case:
    """One model; the ratio is what the second process brings."""
    two, one = (measured(n, model, profile, str(steps)) for n in (2, 1))
    return harness.Case(
        f"{model} of {profile}, two processes of one thread",
        two["seconds"],
        one["seconds"],
        difference=harness.relative(two["logged"], one["logged"]),
        tolerance=TOLERANCE,
        note=f"n = {steps} steps, wall seconds",
    )


def cases(full: bool) -> list[harness.Case]:
    """The energy-based models of lite."""
    return [case(m, "lite", 10 if full else 2) for m in ("beyond", "desnet3d")]


if __name__ == "__main__":
    main(*sys.argv[1:])
