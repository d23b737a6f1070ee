"""Losses of the models, as functions of what the networks return."""

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus


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
