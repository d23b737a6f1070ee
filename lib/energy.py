"""What an energy-based run makes of shapes: their energies, and its way from noise to a shape.

Nothing here opens the test split. Energies are lower for what is more likely, and in single
precision.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import binary_dilation
from torch import Tensor, nn

from lib import config, data, rng, voxel
from lib.errors import StudyError
from lib.train import beyond, desnet3d, runs, winn3d

FLIPPED = 0.1  # share of the voxels on and around an object that a corrupted shape has turned over
BATCH = 32  # shapes looked at at once; only memory depends on it


@dataclass(frozen=True)
class View:
    """Where a model's samples start, and what lies between start and sample.

    start(profile, network, seeds) -> voxels (n, 1, D, D, D);
    film(profile, networks, seed, steps) -> {row: voxels (len(steps), D, D, D)}.
    """

    start: Callable
    film: Callable


def energies(
    run: runs.Run, profile: config.Profile, network: nn.Module, n: int
) -> dict[str, np.ndarray]:
    """Energies (at most n,) float32 of five kinds of shapes: real, generated and neither.

    training and held-out: the two parts of the training split, drawn by the run's seed; generated:
    the first published samples, cut at the profile's threshold, as real shapes are binary too;
    corrupted: the held-out ones through ``corrupt``; noise: where the chains of the first samples
    start. Raises StudyError for a model without energies or a run that is not published.
    """
    split = data.load_train(profile.data).category(run.category)
    grids = data.model_grid(split.voxels, profile.data.side)
    held_out = _drawn(grids[split.validation], n, "held-out", run.seed)
    samples = voxel.load_voxels(run.samples / runs.samples_file(profile.evaluation.threshold))
    shapes = {
        "training": _drawn(grids[~split.validation], n, "training", run.seed),
        "held-out": held_out,
        "generated": samples[:n],
        "corrupted": corrupt(held_out, run.seed),
        "noise": _view(run).start(profile, network, list(range(min(n, len(samples)))))[:, 0],
    }
    return {kind: _energy(network, torch.as_tensor(x)) for kind, x in shapes.items()}


def _drawn(grids: np.ndarray, n: int, part: str, seed: int) -> np.ndarray:
    """At most n of the grids, without replacement."""
    return grids[rng.numpy_generator("energies", part, seed).permutation(len(grids))[:n]]


@torch.no_grad()
def _energy(network: nn.Module, shapes: Tensor) -> np.ndarray:
    """Energies (N,) of shapes (N, D, D, D)."""
    chunks = shapes[:, None].split(BATCH)
    found = [network.energy(x.to(network.mean.device, torch.float32)).cpu() for x in chunks]
    return torch.cat(found).numpy()


def corrupt(grids: np.ndarray, seed: int) -> np.ndarray:
    """Grids bool (N, D, D, D) with a tenth of the voxels on and around each object turned over.

    On and around: the occupied voxels and those that touch one by a face, an edge or a corner. Of
    these m voxels round(m / 10) are drawn without replacement, by ``seed`` and the grid's position.
    """
    out = grids.copy()
    for k, grid in enumerate(out):
        near = np.flatnonzero(binary_dilation(grid, np.ones((3, 3, 3))))
        stream = rng.numpy_generator("corrupted", seed, k)
        flipped = stream.choice(near, round(FLIPPED * len(near)), replace=False)
        grid.flat[flipped] ^= True
    return out


def in_words(found: dict[str, np.ndarray]) -> str:
    """Two sentences on ``energies``: of how many held-out shapes and pairs an order holds."""
    held_out = found["held-out"]
    raised = (found["corrupted"] > held_out).mean()  # row k of both is the same shape
    share = {kind: _share_below(held_out, e) for kind, e in found.items()}
    return (
        f"Corruption raises the energy of {raised:.0%} of the held-out shapes. One of these has "
        f"the lower energy in {share['noise']:.0%} of its pairs with noise, in "
        f"{share['training']:.0%} with a training shape and in {share['generated']:.0%} with a "
        "generated one."
    )


def _share_below(low: np.ndarray, high: np.ndarray) -> float:
    """Share of pairs (low, high) in that order; ties count half."""
    difference = high[None] - low[:, None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def moments(last: int, n: int = 10) -> list[int]:
    """At most n numbers of steps from 0 to ``last``, ever further apart."""
    return sorted({round(last * (k / (n - 1)) ** 2) for k in range(n)})


def film(
    run: runs.Run, profile: config.Profile, networks: dict, seed: int, steps: list[int]
) -> dict[str, np.ndarray]:
    """Voxels (len(steps), D, D, D) of one sample after given numbers of sampler steps, by row.

    One row, or one a cascade, which starts where the one before ended; a climb that ends before a
    number repeats its end. All frames are of one chain: start and noise are named by ``seed``, so
    a longer chain begins as a shorter one. Raises StudyError for a model without energies, and
    where a climb has noise that is annealed: cut short, it would be another climb.
    """
    return _view(run).film(profile, networks, seed, steps)


def _view(run: runs.Run) -> View:
    if run.model not in VIEWS:
        raise StudyError(f"{run.model} has no energies; choose one of {', '.join(VIEWS)}")
    return VIEWS[run.model]


def _one_chain(sample: Callable) -> Callable:
    """The film of a sampler that takes the number of steps: anew to each of them."""

    def film(profile: config.Profile, networks: dict, seed: int, steps: list[int]) -> dict:
        return {"one chain": np.concatenate([sample(profile, networks, [seed], k) for k in steps])}

    return film


def _climbs(profile: config.Profile, networks: dict, seed: int, steps: list[int]) -> dict:
    """The climbs of a cascade, each cut at the numbers of steps, at most at its own end."""
    winn, rows = profile.winn3d, {}
    if winn.sigma > 0:
        raise StudyError("winn3d.sigma: no film of climbs with annealed noise; set it to 0")
    names = winn3d.cascade_names(winn)
    critics = [networks[name] for name in names]
    ends = winn3d.sample_cascade(winn, critics, [seed])[1][0].tolist()
    x = _winn3d_start(profile, critics[0], [seed]).to(critics[0].mean.device)
    for name, critic, end in zip(names, critics, ends, strict=True):
        cuts = {k: _cut(winn, critic, x, k) for k in {end, *(min(k, end) for k in steps)}}
        frames = torch.cat([cuts[min(k, end)] for k in steps])
        rows[name.replace("_", " ")] = frames[:, 0].cpu().numpy()
        x = cuts[end]
    return rows


def _cut(winn: config.Winn3d, critic: nn.Module, x: Tensor, steps: int) -> Tensor:
    """x (1, 1, D, D, D) after exactly ``steps`` steps of a climb."""
    never = torch.full((1,), torch.inf)
    return winn3d.climb(winn, critic, x, never, stop="shape", max_steps=steps)[0]


def _winn3d_start(profile: config.Profile, critic: nn.Module, seeds: list[int]) -> Tensor:
    return winn3d.start(profile.winn3d, critic.side, float(critic.mean), seeds)


def _each(seeds: list[int]) -> list[tuple[int]]:
    return [(seed,) for seed in seeds]


VIEWS = {
    "desnet3d": View(
        start=lambda profile, network, seeds: desnet3d.start(network, _each(seeds)),
        film=_one_chain(
            lambda profile, networks, seeds, steps: desnet3d.sample_chains(
                profile.desnet3d, networks["descriptor"], seeds, steps
            )
        ),
    ),
    "winn3d": View(start=_winn3d_start, film=_climbs),
    "beyond": View(
        start=lambda profile, network, seeds: beyond.start(profile.beyond, network, _each(seeds)),
        film=_one_chain(
            lambda profile, networks, seeds, steps: beyond.sample_chains(
                profile.beyond, networks["average"], seeds, steps
            )
        ),
    ),
}
