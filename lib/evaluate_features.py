"""Rows of table ``unsupervised``: categories told apart by features learned without labels.

Every row of features meets the same linear classifiers, fitted on the official training split of
all ten categories, validation part included: nothing is chosen on that part alone, only by
cross-validation with near duplicates in one fold. The test split decides nothing, but in the
figures that are marked as not valid and show what such a choice would have claimed.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import pandas as pd

from lib import (
    cache,
    config,
    data,
    device,
    evaluate,
    features,
    files,
    heldout,
    linear,
    metrics,
    paths,
    rng,
)
from lib.metrics import Estimate
from lib.train import runs

# What the papers do with their features: classifier, scaling, and how C is found.
PAPER, VALIDATED = "C as published", "C by cross-validation"
PROTOCOLS = {
    "winn3d": f"raw, {PAPER}",
    "gan3d": f"raw, {VALIDATED}",  # neither scaling nor C is stated
    "desnet3d": f"logistic, {VALIDATED}",
}
LOGISTIC = "logistic"
CHOSEN = "SVM, scaling and C by cross-validation"  # of rows without a paper
# Networks that nobody trained, beside 3DWINN's; and those that a trained model is compared with.
UNTRAINED = ("gan3d", "desnet3d", "vae3d")
KIN = {"beyond": "winn3d", "autoencoder": "vae3d"}  # of another model's shape; else its own
# Features differ in scale, and C has one value here: equal scales make the shares comparable.
SHARES_SCALING = "standardised"
N_PERMUTATIONS = 10_000


@dataclass(frozen=True)
class Row:
    """Features of both splits (N, F), (M, F) under the name of their row.

    protocol: what the row's paper does with them; None for rows without a paper, ours and the
    controls, for which cross-validation chooses the scaling too. softmax: whether DescriptorNet's
    own classifier is asked too. control: the row of the same network with random weights.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    note: str
    protocol: str | None = None
    softmax: bool = False
    control: str = ""
    run_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What is told apart: both splits, the folds (N,), and masks (M,) of the test columns."""

    profile: config.Profile
    train: data.Split
    test: data.Split
    fold: np.ndarray
    columns: dict[str, np.ndarray]


@dataclass
class Found:
    """What was found of a row; its features are gone.

    answers: protocol -> categories (M,) of the test shapes; validated: protocol -> accuracy in
    cross-validation; notes: protocol -> the C that was used; edges: the protocols whose C lies
    on the edge of its grid. protocol: that of the row's paper, or None; svm: the SVM that
    cross-validation prefers. invalid: what a choice on the test split claims -> its answers (M,),
    how many it chose from, and the protocol of the honest choice. shares: share of the labels ->
    accuracies (draws,).
    """

    row: str
    note: str
    run_ids: tuple[str, ...]
    protocol: str | None = None
    control: str = ""
    svm: str = ""
    answers: dict[str, np.ndarray] = field(default_factory=dict)
    validated: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    edges: list[str] = field(default_factory=list)
    invalid: dict[str, tuple[np.ndarray, int, str]] = field(default_factory=dict)
    shares: dict[float, np.ndarray] = field(default_factory=dict)

    @property
    def chosen(self) -> str:
        """The protocol that stands in the table."""
        return self.protocol or self.svm


def near_groups(split: data.Split) -> np.ndarray:
    """A number (N,) for every shape, equal for shapes linked by an overlap of .95 or more."""
    near = np.flatnonzero(split.duplicate >= data.NEAR[0])
    if not len(near):
        return np.arange(len(split.labels))
    flat = split.voxels[near].reshape(len(near), -1)
    i, j, _ = data.overlaps(flat, flat, data.NEAR[0])
    return data.linked(len(split.labels), near[i], near[j])


def task(profile: config.Profile) -> Task:
    """Both splits of all ten categories, and the folds of cross-validation.

    ``features.n_train`` takes the first shapes of every category; 0 takes all.
    """
    train, test = data.load_train(profile.data), heldout.load_test(profile.data)
    settings = profile.features
    if settings.n_train:
        rows = [
            np.flatnonzero(train.labels == k)[: settings.n_train] for k in np.unique(train.labels)
        ]
        train = train.where(np.sort(np.concatenate(rows)))
    fold = linear.folds(train.labels, near_groups(train), settings.folds, "features")
    return Task(profile, train, test, fold, evaluate.test_columns(test))


def feature_runs(profile: config.Profile) -> list[runs.Run]:
    """The trained run of every model with features: of all categories, else of chairs alone.

    First seeds only. A run whose weights are not here has no row; the store does not carry all.
    """
    found = {}
    for run in evaluate.trained_runs(profile):
        feature = features.of_model(run.model, profile)
        if run.seed or feature is None or run.category not in ("all", "chair"):
            continue
        before = found.get(run.model)
        if features.is_stored(run, feature) and (before is None or before.category != "all"):
            found[run.model] = run
    return [found[m] for m in runs.MODELS if m in found]


def trained_rows(where: Task, progress=iter) -> Iterator[Row]:
    """A row for every model with features, and for our own a second one of several layers."""
    for run in feature_runs(where.profile):
        feature = features.of_model(run.model, where.profile)
        network = features.load_network(run, where.profile, feature.network)
        joint = run.category == "all"
        name = runs.MODELS[run.model] + ("" if joint else f" ({run.category} only)")
        note = f"features trained on {'all ten categories' if joint else run.category + ' only'}"
        control = f"untrained {runs.MODELS[KIN.get(run.model, run.model)]}"
        common = dict(note=note, run_ids=(run.id,), control=control)
        if run.model == "beyond":
            yield from _critic_rows(where, name, network, progress, **common)
        else:
            parts = _extracted(where, feature.function, network, progress)
            protocol = PROTOCOLS.get(run.model)
            yield Row(name, *parts, protocol=protocol, softmax=_softmax(run.model), **common)


def _softmax(model: str) -> bool:
    """Whether the model's paper classifies with a softmax layer."""
    return PROTOCOLS.get(model, "").startswith(LOGISTIC)


def control_rows(where: Task, progress=iter) -> Iterator[Row]:
    """Rows of what nobody trained: voxels, their principal components, untrained networks."""
    flat = [features.flat_voxels(split.voxels) for split in (where.train, where.test)]
    yield Row("raw voxels", *flat, note="no features")
    n = where.profile.features.pca
    parts = features.principal_components(*flat, n)
    yield Row(f"PCA-{n} of the voxels", *parts, note=f"{parts[0].shape[1]} components")
    note = "random weights, seed 0"
    critic = features.untrained("winn3d", where.profile, where.train)
    yield from _critic_rows(where, "untrained 3DWINN", critic, progress, note=note)
    for model in UNTRAINED:
        function = features.of_model(model, where.profile).function
        network = features.untrained(model, where.profile, where.train)
        parts = _extracted(where, function, network, progress)
        name = f"untrained {runs.MODELS[model]}"
        yield Row(name, *parts, note=note, softmax=_softmax(model))


def _critic_rows(
    where: Task, name: str, critic, progress, control: str = "", **rest
) -> Iterator[Row]:
    """The last block of a critic, which are 3DWINN's features, and all that ``layers`` has."""
    parts = _extracted(where, features.layer_features, critic, progress)
    n = critic.head.in_features
    yield Row(name, *(part[:, -n:] for part in parts), control=control, **rest)
    control = control and f"{control}, layers"
    yield Row(f"{name}, layers", *parts, control=control, **rest)


def _extracted(where: Task, function, network, progress) -> list[np.ndarray]:
    """Features of both splits."""
    network = network.to(device.pick(where.profile.device))
    side = where.profile.data.side
    return [
        features.extract(function, network, split.voxels, side, progress=progress)
        for split in (where.train, where.test)
    ]


def classify(where: Task, row: Row) -> Found:
    """All classifiers on one row of features: every scaling, with C as published and validated."""
    found = Found(row.name, row.note, row.run_ids, row.protocol, row.control)
    for scaling in linear.SCALINGS:
        _support_vectors(where, row, scaling, found)
    found.svm = max((f"{s}, {VALIDATED}" for s in linear.SCALINGS), key=found.validated.get)
    if row.softmax:
        _logistic(where, row, found)
    return found


def _support_vectors(where: Task, row: Row, scaling: str, found: Found) -> None:
    """A linear SVM a category against the rest, on features of one scaling."""
    settings, labels = where.profile.features, where.train.labels
    train, test = linear.scaled(scaling, row.train, row.test)
    kernel, across = linear.gram(train, train), linear.gram(test, train)
    cs = linear.grid_of_c(kernel, settings.relative_cs, settings.c)
    validated = linear.cross_validated(kernel, labels, where.fold, cs)
    answers = (across @ linear.one_versus_rest(kernel, labels, cs)).argmax(2)
    for how, i in ((PAPER, cs.index(settings.c)), (VALIDATED, int(validated.argmax()))):
        name = f"{scaling}, {how}"
        found.answers[name], found.validated[name] = answers[i], float(validated[i])
        found.notes[name] = f"linear SVM, {scaling} features, C = {cs[i]:.3g}"
    _mark_edge(found, name, validated)
    right = (answers == where.test.labels).sum(1)
    claim = f"{scaling}, best C on the test split"
    found.invalid[claim] = answers[right.argmax()], len(answers), f"{scaling}, {VALIDATED}"
    if scaling == SHARES_SCALING:
        found.shares = _shares(where, kernel, across)


def _mark_edge(found: Found, protocol: str, validated: np.ndarray) -> None:
    """Say of a choice by cross-validation (len(cs),) that a better C may lie beyond its grid.

    Where the next C inside does as well, going further out promises nothing.
    """
    i, last = int(validated.argmax()), len(validated) - 1
    flat = i == 0 and last > 0 and validated[1] == validated[0]
    if i in (0, last) and not flat:
        found.edges.append(protocol)
        found.notes[protocol] += f", the {'largest' if i else 'least'} tried"


def _shares(where: Task, kernel: np.ndarray, across: np.ndarray) -> dict[float, np.ndarray]:
    """Accuracies (draws,) of the SVM with C as published, for every share of the labels.

    The draws are the same for all rows.
    """
    settings, labels = where.profile.features, where.train.labels
    out = {}
    for share in settings.shares:
        out[share] = np.empty(settings.draws)
        for k in range(settings.draws):
            generator = rng.numpy_generator("features", "labels", f"{share:g}", k)
            rows = linear.stratified_draw(labels, share, generator)
            a = linear.one_versus_rest(kernel[np.ix_(rows, rows)], labels[rows], (settings.c,))[0]
            out[share][k] = ((across[:, rows] @ a).argmax(1) == where.test.labels).mean()
    return out


def _logistic(where: Task, row: Row, found: Found) -> None:
    """DescriptorNet's softmax layer with a penalty; and as released, without, epoch by epoch."""
    settings, labels = where.profile.features, where.train.labels
    train, test = linear.scaled("standardised", row.train, row.test)
    cs, name = settings.logistic_cs, f"{LOGISTIC}, {VALIDATED}"
    validated = linear.cross_validated_logistic(train, labels, where.fold, cs)
    c = cs[int(validated.argmax())]
    found.answers[name] = linear.logistic(train, labels, c).predict(test)
    found.validated[name] = float(validated.max())
    found.notes[name] = f"multinomial logistic regression, standardised features, C = {c:g}"
    _mark_edge(found, name, validated)
    epochs = linear.softmax_epochs(train, labels, test, settings.epochs, settings.epoch_lr)
    right = (epochs == where.test.labels).sum(1)
    found.answers[last := f"{LOGISTIC}, no penalty, last epoch"] = epochs[-1]
    found.notes[last] = f"softmax layer, standardised features, {len(epochs)} epochs of Adam"
    claim = f"{LOGISTIC}, best epoch on the test split"
    found.invalid[claim] = epochs[right.argmax()], len(epochs), last


def classify_all(profile: config.Profile, progress=iter) -> tuple[Task, list[Found]]:
    """Every row of features through every classifier; ``progress`` wraps the batches of shapes."""
    where = task(profile)
    found = [kept(where, row) for row in control_rows(where, progress)]
    return where, found + [kept(where, row) for row in trained_rows(where, progress)]


def kept(where: Task, row: Row) -> Found:
    """``classify``, kept in ``.ckpt`` under all it depends on, so that an interrupted call goes on.

    Minutes a row in ``lite``; of a table only the rows whose features changed are classified anew.
    """
    path = paths.CHECKPOINTS / "features" / f"{_key(where, row)}.json"
    if not path.is_file():
        files.write_json(path, _as_json(classify(where, row)))
    return _of_json(files.read_json(path))


def _key(where: Task, row: Row) -> str:
    """Hash of what ``classify`` is given, and of its code."""
    facts = {k: v for k, v in vars(row).items() if k not in ("train", "test")}
    code = [cache.code_hash(module) for module in (linear, rng, sys.modules[__name__])]
    given = [facts, asdict(where.profile.features), code]
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode())
    for array in (row.train, row.test, where.train.labels, where.test.labels, where.fold):
        digest.update(str((array.dtype, array.shape)).encode() + array.tobytes())
    return digest.hexdigest()[:16]


def _as_json(found: Found) -> dict:
    """Plain lists: of pairs for a mapping, whose order is that of the table."""
    mappings = {k: list(v.items()) for k, v in vars(found).items() if isinstance(v, dict)}
    mappings["answers"] = [(k, a.tolist()) for k, a in found.answers.items()]
    mappings["invalid"] = [(k, (a.tolist(), *rest)) for k, (a, *rest) in found.invalid.items()]
    mappings["shares"] = [(share, a.tolist()) for share, a in found.shares.items()]
    return vars(found) | mappings


def _of_json(kept: dict) -> Found:
    """What ``_as_json`` was given."""
    found = Found(**kept | {"run_ids": tuple(kept["run_ids"])})
    found.answers = {k: np.array(a) for k, a in found.answers}
    found.invalid = {k: (np.array(a), *rest) for k, (a, *rest) in found.invalid}
    found.shares = {share: np.array(a) for share, a in found.shares}
    found.validated, found.notes = dict(found.validated), dict(found.notes)
    return found


def table_rows(where: Task, found: list[Found]) -> Iterable[dict]:
    """Rows of table ``unsupervised``: accuracies on the test split.

    Intervals are Wilson's over test shapes; over draws of labels, percentiles.
    """
    for row in found:
        for name, keep in where.columns.items():
            metric = "accuracy" if name == "all" else f"accuracy, {name}"
            note = f"{row.notes[row.chosen]}; {row.note}"
            yield _cell(where, row, metric, row.answers[row.chosen], note, keep, name == "all")
        for protocol, answers in row.answers.items():
            note = row.notes[protocol]
            if protocol in row.validated:
                note += f"; {100 * row.validated[protocol]:.1f} % in cross-validation"
            yield _cell(where, row, f"accuracy, {protocol}", answers, note)
        for claim, (answers, n, _) in row.invalid.items():
            note = f"not valid: the best of {n} on the test split itself"
            yield _cell(where, row, f"not valid: accuracy, {claim}", answers, note)
        for share, values in row.shares.items():
            note = f"linear SVM, {SHARES_SCALING} features, C as published, {len(values)} draws"
            common = _common(where, row, f"accuracy, {100 * share:g} % of labels", note)
            yield common | dict(
                estimate=Estimate.of_draws(values), n_samples=len(where.test.labels)
            )


def _cell(
    where, row, metric: str, answers: np.ndarray, note: str, keep=None, headline=False
) -> dict:
    """The share of right answers among the test shapes that ``keep`` marks, with its interval."""
    right = answers == where.test.labels
    right = right if keep is None else right[keep]
    estimate = metrics.wilson_interval(int(right.sum()), len(right))
    common = _common(where, row, metric, note)
    return common | dict(estimate=estimate, headline=int(headline), n_samples=len(right))


def _common(where: Task, row: Found, metric: str, note: str) -> dict:
    return dict(row=row.row, category="all", metric=metric, note=note, headline=0, reference="") | {
        "n_reference": len(where.train.labels)
    }


def run_ids(found: list[Found]) -> dict[str, list[str]]:
    """Row -> the runs behind it."""
    return {row.row: list(row.run_ids) for row in found if row.run_ids}


def share_curves(where: Task, found: list[Found]) -> pd.DataFrame:
    """Accuracy by share of the labels, one line a row and share: mean, 2.5 and 97.5 percentiles.

    With all labels the draws are one, and the interval is Wilson's.
    """
    lines = []
    full = f"{SHARES_SCALING}, {PAPER}"
    for row in found:
        ends = {share: Estimate.of_draws(values) for share, values in row.shares.items()}
        right = row.answers[full] == where.test.labels
        ends[1.0] = metrics.wilson_interval(int(right.sum()), len(right))
        lines += [dict(row=row.row, share=s, **e._asdict()) for s, e in ends.items()]
    return pd.DataFrame(lines)


def best(found: list[Found]) -> Found:
    """The row with the highest accuracy in cross-validation, under the protocol it stands with."""
    return max(found, key=lambda row: row.validated[row.chosen])


def edges(found: list[Found]) -> str:
    """Which choices of C lie on the edge of their grid, in words."""
    n = sum(p.endswith(VALIDATED) for row in found for p in row.answers)
    named = [f"{row.row}: {row.notes[p]}" for row in found for p in row.edges]
    if not named:
        return f"Every C that cross-validation chose, {n} in all, lies inside its grid."
    return (
        f"{len(named)} of {n} choices lie on the edge of the grid, so another C may do better: "
        + "; ".join(named)
        + "."
    )


def against(where: Task, found: list[Found], control: str = "") -> pd.DataFrame:
    """Each row's accuracy less a control's, and the p-value of a paired permutation test.

    control: a row; none is, for every trained row, its network with random weights. Both answer by
    one protocol: that of the row's paper if the control has it too, else ``CHOSEN``. Paired over
    test shapes: it covers these shapes, not another training run.
    """
    named, lines = {row.row: row for row in found}, {}
    for row in found:
        other = named.get(control or row.control)
        if other is None or other is row:
            continue
        protocol, *answers = _alike(row, other)
        pair = [(a == where.test.labels).astype(float) for a in answers]
        generator = rng.numpy_generator("features", "against", row.row, other.row)
        p = metrics.paired_permutation_test(*pair, N_PERMUTATIONS, generator)
        above = pair[0].mean() - pair[1].mean()
        lines[row.row] = dict(control=other.row, protocol=protocol, above=above, p=p)
    return pd.DataFrame.from_dict(
        lines, orient="index", columns=["control", "protocol", "above", "p"]
    )


def _alike(row: Found, control: Found) -> tuple[str, np.ndarray, np.ndarray]:
    """The protocol that both have, and the answers of both."""
    if row.protocol in control.answers:
        return row.protocol, row.answers[row.protocol], control.answers[row.protocol]
    return CHOSEN, row.answers[row.svm], control.answers[control.svm]


def invalid_claims(where: Task, found: list[Found]) -> pd.DataFrame:
    """What choosing on the test split claims, beside the honest choice of the same classifier."""
    lines = []
    for row in found:
        for claim, (answers, n, protocol) in row.invalid.items():
            claimed, honest = (
                float((a == where.test.labels).mean()) for a in (answers, row.answers[protocol])
            )
            lines.append(
                {"row": row.row, "choice": claim, "choices": n, "honest": honest}
                | {"claimed": claimed, "inflated by": claimed - honest}
            )
    return pd.DataFrame(lines).set_index(["row", "choice"])
