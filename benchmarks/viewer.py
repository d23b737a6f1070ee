"""Viewer: JSON of the exposed faces of a shape, beside that of marching cubes"""

import base64
import json

import numpy as np
import plotly.graph_objects as go
from skimage.measure import marching_cubes

from benchmarks import harness
from lib import figures, furniture


def ours(grid: np.ndarray) -> str:
    """The figure of `lib.figures.viewer`."""
    return figures.figure_json(figures.viewer(grid[None]))


def plain(grid: np.ndarray) -> str:
    """The same figure around the mesh of scikit-image, as it comes."""
    vertices, faces, _, _ = marching_cubes(np.pad(grid, 1).astype(np.float32), 0.5)
    x, y, z = (vertices - 0.5).T.copy()  # values stand at the centres of voxels
    i, j, k = faces.T.copy()
    figure = figures.viewer(grid[None])
    mesh = go.Mesh3d(x=x, y=y, z=z, i=i, j=j, k=k, flatshading=True)
    return figures.figure_json(go.Figure(data=[mesh], layout=figure.layout))


def enclosed(text: str) -> float:
    """Volume inside the mesh of a figure, in voxels, read back from its JSON."""
    mesh = json.loads(text)["data"][0]
    arrays = [
        np.frombuffer(base64.b64decode(mesh[name]["bdata"]), dtype=mesh[name]["dtype"])
        for name in "xyzijk"
    ]
    corners = np.stack(arrays[:3], axis=1).astype(np.float64)[np.stack(arrays[3:], axis=1)]
    return float(abs(np.linalg.det(corners).sum() / 6))


def case(category: str, n: int) -> harness.Case:
    """Median size over n shapes; the check is that our surface encloses exactly the voxels."""
    grids = furniture.shapes(category, n, 0)
    sizes = np.array([[len(make(grid)) / 1024 for make in (ours, plain)] for grid in grids])
    voxels = [int(grid.sum()) for grid in grids]
    volume = [enclosed(ours(grid)) for grid in grids]
    smooth = [enclosed(plain(grid)) for grid in grids]
    share = np.sum(smooth) / np.sum(voxels)
    return harness.Case(
        f"{category}, 30^3",
        *np.median(sizes, axis=0),
        unit="KiB",
        difference=harness.relative(volume, voxels),
        tolerance=1e-12,
        note=f"n = {n}; marching cubes encloses {share:.1%} of the voxels",
    )


def cases(full: bool) -> list[harness.Case]:
    """Three categories."""
    return [case(category, 40 if full else 10) for category in ("chair", "sofa", "toilet")]
