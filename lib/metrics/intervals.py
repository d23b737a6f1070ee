"""Intervals and tests that go with the numbers."""

from typing import NamedTuple

import numpy as np
from scipy import stats

from lib.errors import StudyError
from lib.metrics._checks import finite_array, whole_number


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval; NaN ends mean that no spread is known."""

    value: float
    low: float
    high: float

    @classmethod
    def of_draws(cls, values, whole=False):
        """Mean of draws (n,) and their 2.5 and 97.5 percentiles.

        ``whole`` says that every draw took all there is: their spread says nothing, ends are NaN.
        """
        ends = (float("nan"),) * 2 if whole else map(float, np.percentile(values, [2.5, 97.5]))
        return cls(float(np.mean(values)), *ends)


def draws_without_replacement(statistic, real, generated, n, n_draws, generator, n_reference=None):
    """Mean and spread of a statistic over random subsets of fixed size.

    Each draw takes n rows of generated and n_reference (n if None) rows of real, each without
    replacement, and calls statistic(real_rows, generated_rows) -> float. For statistics on
    distance matrices pass row numbers, numpy.arange(N), and index the matrices inside. Repeated
    rows would break FID, 1-NN accuracy and PRDC, hence no bootstrap.

    real: (N, ...), generated: (M, ...); 1 <= n_reference <= N, 1 <= n <= M; n_draws >= 2;
    generator: numpy Generator. Returns Estimate: the mean, and the 2.5 and 97.5 percentiles of
    the draws. Raises StudyError when a set has fewer rows than a draw takes.

    What the interval covers: which rows of these two pools a draw of this size happens to take.
    It does not cover another training run, another judge, or other pools; as the draws overlap it
    is too narrow for those, and it narrows to nothing as n nears the size of a pool. When a
    draw takes both pools whole there is but one subset, and the ends are NaN.
    """
    real, generated = np.asarray(real), np.asarray(generated)
    n_reference = n if n_reference is None else n_reference
    n_reference = whole_number(n_reference, "n_reference (rows of real)", 1, len(real))
    n = whole_number(n, "n (rows of generated)", 1, len(generated))
    n_draws = whole_number(n_draws, "n_draws", 2)
    values = np.empty(n_draws)
    for draw in range(n_draws):
        rows_real = generator.choice(len(real), n_reference, replace=False)
        rows_generated = generator.choice(len(generated), n, replace=False)
        values[draw] = statistic(real[rows_real], generated[rows_generated])
    return Estimate.of_draws(values, whole=n_reference == len(real) and n == len(generated))


def wilson_interval(successes, n):
    """95 % interval of a proportion, good for small n and for proportions near 0 or 1.

    successes: 0 to n; n: trials, >= 1. Returns Estimate with value successes / n, ends in [0, 1].
    The trials are taken as independent. Raises StudyError on counts out of range.

    Source: Wilson 1927, Journal of the American Statistical Association 22, 209-212.
    """
    n = whole_number(n, "n", 1)
    successes = whole_number(successes, "successes", 0, n)
    p, z = successes / n, stats.norm.ppf(0.975)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # The ends touch 0 and 1 at no and at all successes; rounding must not push them beyond.
    low = 0.0 if successes == 0 else float(centre - half)
    high = 1.0 if successes == n else float(centre + half)
    return Estimate(p, low, high)


def paired_permutation_test(a, b, n_permutations, generator):
    """Two-sided p-value that paired scores have the same mean, by random changes of sign.

    a, b: (n,) scores of two methods on the same n items; n_permutations >= 1; generator: numpy
    Generator. Returns (1 + hits) / (1 + n_permutations), in (0, 1], where hits are the sign
    patterns whose mean difference is at least as large as the observed one. Needs 8 n
    n_permutations bytes. Raises StudyError on different lengths, NaN or infinity.

    Source: Phipson and Smyth 2010 (arXiv:1603.05766).
    """
    difference = _differences(a, b)
    sums = _signed_sums(difference, n_permutations, generator)
    # The observed pattern must count as a hit of itself, whatever the order of summation.
    observed = abs(difference.sum()) - 1e-9 * np.abs(difference).sum()
    return (1 + np.count_nonzero(np.abs(sums) >= observed)) / (1 + len(sums))


def non_inferiority_test(a, b, margin, n_permutations, generator):
    """One-sided p-value that the mean of a lies below that of b by ``margin`` or more.

    a, b: (n,) scores of two methods on the same n items; margin > 0; other arguments as
    ``paired_permutation_test``. A small value says that a is at worst ``margin`` below b. Signs of
    a - b + margin are changed at random; that these are symmetric at the edge of the hypothesis
    holds only roughly for scores of 0 and 1. Raises StudyError.
    """
    if not margin > 0:
        raise StudyError(f"margin must be above 0, not {margin}")
    difference = _differences(a, b) + margin
    sums = _signed_sums(difference, n_permutations, generator)
    observed = difference.sum() - 1e-9 * np.abs(difference).sum()
    return (1 + np.count_nonzero(sums >= observed)) / (1 + len(sums))


def _differences(a, b):
    a, b = finite_array(a, "a", 1), finite_array(b, "b", 1)
    if a.shape != b.shape:
        raise StudyError(f"a has {len(a)} scores and b has {len(b)}: pairs need equal lengths")
    return a - b


def _signed_sums(difference, n_permutations, generator):
    """Sums (n_permutations,) of the differences (n,) under random changes of sign."""
    n_permutations = whole_number(n_permutations, "n_permutations", 1)
    return (2.0 * generator.integers(0, 2, size=(n_permutations, len(difference))) - 1) @ difference


def student_interval(values):
    """Mean of one number per training seed, with its 95 % Student t interval.

    values: (n,), n >= 1 independent runs. Returns Estimate; one run alone has NaN ends. Covers
    the change of seed, nothing else. Raises StudyError on NaN or infinity.

    Source: Student 1908.
    """
    values = finite_array(values, "values", 1)
    n, mean = len(values), float(values.mean())
    if n == 1:
        return Estimate(mean, float("nan"), float("nan"))
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, mean - half, mean + half)


def mcnemar_test(wrong_a, wrong_b):
    """Two-sided exact p-value that two classifiers err equally often on the same items.

    wrong_a, wrong_b: bool (n,), the errors of each. Only items on which one errs and the other
    does not count; where there is none, p is 1. Raises StudyError for different lengths.

    Source: McNemar 1947, Psychometrika 12, 153-157, with the binomial distribution itself.
    """
    wrong_a, wrong_b = np.asarray(wrong_a, bool), np.asarray(wrong_b, bool)
    if wrong_a.shape != wrong_b.shape or wrong_a.ndim != 1:
        raise StudyError(
            f"errors of sizes {wrong_a.shape} and {wrong_b.shape}: pairs need one each"
        )
    only_a = int((wrong_a & ~wrong_b).sum())
    differing = int((wrong_a ^ wrong_b).sum())
    return float(stats.binomtest(only_a, differing).pvalue) if differing else 1.0
