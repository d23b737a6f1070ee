"""Views: what they show is where an independent projection says, and a name draws one view."""

import numpy as np
import pytest
import torch

from lib import furniture, render, rng
from lib.errors import StudyError

SIDE = 48


def shape(seed=0, side=12):
    """Random boxes with a hole: concave, with thin parts, nothing symmetric."""
    stream = np.random.default_rng(seed)
    grid = np.zeros((side,) * 3, bool)
    for _ in range(4):
        low = stream.integers(0, side - 3, 3)
        high = low + stream.integers(1, 5, 3)
        grid[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return grid


def cast(grid, seed=0, side=SIDE):
    camera = render.camera(grid, np.random.default_rng(seed), side)
    cameras = render.Cameras(*(part[None] for part in camera))
    return cameras, render.cast(torch.from_numpy(grid)[None], cameras, side)


def project(cameras, points):
    """Columns, rows and depths of points (N, 3), by the camera's axes and not by its rays."""
    right, up, back = render._frame(cameras)[0].double().T.numpy()
    rays = cameras.rays[0].double().numpy()
    offset = points - cameras.origin[0].double().numpy()
    depth = -offset @ back
    # Pixels a unit of slope, and where the optical axis meets the picture.
    scale = 1 / np.linalg.norm(rays[:, 0])
    centre = np.array([-rays[:, 2] @ right, rays[:, 2] @ up]) * scale
    column = centre[0] + scale * (offset @ right) / depth
    row = centre[1] - scale * (offset @ up) / depth
    return column, row, depth, scale


@pytest.mark.parametrize("seed", range(6))
def test_silhouette_is_that_of_the_projected_voxels(seed):
    grid = shape(seed)
    cameras, hits = cast(grid, seed)
    column, row, depth, scale = project(cameras, np.argwhere(grid) + 0.5)
    seen = hits.depth[0].isfinite().numpy()
    assert (0 <= column).all() and (column < SIDE).all() and (0 <= row).all() and (row < SIDE).all()
    # Half a voxel's edge is wider than the way from a point to its pixel's centre.
    assert scale * 0.5 / depth.max() > np.sqrt(0.5), "the picture is too small for this check"
    assert seen[row.astype(int), column.astype(int)].all()
    # And no pixel is covered that lies further from every centre than a voxel reaches.
    y, x = np.nonzero(seen)
    way = np.hypot(x[:, None] + 0.5 - column, y[:, None] + 0.5 - row)
    reach = scale * np.sqrt(0.75) / (depth - np.sqrt(0.75))
    assert (way <= reach * 1.1).any(1).all()


@pytest.mark.parametrize("seed", range(4))
def test_every_pixel_agrees_with_a_march_along_its_ray(seed):
    """Brute force: steps of 1/100 voxel along the ray of a pixel until the first full voxel."""
    grid = shape(seed)
    cameras, hits = cast(grid, seed, side=16)
    origin, rays = cameras.origin[0].double().numpy(), cameras.rays[0].double().numpy()
    row, column = np.divmod(np.arange(16 * 16), 16)
    direction = rays @ np.stack([column + 0.5, row + 0.5, np.ones(16 * 16)])
    steps = np.arange(10, 60, 1 / 100)
    found = np.full(16 * 16, np.inf)
    inside_edge = np.zeros(16 * 16, bool)
    for ray, way in enumerate(direction.T):
        points = origin + steps[:, None] * way
        cell = np.floor(points).astype(int)
        ok = ((cell >= 0) & (cell < 12)).all(1)
        full = np.zeros(len(steps), bool)
        full[ok] = grid[tuple(cell[ok].T)]
        if full.any():
            found[ray] = steps[full.argmax()]
            inside_edge[ray] = full.sum() < 3  # a ray that grazes an edge may go either way
    ours = hits.depth[0].flatten().numpy()
    judged = ~inside_edge
    same = np.isfinite(ours) == np.isfinite(found)
    assert same[judged].mean() > 0.995
    both = np.isfinite(ours) & np.isfinite(found) & judged
    assert both.sum() > 30
    assert np.abs(ours[both] - found[both]).max() < 0.02


def test_the_nearer_of_two_plates_hides_the_farther():
    grid = np.zeros((12, 12, 12), bool)
    grid[2, 1:11, 1:11] = grid[9, 4:8, 4:8] = True
    eye = np.array([40.0, 6.0, 6.0])
    rays = np.array([[0, 0, -1.0], [0.02, 0, -0.24], [0, -0.02, 0.24]])  # looks along -x
    cameras = render.Cameras(
        torch.tensor(eye, dtype=torch.float32)[None], torch.tensor(rays, dtype=torch.float32)[None]
    )
    hits = render.cast(torch.from_numpy(grid)[None], cameras, 24)
    assert hits.depth[0, 12, 12] == 30.0  # the small plate's face at x = 10
    assert hits.depth[0, 12, 8] == 37.0  # the large plate's at x = 3
    assert hits.depth[0, 0, 0] == torch.inf
    assert hits.normal[0, 12, 12, 0] > 0.9
    # Left in the picture is lower y: seen from +x with z up, y points to the right.
    grid[:, 6:] = False
    left = render.cast(torch.from_numpy(grid)[None], cameras, 24).depth[0].isfinite()
    assert left[:, :12].any() and not left[:, 13:].any()


def test_normals_have_unit_length_and_look_at_the_camera():
    grid = furniture.shapes("chair", 1, 0)[0]
    cameras, hits = cast(grid)
    seen = hits.depth[0].isfinite()
    normals = hits.normal[0][seen]
    assert torch.allclose(normals.norm(dim=1), torch.ones(len(normals)), atol=1e-5)
    assert (hits.normal[0][~seen] == 0).all()
    back = render._frame(cameras)[0, :, 2]
    assert (normals @ back > 0).float().mean() > 0.9


def test_a_view_follows_from_its_name_alone():
    grids = np.stack([shape(k) for k in range(3)])
    names = [("a", k) for k in range(3)]
    together = render.views(grids, names, 32)
    assert together.shape == (3, 3, 32, 32) and together.dtype == torch.float32
    assert 0 <= together.min() and together.max() <= 1
    for k in range(3):
        assert torch.equal(render.views(grids[k : k + 1], names[k : k + 1], 32)[0], together[k])
    again = render.views(grids[:1], [("b", 0)], 32)[0]
    assert (again - together[0]).abs().mean() > 0.02


def test_views_of_a_batch_are_cast_as_one_by_one():
    """On a GPU many views are cast at once: the same hits."""
    grids = torch.from_numpy(np.stack([shape(k) for k in range(3)]))
    single = [
        render.camera(g.numpy(), rng.numpy_generator("batch", k), 32) for k, g in enumerate(grids)
    ]
    cameras = render.Cameras(*(torch.stack(p) for p in zip(*single, strict=True)))
    found = render.cast(grids, cameras, 32)
    for k in range(3):
        alone = render.cast(grids[k : k + 1], render.Cameras(*(p[k : k + 1] for p in cameras)), 32)
        assert torch.equal(alone.depth[0], found.depth[k])
        assert torch.allclose(alone.normal[0], found.normal[k], atol=1e-6)


def test_the_object_fills_its_picture_and_stays_inside():
    for k in range(20):
        _, hits = cast(shape(k), k, 64)
        rows, columns = hits.depth[0].isfinite().nonzero(as_tuple=True)
        span = max(rows.max() - rows.min(), columns.max() - columns.min()) + 1
        assert 0.5 * 64 < span <= 64


def test_bad_input():
    with pytest.raises(StudyError, match="an empty grid cannot be drawn"):
        render.views(np.zeros((1, 8, 8, 8), bool), [("a",)], 16)
    with pytest.raises(StudyError, match="1 shapes and 2 names"):
        render.views(np.ones((1, 8, 8, 8), bool), [("a",), ("b",)], 16)
    assert render.views(np.zeros((0, 8, 8, 8), bool), [], 16).shape == (0, 3, 16, 16)
