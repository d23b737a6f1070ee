"""What stops 3D-GAN from collapsing: readings of its training on a small budget, paired by seed."""

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from lib import config, data, device, figures, files, metrics, paths, voxel
from lib.errors import StudyError
from lib.train import engine, gan3d, gan_variant, runs

BASE = "base"
# Of the samples of one run: the filled share, the mean pairwise IoU, and how far and how widely
# they reach the validation shapes (the test split is not touched).
MEASURES = ("occupancy", "likeness", "distance", "coverage")
# Keys of gan3d in whose place those of the budget stand.
OVERRIDES = ("generator_channels", "discriminator_channels", "steps", "batch")
OVERRIDES += ("latent", "lr_generator", "lr_discriminator")


def compare(
    profile: config.Profile, readings: dict[str, dict[str, dict]]
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, np.ndarray]]:
    """Train 3D-GAN once a reading and seed: results, logs and samples.

    readings: name -> changes of the sections ``gan3d`` and ``gan_ablation``, the first one named
    ``base``. Results have one row a run: reading, seed, ``MEASURES`` and ``collapse`` (empty where
    there is none); logs one line a log step. Samples are bool (seeds * n, D, D, D), those of one
    seed after those of another. A run that diverges has no measures, and its samples are empty
    grids. Category and pool are those of ``profile``. Complete runs are taken up as they are, an
    interrupted one goes on where it stopped. Raises StudyError where the first reading is another.
    """
    if next(iter(readings), None) != BASE:
        raise StudyError(f"the first reading must be {BASE!r}: the others are compared with it")
    profiles = {name: config.with_changes(profile, **c) for name, c in readings.items()}
    split = data.load_train(profile.data).category(profile.gan_ablation.category)
    validation = real_shapes(profile, split, True)
    results, logs, samples = [], [], {name: [] for name in readings}
    code = runs.syntax_hash_of((*gan_variant.MODULES, *engine.SHARED_MODULES))
    pairs = [(name, seed) for seed in profile.gan_ablation.seeds for name in readings]
    for name, seed in tqdm(pairs, unit="run"):
        folder = paths.CHECKPOINTS / f"gan-ablation-{_key(profiles[name], seed, code)}"
        log, grids, reason = trained(
            folder,
            lambda p=profiles[name], s=seed: _task(p, split, s),
            profiles[name].gan_ablation.n_samples,
            profile.evaluation.threshold,
            f"{name}, seed {seed}",
        )
        results.append({"reading": name, "seed": seed} | row(validation, grids, reason))
        logs.append(log.assign(reading=name, seed=seed))
        samples[name].append(grids)
    found = pd.DataFrame(results)
    joined = {name: np.concatenate(grids) for name, grids in samples.items()}
    return found, pd.concat(logs, ignore_index=True), joined


def _task(profile: config.Profile, split: data.Split, seed: int) -> gan_variant.VariantTask:
    variant = profile.gan_ablation
    gan = dataclasses.replace(profile.gan3d, **{k: getattr(variant, k) for k in OVERRIDES})
    where = device.pick(profile.device)
    return gan_variant.VariantTask(gan, variant, split, profile.data.side, seed, where)


def trained(
    folder: Path, make: Callable, n: int, threshold: float, name: str
) -> tuple[pd.DataFrame, np.ndarray, str]:
    """The log, n samples above a threshold and the reason of a divergence of one run.

    folder: of its state; a complete run is taken up as it is, an interrupted one goes on. make():
    the task, with ``samples`` and ``voxels``. Samples of a run that diverged are empty grids.
    """
    final = folder / "final"
    if not final.is_dir():
        with engine.lock(folder):
            task, reason = make(), ""
            try:
                engine.fit(task, folder, name=name, progress=False)
                grids = task.samples(n) > threshold
            except engine.Diverged as error:
                reason = str(error)
                grids = np.zeros((n, *task.voxels.shape[1:]), bool)
            files.commit_folder(final, lambda stage: _store(stage, folder, grids, reason))
            for leftover in folder.glob("state.safetensors*"):
                leftover.unlink()
    text = (final / "log.csv").read_text()
    log = pd.read_csv(io.StringIO(text)) if text.strip() else pd.DataFrame({"step": [1]})
    log = log.reindex(columns=log.columns.union(["occupancy", "likeness"], sort=False))
    reason = files.read_json(final / "run.json")["diverged"]
    return log, voxel.load_voxels(final / "samples.npz"), reason


def _store(stage: Path, folder: Path, grids: np.ndarray, reason: str) -> None:
    (stage / "log.csv").write_bytes((folder / "log.csv").read_bytes())
    voxel.save_voxels(stage / "samples.npz", grids)
    files.write_json(stage / "run.json", {"diverged": reason})


def _key(profile: config.Profile, seed: int, code: str) -> str:
    """Hash of what one run's result depends on; ``code`` is the hash of the training code."""
    sections = {name: config.section(profile, name) for name in ("gan3d", "gan_ablation")}
    sections["gan_ablation"].pop("seeds")
    for key in OVERRIDES:
        sections["gan3d"].pop(key)
    parts = [sections, seed, profile.data.side, data.card(profile.data)["hash"]]
    parts += [profile.evaluation.threshold, code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def real_shapes(profile: config.Profile, split: data.Split, validation: bool) -> np.ndarray:
    """Validation shapes of a split, or the others, on the ablation's grid: bool (N, D, D, D)."""
    grids = data.model_grid(split.voxels[split.validation == validation], profile.data.side)
    return voxel.max_pool(grids, profile.gan_ablation.pool)


def measures(validation: np.ndarray, grids: np.ndarray) -> dict[str, float]:
    """``MEASURES`` of shapes bool (N, D, D, D) beside validation shapes (M, D, D, D).

    All lie in [0, 1]. distance: mean over validation shapes of 1 - IoU with the nearest of the
    shapes (MMD); coverage: the share of validation shapes that are nearest to one of them
    (Achlioptas et al. 2018).
    """
    packed = voxel.pack(grids)
    distances = 1 - metrics.iou_matrix(voxel.pack(validation), packed)
    return {
        "occupancy": float(grids.mean()),
        "likeness": 1 - metrics.pairwise_diversity(packed),
        "distance": metrics.minimum_matching_distance(distances),
        "coverage": metrics.coverage(distances),
    }


def row(validation: np.ndarray, grids: np.ndarray, reason: str) -> dict[str, float | str]:
    """``MEASURES`` and ``collapse`` of one run; NaN and ``diverged`` where there is a reason."""
    if reason:
        return dict.fromkeys(MEASURES, math.nan) | {"collapse": "diverged"}
    measured = measures(validation, grids)
    return measured | {"collapse": collapse_of(measured["occupancy"], measured["likeness"])}


def collapse_of(occupancy: float, likeness: float) -> str:
    """``full``, ``empty``, ``one shape`` or nothing, by the thresholds of 3D-GAN's warnings."""
    if occupancy > gan3d.FULL:
        return "full"
    if occupancy < gan3d.EMPTY:
        return "empty"
    return "one shape" if likeness > gan3d.ALIKE else ""


def anchor(profile: config.Profile) -> dict[str, float]:
    """``MEASURES`` of as many training shapes as a reading has samples: what a GAN could reach."""
    split = data.load_train(profile.data).category(profile.gan_ablation.category)
    grids = real_shapes(profile, split, False)[: profile.gan_ablation.n_samples]
    return measures(real_shapes(profile, split, True), grids)


def differences(results: pd.DataFrame) -> pd.DataFrame:
    """Reading less base, paired by seed: reading, measure, value, low, high, n.

    The ends are those of a 95 % Student interval over seeds; a pair with a divergence is left out,
    and a reading without pairs has no row.
    """
    of = {name: rows.set_index("seed") for name, rows in results.groupby("reading", sort=False)}
    rows = []
    for name in [n for n in of if n != BASE]:
        for measure in MEASURES:
            pairs = (of[name][measure] - of[BASE][measure]).dropna()
            if len(pairs):
                estimate = metrics.student_interval(pairs.to_numpy())
                row = {"reading": name, "measure": measure, "n": len(pairs)}
                rows.append(row | estimate._asdict())
    return pd.DataFrame(rows, columns=["reading", "measure", "n", *metrics.Estimate._fields])


def apart(found: pd.DataFrame) -> pd.Series:
    """For each row of ``differences`` whether its interval leaves 0 out."""
    return (found["low"] > 0) | (found["high"] < 0)


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """One line a reading: runs that collapsed and how, and each measure's mean over seeds.

    Beside the mean stands the difference to the base with its interval; a star where 0 is outside.
    """
    found = differences(results)
    lines = {}
    for name, rows in results.groupby("reading", sort=False):
        kinds = rows["collapse"][rows["collapse"] != ""]
        how = ", ".join(f"{kind} {n}" for kind, n in kinds.value_counts().sort_index().items())
        line = {"collapsed": f"{len(kinds)} of {len(rows)}" + (f" ({how})" if how else "")}
        for measure in MEASURES:
            own = found[(found["reading"] == name) & (found["measure"] == measure)]
            mean = rows[measure].mean()
            line[measure] = "" if math.isnan(mean) else f"{mean:.3f}"
            for row, star in zip(own.itertuples(), apart(own), strict=True):
                mark = " *" if star else ""
                line[measure] += f" ({row.value:+.3f}, {row.low:+.3f} to {row.high:+.3f}){mark}"
        lines[name] = line
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("reading")


def verdicts(results: pd.DataFrame) -> list[str]:
    """One sentence a reading: how it ended beside the base, whichever way it fell."""
    found = differences(results)
    collapsed = (results["collapse"] != "").groupby(results["reading"], sort=False).sum()
    n = results["seed"].nunique()
    lines = []
    for name in [c for c in collapsed.index if c != BASE]:
        own = found[(found["reading"] == name)]
        seen = [_direction(row) for row in own[apart(own)].itertuples()]
        told = "; ".join(seen) if seen else "not told apart from the base by any measure"
        lines.append(
            f"{name}: collapsed in {collapsed[name]} of {n} seeds (base {collapsed[BASE]}); {told}."
        )
    return lines


def _direction(row) -> str:
    words = {
        "occupancy": ("fuller", "emptier"),
        "likeness": ("more alike", "more diverse"),
        "distance": ("farther from the validation shapes", "nearer to the validation shapes"),
        "coverage": ("covers more of them", "covers fewer of them"),
    }
    return f"{words[row.measure][row.value < 0]} ({row.value:+.3f})"


def cures(results: pd.DataFrame) -> str:
    """Which readings collapse more or less often than the base, in two or three sentences."""
    n = results["seed"].nunique()
    collapsed = (results["collapse"] != "").groupby(results["reading"], sort=False).sum()
    base, others = collapsed[BASE], collapsed.drop(BASE)
    worse = [f"{name} ({k} of {n})" for name, k in others.items() if k > base]
    better = [f"{name} ({k} of {n})" for name, k in others.items() if k < base]
    text = f"The base collapses in {base} of {n} seeds. "
    if base == 0:
        text += "So no reading can be seen to stop a collapse here, only to cause one. "
    else:
        text += f"Less often: {', '.join(better) or 'no reading'}. "
    return text + f"More often: {', '.join(worse) or 'no reading'}."


def power(results: pd.DataFrame) -> str:
    """What so few seeds can tell, from the spread they have: two sentences."""
    found = differences(results)
    half = ((found["high"] - found["low"]) / 2).groupby(found["measure"], sort=False).median()
    widths = ", ".join(f"{half[m]:.3f} in {m}" for m in MEASURES if m in half)
    return (
        f"With {results['seed'].nunique()} seeds the intervals reach, in the median over readings, "
        f"this far to either side: {widths}. Smaller differences cannot be seen here. Of "
        f"{len(found)} intervals {apart(found).sum()} leave 0 out; were no reading different, "
        f"about {0.05 * len(found):.0f} would by chance."
    )


def pictures(
    results: pd.DataFrame, log: pd.DataFrame, samples: dict[str, np.ndarray], path: Path, n: int = 3
) -> list:
    """Occupancy over steps and the first n samples of each seed, a panel or a line a reading.

    Saved beside ``path``, with the results as a table.
    """
    names = results["seed"].unique()
    wide = log.pivot(index=["seed", "step"], columns="reading", values="occupancy").reset_index()
    parts = {name: np.split(grids, len(names)) for name, grids in samples.items()}
    rows = {name: np.concatenate([p[:n] for p in of_seeds]) for name, of_seeds in parts.items()}
    titles = [f"seed {seed}" if k == 0 else "" for seed in names for k in range(n)]
    drawn = {
        "occupancy": figures.curves(wide, list(samples), by="seed", sharey=True),
        "samples": figures.gallery(rows, len(titles), titles=titles, cell=0.8),
    }
    for kind, picture in drawn.items():
        table = results if kind == "samples" else None
        figures.save(picture, path.with_name(f"{path.name}-{kind}"), table)
    return list(drawn.values())
