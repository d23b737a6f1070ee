"""Is a classifier as right as it says? Reliability, calibration error, temperature."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

from lib.errors import StudyError
from lib.metrics._checks import finite_array, whole_number


def reliability(probabilities, labels, n_bins=15):
    """How often the most probable answer is right, by how probable it was.

    probabilities: (N, K), rows sum to 1; labels: (N,) in 0..K-1; n_bins: equal widths of (0, 1].
    Returns a structured array (n_bins,) with fields n, confidence (mean) and accuracy; both are NaN
    in empty bins. Raises StudyError on other shapes or values.

    Source: Guo et al. 2017 (arXiv:1706.04599), Section 2.
    """
    probabilities, labels = _answers(probabilities, labels)
    n_bins = whole_number(n_bins, "n_bins", 1)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    n = np.bincount(place, minlength=n_bins)
    out = np.zeros(n_bins, [("n", int), ("confidence", float), ("accuracy", float)])
    out["n"] = n
    filled = n > 0
    for name, values in (("confidence", confidence), ("accuracy", right)):
        total = np.bincount(place, values, minlength=n_bins)
        out[name] = np.nan
        out[name][filled] = total[filled] / n[filled]
    return out


def expected_calibration_error(probabilities, labels, n_bins=15):
    """Mean gap between confidence and accuracy over bins, weighted by their sizes; in [0, 1].

    Arguments and source as ``reliability``. Biased upwards where bins hold few answers.
    """
    bins = reliability(probabilities, labels, n_bins)
    bins = bins[bins["n"] > 0]
    gaps = np.abs(bins["confidence"] - bins["accuracy"])
    return float((bins["n"] * gaps).sum() / bins["n"].sum())


def temperature(logits, labels):
    """The T > 0 by which to divide logits (N, K), so that labels (N,) are the most likely.

    One number, so the answers stay as they are. Between .05 and 20. Raises StudyError.

    Source: Guo et al. 2017, Section 4.2.
    """
    logits = finite_array(logits, "logits", 2)
    labels = _answers(softmax(logits, 1), labels)[1]
    rows = np.arange(len(labels))

    def loss(log_t: float) -> float:
        return -log_softmax(logits / np.exp(log_t), 1)[rows, labels].mean()

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(found.x))


def free_energy(logits):
    """Energy (N,) of logits (N, K), lower is more likely: minus their log-sum-exp.

    Source: Grathwohl et al. 2020 (arXiv:1912.03263); for detection Liu et al. 2020
    (arXiv:2010.03759).
    """
    return -logsumexp(finite_array(logits, "logits", 2), axis=1)


def _answers(probabilities, labels):
    probabilities = finite_array(probabilities, "probabilities", 2)
    labels = np.asarray(labels)
    if labels.shape != (len(probabilities),) or not np.issubdtype(labels.dtype, np.integer):
        raise StudyError(
            f"labels: expected {len(probabilities)} whole numbers, got {labels.dtype} "
            f"{labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise StudyError(f"labels must lie in 0..{probabilities.shape[1] - 1}")
    if probabilities.min() < 0 or np.abs(probabilities.sum(1) - 1).max() > 1e-6:
        raise StudyError("probabilities: every row must be >= 0 and sum to 1; take the softmax")
    return probabilities, labels
