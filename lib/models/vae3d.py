"""Networks of 3D-VAE and of the volumetric autoencoder.

The decoder of both is the generator of 3D-GAN with a bias a voxel, and the encoder mirrors it:
3D-GAN's discriminator with a wider head. No paper states a 3D-VAE's layers; 3DWINN cites Kingma and
Welling 2014 alone.
"""

import torch
from torch import Tensor, nn

from lib.models.gan3d import Discriminator, Generator

LOGVAR = 10.0  # bound of |logvar|: standard deviations from .0067 to 148


class Decoder(Generator):
    """Codes to occupancy logits: z (B, z_dim) -> (B, 1, D, D, D).

    The bias a voxel starts as the log-odds of the training shapes' mean, so that training need not
    find out first that most of a grid is empty.
    """

    def __init__(self, *, z_dim: int, base: int, channels: tuple[int, ...]):
        super().__init__(z_dim=z_dim, base=base, channels=channels)
        self.bias = nn.Parameter(torch.zeros(1, 1, self.side, self.side, self.side))

    @torch.no_grad()
    def start_from(self, grids: Tensor) -> None:
        """Set the bias to the log-odds of {0, 1} grids (N, D, D, D), half a count added to each."""
        filled = grids.sum(0, dtype=torch.float32)
        self.bias.copy_(((filled + 0.5) / (len(grids) - filled + 0.5)).log())

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) + self.bias  # (B, 1, D, D, D)


class Encoder(Discriminator):
    """Voxels to codes: (B, 1, D, D, D) in [0, 1] -> (B, z_dim), D = base * 2 ** len(channels).

    A ``variational`` encoder also gives the logarithm of the code's variance.
    """

    def __init__(self, *, z_dim: int, base: int, channels: tuple[int, ...], variational: bool):
        super().__init__(base=base, channels=channels)
        self.z_dim, self.variational = z_dim, variational
        width = 2 * z_dim if variational else z_dim
        self.head = nn.Conv3d(channels[-1], width, base, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance (B, z_dim) of q(z | x), in single precision; None without one."""
        h = self.head(self.responses(x)[-1]).flatten(1).float()  # (B, width)
        if not self.variational:
            return h, None
        mean, logvar = h.chunk(2, dim=1)
        return mean, logvar.clamp(-LOGVAR, LOGVAR)

    def codes(self, x: Tensor) -> Tensor:
        """The code of each shape, (B, z_dim): the mean of q(z | x)."""
        return self(x)[0]


class CodeGaussian(nn.Module):
    """A Gaussian with full covariance over codes, from which the autoencoder samples.

    It holds the mean and the symmetric square root of the covariance: that is unique, exists where
    there are fewer shapes than dimensions, and stays a root of a covariance when it is rounded.
    """

    def __init__(self, *, z_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(z_dim))
        self.register_buffer("root", torch.eye(z_dim))

    def fit(self, codes: Tensor) -> None:
        """Take up mean and maximum-likelihood covariance of codes (N, z_dim), N >= 1."""
        codes = codes.double()
        centred = codes - codes.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(codes))
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        self.mean.copy_(codes.mean(0))
        self.root.copy_(root)

    def forward(self, noise: Tensor) -> Tensor:
        """N(0, I) noise (B, z_dim) as codes (B, z_dim)."""
        return self.mean + noise @ self.root
