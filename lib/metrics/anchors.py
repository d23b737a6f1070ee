"""Anchor rows: generators so simple that every model should beat them, and a plain copier.

All are fitted on the training grids of one category, bool (N, D, D, D), and give one grid per
seed, bool (len(seeds), D, D, D). Shape s depends on seed s alone, whatever the other seeds are:
every seed has a random stream of its own, keyed by the anchor's tag and the seed.
"""

import numpy as np

from lib.errors import StudyError
from lib.metrics._checks import whole_number

BERNOULLI, PCA_GAUSSIAN, MEMORISER, NOISE = 1, 2, 3, 4  # tags of the random streams
THRESHOLD = 0.5


def training_grids(train, minimum=1):
    """`train` as a bool array (N, D, D, D) with at least `minimum` grids."""
    if not isinstance(train, np.ndarray) or train.dtype != bool or train.ndim != 4:
        raise StudyError("train: expected a bool array (N, D, D, D) of unpacked training grids")
    if len(train) < minimum or train.size == 0:
        raise StudyError(f"train: {len(train)} training grids, at least {minimum} needed")
    return train


def streams(tag, seeds):
    """One independent numpy Generator per seed."""
    return [np.random.default_rng([tag, whole_number(s, "seeds", 0)]) for s in seeds]


def stack(shapes, grid):
    """List of bool grids as one array (n, *grid), also when the list is empty."""
    return np.array(shapes, dtype=bool).reshape(len(shapes), *grid)


def bernoulli(train, seeds):
    """Independent voxels, each occupied as often as in the training grids.

    train: bool (N, D, D, D); seeds: integers >= 0. Returns bool (len(seeds), D, D, D). Raises
    StudyError on other input.
    """
    probability = training_grids(train).mean(axis=0)
    shapes = [rng.random(probability.shape) < probability for rng in streams(BERNOULLI, seeds)]
    return stack(shapes, probability.shape)


def component_basis(centred, n_components):
    """U_k (N, k): left singular vectors of centred (N, V), the k of largest variance first."""
    _, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
    basis = vectors[:, ::-1][:, :n_components]
    # eigh leaves the sign open; the entry of largest size is made positive.
    largest = np.abs(basis).argmax(axis=0)
    return basis * np.sign(basis[largest, np.arange(basis.shape[1])])


def pca_gaussian(train, seeds, n_components=None):
    """Gaussian with the training grids' mean and covariance, cut at .5.

    x = mean + X_c^T w / sqrt(N - 1) with X_c the centred grids (N, D^3) and w standard normal has
    covariance X_c^T X_c / (N - 1) exactly, without ever forming it. With n_components = k,
    w = U_k z (U_k: left singular vectors, z standard normal in k dimensions) keeps the k
    directions of largest variance. Voxels above .5 are occupied.

    train: bool (N, D, D, D), N >= 2; seeds: integers >= 0; n_components: 1 to N - 1, None for
    all. Returns bool (len(seeds), D, D, D). Needs 4 N D^3 bytes. Raises StudyError on other input.
    """
    train = training_grids(train, minimum=2)
    n, grid = len(train), train.shape[1:]
    flat = train.reshape(n, -1).astype(np.float32)
    mean = flat.mean(axis=0)
    flat -= mean
    basis = None
    if n_components is not None:
        n_components = whole_number(n_components, "n_components", 1, n - 1)
        basis = component_basis(flat, n_components)
    shapes = []
    # One product per seed: a product over all seeds would round differently with their number.
    for rng in streams(PCA_GAUSSIAN, seeds):
        w = rng.standard_normal(n) if basis is None else basis @ rng.standard_normal(n_components)
        weights = (w / np.sqrt(n - 1)).astype(np.float32)
        shapes.append(mean + weights @ flat > THRESHOLD)
    return stack(shapes, grid)


def memoriser(train, seeds):
    """Copies of training grids: seed s names place s, modulo N, in a fixed shuffle of them.

    So shape s does not depend on the other seeds, and N consecutive seeds give every training
    grid once: a set is drawn without replacement as long as its seeds differ modulo N.

    train: bool (N, D, D, D); seeds: integers >= 0. Returns bool (len(seeds), D, D, D). Raises
    StudyError on other input.
    """
    train = training_grids(train)
    order = np.random.default_rng([MEMORISER]).permutation(len(train))
    places = [whole_number(seed, "seeds", 0) % len(train) for seed in seeds]
    return train[order[places]] if places else stack([], train.shape[1:])


def noise(shape, occupancy, seeds):
    """Independent voxels of one probability, the mean occupancy of the training grids.

    shape: (D, D, D); occupancy: in [0, 1]; seeds: integers >= 0. Returns bool
    (len(seeds), D, D, D). Raises StudyError on other input.
    """
    shape = tuple(whole_number(side, "shape", 1) for side in shape)
    if not 0 <= occupancy <= 1:
        raise StudyError(f"occupancy: {occupancy} is not a fraction in [0, 1]")
    return stack([rng.random(shape) < occupancy for rng in streams(NOISE, seeds)], shape)
