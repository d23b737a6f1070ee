"""The shapes of the study: fetched, checked, cleaned, split and stored bit-packed.

Prepared data are three files below ``data/prepared/<name>``: ``train.npz`` (training and
validation), ``test.npz`` (opened by ``lib.heldout`` alone) and ``card.json``. All grids are in the
ModelNet layout: 30^3, an object of 24 with a margin of 3.
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from lib import config, files, furniture, paths, rng, voxel
from lib.errors import StudyError

MODELNET10 = "modelnet10.npz"
MODELNET10_SHA256 = "85fb9d01bbaa1913cde8cd385557b31e05cb179585c572298151f54f1e1373fb"
MODELNET10_URL = (
    "https://raw.githubusercontent.com/guoguo12/modelnet-cnn/"
    "8d7108a5df5078a41605130cbf5d26adfb0c107c/data/modelnet10.npz"
)
ROTATIONS = "modelnet10_test_12rot.npz"
BEDS64 = "beds_64.npz"
# What `fetch` knows: name -> file, SHA-256, pinned public address (none for a repacked file).
SOURCES = {
    "modelnet10": (MODELNET10, MODELNET10_SHA256, MODELNET10_URL),
    "rotations": (
        ROTATIONS,
        "61ca226eeebf64ab282263a9e760dcbed48f30d3faf125821ff8c0f2b4fb2219",
        None,
    ),
    "beds64": (
        BEDS64,
        "2895cdccae0252d4edd947dba34a61f6e6e62cc4cd4944bbf6e7176cc5789208",
        None,
    ),
}
SIDE = 30
# Parameters that decide what is prepared; the card carries them.
CARD_KEYS = ("name", "source", "n_train", "n_test", "validation", "seed")
NEAR = (0.95, 0.9)  # intersections over union that count as near duplicates


@dataclass(frozen=True)
class Split:
    """One split: ``voxels`` bool (N, 30, 30, 30), ``labels`` (N,), ``ids`` (N,) row in the source.

    ``validation`` (N,) marks the part of the training split that selects, and is False elsewhere.
    ``duplicate`` (N,) is the highest intersection over union with a training shape: of test shapes
    with any, of training shapes with another one.
    """

    voxels: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    validation: np.ndarray
    duplicate: np.ndarray

    def where(self, keep: np.ndarray) -> "Split":
        """The rows that ``keep`` selects."""
        return Split(*(getattr(self, f)[keep] for f in self.__dataclass_fields__))

    def category(self, name: str) -> "Split":
        """The rows of one category; ``all`` keeps every row. Raises StudyError for others."""
        if name == "all":
            return self
        if name not in config.CATEGORIES:
            names = ", ".join(config.CATEGORIES)
            raise StudyError(f"no category {name!r}; choose one of {names}, all")
        return self.where(self.labels == config.CATEGORIES.index(name))


def fetch(source: Path | None = None, name: str = "modelnet10") -> Path:
    """Bring a file of ``SOURCES`` to ``data/raw``: from a local copy, or from its pinned address.

    Raises StudyError when the name is unknown, the copy is missing, the network is, or the bytes
    are others.
    """
    if name not in SOURCES:
        raise StudyError(f"no source {name!r}; choose one of {', '.join(SOURCES)}, ikea")
    file, expected, url = SOURCES[name]
    content = received(source, name, file, url)
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise StudyError(
            f"{source or url}: sha256 is {found[:12]}..., expected "
            f"{expected[:12]}...; this is another file or a damaged one"
        )
    files.write_bytes(paths.RAW / file, content)
    return paths.RAW / file


def received(source: Path | None, name: str, file: str, url: str | None) -> bytes:
    """The bytes of a data file: of a copy (or the folder that holds it), else from its address.

    Raises StudyError when there is no such copy, no address, or no answer.
    """
    how = f"run `python -m lib fetch {name} --from PATH` with a copy"
    if source is not None:
        source = Path(source) / file if Path(source).is_dir() else Path(source)
        if not source.is_file():
            raise StudyError(f"{source}: no such file; give a copy of {file} with --from PATH")
        return source.read_bytes()
    if url is None:
        raise StudyError(f"{file} has no public address, since it was repacked; {how}")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        raise StudyError(f"{url}: not reachable ({reason}); {how}") from None


def read_modelnet10(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Grids bool (N, 30, 30, 30) and labels (N,) of both splits of ``modelnet10.npz``.

    Raises StudyError for a missing file or other bytes than the pinned ones.
    """
    if not path.is_file():
        raise StudyError(
            f"{paths.relative(path)} is missing; run `python -m lib fetch`, or "
            "`python -m lib fetch --from PATH` with a copy"
        )
    if files.sha256(path) != MODELNET10_SHA256:
        raise StudyError(
            f"{paths.relative(path)} is damaged; delete it and run `python -m lib fetch`"
        )
    arrays = files.load_npz(path)
    return {
        split: (arrays[f"X_{split}"] > 0, arrays[f"y_{split}"].astype(np.int64))
        for split in ("train", "test")
    }


def read_off_folder(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Voxelise the layout of ModelNet10.zip, ``<category>/<train|test>/*.off``, on all cores.

    Files are taken in the order of their names, labels from the folder. Raises StudyError for a
    missing folder or category and for the first unreadable mesh.
    """
    jobs = {"train": [], "test": []}
    for label, category in enumerate(config.CATEGORIES):
        for split, found in jobs.items():
            meshes = sorted((folder / category / split).glob("*.off"))
            if not meshes:
                raise StudyError(
                    f"{paths.relative(folder)}/{category}/{split} holds no .off file; unpack "
                    "ModelNet10.zip there"
                )
            found += [(label, mesh) for mesh in meshes]
    out = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for split, found in jobs.items():
            work = pool.map(_voxelize_file, [mesh for _, mesh in found], chunksize=8)
            grids = list(tqdm(work, total=len(found), desc=f"voxelise {split}", unit="mesh"))
            out[split] = (np.stack(grids), np.array([label for label, _ in found]))
    return out


def _voxelize_file(path: Path) -> np.ndarray:
    return voxel.modelnet_layout(*voxel.read_off(path))


def make_furniture(data: config.Data) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Procedural shapes of all ten categories, ``n_train`` and ``n_test`` of each."""
    total = data.n_train + data.n_test
    grids = [furniture.shapes(c, total, data.seed) for c in config.CATEGORIES]
    labels = np.arange(len(grids))
    return {
        "train": (
            np.concatenate([g[: data.n_train] for g in grids]),
            labels.repeat(data.n_train),
        ),
        "test": (np.concatenate([g[data.n_train :] for g in grids]), labels.repeat(data.n_test)),
    }


def read_source(data: config.Data) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both splits as received, in the order of the source."""
    if data.source == "procedural":
        return make_furniture(data)
    if data.source == "off":
        return read_off_folder(paths.RAW / "ModelNet10")
    return read_modelnet10(paths.RAW / MODELNET10)


def overlaps(a: np.ndarray, b: np.ndarray, least: float) -> tuple[np.ndarray, ...]:
    """Pairs (i, j, iou) of flat bool grids (N, V), (M, V) that reach the IoU ``least``.

    Grids whose sizes alone forbid it are never compared: iou <= min(|a|, |b|) / max(|a|, |b|).
    """
    size_a, size_b = a.sum(1), b.sum(1)
    order = np.argsort(size_b, kind="stable")
    b32, sorted_b = b[order].astype(np.float32), size_b[order]
    found = []
    for rows in np.array_split(np.argsort(size_a, kind="stable"), max(1, len(a) // 128)):
        low = np.searchsorted(sorted_b, least * size_a[rows].min(), "left")
        high = np.searchsorted(sorted_b, size_a[rows].max() / least, "right")
        if low >= high:
            continue
        both = a[rows].astype(np.float32) @ b32[low:high].T
        either = size_a[rows][:, None] + sorted_b[None, low:high] - both
        iou = both / np.maximum(either, 1)
        i, j = np.nonzero(iou >= least)
        found.append((rows[i], order[low + j], iou[i, j]))
    if not found:
        return np.empty(0, int), np.empty(0, int), np.empty(0, np.float32)
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))


def highest_overlap(n: int, pairs: tuple[np.ndarray, ...]) -> np.ndarray:
    """The highest IoU of each of ``n`` rows among its pairs, 0 where there is none."""
    highest = np.zeros(n, np.float32)
    np.maximum.at(highest, pairs[0], pairs[2])
    return highest


def linked(n: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """A number (n,) for each of n rows, equal for rows that a chain of pairs (i, j) links."""
    graph = coo_array((np.ones(len(i)), (i, j)), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def split_validation(
    labels: np.ndarray, pairs: tuple[np.ndarray, ...], share: float, seed: int
) -> np.ndarray:
    """Mark ``share`` of every category for validation, keeping near duplicates on one side.

    Shapes linked by an IoU of .95 or more form a group, across categories too; whole groups are
    drawn in random order until each category has its share.
    """
    i, j, iou = pairs
    near = iou >= NEAR[0]
    group = linked(len(labels), i[near], j[near])
    n_groups = group.max() + 1
    counts = np.zeros((n_groups, len(config.CATEGORIES)), int)
    np.add.at(counts, (group, labels), 1)
    quota = np.round(share * counts.sum(0)).astype(int)
    chosen = np.zeros(n_groups, bool)
    for g in rng.numpy_generator(seed, "validation").permutation(n_groups):
        if (counts[g] <= quota).all():
            chosen[g] = True
            quota -= counts[g]
    return chosen[group]


def prepare(data: config.Data) -> dict:
    """Clean, split and store the shapes of a source; returns the data card (a JSON object).

    Empty grids leave the training split. They stay in the test split, where a classifier must
    answer for them, and are left out wherever generated shapes are compared with real ones.
    """
    source = read_source(data)
    raw = {
        name: (grids.reshape(len(grids), -1), labels) for name, (grids, labels) in source.items()
    }
    x, y = raw["train"]
    filled = x.any(1)
    x_train, y_train, ids = x[filled], y[filled], np.flatnonzero(filled)
    x_test, y_test = raw["test"]
    least = NEAR[-1]
    inner = overlaps(x_train, x_train, least)
    other = tuple(part[inner[0] != inner[1]] for part in inner)
    cross = overlaps(x_test, x_train, least)
    validation = split_validation(y_train, other, data.validation, data.seed)
    train = Split(x_train, y_train, ids, validation, highest_overlap(len(x_train), other))
    nothing = np.zeros(len(x_test), bool)
    test = Split(
        x_test, y_test, np.arange(len(x_test)), nothing, highest_overlap(len(x_test), cross)
    )
    folder = paths.PREPARED / data.name
    card = _card(data, raw, train, test)

    def fill(stage: Path) -> None:
        _save(stage / "train.npz", train)
        _save(stage / "test.npz", test)
        files.write_json(stage / "card.json", card)

    files.commit_folder(folder, fill)
    return card


def _save(path: Path, split: Split) -> None:
    arrays = {f: getattr(split, f) for f in split.__dataclass_fields__ if f != "voxels"}
    files.save_npz(path, voxels=np.packbits(split.voxels, axis=1), **arrays)


def _card(data: config.Data, raw: dict, train: Split, test: Split) -> dict:
    """Counts, hashes and oddities of the data, for the data card and for refusing other data."""
    exact, near = test.duplicate == 1, {t: int((test.duplicate >= t).sum()) for t in NEAR}
    counts = {
        name: {
            "train": int((train.labels == k).sum()),
            "validation": int((train.validation & (train.labels == k)).sum()),
            "test": int((test.labels == k).sum()),
            "test equal to a training shape": int((exact & (test.labels == k)).sum()),
            "occupancy": round(float(train.voxels[train.labels == k].mean()), 4),
        }
        for k, name in enumerate(config.CATEGORIES)
    }
    return {
        **{key: getattr(data, key) for key in CARD_KEYS},
        "counts": counts,
        "empty": {s: np.flatnonzero(~raw[s][0].any(1)).tolist() for s in ("train", "test")},
        "distinct training grids": len(np.unique(np.packbits(raw["train"][0], axis=1), axis=0)),
        "test equal to a training shape": int(exact.sum()),
        "test near a training shape": {str(t): n for t, n in near.items()},
        "hash": _hash(train, test),
    }


def _hash(*splits: Split) -> str:
    """SHA-256 over everything prepared, in a fixed order."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(np.packbits(split.voxels, axis=1).tobytes())
        for name in ("labels", "ids", "validation"):
            digest.update(np.ascontiguousarray(getattr(split, name)).astype(np.int64).tobytes())
    return digest.hexdigest()


def card(data: config.Data) -> dict:
    """The data card of prepared data. StudyError when it is missing or of another profile."""
    path = paths.PREPARED / data.name / "card.json"
    if not path.is_file():
        raise StudyError(
            f"{paths.relative(path.parent)} is missing; run "
            "`python -m lib prepare --profile PROFILE`"
        )
    found = files.read_json(path)
    for key in CARD_KEYS:
        if found.get(key) != getattr(data, key):
            raise StudyError(f"{paths.relative(path)}: made with another {key}; prepare it again")
    return found


def load_split(data: config.Data, split: str) -> Split:
    """A prepared split by name. Training code uses ``load_train`` only."""
    card(data)
    arrays = files.load_npz(paths.PREPARED / data.name / f"{split}.npz")
    n = len(arrays["labels"])
    bits = np.unpackbits(arrays["voxels"], axis=1, count=SIDE**3).view(bool)
    arrays["voxels"] = bits.reshape(n, SIDE, SIDE, SIDE)
    return Split(**arrays)


def load_train(data: config.Data) -> Split:
    """The training split, validation part included and marked."""
    return load_split(data, "train")


def model_grid(voxels: np.ndarray, side: int) -> np.ndarray:
    """Grids of the ModelNet layout (N, 30, 30, 30) on the grid of the generative models.

    32 pads by 1, as ports of 3D ShapeNets do, 24 crops the margin of 3; both lose nothing.
    """
    if side == 24:
        return voxel.crop(voxels, 3)
    return voxel.pad(voxels, (side - SIDE) // 2)


def layout_of(side: int) -> str:
    """How samples on a model grid lie in it, as ``voxel.to_judge_grid`` names it."""
    return "tight" if side == 24 else "padded"
