"""From noise to shapes, one seed a shape: shape 17 is the same in whatever batch it is drawn.

Energy-based samplers work on voxels in [0, 1], as the networks do; a step in the papers' space,
voxels less their mean, is the same step. Starts are drawn on the CPU on every machine.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib import rng
from lib.models.gan3d import Generator

TINY = 1e-20  # keeps 0 / 0 from being a step
Function = Callable[[Tensor], Tensor]  # voxels (B, 1, D, D, D) -> (B,)


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode (running statistics, no dropout) for the block, then the mode before."""
    mode = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(mode)


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Parameters without gradients for the block: sampling differentiates by the input alone."""
    wanted = [p.requires_grad for p in network.parameters()]
    network.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, want in zip(network.parameters(), wanted, strict=True):
            parameter.requires_grad_(want)


def in_batches(
    draw: Callable[[list[int]], np.ndarray], seeds: list[int], batch: int = 32
) -> np.ndarray:
    """What ``draw`` gives for all seeds, a few at a time; only memory depends on ``batch``.

    A terminal sees how far it is, once that takes longer than two seconds.
    """
    parts = range(0, len(seeds), batch)
    shown = dict(desc="shapes", unit="batch", delay=2, leave=False, disable=None)
    return np.concatenate([draw(seeds[i : i + batch]) for i in tqdm(parts, **shown)])


@torch.no_grad()
def sample_generator(
    generator: Generator, seeds: list[int], *, latent: str, batch: int = 64
) -> np.ndarray:
    """Occupancy probabilities (len(seeds), D, D, D), float32, of a latent generator.

    Runs in single precision and evaluation mode, with latents drawn per seed (``rng.latents``).
    """
    where = next(generator.parameters()).device

    def draw(chunk: list[int]) -> np.ndarray:
        z = rng.latents(chunk, generator.z_dim, latent).to(where)
        return generator.voxels(z)[:, 0].float().cpu().numpy()

    with evaluating(generator):
        return in_batches(draw, seeds, batch)


def reparameterise(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """A code of N(mean, exp(logvar)) from N(0, 1) noise, all (B, z_dim) (Kingma and Welling)."""
    return mean + (logvar / 2).exp() * noise


def gaussian_noise(side: int, generator: torch.Generator) -> Tensor:
    """N(0, I), (1, D, D, D): where 3DWINN and DescriptorNet start, around the mean voxel."""
    return torch.randn(1, side, side, side, generator=generator)


class SeededNoise:
    """N(0, I) for shapes (n, 1, D, D, D), each from a stream of its own, draw after draw.

    keys: one name a shape (``rng.torch_generator``), so that a shape's noise does not depend on
    its batch. Called with rows (indices of shapes) it draws for these alone.
    """

    def __init__(self, keys: list[tuple], side: int, where: torch.device):
        self.streams, self.side, self.where = [rng.torch_generator(*k) for k in keys], side, where

    def __call__(self, rows: Tensor | None = None) -> Tensor:
        chosen = range(len(self.streams)) if rows is None else rows.tolist()
        drawn = [gaussian_noise(self.side, self.streams[r]) for r in chosen]
        return torch.stack(drawn).to(self.where)


def network_noise(side: int, generator: torch.Generator) -> Tensor:
    """An image of a random network, (1, D, D, D) in [0, 1]: WINN's start, in three dimensions.

    U(-1, 1) on a grid of an eighth of the side goes through three 5^3 convolutions of N(0, .1^2)
    with doubling between. 3DWINN's authors find that it may not serve as well as in 2D.
    """
    x = torch.rand(1, 64, *(side // 8,) * 3, generator=generator) * 2 - 1
    for c_in, c in ((64, 32), (32, 16), (16, 1)):
        weight = torch.randn(c, c_in, 5, 5, 5, generator=generator) * 0.1
        x = nn.functional.interpolate(x, scale_factor=2.0)
        x = nn.functional.conv3d(x, weight, padding=2)
        x = nn.functional.group_norm(x, 1).relu() if c > 1 else x
    return ((x - x.min()) / (x.max() - x.min()))[0]


def input_gradient(f: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) (B,) and its gradient by x, like x; by the sum, so no shape's step knows its batch."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        values = f(x)
        (gradient,) = torch.autograd.grad(values.sum(), x)
    return values.detach().float(), gradient.to(x.dtype)


def langevin(
    energy: Function,
    x: Tensor,
    *,
    delta: float,
    steps: int,
    noise: Callable[[], Tensor] | None = None,
    box: tuple[float, float] | None = None,
) -> Tensor:
    """Langevin dynamics (DescriptorNet, Eq. 3): x <- x - delta^2/2 dE/dx + delta N(0, I).

    energy: E of voxels. noise: draws N(0, I) like x; none leaves gradient descent, as the released
    code does late in training. box: clip after every step; the released code does not.
    """
    for _ in range(steps):
        _, gradient = input_gradient(energy, x)
        x = x.sub(gradient, alpha=delta**2 / 2)
        if noise is not None:
            x.add_(noise(), alpha=delta)
        if box is not None:
            x.clamp_(*box)
    return x


def adam_ascent(
    f: Function,
    x: Tensor,
    thresholds: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float = 1e-8,
    max_steps: int,
    stop: str = "batch",
    box: tuple[float, float] | None = (0.0, 1.0),
    noise: Callable[[Tensor], Tensor] | None = None,
    sigma: float = 0.0,
    mean: Callable[[Tensor], Tensor] = torch.mean,
) -> tuple[Tensor, Tensor]:
    """WINN's synthesis: Adam climbs the critic from x until it is as sure as of real shapes.

    thresholds (B,): ``stop="batch"`` ends all shapes when the mean of f reaches the mean threshold
    (WINN); ``stop="shape"`` ends each at its own, so a shape does not depend on its batch;
    ``stop="never"`` climbs for ``max_steps``.
    sigma: deviation of Langevin noise, annealed in a line from the start to 0 at ``max_steps``;
    ``noise`` gives N(0, I) for the rows (indices into x) that still move. ``mean``: of values over
    the whole batch, where x is one process's share of it.
    Returns the shapes, clipped to ``box`` after every step, and the steps each took (B,).
    """
    out, taken = x.clone(), torch.zeros(len(x), dtype=torch.long)
    rows = torch.arange(len(x))
    y, m, v = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    for t in range(1, max_steps + 1):
        values, gradient = input_gradient(f, y)
        if stop != "never":  # else no step waits for the device's answer
            moving = _below(values.cpu(), thresholds[rows].cpu(), stop, mean)
            if not moving.all():
                out[rows[~moving]] = y[(~moving).to(y.device)]
                kept = moving.to(y.device)
                rows, y, m, v, gradient = rows[moving], y[kept], m[kept], v[kept], gradient[kept]
            if len(rows) == 0:
                break
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = v.div(1 - beta2**t).sqrt_().add_(epsilon)
        y.addcdiv_(m, scale, value=lr / (1 - beta1**t))
        if sigma > 0:
            y.add_(noise(rows), alpha=sigma * (1 - t / max_steps))
        if box is not None:
            y.clamp_(*box)
        taken[rows] = t
    out[rows] = y
    return out, taken


def _below(values: Tensor, thresholds: Tensor, stop: str, mean: Callable) -> Tensor:
    """Which shapes (B,) go on."""
    if stop == "shape":
        return values < thresholds
    return torch.full((len(values),), bool(mean(values) < mean(thresholds)))


def preconditioned_langevin(
    energy: Function,
    x: Tensor,
    *,
    lr: float,
    momentum: float,
    floor: float,
    sigma: float,
    steps: int,
    noise: Callable[[], Tensor],
    box: tuple[float, float],
) -> Tensor:
    """Sign-like descent with noise: x <- clip(x - lr m / max(|g|, floor |m|) + sigma N(0, I)).

    g = dE/dx of each voxel, m its running mean. It is 3DWINN's printed Adam with beta2 = 0, whose
    quotient m / |g| has no bound; ``floor`` bounds it by 1 / floor. Not a published method.
    """
    m = torch.zeros_like(x)
    for _ in range(steps):
        _, gradient = input_gradient(energy, x)
        m.lerp_(gradient, 1 - momentum)
        scale = torch.maximum(gradient.abs(), m.abs().mul_(floor)).clamp_(min=TINY)
        x = x.addcdiv(m, scale, value=-lr).add_(noise(), alpha=sigma).clamp_(*box)
    return x
