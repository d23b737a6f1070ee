"""From noise to shapes, one seed a shape: shape 17 is the same in whatever batch it is drawn."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from lib import rng
from lib.models.gan3d import Generator


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode (running statistics, no dropout) for the block, then the mode before."""
    mode = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(mode)


@torch.no_grad()
def sample_generator(
    generator: Generator, seeds: list[int], *, latent: str, batch: int = 64
) -> np.ndarray:
    """Occupancy probabilities (len(seeds), D, D, D), float32, of a latent generator.

    Runs in single precision and evaluation mode, with latents drawn per seed (``rng.latents``).
    """
    where = next(generator.parameters()).device
    out = []
    with evaluating(generator):
        for i in range(0, len(seeds), batch):
            z = rng.latents(seeds[i : i + batch], generator.z_dim, latent).to(where)
            out.append(generator.voxels(z)[:, 0].float().cpu().numpy())
    return np.concatenate(out)
