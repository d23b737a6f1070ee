"""3D-GAN (Wu et al. 2016): a generator and a discriminator of strided 3-D convolutions.

One description covers every size: ``side = base * 2 ** len(channels)``.

==========  ====  ====================  =====================  =======================
network     base  generator channels    discriminator          source
==========  ====  ====================  =====================  =======================
``gan64``   4     512 256 128 64        64 128 256 512         the paper
``gan32``   2     256 256 128 64        32 64 128 256          compression report, 32^3
==========  ====  ====================  =====================  =======================

The convolutions carry no bias, as in the official release.
"""

import torch
from torch import Tensor, nn

GAN64 = dict(base=4, channels=(512, 256, 128, 64))
GAN64_DISCRIMINATOR = dict(base=4, channels=(64, 128, 256, 512))
GAN32 = dict(base=2, channels=(256, 256, 128, 64))
GAN32_DISCRIMINATOR = dict(base=2, channels=(32, 64, 128, 256))


def initialise(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw convolutions from N(0, std^2) and batch-norm scales from N(1, std^2), as ports do."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.normal_(layer.weight, 0.0, std, generator=generator)
        elif isinstance(layer, nn.BatchNorm3d):
            nn.init.normal_(layer.weight, 1.0, std, generator=generator)
            nn.init.zeros_(layer.bias)


class Generator(nn.Module):
    """Latent vectors to occupancy logits.

    Shapes: z (B, z_dim) -> (B, 1, D, D, D) with D = base * 2 ** len(channels). The sigmoid that
    ends the published network is applied by ``voxels``; training works on the logits.
    """

    def __init__(self, *, z_dim: int, base: int, channels: tuple[int, ...]):
        super().__init__()
        self.z_dim = z_dim
        self.side = base * 2 ** len(channels)
        layers = [nn.ConvTranspose3d(z_dim, channels[0], base, bias=False)]
        for c, c_next in zip(channels, [*channels[1:], 1], strict=True):
            layers += [nn.BatchNorm3d(c), nn.ReLU(inplace=True)]
            layers += [nn.ConvTranspose3d(c, c_next, 4, stride=2, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z[:, :, None, None, None])  # (B, 1, D, D, D)

    def voxels(self, z: Tensor) -> Tensor:
        """Occupancy probabilities in [0, 1], (B, 1, D, D, D)."""
        return torch.sigmoid(self(z))


class Discriminator(nn.Module):
    """Voxels to one logit: positive means real. Shapes: (B, 1, D, D, D) -> (B,).

    Batch normalisation follows every convolution but the first and the last; ``norm_first=True``
    is the other reading of the paper's sentence.
    """

    def __init__(self, *, base: int, channels: tuple[int, ...], norm_first: bool = False):
        super().__init__()
        self.side = base * 2 ** len(channels)
        blocks, c_last = [], 1
        for i, c in enumerate(channels):
            block = [nn.Conv3d(c_last, c, 4, stride=2, padding=1, bias=False)]
            block += [nn.BatchNorm3d(c)] if i > 0 or norm_first else []
            blocks.append(nn.Sequential(*block, nn.LeakyReLU(0.2, inplace=True)))
            c_last = c
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv3d(c_last, 1, base, bias=False)

    def responses(self, x: Tensor) -> list[Tensor]:
        """The activations after each block, coarse last: the features of the paper's SVM."""
        out = []
        for block in self.blocks:
            x = block(x)
            out.append(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.responses(x)[-1]).flatten()  # (B,)
