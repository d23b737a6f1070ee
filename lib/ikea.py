"""The IKEA photographs (Lim et al. 2013) with 20^3 grids (Girdhar et al. 2016): fetch and read.

937 photographs, each cropped to one object, of 43 models in six categories. Research data, without
a licence of its own: kept in ``data/raw``, never committed.
"""

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io

from lib import data, files, paths
from lib.errors import StudyError

ARCHIVE = "ikea.zip"
URL = "https://codeload.github.com/rohitgirdhar/GenerativePredictableVoxels/zip/b2a6df1"
# Over the contents: an archive of the same files may have other bytes.
CONTENT_SHA256 = "e2e086398bba1217cc41c9acba34e51ca3abf7f74c57cada779fc3349bd455cf"
FOLDERS = ("Images", "Lists", "Voxels")
CATEGORIES = ("bed", "bookcase", "chair", "desk", "sofa", "table")
SIDE = 20
HOW = "run `python -m lib fetch ikea`, or `python -m lib fetch ikea --from PATH` with a copy"


@dataclass(frozen=True)
class Photographs:
    """N photographs of M models.

    pictures: uint8 arrays (H, W, 3). model: (N,) rows of ``grids`` bool (M, 20, 20, 20), axes
    (x, y, z) with z up, and of ``categories`` (M,).
    """

    pictures: list[np.ndarray]
    model: np.ndarray
    grids: np.ndarray
    categories: tuple[str, ...]


def fetch(source: Path | None = None) -> Path:
    """Bring the photographs to ``data/raw/ikea.zip``: from a local copy, or from their address.

    source: an archive, or a folder that holds ``ikea.zip``. Raises StudyError when the copy is
    missing, the network is, or the contents are others.
    """
    found = data.received(source, "ikea", ARCHIVE, URL)
    _members(io.BytesIO(found), str(source or URL))
    files.write_bytes(paths.RAW / ARCHIVE, found)
    return paths.RAW / ARCHIVE


def _members(archive: Path | io.BytesIO, name: str) -> dict[str, bytes]:
    """The files of the data set by their path below IKEA/. StudyError when they are others."""
    try:
        with zipfile.ZipFile(archive) as opened:
            found = {}
            for member in sorted(opened.namelist()):
                path = member.split("IKEA/", 1)[-1]
                if path.split("/")[0] in FOLDERS and not path.endswith("/"):
                    found[path] = opened.read(member)
    except files.DAMAGED_ZIP as error:
        raise StudyError(f"{name}: not a readable archive ({error})") from None
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(path.encode() + b"\0" + hashlib.sha256(found[path]).digest())
    if digest.hexdigest() != CONTENT_SHA256:
        raise StudyError(
            f"{name}: sha256 of the contents is {digest.hexdigest()[:12]}..., expected "
            f"{CONTENT_SHA256[:12]}...; this is another file or a damaged one"
        )
    return found


def read(path: Path | None = None) -> Photographs:
    """The photographs and their models, in the order of the lists.

    Raises StudyError for a missing or damaged archive.
    """
    path = path or paths.RAW / ARCHIVE
    if not path.is_file():
        raise StudyError(f"{paths.relative(path)} is missing; {HOW}")
    members = _members(path, paths.relative(path))

    def lines(name: str) -> list[str]:
        return members[f"Lists/{name}.txt"].decode().split()

    numbers = np.array(lines("ModelID"), int)  # count from 1
    used, model = np.unique(numbers, return_inverse=True)
    classes = lines("all_obj_class")
    return Photographs(
        pictures=[_picture(members[f"Images/{name}"]) for name in lines("Images")],
        model=model,
        grids=np.stack([_grid(members[f"Voxels/{k}.mat"]) for k in used]),
        categories=tuple(classes[k - 1] for k in used),
    )


def _picture(data: bytes) -> np.ndarray:
    from skimage.io import imread  # slow to import, and needed here only

    return np.asarray(imread(io.BytesIO(data)))


def _grid(data: bytes) -> np.ndarray:
    """A grid with the first axis turned last: up is axis 0 in the files, z here."""
    return scipy.io.loadmat(io.BytesIO(data))["grid"].transpose(1, 2, 0) > 0
