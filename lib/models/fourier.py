"""Convolutions of stride 1 as products in Fourier space (Mathieu et al. 2014).

For kernels that fill much of the grid: a circular correlation of n^3 voxels asks for one product
of channels a frequency, n^3 / 2 of them, where a direct one has a product a voxel and offset. The
transforms are matrix products too, since n is small: along the first two axes in one, then along
the third. No layout is changed on the way:

=========  ==================================================================================
voxels     (k, k, k, ...), zero beyond k up to n
spectrum   (Q, 2, ...), Q = (n // 2 + 1) n n frequencies, the others are their conjugates; 2 are
           the real and the imaginary part
=========  ==================================================================================
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def without_autocast(function: Callable) -> Callable:
    """Keep float32 products where autocast would round them, in the backward pass too."""

    @functools.wraps(function)
    def within(*args):
        where = next(a for a in args if isinstance(a, Tensor)).device.type
        with torch.autocast(where, enabled=False):
            return function(*args)

    return within


@without_autocast
def spectrum(x: Tensor, n: int) -> Tensor:
    """The discrete Fourier transform of size n of voxels (k, k, k, ...), k <= n: (Q, 2, ...)."""
    k = len(x)
    plane, line = _forward(n, k, x.device, x.dtype)
    x_plane = (plane @ x.reshape(k * k, -1)).view(len(plane) // 2, 2 * k, -1)
    return (line @ x_plane).view(-1, 2, *x.shape[3:])


def voxels(s: Tensor, n: int, k: int) -> Tensor:
    """The first k^3 voxels (k, k, k, ...) of the inverse transform of a spectrum (Q, 2, ...)."""
    plane, line = _inverse(n, k, s.device, s.dtype)
    s_plane = line @ s.reshape(plane.shape[1] // 2, 2 * n, -1)
    return (plane @ s_plane.view(plane.shape[1], -1)).view(k, k, k, *s.shape[2:])


class Correlation(torch.autograd.Function):
    """y[p] = sum_k x[p + k] w[k] for voxels x (n, n, n, B, C), all p where the kernel fits.

    The weights enter as spectrum w (Q, 2, C, O), so that they are transformed once for many steps.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x: Tensor, w: Tensor, outputs: int) -> Tensor:
        """y, (o, o, o, B, O), o = ``outputs`` = n - K + 1."""
        ctx.n, s = len(x), spectrum(x, len(x))
        s = torch.cat([s, _times_i(s, -1)], -1)  # the second half meets the imaginary part of w
        ctx.save_for_backward(s if ctx.needs_input_grad[1] else None, w)
        y = s.flatten(1, 2) @ w.flatten(1, 2)
        return voxels(y.unflatten(1, (2, -1)), ctx.n, outputs)

    @staticmethod
    @without_autocast
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (s, w), n, dx, dw = ctx.saved_tensors, ctx.n, None, None
        b, c = g.shape[3], w.shape[2]
        g = spectrum(g, n).flatten(1, 2)
        if ctx.needs_input_grad[0]:
            ds = (g @ w.flatten(1, 2).mT).view(-1, 2, b, 2 * c)
            dx = voxels(ds[..., :c] + _times_i(ds[..., c:], 1), n, n)
        if ctx.needs_input_grad[1]:
            dw = (s.flatten(1, 2).mT @ g).view_as(w)
            twice = _twice(n).to(dw) / n**3
            dw.view(len(twice), -1).mul_(twice[:, None])
        return dx, dw, None


def _times_i(s: Tensor, sign: int) -> Tensor:
    return torch.stack([-s[:, 1], s[:, 0]] if sign > 0 else [s[:, 1], -s[:, 0]], 1)


def _twice(n: int) -> Tensor:
    """How often the frequencies of the first axis count: twice where conjugates are left out."""
    return torch.tensor([1.0 if 2 * q % n == 0 else 2.0 for q in range(n // 2 + 1)]).double()


@functools.cache
def _forward(n: int, k: int, where: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrices of ``spectrum``: (Q / n 2, k k) of two axes, (n 2, 2 k) of the third."""
    waves = _waves(n, k).conj()
    plane = torch.einsum("qd,re->qrde", waves[: n // 2 + 1], waves).reshape(-1, k * k)
    plane = torch.stack([plane.real, plane.imag], 1).flatten(0, 1)
    line = _on_parts(waves).reshape(2 * n, 2 * k)
    return plane.to(where, dtype), line.to(where, dtype)


@functools.cache
def _inverse(n: int, k: int, where: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrices of ``voxels``: (k k, Q / n 2) of two axes, (2 k, n 2) of the third."""
    waves, twice = _waves(n, k).mT, _twice(n)
    plane = (
        torch.einsum("dq,er->deqr", waves[:, : len(twice)] * twice, waves).reshape(k * k, -1) / n**3
    )
    plane = torch.stack([plane.real, -plane.imag], 2).flatten(1)
    line = _on_parts(waves).permute(1, 0, 3, 2).reshape(2 * k, 2 * n)
    return plane.to(where, dtype), line.to(where, dtype)


def _waves(n: int, k: int) -> Tensor:
    """exp(2 pi i q d / n), (n, k)."""
    angle = 2 * math.pi / n * torch.outer(torch.arange(n), torch.arange(k)).double()
    return torch.polar(torch.ones_like(angle), angle)


def _on_parts(m: Tensor) -> Tensor:
    """A complex matrix (I, J) acting on real and imaginary parts: (I, 2, 2, J)."""
    rows = [torch.stack([m.real, -m.imag], 1), torch.stack([m.imag, m.real], 1)]
    return torch.stack(rows, 1)
