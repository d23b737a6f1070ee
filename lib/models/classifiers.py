"""Classifiers of table 5 of 3DWINN (Huang et al. 2019): its network with ten outputs, and views.

The network is Table 1 of the paper with a last layer 2048 -> 10: 1,196,458 parameters and 992 of
the norms. With a linear critic on the logits, as in WINN's code, there are 11 more.
"""

import torch
from torch import Tensor, nn

from lib.models import winn3d


class Winn3dClassifier(winn3d.Critic):
    """Voxels (B, 1, D, D, D) in [0, 1] to class logits (B, n_classes), and a critic on them.

    value: how the critic's f is read off the logits, ``linear`` (10 -> 1, WINN's code) or
    ``logsumexp``, which has no parameters. dropout: on the 2048 features. Other arguments as
    ``winn3d.Critic``; the mean voxel of the training shapes is subtracted inside.
    """

    def __init__(
        self,
        *,
        side: int,
        n_classes: int = 10,
        channels: tuple[int, ...] = winn3d.TABLE_1,
        slope: float = 0.2,
        norm_first: bool = True,
        dropout: float = 0.0,
        value: str = "logsumexp",
    ):
        super().__init__(side=side, channels=channels, slope=slope, norm_first=norm_first)
        self.head = nn.Linear(self.head.in_features, n_classes)
        self.dropout = nn.Dropout(dropout)
        self.value = nn.Linear(n_classes, 1) if value == "linear" else None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x)))  # (B, n_classes)

    def value_of(self, logits: Tensor) -> Tensor:
        """The critic's value f (B,) of logits (B, n_classes): higher is more likely."""
        logits = logits.float()
        if self.value is None:
            return logits.logsumexp(1)
        # Product and sum, not a linear layer: autocast would round f to eight bits.
        return (logits * self.value.weight[0]).sum(1) + self.value.bias

    def critic(self, x: Tensor) -> Tensor:
        """f (B,) of voxels."""
        return self.value_of(self(x))

    def energy(self, x: Tensor) -> Tensor:
        """Energy (B,), lower is more likely: the critic's value enters with a minus sign."""
        return -self.critic(x)


def initialise(network: Winn3dClassifier, std: float, generator: torch.Generator) -> None:
    """Draw all weights from N(0, std^2), biases 0 (WINN's code; not stated by 3DWINN)."""
    winn3d.initialise(network, std, generator)
    if network.value is not None:
        nn.init.normal_(network.value.weight, 0.0, std, generator=generator)
        nn.init.zeros_(network.value.bias)


def mirrored(x: Tensor) -> Tensor:
    """Shapes (B, 1, D, D, D) mirrored along x or y, whichever image overlaps the shape more.

    Furniture is nearly symmetric between left and right, and categories of ModelNet10 face either
    axis; so the image stands as the shape does, and no label is needed to find it.
    """
    along_x, along_y = x.flip(2), x.flip(3)
    overlap = [(x * image).flatten(1).sum(1) for image in (along_x, along_y)]
    return torch.where((overlap[0] >= overlap[1]).view(-1, 1, 1, 1, 1), along_x, along_y)


class Views(nn.Module):
    """A classifier asked about several views of every shape: logits (B, n_classes), their mean.

    votes: 1, or 4 for all quarter turns about z, which are exact on the grid. mirror: every view's
    mirror image too. VoxNet and ORION sum over turns; the mean gives the same answers and keeps the
    scale of the logits. ``side`` is that of the grids (B, 1, side, side, side) in [0, 1].
    """

    def __init__(self, network: nn.Module, votes: int = 1, mirror: bool = False):
        super().__init__()
        self.network, self.votes, self.mirror = network, votes, mirror
        self.side = network.side

    def forward(self, x: Tensor) -> Tensor:
        images = [x, mirrored(x)] if self.mirror else [x]
        turned = [torch.rot90(image, k, (2, 3)) for image in images for k in range(self.votes)]
        return torch.stack([self.network(view) for view in turned]).mean(0)
