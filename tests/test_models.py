"""Networks against the papers' sizes; losses by hand; random streams and samplers by contract."""

import inspect
import math

import numpy as np
import pytest
import torch

from lib import losses, rng, samplers
from lib.errors import StudyError
from lib.models import gan3d, nin3d
from lib.train.checkpoint import n_parameters

GAN24 = dict(base=3, channels=(16, 8, 8))


def generator_of(description, z_dim=200, std=0.02):
    network = gan3d.Generator(z_dim=z_dim, **description)
    gan3d.initialise(network, std, rng.torch_generator("test", "generator"))
    return network


def discriminator_of(description, **options):
    network = gan3d.Discriminator(**description, **options)
    gan3d.initialise(network, 0.02, rng.torch_generator("test", "discriminator"))
    return network


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


def test_where_normalisation_stands():
    def normalised(blocks):
        return [any(isinstance(m, torch.nn.BatchNorm3d) for m in block) for block in blocks]

    assert normalised(discriminator_of(gan3d.GAN64_DISCRIMINATOR).blocks) == [0, 1, 1, 1]
    first = discriminator_of(gan3d.GAN64_DISCRIMINATOR, norm_first=True)
    assert normalised(first.blocks) == [1, 1, 1, 1]
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
    torch.nn.functional.cross_entropy(judge(x), torch.arange(8) % 4).backward()
    for network in (g, d, judge):
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
