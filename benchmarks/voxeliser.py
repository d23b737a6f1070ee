"""Voxeliser: every voxel that a surface touches, beside `voxelized` of trimesh"""

import numpy as np
import trimesh

from benchmarks import harness
from lib import furniture, rng, voxel

N_CLIPPED = 100  # voxels that trimesh lacks and that are confirmed by clipping


def meshes() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A piece of furniture with few large faces, and a sphere with many small ones."""
    sphere = trimesh.creation.icosphere(subdivisions=4)
    chair = furniture.mesh("chair", rng.numpy_generator(0, "benchmark", "chair"))
    return {"chair": chair, "sphere": (sphere.vertices.view(np.ndarray), sphere.faces)}


def fit(vertices: np.ndarray, side: int) -> np.ndarray:
    """Into [0, D]^3, the longest side D, centred."""
    lower, upper = vertices.min(axis=0), vertices.max(axis=0)
    return (vertices - (lower + upper) / 2) / (upper - lower).max() * side + side / 2


def by_trimesh(vertices: np.ndarray, faces: np.ndarray, side: int) -> np.ndarray:
    """The same grid from trimesh, whose voxels are centred on integers; bool (D, D, D)."""
    mesh = trimesh.Trimesh(vertices - 0.5, faces, process=False)
    cells = np.round(mesh.voxelized(1.0).points).astype(int)
    grid = np.zeros((side,) * 3, dtype=bool)
    # What lies on the upper border may be rounded to a voxel outside.
    grid[tuple(cells[((cells >= 0) & (cells < side)).all(axis=1)].T)] = True
    return grid


def touches(triangle: np.ndarray, cell: np.ndarray) -> bool:
    """Whether a triangle (3, 3) meets the closed box [cell, cell + 1]: clipped by its six planes.

    Sutherland and Hodgman 1974; another way than the separating axes of the voxeliser.
    """
    polygon = triangle
    for axis in range(3):
        for sign, bound in ((1, cell[axis]), (-1, -cell[axis] - 1)):
            height = sign * polygon[:, axis] - bound + voxel.TOLERANCE
            following, after = np.roll(polygon, -1, axis=0), np.roll(height, -1)
            points = []
            for p, q, h, g in zip(polygon, following, height, after, strict=True):
                points += [p] if h >= 0 else []
                points += [p + (q - p) * h / (h - g)] if h * g < 0 else []
            if not points:
                return False
            polygon = np.array(points)
    return True


def unconfirmed(cells: np.ndarray, triangles: np.ndarray) -> int:
    """How many of the cells no triangle meets."""
    low, high = triangles.min(axis=1) - voxel.TOLERANCE, triangles.max(axis=1) + voxel.TOLERANCE
    count = 0
    for cell in cells:
        near = triangles[((low <= cell + 1) & (high >= cell)).all(axis=1)]
        count += not any(touches(triangle, cell) for triangle in near)
    return count


def case(name: str, side: int) -> harness.Case:
    """One mesh at one resolution; the difference counts voxels marked without contact.

    Voxels that only trimesh marks, and those that only ours marks where clipping finds no contact.
    """
    vertices, faces = meshes()[name]
    vertices = fit(vertices, side)

    def ours() -> np.ndarray:
        return voxel.surface_voxels(vertices, faces, side)

    def plain() -> np.ndarray:
        return by_trimesh(vertices, faces, side)

    grid, other = ours(), plain()
    missed = np.argwhere(grid & ~other)
    order = rng.numpy_generator(0, "benchmark", "missed").permutation(len(missed))[:N_CLIPPED]
    wrong = (other & ~grid).sum() + unconfirmed(missed[order], vertices[faces])
    return harness.timed_case(
        f"{name}, {len(faces)} faces, D = {side}",
        ours,
        plain,
        difference=lambda *_: float(wrong),
        tolerance=0.0,
        repeats=5,
        note=f"trimesh misses {len(missed)} of {grid.sum()} voxels",
        group=f"D, {name}",
        size=side,
    )


def cases(full: bool) -> list[harness.Case]:
    """Both meshes at the grids of the study; in full also finer."""
    sides = (32, 64, 128) if full else (32, 64)
    return [case(name, side) for name in ("chair", "sphere") for side in sides]
