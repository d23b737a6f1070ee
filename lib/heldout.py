"""The test split. Evaluation imports this module; training code must not (a test asserts it)."""

import numpy as np

from lib import config, data, files, paths
from lib.errors import StudyError


def load_test(settings: config.Data) -> data.Split:
    """The test split, empty grids included: a classifier must answer for every test shape."""
    return data.load_split(settings, "test")


def reference(settings: config.Data, category: str) -> data.Split:
    """Test shapes that generated ones are compared with: one category, empty grids left out."""
    split = load_test(settings).category(category)
    return split.where(split.voxels.any((1, 2, 3)))


def load_rotations() -> tuple[np.ndarray, np.ndarray]:
    """The test volumes of 3D ShapeNets: bool (908, 12, 30, 30, 30) and labels (908,).

    Axis 1 is the azimuth in steps of 30 degrees. The volumes were made by another voxeliser than
    the training grids, whose mirror they are; the mirror is undone here. Raises StudyError where
    the file is missing or its bytes are others.
    """
    file, expected, _ = data.SOURCES["rotations"]
    path = paths.RAW / file
    if not path.is_file():
        raise StudyError(
            f"{paths.relative(path)} is missing; run `python -m lib fetch rotations --from PATH`"
        )
    if files.sha256(path) != expected:
        raise StudyError(
            f"{paths.relative(path)} is damaged; delete it and fetch it again with "
            "`python -m lib fetch rotations --from PATH`"
        )
    arrays = files.load_npz(path)
    side = data.SIDE
    grids = np.unpackbits(arrays["x"], axis=1, count=side**3).view(bool)
    grids = grids.reshape(-1, side, side, side).transpose(0, 2, 1, 3)
    # Rows of a shape stand together, but in the order of their file names.
    first = 12 * np.arange(len(grids) // 12)[:, None]
    order = first + np.argsort(arrays["rot"].reshape(-1, 12), axis=1)
    return grids[order], arrays["y"].reshape(-1, 12)[:, 0].astype(np.int64)
