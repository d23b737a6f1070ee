"""The fused block of 3DWINN and the loss through it, beside torch's own modules."""

import pytest
import torch
from torch.nn import functional

from benchmarks.energy import PlainCritic
from lib import losses, rng
from lib.models import winn3d

LAST = torch.channels_last_3d


def block_inputs(dtype=torch.float64, shape=(2, 3, 4, 2, 4)):
    """y, weight and bias, all asking for gradients; no activation lies so near 0 that it flips."""
    noise = rng.torch_generator("fused block")
    y = torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype)
    weight, bias = torch.randn(2, shape[1], generator=noise, dtype=torch.float64)
    y = y.contiguous(memory_format=LAST)
    return [v.requires_grad_() for v in (y, weight.detach(), bias.detach())]


def fused(pool):
    return lambda y, weight, bias: winn3d.NormActivatePool.apply(y, weight, bias, 0.2, pool, 1e-5)


def plain(pool):
    def block(y, weight, bias):
        y = functional.leaky_relu(functional.group_norm(y, 1, weight, bias), 0.2)
        return functional.avg_pool3d(y, 2) if pool else y

    return block


def critics(dtype=torch.float32, **options):
    """A fused and a plain critic of the same random weights, norms included."""
    options = {"side": 16, "channels": (4, 6, 8, 10)} | options
    pair = winn3d.Critic(**options), PlainCritic(**options)
    noise = rng.torch_generator("fused critic")
    winn3d.initialise(pair[0], 0.2, noise)
    for norm in pair[0].norms:
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter, 0.5, 0.5, generator=noise)
    pair[0].mean.fill_(0.1)
    pair[1].load_state_dict(pair[0].state_dict())
    return [critic.to(dtype) for critic in pair]


def loss_gradients(critic, dtype=torch.float32, autocast=False, n=3):
    """WGAN-GP's loss of n shapes a side, and its gradients by all parameters."""
    noise = rng.torch_generator("fused loss")
    side = critic.side
    real = torch.rand(n, 1, side, side, side, generator=noise, dtype=torch.float64).round()
    fake = torch.rand(real.shape, generator=noise, dtype=torch.float64)
    real, fake, u = (v.to(dtype) for v in (real, fake, torch.rand(n, generator=noise)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        f_real, f_fake = critic(torch.cat([real, fake])).chunk(2)
        penalty = losses.gradient_penalty(critic, real, fake, u)
    loss = losses.wasserstein_loss(f_fake, f_real) + 10 * penalty
    return loss.detach(), torch.autograd.grad(loss, list(critic.parameters()))


# ---------------------------------------------------------------- the block


@pytest.mark.parametrize("pool", [False, True])
def test_first_and_second_derivatives_are_those_of_differences(pool):
    inputs = block_inputs()
    assert torch.autograd.gradcheck(fused(pool), inputs)
    assert torch.autograd.gradgradcheck(fused(pool), inputs)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("source", [0, 1, 2])
def test_second_derivatives_from_one_gradient_alone(pool, source):
    """Such as the penalty's, which sees the gradient by y and none of the others."""
    inputs, found = block_inputs(), []
    for block in (fused(pool), plain(pool)):
        out = block(*inputs)
        weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        scalar = (out.square() * weights).sum()
        (first,) = torch.autograd.grad(scalar, inputs[source], create_graph=True)
        found.append([first, *torch.autograd.grad(first.pow(3).sum(), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pool", [False, True])
def test_gradients_may_come_in_any_layout(pool):
    inputs, found = block_inputs(shape=(2, 3, 2, 4, 6)), []
    for form in (LAST, torch.contiguous_format):
        out = fused(pool)(*inputs)
        given = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        given = given.contiguous(memory_format=form).requires_grad_()
        (first,) = torch.autograd.grad(out, inputs[0], given, create_graph=True)
        given_second = torch.linspace(0, 1, first.numel(), dtype=first.dtype).view(first.shape)
        given_second = given_second.contiguous(memory_format=form)
        found.append([first, *torch.autograd.grad(first, [given, *inputs[:2]], given_second)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_other_layouts_of_the_input_are_refused():
    y, weight, bias = block_inputs()
    with pytest.raises(ValueError, match="channels last"):
        fused(True)(y.contiguous(), weight, bias)


@pytest.mark.parametrize("pool", [False, True])
def test_statistics_of_half_precision_are_single(pool):
    """Far from 0 a mean in bfloat16 would spoil the gradient, though not the values."""
    y = (20 + block_inputs(shape=(2, 3, 8, 8, 8))[0].detach()).bfloat16().requires_grad_()
    weight, bias = torch.tensor([[1.0, 0.5, 2.0], [0.0, 0.5, -1.0]])
    found = []
    for block, inputs in (
        (fused(pool), (y, weight, bias)),
        (plain(pool), (y.double(), weight.double(), bias.double())),
    ):
        out = block(*inputs)
        weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        found.append((out.double(), torch.autograd.grad(out, inputs[0], weights)[0].double()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2**-7, atol=2**-7)
    assert (found[0][1] - found[1][1]).norm() < 0.01 * found[1][1].norm()


@pytest.mark.parametrize("pool", [False, True])
def test_no_more_is_kept_than_one_derivative_takes(pool):
    """y, the activations, the weight and two statistics a shape, as at every step of a climb."""
    y, weight, bias = block_inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        out = fused(pool)(y, weight.detach(), bias.detach())
        assert sum(v.numel() for v in saved) == 2 * y.numel() + weight.numel() + 2 * len(y)
        torch.autograd.grad(out, y, torch.ones_like(out))
    assert len(saved) == 5


@pytest.mark.parametrize(("device", "pool"), [("cpu", False), ("cpu", True), ("meta", True)])
def test_blocks_without_a_norm_or_off_the_cpu_are_plain(device, pool):
    norm = torch.nn.Identity() if device == "cpu" else torch.nn.GroupNorm(1, 3, device="meta")
    y = block_inputs()[0].detach().to(torch.float32).to(device)
    out = winn3d.normalise_activate_pool(y, norm, 0.2, pool)
    expected = functional.leaky_relu(y, 0.2)
    expected = functional.avg_pool3d(expected, 2) if pool else expected
    assert out.shape == expected.shape and out.device.type == device
    assert device == "meta" or torch.equal(out, expected)


# ---------------------------------------------------------------- the critic


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_the_loss_and_its_gradients_are_those_of_plain_modules(norm_first, layout):
    pair = critics(torch.float64, norm_first=norm_first)
    pair[0].to(memory_format=layout)
    (loss, found), (expected_loss, expected) = (loss_gradients(c, torch.float64) for c in pair)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    assert all(g.norm() > 1e-3 for g in expected[:-1])  # the head's bias cancels
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * expected[0].norm().item())


def test_single_precision_loses_what_plain_modules_lose():
    """A unit near 0 may fall on the other side of the leaky ReLU; beyond that only sums differ."""
    pair = critics()
    (loss, found), (expected_loss, expected) = (loss_gradients(c) for c in pair)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for a, b in zip(found[:-1], expected[:-1], strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()


def test_half_precision_loses_no_more_than_plain_modules():
    _, expected = loss_gradients(critics(torch.float64)[1], torch.float64)
    exact, errors = torch.cat([g.flatten() for g in expected]), []
    for critic in critics():
        _, found = loss_gradients(critic.to(memory_format=LAST), autocast=True)
        assert all(g.dtype == torch.float32 for g in found)
        errors.append((torch.cat([g.flatten() for g in found]) - exact).norm() / exact.norm())
    assert errors[0] < 1.25 * errors[1]
    assert 0 < errors[1] < 0.1


def test_parameters_keep_their_names():
    state = winn3d.Critic(side=4, channels=(2, 3)).state_dict()
    layers = [f"{kind}.{k}.{part}" for kind in ("convolutions", "norms") for k in (0, 1)
              for part in ("weight", "bias")]  # fmt: skip
    assert list(state) == ["mean", "threshold", *layers, "head.weight", "head.bias"]
