"""Tables of results: one number a row, written by table notebooks and joined by 90_report."""

import io
import itertools
import math
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd

from lib import cards, config, files, paths
from lib.errors import StudyError

COLUMNS = (
    "table,row,category,metric,published,value,low,high,headline,n_seeds,n_samples,reference,"
    "n_reference,judge,threshold,profile,run_ids,note"
).split(",")
KEY = ["table", "row", "category", "metric", "reference", "n_samples", "threshold"]
PUBLISHED = paths.CODE / "data" / "published.csv"
DIGITS = 6

TITLES = {
    "inception": "Inception score (Table 2 of 3DWINN)",
    "fid": "Frechet distance, FID (Table 3 of 3DWINN)",
    "kid": "Kernel distance, KID",
    "class_probability": "Class probability (Table 4 of 3DWINN)",
    "set_metrics": "Set metrics",
    "memorisation": "Memorisation",
    "cost": "Cost",
    "supervised": "Test accuracy of supervised classification (Table 5 of 3DWINN)",
    "adversarial": "Adversarial errors and correction rates (Table 7 of 3DWINN)",
    "unsupervised": "Test accuracy of features learned without labels (Table 6 of 3DWINN)",
    "ikea": "Shapes from one picture, average precision (aligned)",
}
# Tables over all ten categories, whatever categories a profile generates.
WHOLE = ("supervised", "unsupervised", "adversarial")
LOWER_IS_BETTER = {"inception": False, "fid": True, "class_probability": False}
DECIMALS = {"inception": 2, "fid": 0}  # 3 elsewhere


def published() -> pd.DataFrame:
    """The papers' figures: table, row, category, metric, published, source.

    ``reason`` says why a row is only quoted; it is empty for rows that this repository runs.
    """
    return pd.read_csv(PUBLISHED, dtype={"published": float}).fillna({"reason": ""})


def table(
    name: str,
    profile: config.Profile,
    rows: list[dict],
    *,
    judge: str,
    run_ids: dict[str, list[str]] | None = None,
    variants: dict[str, tuple[str, float]] | None = None,
) -> pd.DataFrame:
    """Rows of estimates as a tidy table; published cells that were not run stay, value empty.

    rows: dicts with row, category, metric, estimate, headline, and reference, n_samples,
    n_reference, note where there are any, n_seeds where it is not that of the runs. run_ids: row ->
    the runs behind it. variants: row -> its published name and threshold, for rows read at another
    threshold, which are never the headline. Raises StudyError for two rows of one key.
    """
    out = []
    for found in rows:
        estimate = found["estimate"]
        ids = [i for i in (run_ids or {}).get(found["row"], []) if _covers(i, found["category"])]
        out.append(
            {k: found.get(k, "") for k in COLUMNS}
            | dict(zip(("value", "low", "high"), map(_rounded, estimate), strict=True))
            | {
                "table": name,
                "judge": judge,
                "threshold": profile.evaluation.threshold,
                "profile": profile.name,
                **_variant(found["row"], variants or {}),
                "n_seeds": found.get("n_seeds", 1 if ids else ""),
                "run_ids": " ".join(ids),
            }
        )
    done = pd.DataFrame(out, columns=COLUMNS)
    twice = done[done.duplicated(KEY)]
    if len(twice):
        raise StudyError(f"table {name}: two rows for {twice.iloc[0][KEY].to_dict()}")
    return _with_published(done, name, profile)


def _variant(row: str, variants: dict[str, tuple[str, float]]) -> dict:
    if row not in variants:
        return {}
    name, threshold = variants[row]
    return {"row": name, "threshold": threshold, "headline": 0}


def labelled(found: pd.DataFrame) -> pd.DataFrame:
    """The table with rows of other thresholds named so, as ``3D-GAN, above 0.1``."""
    usual = found["threshold"].astype(float).max()
    other = found["threshold"].astype(float) != usual
    names = found["row"].where(~other, found["row"] + ", above " + found["threshold"].astype(str))
    return found.assign(row=names)


def _covers(run_id: str, category: str) -> bool:
    return category == "all" or any(f"-{c}-s" in run_id for c in (category, "all"))


def _rounded(value: float) -> float | str:
    return "" if math.isnan(value) else float(f"{value:.{DIGITS}g}")


def _with_published(done: pd.DataFrame, name: str, profile: config.Profile) -> pd.DataFrame:
    """Put the papers' figures beside headline cells; add the cells that were not run, empty.

    Procedural shapes have no published figures.
    """
    if profile.data.source == "procedural":
        return done
    quoted = published().query("table == @name")
    if name not in WHOLE and set(profile.categories) != set(config.CATEGORIES):
        # A score over fewer categories is another quantity than the published one.
        quoted = quoted[quoted["category"] != "all"]
    quoted = quoted[quoted["category"].isin([*profile.categories, "all"])]
    cells = {(q.row, q.category, q.metric): q.published for q in quoted.itertuples()}
    reasons = {(q.row, q.category, q.metric): q.reason for q in quoted.itertuples()}
    place = list(zip(done["row"], done["category"], done["metric"], strict=True))
    done["published"] = [
        cells.pop(cell, "") if headline else ""
        for cell, headline in zip(place, done["headline"], strict=True)
    ]
    missing = [
        {k: "" for k in COLUMNS}
        | {"table": name, "row": row, "category": category, "metric": metric}
        | {"published": value, "headline": 1, "profile": profile.name}
        | {
            "threshold": profile.evaluation.threshold,
            "note": reasons[cell] or "not run in this profile",
        }
        for cell, value in cells.items()
        for row, category, metric in [cell]
    ]
    return pd.concat([done, pd.DataFrame(missing, columns=COLUMNS)], ignore_index=True)


def write_table(found: pd.DataFrame, profile: str, notebook: str, name: str) -> Path:
    """Write ``results/<profile>/tables/<notebook>/<name>.csv``."""
    path = paths.results(profile) / "tables" / notebook / f"{name}.csv"
    files.write_text(path, found.to_csv(index=False, lineterminator="\n"))
    return path


def read_tables(folder: Path) -> pd.DataFrame:
    """All tables of a folder joined, in order of their names. StudyError when there is none."""
    found = sorted(Path(folder).glob("**/*.csv"))
    if not found:
        raise StudyError(f"{paths.relative(folder)} holds no table; run 20_generation first")
    parts = [pd.read_csv(p, keep_default_na=False, dtype=str) for p in found]
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def wide(found: pd.DataFrame, metric: str, reference: str = "") -> pd.DataFrame:
    """Rows by categories for one metric: ``value [low, high]`` as text, published in brackets.

    An empty cell is one that was not computed.
    """
    chosen = found[(found["metric"] == metric) & (found["reference"].isin([reference, ""]))]
    chosen = labelled(chosen)
    if not len(chosen):
        raise StudyError(f"no rows of metric {metric!r} against {reference!r}")
    decimals = DECIMALS.get(chosen["table"].iloc[0], 3)
    cells = chosen.apply(lambda r: _cell(r, decimals), axis=1)
    categories, rows = chosen["category"].unique(), chosen["row"].unique()
    out = pd.DataFrame("", index=rows, columns=categories)
    for row, category, cell in zip(chosen["row"], chosen["category"], cells, strict=True):
        out.loc[row, category] = cell
    out.index.name = metric
    return out


def _cell(row: pd.Series, decimals: int) -> str:
    def text(value: object) -> str:
        return "" if value in ("", None) else f"{float(value):.{decimals}f}"

    ours = text(row["value"])
    if row["low"] not in ("", None):
        ours += f" [{text(row['low'])}, {text(row['high'])}]"
    paper = text(row["published"])
    return ours + (f" (paper {paper})" if paper else "")


def markdown(frame: pd.DataFrame) -> str:
    """A table as GitHub Markdown, its index the first column."""
    head = [frame.index.name or "", *map(str, frame.columns)]
    lines = [head, ["---"] * len(head)]
    lines += [
        [str(index), *map(str, row)] for index, row in zip(frame.index, frame.values, strict=True)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_report(profile: config.Profile) -> pd.DataFrame:
    """Join the profile's tables into ``report/results.csv`` and one Markdown page; returns them."""
    folder = paths.results(profile.name)
    found = read_tables(folder / "tables")
    files.write_text(
        folder / "report" / "results.csv", found.to_csv(index=False, lineterminator="\n")
    )
    files.write_text(folder / "report" / "tables.md", tables_page(found, profile))
    return found


def write_cards(profile: config.Profile) -> list[str]:
    """Write a model card for every published run to ``report/models``; returns the runs' ids."""
    folder = paths.results(profile.name)
    kinds = ("samples", "judge", "classifiers")
    records = [r for kind in kinds for r in sorted(folder.glob(f"{kind}/*/run.json"))]

    def fill(stage: Path) -> None:
        for record in records:
            draws = any(record.parent.glob("samples-*.npz"))
            text = cards.card(files.read_json(record), draws=draws)
            files.write_text(stage / f"{record.parent.name}.md", text)

    files.commit_folder(folder / "report" / "models", fill)
    return [record.parent.name for record in records]


def tables_page(found: pd.DataFrame, profile: config.Profile) -> str:
    """The headline tables as one Markdown page."""
    parts = [f"# Tables of profile {profile.name}\n"]
    for name in [t for t in TITLES if t in set(found["table"])]:
        parts.append(f"## {TITLES[name]}\n")
        parts.append(table_page(found[found["table"] == name]))
    return "\n".join(parts)


def table_page(rows: pd.DataFrame) -> str:
    """The headline metrics of one table as Markdown, one after the other; "" for no rows."""
    parts = []
    for part in headline_parts(rows):
        metric = part["metric"].iloc[0]
        parts.append(markdown(wide(part, metric, reference_of(part))))
        parts.append(_footnote(part))
    return "\n".join(parts)


def headline_parts(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The cells of a table that its page shows, a part a metric: headline cells and, beside them,
    the same metric of rows read at another threshold."""
    first = rows[rows["headline"].astype(str) == "1"]
    return [
        rows[(rows["metric"] == metric) & (rows["reference"].isin([reference_of(part), ""]))]
        for metric, part in first.groupby("metric", sort=False)
    ]


def reference_of(rows: pd.DataFrame) -> str:
    """The one reference that headline rows name, or an empty string."""
    named = [r for r in rows["reference"].unique() if r]
    return named[0] if named else ""


def _footnote(rows: pd.DataFrame) -> str:
    run = rows[rows["value"] != ""]
    if run.empty:
        return "Empty: not run in this profile, or a share of nothing.\n"
    if rows["table"].iloc[0] == "cost":
        return f"As measured on: {', '.join(sorted(set(run['note'])))}.\n"
    against = f" against the {reference_of(rows)} split" if reference_of(rows) else ""
    sizes = sorted({int(float(n)) for n in run["n_samples"] if n})
    judges = sorted({j for j in run["judge"] if j})
    by = f"; judge {', '.join(judges)}" if judges else ""
    return (
        f"n = {', '.join(map(str, sizes))}{against}; 95 % intervals in brackets{by}. An empty cell "
        f"was not run in this profile, or has too few shapes for this n.{_shown(run)}\n"
    )


def _shown(run: pd.DataFrame) -> str:
    """What was shown to the models of table ``ikea``, from its notes."""
    if run["table"].iloc[0] != "ikea":
        return ""
    return f" Pictures: {', '.join(sorted({n.split(';')[0] for n in run['note']}))}."


def against_anchors(found: pd.DataFrame, metric: str = "kid") -> pd.DataFrame:
    """Does each trained cell beat the anchors? yes, no, or undecided where intervals overlap.

    Lower is better. The intervals cover the choice of shapes, not another training run.
    """
    cells = labelled(found[(found["metric"] == metric) & (found["value"] != "")])
    cells = cells[cells["reference"] == "test"]
    ends = {(r.row, r.category): (r.value, r.low, r.high) for r in cells.itertuples()}
    trained = cells[cells["run_ids"] != ""]
    out = []
    for own in trained.itertuples():
        line = {"row": own.row, "category": own.category, metric: f"{float(own.value):.3f}"}
        for anchor in ("noise", "Bernoulli", "PCA-Gaussian", "real train"):
            other = ends.get((anchor, own.category))
            line[f"below {anchor}"] = _below((own.value, own.low, own.high), other)
        out.append(line)
    columns = ["row", "category", metric]
    return pd.DataFrame(out, columns=None if out else columns).set_index(columns[:2])


def against_papers(found: pd.DataFrame) -> pd.DataFrame:
    """Do trained cells stand in the order of the papers' figures? yes, no, or undecided.

    Every pair of a category in tables 2 to 4 that the papers order, at every threshold. Undecided
    where intervals overlap. Only orders can be compared: the papers' judge was another.
    """
    trained = found[(found["run_ids"] != "") & (found["value"] != "")]
    quoted = trained[(trained["headline"].astype(str) == "1") & (trained["published"] != "")]
    place = ["table", "category", "row", "metric", "reference", "n_samples"]
    papers = quoted[quoted["table"].isin(LOWER_IS_BETTER)][[*place, "published"]]
    cells = trained.drop(columns="published").merge(papers, on=place)
    columns = ["table", "category", "better in the paper", "than", "here", "value", "other value"]
    out = []
    for (name, category), group in cells.groupby(["table", "category"], sort=False):
        for a, b in itertools.permutations(labelled(group).itertuples(), 2):
            low, high = (a, b) if LOWER_IS_BETTER[name] else (b, a)
            if float(low.published) < float(high.published):
                verdict = _below(*((c.value, c.low, c.high) for c in (low, high)))
                pair = (f"{c.row} ({float(c.published):g})" for c in (a, b))
                out.append((name, category, *pair, verdict, float(a.value), float(b.value)))
    return pd.DataFrame(out, columns=columns).set_index(columns[:2])


def _below(own: tuple[str, str, str], other: tuple[str, str, str] | None) -> str:
    if other is None or "" in (*own, *other):
        return ""
    if float(own[2]) < float(other[1]):
        return "yes"
    return "no" if float(own[1]) > float(other[2]) else "undecided"


def confusion(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Counts (K, K): rows are true categories, columns what the most probable answer was."""
    n = probabilities.shape[1]
    counts = np.zeros((n, n), int)
    np.add.at(counts, (labels, probabilities.argmax(1)), 1)
    return counts


def data_card(card: dict, settings: config.Data) -> str:
    """The data card as Markdown, from the numbers of ``data.prepare``."""
    # The order is stated: a card that was read from its file has its keys sorted.
    columns = ["train", "validation", "test", "test equal to a training shape"]
    counts = pd.DataFrame(card["counts"]).T[[*columns, "occupancy"]]
    total = counts[columns].sum().astype(int)
    cells = counts.astype({c: int for c in columns}).astype(object)
    cells.loc["all"] = [*total.tolist(), ""]
    cells.index.name = "category"
    sources = {
        "modelnet10": "ModelNet10 (Wu et al. 2015), official split, one pose, 30^3 grids",
        "off": "ModelNet10 (Wu et al. 2015), official split, meshes voxelised here to 30^3 grids",
        "procedural": f"procedural furniture (`lib/furniture.py`), seed {settings.seed}",
    }
    near = card["test near a training shape"]
    empty = {split: ", ".join(map(str, rows)) or "none" for split, rows in card["empty"].items()}
    return "\n".join(
        [
            f"# Data card: {card['name']}",
            "",
            f"Source: {sources[card['source']]}.",
            "",
            markdown(cells),
            f"- Empty grids, by row of the source: train {empty['train']}; test {empty['test']}.",
            "  They leave the training split and stay in the test split.",
            f"- Distinct training grids as received: {card['distinct training grids']}.",
            f"- Test shapes equal to a training shape: {card['test equal to a training shape']};"
            f" with an overlap of .95 or more {near['0.95']}, of .9 or more {near['0.9']}.",
            f"- Validation: {settings.validation:.0%} of every category, seed {settings.seed}, near"
            " duplicates on one side.",
            f"- Hash of everything prepared: `{card['hash']}`.",
            "",
        ]
    )


def write_page(path: Path, text: str) -> None:
    """Write a Markdown page atomically."""
    files.write_text(path, text)


def check(profile: str, tolerance: float = 0.02) -> list[str]:
    """Differences between a profile's results.csv and the committed one, one line each.

    Numbers agree when they differ by at most ``tolerance`` of the larger one, or by 1e-3; all
    other columns but the judge's hash must be equal. Raises StudyError when either is missing.
    """
    name = f"results/{profile}/report/results.csv"
    command = ["git", "-C", str(paths.CODE), "show", f"HEAD:{name}"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        raise StudyError("git is not installed, so there is nothing to compare with") from None
    if shown.returncode:
        raise StudyError(f"{name} is not committed, so there is nothing to compare with")
    ours = paths.results(profile) / "report" / "results.csv"
    if not ours.is_file():
        raise StudyError(f"{name} is missing; run {config.maker(profile, '90_report')}")
    before = pd.read_csv(io.StringIO(shown.stdout), keep_default_na=False, dtype=str)
    after = pd.read_csv(ours, keep_default_na=False, dtype=str)
    both = before.merge(after, on=KEY, how="outer", indicator=True, suffixes=(" then", " now"))
    lines = []
    for row in both.to_dict("records"):
        place = " / ".join(str(row[k]) for k in KEY if row[k])
        if row["_merge"] != "both":
            lines.append(f"{place}: only in {'HEAD' if row['_merge'] == 'left_only' else 'place'}")
            continue
        for column in [c for c in COLUMNS if c not in (*KEY, "judge")]:
            then, now = row[f"{column} then"], row[f"{column} now"]
            close = tolerance if column in ("value", "low", "high") else None
            if not _agree(then, now, close):
                lines.append(f"{place}: {column} was {then or 'empty'}, is {now or 'empty'}")
    return lines


def _agree(then: str, now: str, tolerance: float | None) -> bool:
    """Equal, or with a tolerance near enough as numbers."""
    if tolerance is None or "" in (then, now):
        return then == now
    a, b = float(then), float(now)
    return abs(a - b) <= max(1e-3, tolerance * max(abs(a), abs(b)))


README_BLOCK = re.compile(r"(<!-- table: (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def readme_tables(text: str) -> str:
    """A page with every block ``<!-- table: PROFILE TABLE -->`` filled from results.csv.

    Headline cells only. A profile or table without results leaves its block empty.
    """

    def fill(block: re.Match) -> str:
        profile, name = block.group(2), block.group(3)
        path = paths.results(profile) / "report" / "results.csv"
        empty = block.group(1) + block.group(4)
        if not path.is_file():
            return empty
        found = pd.read_csv(path, keep_default_na=False, dtype=str)
        parts = headline_parts(found[found["table"] == name])
        if not parts:
            return empty
        rows = parts[0]
        table = markdown(wide(rows, rows["metric"].iloc[0], reference_of(rows)))
        return f"{block.group(1)}{table}\n{_footnote(rows)}{block.group(4)}"

    return README_BLOCK.sub(fill, text)
