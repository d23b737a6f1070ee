"""Test accuracy of the Baseline by the number of shapes it learns from: what more data would buy.

Every point trains for the same number of steps from the same first weights, so that fewer shapes
do not also mean less training. They are seen the more often instead, and all shapes least: what
shapes are worth at equal epochs is not measured.
"""

import hashlib
import json

import numpy as np
import pandas as pd

from lib import classify, config, data, device, heldout, metrics, paths, rng
from lib.train import baseline, engine, runs

LOOKS = 5  # at the validation part, which chooses the weights


def subset(split: data.Split, share: float, seed: int) -> data.Split:
    """The validation part whole, and of every category a share of the other shapes, at least one.

    Nested: a smaller share is part of a larger one of the same seed.
    """
    kept = split.validation.copy()
    for category in np.unique(split.labels):
        rows = np.flatnonzero((split.labels == category) & ~split.validation)
        rows = rng.numpy_generator(seed, "learning curve", int(category)).permutation(rows)
        kept[rows[: max(1, round(share * len(rows)))]] = True
    return split.where(kept)


def measure(profile: config.Profile) -> pd.DataFrame:
    """One line a seed and share: share, seed, n (training shapes), epochs, and both accuracies.

    epochs: how often the steps of a point show it every shape. Columns value, low, high are of the
    test split, Wilson's interval; validation has the accuracy that chose the weights. Complete
    points are taken up as they are, an interrupted one goes on.
    """
    split, test = data.load_train(profile.data), heldout.load_test(profile.data)
    lines = []
    for seed in profile.learning_curve.seeds:
        for share in profile.learning_curve.shares:
            part = subset(split, share, seed)
            task = _train(profile, part, share, seed)
            answers = classify.logits(task.network.eval(), test.voxels).argmax(1)
            found = metrics.wilson_interval(int((answers == test.labels).sum()), len(answers))
            n = int((~part.validation).sum())
            epochs = task.n_steps * profile.baseline.batch / n
            point = dict(share=share, seed=seed, n=n, epochs=epochs)
            point["validation"] = 1 - task.counters["best_error"]
            lines.append(point | found._asdict())
    return pd.DataFrame(lines)


def _train(profile: config.Profile, part: data.Split, share: float, seed: int):
    task = baseline.MODEL.task(profile, part, seed, device.pick(profile.device))
    task.n_steps = profile.learning_curve.steps
    task.log_every = max(1, task.n_steps // LOOKS)
    key = [config.section(profile, "baseline"), task.n_steps, share, seed, profile.data.side]
    key += [data.card(profile.data)["hash"], runs.syntax_hash("baseline")]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = paths.CHECKPOINTS / f"learning-curve-{name}"
    with engine.lock(folder):
        engine.fit(task, folder, name=f"{share:.0%} of the shapes, seed {seed}")
    return task


def in_words(found: pd.DataFrame) -> str:
    """What more shapes bought, in points of test accuracy a doubling, from the table's two ends."""
    a, b = found["share"].min(), found["share"].max()
    if a == b:
        return "One share alone makes no curve."
    small, large = found[found["share"] == a], found[found["share"] == b]
    low, high = small["value"].mean(), large["value"].mean()
    gain = 100 * (high - low) / np.log2(b / a)
    seen = [part["epochs"].mean() for part in (small, large)]
    budget = (
        f" Equal are the steps, not the epochs: {seen[0]:.1f} at {a:.0%}, {seen[1]:.1f} at {b:.0%}."
    )
    change = f"From {a:.0%} to {b:.0%} of the shapes test accuracy goes from {low:.1%} to"
    change = f"{change} {high:.1%}: {gain:+.1f} points a doubling. "
    if small["high"].max() < large["low"].min():
        said = "The intervals lie apart: more shapes help, though curves flatten."
    else:
        said = "On this budget of steps no gain shows beyond the intervals."
    return change + said + budget
