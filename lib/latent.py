"""What a latent space holds: its dimensions, ways between shapes, arithmetic, and what neurons see.

The experiments of 3D-GAN's paper on its generator and discriminator (Wu et al. 2016, Figures 5 to
9), each with a number and a baseline. Nothing here opens the test split. Shapes are read above the
thresholds of the tables, each reading in rows of its own.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib import config, data, metrics, rng, samplers, voxel
from lib.errors import StudyError
from lib.train import autoencoder, checkpoint, runs

STUDIED = ("gan3d", "vae3d", "autoencoder", "vaegan3d")
GENERATORS = ("gan3d", "vaegan3d")  # no encoder of shapes: that of 3D-VAE-GAN looks at pictures
ACTS = 0.01  # share of an object's voxels that a dimension must change to count
DIRECTIONS = 16  # drawn at random, beside which the dimensions are looked at
SQUEEZE = 0.75  # of the extent along x, in the arithmetic with a known answer
SALIENT = 0.1  # share of an object's voxels with the steepest gradient


@dataclass(frozen=True)
class Space:
    """The latent space of a run, its shapes read above ``threshold``.

    draw(seeds) -> codes (n, z_dim) from the distribution that samples; decode(codes) ->
    probabilities (n, D, D, D); encode(bool grids) -> codes, or None for a model without an encoder.
    centre and spread (z_dim,) are mean and deviation of each dimension of that distribution;
    ``reach`` says how many deviations a sweep goes to either side. ``note`` is what the label says
    beside model and category.
    """

    run: runs.Run
    draw: Callable[[list[int]], Tensor]
    decode: Callable[[Tensor], np.ndarray]
    encode: Callable[[np.ndarray], Tensor] | None
    centre: Tensor
    spread: Tensor
    reach: float
    threshold: float
    note: str = ""

    @property
    def label(self) -> str:
        """The row's name in tables and figures."""
        return f"{runs.MODELS[self.run.model]}, {self.run.category}{self.note}"

    @property
    def heading(self) -> str:
        """The label in lines, for galleries."""
        return self.label.replace(", ", "\n")


def spaces(profile: config.Profile) -> tuple[list[Space], list[str]]:
    """The spaces of the runs whose weights are published, and the ids of the runs without.

    One for each threshold of ``runs.thresholds``: some generators leave next to nothing above .5.
    Looked for is seed 0 of each model on one category and on all of them. Raises StudyError where
    there are none at all.
    """
    looked_for = [
        run
        for category in (*profile.categories, "all")
        for model in STUDIED
        if runs.run_group(run := runs.Run(profile.name, model, category, 0)) == model
    ]
    absent = [run.id for run in looked_for if not run.weights.is_dir()]
    if len(absent) == len(looked_for):
        raise StudyError(
            f"no latent space to look at: none of {', '.join(absent)} has weights; train one, as "
            f"with `python -m lib train vae3d --category all --profile {profile.name}`, and publish"
        )
    found = [load(run, profile) for run in looked_for if run.weights.is_dir()]
    return [reading for space in found for reading in _readings(space, profile)], absent


def _readings(space: Space, profile: config.Profile) -> list[Space]:
    """The space read above each threshold of its model, the headline's first and without a note."""
    others = runs.thresholds(profile, space.run.model)[1:]
    return [space, *(replace(space, threshold=t, note=f", above {t:g}") for t in others)]


def load(run: runs.Run, profile: config.Profile) -> Space:
    """The latent space of a published run, read above the profile's threshold.

    Raises StudyError when its weights are not there.
    """
    networks = runs.load_networks(run, profile, run.weights)
    drawn_from_noise = run.model in GENERATORS
    decoder = networks["generator" if drawn_from_noise else "decoder"]
    encoder = None if drawn_from_noise else networks["encoder"]
    gaussian = networks.get("gaussian")
    uniform = drawn_from_noise and getattr(profile, run.model).latent == "uniform"
    where = next(decoder.parameters()).device
    if gaussian is not None:
        centre, spread = gaussian.mean, gaussian.root.norm(dim=1)
    else:
        centre = torch.full((decoder.z_dim,), 0.5 if uniform else 0.0, device=where)
        spread = torch.full((decoder.z_dim,), math.sqrt(1 / 12) if uniform else 1.0, device=where)

    def draw(seeds: list[int]) -> Tensor:
        z = rng.latents(seeds, decoder.z_dim, "uniform" if uniform else "normal").to(where)
        return z if gaussian is None else gaussian(z)

    return Space(
        run,
        draw,
        decode=lambda codes: autoencoder.decode(decoder, codes),
        encode=None if encoder is None else lambda grids: autoencoder.encode(encoder, grids),
        centre=centre,
        spread=spread,
        reach=math.sqrt(3) if uniform else 2.0,  # the ends of U[0, 1]
        threshold=profile.evaluation.threshold,
    )


# ---------------------------------------------------------------------------------------------
# Dimensions (Fig. 5)


def along(space: Space, z: Tensor, direction: Tensor, values: int) -> Tensor:
    """Codes (values, z_dim) through z (z_dim,), from one end of a direction to the other.

    direction (z_dim,) has length 1 in units of the spread; a code's coordinate on it goes from
    -reach to reach, all else stays.
    """
    unit = (z - space.centre) / space.spread
    ends = torch.linspace(-space.reach, space.reach, values, device=z.device)
    moved = unit + (ends - unit @ direction)[:, None] * direction
    return space.centre + moved * space.spread


def sweep(space: Space, profile: config.Profile) -> pd.DataFrame:
    """What each dimension changes: columns kind, number, base and changed, a line a sweep.

    ``changed`` counts voxels that differ somewhere on the sweep, as a share of the voxels of the
    base shape. Kinds are dimension and, beside it, direction: one drawn at random, equally long.
    """
    z_dim, latent = len(space.centre), profile.latent
    axes = torch.eye(z_dim, device=space.centre.device)[: latent.dimensions]
    random = torch.randn(DIRECTIONS, z_dim, generator=rng.torch_generator("latent", "directions"))
    random = nn.functional.normalize(random, dim=1).to(axes.device)
    lines = []
    for base, z in enumerate(space.draw(list(range(latent.bases)))):
        size = max(1, int(_read(space, z[None]).sum()))
        for kind, directions in (("dimension", axes), ("direction", random)):
            ways = torch.cat([along(space, z, d, latent.values) for d in directions])
            shapes = _read(space, ways).reshape(len(directions), latent.values, -1)
            counts = (shapes.any(1) & ~shapes.all(1)).sum(1)
            found = zip(range(len(counts)), counts / size, strict=True)
            lines += [(kind, number, base, share) for number, share in found]
    return pd.DataFrame(lines, columns=["kind", "number", "base", "changed"])


def _read(space: Space, codes: Tensor) -> np.ndarray:
    """Shapes bool (n, D, D, D) of codes."""
    return space.decode(codes) > space.threshold


def sweep_table(sweeps: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """How many dimensions act, and how much one changes beside a random direction, by row.

    Intervals are over the base shapes.
    """
    lines = []
    for row, found in sweeps.items():
        share = found.groupby(["kind", "base"])["changed"].mean()
        acts = found.assign(acts=found["changed"] >= ACTS).groupby(["kind", "base"])["acts"].mean()
        for measure, values in (("dimensions that act", acts), ("change by a dimension", share)):
            both = (values[kind].to_numpy() for kind in ("dimension", "direction"))
            lines.append(against(row, measure, "random directions", *both))
    return pd.DataFrame(lines)


def sweep_ends(
    space: Space, found: pd.DataFrame, n: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
    """Both ends of the n dimensions that change most: shapes, marks of what differs, captions.

    Of the first base shape. Rows are the low and the high end; a mark is where the ends differ.
    """
    mean = found[found["kind"] == "dimension"].groupby("number")["changed"].mean()
    best = mean.sort_values(ascending=False, kind="stable").index[:n].tolist()
    z, axes = space.draw([0])[0], torch.eye(len(space.centre), device=space.centre.device)
    pairs = [_read(space, along(space, z, axes[k], 2)) for k in best]
    shapes = np.stack(pairs, axis=1)
    marks = np.repeat((shapes[0] ^ shapes[1])[None], 2, axis=0)
    rows = [f"{space.heading}\n{end}" for end in ("low", "high")]
    captions = [f"dimension {k}: {mean[k]:.0%}" for k in best]
    return (
        dict(zip(rows, shapes, strict=True)),
        dict(zip(rows, marks, strict=True)),
        captions,
    )


# ---------------------------------------------------------------------------------------------
# Ways between shapes (Fig. 6 and 7)


@dataclass(frozen=True)
class Known:
    """Shapes that stand for points of a space: codes (n, z_dim), labels (n,), grids or None."""

    codes: Tensor
    labels: np.ndarray
    grids: np.ndarray | None


def known_points(space: Space, profile: config.Profile) -> Known:
    """Held-out shapes and their codes; for a model without an encoder its own draws.

    Held out is the validation part of the training split. A draw's label is that of its nearest
    training shape by overlap.
    """
    split = data.load_train(profile.data).category(space.run.category)
    grids = data.model_grid(split.voxels, profile.data.side)
    if space.encode:
        held_out = grids[split.validation]
        return Known(space.encode(held_out), split.labels[split.validation], held_out)
    codes = space.draw(list(range(4 * profile.latent.pairs)))
    nearest, _ = metrics.nearest_by_iou(
        voxel.pack(_read(space, codes)), voxel.pack(grids[~split.validation])
    )
    return Known(codes, split.labels[~split.validation][nearest], None)


def draw_pairs(labels: np.ndarray, n: int, same: bool, *key) -> np.ndarray:
    """At most n different pairs of rows (m, 2), of one label each or of two, by a named stream."""
    i, j = np.triu_indices(len(labels), 1)
    fits = (labels[i] == labels[j]) == same
    pairs = np.stack([i[fits], j[fits]], axis=1)
    return rng.numpy_generator("latent", *key).permutation(pairs)[:n]


def ways(space: Space, a: Tensor, b: Tensor, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, steps, D, D, D) on the way from a to b (n, z_dim), straight in two spaces.

    The first go straight in codes; the second blend the decoded ends, voxel by voxel.
    """
    t = torch.linspace(0, 1, steps, device=a.device)[None, :, None]
    codes = (1 - t) * a[:, None] + t * b[:, None]
    decoded = space.decode(codes.flatten(0, 1))
    decoded = decoded.reshape(len(a), steps, *decoded.shape[1:])
    t = np.linspace(0, 1, steps, dtype=np.float32)[None, :, None, None, None]
    return decoded, (1 - t) * decoded[:, :1] + t * decoded[:, -1:]


def least_overlap(way: np.ndarray) -> float:
    """The smallest overlap of neighbours on a way, bool (steps, D, D, D): its largest jump."""
    return min(voxel.intersection_over_union(a, b) for a, b in itertools.pairwise(way))


def interpolation(space: Space, profile: config.Profile, same: bool) -> dict | None:
    """Ways between shapes of one category, or of two; None where there are no such pairs.

    Returns, one number a way: ``smoothness`` (``least_overlap``) of the way in codes and of the
    blend of voxels; ``resemblance``, the overlap with the nearest training shape, of the way's
    middle and, the mean of both, of its ends; and the ``ways`` of the first pair, bool
    (steps, D, D, D). A pair is two held-out shapes, or two draws where there is no encoder.
    """
    points = known_points(space, profile)
    pairs = draw_pairs(points.labels, profile.latent.pairs, same, "pairs", same)
    if not len(pairs):
        return None
    ends = (points.codes[pairs[:, k]] for k in (0, 1))
    codes, blend = ways(space, *ends, profile.latent.steps)
    codes, blend = (w > space.threshold for w in (codes, blend))
    real = voxel.pack(_training(space, profile))
    first, middle, last = (
        metrics.nearest_by_iou(voxel.pack(codes[:, k]), real)[1]
        for k in (0, profile.latent.steps // 2, -1)
    )
    return {
        "smoothness": tuple(np.array(list(map(least_overlap, w))) for w in (codes, blend)),
        "resemblance": (middle, (first + last) / 2),
        "ways": (codes[0], blend[0]),
    }


def interpolation_table(found: list[Space], profile: config.Profile) -> tuple[pd.DataFrame, dict]:
    """Smoothness and resemblance of all spaces, and the first ways by row for a gallery."""
    lines, pictures = [], {}
    for space, same in itertools.product(found, (True, False)):
        way = interpolation(space, profile, same)
        if way is None:
            continue
        kind = "one category" if same else "two categories"
        for measure, other in (("smoothness", "blend of voxels"), ("resemblance", "ends")):
            lines.append(against(space.label, f"{measure}, {kind}", other, *way[measure]))
        for name, shapes in zip(("codes", "voxels"), way["ways"], strict=True):
            pictures[f"{space.heading}\n{kind}\n{name}"] = shapes
    return pd.DataFrame(lines), pictures


def _training(space: Space, profile: config.Profile) -> np.ndarray:
    split = data.load_train(profile.data).category(space.run.category)
    return data.model_grid(split.voxels[~split.validation], profile.data.side)


# ---------------------------------------------------------------------------------------------
# Arithmetic (Fig. 8)


def squeeze(grids: np.ndarray) -> np.ndarray:
    """Grids bool (N, D, D, D), narrower along x about the middle, to three quarters.

    A voxel is filled where any of what it now covers was, so that thin parts stay.
    """
    side, out = grids.shape[1], np.zeros_like(grids)
    edges = (np.arange(side + 1) - side / 2) / SQUEEZE + side / 2
    for x, (low, high) in enumerate(itertools.pairwise(edges)):
        low, high = max(0, math.floor(low + 1e-9)), min(side, math.ceil(high - 1e-9))
        if low < high:
            out[:, x] = grids[:, low:high].any(1)
    return out


def known_arithmetic(space: Space, profile: config.Profile) -> tuple[dict, dict]:
    """a - b + c where the answer is known: a is b squeezed, so the answer is c squeezed.

    b and c are held-out shapes of one category. Returns overlaps with the answer, name -> (n,), and
    the shapes of the first triple, name -> bool (D, D, D). Names: codes; voxels, the same sum of
    voxels; nearest training shape, to that sum; c unchanged; and reconstruction, the answer encoded
    and decoded, which no sum of codes can be expected to beat. Needs an encoder.
    """
    points = known_points(space, profile)
    pairs = draw_pairs(points.labels, profile.latent.pairs, True, "triples")
    b, c = points.grids[pairs[:, 0]], points.grids[pairs[:, 1]]
    a, answer = squeeze(b), squeeze(c)
    voxels = a.astype(np.int8) - b + c > 0
    real = _training(space, profile)
    guesses = {
        "codes": _read(space, space.encode(a) - space.encode(b) + space.encode(c)),
        "voxels": voxels,
        "nearest training shape": real[
            metrics.nearest_by_iou(voxel.pack(voxels), voxel.pack(real))[0]
        ],
        "c unchanged": c,
        "reconstruction": _read(space, space.encode(answer)),
    }
    overlaps = {
        name: np.array(list(map(voxel.intersection_over_union, shapes, answer)))
        for name, shapes in guesses.items()
    }
    terms = {"a, b squeezed": a, "b": b, "c": c, "answer": answer} | guesses
    return overlaps, {name: shapes[0] for name, shapes in terms.items() if name != "c unchanged"}


def drawn_arithmetic(space: Space, profile: config.Profile) -> tuple[dict, dict]:
    """a - b + c of three draws: is it still a shape? For models with or without an encoder.

    Returns overlaps with the nearest training shape, name -> (n,), and the shapes of the first
    triple. Names: codes; voxels, the same sum of probabilities; c, draws as they are.
    """
    n, cut = profile.latent.pairs, space.threshold
    a, b, c = (space.draw(list(range(k * n, (k + 1) * n))) for k in range(3))
    p, q, r = (space.decode(z) for z in (a, b, c))
    sums = {"codes": _read(space, a - b + c), "voxels": p - q + r > cut}
    real = voxel.pack(_training(space, profile))
    overlaps = {
        name: metrics.nearest_by_iou(voxel.pack(shapes), real)[1]
        for name, shapes in (sums | {"c": r > cut}).items()
    }
    terms = {"a": p > cut, "b": q > cut, "c": r > cut} | sums
    return overlaps, {name: shapes[0] for name, shapes in terms.items()}


def arithmetic_table(found: list[Space], profile: config.Profile) -> tuple[pd.DataFrame, dict]:
    """Sums of codes of all spaces against their baselines, and the first triple of each space.

    The triples are {row: {name: shape}}, with a known answer where the model has an encoder.
    """
    lines, pictures = [], {}
    for space in found:
        overlaps, pictures[space.heading] = drawn_arithmetic(space, profile)
        codes = overlaps.pop("codes")
        for name, other in overlaps.items():
            lines.append(against(space.label, "resemblance of a - b + c", name, codes, other))
        if space.encode:
            overlaps, pictures[space.heading] = known_arithmetic(space, profile)
            codes = overlaps.pop("codes")
            for name, other in overlaps.items():
                lines.append(against(space.label, "overlap with the answer", name, codes, other))
    return pd.DataFrame(lines), pictures


# ---------------------------------------------------------------------------------------------
# Neurons (Fig. 9)


@dataclass(frozen=True)
class Neuron:
    """What a neuron of the discriminator answers to.

    shapes (top, D, D, D) bool, those that excite it most, strongest first; marks, bool like them,
    their voxels that matter most to it. The overlaps are means over pairs of shapes: of the shapes
    and of the marks, for the top ones and, as a baseline, for as many drawn at random.
    """

    number: int
    shapes: np.ndarray
    marks: np.ndarray
    shape_overlap: tuple[float, float]
    mark_overlap: tuple[float, float]


def discriminators(profile: config.Profile) -> list[runs.Run]:
    """The runs whose discriminator is published: those on all categories."""
    categories = (*profile.categories, "all")
    found = [runs.Run(profile.name, m, c, 0) for m in GENERATORS for c in categories]
    return [r for r in found if (r.weights / "discriminator.safetensors").is_file()]


def neurons(run: runs.Run, profile: config.Profile) -> list[Neuron]:
    """Neurons of the second-to-last convolution, drawn at random, with what excites them.

    A neuron is a channel; it answers with its largest response over positions.
    """
    file = run.weights / "discriminator.safetensors"
    network = checkpoint.load_weights(file, runs.model(run.model).build(profile)["discriminator"])
    split = data.load_train(profile.data).category(run.category)
    grids = data.model_grid(split.voxels[~split.validation], profile.data.side)
    answers = excitation(network, grids)
    latent, stream = profile.latent, rng.numpy_generator("latent", "neurons", run.seed)
    chosen = stream.permutation(answers.shape[1])[: latent.neurons]
    found = []
    for number in chosen.tolist():
        top = np.argsort(-answers[:, number], kind="stable")[: latent.top]
        other = stream.permutation(len(grids))[: latent.top]
        marks = [salient(network, grids[rows], number) for rows in (top, other)]
        overlaps = [
            tuple(voxel.pairwise_iou(x.reshape(len(x), -1).astype(np.float32)) for x in both)
            for both in ((grids[top], grids[other]), marks)
        ]
        found.append(Neuron(number, grids[top], marks[0], *overlaps))
    return found


def neuron_table(found: dict[str, list[Neuron]]) -> pd.DataFrame:
    """Are the shapes, and the marked parts, of a neuron more alike than those of random shapes?"""
    lines = [
        against(row, f"likeness of {what}", "random shapes", *zip(*overlaps, strict=True))
        for row, known in found.items()
        for what, overlaps in (
            ("shapes", [n.shape_overlap for n in known]),
            ("marked parts", [n.mark_overlap for n in known]),
        )
    ]
    return pd.DataFrame(lines)


def _answers(network: nn.Module, x: Tensor) -> Tensor:
    """The largest response of every channel of the last block, (B, C)."""
    return network.responses(x)[-1].flatten(2).amax(2)


@torch.no_grad()
def excitation(network: nn.Module, grids: np.ndarray, batch: int = 64) -> np.ndarray:
    """How strongly bool grids (N, D, D, D) excite each neuron, (N, C)."""
    chunks = torch.from_numpy(np.ascontiguousarray(grids[:, None])).split(batch)
    with samplers.evaluating(network):
        return torch.cat([_answers(network, x.float()) for x in chunks]).numpy()


def salient(network: nn.Module, grids: np.ndarray, number: int) -> np.ndarray:
    """The voxels of each object that matter most to a neuron, bool like grids (N, D, D, D).

    The tenth of its occupied voxels where the neuron's answer changes most with the voxel, by the
    size of the input gradient.
    """
    x = torch.from_numpy(np.ascontiguousarray(grids[:, None])).float()
    with samplers.evaluating(network), samplers.frozen(network):
        _, gradient = samplers.input_gradient(lambda v: _answers(network, v)[:, number], x)
    out = np.zeros_like(grids)
    for grid, size, mark in zip(grids, gradient[:, 0].abs().numpy(), out, strict=True):
        rows = np.flatnonzero(grid)
        best = np.argsort(-size.flat[rows], kind="stable")[: max(1, round(SALIENT * len(rows)))]
        mark.flat[rows[best]] = True
    return out


# ---------------------------------------------------------------------------------------------
# Numbers


def against(
    row: str, measure: str, baseline: str, ours: Iterable[float], theirs: Iterable[float]
) -> dict:
    """One line of a table: both means, their paired difference with its interval, a verdict.

    The verdict is ``higher`` or ``lower`` where the 95 % interval of the difference leaves out 0,
    else ``undecided``. Pairs may share a shape; the interval takes them as independent.
    """
    ours, theirs = np.asarray(list(ours), float), np.asarray(list(theirs), float)
    found = metrics.student_interval(ours - theirs)
    verdict = "higher" if found.low > 0 else "lower" if found.high < 0 else "undecided"
    return {
        "row": row,
        "measure": measure,
        "value": ours.mean(),
        "baseline": baseline,
        "its value": theirs.mean(),
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "n": len(ours),
        "verdict": verdict,
    }
