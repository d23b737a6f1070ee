"""Linear classifiers: against scikit-learn, closed forms, and the conditions of the minimum."""

import numpy as np
import pytest
from sklearn.svm import LinearSVC

from lib import linear
from lib.errors import StudyError


def blobs(n=90, f=12, k=3, spread=1.5, seed=0):
    """Overlapping Gaussian blobs: features (n, f) float32 and labels (n,)."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % k
    centres = generator.normal(size=(k, f))
    return (centres[labels] + spread * generator.normal(size=(n, f))).astype(np.float32), labels


# ---------------------------------------------------------------- the SVM


@pytest.mark.parametrize("c", [1e-3, 0.5, 20.0])
@pytest.mark.parametrize("f", [5, 200])  # fewer and more features than shapes
def test_the_svm_is_that_of_liblinear(c, f):
    x, labels = blobs(f=f)
    reference = LinearSVC(C=c, tol=1e-10, max_iter=200_000, random_state=0).fit(x, labels)
    a = linear.one_versus_rest(linear.gram(x, x), labels, (c,))[0]
    weight, intercept = a.T @ x, a.sum(0)
    np.testing.assert_allclose(weight, reference.coef_, atol=2e-4)
    np.testing.assert_allclose(intercept, reference.intercept_, atol=2e-4)
    other = blobs(seed=1, f=f)[0]
    answers = (linear.gram(other, x) @ a).argmax(1)
    assert (answers == reference.predict(other)).all()


def test_the_svm_is_at_its_minimum():
    """Where the gradient vanishes a = 2 C y max(0, 1 - y f), shape by shape."""
    x, labels = blobs()
    kernel, sign = linear.gram(x, x), np.where(labels == 1, 1.0, -1.0)
    for c in (0.01, 3.0):
        a = linear.squared_hinge(kernel, sign, c, np.zeros(len(x)))
        slack = np.maximum(0, 1 - sign * (kernel @ a))
        np.testing.assert_allclose(a, 2 * c * sign * slack, atol=1e-8)
        assert 0 < (slack > 0).sum() < len(x)


def test_the_minimum_does_not_depend_on_where_it_started():
    x, labels = blobs(spread=0.5)
    kernel, sign = linear.gram(x, x), np.where(labels == 0, 1.0, -1.0)
    wild = 100 * np.random.default_rng(3).normal(size=len(x))
    starts = (np.zeros(len(x)), wild, -sign)
    found = [linear.squared_hinge(kernel, sign, 0.5, a) for a in starts]
    np.testing.assert_allclose(found[1], found[0], atol=1e-9)
    np.testing.assert_allclose(found[2], found[0], atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_grid_of_c_fits_the_scale_of_the_features(scale):
    """Times the variance, the grid is the same at every scale; c stands beside it unscaled."""
    x, labels = blobs()
    x = x - x.mean(0)
    kernel = linear.gram(scale * x, scale * x)
    grid = linear.grid_of_c(kernel, (0.1, 10.0), 0.5)
    relative = np.array(grid) * scale**2 * x.var(0).sum()
    assert len(grid) == 3 and list(grid) == sorted(grid) and 0.5 in grid
    for value in (0.1, 10.0):
        assert np.isclose(relative, value, rtol=1e-3).any()


def test_features_without_variance_are_refused():
    x = np.ones((6, 3), np.float32)
    with pytest.raises(StudyError, match="the same for all shapes"):
        linear.grid_of_c(linear.gram(x, x), (1.0,), 0.5)


def test_larger_cs_than_the_hard_margin_needs_are_not_solved():
    x, labels = np.eye(6) * 100, np.array([0, 1, 0, 1, 0, 1])
    kernel = linear.gram(x, x)
    small, hard, larger = linear.one_versus_rest(kernel, labels, (1e-6, 1e3, 1e6))
    assert (hard == larger).all() and not np.allclose(small, hard)
    alone = linear.one_versus_rest(kernel, labels, (1e6,))[0]
    np.testing.assert_allclose(kernel @ larger, kernel @ alone, atol=2e-4)


def test_a_path_gives_the_same_as_each_c_alone():
    x, labels = blobs()
    kernel, cs = linear.gram(x, x), (1e-3, 0.1, 5.0)
    path = linear.one_versus_rest(kernel, labels, cs)
    for c, along in zip(cs, path, strict=True):
        alone = linear.one_versus_rest(kernel, labels, (c,))[0]
        np.testing.assert_allclose(along, alone, atol=1e-8)


@pytest.mark.parametrize("c", [1e-5, 1e-3, 0.1, 10.0])
def test_cheap_steps_and_newton_find_the_same(monkeypatch, c):
    x, labels = blobs()
    kernel = linear.gram(x, x)
    both = linear.one_versus_rest(kernel, labels, (c,))[0]
    signs = np.where(labels[:, None] == np.arange(3), 1.0, -1.0)
    newton = [linear.squared_hinge(kernel, s, c, np.zeros(90)) for s in signs.T]
    np.testing.assert_allclose(both, np.stack(newton, 1), atol=1e-8 * max(1, c))


def test_few_steps_suffice_where_all_shapes_are_within_the_margin(monkeypatch):
    """Then the SVM is ridge regression on y, one step away."""
    x, labels = blobs()
    kernel, c = linear.gram(x, x), 1e-6
    monkeypatch.setattr(linear, "squared_hinge", None)  # Newton's steps are not asked for
    a = linear.one_versus_rest(kernel, labels, (c,))[0]
    y = np.where(labels[:, None] == np.arange(3), 1.0, -1.0)
    ridge = np.linalg.solve(kernel + np.eye(90) / (2 * c), y)
    np.testing.assert_allclose(a, ridge, rtol=1e-9)


def test_two_points_have_the_margin_of_the_closed_form():
    """x = 1 and -1, f = 2a x + 0: a = y / (2 + 1 / 2C) by the stationary condition."""
    x, c = np.array([[1.0], [-1.0]], np.float32), 0.5
    a = linear.squared_hinge(linear.gram(x, x), np.array([1.0, -1.0]), c, np.zeros(2))
    np.testing.assert_allclose(a, [1 / 3, -1 / 3], rtol=1e-12)


def test_repeated_shapes_are_no_trouble():
    x, labels = blobs(30)
    twice, again = np.concatenate([x, x]), np.concatenate([labels, labels])
    a = linear.one_versus_rest(linear.gram(twice, twice), again, (0.25,))[0]
    b = linear.one_versus_rest(linear.gram(x, x), labels, (0.5,))[0]
    np.testing.assert_allclose(a[:30] + a[30:], b, atol=1e-8)  # twice a shape is twice its C


def test_a_search_that_does_not_end_says_so(monkeypatch):
    monkeypatch.setattr(linear, "MOST_STEPS", 1)
    monkeypatch.setattr(linear, "CHEAP_STEPS", 1)
    x, labels = blobs()
    with pytest.raises(StudyError, match="C = 0.5 found no minimum in 1 Newton steps"):
        linear.one_versus_rest(linear.gram(x, x), labels, (0.5,))


# ---------------------------------------------------------------- scalings


def test_standardised_by_the_training_split():
    x, _ = blobs()
    x[:, 3] = 0.1  # constant but for rounding
    other = blobs(seed=1)[0]
    a, b = linear.scaled("standardised", x, other)
    assert a.dtype == b.dtype == np.float32
    kept = np.delete(np.arange(12), 3)
    np.testing.assert_allclose(a[:, kept].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(a[:, kept].std(0), 1, atol=1e-5)
    assert (a[:, 3] == 0).all() and (b[:, 3] == 0).all()
    back = b[:, kept] * x[:, kept].std(0) + x[:, kept].mean(0)
    np.testing.assert_allclose(back, other[:, kept], atol=1e-5)


def test_raw_features_stay_as_they_are():
    x, _ = blobs(10)
    assert linear.scaled("raw", x, x)[0] is x
    with pytest.raises(StudyError, match="no scaling 'power'; choose one of raw, standardised"):
        linear.scaled("power", x, x)


# ---------------------------------------------------------------- choices


def test_folds_are_stratified_and_keep_groups_whole():
    labels = np.repeat([0, 1, 2], [60, 40, 20])
    groups = np.arange(120) // 2
    fold = linear.folds(labels, groups, 4, "test")
    assert (fold[::2] == fold[1::2]).all()
    for k in range(4):
        np.testing.assert_allclose(np.bincount(labels[fold == k], minlength=3), [15, 10, 5], atol=2)
    assert (fold == linear.folds(labels, groups, 4, "test")).all()
    assert (fold != linear.folds(labels, groups, 4, "another")).any()


def test_duplicates_across_folds_would_flatter():
    """Labels without any meaning: only a copy in another fold can be recognised."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 200)).astype(np.float32).repeat(2, 0)
    labels = generator.integers(0, 2, 60).repeat(2)
    kernel = linear.gram(x, x)
    whole = linear.folds(labels, np.arange(120) // 2, 3, "test")
    split = np.arange(120) % 3
    honest = linear.cross_validated(kernel, labels, whole, (0.5,))[0]
    flattered = linear.cross_validated(kernel, labels, split, (0.5,))[0]
    assert honest < 0.7 and flattered > 0.95


def test_cross_validation_is_the_mean_over_folds_of_a_plain_fit():
    x, labels = blobs(60)
    fold = np.repeat([0, 1, 2], 20)
    right = 0
    for k in range(3):
        svm = LinearSVC(C=0.5, tol=1e-10, max_iter=100_000, random_state=0)
        svm.fit(x[fold != k], labels[fold != k])
        right += (svm.predict(x[fold == k]) == labels[fold == k]).sum()
    found = linear.cross_validated(linear.gram(x, x), labels, fold, (0.01, 0.5))
    assert found.shape == (2,) and found[1] == right / 60


def test_logistic_regression_is_at_its_minimum():
    """The gradient of |w|^2 / 2 + C sum of log losses vanishes, up to the tolerance."""
    x, labels = blobs()
    c = 0.1
    found = linear.logistic(x, labels, c)
    wrong = found.predict_proba(x) - np.eye(3)[labels]
    np.testing.assert_allclose(found.coef_ + c * wrong.T @ x, 0, atol=0.05)
    assert found.coef_.shape == (3, 12)
    scores = linear.cross_validated_logistic(x, labels, np.arange(90) // 30, (0.01, 0.1))
    assert ((scores > 1 / 3) & (scores <= 1)).all()


def test_a_draw_takes_the_share_of_every_category():
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    draw = linear.stratified_draw(labels, 0.1, np.random.default_rng(0))
    assert np.bincount(labels[draw]).tolist() == [10, 4, 1]
    assert len(set(draw)) == 15
    again = linear.stratified_draw(labels, 0.1, np.random.default_rng(0))
    other = linear.stratified_draw(labels, 0.1, np.random.default_rng(1))
    assert (draw == again).all() and len(set(draw) - set(other)) > 5


def test_softmax_epochs_learn_and_repeat():
    x, labels = blobs(spread=0.5)
    answers = linear.softmax_epochs(x, labels, x, 40, 0.05)
    assert answers.shape == (40, 90)
    right = (answers == labels).mean(1)
    assert right[-1] > 0.9 and right[-1] >= right[0]
    assert (answers == linear.softmax_epochs(x, labels, x, 40, 0.05)).all()


def test_the_first_epoch_is_the_closed_form():
    """From weights 0 Adam's first step is lr times the sign of the gradient."""
    x, labels = blobs()
    gradient = (np.full((90, 3), 1 / 3) - np.eye(3)[labels]).T
    scores = -0.1 * (x @ np.sign(gradient @ x).T + np.sign(gradient.sum(1).round(6)))
    answers = linear.softmax_epochs(x, labels, x, 1, 0.1)[0]
    assert (answers == scores.argmax(1)).mean() > 0.98


@pytest.mark.parametrize("c", [0.001, 0.1])
def test_features_of_large_magnitude_reach_their_minimum(c):
    """Steps that were halved until the loss fell found none within a hundred, at C = .1."""
    draw = np.random.default_rng(0)
    x = draw.random((300, 900)) * draw.random(900) * 1e5 + draw.random((300, 1)) * 1e5
    sign = np.where(draw.random(300) < 0.1, 1.0, -1.0)
    kernel = linear.gram(x, x)
    a = linear.squared_hinge(kernel, sign, c, np.zeros(300))
    slack = np.maximum(0, 1 - sign * (kernel @ a))
    np.testing.assert_allclose(a, 2 * c * sign * slack, atol=2 * c * linear.ROUNDED)


def test_a_step_ends_where_the_loss_is_lowest():
    draw = np.random.default_rng(1)
    x, sign = draw.normal(size=(40, 5)), draw.choice([-1.0, 1.0], 40)
    kernel, c = linear.gram(x, x), 0.7
    a, d = draw.normal(size=(2, 40)) / 40

    def loss(t):
        f = kernel @ (a + t * d)
        return (a + t * d) @ f / 2 + c * np.square(np.maximum(0, 1 - sign * f)).sum()

    if (loss(1e-6) - loss(0)) > 0:
        d = -d
    t = linear._line_search((a, kernel @ a), (d, kernel @ d), sign, c)
    assert t > 0
    assert loss(t) <= min(loss(t * (1 + e)) for e in (-1e-4, 1e-4, -0.1, 0.1, 1))
