"""Features of shapes learned without labels, one function a paper, and the controls beside them.

A function takes a network and voxels x (B, 1, D, D, D) in [0, 1] and returns (B, F) in single
precision. ``FEATURES`` names the function and the network of every model.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool3d, adaptive_max_pool3d, max_pool3d, pad

from lib import config, data, voxel
from lib.models.desnet3d import Descriptor, same_padding
from lib.models.gan3d import Discriminator
from lib.models.winn3d import LAST, Critic, normalise_activate_pool
from lib.train import autoencoder, beyond, checkpoint, desnet3d, gan3d, runs, vae3d, winn3d

MARGIN = 3  # of the ModelNet layout
# Modules of all models with features; imported here, so that the pipeline sees their changes.
STARTS = {
    "gan3d": gan3d,
    "desnet3d": desnet3d,
    "winn3d": winn3d,
    "beyond": beyond,
    "vae3d": vae3d,
    "autoencoder": autoencoder,
}


def winn3d_features(critic: Critic, x: Tensor) -> Tensor:
    """The last convolution of 3DWINN, 2048 at 32^3 (Huang et al. 2019, text on Table 6)."""
    return critic.features(x)


def gan3d_features(discriminator: Discriminator, x: Tensor) -> Tensor:
    """All responses of 3D-GAN's discriminator but the first, pooled to 2^3 each (Wu et al. 2016).

    At 64^3 these are the second, third and fourth convolution under maxima of 8, 4 and 2 voxels,
    7168 features; at 32^3 4, 2 and 1, 3584 features with the channels of ``GAN32_DISCRIMINATOR``.
    Where a side is odd the windows overlap by a voxel.
    """
    responses = discriminator.responses(x)[1:]
    return torch.cat([adaptive_max_pool3d(r, 2).flatten(1) for r in responses], 1)


def desnet3d_features(descriptor: Descriptor, x: Tensor) -> Tensor:
    """Both convolutions of 3D DescriptorNet under maxima of 4 and 2 voxels, 8100 at 32^3.

    As in the released code of Xie et al. 2018: 200 3^3 and 100 3^3, TensorFlow's SAME padding.
    """
    pooled = []
    for response, size in zip(descriptor.responses(x), (4, 2), strict=True):
        margin = same_padding(response.shape[-1], size, size)
        pooled.append(max_pool3d(pad(response, margin * 3, value=-math.inf), size).flatten(1))
    return torch.cat(pooled, 1)


def code_features(encoder: nn.Module, x: Tensor) -> Tensor:
    """The code of an encoder, (B, z): for a variational one the mean of its posterior."""
    return encoder.codes(x)


def layer_features(critic: Critic, x: Tensor) -> Tensor:
    """Ours: every block of the critic but the first, wide maps as the means of 4^3 boxes."""
    x = critic.centred(x).contiguous(memory_format=LAST)
    found = []
    for i, (convolution, norm) in enumerate(zip(critic.convolutions, critic.norms, strict=True)):
        x = normalise_activate_pool(convolution(x), norm, critic.slope, pool=i > 0)
        if i > 0:
            found.append((adaptive_avg_pool3d(x, 4) if x.shape[-1] > 4 else x).flatten(1))
    return torch.cat(found, 1)


class Feature(NamedTuple):
    """The function of a model's features, and the stored network that it takes."""

    function: Callable[[nn.Module, Tensor], Tensor]
    network: str


def of_model(name: str, profile: config.Profile) -> Feature | None:
    """The features of a model's paper; None for a model without any."""
    return {
        "gan3d": Feature(gan3d_features, "discriminator"),
        "desnet3d": Feature(desnet3d_features, "descriptor"),
        "winn3d": Feature(winn3d_features, f"cascade_{profile.winn3d.cascades}"),
        "beyond": Feature(winn3d_features, "average"),
        "vae3d": Feature(code_features, "encoder"),
        "autoencoder": Feature(code_features, "encoder"),
    }.get(name)


def is_stored(run: runs.Run, feature: Feature) -> bool:
    """True where the network is published: of one category only those that sample are."""
    sampling = runs.model(run.model).sampling
    return run.category == "all" or not sampling or feature.network in sampling


def load_network(run: runs.Run, profile: config.Profile, name: str) -> nn.Module:
    """One network of a run with its stored weights. Raises StudyError when there are none."""
    path = runs.weights_folder(run, profile) / f"{name}.safetensors"
    return checkpoint.load_weights(path, runs.model(run.model).build(profile)[name])


def untrained(name: str, profile: config.Profile, split: data.Split) -> nn.Module:
    """The network of ``of_model`` before the first step of training on a split with seed 0."""
    task = STARTS[name].MODEL.task(profile, split, 0, torch.device("cpu"))
    return task.networks[of_model(name, profile).network]


@torch.no_grad()
def extract(
    function: Callable[[nn.Module, Tensor], Tensor],
    network: nn.Module,
    voxels: np.ndarray,
    side: int,
    *,
    batch: int = 16,
    progress=iter,
) -> np.ndarray:
    """Features (N, F) float32 of bool grids (N, 30, 30, 30); they do not depend on ``batch``.

    The network is in evaluation mode and in single precision. ``progress`` wraps the iteration
    over batches (pass ``tqdm``).
    """
    where = next(network.parameters()).device
    network = network.float().eval()
    found = []
    for i in progress(range(0, len(voxels), batch)):
        grids = data.model_grid(voxels[i : i + batch], side)
        x = torch.from_numpy(grids[:, None].astype(np.float32)).to(where)
        found.append(function(network, x).cpu().numpy())
    return np.concatenate(found)


def flat_voxels(voxels: np.ndarray) -> np.ndarray:
    """The control of no features: grids (N, 30, 30, 30) without their empty margin, (N, 24^3)."""
    return voxel.crop(voxels, MARGIN).reshape(len(voxels), -1).astype(np.float32)


def principal_components(train: np.ndarray, test: np.ndarray, n: int) -> tuple:
    """The control of linear features: the first n principal components of flat voxels (N, V).

    Fitted on the training split by the exact decomposition of its Gram matrix; at most rank many.
    """
    mean = train.mean(0)
    train, test = train - mean, test - mean
    values, vectors = np.linalg.eigh((train @ train.T).astype(np.float64))
    keep = np.argsort(-values)[:n]
    keep = keep[values[keep] > 1e-9 * values.max()]
    axes = (vectors[:, keep] / np.sqrt(values[keep])).astype(np.float32)
    axes = train.T @ axes  # (V, n), orthonormal
    return train @ axes, test @ axes
