"""Full cubes from upsampled shapes? The failure of the compression report at 64^3, made small.

Its authors had shapes of 32^3 only, doubled them for the network of 64^3, kept the published
hyper-parameters, and got cubes that fill the box. Two changes at once: here each is made alone, and
then both with the other choices of the report.
"""

import dataclasses
import hashlib
import json

import numpy as np
import pandas as pd
from tqdm import tqdm

from lib import config, data, device, gan_ablation, paths, voxel
from lib.train import engine, gan3d, gan64, gan_variant, runs

# Of the compression report at 64^3, "the hyperparameters provided by" 3D-GAN.
PUBLISHED = {"lr_generator": 0.0025, "lr_discriminator": 1e-5}
# Its choices at 32^3, should they be what it kept: the rates of its code, first weights of
# N(0, .01), latents of N(0, .33) and noisy labels.
RECIPE = {"lr_generator": 0.0025, "lr_discriminator": 1e-4, "init_std": 0.01, "latent": "normal"}
SWITCHES = {"latent_std": 0.33, "labels": "noisy"}
NATIVE, DOUBLED = "native", "doubled"
# Reading -> shapes, changes of gan64, and switches of gan_ablation.
PLAN = {
    gan_ablation.BASE: (NATIVE, {}, {}),
    "doubled": (DOUBLED, {}, {}),
    "published rates": (NATIVE, PUBLISHED, {}),
    "doubled, published rates": (DOUBLED, PUBLISHED, {}),
    "doubled, the report's recipe": (DOUBLED, RECIPE, SWITCHES),
}
N_LINES = 10  # log lines a run


def doubled(grids: np.ndarray) -> np.ndarray:
    """Grids bool (N, D, D, D) at half the side, every voxel then repeated to 2^3, D even."""
    coarse = voxel.max_pool(grids, 2)
    return coarse.repeat(2, axis=1).repeat(2, axis=2).repeat(2, axis=3)


def broken_blocks(grids: np.ndarray) -> float:
    """Share of the 2^3 blocks with any voxel that are not full; 0 of doubled shapes.

    grids: bool (N, D, D, D), D even. 0 where all grids are empty.
    """
    any_, all_ = voxel.max_pool(grids, 2), ~voxel.max_pool(~grids, 2)
    return float((any_ & ~all_).sum() / max(any_.sum(), 1))


def compare(
    profile: config.Profile, category: str
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, np.ndarray]]:
    """Train on native and doubled shapes, with our rates, the published ones, the report's recipe.

    Returns results, logs and samples as ``gan_ablation.compare`` does, with the column
    ``broken_blocks``; the base is native shapes and our rates. All runs share seed by seed their
    first weights (those of the recipe are scaled) and the order of shapes and latents; measures of
    doubled runs are taken against doubled validation shapes.
    """
    budget = profile.upsampling
    split = _shapes(profile, category)
    kinds = {NATIVE: split, DOUBLED: dataclasses.replace(split, voxels=doubled(split.voxels))}
    code = runs.syntax_hash_of((*gan64.MODEL.modules, *engine.SHARED_MODULES))
    results, logs, samples = [], [], {name: [] for name in PLAN}
    for name, seed in tqdm([(n, s) for s in budget.seeds for n in PLAN], unit="run"):
        kind, changes, switches = PLAN[name]
        gan = _section(profile, changes)
        parts = [dataclasses.asdict(gan), category, kind, seed, budget.n_samples, code]
        parts += [dataclasses.asdict(profile.data), profile.evaluation.threshold]
        parts += [switches, runs.syntax_hash_of(gan_variant.MODULES)] if switches else []
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
        log, grids, reason = gan_ablation.trained(
            paths.CHECKPOINTS / f"upsampling-{key}",
            lambda g=gan, w=switches, k=kind, s=seed: _task(profile, g, w, kinds[k], s),
            budget.n_samples,
            profile.evaluation.threshold,
            f"{name}, seed {seed}",
        )
        row = gan_ablation.row(kinds[kind].voxels[split.validation], grids, reason)
        row["broken_blocks"] = np.nan if reason else broken_blocks(grids)
        results.append({"reading": name, "seed": seed} | row)
        logs.append(log.assign(reading=name, seed=seed))
        samples[name].append(grids)
    joined = {name: np.concatenate(grids) for name, grids in samples.items()}
    return pd.DataFrame(results), pd.concat(logs, ignore_index=True), joined


def _shapes(profile: config.Profile, category: str) -> data.Split:
    """The shapes of gan64 at the side of the comparison."""
    split = gan64.shapes(profile.gan64, profile.data, category)
    factor = profile.gan64.side // profile.upsampling.side
    return dataclasses.replace(split, voxels=voxel.max_pool(split.voxels, factor))


def _section(profile: config.Profile, changes: dict) -> config.Gan64:
    keys = ("side", "generator_channels", "discriminator_channels", "steps", "batch", "n_samples")
    budget = {key: getattr(profile.upsampling, key) for key in keys}
    return dataclasses.replace(profile.gan64, **budget, **changes)


def _task(
    profile: config.Profile, gan: config.Gan64, switches: dict, split: data.Split, seed: int
) -> gan3d.Gan3dTask:
    where = device.pick(profile.device)
    if switches:
        variant = dataclasses.replace(profile.gan_ablation, pool=1, **switches)
        # At data.SIDE the constructor leaves grids without a margin.
        task = gan_variant.VariantTask(gan, variant, split, data.SIDE, seed, where)
    else:
        task = gan64.Gan64Task(gan, split, seed, where)
    task.log_every = max(1, gan.steps // N_LINES)
    return task


def real(profile: config.Profile, category: str) -> pd.DataFrame:
    """Occupancy and broken blocks of the training shapes, native and doubled."""
    split = _shapes(profile, category)
    native = split.voxels[~split.validation]
    kinds = {NATIVE: native, DOUBLED: doubled(native)}
    rows = {
        name: {"occupancy": grids.mean(), "broken_blocks": broken_blocks(grids)}
        for name, grids in kinds.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("training shapes")


def summary(results: pd.DataFrame, log: pd.DataFrame, shapes: pd.DataFrame) -> pd.DataFrame:
    """One line a reading, means over seeds: how training began and ended, and D's part in it.

    shapes: as ``real`` gives them. first: occupancy at the first log line; times: the last
    occupancy over that of the training shapes; accuracy: of the discriminator, mean over the log;
    updates: share of the steps in which it was updated, the gate being open.
    """
    lines = {}
    for name, rows in results.groupby("reading", sort=False):
        own = log[log["reading"] == name]
        last = own.groupby("seed").tail(1)
        collapsed = rows["collapse"] != ""
        lines[name] = {
            "collapsed": f"{collapsed.sum()} of {len(rows)}",
            "first": own.groupby("seed").head(1)["occupancy"].mean(),
            **rows[[*gan_ablation.MEASURES, "broken_blocks"]].mean().to_dict(),
            "times": rows["occupancy"].mean() / shapes.loc[PLAN[name][0], "occupancy"],
            "accuracy": own["accuracy"].mean(),
            "updates": (last["updates"] / last["step"]).mean(),
        }
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("reading")


def verdict(results: pd.DataFrame, log: pd.DataFrame, shapes: pd.DataFrame) -> str:
    """What ended in full cubes, and what goes with it, whichever way it fell."""
    table = summary(results, log, shapes)
    full = results[results["collapse"] == "full"].groupby("reading", sort=False).size()
    n = results["seed"].nunique()
    if len(full):
        found = ", ".join(f"{name} in {k} of {n} seeds" for name, k in full.items())
        text = f"More than half of the box is filled by {found}"
    else:
        text = "No run ends with more than half of the box filled"
    changes = {"doubling the shapes": "doubled", "the published rates": "published rates"}
    changes["both"] = "doubled, published rates"
    changes["doubling with the report's recipe"] = "doubled, the report's recipe"
    effects = "; ".join(_effect(results, what, name) for what, name in changes.items())
    ends = ", ".join(f"{name} {k:.1f}" for name, k in table["times"].items())
    far = ", ".join(f"{name} {d:.2f}" for name, d in table["distance"].items())
    updates = ", ".join(f"{name} {share:.0%}" for name, share in table["updates"].items())
    broken = table["broken_blocks"]
    moved = (table["distance"] - table["distance"][gan_ablation.BASE]).abs()
    more, less = "published rates", "doubled"
    if moved[less] > moved[more]:
        more, less = less, more
    return (
        f"{text}. At the end samples fill so many times what training shapes fill: {ends}. At the "
        f"first log line the filled share is {table['first'].mean():.2f} in the mean: a generator "
        "that has not learned fills about half of the box, and drawn in three dimensions that is "
        f"a cube. Change of the filled share, paired by seed: {effects}. Distance to the "
        f"validation shapes: {far}; the reading {more!r} moves it by {moved[more]:.2f}, {less!r} "
        f"by {moved[less]:.2f}. Of the blocks that samples touch, {broken['doubled']:.0%} are "
        f"broken after training on doubled shapes and {broken[gan_ablation.BASE]:.0%} on native "
        f"ones. Share of the steps in which the discriminator was updated: {updates}."
    )


def _effect(results: pd.DataFrame, what: str, other: str) -> str:
    of = results.set_index(["reading", "seed"])["occupancy"]
    change = (of[other] - of[gan_ablation.BASE]).dropna()
    return f"{what} {change.mean():+.3f} (up in {(change > 0).sum()} of {len(change)} seeds)"
