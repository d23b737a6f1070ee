"""Does a model copy its training shapes?"""

import numpy as np
from scipy.stats import rankdata

from lib.metrics._checks import fraction_array


def mann_whitney(x, y):
    """U (pairs with x_i > y_j, ties one half) and its normal score under the null, ties allowed."""
    n, m = len(x), len(y)
    ranks = rankdata(np.concatenate([x, y]))
    u = ranks[:n].sum() - n * (n + 1) / 2
    # Midranks keep the mean of U; ties shrink its variance to that of the observed ranks.
    variance = n * m / (n + m) * np.var(ranks, ddof=1)
    return u, (u - n * m / 2) / np.sqrt(variance) if variance > 0 else 0.0


def memorisation(generated_to_train_iou, heldout_to_train_iou):
    """Compare how near generated and held-out real shapes come to the training shapes.

    generated_to_train_iou: (n,), heldout_to_train_iou: (m,), both the IoU of each shape with its
    nearest training shape (`nearest_by_iou`), in [0, 1]. Returns a dict of floats:
      share_95, share_90                  share of generated shapes at or above that IoU
      heldout_share_95, heldout_share_90  the same of held-out shapes, the level to expect
      auc  P(a generated shape is nearer to train than a held-out one), ties one half: .5 when
           the model is as near as fresh data, 1 when it copies, 0 when all of it is far away
      z    normal score of the Mann-Whitney U behind `auc`; above 3 is evidence of copying
    A low `auc` says "far from train", which bad shapes are too. Raises StudyError on empty input
    and values outside [0, 1].

    Source: Meehan, Chaudhuri and Dasgupta 2020 (arXiv:2004.05675), section 3, with one cell;
    their C_T counts distances, so it is -z.
    """
    generated = fraction_array(generated_to_train_iou, "generated_to_train_iou")
    heldout = fraction_array(heldout_to_train_iou, "heldout_to_train_iou")
    u, z = mann_whitney(generated, heldout)
    # A float32 IoU of exactly 19/20 is a little below .95 as a float64.
    at_95, at_90 = 0.95 - 1e-6, 0.90 - 1e-6
    return {
        "share_95": float(np.mean(generated >= at_95)),
        "share_90": float(np.mean(generated >= at_90)),
        "heldout_share_95": float(np.mean(heldout >= at_95)),
        "heldout_share_90": float(np.mean(heldout >= at_90)),
        "auc": float(u / (len(generated) * len(heldout))),
        "z": float(z),
    }
