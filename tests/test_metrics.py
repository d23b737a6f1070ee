"""Every metric against an independent implementation or a closed form, and its convention."""

import contextlib
import io
import itertools

import numpy as np
import prdc
import pytest
import scipy.linalg
import scipy.stats
import sklearn.metrics.pairwise

from lib import metrics
from lib.errors import StudyError


def rng(seed=0):
    return np.random.default_rng(seed)


def pack(grids):
    return np.packbits(grids.reshape(len(grids), -1), axis=1)


def random_packed(n, seed, occupancy=0.3, side=6):
    return pack(rng(seed).random((n, side, side, side)) < occupancy)


def tight_and_wide():
    """A wide real set and a generated cluster in one corner of it, as features."""
    return rng(1).normal(0, 3, (60, 4)), rng(2).normal(1, 0.1, (50, 4))


def dense_frechet(x, y):
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(c1 + c2 - 2 * root)


# Frechet distance


@pytest.mark.parametrize(
    ("n", "m", "d"), [(300, 500, 8), (40, 60, 50), (30, 20, 90), (200, 20, 60)]
)
def test_frechet_is_the_dense_formula(n, m, d):
    mix = rng(3).normal(size=(d, d)) / np.sqrt(d)
    x, y = rng(4).normal(size=(n, d)) @ mix, 0.3 + 1.5 * rng(5).normal(size=(m, d))
    assert metrics.frechet_distance(x, y) == pytest.approx(dense_frechet(x, y), rel=1e-6)


def test_frechet_of_equal_covariances_is_the_distance_of_the_means():
    x, shift = rng(0).normal(size=(50, 200)), rng(1).normal(size=200)
    assert metrics.frechet_distance(x, x + shift) == pytest.approx(np.sum(shift**2), rel=1e-9)


def test_frechet_of_scaled_data_is_exact():
    x = rng(0).normal(size=(40, 7))
    x -= x.mean(axis=0)
    trace = np.trace(np.cov(x, rowvar=False))  # (2 - 1)^2 Tr C
    assert metrics.frechet_distance(x, 2 * x) == pytest.approx(trace, rel=1e-9)


@pytest.mark.parametrize("shape", [(30, 300), (300, 30), (2, 5)])
def test_frechet_of_a_set_with_itself_is_zero_and_order_does_not_matter(shape):
    x, y = rng(0).normal(5, 2, shape), rng(1).normal(4, 1, shape)
    scale = np.trace(np.cov(x, rowvar=False))
    assert 0 <= metrics.frechet_distance(x, x) < 1e-6 * scale
    value = metrics.frechet_distance(x, y)
    assert metrics.frechet_distance(y, x[::-1]) == pytest.approx(value, rel=1e-9)


# Kernel distance


def test_kernel_is_the_mean_over_pairs():
    x, y = rng(0).normal(size=(21, 6)), rng(1).normal(0.5, 1, (17, 6))
    kernel = sklearn.metrics.pairwise.polynomial_kernel(np.vstack([x, y]), degree=3)  # 1/d, 1
    within_x = np.mean([kernel[i, j] for i, j in itertools.permutations(range(21), 2)])
    within_y = np.mean([kernel[i, j] for i, j in itertools.permutations(range(21, 38), 2)])
    expected = within_x + within_y - 2 * kernel[:21, 21:].mean()
    assert metrics.kernel_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert metrics.kernel_distance(y[::-1], x) == pytest.approx(expected, rel=1e-10)


def test_kernel_is_unbiased():
    draws = [
        metrics.kernel_distance(*np.split(rng(s).normal(1, 1, (30, 5)), 2)) for s in range(2000)
    ]
    error = np.std(draws, ddof=1) / np.sqrt(len(draws))
    assert abs(np.mean(draws)) < 3 * error
    assert min(draws) < 0 < max(draws)
    # The biased form keeps the diagonals, and would be off by far more than the error allowed.
    diagonal = np.mean([(v @ v / 5 + 1) ** 3 for v in rng(0).normal(1, 1, (99, 5))])
    assert diagonal / 15 > 9 * error


def test_overlap_distance_is_its_definition():
    a, b = random_packed(7, 1), random_packed(5, 2, occupancy=0.6)
    k = metrics.iou_matrix(np.concatenate([a, b]), np.concatenate([a, b])).astype(float)
    within_a = np.mean([k[i, j] for i, j in itertools.permutations(range(7), 2)])
    within_b = np.mean([k[i, j] for i, j in itertools.permutations(range(7, 12), 2)])
    expected = within_a + within_b - 2 * k[:7, 7:].mean()
    assert metrics.overlap_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert metrics.overlap_distance(b[::-1], a) == pytest.approx(expected, rel=1e-6)
    assert expected > 0.05


def test_overlap_distance_closed_forms():
    """Empty grids are alike and meet nothing; halves that share a half overlap by a third."""
    empty, full = pack(np.zeros((3, 4, 4, 4), bool)), pack(np.ones((4, 4, 4, 4), bool))
    assert metrics.overlap_distance(empty, full) == 2
    assert metrics.overlap_distance(full, full) == 0
    halves = np.zeros((2, 4, 4, 4), bool)
    halves[0, :2], halves[1, 1:3] = True, True
    # Within: 1/3; of two full grids: 1; across: 1/2.
    assert metrics.overlap_distance(pack(halves), full) == pytest.approx(1 / 3 + 1 - 1)


def test_overlap_is_a_positive_definite_kernel_and_its_distance_unbiased():
    grids = random_packed(40, 3)
    assert np.linalg.eigvalsh(metrics.iou_matrix(grids, grids).astype(float)).min() > 0
    draws = [
        metrics.overlap_distance(random_packed(6, 2 * s), random_packed(5, 2 * s + 1))
        for s in range(400)
    ]
    assert abs(np.mean(draws)) < 3 * np.std(draws, ddof=1) / np.sqrt(len(draws))
    assert min(draws) < 0 < max(draws)


# Inception score and class probability


def test_inception_score_closed_forms():
    one_hot = np.eye(10)[np.arange(1000) % 10]
    constant = np.tile(rng(0).dirichlet(np.ones(10)), (50, 1))
    assert metrics.inception_score(one_hot, 1, rng())[0] == pytest.approx(10, rel=1e-12)
    assert metrics.inception_score(constant, 5, rng()) == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_is_the_formula_over_splits():
    p = rng(0).dirichlet(np.full(4, 0.5), 23)
    scores = []
    for rows in np.array_split(rng(7).permutation(23), 3):
        q, total = p[rows], 0.0
        for row in q:
            total += sum(v * np.log(v / w) for v, w in zip(row, q.mean(0), strict=True))
        scores.append(np.exp(total / len(q)))
    mean, std = metrics.inception_score(p, 3, rng(7))
    assert mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert std == pytest.approx(np.std(scores, ddof=1), rel=1e-9)
    assert (mean, std) == metrics.inception_score(p, 3, rng(7))
    assert (mean, std) != metrics.inception_score(p, 3, rng(8))


def test_inception_score_of_one_split_ignores_order_and_has_no_spread():
    p = rng(0).dirichlet(np.ones(5), 30).astype(np.float32)
    mean, std = metrics.inception_score(p, 1, rng(0))
    assert np.isnan(std) and 1 <= mean <= 5
    assert metrics.inception_score(p[::-1], 1, rng(9))[0] == pytest.approx(mean, rel=1e-9)


def test_class_probability_is_a_column_mean():
    p = np.array([[0.2, 0.8, 0.0], [0.6, 0.1, 0.3]])
    found = [metrics.class_probability(p, k) for k in range(3)]
    assert [e.value for e in found] == pytest.approx([0.4, 0.45, 0.15])
    # Two shapes: the half width is t(.975, 1) * |a - b| / 2 = 12.706 * .2, cut at 0 and 1.
    assert found[0][1:] == (0, 1)
    many = np.array([[0.5, 0.5], [0.6, 0.4], [0.4, 0.6], [0.5, 0.5]])
    half = 3.18245 * np.std(many[:, 0], ddof=1) / 2
    assert metrics.class_probability(many, 0) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


# Precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("repeats", [False, True])
def test_prdc_is_the_package(k, repeats):
    real, generated = rng(0).normal(size=(60, 8)), rng(1).normal(0.3, 0.8, (45, 8))
    if repeats:  # whole numbers: exact ties, and copies across the sets
        real, generated = np.round(real[:, :2]), np.round(generated[:, :2])
    with contextlib.redirect_stdout(io.StringIO()):
        expected = prdc.compute_prdc(real, generated, k)
    ours = metrics.precision_recall_density_coverage(real, generated, k)
    assert ours == pytest.approx({key: float(v) for key, v in expected.items()}, rel=1e-12)


def test_prdc_direction():
    real, generated = tight_and_wide()
    value = metrics.precision_recall_density_coverage(real, generated, 5)
    swapped = metrics.precision_recall_density_coverage(generated, real, 5)
    assert value["precision"] > 0.9 and value["recall"] < 0.1
    assert value["density"] > 0.9 and value["coverage"] < 0.5
    assert swapped["precision"] == value["recall"] and swapped["recall"] == value["precision"]
    assert swapped["density"] < 0.1 and swapped["coverage"] < 0.1


def test_prdc_of_copies_and_of_distant_sets():
    real = rng(0).normal(size=(40, 16))
    same = metrics.precision_recall_density_coverage(real, real[rng(1).permutation(40)], 3)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    far = metrics.precision_recall_density_coverage(real, real + 100, 3)
    assert set(far.values()) == {0.0}


def test_prdc_counts_strictly():
    # The generated 2 lies exactly on the ball of radius 1 round the real 1: outside.
    real, generated = np.array([[0.0], [1.0]]), np.array([[2.0], [9.0]])
    assert metrics.precision_recall_density_coverage(real, generated, 1)["precision"] == 0


def test_prdc_of_copies_does_not_hang_on_rounding():
    # A copy of a k-th neighbour lies on a ball's edge. In one dimension the edges are countable.
    real = 1 / 3 + np.cumsum(rng(0).integers(1, 9, 40))[:, None] / 7
    generated = real[rng(1).permutation(40)[:15]]
    exact = np.round((real - real[0]) * 7), np.round((generated - real[0]) * 7)
    for k in (1, 2, 4):
        value = metrics.precision_recall_density_coverage(real, generated, k)
        assert value == metrics.precision_recall_density_coverage(*exact, k)


# Neighbours


def test_iou_is_a_loop_over_pairs():
    a, b = rng(0).random((7, 5, 5, 5)) < 0.3, rng(1).random((9, 5, 5, 5)) < 0.5
    a[2], b[4] = False, False
    a[:, :2] = False  # bytes empty throughout one set
    expected = [[1.0 if not (p | q).any() else (p & q).sum() / (p | q).sum() for q in b] for p in a]
    iou = metrics.iou_matrix(pack(a), pack(b))
    assert iou.dtype == np.float32
    np.testing.assert_array_equal(iou, np.float32(expected))
    assert iou[2, 4] == 1
    np.testing.assert_array_equal(iou, metrics.iou_matrix(pack(b), pack(a)).T)


@pytest.mark.parametrize("block", [1, 4, 100])
def test_blocks_do_not_change_results(block):
    a, b = random_packed(13, 0), random_packed(11, 1)
    np.testing.assert_array_equal(metrics.iou_matrix(a, b, block), metrics.iou_matrix(a, b))
    np.testing.assert_array_equal(metrics.nearest_by_iou(a, b, block), metrics.nearest_by_iou(a, b))
    x, y = rng(0).normal(size=(13, 6)), rng(1).normal(size=(11, 6))
    np.testing.assert_allclose(
        metrics.feature_distances(x, y, block), metrics.feature_distances(x, y), rtol=1e-12
    )
    index, distance = metrics.nearest_by_feature(x, y, block)
    np.testing.assert_array_equal(index, metrics.nearest_by_feature(x, y)[0])
    np.testing.assert_allclose(distance, metrics.nearest_by_feature(x, y)[1], rtol=1e-12)


def test_nearest_by_iou_goes_from_queries_to_database():
    database = random_packed(20, 0)
    order = rng(3).permutation(20)[:6]
    index, iou = metrics.nearest_by_iou(database[order], database)
    np.testing.assert_array_equal(index, order)
    np.testing.assert_array_equal(iou, 1)
    index, iou = metrics.nearest_by_iou(database, database[order])
    assert index.shape == (20,) and index.max() < 6 and (iou == 1).sum() == 6
    np.testing.assert_array_equal(iou, metrics.iou_matrix(database, database[order]).max(axis=1))
    assert metrics.nearest_by_iou(database[:1], database[[0, 0]])[0] == 0


def test_feature_distances_are_scipys_and_copies_are_at_zero():
    a = rng(0).normal(1000, 1, (30, 40))  # far from the origin: cancellation if done carelessly
    b = np.vstack([rng(1).normal(1000, 1, (20, 40)), a[5], a[5] + 1e-7])
    ours, reference = metrics.feature_distances(a, b), scipy.spatial.distance.cdist(a, b)
    np.testing.assert_allclose(ours, reference, rtol=1e-9)
    assert ours[5, 20] == 0
    index, distance = metrics.nearest_by_feature(a, b)
    np.testing.assert_array_equal(index, reference.argmin(axis=1))
    np.testing.assert_allclose(distance, reference.min(axis=1), rtol=1e-9)


# Sets


def test_set_measures_by_hand():
    distances = np.array([[1.0, 4.0, 2.0], [3.0, 5.0, 1.0]])  # two real, three generated
    assert metrics.minimum_matching_distance(distances) == 1
    assert metrics.minimum_matching_distance(distances.T) == pytest.approx((1 + 4 + 1) / 3)
    assert metrics.coverage(distances) == 1
    assert metrics.coverage(distances.T) == pytest.approx(2 / 3)


def test_set_measures_direction():
    real, generated = tight_and_wide()
    distances = metrics.feature_distances(real, generated)
    assert metrics.coverage(distances) < 0.1 < 0.2 < metrics.coverage(distances.T)
    assert metrics.minimum_matching_distance(distances) > 3
    assert metrics.minimum_matching_distance(distances.T) < 2.5  # what a swap would give


def test_set_measures_of_identical_and_of_collapsed_sets():
    packed = random_packed(25, 0)
    distances = 1 - metrics.iou_matrix(packed, packed[rng(0).permutation(25)])
    assert metrics.coverage(distances) == 1
    assert metrics.minimum_matching_distance(distances) == 0
    assert metrics.coverage(distances[:, [3] * 25]) == 1 / 25
    assert metrics.coverage(np.ones((25, 8))) == 1 / 25


def accuracy_of(real, generated):
    pairs = (real, real), (generated, generated), (real, generated)
    return metrics.one_nearest_neighbour_accuracy(
        *(metrics.feature_distances(a, b) for a, b in pairs)
    )


def test_one_nearest_neighbour_is_a_leave_one_out_classifier():
    real, generated = rng(0).normal(size=(31, 3)), rng(1).normal(0.7, 1, (23, 3))
    points, labels = np.vstack([real, generated]), np.arange(54) < 31
    right = []
    for i in range(54):
        others = np.delete(np.arange(54), i)
        nearest = others[np.linalg.norm(points[others] - points[i], axis=1).argmin()]
        right.append(labels[nearest] == labels[i])
    assert accuracy_of(real, generated) == pytest.approx(np.mean(right))
    assert accuracy_of(generated, real[::-1]) == pytest.approx(np.mean(right))


def test_one_nearest_neighbour_of_equal_separated_and_copied_sets():
    equal = [accuracy_of(*np.split(rng(s).normal(size=(80, 4)), 2)) for s in range(40)]
    assert np.mean(equal) == pytest.approx(0.5, abs=0.04)
    real = rng(0).normal(size=(30, 4))
    assert accuracy_of(real, real + 100) == 1
    assert accuracy_of(real, real) == 0
    assert accuracy_of(np.zeros((5, 2)), np.zeros((5, 2))) == 0.5  # nothing but ties


def test_one_nearest_neighbour_refuses_a_transposed_matrix():
    square = np.ones((3, 3)), np.ones((4, 4))
    assert metrics.one_nearest_neighbour_accuracy(*square, np.ones((3, 4))) == 0.5
    with pytest.raises(StudyError, match="d_real_real"):
        metrics.one_nearest_neighbour_accuracy(*square, np.ones((4, 3)))


def test_pairwise_diversity_is_the_mean_over_pairs():
    packed = random_packed(9, 0)
    iou = metrics.iou_matrix(packed, packed)
    expected = np.mean([1 - iou[i, j] for i, j in itertools.combinations(range(9), 2)])
    assert metrics.pairwise_diversity(packed) == pytest.approx(expected, rel=1e-6)
    assert metrics.pairwise_diversity(packed[[2, 2, 2]]) == 0
    assert metrics.pairwise_diversity(np.array([[255], [0]], dtype=np.uint8)) == 1


# Memorisation


def test_memorisation_is_mann_whitney_and_counts():
    generated, heldout = rng(0).uniform(0.6, 1, 40).round(1), rng(1).uniform(0.3, 1, 30).round(1)
    result = metrics.memorisation(generated, heldout)
    test = scipy.stats.mannwhitneyu(
        generated, heldout, alternative="greater", method="asymptotic", use_continuity=False
    )
    assert result["auc"] == pytest.approx(test.statistic / (40 * 30))
    assert scipy.stats.norm.sf(result["z"]) == pytest.approx(test.pvalue)
    pairs = [(g > h) + 0.5 * (g == h) for g in generated for h in heldout]
    assert result["auc"] == pytest.approx(np.mean(pairs))
    iou = np.float32([19 / 20, 0.97, 0.9, 0.89])
    shares = metrics.memorisation(iou, np.float32([0.96, 0.1]))
    assert (shares["share_95"], shares["share_90"]) == (0.5, 0.75)
    assert (shares["heldout_share_95"], shares["heldout_share_90"]) == (0.5, 0.5)


def test_memorisation_direction():
    copies, fresh = np.ones(20), rng(0).uniform(0.2, 0.7, 20)
    assert metrics.memorisation(copies, fresh)["auc"] == 1
    assert metrics.memorisation(copies, fresh)["z"] > 3
    assert metrics.memorisation(fresh, copies)["auc"] == 0
    assert metrics.memorisation(copies, copies)["auc"] == 0.5
    assert metrics.memorisation(copies, copies)["z"] == 0


# Intervals


def test_draws_take_each_row_once_and_keep_real_before_generated():
    seen = []

    def statistic(real, generated):
        seen.append((real, generated))
        return float(generated.mean() - real.mean())

    args = statistic, np.arange(20), np.arange(100, 130), 8, 50
    estimate = metrics.draws_without_replacement(*args, rng(0), n_reference=5)
    for real, generated in seen:
        assert len(set(real)) == len(real) == 5 and max(real) < 20
        assert len(set(generated)) == len(generated) == 8 and min(generated) >= 100
    values = [g.mean() - r.mean() for r, g in seen]
    assert estimate.value == pytest.approx(np.mean(values))
    assert [estimate.low, estimate.high] == pytest.approx(np.percentile(values, [2.5, 97.5]))
    assert estimate.low < estimate.value < estimate.high
    assert estimate == metrics.draws_without_replacement(*args, rng(0), n_reference=5)
    assert estimate != metrics.draws_without_replacement(*args, rng(1), n_reference=5)


def test_an_estimate_of_draws_has_no_ends_where_all_was_taken():
    values = [1.0, 2.0, 6.0]
    found = metrics.Estimate.of_draws(values)
    assert found == (3.0, *np.percentile(values, [2.5, 97.5]))
    whole = metrics.Estimate.of_draws(values, whole=True)
    assert whole.value == 3 and np.isnan([whole.low, whole.high]).all()


def test_draws_cover_the_mean_of_the_pool_as_sampling_theory_says():
    pool = rng(0).normal(size=200)
    estimate = metrics.draws_without_replacement(
        lambda real, generated: generated.mean(), np.zeros(50), pool, 50, 2000, rng(1)
    )
    error = pool.std(ddof=1) * np.sqrt((1 - 50 / 200) / 50)  # with the finite-pool factor
    assert estimate.value == pytest.approx(pool.mean(), abs=4 * error / np.sqrt(2000))
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_draws_of_everything_have_no_interval():
    x = np.arange(6.0)
    value, low, high = metrics.draws_without_replacement(
        lambda real, generated: real.sum(), x, x, 6, 4, rng()
    )
    assert value == 15 and np.isnan(low) and np.isnan(high)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (888, 908), (1, 1)])
def test_wilson_is_scipys(successes, n):
    expected = scipy.stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    value, low, high = metrics.wilson_interval(successes, n)
    assert (value, low, high) == pytest.approx((successes / n, expected.low, expected.high))
    assert 0 <= low <= value <= high <= 1


def test_paired_permutation_is_the_exact_test():
    a, b = rng(0).normal(0.6, 1, 10), rng(1).normal(0, 1, 10)
    difference = a - b
    signs = np.array(list(itertools.product([-1, 1], repeat=10)))
    exact = np.mean(np.abs(signs @ difference) >= abs(difference.sum()) - 1e-12)
    p = metrics.paired_permutation_test(a, b, 20000, rng(2))
    assert p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20000))
    assert p == metrics.paired_permutation_test(b, a, 20000, rng(2))
    assert metrics.paired_permutation_test(a, a, 99, rng(0)) == 1
    # Forty equal differences: no random pattern reaches them, so the observed one counts alone.
    assert metrics.paired_permutation_test(np.ones(40), np.zeros(40), 99, rng(0)) == 0.01


def test_paired_permutation_is_uniform_under_the_null():
    ps = [
        metrics.paired_permutation_test(*rng(s).normal(size=(2, 12)), 199, rng(s + 1000))
        for s in range(300)
    ]
    assert scipy.stats.kstest(ps, "uniform").pvalue > 0.001


def test_mcnemar_counts_what_differs():
    """By hand: 8 items of which one classifier errs on 7; both tails of a fair coin."""
    a = np.array([1] * 7 + [0] + [1] * 20 + [0] * 50, bool)
    b = np.array([0] * 7 + [1] + [1] * 20 + [0] * 50, bool)
    expected = 2 * (8 + 1) / 2**8
    assert metrics.mcnemar_test(a, b) == pytest.approx(expected)
    assert metrics.mcnemar_test(b, a) == pytest.approx(expected)
    assert metrics.mcnemar_test(a, a) == 1.0
    # 3DWINN, Table 5: 845 and 850 of 908 right; even if nothing else differs it is no proof.
    five = np.arange(908) < 5
    assert metrics.mcnemar_test(five, ~np.ones(908, bool)) == pytest.approx(2 / 2**5)


def test_mcnemar_refuses_unpaired_errors():
    with pytest.raises(StudyError, match="pairs need one each"):
        metrics.mcnemar_test(np.zeros(3, bool), np.zeros(4, bool))


def test_student_interval_is_students_interval():
    values = [0.81, 0.84, 0.79, 0.9]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    value, low, high = metrics.student_interval(values)
    assert (value, low, high) == pytest.approx((np.mean(values), expected.low, expected.high))
    value, low, high = metrics.student_interval([0.5])
    assert value == 0.5 and np.isnan([low, high]).all()


# Anchors

TRAIN = rng(5).random((12, 4, 4, 4)) < np.linspace(0.02, 0.98, 64).reshape(4, 4, 4)
ANCHORS = {
    "bernoulli": lambda seeds: metrics.bernoulli(TRAIN, seeds),
    "pca_gaussian": lambda seeds: metrics.pca_gaussian(TRAIN, seeds),
    "pca_gaussian_3": lambda seeds: metrics.pca_gaussian(TRAIN, seeds, n_components=3),
    "memoriser": lambda seeds: metrics.memoriser(TRAIN, seeds),
    "noise": lambda seeds: metrics.noise((4, 4, 4), 0.4, seeds),
}


@pytest.mark.parametrize("name", ANCHORS)
def test_anchor_shapes_depend_on_their_own_seed_alone(name):
    draw = ANCHORS[name]
    shapes = draw(range(8))
    assert shapes.shape == (8, 4, 4, 4) and shapes.dtype == bool
    np.testing.assert_array_equal(draw([5, 2**40, 1])[[0, 2]], shapes[[5, 1]])
    assert len(np.unique(shapes.reshape(8, -1), axis=0)) > 1
    assert draw([]).shape == (0, 4, 4, 4)


def test_anchors_have_streams_of_their_own():
    halves = np.stack([np.zeros((4, 4, 4), dtype=bool), np.ones((4, 4, 4), dtype=bool)])
    pairs = metrics.bernoulli(halves, range(50)), metrics.noise((4, 4, 4), 0.5, range(50))
    assert np.mean(pairs[0] == pairs[1]) == pytest.approx(0.5, abs=0.05)


def test_bernoulli_and_noise_have_their_frequencies():
    p, n = TRAIN.mean(axis=0), 4000
    error = np.sqrt(p * (1 - p) / n)
    assert (np.abs(metrics.bernoulli(TRAIN, range(n)).mean(axis=0) - p) <= 5 * error).all()
    noise = metrics.noise((4, 4, 4), 0.4, range(n))
    assert (np.abs(noise.mean(axis=0) - 0.4) <= 5 * np.sqrt(0.24 / n)).all()
    centred = noise.reshape(n, -1) - 0.4
    correlation = centred.T @ centred / (0.24 * n) - np.eye(64)
    assert np.abs(correlation).max() < 6 / np.sqrt(n)


def test_pca_gaussian_has_the_probabilities_of_the_gaussian():
    n, flat = 6000, TRAIN.reshape(12, -1)
    covariance = np.cov(flat, rowvar=False)
    deviation = np.sqrt(np.diag(covariance))
    varying = deviation > 0
    occupied = metrics.pca_gaussian(TRAIN, range(n)).reshape(n, -1)
    p = scipy.stats.norm.cdf((flat.mean(axis=0) - 0.5)[varying] / deviation[varying])
    error = np.sqrt(p * (1 - p) / n)
    assert (np.abs(occupied[:, varying].mean(axis=0) - p) <= 5 * error).all()
    np.testing.assert_array_equal(occupied[:, ~varying].all(axis=0), flat[0, ~varying])
    # Joint occupancy: two voxels of equal mean .5 follow the arcsine law of their correlation.
    half = np.flatnonzero(flat.mean(axis=0) == 0.5)
    i, j = half[0], half[-1]
    r = covariance[i, j] / np.sqrt(covariance[i, i] * covariance[j, j])
    both = 0.25 + np.arcsin(r) / (2 * np.pi)
    assert (occupied[:, i] & occupied[:, j]).mean() == pytest.approx(both, abs=5 * 0.5 / np.sqrt(n))


def test_pca_gaussian_has_the_unbiased_variance():
    n, train = 20000, np.zeros((3, 1, 1, 1), dtype=bool)
    train[0] = True  # mean 1/3 and unbiased variance 1/3
    p = scipy.stats.norm.cdf((1 / 3 - 0.5) / np.sqrt(1 / 3))
    error = np.sqrt(p * (1 - p) / n)
    assert metrics.pca_gaussian(train, range(n)).mean() == pytest.approx(p, abs=5 * error)


def test_pca_gaussian_keeps_the_largest_directions():
    # One direction of variance: two training shapes; the draw is one or the other or a blend.
    train = np.zeros((6, 2, 2, 2), dtype=bool)
    train[:3, 0], train[[0, 5], 1, 1, 1] = True, True  # uncorrelated
    shapes = metrics.pca_gaussian(train, range(200), n_components=1)
    assert not shapes[:, 1].any(), "the small direction must be gone"
    first = shapes[:, 0].reshape(200, -1)
    assert (first.all(axis=1) | ~first.any(axis=1)).all()
    assert 0.4 < first[:, 0].mean() < 0.6
    assert metrics.pca_gaussian(train, range(200))[:, 1].any()


def test_memoriser_gives_every_training_shape_once():
    train = np.eye(8, dtype=bool).reshape(8, 2, 2, 2)
    copies = metrics.memoriser(train, range(40, 48))
    np.testing.assert_array_equal(copies.sum(axis=0), np.ones((2, 2, 2)))
    np.testing.assert_array_equal(metrics.memoriser(train, [3, 11])[0], copies[3])


# Bad input

F = np.ones((5, 3))
NAN = np.where(np.eye(5, 3) > 0, np.nan, F)
P = np.full((4, 2), 0.5)
BITS = np.ones((3, 8), dtype=np.uint8)
MEAN = np.mean
BAD = {
    "frechet one row": lambda: metrics.frechet_distance(F[:1], F),
    "frechet widths": lambda: metrics.frechet_distance(F, F[:, :2]),
    "frechet nan": lambda: metrics.frechet_distance(F, NAN),
    "frechet infinity": lambda: metrics.frechet_distance(F * np.inf, F),
    "frechet vector": lambda: metrics.frechet_distance(F[0], F),
    "frechet words": lambda: metrics.frechet_distance([["a"]], F),
    "kernel one row": lambda: metrics.kernel_distance(F, F[:1]),
    "kernel empty": lambda: metrics.kernel_distance(F[:0], F),
    "kernel widths": lambda: metrics.kernel_distance(F, F[:, :2]),
    "overlap one grid": lambda: metrics.overlap_distance(BITS, BITS[:1]),
    "overlap bool": lambda: metrics.overlap_distance(BITS > 0, BITS),
    "overlap widths": lambda: metrics.overlap_distance(BITS, BITS[:, :4]),
    "inception logits": lambda: metrics.inception_score(P * 3, 1, rng()),
    "inception sums": lambda: metrics.inception_score(P * 0.9, 1, rng()),
    "inception negative": lambda: metrics.inception_score([[1.5, -0.5]], 1, rng()),
    "inception nan": lambda: metrics.inception_score(P * np.nan, 1, rng()),
    "inception splits": lambda: metrics.inception_score(P, 5, rng()),
    "inception no split": lambda: metrics.inception_score(P, 0, rng()),
    "class sums": lambda: metrics.class_probability(P * 0.9, 0),
    "class label": lambda: metrics.class_probability(P, 2),
    "class negative label": lambda: metrics.class_probability(P, -1),
    "prdc k": lambda: metrics.precision_recall_density_coverage(F, F, 5),
    "prdc k zero": lambda: metrics.precision_recall_density_coverage(F, F, 0),
    "prdc k fraction": lambda: metrics.precision_recall_density_coverage(F, F, 1.5),
    "prdc nan": lambda: metrics.precision_recall_density_coverage(F, NAN, 1),
    "iou bool": lambda: metrics.iou_matrix(BITS > 0, BITS),
    "iou widths": lambda: metrics.iou_matrix(BITS, BITS[:, :4]),
    "iou grids": lambda: metrics.iou_matrix(BITS.reshape(3, 2, 4), BITS),
    "iou empty": lambda: metrics.iou_matrix(BITS[:0], BITS),
    "iou block": lambda: metrics.iou_matrix(BITS, BITS, 0),
    "nearest iou": lambda: metrics.nearest_by_iou(BITS, BITS[:0]),
    "nearest feature": lambda: metrics.nearest_by_feature(F, NAN),
    "distances widths": lambda: metrics.feature_distances(F, F[:, :2]),
    "mmd negative": lambda: metrics.minimum_matching_distance(-F),
    "mmd nan": lambda: metrics.minimum_matching_distance(NAN),
    "coverage empty": lambda: metrics.coverage(F[:0]),
    "1-nna one": lambda: metrics.one_nearest_neighbour_accuracy(F[:1, :1], F[:2, :2], F[:1, :2]),
    "1-nna shapes": lambda: metrics.one_nearest_neighbour_accuracy(F, F, F),
    "diversity one": lambda: metrics.pairwise_diversity(BITS[:1]),
    "memorisation range": lambda: metrics.memorisation([1.2], [0.5]),
    "memorisation empty": lambda: metrics.memorisation([0.5], []),
    "draws generated": lambda: metrics.draws_without_replacement(MEAN, F, F[:2], 3, 5, rng()),
    "draws real": lambda: metrics.draws_without_replacement(MEAN, F[:2], F, 3, 5, rng()),
    "draws one": lambda: metrics.draws_without_replacement(MEAN, F, F, 3, 1, rng()),
    "wilson counts": lambda: metrics.wilson_interval(4, 3),
    "wilson share": lambda: metrics.wilson_interval(0.5, 3),
    "wilson none": lambda: metrics.wilson_interval(0, 0),
    "permutation lengths": lambda: metrics.paired_permutation_test([1, 2], [1], 9, rng()),
    "permutation none": lambda: metrics.paired_permutation_test([1], [2], 0, rng()),
    "seeds nan": lambda: metrics.student_interval([0.5, np.nan]),
    "seeds none": lambda: metrics.student_interval([]),
    "bernoulli floats": lambda: metrics.bernoulli(TRAIN.astype(float), [0]),
    "bernoulli channel": lambda: metrics.bernoulli(TRAIN[:, None], [0]),
    "bernoulli none": lambda: metrics.bernoulli(TRAIN[:0], [0]),
    "pca one shape": lambda: metrics.pca_gaussian(TRAIN[:1], [0]),
    "pca components": lambda: metrics.pca_gaussian(TRAIN, [0], n_components=12),
    "memoriser seed": lambda: metrics.memoriser(TRAIN, [-1]),
    "noise seed": lambda: metrics.noise((2, 2, 2), 0.5, [0.5]),
    "noise occupancy": lambda: metrics.noise((2, 2, 2), 1.5, [0]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name):
    with pytest.raises(StudyError) as caught:
        BAD[name]()
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20


def test_nothing_touches_the_global_random_state_or_its_arguments():
    np.random.seed(0)  # noqa: NPY002  (the state that must stay as it is)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for draw in ANCHORS.values():
        draw([0, 1])
    square = rng(0).random((4, 4))
    kept = square.copy()
    metrics.one_nearest_neighbour_accuracy(square, square, square)
    metrics.precision_recall_density_coverage(square, square, 1)
    metrics.inception_score(P, 2, rng())
    np.testing.assert_array_equal(square, kept)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
