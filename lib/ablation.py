"""One reading of a paper against another, on a small budget: same data, same seed, same noise."""

import dataclasses
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd

from lib import config, data, device, figures, metrics, paths, voxel
from lib.train import desnet3d, engine, introspective, runs, winn3d

# Named here rather than looked up, so that the pipeline sees what a reading depends on.
MODELS = {
    "winn3d": winn3d.MODEL,
    "introspective": introspective.MODEL,
    "desnet3d": desnet3d.MODEL,
}


def compare(
    profile: config.Profile, readings: dict[str, dict], seed: int = 0, model: str = "winn3d"
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Train a model once a reading: the logs, one line an iteration, and the last shapes of each.

    model: ``winn3d``; ``introspective``, the supervised one, on a few shapes of all categories
    and with a line an epoch; or ``desnet3d``, with a line every few learning steps.
    readings: name -> changed keys of the model's section; all share the
    budget of the section ``ablation``. A reading that diverges ends there, with the reason in the
    column ``diverged``. Shapes are bool (n, D, D, D); in the last line of a reading ``nearest`` is
    the mean IoU of each with the training shape that it overlaps most. Complete readings are taken
    up as they are.
    """
    logs, shapes = [], {}
    for name, changes in readings.items():
        log, grids = _train(profile, model, changes, seed)
        logs.append(log.assign(reading=name))
        shapes[name] = grids
    return pd.concat(logs, ignore_index=True), shapes


def pictures(log: pd.DataFrame, shapes: dict[str, np.ndarray], path: Path) -> list:
    """The curves and the newest shapes of each reading as two figures, saved beside ``path``."""
    columns = ["gap", "sampler_steps", "occupancy", "likeness", "validation_error"]
    columns = [c for c in columns if c in log and log[c].notna().any()]
    drawn = {
        "curves": figures.curves(log, columns, by="reading"),
        "shapes": figures.gallery({name: grids[:8] for name, grids in shapes.items()}),
    }
    for kind, picture in drawn.items():
        figures.save(picture, path.with_name(f"{path.name}-{kind}"))
    return list(drawn.values())


def _train(
    profile: config.Profile, model: str, changes: dict, seed: int
) -> tuple[pd.DataFrame, np.ndarray]:
    budget, split = _budget(profile, model)
    changed = config.with_changes(profile, **{model: budget | changes})
    task = MODELS[model].task(changed, split, seed, device.pick(profile.device))
    folder = paths.CHECKPOINTS / f"ablation-{_key(changed, model, split, seed)}"
    reason = ""
    with engine.lock(folder):
        try:
            engine.fit(task, folder, name=", ".join(map(str, changes.items())) or "as run")
        except engine.Diverged as error:
            reason = str(error)
    log = _log(folder).assign(diverged=reason)
    log["gap"] = log["f_real"] - log["f_pool"]
    shapes = _newest(task, model, profile.ablation.new) > profile.evaluation.threshold
    real = data.model_grid(split.voxels[~split.validation], profile.data.side)
    iou = metrics.nearest_by_iou(voxel.pack(shapes), voxel.pack(real))[1]
    log.loc[log.index[-1], "nearest"] = iou.mean()
    return log, shapes


def _newest(task: engine.Task, model: str, n: int) -> np.ndarray:
    """The shapes that a task made last, voxels (shapes, D, D, D)."""
    if model == "desnet3d":
        return task.buffers["chains"][:, 0].numpy()
    pool = task.buffers["pool"]
    return winn3d.from_bytes(pool[-n:, 0] if model == "winn3d" else pool[:, -1]).numpy()


def _budget(profile: config.Profile, model: str) -> tuple[dict, data.Split]:
    """Keys of the model's section that all readings share, and the shapes they train on."""
    budget, split = dataclasses.asdict(profile.ablation), data.load_train(profile.data)
    others = ("category", "shapes", "epochs", "learning_steps")
    category, shapes, epochs, _ = (budget.pop(name) for name in others)
    if model == "winn3d":
        return budget | {"snapshots": 0}, split.category(category)
    if model == "desnet3d":
        alike = dict.fromkeys(("observed", "batch", "chains"), budget["new"])
        alike |= {"sample_steps": [1], "n_validation": 2}  # no sample is drawn
        return alike | {"steps": profile.ablation.learning_steps}, split.category(category)
    kept = split.validation.copy()
    for label in range(len(config.CATEGORIES)):
        kept[np.flatnonzero((split.labels == label) & ~split.validation)[:shapes]] = True
    return {"epochs": epochs, "cascades": 1, "max_steps": budget["max_steps"]}, split.where(kept)


def _log(folder: Path) -> pd.DataFrame:
    """The log of a reading; one empty line where it diverged in its first iteration."""
    text = (folder / "log.csv").read_text()
    log = pd.read_csv(io.StringIO(text)) if text.strip() else pd.DataFrame({"step": [1]})
    log = log.rename(columns={"f_observed": "f_real", "f_chains": "f_pool"})
    columns = ["f_real", "f_pool", "sampler_steps", "capped", "occupancy", "likeness"]
    return log.reindex(columns=log.columns.union(columns, sort=False))


def _key(changed: config.Profile, model: str, split: data.Split, seed: int) -> str:
    shapes = hashlib.sha256(split.ids.tobytes() + split.labels.tobytes()).hexdigest()
    parts = [model, config.section(changed, model), shapes, seed, changed.data.side]
    parts += [data.card(changed.data)["hash"], runs.code_key(model, changed.name)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
