"""Classifiers under attack: who meets whom, on which shapes, and the rows that come of it.

Attacked shapes are computed once and kept in ``.ckpt/attacks``, so that an interrupted notebook
goes on. All of it runs in single precision.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm import tqdm

from lib import (
    attacks,
    cache,
    config,
    data,
    figures,
    heldout,
    metrics,
    paths,
    report,
    rng,
    supervised,
)
from lib.errors import StudyError
from lib.metrics import Estimate
from lib.train import runs

# The rows of table 7, named as those of table 5.
ROWS = {m: supervised.row_of(m) for m in ("judge", *config.CLASSIFIERS)}
PAIR = ("baseline", "introspective")  # the two classifiers of the paper
YARDSTICK = "hardened"  # the Baseline, trained on attacked shapes
PAIRS = (PAIR, ("baseline", YARDSTICK), ("introspective", YARDSTICK))
LOSSES = {"cross entropy": attacks.surprise, "margin": attacks.margin}
RANDOM = ("pgd", "random_flips", "remove_components", "square_attack")  # take generators
KINDS = (
    "pgd",
    "rays",
    "greedy flips",
    "random flips",
    "greedy flips on the surface",
    "random flips on the surface",
    "removed part",
    "dropped slices",
)
NOTHING = Estimate(float("nan"), float("nan"), float("nan"))
CURVE = ["kind", "row", "budget", *Estimate._fields, "n"]
LEVEL = 0.05  # of the tests in the conclusion
THRESHOLD = 0.5  # at which a pipeline makes grids binary


# ---------------------------------------------------------------------------------------------
# Who takes part


class OnGrid(nn.Module):
    """A classifier of side ``network.side`` asked on a concentric grid: empty margin added or cut.

    x (B, 1, D, D, D) -> logits (B, K) in single precision.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        # Channels last, in small batches, is 1.6 times faster on a CPU at equal precision.
        self.network = network.float().to(memory_format=torch.channels_last_3d)

    def forward(self, x: Tensor) -> Tensor:
        margin = (getattr(self.network, "side", x.shape[-1]) - x.shape[-1]) // 2
        return self.network(pad(x, [margin] * 6)).float()


@dataclass(frozen=True)
class Classifier:
    """A trained classifier on the profile's model grid, its run, row and hash."""

    run: runs.Run
    row: str
    network: nn.Module
    hash: str


def run_of(profile: config.Profile, model: str, seed: int) -> runs.Run:
    """The run of a classifier; the judge's is that of the profile whose judge is asked, seed 0."""
    if model == "judge":
        return runs.Run(profile.judge.profile, "judge", "all", 0)
    return runs.Run(profile.name, model, "all", seed).checked()


def stratified(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Rows (n,), ascending, drawn in equal shares of the labels; 0 takes all.

    Categories take turns until n are drawn, so shares differ by one at most while each has
    shapes left. A larger n contains a smaller one.
    """
    if n == 0 or n >= len(labels):
        return np.arange(len(labels))
    turn = np.empty(len(labels), int)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        turn[rng.numpy_generator(seed, "attacks", "shapes", int(label)).permutation(rows)] = (
            np.arange(len(rows))
        )
    return np.sort(np.lexsort((labels, turn))[:n])


@dataclass(frozen=True)
class Trial:
    """The test shapes on the model grid, bool (N, D, D, D), and the classifiers that meet them.

    ``absent`` gives the reason for every classifier of the profile that is not there.
    """

    profile: config.Profile
    voxels: np.ndarray
    labels: np.ndarray
    classifiers: dict[str, Classifier]
    absent: dict[str, str]

    @property
    def table_rows(self) -> np.ndarray:
        """The test shapes of table 7."""
        settings = self.profile.attacks
        return stratified(self.labels, settings.table_shapes, settings.seed)

    @property
    def strong_rows(self) -> np.ndarray:
        """The test shapes of the costly attacks."""
        settings = self.profile.attacks
        return stratified(self.labels, settings.shapes, settings.seed)

    @property
    def strong(self) -> list[str]:
        """The classifiers that meet the costly attacks and are there."""
        return [m for m in self.profile.attacks.strong if m in self.classifiers]

    @property
    def run_ids(self) -> dict[str, list[str]]:
        return {c.row: [c.run.id] for c in self.classifiers.values()}

    def attacked(self, model: str, name: str, rows: np.ndarray, **params) -> np.ndarray:
        """What ``attacks.<name>`` makes of test shapes ``rows`` (n,) on a classifier, (n, ...).

        Kept in batches: what an interrupted call has finished is taken up by the next.
        """
        starts = range(0, len(rows), self.profile.attacks.batch)
        title = f"{name}, {self.classifiers[model].row}"
        bar = tqdm(starts, desc=title, unit="batch", leave=False, delay=2)
        parts = [self._batch(model, name, rows, params, k) for k in bar]
        return np.concatenate(parts) if parts else self.voxels[rows, None].astype(np.float32)

    def _batch(self, model: str, name: str, rows: np.ndarray, params: dict, k: int) -> np.ndarray:
        """The shapes attacked from row k on, as many as a batch holds, kept in a file."""
        path = self._folder(model, name, rows, params) / f"{k:04d}.npz"
        return cache.kept(path, self._attack, model, name, rows, params, k)

    def wrong_on(
        self, target: str, source: str, name: str, rows: np.ndarray, **params
    ) -> np.ndarray:
        """Whether ``target`` misclassifies the shapes attacked on ``source``, bool (len(rows),)."""
        folder = self._folder(source, name, rows, params)

        def ask() -> np.ndarray:
            return self.wrong(target, self.attacked(source, name, rows, **params), rows)

        return cache.kept(folder / f"wrong-{self.classifiers[target].hash}.npz", ask)

    def wrong_of_errors(
        self, target: str, source: str, name: str, rows: np.ndarray, **params
    ) -> np.ndarray:
        """``wrong_on``, asked only of the shapes that ``source`` itself misclassifies, in order."""
        folder = self._folder(source, name, rows, params)

        def ask() -> np.ndarray:
            errors = self.wrong_on(source, source, name, rows, **params)
            found = self.attacked(source, name, rows, **params)
            return self.wrong(target, found[errors], rows[errors])

        path = folder / f"wrong-of-errors-{self.classifiers[target].hash}.npz"
        return cache.kept(path, ask)

    def wrong(self, target: str, found: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Whether ``target`` misclassifies shapes (n, 1, D, D, D) of test rows, bool (n,)."""
        network = self.classifiers[target].network
        if not len(rows):
            return np.empty(0, bool)

        def ask(part: slice) -> Tensor:
            y = self._tensors(target, rows[part])[1]
            x = torch.from_numpy(found[part]).to(_place(network), torch.float32)
            return attacks.misclassified(network, x, y)

        return self._in_batches(len(rows), ask)

    def clean(self, model: str, rows: np.ndarray) -> np.ndarray:
        """Whether a classifier misclassifies the untouched shapes, bool (len(rows),)."""
        path = self._folder(model, "untouched", rows, {}) / "wrong.npz"
        return cache.kept(path, self.wrong, model, self.voxels[rows, None], rows)

    def flips(self, model: str, greedy: bool, on_surface: bool) -> np.ndarray:
        """Which shapes at most k flips fool, bool (n, len(attacks.flips))."""
        rows, counts = self.strong_rows, self.profile.attacks.flips
        name, params = _flip_attack(greedy, on_surface, counts)
        folder = self._folder(model, name, rows, params)

        def ask() -> np.ndarray:
            order = self.attacked(model, name, rows, **params)

            def fooled(part: slice) -> Tensor:
                x, y = self._tensors(model, rows[part])
                flipped = torch.from_numpy(order[part].astype(np.int64)).to(x.device)
                network = self.classifiers[model].network
                return attacks.fooled_within(network, x, y, flipped, counts)

            return self._in_batches(len(rows), fooled)

        return cache.kept(folder / "fooled.npz", ask)

    def _attack(self, model: str, name: str, rows: np.ndarray, params: dict, k: int) -> np.ndarray:
        begun = self._begun(model, name, rows, params, k)
        rows = rows[k : k + self.profile.attacks.batch]
        x, y = self._tensors(model, rows)
        params = {k: LOSSES[v] if k == "loss" else v for k, v in params.items()} | begun
        if name in RANDOM:
            seed = self.profile.attacks.seed
            keys = [rng.torch_generator(seed, "attacks", name, int(r)) for r in rows]
            params["generators"] = keys
        subject = (x,) if name == "random_flips" else (self.classifiers[model].network, x, y)
        found = getattr(attacks, name)(*subject, **params).detach().cpu().numpy()
        return found.astype(np.int32) if found.dtype == np.int64 else found

    def _begun(self, model: str, name: str, rows: np.ndarray, params: dict, k: int) -> dict:
        """Where unbounded steps of FGSM go on: at the end of table 7's next shorter way."""
        if name != "iterative_fgsm" or "ball" in params:
            return {}
        shorter = [n for n in self.profile.attacks.steps if n < params["n_steps"]]
        if shorter:
            done = max(shorter)
            way = self._batch(model, name, rows, params | {"n_steps": done}, k)
        else:
            done, way = 1, self._batch(model, "fgsm", rows, {"eps": params["step"]}, k)
        start = torch.from_numpy(way).to(_place(self.classifiers[model].network))
        return {"start": start, "n_steps": params["n_steps"] - done}

    def _in_batches(self, n: int, ask: Callable[[slice], Tensor]) -> np.ndarray:
        """What ``ask`` gives for each slice of n shapes that makes a batch, joined; n > 0."""
        size = self.profile.attacks.batch
        return np.concatenate([ask(slice(k, k + size)).cpu().numpy() for k in range(0, n, size)])

    def _tensors(self, model: str, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Voxels (n, 1, D, D, D) in single precision and labels, where the classifier computes."""
        where = _place(self.classifiers[model].network)
        x = torch.from_numpy(self.voxels[rows, None]).to(where, torch.float32)
        return x, torch.from_numpy(self.labels[rows]).to(where)

    def _folder(self, model: str, name: str, rows: np.ndarray, params: dict) -> Path:
        """Where a set is kept: by classifier, attack, parameters, shapes, and the attacks' code."""
        shapes = hashlib.sha256(np.packbits(self.voxels[rows]).tobytes())
        shapes.update(self.labels[rows].tobytes() + rows.tobytes())
        settings = self.profile.attacks
        parts = [name, params, shapes.hexdigest(), settings.batch, settings.seed]
        parts.append(cache.code_hash(attacks))
        text = json.dumps(parts, sort_keys=True)
        key = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        return paths.CHECKPOINTS / "attacks" / self.classifiers[model].hash / key


def _place(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def gather(profile: config.Profile, load: Callable[[runs.Run], nn.Module], seed: int = 0) -> Trial:
    """The trial of a profile: its test shapes and those of its classifiers that ``load`` gives.

    ``load`` returns a classifier of voxels in evaluation mode or raises StudyError, whose words
    then stand in ``absent``. Raises StudyError for a classifier without a row.
    """
    split = heldout.load_test(profile.data)
    present, absent = {}, {}
    for model in profile.attacks.classifiers:
        if model not in ROWS:
            raise StudyError(f"attacks.classifiers: no row for {model!r}; known: {', '.join(ROWS)}")
        try:
            run = run_of(profile, model, seed)
            network = OnGrid(load(run)).eval()
        except StudyError as error:
            absent[model] = str(error)
        else:
            network.requires_grad_(False)
            key = cache.classifier_hash(profile, model, network)
            present[model] = Classifier(run, ROWS[model], network, key)
    grids = data.model_grid(split.voxels, profile.data.side)
    return Trial(profile, grids, split.labels, present, absent)


def roll_call(trial: Trial) -> pd.DataFrame:
    """One line a classifier: is it here, and if not, why."""
    lines = {
        ROWS[m]: {"hash": trial.classifiers[m].hash, "absent": ""}
        if m in trial.classifiers
        else {"hash": "", "absent": trial.absent[m]}
        for m in trial.profile.attacks.classifiers
    }
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("classifier")


# ---------------------------------------------------------------------------------------------
# Table 7


def settings_of_table_7(settings: config.Attacks) -> dict[str, tuple[str, dict, int]]:
    """Name in the metrics -> attack, parameters, headline; both readings of iterative FGSM.

    The headline steps by eps without a ball, as the paper's words read.
    """
    found = {"fgsm": ("fgsm", {"eps": settings.eps}, 1)}
    for n in settings.steps:
        found[f"it-{n}"] = ("iterative_fgsm", {"step": settings.eps, "n_steps": n}, 1)
    for n in settings.steps:
        step = settings.eps / n * settings.ball_step
        params = {"step": step, "n_steps": n, "ball": settings.eps}
        found[f"it-{n} in the ball"] = ("iterative_fgsm", params, 0)
    return found


def table_7_rows(trial: Trial) -> Iterable[dict]:
    """Rows of table ``adversarial``: errors on one's own examples, corrections of the others'.

    Intervals are Wilson's over shapes; those of a correction rate over the errors of the attacked
    classifier. A classifier that is not there has empty cells.
    """
    rows, settings = trial.table_rows, settings_of_table_7(trial.profile.attacks)
    for model, seen in trial.classifiers.items():
        estimate = _wilson(trial.clean(model, rows))
        yield _row(seen.row, "error on untouched shapes", estimate, len(rows))
        for name, (attack, params, headline) in settings.items():
            wrong = trial.wrong_on(model, model, attack, rows, **params)
            metric = f"{name} adversarial error"
            yield _row(seen.row, metric, _wilson(wrong), len(rows), headline)
            for other in trial.classifiers:
                if headline and other != model:
                    answers = trial.wrong_of_errors(other, model, attack, rows, **params)
                    yield _correction_row(name, model, other, len(rows), answers)
    for model in trial.absent:
        note = "not trained in this profile"
        if model not in PAIR or trial.profile.data.source == "procedural":
            yield _row(ROWS[model], "fgsm adversarial error", NOTHING, "", 1, note)
    yield from _paired_rows(trial, rows, settings)


def error_by_steps(trial: Trial) -> pd.DataFrame:
    """Table 7's errors by steps of FGSM, none being the untouched shapes; columns of ``curves``."""
    rows, lines = trial.table_rows, []
    for model, seen in trial.classifiers.items():
        wrong = {0: trial.clean(model, rows)}
        for name, params, headline in settings_of_table_7(trial.profile.attacks).values():
            if headline:
                answers = trial.wrong_on(model, model, name, rows, **params)
                wrong[params.get("n_steps", 1)] = answers
        lines += [("FGSM", seen.row, n, *_wilson(w), len(w)) for n, w in sorted(wrong.items())]
    return pd.DataFrame(lines, columns=CURVE)


def _correction_row(name: str, a: str, b: str, n: int, wrong_b: np.ndarray) -> dict:
    """B's correction rate on A's examples, from B's answers to A's errors; empty without errors."""
    n_a, estimate = len(wrong_b), NOTHING
    if n_a:
        estimate = metrics.wilson_interval(int((~wrong_b).sum()), n_a)
    metric = f"{name} correction rate on {ROWS[a]}"
    headline = int({a, b} == set(PAIR))
    return _row(ROWS[b], metric, estimate, n, headline, f"of {n_a} errors")


def _paired_rows(trial: Trial, rows: np.ndarray, settings: dict) -> Iterable[dict]:
    """McNemar's p-values between the classifiers of ``PAIRS``, each under its own attack."""
    for pair in _present(trial.classifiers):
        for name, (attack, params, _) in settings.items():
            wrong = [trial.wrong_on(m, m, attack, rows, **params) for m in pair]
            yield _mcnemar_row(pair, f"{name} mcnemar p", *wrong)


def _present(models: Iterable[str]) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS if set(pair) <= set(models)]


def _mcnemar_row(pair: tuple[str, str], metric: str, a: np.ndarray, b: np.ndarray) -> dict:
    p = Estimate(metrics.mcnemar_test(a, b), float("nan"), float("nan"))
    return _row(" against ".join(ROWS[m] for m in pair), metric, p, len(a))


def _row(
    row: str, metric: str, estimate: Estimate, n: int | str, headline: int = 0, note: str = ""
) -> dict:
    shape = dict(row=row, category="all", metric=metric, n_samples=n)
    return shape | dict(estimate=estimate, headline=headline, note=note)


def _wilson(wrong: np.ndarray) -> Estimate:
    return metrics.wilson_interval(int(wrong.sum()), len(wrong))


def integer_counts(published: float, n: int) -> list[int]:
    """Counts k for which 100 k / n reads ``published`` per cent at two decimals, rounded or cut."""
    wanted = round(published * 100)
    return [
        k
        for k in range(n + 1)
        # Exact in integers: two decimals of 100 k / n are those of 10000 k / n.
        if wanted in (10_000 * k // n, (20_000 * k + n) // (2 * n))
    ]


def printed_counts(n: int = 908) -> pd.DataFrame:
    """Which counts of n test shapes the figures of table 7 can stand for, one line a figure.

    Errors are counts of n; correction rates are counts of the other classifier's errors, so they
    are tried against every count that its error allows.
    """
    quoted = report.published().query("table == 'adversarial'")
    errors, lines = {}, []
    for row, metric, value in zip(
        quoted["row"], quoted["metric"], quoted["published"], strict=True
    ):
        attack, _, rest = metric.partition(" ")
        percent = value * 100
        if rest == "adversarial error":
            fits = errors[row, attack] = integer_counts(percent, n)
            of = [n]
        else:
            of = errors[rest.removeprefix("correction rate on "), attack]
            fits = [f"{k} of {m}" for m in of for k in integer_counts(percent, m)]
        lines.append((row, metric, f"{percent:.2f}", _listed(of), _listed(fits) or "none"))
    columns = ["row", "metric", "published, %", "counts of", "counts that fit"]
    return pd.DataFrame(lines, columns=columns).set_index(columns[:2])


def _listed(values: Iterable) -> str:
    return ", ".join(map(str, values))


# ---------------------------------------------------------------------------------------------
# Costly attacks


def pgd_parameters(settings: config.Attacks, eps: float) -> dict:
    """Parameters of PGD in the ball of eps."""
    return {
        "eps": eps,
        "step": settings.pgd_step * eps / settings.pgd_steps,
        "n_steps": settings.pgd_steps,
        "restarts": settings.pgd_restarts,
    }


def _flip_attack(greedy: bool, on_surface: bool, counts: tuple[int, ...]) -> tuple[str, dict]:
    if greedy:
        return "greedy_flips", {"counts": list(counts), "on_surface": on_surface}
    return "random_flips", {"n": counts[-1], "on_surface": on_surface}


def curve(trial: Trial, model: str, kind: str) -> tuple[tuple[float, ...], np.ndarray]:
    """How far one kind of attack goes: its budgets, and which shapes it fools, bool (n, budgets).

    A budget contains the smaller ones wherever they nest: for PGD, RayS and flips.
    """
    settings, rows = trial.profile.attacks, trial.strong_rows
    if kind == "pgd":
        return settings.pgd_eps, _pgd(trial, model)
    if kind == "rays":
        wrong, distance = _rays(trial, model)
        reached = distance[:, None] <= np.array(settings.pgd_eps) + 1e-6
        return settings.pgd_eps, wrong[:, None] & reached
    if kind.startswith(("greedy flips", "random flips")):
        greedy, on_surface = kind.startswith("greedy"), kind.endswith("surface")
        return settings.flips, trial.flips(model, greedy, on_surface)
    if kind == "removed part":
        budgets, name = settings.part_shares, "remove_components"
        params = [{"share": s, "n_starts": settings.part_starts} for s in budgets]
    else:
        budgets, name = settings.slices, "drop_slices"
        params = [{"width": w} for w in budgets]
    wrong = [trial.wrong_on(model, model, name, rows, **p) for p in params]
    return budgets, np.stack(wrong, 1)


def _pgd(trial: Trial, model: str) -> np.ndarray:
    """PGD over the grid of eps: what a ball fools counts in all larger ones and is left alone."""
    settings, rows = trial.profile.attacks, trial.strong_rows
    fooled = np.zeros((len(rows), len(settings.pgd_eps)), bool)
    for k, eps in enumerate(settings.pgd_eps):
        left = np.flatnonzero(~fooled[:, k])
        params = pgd_parameters(settings, eps)
        wrong = trial.wrong_on(model, model, "pgd", rows[left], **params)
        fooled[left[wrong], k:] = True
    return fooled


def _rays(trial: Trial, model: str) -> tuple[np.ndarray, np.ndarray]:
    """Which shapes RayS fools, and the largest change of a voxel that it needs."""
    rows = trial.strong_rows
    params = {"n_tries": trial.profile.attacks.rays_tries}
    found = trial.attacked(model, "rays", rows, **params)
    distance = np.abs(found - trial.voxels[rows, None]).max((1, 2, 3, 4))
    return trial.wrong_on(model, model, "rays", rows, **params), distance


def curves(trial: Trial) -> pd.DataFrame:
    """Errors of the strong classifiers: kind, row, budget, value, low, high and the count n."""
    lines = []
    for kind in KINDS:
        for model in trial.strong:
            budgets, fooled = curve(trial, model, kind)
            for budget, wrong in zip(budgets, fooled.T, strict=True):
                found = _wilson(wrong)
                lines.append((kind, ROWS[model], float(budget), *found, len(wrong)))
    return pd.DataFrame(lines, columns=CURVE)


def curve_rows(trial: Trial) -> Iterable[dict]:
    """Rows of table ``adversarial``: the curves, and McNemar's p for each of ``PAIRS``."""
    for line in curves(trial).itertuples():
        estimate = Estimate(line.value, line.low, line.high)
        yield _row(line.row, f"{line.kind} error at {line.budget:g}", estimate, line.n)
    for pair in _present(trial.strong):
        for kind in KINDS:
            (budgets, first), (_, second) = (curve(trial, m, kind) for m in pair)
            for k, budget in enumerate(budgets):
                metric = f"{kind} mcnemar p at {budget:g}"
                yield _mcnemar_row(pair, metric, first[:, k], second[:, k])


def rebinarised(trial: Trial) -> pd.DataFrame:
    """What thresholding at one half leaves of every bounded attack, one line each.

    Largest change of a voxel, voxels that are another bit afterwards, and the error before and
    after, over the shapes that were attacked.
    """
    lines, settings = [], trial.profile.attacks
    for model, seen in trial.classifiers.items():
        sets = [(n, a, p, trial.table_rows) for n, (a, p, _) in _sets(settings)]
        if model in trial.strong:
            left = ~np.pad(_pgd(trial, model), ((0, 0), (1, 0)))[:, :-1]
            for k, eps in enumerate(settings.pgd_eps):
                rows = trial.strong_rows[left[:, k]]
                sets.append((f"pgd, eps {eps:g}", "pgd", pgd_parameters(settings, eps), rows))
        for name, attack, params, rows in sets:
            lines.append((seen.row, name, *_after_threshold(trial, model, attack, rows, params)))
    columns = ["row", "attack", "shapes", "largest change", "changed bits", "error"]
    columns += ["error after", "error untouched"]
    return pd.DataFrame(lines, columns=columns).set_index(columns[:2])


def _sets(settings: config.Attacks) -> Iterable[tuple[str, tuple[str, dict, int]]]:
    return settings_of_table_7(settings).items()


def _after_threshold(
    trial: Trial, model: str, attack: str, rows: np.ndarray, params: dict
) -> tuple[int, float, int, float, float, float]:
    if not len(rows):
        return 0, 0.0, 0, float("nan"), float("nan"), float("nan")
    found = trial.attacked(model, attack, rows, **params)
    before, bits = trial.voxels[rows, None], found > THRESHOLD
    clean = trial.clean(model, rows)
    # A grid that came back whole needs no second answer: no shape's answer depends on another.
    after, moved = clean.copy(), (bits != before).any((1, 2, 3, 4))
    after[moved] = trial.wrong(model, bits[moved], rows[moved])
    return (
        len(rows),
        float(np.abs(found - before).max()),
        int((bits != before).sum()),
        float(trial.wrong_on(model, model, attack, rows, **params).mean()),
        float(after.mean()),
        float(clean.mean()),
    )


def transfer(trial: Trial, name: str, rows: np.ndarray, **params) -> pd.DataFrame:
    """Error of every classifier (columns) on the shapes attacked on every other (rows).

    The first line is the error on untouched shapes.
    """
    models = list(trial.classifiers)
    lines = {"untouched": [trial.clean(m, rows).mean() for m in models]}
    for source in models:
        wrong = [trial.wrong_on(m, source, name, rows, **params) for m in models]
        lines[ROWS[source]] = [w.mean() for w in wrong]
    columns = [ROWS[m] for m in models]
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns).rename_axis("attacked on")


def transfer_of_flips(trial: Trial, rows: np.ndarray) -> pd.DataFrame:
    """As ``transfer``, for the shapes with ``attacks.transfer_flips`` voxels flipped greedily."""
    settings, models = trial.profile.attacks, list(trial.classifiers)
    counts = [k for k in settings.flips if k <= settings.transfer_flips]
    name, params = _flip_attack(True, False, tuple(counts))
    lines = {"untouched": [trial.clean(m, rows).mean() for m in models]}
    for source in models:
        order = torch.from_numpy(trial.attacked(source, name, rows, **params).astype(np.int64))
        x = torch.from_numpy(trial.voxels[rows, None]).float()
        found = attacks.flip(x, order).numpy()
        lines[ROWS[source]] = [trial.wrong(m, found, rows).mean() for m in models]
    columns = [ROWS[m] for m in models]
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns).rename_axis("attacked on")


# ---------------------------------------------------------------------------------------------
# Is it robustness, or are the gradients hidden?


def masking_checks(trial: Trial, model: str) -> pd.DataFrame:
    """Signs of hidden gradients in one classifier, one line a check (Carlini et al. 2019, 3.1).

    An attack with more means must not do worse than one with fewer: PGD from noise at
    ``attacks.check_eps`` is set beside one step, the margin as loss, a search on logits (Square),
    one on answers (RayS) and shapes made for the other classifiers. Without bounds every shape
    must fall, and gradients must not vanish. ``only other`` counts shapes that the other attack
    fools and PGD does not; a check fails when the other's error is higher.
    """
    settings, rows = trial.profile.attacks, trial.strong_rows
    eps = settings.check_eps
    params = pgd_parameters(settings, eps)
    wrong = trial.wrong_on(model, model, "pgd", rows, **params)
    budgets, by_answers = curve(trial, model, "rays")
    plain = params | {"restarts": 1, "random_start": False}
    others = {
        "one step (FGSM)": trial.wrong_on(model, model, "fgsm", rows, eps=eps),
        "PGD from the shape itself": trial.wrong_on(model, model, "pgd", rows, **plain),
        "PGD on the margin": trial.wrong_on(model, model, "pgd", rows, **params, loss="margin"),
        "Square, logits only": trial.wrong_on(
            model, model, "square_attack", rows, eps=eps, n_queries=settings.square_queries
        ),
        "RayS, answers only": by_answers[:, budgets.index(eps)],
    }
    ball = {"step": params["step"], "n_steps": settings.pgd_steps, "ball": eps}
    for source in [m for m in trial.strong if m != model]:
        name = f"transfer from {ROWS[source]}"
        others[name] = trial.wrong_on(model, source, "iterative_fgsm", rows, **ball)
    lines = [
        (name, wrong.mean(), other.mean(), int((other & ~wrong).sum()), other.sum() <= wrong.sum())
        for name, other in others.items()
    ]
    whole = trial.wrong_on(model, model, "pgd", rows, **pgd_parameters(settings, 1.0))
    lines.append(("no bound (eps 1)", whole.mean(), 1.0, int((~whole).sum()), whole.all()))
    sizes = gradient_sizes(trial, model)
    none = (sizes["length"] == 0).mean()
    lines.append(("shapes without any gradient", none, 0.0, "", none == 0))
    columns = ["check", "pgd", "other", "only other", "passed"]
    found = pd.DataFrame(lines, columns=columns).astype({"passed": bool})
    return found.assign(row=ROWS[model]).set_index(["row", "check"])


def gradient_sizes(trial: Trial, model: str) -> pd.DataFrame:
    """Length of the gradient by the voxels and share of exact zeros in it, one line a shape."""
    rows, network = trial.strong_rows, trial.classifiers[model].network

    def ask(part: slice) -> Tensor:
        return torch.stack(attacks.gradient_sizes(network, *trial._tensors(model, rows[part])), 1)

    path = trial._folder(model, "gradient sizes", rows, {}) / "found.npz"
    found = cache.kept(path, trial._in_batches, len(rows), ask)
    return pd.DataFrame(found, columns=["length", "zeros"])


def loss_surface(trial: Trial, model: str) -> tuple[np.ndarray, np.ndarray]:
    """Extents (n,) and the mean loss (n, n) along the gradient's sign and a random sign vector."""
    settings = trial.profile.attacks
    rows = stratified(trial.labels, settings.surface_shapes, settings.seed)
    largest = settings.check_eps * 2
    extents = np.linspace(-largest, largest, settings.surface_points)
    keys = [rng.torch_generator(settings.seed, "attacks", "surface", int(r)) for r in rows]
    x, y = trial._tensors(model, rows)
    network = trial.classifiers[model].network
    found = attacks.loss_surface(network, x, y, extents.tolist(), keys)
    return extents, found.mean(0).cpu().numpy()


# ---------------------------------------------------------------------------------------------
# To look at, and what it comes to


def curve_figure(table: pd.DataFrame, kinds: tuple[str, ...], path: Path, **options):
    """The curves of some kinds as one figure, saved with its data; None where there are none."""
    chosen = table[table["kind"].isin(kinds)]
    if not len(chosen):
        return None
    picture = figures.error_curves(chosen, **options)
    figures.save(picture, path, chosen)
    return picture


def surface_figure(trial: Trial, path: Path):
    """The loss surfaces of the strong classifiers, saved; None where there are none."""
    if not trial.strong:
        return None
    found = {ROWS[m]: loss_surface(trial, m) for m in trial.strong}
    extents = next(iter(found.values()))[0]
    values = {name: surface for name, (_, surface) in found.items()}
    axes = {"xlabel": "along random signs", "ylabel": "along the gradient's signs"}
    picture = figures.surfaces(values, extents, **axes)
    figures.save(picture, path)
    return picture


def show_examples(trial: Trial, model: str, n: int, path: Path) -> None:
    """Show flipped shapes in the notebook, changed voxels marked; save the picture."""
    before, after, captions = examples(trial, model, n)
    if not len(before):
        return
    shapes, marks = figures.changed(before, after)
    rows = {"before": before, "after": shapes}
    picture = figures.gallery(
        rows, n, captions={"after": captions}, marks={"after": marks}, title=ROWS[model], cell=1.5
    )
    figures.save(picture, path)
    figures.display_shapes(shapes, captions, marks=marks)


def examples(trial: Trial, model: str, n: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Up to n shapes before and after the fewest flips that fool: bool (n, D, D, D), captions.

    The first fooled shape of each category in turn, by row; shapes that the classifier gets wrong
    untouched are left out.
    """
    settings, rows = trial.profile.attacks, trial.strong_rows
    fooled = trial.flips(model, greedy=True, on_surface=False)
    able = np.flatnonzero(fooled[:, -1] & ~trial.clean(model, rows))
    turn = pd.Series(trial.labels[rows[able]]).groupby(trial.labels[rows[able]]).cumcount()
    able = able[np.lexsort((able, turn.to_numpy()))][:n]
    name, params = _flip_attack(True, False, settings.flips)
    order = trial.attacked(model, name, rows, **params)[able].astype(np.int64)
    counts = np.array(settings.flips)[fooled[able].argmax(1)]
    order = np.where(np.arange(order.shape[1]) < counts[:, None], order, -1)
    x, _ = trial._tensors(model, rows[able])
    after = attacks.flip(x, torch.from_numpy(order).to(x.device))
    with torch.no_grad():
        answers = trial.classifiers[model].network(after).argmax(1).cpu() if len(able) else []
    captions = [
        f"{config.CATEGORIES[trial.labels[r]]} → {config.CATEGORIES[int(a)]}: {k}"
        for r, a, k in zip(rows[able], answers, counts, strict=True)
    ]
    return trial.voxels[rows[able]], after[:, 0].cpu().numpy() > THRESHOLD, captions


def conclusion(trial: Trial) -> str:
    """Does 3DWINN withstand more than the Baseline, by which numbers, and what does that mean."""
    missing = [ROWS[m] for m in PAIR if m not in trial.classifiers]
    if missing:
        return (
            f"{' and '.join(missing)} did not meet the attacks in this profile, so nothing can be "
            "said of the paper's claim."
        )
    rows, eps = trial.table_rows, trial.profile.attacks.eps
    parts = [_compared("no attack", PAIR, *(trial.clean(m, rows) for m in PAIR))]
    for attack, params, headline in settings_of_table_7(trial.profile.attacks).values():
        if headline:
            wrong = [trial.wrong_on(m, m, attack, rows, **params) for m in PAIR]
            steps = f"{params['n_steps']} steps of " if "n_steps" in params else ""
            parts.append(_compared(f"{steps}FGSM at ε = {eps:g}", PAIR, *wrong))
    if set(PAIR) <= set(trial.strong):
        parts += _of_costly_attacks(trial)
        parts.append(verdict(trial))
    else:
        parts.append(
            "Not both met the costly attacks in this profile, so it stays open whether a lower "
            "error is robustness or comes of hidden gradients."
        )
    return " ".join(parts)


def _of_costly_attacks(trial: Trial) -> list[str]:
    """What the costly attacks add to the conclusion, one sentence each."""
    parts = [
        _compared(text, pair, *_at(trial, pair, kind, at))
        for pair in _present(trial.strong)
        for text, kind, at in _criteria(trial.profile.attacks)
    ]
    changed = rebinarised(trial)
    small = changed[changed["largest change"] < THRESHOLD]
    left = int(small["changed bits"].sum())
    parts.append(
        f"Thresholding at one half leaves {left or 'none'} of the voxels changed that the "
        f"{len(small)} bounded attacks below ε = {THRESHOLD:g} made."
    )
    for model in PAIR:
        checks = masking_checks(trial, model)
        failed = [name for (_, name), ok in checks["passed"].items() if not ok]
        told = f"fails {len(failed)}: {'; '.join(failed)}" if failed else "passes all"
        parts.append(f"Of {len(checks)} checks for hidden gradients {ROWS[model]} {told}.")
    return parts


def _criteria(settings: config.Attacks) -> list[tuple[str, str, float]]:
    """The costly attacks that the verdict rests on: words, kind and budget."""
    return [
        (f"PGD at ε = {settings.check_eps:g}", "pgd", settings.check_eps),
        (f"RayS at ε = {settings.check_eps:g}", "rays", settings.check_eps),
        (f"{settings.transfer_flips:g} greedy flips", "greedy flips", settings.transfer_flips),
    ]


def _at(trial: Trial, pair: Iterable[str], kind: str, budget: float) -> list[np.ndarray]:
    """Which shapes one kind of attack fools at one budget, for each classifier of a pair."""
    found = [curve(trial, m, kind) for m in pair]
    return [fooled[:, budgets.index(budget)] for budgets, fooled in found]


def verdict(trial: Trial) -> str:
    """One sentence: robust, hiding its gradients, fragile, or not told apart from the Baseline.

    3DWINN is called more robust where it errs less often (p < ``LEVEL``) under one of the attacks
    of ``_criteria`` and more often under none, and passes every check for hidden gradients; less
    robust the other way round.
    """
    lower, higher = [], []
    for text, kind, at in _criteria(trial.profile.attacks):
        first, second = _at(trial, PAIR, kind, at)
        if metrics.mcnemar_test(first, second) < LEVEL:
            (lower if second.sum() < first.sum() else higher).append(text)
    hidden = not masking_checks(trial, PAIR[1])["passed"].all()
    names = f"{ROWS[PAIR[1]]} is {{}} than {ROWS[PAIR[0]]}"
    if lower and higher:
        said = f"they disagree: fewer errors under {_listed(lower)}, more under {_listed(higher)}"
    elif lower:
        said = f"{names.format('more robust')} under {_listed(lower)}"
        said += ", but may hide its gradients" if hidden else ", and shows no hidden gradients"
    elif higher:
        said = f"{names.format('less robust')} under {_listed(higher)}"
    else:
        said = "the two cannot be told apart"
    return f"**By these {len(_criteria(trial.profile.attacks))} attacks, {said}.**"


def _compared(attack: str, pair: tuple[str, str], first: np.ndarray, second: np.ndarray) -> str:
    """One sentence on two classifiers under one attack, with McNemar's p."""
    p = metrics.mcnemar_test(first, second)
    names = [ROWS[m] for m in pair]
    told = "the two cannot be told apart"
    if p < LEVEL:
        told = f"{names[int(second.sum() < first.sum())]} errs less often"
    return (
        f"Under {attack}, {names[0]} errs on {first.mean():.1%} and {names[1]} on "
        f"{second.mean():.1%} of {len(first)} shapes: {told} (p = {p:.2g})."
    )
