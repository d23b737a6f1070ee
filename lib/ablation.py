"""One reading of a paper against another, on a small budget: same data, same seed, same noise."""

import dataclasses
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd

from lib import config, data, device, figures, paths
from lib.train import engine, runs, winn3d


def compare(
    profile: config.Profile, readings: dict[str, dict], seed: int = 0
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Train 3DWINN once a reading: the logs, one line an iteration, and the last shapes of each.

    readings: name -> changed keys of the section ``winn3d``; all share the budget of the section
    ``ablation``. A reading that diverges ends there, with the reason in the column ``diverged``.
    Shapes are bool (n, D, D, D). Complete readings are taken up as they are.
    """
    logs, shapes = [], {}
    for name, changes in readings.items():
        log, grids = _train(profile, changes, seed)
        logs.append(log.assign(reading=name))
        shapes[name] = grids
    return pd.concat(logs, ignore_index=True), shapes


def pictures(log: pd.DataFrame, shapes: dict[str, np.ndarray], path: Path) -> list:
    """The curves and the newest shapes of each reading as two figures, saved beside ``path``."""
    columns = ["gap", "sampler_steps", "occupancy"]
    drawn = {
        "curves": figures.curves(log, columns, by="reading"),
        "shapes": figures.gallery({name: grids[:8] for name, grids in shapes.items()}),
    }
    for kind, picture in drawn.items():
        figures.save(picture, path.with_name(f"{path.name}-{kind}"))
    return list(drawn.values())


def _train(profile: config.Profile, changes: dict, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    budget = dataclasses.asdict(profile.ablation)
    category = budget.pop("category")
    budget["snapshots"] = 0
    changed = config.with_changes(profile, winn3d=budget | changes)
    split = data.load_train(profile.data).category(category)
    task = winn3d.MODEL.task(changed, split, seed, device.pick(profile.device))
    folder = paths.CHECKPOINTS / f"ablation-{_key(changed, category, seed)}"
    reason = ""
    with engine.lock(folder):
        try:
            engine.fit(task, folder, name=", ".join(map(str, changes.items())) or "as run")
        except engine.Diverged as error:
            reason = str(error)
    log = _log(folder).assign(diverged=reason)
    log["gap"] = log["f_real"] - log["f_pool"]
    newest = task.buffers["pool"][-budget["new"] :, 0]
    return log, winn3d.from_bytes(newest).numpy() > profile.evaluation.threshold


def _log(folder: Path) -> pd.DataFrame:
    """The log of a reading; one empty line where it diverged in its first iteration."""
    text = (folder / "log.csv").read_text()
    log = pd.read_csv(io.StringIO(text)) if text.strip() else pd.DataFrame({"step": [1]})
    columns = ["f_real", "f_pool", "sampler_steps", "capped", "occupancy", "likeness"]
    return log.reindex(columns=log.columns.union(columns, sort=False))


def _key(changed: config.Profile, category: str, seed: int) -> str:
    parts = [config.section(changed, "winn3d"), category, seed, changed.data.side]
    parts += [data.card(changed.data)["hash"], runs.syntax_hash("winn3d")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
