"""3D DescriptorNet (Xie et al. 2018): a density of shapes, p(Y) = exp f(Y) N(Y; 0, s^2) / Z.

Y are voxels less the mean voxel of the training shapes. At 32^3, as in the released code:

=====  ==========  ===============  ============  ============
layer  channels    kernel / stride  side after    activation
=====  ==========  ===============  ============  ============
1      1 -> 200    16 / 3           11            ReLU
2      200 -> 100  6 / 2            6             ReLU
3      100 -> 1    all of it        1             none
=====  ==========  ===============  ============  ============

5,161,101 parameters, no normalisation. The padding is TensorFlow's SAME, which is not symmetric:
the second layer pads 2 before and 3 after.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d, pad, relu

RELEASED = dict(channels=(200, 100), kernels=(16, 6), strides=(3, 2))


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis in TensorFlow's SAME: the output has ceil(side / stride)."""
    total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


class Descriptor(nn.Module):
    """Voxels (B, 1, D, D, D) to f(Y) (B,) with Y = x - mean; s is the reference's deviation.

    blocked: compute the same convolutions as ``blocked_convolution``, which bfloat16 wants.
    """

    def __init__(
        self,
        *,
        side: int,
        s: float,
        channels: tuple[int, ...] = RELEASED["channels"],
        kernels: tuple[int, ...] = RELEASED["kernels"],
        strides: tuple[int, ...] = RELEASED["strides"],
        blocked: bool = False,
    ):
        super().__init__()
        self.blocked = blocked
        self.side, self.s = side, s
        self.register_buffer("mean", torch.zeros(()))
        self.convolutions, self.paddings = nn.ModuleList(), []
        sizes = zip((1, *channels[:-1]), channels, kernels, strides, strict=True)
        for c_in, c, kernel, stride in sizes:
            self.convolutions.append(nn.Conv3d(c_in, c, kernel, stride))
            self.paddings.append(same_padding(side, kernel, stride))
            side = math.ceil(side / stride)
        self.head = nn.Conv3d(channels[-1], 1, side)

    def responses(self, x: Tensor) -> list[Tensor]:
        """Activations of every convolution but the last (its classifier's features)."""
        out, y = [], x - self.mean
        for convolution, (before, after) in zip(self.convolutions, self.paddings, strict=True):
            y = pad(y, (before, after) * 3)
            y = relu(blocked_convolution(y, convolution) if self.blocked else convolution(y))
            out.append(y)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.responses(x)[-1]).flatten()

    def energy(self, x: Tensor) -> Tensor:
        """E(Y) = |Y|^2 / (2 s^2) - f(Y), (B,): f enters with a minus sign (Eq. 1)."""
        y = (x - self.mean).flatten(1)
        return y.square().sum(1) / (2 * self.s**2) - self(x)


def blocked_convolution(x: Tensor, convolution: nn.Conv3d) -> Tensor:
    """A strided convolution as one of stride 1 on blocks of stride^3 voxels: the same sums.

    Large kernels of stride 3 and 2 are slow in bfloat16 on CPUs; many channels at stride 1 are
    fast, though the kernel is padded to whole blocks (18 for 16 at stride 3).
    """
    stride, kernel = convolution.stride[0], convolution.kernel_size[0]
    weight = pad(convolution.weight, (0, -kernel % stride) * 3)
    side = ((x.shape[-1] - kernel) // stride + 1) * stride + weight.shape[-1] - stride
    x = pad(x, (0, side - x.shape[-1]) * 3)
    return conv3d(_blocks(x, stride), _blocks(weight, stride), convolution.bias)


def _blocks(x: Tensor, size: int) -> Tensor:
    """(B, C, D, H, W) to (B, size^3 C, D / size, ...): the voxels of a block become channels."""
    b, c, d, h, w = x.shape
    x = x.reshape(b, c, d // size, size, h // size, size, w // size, size)
    return x.permute(0, 3, 5, 7, 1, 2, 4, 6).reshape(b, -1, d // size, h // size, w // size)


def initialise(descriptor: Descriptor, std: float, generator: torch.Generator) -> None:
    """Draw weights from N(0, std^2), biases 0, as the released code does."""
    for layer in [*descriptor.convolutions, descriptor.head]:
        nn.init.normal_(layer.weight, 0.0, std, generator=generator)
        nn.init.zeros_(layer.bias)
