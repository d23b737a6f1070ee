"""Convolutions of stride 1 by Winograd's minimal filtering (Winograd 1980; Lavin and Gray 2016).

Voxels of a line are the coefficients of a polynomial. A product of polynomials asks for one number
a point where both are known; a correlation is the transpose of such a product. So n^3 points take
the place of a product a voxel and offset: 512 for 6^3 voxels of kernels of 3^3, where a direct
correlation has 5832. All is real, unlike in Fourier space, and three times as little to multiply.
The price is rounding, which grows with n: at 8 some 1e-4 of the outputs' deviation in float32.
"""

import functools

import torch
from torch import Tensor

from lib.models.fourier import without_autocast

# Of Lavin and Gray; the last point is infinity, where a polynomial is its highest coefficient.
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)
LARGEST = len(POINTS) + 1


@without_autocast
def values(w: Tensor, n: int) -> Tensor:
    """Voxels (k, k, k, ...), k <= n <= 8, as polynomials at n^3 points: (n^3, ...)."""
    return _along_axes(_powers(n, len(w)).to(w), w).flatten(0, 2)


class Correlation(torch.autograd.Function):
    """y[p] = sum_k x[p + k] w[k] for voxels x (n, n, n, B, C), n <= 8, where the kernel fits.

    The weights enter as ``values`` w (n^3, C, O), so that they are computed once for many steps.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x: Tensor, w: Tensor, outputs: int) -> Tensor:
        """y, (o, o, o, B, O), o = ``outputs`` = n - K + 1."""
        ctx.n, ctx.outputs, n = len(x), outputs, len(x)
        s = _along_axes(_coefficients(n).mT.to(x), x).flatten(0, 2)
        ctx.save_for_backward(s if ctx.needs_input_grad[1] else None, w)
        return _along_axes(_powers(n, outputs).mT.to(x), (s @ w).unflatten(0, (n, n, n)))

    @staticmethod
    @without_autocast
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (s, w), n, dx, dw = ctx.saved_tensors, ctx.n, None, None
        g = _along_axes(_powers(n, ctx.outputs).to(g), g).flatten(0, 2)
        if ctx.needs_input_grad[0]:
            dx = _along_axes(_coefficients(n).to(g), (g @ w.mT).unflatten(0, (n, n, n)))
        if ctx.needs_input_grad[1]:
            dw = s.mT @ g
        return dx, dw, None


def _along_axes(m: Tensor, x: Tensor) -> Tensor:
    """The matrix m (I, J) along each of the first three axes of x (J, J, J, ...)."""
    (i, j), m = m.shape, m.contiguous()  # a transposed one is read eight times as slowly
    y = (m @ x.reshape(j, -1)).view(i, j, -1)
    y = (m @ y).view(i * i, j, -1)
    return (m @ y).view(i, i, i, *x.shape[3:])


@functools.cache
def _powers(n: int, k: int) -> Tensor:
    """What takes k coefficients to a polynomial's values at n points, float64 (n, k)."""
    finite = torch.tensor(POINTS[: n - 1], dtype=torch.float64)
    at_infinity = torch.eye(k, dtype=torch.float64)[-1:]
    return torch.cat([finite[:, None] ** torch.arange(k), at_infinity])


@functools.cache
def _coefficients(n: int) -> Tensor:
    """What takes the values at n points back to n coefficients, float64 (n, n)."""
    return torch.linalg.inv(_powers(n, n))
