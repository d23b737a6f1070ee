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
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d, pad, relu

from lib.models import fourier, winograd

Layers = list[Callable[[Tensor], Tensor]]

RELEASED = dict(channels=(200, 100), kernels=(16, 6), strides=(3, 2))


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis in TensorFlow's SAME: the output has ceil(side / stride)."""
    total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


class SameConvolution(nn.Conv3d):
    """A convolution of grids of one side, (B, C, D, D, D), with TensorFlow's SAME padding."""

    def __init__(self, c_in: int, c: int, kernel: int, stride: int, *, side: int):
        super().__init__(c_in, c, kernel, stride)
        self.same = same_padding(side, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x, self.same * 3))


class Descriptor(nn.Module):
    """Voxels (B, 1, D, D, D) to f(Y) (B,) with Y = x - mean; s is the reference's deviation.

    sample_steps: how many Langevin steps draw a sample; chosen when training ends.
    blocked: compute the same convolutions as ``BlockedConvolution``, which bfloat16 wants.
    ``layers`` of the methods are ``self.layers()``; chains give them, so that weights which stay
    as they are for many steps are laid out once.
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
        self.register_buffer("sample_steps", torch.zeros((), dtype=torch.long))
        self.convolutions = nn.ModuleList()
        sizes = zip((1, *channels[:-1]), channels, kernels, strides, strict=True)
        for c_in, c, kernel, stride in sizes:
            self.convolutions.append(SameConvolution(c_in, c, kernel, stride, side=side))
            side = math.ceil(side / stride)
        self.head = nn.Conv3d(channels[-1], 1, side)

    def layers(self, dtype: torch.dtype | None = None, *, transformed: bool = False) -> Layers:
        """The convolutions but the last with the weights they have now, in ``dtype`` if given.

        transformed: blocked ones as ``TransformedConvolution``.
        """
        if not self.blocked:
            return list(self.convolutions)
        kind = TransformedConvolution if transformed else BlockedConvolution
        return [kind(convolution, dtype) for convolution in self.convolutions]

    def responses(self, x: Tensor, layers: Layers | None = None) -> list[Tensor]:
        """Activations of every convolution but the last (its classifier's features)."""
        out, y = [], x - self.mean
        for layer in layers or self.layers():
            y = relu(layer(y))
            out.append(y)
        return out

    def forward(self, x: Tensor, layers: Layers | None = None) -> Tensor:
        return self.head(self.responses(x, layers)[-1]).flatten()

    def energy(self, x: Tensor, layers: Layers | None = None) -> Tensor:
        """E(Y) = |Y|^2 / (2 s^2) - f(Y), (B,): f enters with a minus sign (Eq. 1)."""
        y = (x - self.mean).flatten(1)
        return y.square().sum(1) / (2 * self.s**2) - self(x, layers)


class BlockedConvolution:
    """A SAME convolution as one of stride 1 on blocks of stride^3 voxels: the same sums.

    Large kernels of stride 3 and 2 are slow in bfloat16 on CPUs; many channels at stride 1 are
    fast, though the kernel is padded to whole blocks (18 for 16 at stride 3). It is padded in front
    too, so that SAME padding is whole blocks: those the convolution pads itself, and their
    gradient, which nobody wants, is never computed. The weight is laid out here, once, and its
    gradient goes back to the convolution's.
    """

    def __init__(self, convolution: SameConvolution, dtype: torch.dtype | None = None):
        kernel, self.stride = convolution.kernel_size[0], convolution.stride[0]
        before = convolution.same[0]
        front = -before % self.stride
        self.before = (before + front) // self.stride  # blocks
        weight = pad(convolution.weight, (front, -(front + kernel) % self.stride) * 3)
        self.kernel = weight.shape[-1] // self.stride
        self.weight = _channels_first(_blocks(weight, self.stride).to(dtype))
        self.bias = convolution.bias

    def __call__(self, x: Tensor) -> Tensor:
        side = math.ceil(x.shape[-1] / self.stride)
        # As many blocks of padding behind as before, one more where the kernel reaches farther.
        farther = max(self.kernel - 1 - 2 * self.before, 0)
        x = _channels_first(_blocks(self._fitted(x, 0, side + farther), self.stride))
        y = conv3d(x, self.weight, self.bias, padding=self.before)
        return y[..., :side, :side, :side]

    def _fitted(self, x: Tensor, before: int, total: int) -> Tensor:
        """Voxels in the weight's dtype, with blocks of zeros before and up to ``total`` blocks."""
        before = before * self.stride
        after = total * self.stride - before - x.shape[-1]
        return pad(x.to(self.weight.dtype), (before, after) * 3)


class TransformedConvolution(BlockedConvolution):
    """The same sums as products of transforms, of operands rounded to ``dtype``, in float32.

    By Winograd's where the blocks are few enough for it, else in Fourier space. For CPUs without
    instructions for bfloat16, where both are faster than the direct sums.
    """

    weights: Tensor | None = None  # transformed, once the side of the blocks is known

    def __call__(self, x: Tensor) -> Tensor:
        dtype, side = self.weight.dtype, math.ceil(x.shape[-1] / self.stride)
        wide = torch.promote_types(dtype, torch.float32)
        x = self._fitted(x, self.before, side + self.kernel - 1)
        # Whole runs of channels are copied.
        x = _blocks(x, self.stride).permute(1, 2, 3, 0, 4, 5, 6, 7).flatten(4).to(wide)
        few = len(x) <= winograd.LARGEST
        if self.weights is None:
            weight = self.weight.permute(2, 3, 4, 1, 0).to(wide)
            self.weights = (winograd.values if few else fourier.spectrum)(weight, len(x))
        correlation = winograd.Correlation if few else fourier.Correlation
        y = correlation.apply(x, self.weights, side) + self.bias.to(dtype)
        return y.permute(3, 4, 0, 1, 2).to(dtype, memory_format=torch.channels_last_3d)


def _blocks(x: Tensor, size: int) -> Tensor:
    """(B, C, D, H, W) to (B, D / size, H / size, W / size, size, size, size, C), not copied."""
    b, c, d, h, w = x.shape
    x = x.permute(0, 2, 3, 4, 1).reshape(b, d // size, size, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7)


def _channels_first(blocks: Tensor) -> Tensor:
    """The same as (B, size^3 C, D / size, ...), whose channels lie last in memory."""
    return blocks.flatten(4).permute(0, 4, 1, 2, 3)


def initialise(descriptor: Descriptor, std: float, generator: torch.Generator) -> None:
    """Draw weights from N(0, std^2), biases 0, as the released code does."""
    for layer in [*descriptor.convolutions, descriptor.head]:
        nn.init.normal_(layer.weight, 0.0, std, generator=generator)
        nn.init.zeros_(layer.bias)
