"""Losses of the models, as functions of what the networks return."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from lib import device


def discriminator_loss(real: Tensor, fake: Tensor, label_real: float = 1.0) -> Tensor:
    """-log D(x) - log(1 - D(G(z))) of logits (B,), means over the batch (Wu et al. 2016, Eq. 1).

    ``label_real`` below 1 smooths the real side only. Targets above 1 would leave the loss without
    a lower bound, so they are not offered.
    """
    target = real.new_full(real.shape, label_real)
    return binary_cross_entropy_with_logits(real, target) + softplus(fake).mean()


def generator_loss(fake: Tensor, saturating: bool = False) -> Tensor:
    """-log D(G(z)) of logits (B,); ``saturating`` gives the printed log(1 - D(G(z)))."""
    return -softplus(fake).mean() if saturating else softplus(-fake).mean()


def discriminator_accuracy(real: Tensor, fake: Tensor) -> float:
    """Share of logits on the right side, real and generated counting half each."""
    return (0.5 * (real > 0).float().mean() + 0.5 * (fake <= 0).float().mean()).item()


def wasserstein_loss(negatives: Tensor, positives: Tensor) -> Tensor:
    """mean f(S-) - mean f(S+) of critic values (B,), which the critic lowers.

    Eq. 3 of 3DWINN sums both terms over S+, where they cancel; the negatives' sum is meant (WINN).
    """
    return negatives.mean() - positives.mean()


def gradient_penalty(f: Callable, positives: Tensor, negatives: Tensor, u: Tensor) -> Tensor:
    """Mean of (|df/dx| - 1)^2 at x = u x+ + (1 - u) x-, with u (B,) in [0, 1].

    The norm is over all voxels of a shape (Gulrajani et al. 2017); the result can be
    differentiated by the critic's parameters.
    """
    u = u.view(-1, 1, 1, 1, 1)
    x = torch.lerp(negatives, positives, u).requires_grad_()
    with device.differentiated_twice(x.device):
        (gradient,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return (gradient.float().flatten(1).norm(dim=1) - 1).square().mean()


def voxel_cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    """-log p(x | z) in nats a shape: binary cross-entropy summed over voxels, mean over the batch.

    logits, x: (B, 1, D, D, D), x in [0, 1]; the decoder's voxels are independent Bernoullis.
    """
    return binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def gaussian_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of every dimension in nats, all (B, z_dim).

    Kingma and Welling 2014, appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def active_units(means: Tensor) -> int:
    """Dimensions of codes whose posterior means (N, z_dim) have a variance above .01 over shapes.

    The others say nothing of the shape (Burda et al. 2016, section 5.2).
    """
    return int((means.var(0, correction=0) > 0.01).sum())
