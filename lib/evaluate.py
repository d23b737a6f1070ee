"""The judge at work: sample sets in, rows of the generation tables out.

The judge is one stored network (``lib.models.nin3d``); the hash of its weights goes with every
number. Everything here runs in single precision.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable

import numpy as np
import torch

from lib import config, data, device, files, heldout, metrics, paths, rng, voxel
from lib.errors import StudyError
from lib.metrics import Estimate
from lib.models.nin3d import Nin3d
from lib.train import checkpoint, runs
from lib.train import judge as train_judge

ANCHORS = ("real train", "real test", "Bernoulli", "PCA-Gaussian", "memoriser", "noise")
REFERENCES = ("test", "train")  # the first is the headline
# What the papers call a row of one model a category when all are pooled (Table 2 of 3DWINN).
POOLED = {"3DWINN": "3DWINN-separate-multi"}
# One model of all categories: its samples, and the sets that only some runs have.
JOINT = {"samples": "joint-single", "multi": "joint-multi"}
# The distances of Table 3 and of the headline, to the names of their tables.
DISTANCES = {"fid": metrics.frechet_distance, "kid": metrics.kernel_distance}
SIDE = 30
# Trained on shapes of their own, test shapes perhaps among them: no table shows these.
UNJUDGED = ("gan64",)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the judge makes of N shapes: features (N, F) float32, probabilities (N, K) float64."""

    features: np.ndarray
    probabilities: np.ndarray


@dataclasses.dataclass(frozen=True)
class Judge:
    """A stored reference network, its seed and the hash of its weights."""

    seed: int
    hash: str
    network: Nin3d

    @torch.no_grad()
    def see(self, grids: np.ndarray, batch: int = 128) -> Seen:
        """Look at bool grids (N, 30, 30, 30); the result does not depend on ``batch``."""
        where = next(self.network.parameters()).device
        features, probabilities = [], []
        for i in range(0, len(grids), batch):
            chunk = np.ascontiguousarray(grids[i : i + batch, None])
            x = torch.from_numpy(chunk).to(where, torch.float32)
            f = self.network.features(x)
            features.append(f.cpu().numpy())
            logits = self.network.head(f).double()
            probabilities.append(torch.softmax(logits, 1).cpu().numpy())
        return Seen(np.concatenate(features), np.concatenate(probabilities))


def load_judge(profile: config.Profile, seed: int = 0) -> Judge:
    """The judge that a profile asks. Raises StudyError when it is not there."""
    owner = config.load(profile.judge.profile)
    run = runs.Run(owner.name, "judge", "all", seed)
    path = run.weights / "judge.safetensors"
    if not path.is_file():
        raise StudyError(
            f"the judge {run.id} is not in {paths.relative(run.weights)}; run "
            + config.maker(owner.name, "02_reference", seed=seed)
        )
    runs.check_weights(run, run.weights, ("judge",))
    network = train_judge.build(owner.judge, len(config.CATEGORIES))
    network = checkpoint.load_weights(path, network).to(device.pick(profile.device))
    return Judge(seed, files.sha256(path)[:12], network)


def to_judge(profile: config.Profile, voxels: np.ndarray, layout: str | None = None) -> np.ndarray:
    """Shapes (N, D, D, D) as the judge's bool grids (N, 30, 30, 30); no layout: the profile's own.

    voxels: bool, or occupancy probabilities, which the profile's threshold cuts. Raises StudyError
    for a side or layout without a mapping.
    """
    side = profile.data.side
    return voxel.to_judge_grid(
        voxels,
        layout=layout or data.layout_of(side),
        threshold=profile.evaluation.threshold,
        extra_sides=(side,) if side == 24 else (),
    )


def load_samples(run: runs.Run, threshold: float, kind: str = "samples") -> np.ndarray:
    """The published samples of a run, bool (N, D, D, D), above a threshold of its profile."""
    return voxel.load_voxels(run.samples / runs.samples_file(threshold, kind))


def label(row: str, threshold: float, settings: config.Evaluation) -> str:
    """A row's name among others; one that is read at another threshold says so."""
    return row if threshold == settings.threshold else f"{row}, above {threshold:g}"


def trained_runs(profile: config.Profile) -> list[runs.Run]:
    """The generative runs whose samples are in place, in order of their names."""
    folder = paths.results(profile.name) / "samples"
    drawn = runs.samples_file(profile.evaluation.threshold)
    found = [p.parent.name for p in sorted(folder.glob("*/run.json"))]
    return [runs.Run.parse(name) for name in found if (folder / name / drawn).is_file()]


def joint_runs(profile: config.Profile) -> list[runs.Run]:
    """The trained runs on all categories at once, the first seed."""
    return [r for r in trained_runs(profile) if r.category == "all" and r.seed == 0]


def judged_runs(profile: config.Profile) -> list[runs.Run]:
    """The trained runs that tables and figures show: one category each, the first seed."""
    return [
        r
        for r in trained_runs(profile)
        if r.category in profile.categories and r.seed == 0 and r.model not in UNJUDGED
    ]


def readings(profile: config.Profile) -> list[tuple[runs.Run, float]]:
    """The judged runs, each with every threshold at which its samples are read."""
    return [(r, t) for r in judged_runs(profile) for t in runs.thresholds(profile, r.model)]


def anchor_shapes(profile: config.Profile, category: str, train: data.Split) -> dict:
    """Shapes of the four generated anchors of a category, bool (n, D, D, D) on the model grid.

    They are fitted on what models train on: the training split without its validation part.
    """
    train = train.category(category)
    grids = data.model_grid(train.voxels[~train.validation], profile.data.side)
    seeds = list(range(profile.evaluation.n_samples))
    return {
        "Bernoulli": metrics.bernoulli(grids, seeds),
        "PCA-Gaussian": metrics.pca_gaussian(grids, seeds),
        "memoriser": metrics.memoriser(grids, seeds),
        "noise": metrics.noise(grids.shape[1:], float(grids.mean()), seeds),
    }


@dataclasses.dataclass
class Gallery:
    """All rows of a profile as a judge sees them: ``seen[row][category]``, and their grids.

    The references, ``real train`` and ``real test``, are rows like the others. ``packed`` holds
    the judge's grids, bit-packed; ``joint`` what is seen of the samples of a model of all
    categories, which have none; ``variants`` gives row and threshold of those rows that are read
    at another threshold; ``runs`` names the runs behind a row.
    """

    profile: config.Profile
    judge: Judge
    seen: dict[str, dict[str, Seen]] = dataclasses.field(default_factory=dict)
    packed: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    variants: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    runs: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    joint: dict[str, Seen] = dataclasses.field(default_factory=dict)

    def add(self, row: str, category: str, grids: np.ndarray) -> None:
        """Let the judge look at grids (N, 30, 30, 30) of a row."""
        self.seen.setdefault(row, {})[category] = self.judge.see(grids)
        self.packed.setdefault(row, {})[category] = voxel.pack(grids)


def look_at_everything(profile: config.Profile, judge: Judge, progress=iter) -> Gallery:
    """Show the judge the real shapes, the anchors and the samples of every trained run.

    ``progress`` wraps the iteration over categories (pass ``tqdm``).
    """
    gallery = Gallery(profile, judge)
    train = data.load_train(profile.data)
    for category in progress(profile.categories):
        gallery.add("real train", category, train.category(category).voxels)
        gallery.add("real test", category, heldout.reference(profile.data, category).voxels)
        for row, shapes in anchor_shapes(profile, category, train).items():
            gallery.add(row, category, to_judge(profile, shapes))
    for run, threshold in readings(profile):
        title = runs.MODELS[run.model]
        row = label(title, threshold, profile.evaluation)
        gallery.add(row, run.category, to_judge(profile, load_samples(run, threshold)))
        for name in {title, POOLED.get(title, title)}:
            row = label(name, threshold, profile.evaluation)
            gallery.runs.setdefault(row, []).append(run.id)
            if threshold != profile.evaluation.threshold:
                gallery.variants[row] = (name, threshold)
    for run in joint_runs(profile):
        for kind, name in JOINT.items():
            if (run.samples / runs.samples_file(profile.evaluation.threshold, kind)).is_file():
                shapes = load_samples(run, profile.evaluation.threshold, kind)
                row = f"{runs.MODELS[run.model]}-{name}"
                gallery.joint[row] = judge.see(to_judge(profile, shapes))
                gallery.runs[row] = [run.id]
    return gallery


def compare(
    statistic,
    real: np.ndarray,
    generated: np.ndarray,
    same: bool,
    settings: config.Evaluation,
    *key,
) -> tuple[Estimate, int]:
    """``statistic(real, generated)`` at equal n, by draws without replacement; and that n.

    ``same`` says that both are one pool (a reference row against itself): it is then cut in two
    disjoint halves at random for every draw, so that no shape meets itself.
    """
    generator = rng.numpy_generator("evaluate", *key)
    if not same:
        n = min(settings.n_equal, len(real), len(generated))
        return (
            metrics.draws_without_replacement(
                statistic, real, generated, n, settings.n_draws, generator
            ),
            n,
        )
    n = min(settings.n_equal, len(real) // 2)
    values = np.empty(settings.n_draws)
    for k in range(settings.n_draws):
        order = generator.permutation(len(real))
        values[k] = statistic(real[order[:n]], real[order[n : 2 * n]])
    return Estimate.of_draws(values), n


def distance_rows(gallery: Gallery, table: str) -> Iterable[dict]:
    """Rows of a table of ``DISTANCES``: every row against test (headline) and train.

    ``excess`` is the distance above real train shapes at the same n; its interval is that of the
    distance, without the spread of what is taken off. A Frechet distance grows as n
    shrinks, so cells that cannot have the common n stay empty; the unbiased kernel distance may.
    """
    settings, statistic = gallery.profile.evaluation, DISTANCES[table]
    floor = {}
    for reference, row in itertools.product(REFERENCES, gallery.seen):
        for category, seen in gallery.seen[row].items():
            real = gallery.seen[f"real {reference}"][category].features
            same = row == f"real {reference}"
            key = (table, row, category, reference)
            found, n = compare(statistic, real, seen.features, same, settings, *key)
            if table == "fid" and n < settings.n_equal:
                continue
            note = "two random halves of one pool" if same else ""
            common = dict(
                row=row, category=category, reference=reference, n_samples=n, n_reference=n
            )
            headline = int(reference == REFERENCES[0])
            yield common | dict(metric=table, estimate=found, headline=headline, note=note)
            if row == "real train":
                floor[reference, category] = found.value
            if (reference, category) in floor:
                excess = Estimate(*(v - floor[reference, category] for v in found))
                yield common | dict(
                    metric=f"{table} excess", estimate=excess, headline=0, note=note
                )


def class_probability_rows(gallery: Gallery) -> Iterable[dict]:
    """Rows of table ``class_probability``: the judge's mean probability of the right category.

    A mean needs no equal n, so all shapes count; the interval is Student's over shapes. Beside it
    the fraction of what real test shapes reach, since these are far below 1 for some categories;
    its interval takes that value as given.
    """
    for row, category in _cells(gallery):
        column = config.CATEGORIES.index(category)
        p = gallery.seen[row][category].probabilities
        top = metrics.class_probability(gallery.seen["real test"][category].probabilities, column)
        found = metrics.class_probability(p, column)
        common = dict(row=row, category=category, n_samples=len(p))
        common["note"] = "mean over shapes, Student t interval"
        yield common | dict(metric="class probability", estimate=found, headline=1)
        share = Estimate(*(v / top.value for v in found))
        yield common | dict(metric="fraction of real test", estimate=share, headline=0)


def inception_rows(gallery: Gallery) -> Iterable[dict]:
    """Rows of table ``inception``: equal shares of all categories pooled (separate-multi).

    Equal shares balance the mixture by hand, so beside them stand the shares that the categories
    have in the training split. A row that lacks a category has no score: a mixture of fewer
    categories scores lower by construction.
    """
    settings, categories = gallery.profile.evaluation, gallery.profile.categories
    frequency = {c: len(s.features) for c, s in gallery.seen["real train"].items()}
    for row, seen in gallery.seen.items():
        if set(seen) != set(categories):
            continue
        pools, name = [s.probabilities for s in seen.values()], pooled_name(row)
        n = min(settings.n_equal, *(len(pool) for pool in pools))
        note = f"{n} shapes of each of {len(categories)} categories"
        yield from _inception(name, pools, [n] * len(pools), note, gallery.profile)
        shares = [max(1, round(n * frequency[c] / max(frequency.values()))) for c in seen]
        note = f"shares of the training split, {min(shares)} to {max(shares)} shapes a category"
        scores = _inception(name, pools, shares, note, gallery.profile, "by frequency")
        yield from (score | dict(headline=0) for score in scores)
    for row, seen in gallery.joint.items():
        n = min(settings.n_equal * len(categories), len(seen.probabilities))
        note = f"{n} shapes of one model of all categories"
        yield from _inception(row, [seen.probabilities], [n], note, gallery.profile)


def _inception(
    row: str,
    pools: list[np.ndarray],
    counts: list[int],
    note: str,
    profile: config.Profile,
    *shares: str,
) -> Iterable[dict]:
    """The score of so many shapes of every pool (N, K) together, in splits and whole.

    shares: named behind the score's own name, where they are not the usual ones. The score of a
    split grows with its size, so a row with fewer shapes has fewer splits, not smaller ones.
    """
    settings = profile.evaluation
    per_split = settings.n_equal * len(profile.categories) // settings.n_splits
    in_splits = min(settings.n_splits, max(1, sum(counts) // per_split))
    whole = [len(pool) for pool in pools] == counts
    for n_splits, headline in ((in_splits, 1), (1, 0)):
        generator = rng.numpy_generator("evaluate", "inception", row, n_splits, *shares)
        values = np.empty(settings.n_draws)
        for k in range(settings.n_draws):
            rows = [
                pool[generator.choice(len(pool), n, replace=False)]
                for pool, n in zip(pools, counts, strict=True)
            ]
            values[k] = metrics.inception_score(np.concatenate(rows), n_splits, generator)[0]
        yield dict(
            row=row,
            category="all",
            metric=", ".join(["inception score", *shares, *["one split"] * (not headline)]),
            estimate=Estimate.of_draws(values, whole=whole),
            headline=headline,
            n_samples=sum(counts),
            note=f"{note}; {n_splits} split{'s' * (n_splits > 1)}",
        )


def category_shares(gallery: Gallery) -> dict[str, np.ndarray]:
    """Share of each category (K,): in the training split, and as the judge sees joint models.

    A joint model trains on all shapes of the split, whatever categories the tables show. The paper
    finds some of them over-represented in its samples.
    """
    answers = {row: s.probabilities.argmax(1) for row, s in gallery.joint.items()}
    given = {"training split": data.load_train(gallery.profile.data).labels} | answers
    n = len(config.CATEGORIES)
    return {row: np.bincount(labels, minlength=n) / len(labels) for row, labels in given.items()}


def pooled_name(row: str) -> str:
    """The name of a row whose categories are pooled, where the papers give it another."""
    title, *threshold = row.split(", above ")
    return ", above ".join([POOLED.get(title, title), *threshold])


def cost_rows(profile: config.Profile) -> Iterable[dict]:
    """Rows of table ``cost``: hours of training and seconds a sample of every trained run.

    A model of all categories has a row and a column of its own. As measured on the device that
    the note names; runs of one profile may differ in it. Profiles whose bytes must repeat record
    no hours and give no rows.
    """
    for run in [*judged_runs(profile), *joint_runs(profile)]:
        joint = f"-{JOINT['samples']}" if run.category == "all" else ""
        facts = files.read_json(run.samples / "run.json")
        for fact, metric in (
            ("hours", "training hours"),
            ("seconds per sample", "seconds per sample"),
        ):
            if fact in facts:
                yield dict(
                    row=f"{runs.MODELS[run.model]}{joint}",
                    category=run.category,
                    metric=metric,
                    estimate=Estimate(facts[fact], math.nan, math.nan),
                    headline=1,
                    n_samples=runs.n_samples(run, profile),
                    note=facts["device"],
                )


def _cells(gallery: Gallery) -> list[tuple[str, str]]:
    return [(row, category) for row, seen in gallery.seen.items() for category in seen]


def generation_tables(gallery: Gallery) -> dict[str, list[dict]]:
    """The four tables of 20_generation, as rows of estimates."""
    return {
        "inception": list(inception_rows(gallery)),
        **{name: list(distance_rows(gallery, name)) for name in DISTANCES},
        "class_probability": list(class_probability_rows(gallery)),
    }


def test_columns(test: data.Split) -> dict[str, np.ndarray]:
    """The test shapes (N,) that each column of accuracy counts."""
    return {
        "all": np.ones(len(test.labels), bool),
        "exact duplicates removed": test.duplicate < 1,
        "IoU .95 removed": test.duplicate < 0.95,
    }


def accuracy_columns(judge: Judge, profile: config.Profile) -> dict[str, tuple[int, int]]:
    """Correct answers and number of test shapes: all, exact duplicates removed, IoU .95 removed."""
    test = heldout.load_test(profile.data)
    right = judge.see(test.voxels).probabilities.argmax(1) == test.labels
    columns = test_columns(test)
    return {name: (int(right[rows].sum()), int(rows.sum())) for name, rows in columns.items()}


def first_shapes(profile: config.Profile, n: int) -> dict[str, dict[str, np.ndarray]]:
    """The first ``n`` samples by seed of every trained run: category -> label -> shapes.

    Where nothing is trained, those of the anchors of the first category.
    """
    found = {}
    for run, threshold in readings(profile):
        row = label(runs.MODELS[run.model], threshold, profile.evaluation)
        found.setdefault(run.category, {})[row] = load_samples(run, threshold)[:n]
    if not found:
        category = profile.categories[0]
        anchors = anchor_shapes(profile, category, data.load_train(profile.data))
        found[category] = {row: shapes[:n] for row, shapes in anchors.items()}
    return found


def nearest_in_features(gallery: Gallery, n: int) -> Iterable[tuple]:
    """For every trained run: title, its first samples, nearest training shapes, captions.

    Nearest in the judge's features among training shapes of the category (3DWINN, Fig. 3).
    """
    profile = gallery.profile
    train = data.load_train(profile.data)
    for run, threshold in readings(profile):
        row = label(runs.MODELS[run.model], threshold, profile.evaluation)
        features = gallery.seen[row][run.category].features[:n]
        real = gallery.seen["real train"][run.category].features
        index, distance = metrics.nearest_by_feature(features, real)
        grids = data.model_grid(train.category(run.category).voxels, profile.data.side)
        captions = [f"distance {d:.1f}" for d in distance]
        yield f"{row}, {run.category}", load_samples(run, threshold)[:n], grids[index], captions


def check_category(profile: config.Profile, category: str) -> None:
    """Raises StudyError for a category that the profile does not have."""
    if category not in profile.categories:
        names = ", ".join(profile.categories)
        raise StudyError(
            f"no category {category!r} in profile {profile.name}; choose one of {names}"
        )


def evaluate_file(profile: config.Profile, grids: np.ndarray, category: str) -> dict:
    """All measures of one foreign sample set by a profile's judge, as one JSON-ready object.

    grids: bool (N, 30, 30, 30), as ``to_judge`` makes them. Raises StudyError for an unknown
    category and for fewer than 2 shapes. Distances are at ``n``
    shapes a side, fewer than the tables' where the file or the split holds fewer: a Frechet
    distance then grows. Ends are None where both sides were taken whole. ``real train`` holds the
    same distances to test of real training shapes, the best that can be hoped for.
    """
    check_category(profile, category)
    if len(grids) < 2:
        raise StudyError(f"{len(grids)} shapes: distances need at least 2")
    settings = profile.evaluation
    judge = load_judge(profile)
    seen = judge.see(grids)
    train = data.load_train(profile.data).category(category)
    real = {"train": train.voxels, "test": heldout.reference(profile.data, category).voxels}
    found = {"profile": profile.name, "category": category, "n": len(grids), "judge": judge.hash}
    known = {reference: judge.see(shapes) for reference, shapes in real.items()}
    column = config.CATEGORIES.index(category)
    p, top = (metrics.class_probability(s.probabilities, column) for s in (seen, known["test"]))
    found["class probability"] = _ends(p, len(grids))
    found["fraction of real test"] = _ends(Estimate(*(v / top.value for v in p)), len(grids))
    found["mean occupancy"] = float(grids.mean())
    found["real train"] = {}
    for name, statistic in DISTANCES.items():
        for reference in known:
            key = ("file", name, category, reference)
            real_features = known[reference].features
            pair = compare(statistic, real_features, seen.features, False, settings, *key)
            found[f"{name} {reference}"] = _ends(*pair)
        n = found[f"{name} test"]["n"]
        pair = compare(
            statistic,
            known["test"].features,
            known["train"].features,
            False,
            dataclasses.replace(settings, n_equal=n),
            *("file", "real train", name, category),
        )
        found["real train"][f"{name} test"] = _ends(*pair)
    flat = {name: voxel.pack(shapes) for name, shapes in real.items()}
    iou = metrics.nearest_by_iou(voxel.pack(grids), flat["train"])[1]
    heldout_iou = metrics.nearest_by_iou(flat["test"], flat["train"])[1]
    found["memorisation"] = metrics.memorisation(iou, heldout_iou)
    return found


def _ends(found: Estimate, n: int) -> dict:
    """An estimate as JSON-ready value, low, high, with its n; ends that are not known are None."""
    return {k: None if math.isnan(v) else v for k, v in found._asdict().items()} | {"n": n}
