"""Attacks: closed forms on linear classifiers, budgets, worst cases, and a masked toy model."""

import itertools

import foolbox
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from lib import attacks, rng
from lib.errors import StudyError
from lib.models import nin3d

SIDE = 6


def generators(n, *key):
    return [rng.torch_generator("test", *key, k) for k in range(n)]


@pytest.fixture
def x():
    """Six binary shapes (6, 1, 6, 6, 6)."""
    grids = np.random.default_rng(0).random((6, 1, SIDE, SIDE, SIDE)) < 0.4
    return torch.from_numpy(grids).float()


@pytest.fixture
def y():
    return torch.tensor([0, 1, 0, 1, 0, 1])


class Linear(nn.Module):
    """Logits (B, k) = W x + b; ``bend`` is applied to each voxel first."""

    def __init__(self, n_classes=2, seed=0, side=SIDE, scale=0.05, bend=lambda x: x):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(scale * torch.randn(n_classes, side**3, generator=draw))
        self.b = nn.Parameter(torch.zeros(n_classes))
        self.bend = bend

    def forward(self, x):
        return self.bend(x).flatten(1) @ self.w.T + self.b


@pytest.fixture
def network():
    """A small convolutional classifier of ten classes."""
    torch.manual_seed(3)
    layers = [nn.Conv3d(1, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4 * 4**3, 10)]
    return nn.Sequential(*layers).eval()


def deviation(found, x):
    return (found - x).abs().flatten(1).amax(1)


# ---------------------------------------------------------------- definitions


def test_adversarial_error_and_correction_rate_by_hand():
    a = torch.tensor([True, True, True, False, True, False, False, False])
    b = torch.tensor([True, False, False, True, True, False, True, False])
    assert attacks.adversarial_error(a) == 4 / 8
    assert attacks.correction_rate(a, b) == 1 - 2 / 4
    assert attacks.correction_rate(b, a) == 1 - 2 / 4
    assert attacks.correction_rate(a, a) == 0 and attacks.correction_rate(a, ~a) == 1


def test_no_error_leaves_nothing_to_correct():
    none = torch.zeros(5, dtype=torch.bool)
    assert np.isnan(attacks.correction_rate(none, ~none))
    assert np.isnan(attacks.adversarial_error(none[:0]))
    with pytest.raises(StudyError, match="5 answers of A, 4 of B"):
        attacks.correction_rate(none, none[:4])


def test_margin_is_positive_exactly_for_errors():
    logits = torch.tensor([[2.0, 1.0, 0.5], [2.0, 1.0, 3.5]])
    assert attacks.margin(logits, torch.tensor([0, 1])).tolist() == [-1.0, 2.5]


# ---------------------------------------------------------------- closed forms


def test_fgsm_of_a_linear_classifier(x, y):
    f = Linear()
    other = f.w[1 - y] - f.w[y]
    expected = (x + 0.1 * other.sign().view_as(x)).clamp(0, 1)
    torch.testing.assert_close(attacks.fgsm(f, x, y, 0.1), expected)


def test_fgsm_of_one_shape_is_fgsm_in_a_batch(x, y, network):
    alone = torch.cat([attacks.fgsm(network, x[k : k + 1], y[k : k + 1], 0.1) for k in range(6)])
    assert torch.equal(alone, attacks.fgsm(network, x, y, 0.1))


def test_both_readings_of_iterative_fgsm(x, y):
    """On a linear classifier: n steps of eps reach n eps; in the ball they stop at eps."""
    f = Linear()
    direction = (f.w[1 - y] - f.w[y]).sign().view_as(x)
    free = attacks.iterative_fgsm(f, x, y, step=0.01, n_steps=5)
    bound = attacks.iterative_fgsm(f, x, y, step=0.01 * 1.25 / 5, n_steps=5, ball=0.01)
    torch.testing.assert_close(free, (x + 0.05 * direction).clamp(0, 1))
    torch.testing.assert_close(bound, (x + 0.01 * direction).clamp(0, 1))


def test_steps_can_go_on_from_where_others_ended(x, y, network):
    five = attacks.iterative_fgsm(network, x, y, 0.01, 5)
    ten = attacks.iterative_fgsm(network, x, y, 0.01, 10)
    assert torch.equal(attacks.iterative_fgsm(network, x, y, 0.01, 5, start=five), ten)
    far = attacks.iterative_fgsm(network, x, y, 0.01, 1, ball=0.02, start=1 - x)
    assert deviation(far, x).max() <= 0.02 + 1e-6


def test_one_step_in_the_ball_is_fgsm(x, y, network):
    one = attacks.iterative_fgsm(network, x, y, step=0.05, n_steps=1, ball=0.05)
    assert torch.equal(one, attacks.fgsm(network, x, y, 0.05))


def test_pgd_reaches_the_worst_corner_of_a_linear_classifier(x, y):
    """An offset by class keeps every shape right, so that each goes to the end."""
    f = Linear()
    safe = lambda z: f(z) + 6 * nn.functional.one_hot(y, 2)  # noqa: E731
    direction = (f.w[1 - y] - f.w[y]).sign().view_as(x)
    found = attacks.pgd(safe, x, y, 0.1, 0.05, 10, 2, generators(6))
    assert not attacks.misclassified(safe, found, y).any()
    torch.testing.assert_close(found, (x + 0.1 * direction).clamp(0, 1))


def test_greedy_flips_are_optimal_for_a_linear_classifier(x, y):
    """Against all subsets of a small grid, and for one flip at a time as for all at once."""
    f = Linear(side=2)
    small = x[..., :2, :2, :2].contiguous()
    for counts in ((1, 2, 3, 8), (3, 8), (8,)):
        order = attacks.greedy_flips(f, small, y, counts)
        for k in range(9):
            found = attacks.margin(f(attacks.flip(small, order[:, :k])), y)
            best = torch.full_like(found, -torch.inf)
            for chosen in itertools.combinations(range(8), k):
                tried = torch.tensor(chosen).long().expand(6, -1)
                best = best.maximum(attacks.margin(f(attacks.flip(small, tried)), y))
            # The attack may leave flips out, so it can only be better than exactly k flips.
            assert (found >= best - 1e-5).all()


def test_flips_without_gain_are_left_out(x, y):
    f = Linear(side=SIDE)
    order = attacks.greedy_flips(f, x, y, (SIDE**3,))
    gain = ((f.w[1 - y] - f.w[y]) * (1 - 2 * x.flatten(1))) > 0
    assert ((order >= 0).sum(1) == gain.sum(1)).all()


def test_the_surface_has_the_voxels_beside_the_border():
    solid = torch.zeros(1, 1, 7, 7, 7)
    solid[..., 2:5, 2:5, 2:5] = 1
    found = attacks.surface(solid)
    grid = solid[0, 0].bool().numpy()
    inside = grid & ~ndimage.binary_erosion(grid)
    outside = ndimage.binary_dilation(grid) & ~grid
    assert (found[0, 0].numpy() == (inside | outside)).all()
    full = torch.ones(1, 1, 3, 3, 3)
    assert int(attacks.surface(full).sum()) == 26  # outside of the grid is empty


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("eps", [0.005, 0.2])
def test_gradient_attacks_stay_in_ball_and_box(x, y, network, eps):
    keys = generators(6)
    found = [
        attacks.fgsm(network, x, y, eps),
        attacks.iterative_fgsm(network, x, y, eps, 4, ball=eps),
        attacks.pgd(network, x, y, eps, eps / 2, 4, 2, keys),
        attacks.pgd(network, x, y, eps, eps / 2, 4, 1, keys, random_start=False),
        attacks.pgd(network, x, y, eps, eps / 2, 4, 1, keys, loss=attacks.margin),
        attacks.square_attack(network, x, y, eps, 20, keys),
    ]
    for one in found:
        assert deviation(one, x).max() <= eps + 1e-6
        assert one.min() >= 0 and one.max() <= 1
    free = attacks.iterative_fgsm(network, x, y, eps, 4)
    assert deviation(free, x).max() <= 4 * eps + 1e-6


def test_flips_keep_the_grid_binary_and_within_the_count(x, y, network):
    counts = (1, 2, 5, 9)
    for order in (
        attacks.greedy_flips(network, x, y, counts),
        attacks.random_flips(x, 9, generators(6)),
    ):
        for k in counts:
            found = attacks.flip(x, order[:, :k])
            assert set(found.unique().tolist()) <= {0.0, 1.0}
            assert ((found != x).flatten(1).sum(1) == (order[:, :k] >= 0).sum(1)).all()
        for line in order.tolist():
            chosen = [v for v in line if v >= 0]
            assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize("attack", ["greedy", "random"])
def test_surface_flips_stay_on_the_surface(x, y, network, attack):
    if attack == "greedy":
        order = attacks.greedy_flips(network, x, y, (1, 5, 20), on_surface=True)
    else:
        order = attacks.random_flips(x, 20, generators(6), on_surface=True)
    changed = attacks.flip(x, order) != x
    assert changed.any() and not (changed & ~attacks.surface(x)).any()


def test_a_tiny_surface_gives_fewer_random_flips():
    single = torch.zeros(1, 1, SIDE, SIDE, SIDE)
    single[..., 2, 2, 2] = 1
    order = attacks.random_flips(single, 30, generators(1), on_surface=True)
    assert int((order >= 0).sum()) == 7


def test_flips_refuse_grids_that_are_not_binary(x, y, network):
    with pytest.raises(StudyError, match="binary"):
        attacks.greedy_flips(network, x * 0.5, y, (1,))
    with pytest.raises(StudyError, match="binary"):
        attacks.random_flips(x * 0.5, 1, generators(6))


def test_inputs_and_weights_are_left_alone(x, y, network):
    before, weights = x.clone(), [w.clone() for w in network.parameters()]
    keys = generators(6)
    attacks.fgsm(network, x, y, 0.1)
    attacks.iterative_fgsm(network, x, y, 0.1, 2)
    attacks.pgd(network, x, y, 0.1, 0.05, 2, 1, keys)
    attacks.flip(x, attacks.greedy_flips(network, x, y, (1, 3)))
    attacks.remove_components(network, x, y, 0.2, 2, keys)
    attacks.drop_slices(network, x, y, 1)
    attacks.square_attack(network, x, y, 0.3, 5, keys)
    attacks.rays(network, x, y, 5)
    attacks.loss_surface(network, x, y, [0.0, 0.1], keys)
    assert torch.equal(x, before)
    for now, then in zip(network.parameters(), weights, strict=True):
        assert torch.equal(now, then) and now.grad is None


# ---------------------------------------------------------------- parts


def test_a_removed_part_is_connected_and_of_its_share():
    grid = np.zeros((8, 8, 8), np.float32)
    grid[1:7, 1:3, 1:3] = 1  # 24 voxels in a row
    x, y = torch.from_numpy(grid)[None, None], torch.tensor([0])
    occupied = lambda z: torch.stack([z.flatten(1).sum(1) - 23.5, torch.zeros(len(z))], 1)  # noqa: E731
    found = attacks.remove_components(occupied, x, y, 0.25, 3, generators(1))
    gone = ((x - found)[0, 0] > 0).numpy()
    assert gone.sum() == 6 and not ((found - x) > 0).any()
    assert ndimage.label(gone)[1] == 1


def test_a_small_component_goes_whole():
    x = torch.zeros(1, 1, 6, 6, 6)
    x[..., 0, 0, 0] = 1
    x[..., 3:6, 3:6, 3:6] = 1
    part = attacks._nearest_part(x > 0.5, torch.zeros_like(x, dtype=torch.bool), torch.tensor([4]))
    assert not part.any()
    start = torch.zeros_like(x, dtype=torch.bool)
    start[..., 0, 0, 0] = True
    part = attacks._nearest_part(x > 0.5, start, torch.tensor([4]))
    assert int(part.sum()) == 1 and part[..., 0, 0, 0].all()


def test_steps_through_the_object_are_counted():
    """A U of one voxel's width: the other arm is near in space and far along the object."""
    x = torch.zeros(1, 1, 5, 5, 5)
    x[..., 0, 0, :] = x[..., 2, 0, :] = x[..., 1, 0, 0] = 1
    start = torch.zeros_like(x, dtype=torch.bool)
    start[..., 0, 0, 4] = True
    part = attacks._nearest_part(x > 0.5, start, torch.tensor([6]))
    assert part[0, 0, 0, 0].all() and part[0, 0, 1, 0, 0] and not part[0, 0, 2, 0].any()


def test_empty_grids_pass_through(network):
    x, y = torch.zeros(2, 1, SIDE, SIDE, SIDE), torch.tensor([0, 1])
    assert torch.equal(attacks.remove_components(network, x, y, 0.2, 2, generators(2)), x)
    assert torch.equal(attacks.drop_slices(network, x, y, 2), x)
    assert (attacks.random_flips(x, 3, generators(2), on_surface=True) == -1).all()


def test_dropped_slices_are_the_worst_place():
    """A classifier that looks at one slice falls when that slice goes, and at no other."""
    x, y = torch.ones(1, 1, 6, 6, 6), torch.tensor([0])
    looks = lambda z: torch.stack([z[:, 0, :, 4].sum((1, 2)), torch.ones(len(z))], 1)  # noqa: E731
    found = attacks.drop_slices(looks, x, y, 1)
    assert not found[0, 0, :, 4].any() and int(found.sum()) == 180
    blind = lambda z: torch.stack([torch.ones(len(z)), torch.zeros(len(z))], 1)  # noqa: E731
    assert torch.equal(attacks.drop_slices(blind, x, y, 1), x)


# ---------------------------------------------------------------- worst cases


def test_the_error_of_pgd_grows_with_eps_and_restarts(x, network):
    with torch.no_grad():
        y = network(x).argmax(1)
    errors = []
    for eps in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        found = attacks.pgd(network, x, y, eps, eps / 4, 10, 3, generators(6))
        errors.append(attacks.misclassified(network, found, y).float().mean().item())
    assert errors[0] == 0 and errors[-1] == 1 and errors == sorted(errors)
    margins = [
        attacks.margin(
            network(attacks.pgd(network, x, y, 0.01, 0.005, 3, r, generators(6))), y
        ).detach()
        for r in (1, 2, 4)
    ]
    assert (margins[1] >= margins[0]).all() and (margins[2] >= margins[1]).all()


def test_no_worst_case_is_milder_than_the_untouched_shape(x, y, network):
    wrong = attacks.misclassified(network, x, y)
    assert wrong.any()
    keys = generators(6)
    for found in (
        attacks.pgd(network, x, y, 0.05, 0.02, 3, 1, keys),
        attacks.square_attack(network, x, y, 0.05, 5, keys),
        attacks.rays(network, x, y, 5),
        attacks.remove_components(network, x, y, 0.2, 2, keys),
        attacks.drop_slices(network, x, y, 1),
    ):
        assert (attacks.misclassified(network, found, y) | ~wrong).all()


def test_more_flips_never_repair(x, network):
    with torch.no_grad():
        y = network(x).argmax(1)
    counts = (1, 2, 4, 8, 16, 32)
    order = attacks.greedy_flips(network, x, y, counts)
    fooled = attacks.fooled_within(network, x, y, order, counts)
    assert (fooled[:, 1:] >= fooled[:, :-1]).all() and fooled[:, -1].all()
    first = attacks.misclassified(network, attacks.flip(x, order[:, :1]), y)
    assert torch.equal(fooled[:, 0], first)


def test_rays_finds_the_radius_of_a_linear_classifier():
    """The nearest point in the largest change of a voxel: margin over the sum of |weights|."""
    w = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5, -1.0, 2.0, -0.5])
    f = lambda z: torch.stack([torch.zeros(len(z)), (z - 0.5).flatten(1) @ w - 1.15], 1)  # noqa: E731
    x, y = torch.full((1, 1, 2, 2, 2), 0.5), torch.tensor([0])
    found = attacks.rays(f, x, y, 60)
    assert attacks.misclassified(f, found, y).all()
    assert deviation(found, x).item() == pytest.approx(1.15 / w.abs().sum().item(), abs=2e-3)


# ---------------------------------------------------------------- seeds


def test_random_attacks_repeat_by_seed_and_ignore_the_batch(x, network):
    with torch.no_grad():
        y = network(x).argmax(1)

    def run(rows, key):
        g = [generators(6, key)[r] for r in rows]
        a, b = x[rows], y[rows]
        order = attacks.random_flips(a, 9, g)
        found = [
            attacks.pgd(network, a, b, 0.02, 0.01, 3, 2, g),
            attacks.square_attack(network, a, b, 0.05, 15, g),
            attacks.remove_components(network, a, b, 0.2, 3, g),
            attacks.flip(a, order),
            attacks.loss_surface(network, a, b, [0.0, 0.3], g),
        ]
        return [one.detach() for one in found]

    whole, again, other = run(range(6), "a"), run(range(6), "a"), run(range(6), "b")
    parts = [torch.cat(p) for p in zip(run([0, 1], "a"), run([2, 3, 4, 5], "a"), strict=True)]
    for k, one in enumerate(whole):
        assert torch.equal(one, again[k]) and not torch.equal(one, other[k])
        torch.testing.assert_close(one, parts[k])


# ---------------------------------------------------------------- masked gradients


@pytest.fixture
def masked(x):
    """A classifier that rounds its input: no gradient at all, and easy to fool all the same."""
    plain = Linear(seed=5)
    steps = Linear(seed=5, bend=lambda z: (z * 8).round() / 8)
    with torch.no_grad():
        y = plain(x).argmax(1)
    return plain, steps, y


def test_a_masked_model_resists_gradients_and_nothing_else(x, masked):
    plain, steps, y = masked
    sizes, zeros = attacks.gradient_sizes(steps, x, y)
    assert (sizes == 0).all() and (zeros == 1).all()
    eps = 0.3
    error = lambda found: attacks.adversarial_error(attacks.misclassified(steps, found, y))  # noqa: E731
    assert error(attacks.fgsm(steps, x, y, eps)) == 0
    by_search = error(attacks.square_attack(steps, x, y, eps, 200, generators(6)))
    by_transfer = error(attacks.fgsm(plain, x, y, eps))
    by_answers = error(attacks.rays(steps, x, y, 60))
    assert by_transfer == 1 and by_search > 0.5 and by_answers > 0.5


def test_a_saturated_cross_entropy_hides_what_the_margin_shows(x):
    """Logits a thousand times larger: the cross entropy has no gradient left in fp32."""
    f = Linear(seed=5, scale=1e4)
    with torch.no_grad():
        y = f(x).argmax(1)
    found = attacks.pgd(f, x, y, 0.3, 0.1, 5, 1, generators(6), random_start=False)
    by_margin = attacks.pgd(
        f, x, y, 0.3, 0.1, 5, 1, generators(6), random_start=False, loss=attacks.margin
    )
    assert not attacks.misclassified(f, found, y).any()
    assert attacks.misclassified(f, by_margin, y).all()


def test_the_loss_surface_starts_at_the_shape_and_climbs_along_the_gradient(x, y, network):
    extents = [0.0, 0.02, 0.05]
    found = attacks.loss_surface(network, x, y, extents, generators(6)).detach()
    here = attacks.surprise(network(x), y).detach()
    assert found.shape == (6, 3, 3)
    torch.testing.assert_close(found[:, 0, 0], here)
    along = attacks.surprise(network(attacks.fgsm(network, x, y, 0.05)), y).detach()
    torch.testing.assert_close(found[:, 2, 0], along)


# ---------------------------------------------------------------- the study's own network


def test_the_judges_network_can_be_attacked():
    torch.manual_seed(0)
    f = nin3d.Nin3d(n_classes=10, widths=(4, 8, 8), hidden=8).eval()
    x = (torch.rand(3, 1, 30, 30, 30) < 0.2).float()
    with torch.no_grad():
        y = f(x).argmax(1)
    found = attacks.pgd(f, x, y, 0.3, 0.05, 10, 1, generators(3))
    assert (attacks.margin(f(found), y) > attacks.margin(f(x), y)).all()
    order = attacks.greedy_flips(f, x, y, (1, 10))
    gain = attacks.margin(f(attacks.flip(x, order)), y) - attacks.margin(f(x), y)
    assert (gain > 0).all()


def test_fgsm_and_pgd_agree_with_foolbox(x, y, network):
    model = foolbox.PyTorchModel(network, bounds=(0, 1))
    for eps in (0.005, 0.1):
        theirs = foolbox.attacks.LinfFastGradientAttack(random_start=False)
        raw, _, _ = theirs(model, x, y, epsilons=eps)
        torch.testing.assert_close(attacks.fgsm(network, x, y, eps), raw)
        theirs = foolbox.attacks.LinfPGD(abs_stepsize=eps / 2, steps=4, random_start=False)
        raw, _, fooled = theirs(model, x, y, epsilons=eps)
        ours = attacks.iterative_fgsm(network, x, y, eps / 2, 4, ball=eps)
        torch.testing.assert_close(ours, raw)
        # PGD leaves a shape at its first wrong answer; which ones are fooled must not differ.
        ends = attacks.pgd(network, x, y, eps, eps / 2, 4, 1, (), random_start=False)
        assert torch.equal(network(ends).argmax(1) != y, fooled)
