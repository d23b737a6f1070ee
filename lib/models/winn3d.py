"""3DWINN (Huang et al. 2019): one volumetric network, a Wasserstein critic and a generator.

Table 1 of the paper at 32^3, every convolution 3^3 with stride 1 and padding 1:

=======  =========  ==========  ======================================
block    channels   side after  then
=======  =========  ==========  ======================================
1        1 -> 16    32          layer norm, leaky ReLU, no pooling
2        16 -> 32   16          layer norm, leaky ReLU, average pool 2
3        32 -> 64   8           the same
4        64 -> 128  4           the same
5        128 -> 256 2           the same
head     2048 -> 1              linear
=======  =========  ==========  ======================================

1,178,017 parameters, and 992 of the norms. The table names its layers "Conv4"; figure and text
say 3^3.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, leaky_relu

TABLE_1 = (16, 32, 64, 128, 256)
LAST = torch.channels_last_3d


class Critic(nn.Module):
    """Voxels (B, 1, D, D, D) in [0, 1] to the critic's value f(x) (B,): higher is more likely.

    channels: of the blocks; the side is halved after each but the first. mean: the mean voxel of
    the training shapes, which is subtracted from the input; ``centre="batch"`` subtracts the mean
    of the batch instead, as the paper's sentence reads. norm_first: normalise the first block too
    ("after each convolution"; WINN's code does not). Layer normalisation is over all voxels and
    channels of a shape with one scale and shift a channel, so no shape sees another in its batch,
    which the gradient penalty requires. ``threshold`` holds the lowest and the highest batch mean
    of f over real shapes, between which synthesis stops.
    """

    def __init__(
        self,
        *,
        side: int,
        channels: tuple[int, ...] = TABLE_1,
        slope: float = 0.2,
        norm_first: bool = True,
        centre: str = "train",
    ):
        super().__init__()
        self.side, self.slope, self.centre = side, slope, centre
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("threshold", torch.zeros(2))
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, (c_in, c) in enumerate(zip((1, *channels[:-1]), channels, strict=True)):
            self.convolutions.append(nn.Conv3d(c_in, c, 3, padding=1))
            self.norms.append(nn.GroupNorm(1, c) if i > 0 or norm_first else nn.Identity())
        self.head = nn.Linear(channels[-1] * (side >> (len(channels) - 1)) ** 3, 1)

    def centred(self, x: Tensor) -> Tensor:
        """The input less its mean: the space the paper works in."""
        return x - (x.mean() if self.centre == "batch" else self.mean)

    def features(self, x: Tensor) -> Tensor:
        """Activations of the last convolution, flat: 2048 in Table 1 (Table 6's features)."""
        x = self.centred(x).to(self.head.weight.dtype).contiguous(memory_format=LAST)
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = normalise_activate_pool(convolution(x), norm, self.slope, pool=i > 0)
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).flatten()

    def energy(self, x: Tensor) -> Tensor:
        """Energy (B,), lower is more likely: the critic's value enters with a minus sign."""
        return -self(x)


def normalise_activate_pool(y: Tensor, norm: nn.Module, slope: float, pool: bool) -> Tensor:
    """What follows a convolution in Table 1: (B, C, D, H, W), and half the sides where ``pool``.

    ``NormActivatePool`` on CPUs; without a norm, or on other devices, torch's own modules.
    """
    if isinstance(norm, nn.GroupNorm) and y.device.type == "cpu":
        y = y.contiguous(memory_format=LAST)
        return NormActivatePool.apply(y, norm.weight, norm.bias, slope, pool, norm.eps)
    y = leaky_relu(norm(y), slope)
    return avg_pool3d(y, 2) if pool else y


class NormActivatePool(torch.autograd.Function):
    """Layer norm, leaky ReLU and average pooling in as few passes over memory as eager torch takes.

    forward(y (B, C, D, H, W) channels last, weight (C,), bias (C,), slope, pool, eps). It has first
    and second derivatives by y, weight and bias. Beside y in bfloat16, weight and bias may be
    float32, as autocast leaves them, and so are the statistics then. ValueError on other layouts.
    """

    @staticmethod
    def forward(ctx, y, weight, bias, slope, pool, eps):
        if not y.is_contiguous(memory_format=LAST):
            raise ValueError("y must lie channels last")
        out, mean, rstd = _normalise(y, weight, bias, eps)
        out = torch.nn.functional.leaky_relu_(out, slope)
        ctx.save_for_backward(y, weight, out, mean, rstd)
        ctx.constants = slope, pool, eps
        return _pool(out) if pool else out

    @staticmethod
    def backward(ctx, gradient):
        y, weight, out, mean, rstd = ctx.saved_tensors
        # Unpooled, ``out`` is this node's output; detached, no second derivative comes back by it.
        tensors = gradient.contiguous(memory_format=LAST), y, weight, out.detach(), mean, rstd
        wanted = list(ctx.needs_input_grad[:3])
        return *NormActivatePoolBackward.apply(*tensors, *ctx.constants, wanted), None, None, None


class NormActivatePoolBackward(torch.autograd.Function):
    """Gradients of ``NormActivatePool`` by y, weight and bias, which can be differentiated again.

    With n = (y - mean) rstd, P v = v - mean(v) - n mean(n v), means over all of a shape, and i the
    gradient before pooling and activation: dy = rstd P(weight i), dweight = sum(n i), dbias =
    sum(i). What activation and pooling let through is constant, so ``bias`` has no part in it.
    """

    @staticmethod
    def forward(ctx, gradient, y, weight, out, mean, rstd, slope, pool, eps, wanted):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, y, weight, out, mean, rstd)
        ctx.constants = slope, pool, eps
        inner = _before_pool(gradient, out, slope, pool)
        return _normalise_backward(inner, y, mean, rstd, weight, wanted)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_dy, by_dweight, by_dbias):
        gradient, y, weight, out, mean, rstd = ctx.saved_tensors
        slope, pool, eps = ctx.constants
        h = torch.zeros_like(y) if by_dy is None else by_dy.contiguous(memory_format=LAST)
        found = _second_derivative(h, *ctx.saved_tensors, slope, pool)
        if by_dweight is not None or by_dbias is not None:
            given = by_dweight, by_dbias
            scale, shift = (torch.zeros_like(weight) if v is None else v for v in given)
            # sum(scale dweight + shift dbias) = sum(i (scale n + shift)), and that is a norm.
            inner = _before_pool(gradient, out, slope, pool)
            found[0] += _after_pool(_normalise(y, scale, shift, eps)[0], out, slope, pool)
            found[1] += _normalise_backward(inner, y, mean, rstd, scale, [True, False, False])[0]
        return *found, *[None] * 7


def _second_derivative(h, gradient, y, weight, out, mean, rstd, slope, pool) -> list[Tensor]:
    """Derivatives of sum(h dy) by gradient, y and weight, in the terms of the class above.

    P is symmetric, so sum(h dy) = sum(t u) with t = weight i and u = rstd P h. The derivative
    by y is -rstd^2 [m (h - mean(h)) + q (t - mean(t)) + (s - 2 m q) n] with m = mean(n t),
    q = mean(n h) and s = mean(t P h).
    """
    size, scale = y[0].numel(), weight.to(y.dtype).view(-1, 1, 1, 1)
    u = _normalise_backward(h, y, mean, rstd, None, [True, False, False])[0]
    u = _after_pool(u, out, slope, pool)
    by_gradient = u * scale
    by_weight = (u * gradient).sum((0, 2, 3, 4), dtype=weight.dtype)
    t = _before_pool(gradient * scale, out, slope, pool)
    mean, rstd = mean[:, 0], rstd[:, 0]
    (hy, h_sum), (ty, t_sum) = _sums(h, y), _sums(t, y)
    q, m = (hy - mean * h_sum) * rstd / size, (ty - mean * t_sum) * rstd / size
    s = _sums(by_gradient, gradient)[0] / (rstd * size)
    of_h, of_t, of_y = -(rstd**2) * m, -(rstd**2) * q, -(rstd**3) * (s - 2 * m * q)
    constant = -(of_h * h_sum + of_t * t_sum) / size - of_y * mean
    # Shape by shape: the factors stay in single precision, and what was just written is in cache.
    for k, (a, b, c, d) in enumerate(torch.stack([of_h, of_t, of_y, constant], 1).tolist()):
        t[k].mul_(b).add_(h[k], alpha=a).add_(y[k], alpha=c).add_(d)
    return [by_gradient, t, by_weight]


def _normalise(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Layer norm of y (B, C, D, H, W), and mean and rstd (B, 1) of its shapes."""
    b, c = y.shape[:2]
    return torch.native_group_norm(y, weight, bias, b, c, y[0, 0].numel(), 1, eps)


def _normalise_backward(gradient, y, mean, rstd, weight: Tensor | None, wanted: list[bool]):
    """Gradients of a layer norm by y, weight and bias, None where not wanted; all channels last."""
    b, c = y.shape[:2]
    return torch.ops.aten.native_group_norm_backward(
        gradient, y, mean, rstd, weight, b, c, y[0, 0].numel(), 1, wanted
    )


def _sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of a b and of a over each shape, (B,), in single precision or better and in one pass.

    They are what a norm of mean 0 and deviation 1 would return for its weight and bias, were every
    slice of a shape a channel.
    """
    rows = len(a) * a.shape[2]
    flat = [v.permute(0, 2, 3, 4, 1).reshape(1, rows, -1) for v in (a, b)]
    one = torch.ones(rows, dtype=torch.promote_types(a.dtype, torch.float32))
    mean, rstd, wanted = torch.zeros_like(one[:1]), one[:1], [False, True, True]
    _, ab, a_sum = torch.ops.aten.native_group_norm_backward(
        *flat, mean, rstd, one, 1, rows, flat[0].shape[2], 1, wanted
    )
    return ab.view(len(a), -1).sum(1), a_sum.view(len(a), -1).sum(1)


def _after_pool(x: Tensor, out: Tensor, slope: float, pool: bool) -> Tensor:
    """Activation and pooling as the linear map they are where the activations are ``out``."""
    x = torch.ops.aten.leaky_relu_backward(x, out, slope, True)
    return _pool(x) if pool else x


def _before_pool(gradient: Tensor, out: Tensor, slope: float, pool: bool) -> Tensor:
    """The transpose of ``_after_pool``: every voxel of an octant gets an eighth."""
    if not pool:
        return torch.ops.aten.leaky_relu_backward(gradient, out, slope, True)
    b, c, d, h, w = out.shape
    # Doubled along the last side first: whole rows of voxels are repeated then, not single ones.
    rows = (gradient / 8).permute(0, 2, 3, 4, 1)[:, :, :, :, None].expand(-1, -1, -1, -1, 2, -1)
    rows = rows.reshape(b, d // 2, 1, h // 2, 1, w * c)
    halves = out.permute(0, 2, 3, 4, 1).view(b, d // 2, 2, h // 2, 2, w * c)
    inner = torch.ops.aten.leaky_relu_backward(rows.expand_as(halves), halves, slope, True)
    return inner.view(b, d, h, w, c).permute(0, 4, 1, 2, 3)


def _pool(x: Tensor) -> Tensor:
    """Means of octants, (B, C, D, H, W) to half the sides; all channels last."""
    b, c, d, h, w = x.shape
    z = x.permute(0, 2, 3, 4, 1).view(b, d // 2, 2, h // 2, 2, w // 2, 2, c)
    z = z[:, :, 0] + z[:, :, 1]
    z = z[:, :, :, 0] + z[:, :, :, 1]
    z = z[:, :, :, :, 0] + z[:, :, :, :, 1]
    return z.mul_(1 / 8).permute(0, 4, 1, 2, 3)


class Climber:
    """A critic made ready to be climbed: f(x) (B,) of voxels (B, 1, D, D, D), by x alone.

    Weights are cast once, and are without gradients.
    """

    def __init__(self, critic: Critic, dtype: torch.dtype):
        fast = copy.deepcopy(critic).requires_grad_(False)
        self.critic = fast.to(dtype=dtype, memory_format=LAST)
        self.critic.mean = critic.mean  # centring stays in single precision

    def __call__(self, x: Tensor) -> Tensor:
        return self.critic(x)

    def energy(self, x: Tensor) -> Tensor:
        """As ``Critic.energy``."""
        return self.critic.energy(x)


def initialise(critic: Critic, std: float, generator: torch.Generator) -> None:
    """Draw the weights of convolutions and head from N(0, std^2), biases 0, as WINN's code does."""
    for layer in [*critic.convolutions, critic.head]:
        nn.init.normal_(layer.weight, 0.0, std, generator=generator)
        nn.init.zeros_(layer.bias)
