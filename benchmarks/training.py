"""Training: a step of 3D-GAN in the type and layout of lite, beside plain float32"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from benchmarks import harness
from lib import config, rng
from lib.data import Split
from lib.models import gan3d
from lib.train.gan3d import Gan3dTask

TOLERANCE = 2e-2  # of the first step's two losses, which are near 1; bfloat16 has 8 bits


def section(side: int, batch: int, plain: bool) -> config.Gan3d:
    """The networks of 24^3 (quick), 32^3 (lite) or 64^3 (the paper) in lite's type or plain."""
    lite = config.load("lite").gan3d
    source = {24: config.load("quick").gan3d, 32: lite, 64: lite}[side]
    changes = {"dtype": lite.dtype, "layout": lite.layout}
    if plain:
        changes = {"dtype": "float32", "layout": "contiguous"}
    if side == 64:
        changes |= {"base": gan3d.GAN64["base"], "generator_channels": gan3d.GAN64["channels"]}
        changes |= {"discriminator_channels": gan3d.GAN64_DISCRIMINATOR["channels"]}
    # An open gate: the discriminator must not rest in one of the two and work in the other.
    return dataclasses.replace(source, batch=batch, gate=1.0, **changes)


def step(side: int, batch: int, plain: bool) -> Callable[[], tuple[float, float]]:
    """A task on random voxels; every call is its next step and returns the two losses."""
    none = np.zeros(1, dtype=bool)
    split = Split(np.zeros((1, 30, 30, 30), dtype=bool), none, none, none, none)
    task = Gan3dTask(section(side, batch, plain), split, 32, 0, torch.device("cpu"))
    draw = rng.numpy_generator(0, "benchmark", "voxels", side)
    task.voxels = draw.random((2 * batch, side, side, side)) < 0.1
    steps = iter(range(1_000_000))

    def advance() -> tuple[float, float]:
        logged = task.step(next(steps))
        return logged["loss_generator"], logged["loss_discriminator"]

    return advance


def case(side: int, batch: int, memory: bool = True, **group) -> harness.Case:
    """One step of ours and one plain step, from the same weights on the same shapes."""
    group = group or {"group": f"batch at {side}^3", "size": batch}
    peaks = [
        harness.peak(__name__, "step", side, batch, plain) for plain in (False, True) if memory
    ]
    return harness.timed_case(
        f"{side}^3, batch {batch}",
        step(side, batch, False),
        step(side, batch, True),
        tolerance=TOLERANCE,
        repeats=3,
        memory=tuple(peaks) or None,
        **group,
    )


def cases(full: bool) -> list[harness.Case]:
    """Batches at 24^3 and 32^3; in full also the published 64^3, and all sides at one batch."""
    small = [case(side, batch) for side in (24, 32) for batch in (16, 32, 64)]
    if not full:
        return small
    sides = [case(side, 8, group="side at batch 8", size=side) for side in (24, 32, 64)]
    return [*small, case(64, 8), case(64, 16), *sides]
