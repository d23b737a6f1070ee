"""Judge: features of 3dnin_fc, single precision and contiguous, beside other types and layouts"""

import copy
from collections.abc import Callable

import numpy as np
import torch

from benchmarks import harness
from lib import config, device, rng
from lib.evaluate import Judge
from lib.models import nin3d
from lib.train import judge as train_judge

# Half precision keeps about three digits a layer; the others differ by the order of sums only.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def judge(profile: str) -> Judge:
    """A judge of the profile's size with random weights."""
    network = train_judge.build(config.load(profile).judge, len(config.CATEGORIES))
    nin3d.initialise(network, rng.torch_generator(0, "benchmark", "judge"))
    return Judge(0, "", network.eval())


def grids(n: int) -> np.ndarray:
    """Random grids (n, 30, 30, 30), a tenth occupied."""
    draw = rng.numpy_generator(0, "benchmark", "grids").random(
        (n, nin3d.SIDE, nin3d.SIDE, nin3d.SIDE)
    )
    return draw < 0.1


def ours(profile: str, n: int, batch: int) -> Callable[[], np.ndarray]:
    """`Judge.see` as the study uses it."""
    asked, voxels = judge(profile), grids(n)
    return lambda: asked.see(voxels, batch).features


def variant(profile: str, n: int, batch: int, dtype: str, layout: str) -> Callable[[], np.ndarray]:
    """The same loop in another type and layout."""
    form = device.memory_format(layout)
    network = copy.deepcopy(judge(profile).network).to(memory_format=form)
    voxels, cpu = grids(n), torch.device("cpu")

    @torch.no_grad()
    def features() -> np.ndarray:
        parts = []
        for i in range(0, n, batch):
            x = torch.from_numpy(voxels[i : i + batch, None]).float()
            with device.autocast(cpu, dtype):
                f = network.features(x.contiguous(memory_format=form))
                network.head(f)
            parts.append(f.float().numpy())
        return np.concatenate(parts)

    return features


def case(
    profile: str, n: int, batch: int, dtype: str, layout: str, plain_batch: int, memory: bool = True
) -> harness.Case:
    """`Judge.see` against one variant."""
    arguments = (profile, n, plain_batch, dtype, layout)
    grows = plain_batch == 1
    sides = (("ours", profile, n, batch), ("variant", *arguments))
    peaks = [harness.peak(__name__, *side) for side in sides if memory]
    return harness.timed_case(
        f"{n} shapes, batch {batch}; plain: {dtype}, {layout}, batch {plain_batch}",
        ours(profile, n, batch),
        variant(*arguments),
        tolerance=TOLERANCE[dtype],
        repeats=3,
        memory=tuple(peaks) or None,
        group="shapes, as one batch" if grows else "",
        size=n,
    )


def cases(full: bool) -> list[harness.Case]:
    """Types and layouts at one batch; then growing batches beside shape by shape."""
    n = 512 if full else 64
    others = [
        ("float32", "channels_last"),
        ("bfloat16", "contiguous"),
        ("bfloat16", "channels_last"),
    ]
    batches = (16, 64, 256) if full else (8, 32, 128)
    return [case("study", n, min(n, 128), *other, min(n, 128)) for other in others] + [
        case("study", batch, batch, "float32", "contiguous", 1) for batch in batches
    ]
