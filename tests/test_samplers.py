"""Samplers against closed forms, an independent optimiser, and what they promise of each shape."""

import math

import pytest
import torch

from lib import rng, samplers
from lib.models import winn3d

NEVER = math.inf


def cubes(n, side=6, *name, dtype=torch.float32):
    """n shapes (n, 1, side, side, side) of N(0, 1)."""
    noise = rng.torch_generator("test", "cubes", *name)
    return torch.randn(n, 1, side, side, side, generator=noise, dtype=dtype)


def normal(x, *name):
    """Draws N(0, 1) like x, one draw after another."""
    noise = rng.torch_generator("test", "normal", *name)
    return lambda: torch.randn(x.shape, generator=noise, dtype=x.dtype)


def quadratic(s):
    """The energy of N(0, s^2): |x|^2 / (2 s^2)."""
    return lambda x: x.square().flatten(1).sum(1) / (2 * s**2)


def total(x):
    """The sum of voxels (B,): a slope of 1 everywhere."""
    return (1.0 * x).flatten(1).sum(1)


def flat(x):
    """A function (B,) without slope."""
    return (0.0 * x).flatten(1).sum(1)


def small_critic():
    critic = winn3d.Critic(side=8, channels=(4, 8, 8))
    winn3d.initialise(critic, 0.3, rng.torch_generator("test", "critic"))
    return critic


class Steps:
    """A function of voxels that keeps every place at which its gradient was asked."""

    def __init__(self, f):
        self.f, self.places = f, []

    def __call__(self, x):
        self.places.append(x.detach().clone())
        return self.f(x)


# ---------------------------------------------------------------- gradients


def cubic(x):
    return x.pow(3).flatten(1).sum(1)


def test_the_gradient_of_a_shape_does_not_know_its_batch():
    x = cubes(4)
    values, gradient = samplers.input_gradient(cubic, x)
    alone = [samplers.input_gradient(cubic, x[k : k + 1])[1] for k in range(4)]
    torch.testing.assert_close(gradient, 3 * x**2)
    torch.testing.assert_close(gradient, torch.cat(alone))
    torch.testing.assert_close(values, cubic(x))
    assert not (values.requires_grad or gradient.requires_grad or x.requires_grad)


def test_the_gradient_is_found_where_gradients_are_off():
    with torch.no_grad():
        _, gradient = samplers.input_gradient(cubic, cubes(2))
    torch.testing.assert_close(gradient, 3 * cubes(2) ** 2)


def test_frozen_parameters_come_back_as_they_were():
    network = torch.nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="midway"), samplers.frozen(network):
        assert not any(p.requires_grad for p in network.parameters())
        raise RuntimeError("midway")
    assert network.weight.requires_grad and not network.bias.requires_grad


@pytest.mark.parametrize("sampler", ["langevin", "adam", "preconditioned"])
def test_sampling_leaves_a_critic_alone(sampler):
    critic, x = small_critic(), cubes(2, 8)
    before = {n: t.clone() for n, t in critic.state_dict().items()}
    start = x.clone()
    with samplers.frozen(critic):
        if sampler == "langevin":
            end = samplers.langevin(critic.energy, x, delta=0.1, steps=3, noise=normal(x))
        elif sampler == "adam":
            end, _ = samplers.adam_ascent(
                critic, x, torch.full((2,), NEVER), lr=0.1, beta1=0.8, beta2=0.9, max_steps=3
            )
        else:
            options = dict(lr=0.02, momentum=0.8, floor=0.2, sigma=0.01, steps=3, box=(-9.0, 9.0))
            end = samplers.preconditioned_langevin(critic.energy, x, noise=normal(x), **options)
    assert torch.equal(x, start) and not torch.equal(end, start)
    assert not end.requires_grad
    assert all(torch.equal(t, before[n]) for n, t in critic.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in critic.parameters())


# ---------------------------------------------------------------- noise


def test_streams_of_shapes_are_their_own():
    keys = [("a", 1), ("a", 2), ("b", 1)]
    together, alone = (samplers.SeededNoise(k, 4, torch.device("cpu")) for k in (keys, keys[1:2]))
    first, second = together(), together(torch.tensor([0, 1]))
    assert first.shape == (3, 1, 4, 4, 4) and second.shape == (2, 1, 4, 4, 4)
    assert torch.equal(alone()[0], first[1]) and torch.equal(alone()[0], second[1])
    drawn = [tuple(x.flatten().tolist()) for x in (*first, *second)]
    assert len(set(drawn)) == 5
    # The third shape stood still meanwhile, so its stream did too.
    again = samplers.SeededNoise(keys[2:], 4, torch.device("cpu"))
    again()
    assert torch.equal(together(torch.tensor([2])), again())


def test_gaussian_noise():
    noise = samplers.gaussian_noise(32, rng.torch_generator("gaussian"))
    assert noise.shape == (1, 32, 32, 32)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize("side", [24, 32])
def test_images_of_a_random_network(side):
    first, same, other = (
        samplers.network_noise(side, rng.torch_generator("network", k)) for k in (0, 0, 1)
    )
    assert first.shape == (1, side, side, side)
    assert first.min() == 0 and first.max() == 1
    assert torch.equal(first, same) and not torch.equal(first, other)
    # Neighbours are more alike than voxels that are far apart.
    near, far = (first[:, k:] - first[:, :-k] for k in (1, side // 2))
    assert near.abs().mean() < 0.5 * far.abs().mean()


# ---------------------------------------------------------------- Langevin dynamics


@pytest.mark.parametrize("delta, s", [(0.1, 0.5), (0.3, 0.4), (1.0, 0.5)])
def test_without_noise_the_chain_contracts_to_the_mean(delta, s):
    x = cubes(2, dtype=torch.float64)
    found = samplers.langevin(quadratic(s), x, delta=delta, steps=4)
    factor = 1 - delta**2 / (2 * s**2)
    torch.testing.assert_close(found, x * factor**4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("delta, steps", [(0.5, 20), (0.3, 40)])
def test_the_stationary_variance_of_the_discretised_chain(delta, steps):
    """Of the autoregression x <- (1 - delta^2 / (2 s^2)) x + delta N(0, 1), not s^2 itself."""
    s, x = 0.5, torch.zeros(40, 1, 10, 10, 10)
    found = samplers.langevin(quadratic(s), x, delta=delta, steps=steps, noise=normal(x))
    expected = s**2 / (1 - delta**2 / (4 * s**2))
    assert found.var().item() == pytest.approx(expected, rel=0.025)
    assert expected > 1.09 * s**2
    assert abs(found.mean().item()) < 0.015


def test_the_chain_goes_downhill():
    energy = quadratic(0.5)
    places = Steps(energy)
    samplers.langevin(places, cubes(3), delta=0.1, steps=6)
    values = torch.stack([energy(x) for x in places.places])
    assert (values.diff(dim=0) < 0).all()


def test_the_box_of_langevin_holds_after_every_step():
    places, start = Steps(quadratic(1.0)), cubes(3)
    options = dict(delta=0.5, steps=5, noise=normal(start))
    end = samplers.langevin(places, start, box=(0.0, 1.0), **options)
    for x in (*places.places[1:], end):
        assert x.min() == 0 and x.max() == 1
    assert samplers.langevin(quadratic(1.0), start, **options).min() < -0.5


# ---------------------------------------------------------------- Adam's ascent


def wavy(x):
    """A smooth function (B,) with hills, of another slope in every voxel."""
    weights = torch.linspace(0.2, 2, x[0].numel(), dtype=x.dtype)
    return (weights * (3 * x.flatten(1)).sin()).sum(1) - x.flatten(1).square().sum(1)


def never(n):
    return torch.full((n,), NEVER)


@pytest.mark.parametrize("betas", [(0.8, 0.999), (0.0, 0.9), (0.8, 0.0), (0.9, 0.99)])
@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
def test_the_ascent_is_adam(betas, box):
    x = cubes(3, dtype=torch.float64)
    climbed = torch.nn.Parameter(x.clone())
    adam = torch.optim.Adam([climbed], lr=0.05, betas=betas, eps=1e-6, maximize=True)
    places = Steps(wavy)
    end, taken = samplers.adam_ascent(
        places,
        x,
        never(3),
        lr=0.05,
        beta1=betas[0],
        beta2=betas[1],
        epsilon=1e-6,
        max_steps=12,
        box=box,
    )
    for place in (*places.places[1:], end):
        adam.zero_grad()
        wavy(climbed).sum().backward()
        adam.step()
        if box is not None:
            climbed.data.clamp_(*box)
        torch.testing.assert_close(place, climbed.data, rtol=1e-9, atol=1e-9)
    assert taken.tolist() == [12, 12, 12]


def test_beta2_of_zero_divides_by_the_last_gradient():
    """As printed: a step has no bound where the gradient vanishes, and is 0 where it always did."""
    options = dict(lr=0.01, beta1=0.8, beta2=0.0, epsilon=1e-8)
    x = torch.tensor([0.995, 0.3, 2.0]).view(3, 1, 1, 1, 1)

    def ramp(x):  # slope 1 below 1, else 0
        return x.clamp(max=1.0).flatten(1).sum(1)

    one, _ = samplers.adam_ascent(ramp, x, never(3), max_steps=1, box=None, **options)
    torch.testing.assert_close((one - x).flatten(), torch.tensor([0.01, 0.01, 0.0]))
    two, _ = samplers.adam_ascent(ramp, x, never(3), max_steps=2, box=None, **options)
    momentum = 0.8 * 0.2 / (1 - 0.8**2)
    assert two[0].item() == pytest.approx(0.01 * momentum / 1e-8, rel=1e-3)
    torch.testing.assert_close((two - one).flatten()[1:], torch.tensor([0.01, 0.0]))
    boxed, _ = samplers.adam_ascent(ramp, x, never(3), max_steps=2, **options)
    assert boxed.flatten().tolist() == pytest.approx([1.0, 0.32, 1.0])


STEP = dict(lr=0.1, beta1=0.0, beta2=0.0)  # of `total`, .1 a voxel


def test_each_shape_stops_at_its_own_threshold():
    x = torch.tensor([0.0, 0.0, 0.0, 5.0]).view(4, 1, 1, 1, 1)
    thresholds = torch.tensor([0.05, 0.25, 0.55, 4.0])
    end, taken = samplers.adam_ascent(
        total, x, thresholds, stop="shape", max_steps=9, box=(0.0, 1.0), **STEP
    )
    assert taken.tolist() == [1, 3, 6, 0]
    assert end.flatten().tolist() == pytest.approx([0.1, 0.3, 0.6, 5.0])
    end, taken = samplers.adam_ascent(total, x, thresholds, stop="shape", max_steps=4, **STEP)
    assert taken.tolist() == [1, 3, 4, 0]
    assert end.flatten().tolist() == pytest.approx([0.1, 0.3, 0.4, 5.0])


def test_a_batch_stops_when_its_mean_reaches_the_mean_threshold():
    x = torch.tensor([0.0, 0.2, 0.4]).view(3, 1, 1, 1, 1)
    thresholds = torch.tensor([0.05, 0.25, 0.95])  # mean .4167, first reached at .2 + 3 * .1
    end, taken = samplers.adam_ascent(total, x, thresholds, stop="batch", max_steps=9, **STEP)
    assert taken.tolist() == [3, 3, 3]
    assert end.flatten().tolist() == pytest.approx([0.3, 0.5, 0.7])
    end, taken = samplers.adam_ascent(total, x, x[:, 0, 0, 0, 0], stop="batch", max_steps=9, **STEP)
    assert taken.tolist() == [0, 0, 0] and torch.equal(end, x)


@pytest.mark.parametrize("sigma", [0.0, 0.02])
def test_a_shape_that_stops_by_itself_does_not_depend_on_its_batch(sigma):
    critic, x = small_critic(), cubes(4, 8).clamp(0, 1)
    f, _ = samplers.input_gradient(critic, x)
    thresholds = f + torch.tensor([-1e-4, 0.05, 0.2, NEVER])  # f of a batch may round otherwise
    options = dict(lr=0.01, beta1=0.8, beta2=0.999, max_steps=12, stop="shape", sigma=sigma)

    def climb(rows):
        noise = samplers.SeededNoise([("alone", r) for r in rows], 8, x.device)
        return samplers.adam_ascent(critic, x[rows], thresholds[rows], noise=noise, **options)

    together, taken = climb([0, 1, 2, 3])
    alone = [climb([r]) for r in range(4)]
    assert taken.tolist() == [int(t) for _, t in alone]
    assert taken[0] == 0 and taken[3] == 12 and 0 < taken[1] < taken[2] < 12
    torch.testing.assert_close(together, torch.cat([y for y, _ in alone]), rtol=0, atol=1e-5)


def test_without_a_stop_the_thresholds_are_not_asked():
    options = dict(lr=0.01, beta1=0.8, beta2=0.999, max_steps=4)
    met = torch.full((3,), -NEVER)
    _, taken = samplers.adam_ascent(wavy, cubes(3), met, **options)
    assert taken.tolist() == [0, 0, 0]

    def asked(values):
        raise AssertionError("a step that waits for the device")

    end, taken = samplers.adam_ascent(wavy, cubes(3), met, stop="never", mean=asked, **options)
    wanted, _ = samplers.adam_ascent(wavy, cubes(3), never(3), **options)
    assert taken.tolist() == [4, 4, 4] and torch.equal(end, wanted)


@pytest.mark.parametrize("stop", ["batch", "shape", "never"])
def test_no_steps_give_the_start(stop):
    x = cubes(3)
    end, taken = samplers.adam_ascent(
        wavy, x, never(3), lr=0.1, beta1=0.8, beta2=0.9, max_steps=0, stop=stop
    )
    assert torch.equal(end, x) and taken.tolist() == [0, 0, 0]


def test_a_concave_function_rises_at_every_step():
    def hill(x):
        return -(x - 0.7).square().flatten(1).sum(1)

    places = Steps(hill)
    x = cubes(3, dtype=torch.float64).clamp(0, 1)
    options = dict(lr=0.005, beta1=0.8, beta2=0.999, max_steps=40)
    end, _ = samplers.adam_ascent(places, x, never(3), **options)
    values = torch.stack([hill(y) for y in (*places.places, end)])
    assert (values.diff(dim=0) > 0).all()
    assert values[-1].mean() > 0.6 * values[0].mean()


def test_the_box_of_the_ascent_holds_after_every_step():
    options = dict(lr=0.2, beta1=0.8, beta2=0.999, max_steps=6)
    places = Steps(wavy)
    end, _ = samplers.adam_ascent(places, cubes(3), never(3), **options)
    for x in (*places.places[1:], end):
        assert x.min() >= 0 and x.max() <= 1
    free, _ = samplers.adam_ascent(wavy, cubes(3), never(3), box=None, **options)
    assert free.min() < 0 and free.max() > 1


def test_noise_is_annealed_to_nothing():
    """Where nothing climbs, T steps of ones add sigma (1 - t / T) each."""
    x = torch.zeros(2, 1, 2, 2, 2, dtype=torch.float64)
    options = dict(lr=0.1, beta1=0.8, beta2=0.999, box=None, max_steps=5)
    places = Steps(flat)
    end, _ = samplers.adam_ascent(
        places, x, never(2), noise=lambda rows: torch.ones_like(x[rows]), sigma=0.5, **options
    )
    added = torch.stack([y[0].mean() for y in (*places.places, end)]).diff()
    torch.testing.assert_close(added, 0.5 * torch.tensor([0.8, 0.6, 0.4, 0.2, 0.0]).double())
    # Without a deviation no noise is drawn.
    end, _ = samplers.adam_ascent(flat, x, never(2), noise=None, **options)
    assert torch.equal(end, x)


def test_noise_is_drawn_for_shapes_that_move():
    drawn = []

    def noise(rows):
        drawn.append(rows.tolist())
        return torch.zeros(len(rows), 1, 1, 1, 1)

    thresholds = torch.tensor([0.05, 0.35, 0.15])
    x = torch.zeros(3, 1, 1, 1, 1)
    options = dict(stop="shape", max_steps=9, noise=noise, sigma=0.1)
    samplers.adam_ascent(total, x, thresholds, **STEP, **options)
    assert drawn == [[0, 1, 2], [1, 2], [1], [1]]


# ---------------------------------------------------------------- preconditioned Langevin dynamics


def descend(energy, x, *, steps, noise=None, sigma=0.0, box=(-9.0, 9.0), floor=0.2):
    return samplers.preconditioned_langevin(
        energy,
        x,
        lr=0.02,
        momentum=0.8,
        floor=floor,
        sigma=sigma,
        steps=steps,
        noise=noise or (lambda: torch.zeros_like(x)),
        box=box,
    )


def test_the_first_steps_of_a_slope():
    """A slope of any size: the running mean grows as 1 - momentum^t, and so does the step."""
    x = torch.zeros(1, 1, 2, 2, 2, dtype=torch.float64)
    for slope in (5.0, -1e-3):
        places = Steps(lambda x, slope=slope: slope * total(x))
        end = descend(places, x, steps=4)
        moved = torch.stack([y.mean() for y in (*places.places, end)]).diff()
        expected = torch.tensor([1 - 0.8**t for t in (1, 2, 3, 4)]).double()
        torch.testing.assert_close(moved, -0.02 * math.copysign(1, slope) * expected)


@pytest.mark.parametrize("floor", [0.2, 0.5])
def test_no_step_is_longer_than_the_floor_allows(floor):
    noise = rng.torch_generator("rough")

    def rough(x):  # another slope at every place, of sizes from 1e-6 to 1
        size = 10 ** (-6 * torch.rand(x.shape, generator=noise, dtype=x.dtype))
        return (size * torch.randn(x.shape, generator=noise, dtype=x.dtype) * x).flatten(1).sum(1)

    places = Steps(rough)
    end = descend(places, cubes(2, dtype=torch.float64), steps=20, floor=floor)
    moved = torch.stack([*places.places, end]).diff(dim=0).abs()
    bound = 0.02 / floor
    assert moved.max() <= bound * (1 + 1e-9)
    assert moved.max() > 0.999 * bound


def test_no_slope_no_step():
    x = cubes(2)
    assert torch.equal(descend(flat, x, steps=3), x)
    ones = descend(flat, x, steps=3, noise=lambda: torch.ones_like(x), sigma=0.1)
    torch.testing.assert_close(ones, x + 0.3)


def test_the_scale_of_the_energy_does_not_matter():
    x, energy = cubes(2, dtype=torch.float64), quadratic(1.0)
    ends = [descend(lambda x, k=k: k * energy(x), x, steps=5) for k in (1e-4, 1.0, 1e4)]
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[2], ends[1])
    assert (energy(ends[1]) < energy(x)).all()


def test_the_box_of_preconditioned_steps_holds_after_every_step():
    places, x = Steps(quadratic(1.0)), cubes(3)
    end = descend(places, x, steps=4, noise=normal(x), sigma=0.5, box=(-0.2, 1.2))
    for x in (*places.places[1:], end):
        assert x.min() == pytest.approx(-0.2) and x.max() == pytest.approx(1.2)
