"""Shapes from one picture: predictions, baselines, average precision, and the gap to photographs.

The measure is that of Girdhar et al. (2016): average precision over the voxels of a 20^3 grid,
one number a photograph, averaged over the photographs of a category.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from lib import config, data, figures, heldout, ikea, metrics, render, rng, voxel
from lib.metrics import Estimate
from lib.samplers import evaluating
from lib.train import runs

SIDE = ikea.SIDE
MODELS = ("encoder_decoder", "vaegan3d")
THUMBNAIL = 16
FILLED = 0.25  # a voxel of a rendered shape's 20^3 truth is occupied from this share on
BATCH = 16  # pictures that a network looks at together; only memory depends on it
ALIGNED, PLAIN = "average precision, aligned", "average precision"
STAND_IN = "renderings of held-out shapes, standing for photographs"
BLIND = ("mean shape", "nearest neighbour (pixels)")  # answers without a network
TOLD = "mean shape of the category, told"
ABSENT = ("bookcase",)  # categories that the training shapes lack: reported, not in the mean


@dataclass(frozen=True)
class Exam:
    """Pictures of objects whose shapes are known.

    pictures: uint8 (N, 3, S, S). model: (N,) rows of ``truths`` bool (M, 20, 20, 20) and of
    ``categories`` (M,).
    """

    name: str
    pictures: Tensor
    model: np.ndarray
    truths: np.ndarray
    categories: tuple[str, ...]

    @property
    def category(self) -> np.ndarray:
        """The category of each picture, (N,)."""
        return np.array(self.categories)[self.model]


def photographs(profile: config.Profile) -> Exam:
    """The IKEA photographs; of procedural shapes, renderings of held-out ones stand for them.

    Photographs are made square by repeating their edge, then resized. Raises StudyError when the
    archive is missing.
    """
    if profile.data.source == "procedural":
        return rendered(profile, "photograph", STAND_IN)
    found = ikea.read()
    side = profile.vaegan3d.image
    pictures = torch.stack([square(picture, side) for picture in found.pictures])
    return Exam("IKEA photographs", pictures, found.model, found.grids, found.categories)


def square(picture: np.ndarray, side: int) -> Tensor:
    """A photograph uint8 (H, W, 3) as uint8 (3, side, side), its edge repeated to a square."""
    x = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    missing = [max(x.shape[-2:]) - n for n in x.shape[-2:]]
    around = [missing[1] // 2, missing[1] - missing[1] // 2]
    around += [missing[0] // 2, missing[0] - missing[0] // 2]
    x = pad(x, around, mode="replicate")
    x = interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return x[0].round().clamp(0, 255).to(torch.uint8)


def rendered(
    profile: config.Profile, name: str = "held-out", title: str = "rendered held-out shapes"
) -> Exam:
    """Views of held-out shapes, one a shape, with cameras, lights, backgrounds named by ``name``.

    The categories are those of the photographs that the shapes have, or the profile's own.
    """
    categories = config.CATEGORIES
    if profile.data.source == "procedural":
        categories = profile.categories
    else:
        categories = tuple(c for c in ikea.CATEGORIES if c in categories)
    grids, ids, of = [], [], []
    for category in categories:
        split = heldout.reference(profile.data, category)
        order = rng.numpy_generator("single image", category).permutation(len(split.ids))
        rows = np.sort(order[: profile.single_image.photographs])
        grids.append(data.model_grid(split.voxels[rows], profile.data.side))
        ids += split.ids[rows].tolist()
        of += [category] * len(rows)
    grids = np.concatenate(grids)
    pictures = views(grids, [(name, k) for k in ids], profile.vaegan3d.image)
    truths = to_grid(grids) >= FILLED
    kept = truths.any((1, 2, 3))
    of = tuple(c for c, keep in zip(of, kept, strict=True) if keep)
    rows = np.arange(kept.sum())
    return Exam(title, pictures[kept], rows, truths[kept], of)


def redrawn(profile: config.Profile, exam: Exam) -> Exam:
    """The same objects in rendered views, one for each picture: the look of training."""
    grids = _to_model_grid(exam.truths, profile.data.side)[exam.model]
    names = [("redrawn", int(m), k) for k, m in enumerate(exam.model)]
    pictures = views(grids, names, profile.vaegan3d.image)
    return replace(exam, name="renderings of their models", pictures=pictures)


def views(grids: np.ndarray, names: list[tuple], side: int) -> Tensor:
    """Rendered pictures as uint8 (N, 3, side, side)."""
    parts = [
        (255 * render.views(grids[i : i + 64], names[i : i + 64], side)).round().to(torch.uint8)
        for i in range(0, len(grids), 64)
    ]
    return torch.cat(parts)


def to_grid(shapes: np.ndarray) -> np.ndarray:
    """Shapes or probabilities (N, D, D, D) as the mean over the voxels of a 20^3 grid.

    The padded layout, 32, loses its margin of 4; the 24 voxels that the longest side spans become
    20, as the photographs' grids are spanned by theirs. Voxels on a border count by their share.
    """
    side = shapes.shape[1]
    margin = (side - 24) // 2
    inner = (slice(None), *[slice(margin, side - margin)] * 3)
    weights = _area_weights(side - 2 * margin, SIDE)
    out = shapes[inner].astype(np.float32)
    for axis in (1, 2, 3):
        out = np.moveaxis(np.tensordot(out, weights, (axis, 1)), -1, axis)
    return np.clip(out, 0, 1)


def _to_model_grid(truths: np.ndarray, side: int) -> np.ndarray:
    """Grids bool (N, 20, 20, 20) on the model grid (N, D, D, D), its 24 voxels by their centres."""
    rows = ((np.arange(24) + 0.5) * SIDE / 24).astype(int)
    inner = truths[:, rows][:, :, rows][:, :, :, rows]
    return np.pad(inner, [(0, 0), *[((side - 24) // 2,) * 2] * 3])


def _area_weights(n: int, m: int) -> np.ndarray:
    """Mean over n cells in m larger ones, (m, n): overlap lengths, rows summing to 1."""
    edges_n, edges_m = np.arange(n + 1) / n, np.arange(m + 1) / m
    low = np.maximum(edges_m[:-1, None], edges_n[None, :-1])
    high = np.minimum(edges_m[1:, None], edges_n[None, 1:])
    return (np.maximum(high - low, 0) * m).astype(np.float32)


@torch.no_grad()
def encode(encoder: torch.nn.Module, pictures: Tensor) -> Tensor:
    """Mean codes (N, z_dim) of uint8 pictures, in evaluation mode and single precision."""
    where = next(encoder.parameters()).device
    with evaluating(encoder):
        parts = [encoder(part.to(where).float() / 255)[0] for part in pictures.split(BATCH)]
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(networks: dict[str, torch.nn.Module], pictures: Tensor) -> np.ndarray:
    """Occupancy probabilities (N, D, D, D) of the shapes in pictures, from their mean codes."""
    codes = encode(networks["encoder"], pictures)
    with evaluating(networks["generator"]):
        parts = [networks["generator"].voxels(z)[:, 0].cpu() for z in codes.split(BATCH)]
    return torch.cat(parts).numpy()


@dataclass(frozen=True)
class Shelf:
    """Training shapes with one rendered view each, for the nearest neighbours.

    grids: bool (N, D, D, D) on the model grid. pictures: uint8 (N, 3, S, S).
    """

    grids: np.ndarray
    pictures: Tensor


def shelf_of(profile: config.Profile, category: str = "all") -> Shelf:
    """At most ``neighbours`` training shapes, drawn by name, with the first of their views."""
    split = data.load_train(profile.data).category(category)
    split = split.where(~split.validation)
    order = rng.numpy_generator("library", category).permutation(len(split.ids))
    split = split.where(np.sort(order[: profile.single_image.neighbours]))
    grids = data.model_grid(split.voxels, profile.data.side)
    names = [("training", int(i), 0) for i in split.ids]
    return Shelf(grids, views(grids, names, profile.vaegan3d.image))


def thumbnails(pictures: Tensor) -> np.ndarray:
    """Grey pictures (N, 256) of 16 x 16, each of mean 0 and length 1."""
    grey = pictures.float().mean(1, keepdim=True)
    small = interpolate(grey, (THUMBNAIL, THUMBNAIL), mode="area").flatten(1)
    small = small - small.mean(1, keepdim=True)
    return torch.nn.functional.normalize(small, dim=1).double().numpy()


def mean_shape(profile: config.Profile, category: str = "all") -> np.ndarray:
    """The mean training shape (D, D, D): the best constant answer in squares."""
    split = data.load_train(profile.data).category(category)
    return data.model_grid(split.voxels[~split.validation], profile.data.side).mean(0)


def trained(profile: config.Profile) -> dict[str, dict[str, runs.Run]]:
    """Runs with weights in place by row and category of training: joint ones have only ``all``."""
    out = {}
    for name in MODELS:
        found = {
            c: run
            for c in ("all", *config.CATEGORIES)
            if (run := runs.Run(profile.name, name, c, 0)).weights.is_dir()
        }
        if "all" in found:
            out[runs.MODELS[name]] = {"all": found.pop("all")}
        if found:
            out[f"{runs.MODELS[name]}-separate"] = found
    return out


@dataclass(frozen=True)
class Known:
    """What neighbours are looked for among, the same for all exams: a line a training shape.

    grids: (N, 20, 20, 20) in [0, 1]. thumbnails: (N, 256), of one view each. codes: (N, z_dim) of
    these views by the joint encoder-decoder, or None where there is none.
    """

    grids: np.ndarray
    thumbnails: np.ndarray
    codes: np.ndarray | None


def known_shapes(profile: config.Profile) -> Known:
    """The training shapes of ``shelf_of``, rendered and encoded once."""
    shelf, codes = shelf_of(profile), None
    if run := trained(profile).get(runs.MODELS["encoder_decoder"], {}).get("all"):
        encoder = runs.load_networks(run, profile, run.weights)["encoder"]
        codes = _features(encoder, shelf.pictures)
    return Known(to_grid(shelf.grids), thumbnails(shelf.pictures), codes)


def _features(encoder: torch.nn.Module, pictures: Tensor) -> np.ndarray:
    return encode(encoder, pictures).double().cpu().numpy()


def predictions(profile: config.Profile, exam: Exam, known: Known) -> dict[str, np.ndarray]:
    """Predictions (N, 20, 20, 20) in [0, 1] of every row; NaN where a row has no answer.

    Baselines: the constant mean training shape; the training shape whose view has the nearest
    grey thumbnail; the mean training shape of the true category, which no other row but the
    separate ones is told; the training shape whose view has the nearest code of the joint
    encoder-decoder.
    """
    constant = to_grid(mean_shape(profile)[None])
    nearest, _ = metrics.nearest_by_feature(thumbnails(exam.pictures), known.thumbnails)
    told = np.full((len(exam.model), SIDE, SIDE, SIDE), np.nan, np.float32)
    for category in set(exam.categories) - set(ABSENT):
        told[exam.category == category] = to_grid(mean_shape(profile, category)[None])
    answers = (constant.repeat(len(exam.model), 0), known.grids[nearest])
    out = {**dict(zip(BLIND, answers, strict=True)), TOLD: told}
    for row, by_category in trained(profile).items():
        answer = np.full((len(exam.model), SIDE, SIDE, SIDE), np.nan, np.float32)
        for category, run in by_category.items():
            mine = np.ones(len(answer), bool) if category == "all" else exam.category == category
            networks = runs.load_networks(run, profile, run.weights)
            if mine.any():
                answer[mine] = to_grid(reconstruct(networks, exam.pictures[mine]))
            if run.model == "encoder_decoder" and category == "all":
                codes = _features(networks["encoder"], exam.pictures)
                nearest, _ = metrics.nearest_by_feature(codes, known.codes)
                out["nearest neighbour (codes)"] = known.grids[nearest]
        out[row] = answer
    return out


def scores(
    profile: config.Profile, exam: Exam, answers: dict[str, np.ndarray], progress=iter
) -> pd.DataFrame:
    """Average precision of every answer, aligned and as it is: row, category, model, two numbers.

    ``progress`` wraps the iteration over models (pass ``tqdm``).
    """
    reach = int(profile.single_image.shift * SIDE + 1e-9)
    lines = []
    for m in progress(range(len(exam.truths))):
        possible = metrics.alignments(exam.truths[m], reach)
        known = {}  # answers repeat: constants, shared neighbours
        for row, grids in answers.items():
            for picture in np.flatnonzero(exam.model == m):
                grid = grids[picture]
                if np.isnan(grid).any():
                    continue
                key = grid.tobytes()
                if key not in known:
                    plain = metrics.average_precision(exam.truths[m], grid)
                    known[key] = plain, metrics.best_alignment(possible, grid)[0]
                lines.append((row, exam.categories[m], m, picture, *known[key]))
    columns = ["row", "category", "model", "picture", PLAIN, ALIGNED]
    return pd.DataFrame(lines, columns=columns)


def averages(found: pd.DataFrame, metric: str, profile: config.Profile) -> dict[str, Estimate]:
    """Mean over photographs of each category, and of these over categories as ``all``.

    found: ``scores`` of one row. Intervals: 2.5 and 97.5 percentiles over draws of models with
    replacement within each category; a category with one model has none. ``all`` leaves out
    categories without training shapes.
    """
    draws, values, spread = {}, {}, {}
    for category, part in found.groupby("category"):
        by_model = part.groupby("model")[metric].agg(["sum", "count"]).to_numpy()
        stream = rng.numpy_generator("models", category)
        picks = stream.integers(len(by_model), size=(profile.single_image.n_draws, len(by_model)))
        total, count = by_model[picks].sum(1).T
        draws[category], values[category] = total / count, part[metric].mean()
        spread[category] = len(by_model) > 1
    within = [c for c in values if c not in ABSENT]
    out = {c: _estimate(values[c], draws[c], spread[c]) for c in values}
    if within:
        pooled = np.mean([draws[c] for c in within], 0)
        mean = float(np.mean([values[c] for c in within]))
        out["all"] = _estimate(mean, pooled, any(spread[c] for c in within))
    return out


def _estimate(value: float, draws: np.ndarray, spread: bool) -> Estimate:
    ends = map(float, np.percentile(draws, [2.5, 97.5])) if spread else (math.nan, math.nan)
    return Estimate(float(value), *ends)


def rows(profile: config.Profile, exams: dict[str, pd.DataFrame]) -> Iterable[dict]:
    """Rows of table ``ikea``: the scores of every exam; the first is the headline, aligned.

    exams: name of what was shown -> ``scores``. Metrics of the other exams carry their name.
    """
    for k, (name, found) in enumerate(exams.items()):
        for row, part in found.groupby("row", sort=False):
            for metric in (ALIGNED, PLAIN):
                for category, estimate in averages(part, metric, profile).items():
                    here = part if category == "all" else part[part["category"] == category]
                    if category == "all":
                        here = here[~here["category"].isin(ABSENT)]
                    yield dict(
                        row=row,
                        category=category,
                        metric=metric if k == 0 else f"{metric}, {name}",
                        estimate=estimate,
                        headline=int(k == 0 and metric == ALIGNED),
                        n_samples=len(here),
                        note=f"{name}; {here['model'].nunique()} models",
                    )


def run_ids(profile: config.Profile) -> dict[str, list[str]]:
    """The runs behind each row."""
    found = {row: [r.id for r in by.values()] for row, by in trained(profile).items()}
    joint = found.get(runs.MODELS["encoder_decoder"])
    return found | ({"nearest neighbour (codes)": joint} if joint else {})


def gap(exams: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean aligned average precision a row on each exam, and what each adds to the one before.

    Over the categories that all exams have.
    """
    common = set.intersection(*(set(found["category"]) for found in exams.values()))
    columns = {}
    for name, found in exams.items():
        part = found[found["category"].isin(common)]
        by_category = part.groupby(["row", "category"], sort=False)[ALIGNED].mean()
        columns[name] = by_category.groupby("row", sort=False).mean()
    out = pd.DataFrame(columns)
    for name, after in itertools.pairwise(columns):
        out[f"{after} - {name}"] = out[after] - out[name]
    return out


def reconstruction_table(
    profile: config.Profile, run: runs.Run, n: int
) -> tuple[pd.Series, np.ndarray, np.ndarray, Tensor]:
    """How well validation shapes come back from one picture, beside two answers without a network.

    Mean intersection over union of at most n validation shapes of the run's category: of the run,
    above the profile's threshold and cut so that it fills as much as the training shapes do, of
    the nearest neighbour by thumbnail, and of the mean shape, cut likewise. Also the true shapes,
    the run's first reading of them, bool (n, D, D, D) both, and the pictures.
    """
    split = data.load_train(profile.data).category(run.category)
    split = split.where(split.validation)
    split = split.where(np.unique(np.linspace(0, len(split.ids) - 1, n).astype(int)))
    truths = data.model_grid(split.voxels, profile.data.side)
    names = [("validation", int(i)) for i in split.ids]
    pictures = views(truths, names, getattr(profile, run.model).image)
    found = reconstruct(runs.load_networks(run, profile, run.weights), pictures)
    shelf = shelf_of(profile, run.category)
    mean = mean_shape(profile, run.category)
    nearest, _ = metrics.nearest_by_feature(thumbnails(pictures), thumbnails(shelf.pictures))
    title, as_training = runs.MODELS[run.model], filled(found, mean.mean())
    answers = {
        f"{title}, filled as training shapes": as_training,
        f"{title}, above {profile.evaluation.threshold:g}": found > profile.evaluation.threshold,
        BLIND[1]: shelf.grids[nearest],
        BLIND[0]: filled(mean, mean.mean())[None].repeat(len(truths), 0),
    }
    overlaps = {row: voxel.mean_iou(truths, shapes) for row, shapes in answers.items()}
    return pd.Series(overlaps, name="IoU"), truths, as_training, pictures


def filled(probabilities: np.ndarray, share: float) -> np.ndarray:
    """The cut of probabilities that fills a share of all voxels as nearly as it can, bool.

    Equal probabilities are cut together, and a generator without bias holds many at exactly .5:
    of the cuts below and above them the nearer one is taken.
    """
    level = np.quantile(probabilities, 1 - share, method="lower")
    cuts = probabilities > level, probabilities >= level
    return min(cuts, key=lambda cut: abs(cut.mean() - share))


def in_words(found: pd.DataFrame) -> str:
    """What the oracle adds, and where rows beat both answers that do not look, from table rows."""
    value = found.set_index(["metric", "row", "category"])["value"].astype(float)
    value = value.loc[[PLAIN, ALIGNED]].unstack().drop(columns=list(ABSENT), errors="ignore")
    blind = list(BLIND)
    added = (value.loc[ALIGNED, "all"] - value.loc[PLAIN, "all"]).round(3)
    best = value.loc[ALIGNED, "all"][blind].idxmax()
    out = [
        f"The oracle adds {added.min():.3f} to {added.max():.3f}. Of the answers without a network "
        f"the better is the {best} ({value.loc[(ALIGNED, best), 'all']:.3f}, aligned)."
    ]
    by_category = value.drop(columns="all")
    for row in value.loc[ALIGNED].index.difference([*blind, TOLD], sort=False):
        where = []
        for metric, how in ((ALIGNED, "aligned"), (PLAIN, "as it is")):
            level = by_category.loc[metric]
            above = level.columns[level.loc[row] > level.loc[blind].max()]
            names = f" ({', '.join(above)})" if len(above) else ""
            where.append(f"{len(above)} of {level.loc[row].count()} categories {how}{names}")
        out.append(f"{row} is above both in {' and in '.join(where)}.")
    return "\n".join(out)


def look(profile: config.Profile, exam: Exam, answers: dict[str, np.ndarray], n: int = 8):
    """The first picture of n models spread over the exam, the truths and every row's answers."""
    models = np.unique(np.linspace(0, len(exam.truths) - 1, n).astype(int))
    first = [int(np.flatnonzero(exam.model == m)[0]) for m in models]
    shapes = {"true shape": exam.truths[models]}
    for row, grids in answers.items():
        shapes[row] = np.nan_to_num(grids[first]) > profile.evaluation.threshold
    return figures.pictures_and_shapes(exam.pictures[first], shapes)
