"""Stored classifiers at work: how one is loaded, which one is asked, and how sure it is."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax

from lib import config, data, evaluate, files, metrics, paths, voxel
from lib.errors import StudyError
from lib.models.classifiers import Views
from lib.train import introspective, runs

VALIDATION = "validation.npz"  # logits of the validation part, in a classifier's record


def load_classifier(run: str | runs.Run, profile: config.Profile) -> Views:
    """A stored classifier, ready to be asked or attacked, at rest and in single precision.

    run: a run, or its id, of a model of ``config.CLASSIFIERS`` in this profile or of the judge that
    the profile asks. Returns a module that maps voxels (B, 1, D, D, D), floats in [0, 1] with D its
    ``side``, to logits (B, 10), differentiable by the voxels; the mean is subtracted inside.
    Parameters are without gradients. Raises StudyError for other runs and for missing weights.
    """
    run = runs.Run.parse(run) if isinstance(run, str) else run
    if run.model == "judge":
        _check_profile(run, profile.judge.profile)
        return Views(evaluate.load_judge(profile, run.seed).network).eval().requires_grad_(False)
    if run.model not in config.CLASSIFIERS:
        raise StudyError(f"{run.id} is no classifier; those are judge, {_named()}")
    _check_profile(run, profile.name)
    networks = runs.load_networks(run, profile, runs.weights_folder(run, profile))
    settings = getattr(profile, run.model)
    views = Views(networks["classifier"], settings.votes, settings.test_mirror)
    return views.eval().requires_grad_(False)


def _named() -> str:
    return ", ".join(config.CLASSIFIERS)


def _check_profile(run: runs.Run, name: str) -> None:
    if run.profile != name:
        raise StudyError(f"{run.id} is of another profile; give a run of {name}")


@torch.no_grad()
def logits(network: torch.nn.Module, grids: np.ndarray, batch: int = 64) -> np.ndarray:
    """Logits (N, 10), float64, of bool grids (N, 30, 30, 30); ``network`` has a ``side``."""
    where, out = next(network.parameters()).device, []
    for i in range(0, len(grids), batch):
        x = data.model_grid(grids[i : i + batch], network.side)[:, None]
        x = torch.from_numpy(np.ascontiguousarray(x)).to(where, torch.float32)
        out.append(network(x).double().cpu().numpy())
    return np.concatenate(out)


def present(profile: config.Profile) -> list[runs.Run]:
    """Classifiers whose weights are here: the judges that the profile asks, then its own.

    Raises StudyError where the folder of one is named as no run of the profile.
    """
    return [run for run in _published(profile) if _has_weights(run)]


def absent(profile: config.Profile) -> list[runs.Run]:
    """Published classifiers whose weights are not here, in the order of ``present``."""
    return [run for run in _published(profile) if not _has_weights(run)]


def _has_weights(run: runs.Run) -> bool:
    return bool(list(run.weights.glob("*.safetensors")))


def _published(profile: config.Profile) -> list[runs.Run]:
    judges = paths.results(profile.judge.profile) / "judge"
    own = paths.results(profile.name) / "classifiers"
    found = [
        _run_in(p.parent, name)
        for folder, name in ((judges, profile.judge.profile), (own, profile.name))
        for p in sorted(folder.glob("*/run.json"))
    ]
    order = list(runs.MODELS)
    return sorted(found, key=lambda r: (order.index(r.model), r.seed))


def _run_in(folder: Path, name: str) -> runs.Run:
    """The run of a published folder. StudyError where it is named as none of the profile."""
    try:
        run = runs.Run.parse(folder.name)
        _check_profile(run, name)
    except StudyError:
        raise StudyError(
            f"{paths.relative(folder)}: not the name of a run of profile {name}; rename it or move "
            "it elsewhere"
        ) from None
    return run


def chosen_epoch(log: Path, model: str) -> tuple[float, float]:
    """Validation error and loss of the epoch whose weights a run kept, from its log.

    Raises StudyError where the log is missing, empty or damaged.
    """
    try:
        with open(log, newline="") as file:
            rows = [
                (float(r["validation_error"]), float(r["validation_loss"]))
                for r in csv.DictReader(file)
            ]
        return min(rows, key=lambda r: r[::-1] if model == "judge" else r)
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        raise StudyError(
            f"{paths.relative(log)}: missing or damaged, it names no epoch's validation error and "
            "loss; pull it again, or train the run"
        ) from None


def best(profile: config.Profile) -> tuple[runs.Run, float, int]:
    """The classifier of the lowest validation error, that error, and how many were compared.

    Equal errors are decided by the loss. StudyError where none is stored.
    """
    found = present(profile)
    if not found:
        raise StudyError(
            f"no classifier of profile {profile.name} is in place; run "
            + config.maker(profile.name, "16_train_classifiers", seed=0)
        )
    scores = [chosen_epoch(r.samples / "log.csv", r.model) for r in found]
    first = min(range(len(found)), key=lambda k: scores[k])
    return found[first], scores[first][0], len(found)


def store_validation(run: runs.Run, profile: config.Profile) -> np.ndarray:
    """Ask a published classifier about the validation part and keep its logits in its record."""
    split = data.load_train(profile.data)
    found = logits(load_classifier(run, profile), split.voxels[split.validation])
    files.save_npz(run.samples / VALIDATION, logits=found.astype(np.float32))
    return found


def validation_logits(run: runs.Run, profile: config.Profile) -> np.ndarray:
    """Logits (N, 10) of the validation part: those stored, else computed.

    Raises StudyError where the stored ones are not of this part.
    """
    split, path = data.load_train(profile.data), run.samples / VALIDATION
    if not path.is_file():
        return logits(load_classifier(run, profile), split.voxels[split.validation])
    found = files.load_npz(path).get("logits")
    shape = (int(split.validation.sum()), len(config.CATEGORIES))
    if found is None or found.shape != shape or not np.isfinite(found).all():
        raise StudyError(
            f"{paths.relative(path)}: holds no array `logits` of shape {shape}, one row a "
            "validation shape; delete it, then the classifier is asked again"
        )
    return found.astype(np.float64)


@dataclass(frozen=True)
class Scale:
    """What a classifier's logits are read against, from shapes that it was not trained on.

    temperature: divides the logits. energies (N,): of the validation part, sorted.
    """

    temperature: float
    energies: np.ndarray


def scale(run: runs.Run, profile: config.Profile) -> Scale:
    """The scale of a published classifier. StudyError where the data are not prepared."""
    split = data.load_train(profile.data)
    found = validation_logits(run, profile)
    fitted = metrics.temperature(found, split.labels[split.validation])
    return Scale(fitted, np.sort(metrics.free_energy(found)))


def answers(found: np.ndarray, known: Scale) -> list[dict]:
    """What logits (N, 10) say of each shape, JSON-ready.

    ``probabilities`` are of logits over the temperature, ``entropy`` theirs in bits (0 is sure,
    3.32 knows nothing). ``energy percentile`` is the share of validation shapes with a lower
    energy: near 100, little real furniture looks as strange to the network.
    """
    rows = softmax(found / known.temperature, 1)
    below = np.searchsorted(known.energies, metrics.free_energy(found)) / len(known.energies)
    out = []
    for p, percentile in zip(rows, below, strict=True):
        order = p.argsort()[::-1]
        bits = -(p * np.log2(np.maximum(p, 1e-300))).sum()
        out.append(
            {
                "category": config.CATEGORIES[order[0]],
                "probability": round(float(p[order[0]]), 4),
                "entropy": round(float(bits) + 0.0, 4),
                "energy percentile": round(100 * float(percentile), 1),
                "probabilities": {config.CATEGORIES[k]: round(float(p[k]), 4) for k in order},
            }
        )
    return out


def pseudo_negatives(run: runs.Run, profile: config.Profile) -> tuple[dict, list[str]]:
    """What an introspective run synthesised of each category as it learned (3DWINN, Fig. 4).

    Returns category -> bool (columns, D, D, D) above the threshold, and the columns' heads: the
    noise of the first pool, then the first shape of chosen epochs. Both are empty for other models.
    """
    if run.model != "introspective":
        return {}, []
    name = runs.samples_file(profile.evaluation.threshold, "pseudo-negatives")
    grids = voxel.load_voxels(run.samples / name)
    grids = grids.reshape(len(config.CATEGORIES), -1, *grids.shape[1:])
    epochs = introspective.shown_epochs(profile.introspective.epochs)
    heads = ["noise", *(f"epoch {e + 1}" for e in epochs)]
    return dict(zip(config.CATEGORIES, grids, strict=True)), heads
