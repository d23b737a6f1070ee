"""Networks against the papers' sizes; losses by hand; random streams and samplers by contract."""

import functools
import inspect
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from lib import device, losses, rng, samplers
from lib.errors import StudyError
from lib.models import desnet3d, gan3d, nin3d, winn3d
from lib.train.checkpoint import n_parameters

GAN24 = dict(base=3, channels=(16, 8, 8))
CRITICS = {
    24: dict(side=24, channels=(4, 4, 8, 8)),
    32: dict(side=32, channels=(4, 6, 6, 8, 8)),
}
DESCRIPTOR = dict(side=12, s=0.5, channels=(3, 2), kernels=(6, 4), strides=(3, 2))


def generator_of(description, z_dim=200, std=0.02):
    network = gan3d.Generator(z_dim=z_dim, **description)
    gan3d.initialise(network, std, rng.torch_generator("test", "generator"))
    return network


def discriminator_of(description, **options):
    network = gan3d.Discriminator(**description, **options)
    gan3d.initialise(network, 0.02, rng.torch_generator("test", "discriminator"))
    return network


def random_like(network, std, *name):
    """``network`` with every parameter drawn, so that no shift is 0 and no scale is 1."""
    noise = rng.torch_generator("test", *name)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0.0, std, generator=noise)
    network.mean.fill_(0.15)
    return network


def critic_of(side=24, std=0.3, **options):
    return random_like(winn3d.Critic(**CRITICS[side], **options), std, "critic")


def descriptor_of(std=0.2, **options):
    return random_like(desnet3d.Descriptor(**DESCRIPTOR | options), std, "descriptor")


def voxels_of(n, side, *name, dtype=torch.float32):
    noise = rng.torch_generator("test", "voxels", *name)
    return torch.rand(n, 1, side, side, side, generator=noise, dtype=dtype)


def kernels(channels, base, z_dim=0):
    """Weights of a chain of convolutions 1 - c1 - ... - cn of 4^3, and of the base at its end."""
    pairs = zip((1, *channels), channels, strict=False)
    return 64 * sum(a * b for a, b in pairs) + base**3 * channels[-1] * (z_dim or 1)


# ---------------------------------------------------------------- sizes


def test_gan64_has_the_published_size():
    generator, discriminator = (
        generator_of(gan3d.GAN64),
        discriminator_of(gan3d.GAN64_DISCRIMINATOR),
    )
    assert n_parameters(generator) == 17_567_744 + 1_920
    assert n_parameters(discriminator) == 11_046_912 + 1_792
    first = discriminator_of(gan3d.GAN64_DISCRIMINATOR, norm_first=True)
    assert n_parameters(first) == 11_046_912 + 1_920


def test_gan32_has_the_size_of_the_report():
    generator, discriminator = (
        generator_of(gan3d.GAN32),
        discriminator_of(gan3d.GAN32_DISCRIMINATOR),
    )
    channels = gan3d.GAN32["channels"]
    expected = kernels(channels[::-1], 2, 200) + 2 * sum(channels)
    assert n_parameters(generator) == expected == 7_230_848
    channels = gan3d.GAN32_DISCRIMINATOR["channels"]
    assert n_parameters(discriminator) == kernels(channels, 2) + 2 * sum(channels[1:]) == 2_757_504


def test_the_judge_has_the_published_size():
    assert n_parameters(nin3d.Nin3d(n_classes=40)) == 4_584_888
    assert n_parameters(nin3d.Nin3d(n_classes=10)) == 4_584_888 - 30 * 513


def test_the_critic_has_the_published_size():
    with torch.device("meta"):
        assert n_parameters(winn3d.Critic(side=32)) == 1_178_017 + 992
        bare = winn3d.Critic(side=32, norm_first=False)
        assert n_parameters(bare) == 1_178_017 + 992 - 2 * 16


@pytest.mark.parametrize("side, size", [(32, 5_161_101), (64, 5_161_101 + 100 * (11**3 - 6**3))])
def test_the_descriptor_has_the_published_size(side, size):
    with torch.device("meta"):
        assert n_parameters(desnet3d.Descriptor(side=side, s=0.5)) == size


@pytest.mark.parametrize(
    "generator, discriminator, side",
    [
        (gan3d.GAN64, gan3d.GAN64_DISCRIMINATOR, 64),
        (gan3d.GAN32, gan3d.GAN32_DISCRIMINATOR, 32),
        (GAN24, dict(base=3, channels=(8, 8, 16)), 24),
    ],
)
def test_shapes_and_ranges(generator, discriminator, side):
    g, d = generator_of(generator).eval(), discriminator_of(discriminator).eval()
    assert g.side == d.side == side
    with torch.no_grad():
        x = g.voxels(rng.latents([0, 1], 200, "uniform"))
        assert x.shape == (2, 1, side, side, side)
        assert 0 <= x.min() < x.max() <= 1
        assert d(x).shape == (2,)
        sides = [r.shape[-1] for r in d.responses(x)]
    assert sides == [side // 2 ** (k + 1) for k in range(len(discriminator["channels"]))]
    assert sides[-1] == discriminator["base"]


def test_shapes_of_the_critic():
    """Table 1: the side is halved after every block but the first, and 2048 features remain."""
    seen, network = [], winn3d.Critic(side=32)
    for layer in [*network.convolutions, network.head]:
        layer.register_forward_hook(lambda m, given, out: seen.append(given[0].shape[1:3]))
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 32, 32, 32)).shape == (1,)
    assert seen == [(1, 32), (16, 32), (32, 16), (64, 8), (128, 4), (2048,)]


def test_shapes_of_the_descriptor():
    network = desnet3d.Descriptor(side=32, s=0.5)
    with torch.no_grad():
        responses = network.responses(torch.zeros(1, 1, 32, 32, 32))
        assert network.head(responses[-1]).shape == (1, 1, 1, 1, 1)
    assert [tuple(r.shape[1:3]) for r in responses] == [(200, 11), (100, 6)]
    assert [c.same for c in network.convolutions] == [(7, 7), (2, 3)]


def test_shapes_of_the_descriptor_at_twice_the_side():
    with torch.device("meta"):
        network = desnet3d.Descriptor(side=64, s=0.5)
    assert [c.same for c in network.convolutions] == [(7, 8), (2, 2)]
    assert network.head.kernel_size == (11, 11, 11)


def test_where_normalisation_stands():
    def normalised(blocks):
        return [any(isinstance(m, torch.nn.BatchNorm3d) for m in block) for block in blocks]

    assert normalised(discriminator_of(gan3d.GAN64_DISCRIMINATOR).blocks) == [0, 1, 1, 1]
    first = discriminator_of(gan3d.GAN64_DISCRIMINATOR, norm_first=True)
    assert normalised(first.blocks) == [1, 1, 1, 1]
    for norm_first in (True, False):
        norms = winn3d.Critic(**CRITICS[24], norm_first=norm_first).norms
        assert [getattr(n, "num_groups", 0) for n in norms] == [norm_first, 1, 1, 1]
    assert isinstance(generator_of(GAN24).layers[-1], torch.nn.ConvTranspose3d)


def test_convolutions_of_the_gan_have_no_bias():
    for network in (generator_of(GAN24), discriminator_of(GAN24)):
        for layer in network.modules():
            assert getattr(layer, "bias", None) is None or isinstance(layer, torch.nn.BatchNorm3d)


def test_initialisation():
    network = generator_of(gan3d.GAN32)
    weights = torch.cat([p.flatten() for p in network.parameters() if p.ndim > 1])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(weights.mean().item()) < 1e-4
    scales = torch.cat([m.weight for m in network.modules() if isinstance(m, torch.nn.BatchNorm3d)])
    assert scales.mean().item() == pytest.approx(1, abs=0.01)
    same = generator_of(gan3d.GAN32)
    assert all(map(torch.equal, network.parameters(), same.parameters()))


@pytest.mark.parametrize(
    "network, initialise",
    [
        (winn3d.Critic(side=32, channels=(16, 32)), winn3d.initialise),
        (desnet3d.Descriptor(**DESCRIPTOR | {"channels": (50, 50)}), desnet3d.initialise),
    ],
    ids=["critic", "descriptor"],
)
def test_initialisation_of_the_energies(network, initialise):
    drawn = []
    for _ in range(2):
        initialise(network, 0.02, rng.torch_generator("test"))
        layers = [*network.convolutions, network.head]
        assert not any(layer.bias.any() for layer in layers)
        drawn.append(torch.cat([layer.weight.flatten() for layer in layers]))
        for layer in layers:
            torch.nn.init.ones_(layer.bias)
    assert torch.equal(*drawn)
    assert drawn[0].std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(drawn[0].mean().item()) < 5e-4


def test_the_judges_maps_and_features():
    network = nin3d.Nin3d(n_classes=10)
    assert network.n_features == 4096
    sides = []
    for layer in network.convolutions:
        if isinstance(layer, torch.nn.Dropout):
            layer.register_forward_hook(lambda m, i, out: sides.append(out.shape[-1]))
    with torch.no_grad():
        assert network.eval()(torch.zeros(2, 1, 30, 30, 30)).shape == (2, 10)
        assert network.features(torch.zeros(1, 1, 30, 30, 30)).shape == (1, 4096)
    assert sides[:3] == [13, 5, 2]


def test_sides_that_the_judge_cannot_take():
    assert nin3d.Nin3d(n_classes=2, side=22, widths=(2, 2, 4)).n_features == 4
    with pytest.raises(StudyError, match="side 21 are too small; use 22"):
        nin3d.Nin3d(n_classes=2, side=21)


def test_how_the_judge_starts():
    """Convolutions from MSRA over the fan out, linear layers uniform over the fan in."""
    network = nin3d.Nin3d(n_classes=10)
    nin3d.initialise(network, rng.torch_generator("test"))
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv3d):
            fan_out = layer.weight[0, 0].numel() * layer.weight.shape[0]
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
        elif isinstance(layer, torch.nn.Linear):
            bound = layer.in_features**-0.5
            assert 0.99 * bound < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        else:
            continue
        assert not layer.bias.any()


def test_gradients_reach_every_parameter():
    g, d = generator_of(GAN24, z_dim=16), discriminator_of(GAN24, norm_first=True)
    judge = nin3d.Nin3d(n_classes=4, widths=(8, 8, 16), hidden=16)
    d(g.voxels(torch.rand(4, 16, generator=rng.torch_generator("z")))).square().sum().backward()
    x = (torch.rand(8, 1, 30, 30, 30, generator=rng.torch_generator("x")) > 0.5).float()
    functional.cross_entropy(judge(x), torch.arange(8) % 4).backward()
    critic, descriptor = critic_of(), descriptor_of()
    critic(x[:4, :, :24, :24, :24]).square().sum().backward()
    descriptor(x[:, :, :12, :12, :12]).square().sum().backward()
    for network in (g, d, judge, critic, descriptor):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_generator_at_rest_is_not_constant_and_ignores_its_batch():
    network = generator_of(GAN24, z_dim=16, std=0.2)
    with torch.no_grad():
        for step in range(3):
            network.train()(torch.rand(8, 16, generator=rng.torch_generator("warm", step)))
        network.eval()
        z = rng.latents(list(range(6)), 16, "uniform")
        together = network.voxels(z)
        alone = torch.cat([network.voxels(z[k : k + 1]) for k in range(6)])
        shuffled = network.voxels(z.flip(0)).flip(0)
    assert together.std(0).max() > 0.05
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(together, shuffled, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- energy-based networks


def test_numbers_by_name():
    assert device.dtype("float32") is torch.float32
    assert device.dtype("bfloat16") is torch.bfloat16


def test_same_padding_is_that_of_tensorflow():
    """Against the two cases of TensorFlow's documentation, and against what a convolution gives."""
    for side in range(1, 40):
        for kernel in range(1, 17):
            for stride in range(1, 6):
                left = side % stride or stride
                total = max(kernel - left, 0)
                before, after = desnet3d.same_padding(side, kernel, stride)
                assert (before, after) == (total // 2, (total + 1) // 2)
                n_windows = (side + before + after - kernel) // stride + 1
                assert n_windows == math.ceil(side / stride)


def naive_convolution(y, weight, bias, stride, padding):
    """Sums over windows that begin ``padding`` before the voxels, with zeros outside."""
    c_in, side = y.shape[:2]
    c_out, kernel = weight.shape[0], weight.shape[-1]
    n_out = math.ceil(side / stride)
    wide = np.zeros((c_in, *(n_out * stride + kernel + padding,) * 3))
    inner = slice(padding, padding + side)
    wide[:, inner, inner, inner] = y
    out = np.zeros((c_out, n_out, n_out, n_out))
    for place in np.ndindex(n_out, n_out, n_out):
        d, h, w = (slice(i * stride, i * stride + kernel) for i in place)
        out[(slice(None), *place)] = (weight * wide[:, d, h, w]).sum((1, 2, 3, 4)) + bias
    return out


@pytest.mark.parametrize("blocked", [False, True])
def test_the_descriptor_by_hand(blocked):
    network = descriptor_of(blocked=blocked).double()
    x = voxels_of(2, 12, "by hand", dtype=torch.float64)
    expected = []
    for shape in x.numpy():
        y = shape - network.mean.item()
        for layer, stride, padding in zip(network.convolutions, (3, 2), (1, 1), strict=True):
            weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            y = np.maximum(naive_convolution(y, weight, bias, stride, padding), 0)
        head = network.head.weight[0].detach().numpy()
        expected.append((head * y).sum() + network.head.bias.item())
    np.testing.assert_allclose(network(x).detach().numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize(
    "side, kernel, stride",
    [(16, 6, 2), (17, 6, 2), (13, 5, 2), (9, 4, 3), (10, 4, 3), (11, 3, 3), (8, 8, 3), (6, 3, 1)]
    + [(6, 2, 1), (9, 5, 2), (12, 7, 3), (7, 2, 3), (11, 8, 4)],
)
@pytest.mark.parametrize("kind", [desnet3d.BlockedConvolution, desnet3d.TransformedConvolution])
def test_blocked_convolutions_are_the_convolution(kind, side, kernel, stride):
    noise = rng.torch_generator("blocks", side, kernel, stride)
    layer = desnet3d.SameConvolution(2, 3, kernel, stride, side=side).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=noise)
    x = torch.randn(2, 2, *(side,) * 3, generator=noise, dtype=torch.float64, requires_grad=True)
    found, expected = kind(layer)(x), layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(expected.shape, generator=noise, dtype=torch.float64)
    inputs = (x, layer.weight, layer.bias)
    pairs = [torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_transformed_layers_round_operands_to_bfloat16_and_sum_in_float32():
    network = descriptor_of(blocked=True)
    x = voxels_of(4, 12).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        direct, found = (network.layers(torch.bfloat16, transformed=f)[0](x) for f in (False, True))
    assert found.dtype == direct.dtype == torch.bfloat16
    layer = network.convolutions[0]
    weight, bias = layer.weight.bfloat16().double(), layer.bias.bfloat16().double()
    padded = functional.pad(x, network.convolutions[0].same * 3)
    exact = functional.conv3d(padded.double(), weight, bias, stride=3)
    # Products in bfloat16 would be off by more than the last rounding, which is half of 2^-7.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(direct, found, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("blocked", [False, True])
def test_layers_laid_out_once_are_those_of_every_call(blocked):
    network, x = descriptor_of(blocked=blocked), voxels_of(2, 12)
    layers = network.layers(torch.float32)
    assert torch.equal(network.energy(x, layers), network.energy(x))
    with torch.no_grad():
        network.convolutions[0].weight.mul_(2)
    assert torch.equal(network.energy(x, layers), network.energy(x)) is not blocked


def test_energy_is_minus_f_of_the_critic():
    critic, x = critic_of(), voxels_of(3, 24)
    climber = winn3d.Climber(critic, torch.float32)
    assert torch.equal(critic.energy(x), -critic(x))
    assert torch.equal(climber.energy(x), -climber(x))
    assert critic(x).std() > 0.01


def test_energy_of_the_descriptor_has_the_reference():
    network, x = descriptor_of(s=0.4).double(), voxels_of(3, 12, dtype=torch.float64)
    reference = ((x - network.mean) ** 2).sum((1, 2, 3, 4)) / (2 * 0.4**2)
    torch.testing.assert_close(network.energy(x), reference - network(x))
    assert network(x).abs().min() > 0.01


def transformed(network):
    layers = network.layers(torch.float32, transformed=True)
    return functools.partial(network, layers=layers)


ALONE = {
    "critic": (24, critic_of),
    "climber": (24, lambda: winn3d.Climber(critic_of(), torch.float32)),
    "climber in half": (24, lambda: winn3d.Climber(critic_of(), torch.bfloat16)),
    "descriptor": (12, descriptor_of),
    "blocked": (12, lambda: descriptor_of(blocked=True)),
    "transformed": (12, lambda: transformed(descriptor_of(blocked=True))),
}


@pytest.mark.parametrize("name", ALONE)
def test_no_shape_sees_its_batch(name):
    side, build = ALONE[name]
    f, x = build(), voxels_of(5, side)
    x[1] = 0  # a companion that is unlike
    with torch.no_grad():
        together, alone = f(x), torch.cat([f(x[k : k + 1]) for k in range(5)])
    assert together.float().std() > 0.05
    tolerance = 0.02 if "half" in name else 1e-4
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)


def test_the_two_readings_of_the_mean():
    """``train`` subtracts a constant; ``batch`` lets shapes see each other."""
    x = voxels_of(3, 24)
    by_train, by_batch = critic_of(centre="train"), critic_of(centre="batch")
    centred = critic_of()
    centred.mean.zero_()
    with torch.no_grad():
        torch.testing.assert_close(by_train(x), centred(x - 0.15))
        torch.testing.assert_close(by_batch(x), centred(x - x.mean()))
        assert (by_batch(x) - by_train(x)).abs().max() > 0.01
        # One shift of all voxels, so any shape moves when the batch does.
        assert (by_batch(x)[:1] - by_batch(torch.cat([x[:1], x[1:] * 0]))[:1]).abs() > 0.01
        climber = winn3d.Climber(by_batch, torch.float32)
        torch.testing.assert_close(climber(x), by_batch(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- climbing a critic


def by_modules(critic, x):
    """f of a critic from torch's own layers, in the order of Table 1."""
    x = x - critic.mean
    for i, (layer, norm) in enumerate(zip(critic.convolutions, critic.norms, strict=True)):
        x = layer(x)
        if i > 0 or isinstance(norm, torch.nn.GroupNorm):
            x = functional.group_norm(x, 1, norm.weight, norm.bias, 1e-5)
        x = functional.leaky_relu(x, 0.2)
        x = functional.avg_pool3d(x, 2) if i > 0 else x
    return (x.flatten(1) * critic.head.weight).sum(1) + critic.head.bias


@pytest.mark.parametrize("side", [24, 32])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.01), (torch.float64, 1e-9)])
def test_the_climber_is_the_critic_of_the_table(side, norm_first, dtype, tolerance):
    """In single precision a unit near 0 may fall on the other side; in double none does."""
    critic, x = critic_of(side, norm_first=norm_first).to(dtype), voxels_of(3, side, dtype=dtype)
    f, gradient = samplers.input_gradient(winn3d.Climber(critic, dtype), x)
    f_plain, gradient_plain = samplers.input_gradient(lambda x: by_modules(critic, x), x)
    torch.testing.assert_close(f, f_plain, rtol=1e-4, atol=1e-4)
    error = (gradient - gradient_plain).flatten(1).norm(dim=1)
    assert (error < tolerance * gradient_plain.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_climber_in_half_precision_points_the_same_way(norm_first):
    critic, x = critic_of(norm_first=norm_first), voxels_of(4, 24)
    f, gradient = samplers.input_gradient(winn3d.Climber(critic, torch.bfloat16), x)
    f_plain, gradient_plain = samplers.input_gradient(lambda x: by_modules(critic, x), x)
    assert f.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(f, f_plain, rtol=0.05, atol=0.05)
    cosine = functional.cosine_similarity(gradient.flatten(1), gradient_plain.flatten(1))
    assert cosine.min() > 0.99


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_the_climber_climbs_where_the_critic_would(dtype, tolerance):
    """Mean distance of the two ends, as a share of the way."""
    critic, x = critic_of(), voxels_of(2, 24)
    options = dict(lr=0.005, beta1=0.8, beta2=0.999, max_steps=8)
    never = torch.full((2,), math.inf)
    ends = [
        samplers.adam_ascent(f, x, never, **options)[0]
        for f in (winn3d.Climber(critic, dtype), lambda x: by_modules(critic, x))
    ]
    way = (ends[1] - x).abs().mean()
    assert way > 0.005
    assert (ends[0] - ends[1]).abs().mean() < tolerance * way


def test_a_climber_leaves_its_critic_alone():
    critic = critic_of()
    before = {n: t.clone() for n, t in critic.state_dict().items()}
    climber = winn3d.Climber(critic, torch.bfloat16)
    samplers.input_gradient(climber, voxels_of(2, 24))
    assert all(torch.equal(t, before[n]) for n, t in critic.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in critic.parameters())
    assert all(not p.requires_grad for p in climber.critic.parameters())


# ---------------------------------------------------------------- losses


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_losses_by_hand():
    real, fake = torch.tensor([1.0, -0.5]), torch.tensor([0.25, -2.0])
    on_real = -(log_sigmoid(1.0) + log_sigmoid(-0.5)) / 2
    on_fake = -(log_sigmoid(-0.25) + log_sigmoid(2.0)) / 2
    found = losses.discriminator_loss(real, fake).item()
    assert found == pytest.approx(on_real + on_fake, rel=1e-6)
    wrong_way = -(log_sigmoid(-1.0) + log_sigmoid(0.5)) / 2
    smoothed = 0.9 * on_real + 0.1 * wrong_way + on_fake
    assert losses.discriminator_loss(real, fake, 0.9).item() == pytest.approx(smoothed, rel=1e-6)
    expected = -(log_sigmoid(0.25) + log_sigmoid(-2.0)) / 2
    assert losses.generator_loss(fake).item() == pytest.approx(expected, rel=1e-6)
    printed = (log_sigmoid(-0.25) + log_sigmoid(2.0)) / 2
    assert losses.generator_loss(fake, saturating=True).item() == pytest.approx(printed, rel=1e-6)


def test_smoothing_leaves_the_loss_bounded_below_and_makes_certainty_costly():
    fake = torch.full((4,), -50.0)
    by_logit = [
        losses.discriminator_loss(torch.full((4,), x), fake, 0.9) for x in (2.2, 20.0, 80.0)
    ]
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert min(by_logit).item() == pytest.approx(entropy, abs=1e-3)
    assert by_logit[0] < by_logit[1] < by_logit[2]
    assert losses.discriminator_loss(torch.full((4,), 80.0), fake).item() == pytest.approx(0)


@pytest.mark.parametrize("saturating", [False, True])
def test_both_generator_losses_push_towards_real(saturating):
    logits = torch.tensor([-3.0, 0.0, 3.0], requires_grad=True)
    losses.generator_loss(logits, saturating).backward()
    assert (logits.grad < 0).all()
    rejected, accepted = logits.grad[0].abs(), logits.grad[2].abs()
    assert (rejected < accepted) == saturating  # the printed loss is flat where it is needed


def test_losses_stay_finite_at_extreme_logits():
    extreme = torch.tensor([-1e4, 1e4])
    assert torch.isfinite(losses.discriminator_loss(extreme, extreme))
    assert torch.isfinite(losses.generator_loss(extreme))
    assert torch.isfinite(losses.generator_loss(extreme, saturating=True))


def test_accuracy_counts_both_sides_half():
    real, fake = torch.tensor([1.0, 2.0, -1.0, 3.0]), torch.tensor([-1.0, 0.0])
    assert losses.discriminator_accuracy(real, fake) == pytest.approx(0.5 * 0.75 + 0.5)
    assert losses.discriminator_accuracy(torch.zeros(2), torch.ones(2)) == 0


def test_the_wasserstein_loss_of_known_scores():
    """As printed in the paper both sums run over one set, and the loss is 0 whatever the critic."""
    negatives = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    positives = torch.tensor([0.0, 4.0], requires_grad=True)
    loss = losses.wasserstein_loss(negatives, positives)
    loss.backward()
    assert loss.item() == 3 - 2
    assert negatives.grad.tolist() == pytest.approx([1 / 3] * 3)
    assert positives.grad.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("length", [0.25, 1.0, 3.0])
def test_the_penalty_of_a_linear_critic(length):
    noise = rng.torch_generator("penalty")
    w = torch.randn(6, 6, 6, generator=noise, dtype=torch.float64)
    w = (w * (length / w.norm())).requires_grad_()
    positives, negatives = torch.rand(2, 5, 1, 6, 6, 6, generator=noise, dtype=torch.float64)
    u = torch.rand(5, generator=noise, dtype=torch.float64)
    penalty = losses.gradient_penalty(lambda x: (x * w).flatten(1).sum(1), positives, negatives, u)
    assert penalty.item() == pytest.approx((length - 1) ** 2, abs=1e-6)
    (gradient,) = torch.autograd.grad(penalty, w)
    expected = 2 * (length - 1) * w / length
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_penalty_is_of_each_shape_between_its_pair():
    """df/dx of |x|^2 / 2 is x, so that the norms of the interpolates show."""
    noise = rng.torch_generator("pairs")
    positives, negatives = torch.rand(2, 3, 1, 4, 4, 4, generator=noise)
    u = torch.tensor([0.0, 1.0, 0.3])
    found = losses.gradient_penalty(lambda x: x.square().sum() / 2, positives, negatives, u)
    between = [negatives[0], positives[1], 0.3 * positives[2] + 0.7 * negatives[2]]
    expected = sum((x.norm() - 1) ** 2 for x in between) / 3
    torch.testing.assert_close(found, expected)


def test_the_penalty_teaches_the_critic():
    critic, noise = critic_of(), rng.torch_generator("teach")
    positives, negatives = torch.rand(2, 3, 1, 24, 24, 24, generator=noise)
    losses.gradient_penalty(critic, positives, negatives, torch.rand(3, generator=noise)).backward()
    silent = {"head.bias", "norms.3.bias"}  # df/dx does not know what only shifts f
    for name, parameter in critic.named_parameters():
        taught = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert taught == (name not in silent), name


# ---------------------------------------------------------------- random streams and samplers


def test_streams_are_named():
    def draw(*key):
        return torch.rand(4, generator=rng.torch_generator(*key))

    assert torch.equal(draw(0, "a", 1), draw(0, "a", 1))
    assert len({tuple(draw(*k).tolist()) for k in ((0, "a"), (1, "a"), (0, "b"), ("0", "a"))}) == 4
    assert rng.seed_of("a", 1) != rng.seed_of("a", "1")
    assert 0 <= rng.seed_of("x") < 2**63
    same = [rng.numpy_generator("n", 3).random() for _ in range(2)]
    assert same[0] == same[1] != rng.numpy_generator("n", 4).random()


def test_nothing_draws_from_the_global_stream():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    generator_of(GAN24, z_dim=16)
    samplers.sample_generator(generator_of(GAN24, z_dim=16), [1, 2], latent="normal")
    rng.latents([0], 4, "uniform")
    after = torch.random.get_rng_state()
    # torch draws initial weights before `initialise` replaces them; put that aside and compare.
    torch.manual_seed(0)
    for _ in range(2):
        gan3d.Generator(z_dim=16, **GAN24)
    assert torch.equal(after, torch.random.get_rng_state())
    assert not torch.equal(before, after)


def test_latents():
    z = rng.latents([5, 17, 5], 2000, "uniform")
    assert torch.equal(z[0], z[2]) and not torch.equal(z[0], z[1])
    assert torch.equal(rng.latents([17], 2000, "uniform")[0], z[1])
    assert 0 <= z.min() and z.max() <= 1 and abs(z.mean() - 0.5) < 0.02
    normal = rng.latents([0], 20000, "normal")
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03


def test_every_index_once_an_epoch():
    n, batch = 23, 8
    drawn = np.concatenate([rng.batch_indices(s, batch, n, 0, "test") for s in range(46)])
    epochs = drawn[: n * (len(drawn) // n)].reshape(-1, n)
    assert len(epochs) == 16
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    assert (epochs[0] != epochs[1]).any()


def test_batches_larger_than_the_data():
    drawn = rng.batch_indices(3, 10, 4, "test")
    assert drawn.shape == (10,)
    assert np.bincount(drawn, minlength=4).min() >= 2


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_shape_17_is_the_same_whatever_surrounds_it(batch):
    network = generator_of(GAN24, z_dim=16, std=0.2)
    many = samplers.sample_generator(network, list(range(20)), latent="uniform", batch=batch)
    one = samplers.sample_generator(network, [17], latent="uniform")
    few = samplers.sample_generator(network, [400, 17, 3], latent="uniform", batch=2)
    assert many.shape == (20, 24, 24, 24) and many.dtype == np.float32
    np.testing.assert_allclose(many[17], one[0], atol=1e-6)
    np.testing.assert_allclose(few[1], one[0], atol=1e-6)
    assert np.abs(many[17] - many[16]).max() > 1e-3


def test_same_seed_same_shape_other_seed_other_shape():
    network = generator_of(GAN24, z_dim=16, std=0.2)
    draw = [samplers.sample_generator(network, [s], latent="uniform") for s in (3, 3, 4)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_the_network_as_it_was(training):
    network = generator_of(GAN24, z_dim=16).train(training)
    before = {n: t.clone() for n, t in network.state_dict().items()}
    samplers.sample_generator(network, [0, 1, 2], latent="uniform", batch=2)
    assert all(m.training == training for m in network.modules())
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_the_mode_comes_back_after_a_failure():
    network = generator_of(GAN24, z_dim=16).train()
    with pytest.raises(RuntimeError, match="midway"), samplers.evaluating(network):
        assert not network.training
        raise RuntimeError("midway")
    assert network.training


def test_samplers_name_their_shapes_by_seeds():
    for name, function in inspect.getmembers(samplers, inspect.isfunction):
        if name.startswith("sample_"):
            assert "seeds" in inspect.signature(function).parameters, name
