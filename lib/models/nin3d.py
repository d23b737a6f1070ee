"""The judge's network, ``3dnin_fc`` of Qi et al. 2016 (charlesq34/3dcnn.torch)."""

import torch
from torch import Tensor, nn

from lib.errors import StudyError

# (channels, kernel) of the first convolution of each block, all of stride 2 without padding;
# two 1x1x1 convolutions of the same width follow in every block.
BLOCKS = ((48, 6), (96, 5), (512, 3))
SIDE = 30


def _smallest_side(blocks: tuple[tuple[int, int], ...]) -> int:
    side = 1
    for _, kernel in reversed(blocks):
        side = (side - 1) * 2 + kernel
    return side


class Nin3d(nn.Module):
    """Voxels to class logits, with the 4096 features of the last convolution on the way.

    Shapes: x (B, 1, D, D, D) in {0, 1} -> logits (B, n_classes). At the published side of 30 the
    maps are 13, 5 and 2 wide and the features 512 * 2^3 = 4096; the narrowest input is 22. Every
    convolution is followed by batch normalisation and ReLU, every block by dropout .2, and the
    hidden linear layer by dropout .5.
    """

    def __init__(
        self,
        *,
        n_classes: int,
        side: int = SIDE,
        widths: tuple[int, int, int] = (48, 96, 512),
        hidden: int = 512,
    ):
        super().__init__()
        blocks = tuple((w, kernel) for w, (_, kernel) in zip(widths, BLOCKS, strict=True))
        if side < _smallest_side(blocks):
            raise StudyError(
                f"3dnin_fc: grids of side {side} are too small; use {_smallest_side(blocks)} up"
            )
        layers, c_last, d = [], 1, side
        for c, kernel in blocks:
            layers += [*_convolution(c_last, c, kernel, stride=2)]
            layers += [*_convolution(c, c, 1), *_convolution(c, c, 1), nn.Dropout(0.2)]
            c_last, d = c, (d - kernel) // 2 + 1
        self.side = side
        self.n_features = c_last * d**3
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(self.n_features, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, n_classes),
        )

    def features(self, x: Tensor) -> Tensor:
        """Activations of the last convolution after normalisation and ReLU, (B, n_features)."""
        return self.convolutions(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # (B, n_classes)


def _convolution(c_in: int, c_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv3d(c_in, c_out, kernel, stride=stride),
        nn.BatchNorm3d(c_out),
        nn.ReLU(inplace=True),
    ]


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """MSRA initialisation of the convolutions over the fan out, as in the published script.

    Linear layers draw from U(-1/sqrt(n_in), 1/sqrt(n_in)): MSRA over their fan out would start
    with logits of size 20, from which 30 epochs do not recover (validation error 20 % against 11).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", generator=generator)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.zeros_(layer.bias)
