"""Ours: the Baseline with a tuned rate, the regularisers of today, and shapes out of proportion.

The comparison of 3DWINN with an under-trained Baseline would say little.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lib import rng
from lib.train.classifiers import ClassifierTask, table1_model


def squeezed(x: Tensor, scales: Tensor) -> Tensor:
    """Binary shapes (B, 1, D, D, D), their axes shrunk about the grid's middle by scales (B, 3).

    Scales lie in (0, 1]. A voxel is filled where one that lands in it is, so thin walls stay whole
    and none leaves the grid.
    """
    side = x.shape[-1]
    middle = (side - 1) / 2
    lands = middle + scales[..., None] * (torch.arange(side, device=x.device) - middle)
    moves = one_hot(lands.round().long(), side).to(x.dtype)  # (B, 3, D from, D to)
    found = torch.einsum("bcxyz,bxi,byj,bzk->bcijk", x, *moves.unbind(1))
    return found.clamp(max=1)


class TunedTask(ClassifierTask):
    """Cross-entropy on shapes whose axes are shrunk each by U[1 - squeeze, 1]."""

    def loss(self, x: Tensor, y: Tensor, quarters: Tensor, step: int) -> tuple[Tensor, Tensor]:
        draw = rng.torch_generator(self.seed, self.name, "squeeze", step)
        scales = 1 - self.settings.squeeze * torch.rand(len(x), 3, generator=draw)
        x = squeezed(x, scales.to(x.device)).contiguous(memory_format=self.layout)
        return super().loss(x, y, quarters, step)


MODEL = table1_model("tuned", lambda profile: profile.tuned, TunedTask)
