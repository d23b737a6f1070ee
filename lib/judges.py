"""What another judge would say: the generation tables under every judge of the family.

The judge is one trained network. An order of two rows that another seed of it turns round belongs
to the judge, not to the shapes.
"""

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from lib import config, evaluate, metrics
from lib.metrics import Estimate
from lib.train import runs

PROBABILITY = "class probability"
# The headline of each generation table that a judge fills cell by cell, the study's own first.
METRICS = ("kid", "fid", PROBABILITY)
JUDGE = runs.MODELS["judge"]
PAIRS = "pairs of rows"


def load_judges(profile: config.Profile) -> list[evaluate.Judge]:
    """Every judge that the judge's profile asks for, by seed. StudyError where one is missing."""
    owner = config.load(profile.judge.profile)
    return [evaluate.load_judge(profile, seed) for seed in owner.wanted["judge"].seeds]


def verdicts(profile: config.Profile, judges: list[evaluate.Judge], progress=iter) -> pd.DataFrame:
    """Every cell of the generation tables under every judge; distances are those to test shapes.

    Columns metric (of ``METRICS``), row, category, judge (its seed), value, low, high, n. The draws
    of shapes are those of 20_generation, the same for every judge. ``progress`` wraps the
    categories.
    """
    lines = []
    for judge in judges:
        gallery = evaluate.look_at_everything(profile, judge, progress)
        for found in _cells(gallery):
            if found["row"] not in gallery.variants:
                cell = {k: found[k] for k in ("metric", "row", "category")}
                value = found["estimate"]._asdict()
                lines.append(cell | {"judge": judge.seed} | value | {"n": found["n_samples"]})
    return pd.DataFrame(lines)


def _cells(gallery: evaluate.Gallery) -> Iterable[dict]:
    rows = [evaluate.distance_rows(gallery, n) for n in METRICS if n in evaluate.DISTANCES]
    rows.append(evaluate.class_probability_rows(gallery))
    for found in itertools.chain(*rows):
        if found["metric"] in METRICS and found["headline"]:
            yield found


def pairs(found: pd.DataFrame) -> pd.DataFrame:
    """Every two rows of a category, and how each judge orders them.

    found: ``verdicts``. Columns metric, category, a, b; alike, whether all judges give one order;
    settled, whether the intervals of the first judge lie apart. Real test shapes are left out: of
    distances they are the reference.
    """
    lines = []
    for (metric, category), cells in found.groupby(["metric", "category"], sort=False):
        cells = cells[cells["row"] != "real test"]
        value = cells.pivot(index="row", columns="judge", values="value")
        first = cells[cells["judge"] == cells["judge"].min()].set_index("row")
        for a, b in itertools.combinations(first.index, 2):
            orders = np.sign(value.loc[a] - value.loc[b])
            apart = first["high"][[a, b]].min() < first["low"][[a, b]].max()
            cell = dict(metric=metric, category=category, a=a, b=b)
            lines.append(cell | dict(alike=orders.nunique() == 1, settled=bool(apart)))
    return pd.DataFrame(lines)


def agreement(found: pd.DataFrame) -> pd.DataFrame:
    """How far the judges agree, a line a metric: counts of pairs, and rank correlation.

    Columns pairs, alike, settled, settled and alike: sums over categories of ``pairs``; tau:
    Kendall's tau-b between two judges' orders of a category's rows, the mean over categories and
    pairs of judges; NaN for one judge.
    """
    lines = {}
    for metric, these in pairs(found).groupby("metric", sort=False):
        lines[metric] = {
            "pairs": len(these),
            "alike": int(these["alike"].sum()),
            "settled": int(these["settled"].sum()),
            "settled and alike": int((these["settled"] & these["alike"]).sum()),
            "tau": _tau(found[(found["metric"] == metric) & (found["row"] != "real test")]),
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def _tau(found: pd.DataFrame) -> float:
    values = []
    for _, cells in found.groupby("category"):
        value = cells.pivot(index="row", columns="judge", values="value")
        for a, b in itertools.combinations(value.columns, 2):
            values.append(kendalltau(value[a], value[b]).statistic)
    return float(np.mean(values)) if values else math.nan


def accuracy_rows(profile: config.Profile, judges: list[evaluate.Judge]) -> Iterable[dict]:
    """Test accuracy of every judge in the three columns for duplicates, and the mean over seeds."""
    counts = {j.seed: evaluate.accuracy_columns(j, profile) for j in judges}
    for column in next(iter(counts.values())):
        metric = "accuracy" if column == "all" else f"accuracy, {column}"
        found = {seed: of[column] for seed, of in counts.items()}
        for seed, (right, n) in found.items():
            estimate = metrics.wilson_interval(right, n)
            yield _accuracy(f"{metric}, judge {seed}", estimate, n, 1, "Wilson interval")
        if len(found) > 1:
            shares = np.array([right / n for right, n in found.values()])
            note = f"mean over {len(found)} seeds, Student t interval"
            yield _accuracy(metric, metrics.student_interval(shares), n, len(found), note)


def _accuracy(metric: str, estimate: Estimate, n: int, n_seeds: int, note: str) -> dict:
    common = dict(row=JUDGE, category="all", headline=0, n_samples=n, n_seeds=n_seeds)
    return common | dict(metric=metric, estimate=estimate, note=note)


def table_rows(found: pd.DataFrame) -> Iterable[dict]:
    """Rows of table ``judges`` from ``verdicts``: every cell under every judge, then agreement."""
    for cell in found.itertuples():
        distance = cell.metric in evaluate.DISTANCES
        yield dict(
            row=cell.row,
            category=cell.category,
            metric=f"{cell.metric}, judge {cell.judge}",
            reference="test" if distance else "",
            n_reference=cell.n if distance else "",
            n_samples=cell.n,
            estimate=Estimate(cell.value, cell.low, cell.high),
            headline=0,
        )
    for metric, counts in agreement(found).iterrows():
        for part, whole, kind in (
            ("alike", "pairs", "all pairs"),
            ("settled and alike", "settled", "intervals apart"),
        ):
            share = counts[part] / counts[whole] if counts[whole] else math.nan
            yield dict(
                row=PAIRS,
                category="all",
                metric=f"{metric}, ordered alike, {kind}",
                n_samples=int(counts[whole]),
                estimate=Estimate(share, math.nan, math.nan),
                headline=0,
                note="pairs share rows, so no interval",
            )


def turned(found: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Settled pairs that some judge orders the other way: category, a, b, and both rows' values.

    Values are texts, one number a judge in order of seeds.
    """
    these = pairs(found)
    these = these[(these["metric"] == metric) & these["settled"] & ~these["alike"]]
    cells = found[found["metric"] == metric].set_index(["category", "row"]).sort_values("judge")

    def values(category: str, row: str) -> str:
        return " ".join(f"{v:.3g}" for v in cells.loc[[(category, row)], "value"])

    out = these[["category", "a", "b"]].copy()
    for row in ("a", "b"):
        places = zip(out["category"], out[row], strict=True)
        out[f"values of {row}"] = [values(*place) for place in places]
    return out.reset_index(drop=True)


def in_words(found: pd.DataFrame) -> str:
    """What another judge changes, metric by metric."""
    n = found["judge"].nunique()
    if n == 1:
        return "One judge alone: no spread is shown."
    parts = [
        f"{metric}: {int(c['alike'])} of {int(c['pairs'])} pairs of rows are ordered alike by all "
        f"{n} judges, and {int(c['settled and alike'])} of the {int(c['settled'])} whose intervals "
        f"lie apart under the first; Kendall's tau {c['tau']:.2f}."
        for metric, c in agreement(found).iterrows()
    ]
    return " ".join(parts)
