"""Table 5 of 3DWINN: what the stored classifiers answer on the test split, and how it is read."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax

from lib import cache, classify, config, data, evaluate, heldout, metrics, rng
from lib.errors import StudyError
from lib.metrics import Estimate
from lib.train import baseline, hardened, introspective, orion, runs, tuned, voxnet

# Named here rather than looked up, so that the pipeline sees what an answer depends on.
MODELS = {
    "baseline": baseline.MODEL,
    "tuned": tuned.MODEL,
    "hardened": hardened.MODEL,
    "introspective": introspective.MODEL,
    "voxnet": voxnet.MODEL,
    "orion": orion.MODEL,
}
# The published name of a row, where it is not that of the model.
ROWS = {"introspective": "3DWINN"}
COMPARED = ("3DWINN", "Baseline")
ENSEMBLE = "mean of all rows (ours)"
PRINTED = ("baseline", "introspective", "voxnet", "orion")  # with hyper-parameters of a paper
MARGIN = 0.01  # of non-inferiority: one point of accuracy
PERMUTATIONS = 10_000
SECOND = "3D ShapeNets voxels"  # the voxeliser of the turned test volumes


@dataclass(frozen=True)
class Asked:
    """The logits of one run: of validation and test shapes, foreign shapes, and turned ones.

    validation (V, 10), test (N, 10); foreign: name -> (M, 10); turned: name -> (M, views, 10).
    values: the critic's f of test and foreign shapes, of the introspective network alone.
    """

    run: runs.Run
    validation: np.ndarray
    test: np.ndarray
    foreign: dict[str, np.ndarray]
    turned: dict[str, np.ndarray]
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class Material:
    """What every classifier is asked about: the splits, foreign shapes and turned shapes.

    foreign: name -> bool (M, 30, 30, 30); turned: name -> bool (M, views, 30, 30, 30) and labels;
    ``missing`` says why turned shapes are not there, or is empty.
    """

    test: data.Split
    validation: np.ndarray  # labels
    foreign: dict[str, np.ndarray]
    turned: dict[str, tuple[np.ndarray, np.ndarray]]
    missing: str


def row_of(model: str) -> str:
    """The row of a model in the tables of classifiers."""
    return ROWS.get(model, runs.MODELS[model])


def listed(profile: config.Profile) -> list[runs.Run]:
    """The stored classifiers of the table; of the judges those that ``judge_seeds`` names."""
    seeds = config.load(profile.judge.profile).evaluation.judge_seeds
    return [r for r in classify.present(profile) if r.model in MODELS or r.seed in seeds]


def gather(profile: config.Profile) -> Material:
    """The shapes of a profile that classifiers are asked about; the test split is opened here."""
    train, test = data.load_train(profile.data), heldout.load_test(profile.data)
    turned, missing = _turned(profile, test)
    labels = train.labels[train.validation]
    return Material(test, labels, _foreign(profile, train, test), turned, missing)


def _foreign(profile: config.Profile, train: data.Split, test: data.Split) -> dict:
    """``n_equal`` shapes a category of three anchors, and as many test shapes upside down.

    Of all ten categories, as the test shapes that they are told from, whichever a profile
    generates.
    """
    n = profile.evaluation.n_equal
    anchors = [evaluate.anchor_shapes(profile, c, train) for c in config.CATEGORIES]
    found = {
        name: np.concatenate([evaluate.to_judge(profile, a[name][:n]) for a in anchors])
        for name in ("noise", "Bernoulli", "PCA-Gaussian")
    }
    filled = np.flatnonzero(test.voxels.any((1, 2, 3)))
    rows = rng.numpy_generator("supervised", "upside down").permutation(filled)
    return found | {"upside down": test.voxels[rows[: n * len(config.CATEGORIES)], :, :, ::-1]}


def _turned(profile: config.Profile, test: data.Split) -> tuple[dict, str]:
    """Procedural test shapes in four quarter turns, or the twelve azimuths of 3D ShapeNets."""
    if profile.data.source == "procedural":
        views = [np.rot90(test.voxels, k, (1, 2)) for k in range(4)]
        return {"4 quarter turns": (np.stack(views, 1), test.labels)}, ""
    try:
        return {f"12 azimuths, {SECOND}": heldout.load_rotations()}, ""
    except StudyError as error:
        return {}, str(error)


def ask(profile: config.Profile, run: runs.Run, material: Material) -> Asked:
    """Ask one stored classifier about everything, in single precision; its logits are kept.

    Turned shapes go through the network itself, without the run's own views, azimuth by azimuth.
    """
    classifier = classify.load_classifier(run, profile)
    key = cache.classifier_hash(profile, run.model, classifier)
    test = cache.logits(key, classifier, material.test.voxels)
    foreign = {n: cache.logits(key, classifier, grids) for n, grids in material.foreign.items()}
    alone = cache.classifier_hash(profile, run.model, classifier.network)
    turned = {
        name: np.stack(
            [cache.logits(alone, classifier.network, views[:, k]) for k in range(views.shape[1])],
            1,
        )
        for name, (views, _) in material.turned.items()
    }
    values = {}
    if run.model == "introspective":
        value = classifier.network.cpu().value_of
        values = {
            name: value(torch.from_numpy(found).float()).numpy().astype(np.float64)
            for name, found in {"test": test, **foreign}.items()
        }
    validation = classify.validation_logits(run, profile)
    return Asked(run, validation, test, foreign, turned, values)


def grouped(asked: list[Asked]) -> dict[str, list[Asked]]:
    """Answers by row of the table, the seeds of a row in order."""
    found = {}
    for a in asked:
        found.setdefault(row_of(a.run.model), []).append(a)
    return found


def columns(test: data.Split) -> dict[str, np.ndarray]:
    """Which test shapes count: all, without exact copies of training shapes, without near ones."""
    kept = evaluate.test_columns(test)
    return {"accuracy" if n == "all" else f"accuracy, {n}": rows for n, rows in kept.items()}


def right(found: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which answers (N, K) are right, bool (N,)."""
    return found.argmax(1) == labels


def share(correct: list[np.ndarray]) -> tuple[Estimate, str]:
    """The share of right answers: Wilson's interval of one run, Student's over several seeds."""
    if len(correct) == 1:
        found = metrics.wilson_interval(int(correct[0].sum()), len(correct[0]))
        return found, "Wilson interval"
    means = np.array([c.mean() for c in correct])
    note = f"mean over {len(correct)} seeds, Student t interval"
    return metrics.student_interval(means), note


def accuracy_rows(material: Material, asked: list[Asked]) -> Iterable[dict]:
    """Accuracy of every row in three columns, of every run, and validation beside test error."""
    labels = material.test.labels
    for row, seeds in grouped(asked).items():
        correct = [right(a.test, labels) for a in seeds]
        for metric, keep in columns(material.test).items():
            found, note = share([c[keep] for c in correct])
            headline = int(metric == "accuracy")
            yield _row(row, metric, found, len(seeds), keep.sum(), note, headline)
        for a, c in zip(seeds, correct, strict=True):
            found, note = share([c])
            yield _row(row, f"accuracy, seed {a.run.seed}", found, 1, len(c), note)
        held = [right(a.validation, material.validation) for a in seeds]
        for metric, answers in (("validation error", held), ("test error", correct)):
            found, note = share([~c for c in answers])
            yield _row(row, metric, found, len(seeds), len(answers[0]), note)


def ensemble(asked: list[Asked], part: str) -> np.ndarray:
    """Mean probabilities (N, 10) of all rows on ``part`` (test, validation), seeds of a row first.

    Every row counts, however it fares: nothing of it is chosen.
    """
    rows = grouped(asked).values()
    return np.mean([np.mean([softmax(getattr(a, part), 1) for a in s], 0) for s in rows], 0)


def ensemble_rows(material: Material, asked: list[Asked]) -> Iterable[dict]:
    """Accuracy and errors of ``ensemble``, where there are two rows or more."""
    if len(grouped(asked)) < 2:
        return
    about = f"of {len(asked)} networks; Wilson interval"
    correct = right(ensemble(asked, "test"), material.test.labels)
    held = right(ensemble(asked, "validation"), material.validation)
    for metric, keep in columns(material.test).items():
        found, headline = share([correct[keep]])[0], int(metric == "accuracy")
        yield _row(ENSEMBLE, metric, found, 1, keep.sum(), about, headline)
    for metric, answers in (("validation error", held), ("test error", correct)):
        yield _row(ENSEMBLE, metric, share([~answers])[0], 1, len(answers), about)


def comparison(material: Material, asked: list[Asked]) -> dict | None:
    """3DWINN against Baseline on the same test shapes, per-shape means over seeds; or None.

    ``difference`` is an Estimate with Student's interval over shapes. ``p difference`` is
    two-sided, ``p non-inferiority`` one-sided at ``MARGIN``. All seeds of either row count.
    """
    found = grouped(asked)
    if not set(COMPARED) <= set(found):
        return None
    a, b = (
        np.mean([right(s.test, material.test.labels) for s in found[row]], 0) for row in COMPARED
    )
    generators = [rng.numpy_generator("supervised", name) for name in ("difference", "margin")]
    return {
        "difference": metrics.student_interval(a - b),
        "p difference": metrics.paired_permutation_test(a, b, PERMUTATIONS, generators[0]),
        "p non-inferiority": metrics.non_inferiority_test(
            a, b, MARGIN, PERMUTATIONS, generators[1]
        ),
        "n_seeds": min(len(found[row]) for row in COMPARED),
    }


def comparison_rows(material: Material, asked: list[Asked]) -> Iterable[dict]:
    """The comparison as rows of 3DWINN; none where one of the two is not trained."""
    found = comparison(material, asked)
    if found is None:
        return
    n = len(material.test.labels)
    note = "paired over test shapes, Student t interval"
    metric = f"accuracy above {COMPARED[1]}"
    yield _row(COMPARED[0], metric, found["difference"], found["n_seeds"], n, note)
    tests = {
        "p difference": "two-sided sign permutation test",
        "p non-inferiority": f"one-sided sign permutation test, margin {MARGIN:g}",
    }
    for name, note in tests.items():
        p = Estimate(found[name], math.nan, math.nan)
        yield _row(COMPARED[0], f"{name} to {COMPARED[1]}", p, found["n_seeds"], n, note)


def probabilities(a: Asked, labels: np.ndarray | None = None) -> np.ndarray:
    """Test probabilities (N, 10) of a run; with validation labels, at the temperature they fit."""
    scale = 1.0 if labels is None else metrics.temperature(a.validation, labels)
    return softmax(a.test / scale, 1)


def calibration_rows(material: Material, asked: list[Asked]) -> Iterable[dict]:
    """Expected calibration error on the test split, as trained and at a fitted temperature."""
    labels = material.test.labels
    kinds = {"": None, ", temperature fitted on validation": material.validation}
    for row, seeds in grouped(asked).items():
        for kind, fitted in kinds.items():
            errors = [
                metrics.expected_calibration_error(probabilities(a, fitted), labels) for a in seeds
            ]
            found, note = _over_seeds(errors)
            metric = f"expected calibration error{kind}"
            yield _row(row, metric, found, len(seeds), len(labels), note)


def detection_rows(asked: list[Asked]) -> Iterable[dict]:
    """Area under the ROC curve of telling foreign from test shapes by energy, and by the critic."""
    for row, seeds in grouped(asked).items():
        for name in seeds[0].foreign:
            scores = {
                "free energy": [
                    (metrics.free_energy(a.test), metrics.free_energy(a.foreign[name]))
                    for a in seeds
                ],
                "-f": [(-a.values["test"], -a.values[name]) for a in seeds if a.values],
            }
            for score, pairs in scores.items():
                if not pairs:
                    continue
                areas = [metrics.detection_auroc(*pair) for pair in pairs]
                found, note = _over_seeds([area.value for area in areas])
                if len(areas) == 1:
                    found, note = areas[0], "interval of Hanley and McNeil"
                n = len(seeds[0].foreign[name])
                yield _row(row, f"AUROC of {score}, {name}", found, len(seeds), n, note)


def rotation_rows(material: Material, asked: list[Asked]) -> Iterable[dict]:
    """Accuracy on turned shapes: of the first view alone, and of the mean over all views.

    Where the file of turned volumes is missing the cell stays empty and its note says so.
    """
    for row, seeds in grouped(asked).items():
        for name, (_, labels) in material.turned.items():
            for metric, views in (("first view", slice(0, 1)), ("voted", slice(None))):
                correct = [right(a.turned[name][:, views].mean(1), labels) for a in seeds]
                found, note = share(correct)
                metric = f"accuracy, {name}, {metric}"
                yield _row(row, metric, found, len(seeds), len(labels), note)
        if material.missing:
            nothing = Estimate(*(math.nan,) * 3)
            metric = f"accuracy, 12 azimuths, {SECOND}, voted"
            yield _row(row, metric, nothing, len(seeds), "", material.missing)


def _over_seeds(values: list[float]) -> tuple[Estimate, str]:
    if len(values) == 1:
        return Estimate(values[0], math.nan, math.nan), "one run"
    note = f"mean over {len(values)} seeds, Student t interval"
    return metrics.student_interval(np.array(values)), note


def _row(row, metric, found: Estimate, n_seeds, n_samples, note: str, headline: int = 0) -> dict:
    n = n_samples if n_samples == "" else int(n_samples)
    shape = dict(row=row, category="all", metric=metric, n_samples=n, n_seeds=n_seeds)
    return shape | dict(estimate=found, headline=headline, note=note)


def table_rows(material: Material, asked: list[Asked]) -> list[dict]:
    """All rows of table ``supervised``."""
    return [
        *accuracy_rows(material, asked),
        *ensemble_rows(material, asked),
        *comparison_rows(material, asked),
        *calibration_rows(material, asked),
        *detection_rows(asked),
        *rotation_rows(material, asked),
    ]


def run_ids(asked: list[Asked]) -> dict[str, list[str]]:
    """The runs behind every row."""
    found = {row: [a.run.id for a in seeds] for row, seeds in grouped(asked).items()}
    return found | {ENSEMBLE: [i for ids in found.values() for i in ids]}


def departures(profile: config.Profile, asked: list[Asked]) -> pd.DataFrame:
    """Where the parameters of the asked classifiers are not those of profile ``paper``.

    Index row and parameter, columns ``here`` and ``paper``. Classifiers of our own have none; the
    memory layout, which changes no result, is left out.
    """
    paper, lines = config.load("paper"), {}
    for model in {a.run.model: None for a in asked if a.run.model in PRINTED}:
        here, there = config.section(profile, model), config.section(paper, model)
        for key in [k for k in here if k != "layout" and here[k] != there[k]]:
            lines[row_of(model), key] = {"here": str(here[key]), "paper": str(there[key])}
    index = pd.MultiIndex.from_tuples(lines, names=["row", "parameter"])
    return pd.DataFrame(list(lines.values()), index=index, columns=["here", "paper"])


def in_words(found: dict | None) -> str:
    """What the comparison says, whichever way it fell."""
    a, b = COMPARED
    if found is None:
        return f"{a} and {b} are not both trained in this profile, so nothing is compared."
    points = [100 * v for v in found["difference"]]
    seeds = "one seed" if found["n_seeds"] == 1 else f"at least {found['n_seeds']} seeds"
    different = "differ" if found["p difference"] < 0.05 else "cannot be told apart"
    inferior = "is" if found["p non-inferiority"] < 0.05 else "is not shown to be"
    return (
        f"{a} less {b}: {points[0]:+.2f} points, [{points[1]:+.2f}, {points[2]:+.2f}] over test "
        f"shapes, from {seeds} of each. At the 5 % level they "
        f"{different} (p = {found['p difference']:.3f}), and {a} {inferior} non-inferior at "
        f"{100 * MARGIN:g} point (p = {found['p non-inferiority']:.3f})."
    )
