"""VoxNet (Maturana and Scherer 2015, dimatura/voxnet) and ORION (Sedaghat et al. 2016).

VoxNet at 32^3, input 2x - 1, no padding:

==========  ===================  ==========================================
layer       channels, side       then
==========  ===================  ==========================================
conv 5^3    32, 14, stride 2     leaky ReLU .1, dropout .2
conv 3^3    32, 12               leaky ReLU .1, max pool 2 to 6, dropout .3
linear      6912 -> 128          ReLU, dropout .4
linear      128 -> n_classes
==========  ===================  ==========================================

917,866 parameters with ten classes.
"""

import torch
from torch import Tensor, nn

# Quarter turns that can be told apart, by category in alphabetical order. ORION has 12 bins of
# 30 degrees, 6 for bathtubs and 3 for tables; these are the same symmetries at 90 degrees.
QUARTERS = (2, 4, 4, 4, 4, 4, 4, 4, 1, 4)


class VoxNet(nn.Module):
    """Voxels (B, 1, D, D, D) in [0, 1] to class logits (B, n_classes).

    norm: batch normalisation after both convolutions, as ORION has it.
    """

    def __init__(
        self,
        *,
        side: int,
        n_classes: int = 10,
        channels: int = 32,
        hidden: int = 128,
        norm: bool = False,
    ):
        super().__init__()
        self.side = side
        reduced = ((side - 5) // 2 + 1 - 2) // 2
        self.convolutions = nn.Sequential(
            nn.Conv3d(1, channels, 5, stride=2),
            nn.BatchNorm3d(channels) if norm else nn.Identity(),
            nn.LeakyReLU(0.1),
            nn.Dropout(0.2),
            nn.Conv3d(channels, channels, 3),
            nn.BatchNorm3d(channels) if norm else nn.Identity(),
            nn.LeakyReLU(0.1),
            nn.MaxPool3d(2),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(channels * reduced**3, hidden),
            nn.ReLU(),
            nn.Dropout(0.4),
        )
        self.head = nn.Linear(hidden, n_classes)

    def features(self, x: Tensor) -> Tensor:
        """Activations of the hidden layer, (B, hidden)."""
        return self.convolutions(2 * x - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Orion(VoxNet):
    """VoxNet with batch normalisation and a second head that names the pose.

    The pose of category k turned by q quarters is class ``QUARTERS[:k].sum() + q % QUARTERS[k]`` of
    35. 922,509 parameters at 32^3.
    """

    def __init__(self, *, side: int, n_classes: int = 10, channels: int = 32, hidden: int = 128):
        super().__init__(
            side=side, n_classes=n_classes, channels=channels, hidden=hidden, norm=True
        )
        self.pose_head = nn.Linear(hidden, sum(QUARTERS))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the categories (B, n_classes) and of the poses (B, 35)."""
        features = self.features(x)
        return self.head(features), self.pose_head(features)


def poses(labels: Tensor, quarters: Tensor) -> Tensor:
    """Pose classes (B,) of categories (B,) turned by quarters (B,)."""
    bins = torch.tensor(QUARTERS, device=labels.device)
    return (bins.cumsum(0) - bins)[labels] + quarters % bins[labels]


def initialise(network: VoxNet, generator: torch.Generator) -> None:
    """He initialisation of the convolutions, N(0, .01^2) of the linear layers, biases 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, a=0.1, generator=generator)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, 0.01, generator=generator)
            nn.init.zeros_(layer.bias)
