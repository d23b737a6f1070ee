"""Average precision against scikit-learn's, and its alignment against a loop over all poses."""

import itertools
import time

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.metrics import average_precision_score

from lib import metrics
from lib.errors import StudyError
from lib.metrics.average_precision import _upper_bounds, shifted, symmetries


def blob(seed, side):
    """A smooth random field in [0, 1]: what a network's prediction looks like."""
    field = gaussian_filter(np.random.default_rng(seed).normal(size=(side,) * 3), 1.2)
    return 1 / (1 + np.exp(-field / field.std()))


def loop(truth, scores, reach, measure):
    """Every symmetry of the prediction, every shift of it, one by one."""
    best = 0.0
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            turned = scores.transpose(axes)[:: signs[0], :: signs[1], :: signs[2]]
            for shift in itertools.product(range(-reach, reach + 1), repeat=3):
                moved = np.zeros_like(turned)
                for cell in np.argwhere(np.ones(turned.shape, bool)):
                    to = cell + shift
                    if ((to >= 0) & (to < len(turned))).all():
                        moved[tuple(to)] = turned[tuple(cell)]
                best = max(best, measure(truth.ravel(), moved.ravel()))
    return best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("digits", [1, 2, 8])
def test_average_precision_is_that_of_scikit_learn(seed, digits):
    truth, scores = blob(seed, 12) > 0.8, blob(seed + 50, 12).round(digits)
    ours = metrics.average_precision(truth, scores)
    assert ours == pytest.approx(average_precision_score(truth.ravel(), scores.ravel()), abs=1e-12)


def test_average_precision_in_closed_form():
    truth = np.array([True, False, True, False])
    assert metrics.average_precision(truth, np.array([0.9, 0.8, 0.7, 0.1])) == pytest.approx(
        0.5 * 1 + 0.5 * 2 / 3
    )
    assert metrics.average_precision(truth, truth.astype(float)) == 1
    # One threshold for all: the share of occupied voxels.
    assert metrics.average_precision(truth, np.full(4, 0.3)) == 0.5


KINDS = {
    "smooth": lambda s: s,
    "binary": lambda s: (s > 0.6).astype(float),
    "few levels": lambda s: np.round(s * 4) / 4,
    "with zeros": lambda s: np.where(s > 0.5, s, 0),
    "constant": lambda s: np.full_like(s, 0.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_is_that_of_the_loop(kind):
    truth, scores = blob(1, 4) > 0.75, KINDS[kind](blob(2, 4))
    measure = average_precision_score if kind == "with zeros" else metrics.average_precision
    best = metrics.aligned_average_precision(truth, scores, 1)
    assert best == pytest.approx(loop(truth, scores, 1, measure), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_bounds_lie_above_every_pose(kind, seed):
    truth, scores = blob(seed, 8) > 0.8, KINDS[kind](blob(seed + 9, 8))
    possible = metrics.alignments(truth, 2)
    bounds = _upper_bounds(possible, scores)
    for pose in range(0, len(possible.poses), 5):
        for k in range(0, len(possible.shifts), 7):
            moved = shifted(scores, possible.shifts[k])
            assert metrics.average_precision(possible.poses[pose], moved) <= bounds[pose, k] + 1e-7


def test_a_turned_and_moved_truth_is_found_again():
    truth = np.zeros((10, 10, 10), bool)
    truth[3:7, 4:6, 2:8] = truth[5, 5, 8] = True
    prediction = shifted(symmetries(truth)[29], (1, -1, 1)).astype(float)
    assert metrics.average_precision(truth, prediction) < 0.8
    assert metrics.aligned_average_precision(truth, prediction, 2) == 1
    assert metrics.aligned_average_precision(truth, prediction, 0) < 1


def test_symmetries_are_48_and_of_one_cube():
    grid = blob(0, 4)
    found = symmetries(grid)
    assert len(np.unique(found.reshape(48, -1), axis=0)) == 48
    assert all(np.array_equal(np.sort(s.ravel()), np.sort(grid.ravel())) for s in found)
    assert len(metrics.alignments(np.ones((4, 4, 4), bool), 1).poses) == 1


def test_a_photograph_is_aligned_in_a_fraction_of_a_second():
    truth, scores = blob(1, 20) > 0.85, blob(2, 20)
    possible = metrics.alignments(truth, 2)
    start = time.process_time()
    metrics.best_alignment(possible, scores)
    assert time.process_time() - start < 5


def test_bad_input():
    grid = np.zeros((4, 4, 4))
    with pytest.raises(StudyError, match="at least one occupied voxel"):
        metrics.average_precision(grid > 1, grid)
    with pytest.raises(StudyError, match=r"shape \(4, 4, 4\) and scores \(3, 3, 3\)"):
        metrics.average_precision(grid == 0, np.zeros((3, 3, 3)))
    with pytest.raises(StudyError, match=r"values must lie in \[0, 1\]"):
        metrics.average_precision(grid == 0, grid + 2)
