"""Linear classifiers on features: exact solvers, scalings, and choices by cross-validation.

Features are (N, F), labels whole numbers (N,) from 0. Nothing here knows a data set or a network.
"""

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from lib import rng
from lib.errors import StudyError

MOST_STEPS = 1000  # 20 do, but for features of magnitudes like 1e4
# Steps that treat all categories at once; what they leave undone is Newton's.
CHEAP_STEPS, TOLERANCE = 20, 1e-9
# In margins: where features are so large that rounding hides the last steps down.
ROUNDED = 1e-4
SCALINGS = ("raw", "standardised")


def scaled(scaling: str, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of both splits under one of ``SCALINGS``, fitted on the training split.

    standardised: mean 0 and deviation 1, constant features 0.
    """
    if scaling == "raw":
        return train, test
    if scaling == "standardised":
        mean, deviation = (f(train, 0, dtype=np.float64) for f in (np.mean, np.std))
        # What varies by rounding alone is constant, and 0 in the test split too.
        varies = deviation > 1e-6 * np.abs(train).max(0)
        rate = np.divide(1, deviation, out=np.zeros_like(deviation), where=varies)
        mean, rate = mean.astype(np.float32), rate.astype(np.float32)
        return (train - mean) * rate, (test - mean) * rate
    raise StudyError(f"no scaling {scaling!r}; choose one of {', '.join(SCALINGS)}")


def gram(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Inner products (N, M) in double precision of features with a one appended.

    The weight of that one is the intercept, which is penalised like the others, as in LIBLINEAR.
    The products are in double precision too: rounded to single, those of large features are no
    positive definite matrix.
    """
    return x.astype(np.float64) @ train.T.astype(np.float64) + 1


def squared_hinge(kernel: np.ndarray, sign: np.ndarray, c: float, a: np.ndarray) -> np.ndarray:
    """Coefficients a (N,) at the minimum of |w|^2 / 2 + C sum max(0, 1 - y f)^2, f = kernel a.

    The linear SVM with L2 penalty and squared hinge, by Newton's method (Chapelle 2007, Neural
    Computation 19, 1155-1178): were S the shapes within the margin, a would be
    (K_SS + I / 2C)^-1 y_S on S and 0 elsewhere. Where S is that of the step before, the minimum is
    reached; a step goes as far as the loss falls. kernel: ``gram`` of the training shapes with
    themselves; sign: y (N,) in {-1, 1}; a: where to start. StudyError after ``MOST_STEPS``.
    """
    f = kernel @ a
    for _ in range(MOST_STEPS):
        inside = sign * f < 1
        s = np.flatnonzero(inside)
        target = np.zeros(len(sign))
        target[s] = cho_solve(_factor(kernel[np.ix_(s, s)], c), sign[s])
        reached = kernel @ target
        if ((sign * reached < 1) == inside).all():
            return target
        t = _line_search((a, f), (target - a, reached - f), sign, c)
        if t < TOLERANCE and _off(a, f, sign, c) < ROUNDED:
            return a
        a, f = a + t * (target - a), f + t * (reached - f)
    raise StudyError(f"the SVM with C = {c:g} found no minimum in {MOST_STEPS} Newton steps")


def _majorised(kernel: np.ndarray, signs: np.ndarray, c: float, a: np.ndarray) -> tuple:
    """A few steps towards the minima of all columns (N, K) at once, and which of them are there.

    Beyond the margin the squared hinge lies below the parabola about f itself; so each step is a
    ridge regression on y within the margin and on f beyond it, with one factor for all. Far
    cheaper than Newton's steps while most shapes are within the margin. A column is at its minimum
    where a = 2 C y max(0, 1 - y f), here within ``TOLERANCE`` of a margin.
    """
    factor, f = _factor(kernel.copy(), c), kernel @ a
    for _ in range(CHEAP_STEPS):
        target = f + signs * np.maximum(0, 1 - signs * f)
        a = cho_solve(factor, target)
        f = target - a / (2 * c)  # = kernel a
        off = _off(a, f, signs, c)
        if (off < TOLERANCE).all():
            break
    return a, off < TOLERANCE


def _factor(kernel: np.ndarray, c: float) -> tuple:
    """Cholesky factor of kernel + I / 2C; overwrites kernel."""
    kernel[np.diag_indices(len(kernel))] += 0.5 / c
    return cho_factor(kernel, overwrite_a=True, check_finite=False)


def _off(a: np.ndarray, f: np.ndarray, sign: np.ndarray, c: float) -> np.ndarray:
    """How far, in margins, the worst shape is from a = 2 C y max(0, 1 - y f), the minimum."""
    return np.abs(a / (2 * c) - sign * np.maximum(0, 1 - sign * f)).max(0)


def _line_search(here: tuple, step: tuple, sign: np.ndarray, c: float) -> float:
    """Where the loss is lowest along a step of (a, f), exactly (Keerthi and DeCoste 2005, 3.1).

    The derivative grows along the step and is linear between the places where a shape crosses its
    margin; its root lies on the first piece whose end it has passed.
    """
    (a, f), (d, df) = here, step
    gap, rate = 1 - sign * f, sign * df  # a shape lies within its margin where gap > t rate
    with np.errstate(divide="ignore", invalid="ignore"):
        place = gap / rate
    crossing = np.flatnonzero((rate != 0) & (place > 0))
    crossing = crossing[np.argsort(place[crossing])]
    inside = (gap > 0) | ((gap == 0) & (rate < 0))
    # The derivative is offset + t slope.
    offset = a @ df - 2 * c * (gap * rate)[inside].sum()
    slope = d @ df + 2 * c * np.square(rate[inside]).sum()
    leaving = np.where(rate[crossing] > 0, -1, 1)
    offsets = offset - np.cumsum(2 * c * leaving * (gap * rate)[crossing])
    slopes = slope + np.cumsum(2 * c * leaving * np.square(rate[crossing]))
    offsets, slopes = np.append(offset, offsets), np.append(slope, slopes)
    slopes = np.maximum(slopes, np.finfo(float).tiny)  # above 0, whatever rounding left
    ends = np.append(place[crossing], np.inf)
    piece = np.flatnonzero(-offsets <= ends * slopes)[0]
    return float(-offsets[piece] / slopes[piece])


def one_versus_rest(kernel: np.ndarray, labels: np.ndarray, cs: tuple[float, ...]) -> np.ndarray:
    """Coefficients (len(cs), N, K) of a linear SVM a category against the rest, for every C.

    The answer to a shape is the category of the largest f = ``gram(x, train)`` times coefficients.
    cs ascends. Where a C leaves no shape within its margin, but for ``ROUNDED``, the larger ones
    have its coefficients: this is the hard margin then, which they approach.
    """
    signs = np.where(labels[:, None] == np.arange(labels.max() + 1), 1.0, -1.0)
    found = np.zeros((len(cs), *signs.shape))
    for i, c in enumerate(cs):
        before = found[max(i - 1, 0)]
        if (signs * (kernel @ before) > 1 - ROUNDED).all():
            found[i] = before
            continue
        # From the minima of the C before.
        found[i], there = _majorised(kernel, signs, c, before)
        for k in np.flatnonzero(~there):
            found[i, :, k] = squared_hinge(kernel, signs[:, k], c, found[i, :, k])
    return found


def folds(labels: np.ndarray, groups: np.ndarray, n: int, *key: str | int) -> np.ndarray:
    """The fold (N,) of every shape: n folds with like shares of the categories, groups whole."""
    cut = StratifiedGroupKFold(n, shuffle=True, random_state=rng.seed_of(*key, "folds") % 2**32)
    found = np.empty(len(labels), int)
    for k, (_, rows) in enumerate(cut.split(labels, labels, groups)):
        found[rows] = k
    return found


def grid_of_c(kernel: np.ndarray, relative: tuple[float, ...], c: float) -> tuple[float, ...]:
    """Values of C for features of any scale, ascending: ``relative`` over their variance, and c.

    Features times s with C over s^2 are the same SVM, but for the penalty on the intercept; so
    equal ``relative`` are alike for all features. The variance is the sum over features, from
    their ``gram``. StudyError where no feature varies.
    """
    variance = float(np.diag(kernel).mean() - kernel.mean())
    if not variance > 0:
        raise StudyError("the features are the same for all shapes: there is nothing to classify")
    return tuple(sorted({*(r / variance for r in relative), c}))


def cross_validated(
    kernel: np.ndarray, labels: np.ndarray, fold: np.ndarray, cs: tuple[float, ...]
) -> np.ndarray:
    """Share of right answers (len(cs),) of ``one_versus_rest`` on folds that it has not seen."""
    right = np.zeros(len(cs))
    for k in np.unique(fold):
        rows, others = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        found = one_versus_rest(kernel[np.ix_(others, others)], labels[others], cs)
        f = kernel[np.ix_(rows, others)] @ found  # (len(cs), n, K)
        right += (f.argmax(2) == labels[rows]).sum(1)
    return right / len(labels)


def logistic(x: np.ndarray, labels: np.ndarray, c: float) -> LogisticRegression:
    """Multinomial logistic regression with L2 penalty, |w|^2 / 2 + C sum of log losses."""
    found = LogisticRegression(C=c, tol=1e-3, max_iter=2000)
    return found.fit(x, labels)


def cross_validated_logistic(
    x: np.ndarray, labels: np.ndarray, fold: np.ndarray, cs: tuple[float, ...]
) -> np.ndarray:
    """Share of right answers (len(cs),) of ``logistic`` on folds that it has not seen."""
    right = np.zeros(len(cs))
    for k in np.unique(fold):
        for i, c in enumerate(cs):
            found = logistic(x[fold != k], labels[fold != k], c)
            right[i] += (found.predict(x[fold == k]) == labels[fold == k]).sum()
    return right / len(labels)


def stratified_draw(labels: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Rows with about ``share`` of the labels of every category, at least one of each."""
    chosen = []
    for k in np.unique(labels):
        rows = np.flatnonzero(labels == k)
        n = max(1, round(share * len(rows)))
        chosen.append(generator.choice(rows, n, replace=False))
    return np.sort(np.concatenate(chosen))


def softmax_epochs(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, epochs: int, lr: float
) -> np.ndarray:
    """Answers (epochs, M) on the test split after every epoch of a softmax layer without penalty.

    Adam on all shapes at once from weights 0: the classifier of DescriptorNet's released code,
    which reports its best epoch on the test split.
    """
    x, y, other = torch.from_numpy(train), torch.from_numpy(labels), torch.from_numpy(test)
    n_classes = int(labels.max()) + 1
    weight = torch.zeros(x.shape[1], n_classes, requires_grad=True)
    bias = torch.zeros(n_classes, requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr)
    answers = []
    for _ in range(epochs):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(x @ weight + bias, y).backward()
        adam.step()
        with torch.no_grad():
            answers.append((other @ weight + bias).argmax(1).numpy())
    return np.stack(answers)
