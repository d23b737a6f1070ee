"""Random streams named by their use, so that a step needs no stored state to be repeated."""

import hashlib

import numpy as np
import torch
from torch import Tensor


def seed_of(*key: str | int) -> int:
    """A 63-bit seed from a name such as ``(0, "gan3d", "chair", "latents", 17)``."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_generator(*key: str | int) -> torch.Generator:
    """A CPU generator for the named stream; noise is drawn on the CPU on every machine."""
    return torch.Generator().manual_seed(seed_of(*key))


def numpy_generator(*key: str | int) -> np.random.Generator:
    """A numpy generator for the named stream."""
    return np.random.default_rng(seed_of(*key))


def latents(seeds: list[int], z_dim: int, distribution: str) -> Tensor:
    """Latent vectors (len(seeds), z_dim), one seed a shape, whatever the batch.

    ``distribution`` is ``uniform`` for U[0, 1] (3D-GAN) or ``normal`` for N(0, 1).
    """
    draw = {"uniform": torch.rand, "normal": torch.randn}[distribution]
    return torch.stack([draw(z_dim, generator=torch_generator("latent", s)) for s in seeds])


def batch_indices(step: int, batch: int, n: int, *key: str | int) -> np.ndarray:
    """Indices (batch,) of a step: epochs of random permutations, cut into batches end to end."""
    first = step * batch
    epochs = range(first // n, (first + batch - 1) // n + 1)
    order = np.concatenate([numpy_generator(*key, "epoch", e).permutation(n) for e in epochs])
    start = first - epochs[0] * n
    return order[start : start + batch]
