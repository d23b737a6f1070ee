"""3D-VAE-GAN (Wu et al. 2016): an image encoder before the generator of 3D-GAN.

The encoder's printed layers have channels 64 128 256 512 400, kernels 11 5 5 5 8 and strides
4 2 2 2 1. Paddings of 5, 2, 2, 2, 0 bring 256 pixels to 64, 32, 16, 8 and 1. Smaller images end in
a smaller last kernel.
"""

import torch
from torch import Tensor, nn

KERNELS, STRIDES, PADDINGS = (11, 5, 5, 5), (4, 2, 2, 2), (5, 2, 2, 2)
CHANNELS = (64, 128, 256, 512)
SHRINK = 32  # from the image to the last kernel
LOG_VARIANCE = 10.0  # the log-variance stays within this of 0


class Encoder(nn.Module):
    """Images to Gaussians over codes. Shapes: y (B, 3, side, side) in [0, 1] -> two (B, z_dim).

    Returns mean and log-variance, the latter within ``LOG_VARIANCE`` of 0. Batch normalisation
    and ReLU stand between the convolutions, of which only the last has a bias.
    """

    def __init__(self, *, z_dim: int, side: int = 256, channels: tuple[int, ...] = CHANNELS):
        super().__init__()
        assert side % SHRINK == 0, f"side {side} is no multiple of {SHRINK}"
        assert len(channels) == len(KERNELS), "the encoder has four strided convolutions"
        layers, c_last = [], 3
        for c, k, s, p in zip(channels, KERNELS, STRIDES, PADDINGS, strict=True):
            layers += [nn.Conv2d(c_last, c, k, stride=s, padding=p, bias=False)]
            layers += [nn.BatchNorm2d(c), nn.ReLU(inplace=True)]
            c_last = c
        layers += [nn.Conv2d(c_last, 2 * z_dim, side // SHRINK)]
        self.layers = nn.Sequential(*layers)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.layers(2 * y - 1)[:, :, 0, 0].chunk(2, 1)  # (B, z_dim) each
        return mean, log_variance.clamp(-LOG_VARIANCE, LOG_VARIANCE)


def initialise(encoder: Encoder, std: float, generator: torch.Generator) -> None:
    """Convolutions from N(0, std^2) and batch-norm scales from N(1, std^2), as the other networks.

    The last bias starts at 0.
    """
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0.0, std, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, std, generator=generator)
            nn.init.zeros_(layer.bias)


def reconstruction_error(logits: Tensor, x: Tensor, form: str) -> Tensor:
    """How far G(E(y)) is from the shape x, one number a shape (B,), from occupancy logits.

    form: ``sse`` the sum of squares over voxels, ``mse`` their mean, ``l2norm`` the root of the
    sum, ``bce_sum`` the cross-entropy in nats. The papers print the norm.
    """
    if form == "bce_sum":
        loss = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
        return loss.flatten(1).sum(1)
    squares = (torch.sigmoid(logits) - x).square().flatten(1)
    if form == "mse":
        return squares.mean(1)
    total = squares.sum(1)
    # The root's slope has no bound at 0.
    return total if form == "sse" else (total + 1e-12).sqrt()
