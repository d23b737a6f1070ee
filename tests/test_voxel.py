"""Voxelisation against exact rational arithmetic; readers, files, layouts, surfaces."""

import io
import os
import struct
import zipfile
from fractions import Fraction

import numpy as np
import pytest
import trimesh
from scipy import ndimage
from scipy.spatial import ConvexHull

from lib import voxel
from lib.errors import StudyError

CUBE_VERTICES = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
CUBE_QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
CUBE_FACES = np.array([t for a, b, c, d in CUBE_QUADS for t in ((a, b, c), (a, c, d))])
TETRAHEDRON = "OFF\n4 4 6\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 2 1\n3 0 1 3\n3 0 3 2\n3 1 2 3\n"


# ---------------------------------------------------------------- exact reference


def clip(polygon, axis, bound, sign):
    """Sutherland-Hodgman in rationals: the part of a polygon with sign * (x - bound) >= 0."""
    kept = []
    for here, there in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        a, b = sign * (here[axis] - bound), sign * (there[axis] - bound)
        if a >= 0:
            kept.append(here)
        if a * b < 0:
            t = a / (a - b)
            kept.append(tuple(p + t * (q - p) for p, q in zip(here, there, strict=True)))
    return kept


def exact_surface(vertices, faces, side):
    """Voxels whose closed box meets a triangle: the clipped polygon has a corner left."""
    vertices = [tuple(Fraction(x) for x in vertex) for vertex in np.asarray(vertices).tolist()]
    grid = np.zeros((side,) * 3, dtype=bool)
    for face in np.asarray(faces).tolist():
        triangle = [vertices[corner] for corner in face]
        for x in range(side):
            slab = clip(clip(triangle, 0, x, 1), 0, x + 1, -1)
            for y in range(side if slab else 0):
                beam = clip(clip(slab, 1, y, 1), 1, y + 1, -1)
                for z in range(side if beam else 0):
                    grid[x, y, z] |= bool(clip(clip(beam, 2, z, 1), 2, z + 1, -1))
    return grid


def exact_fit(vertices, faces, side):
    """The fit in rationals; vertices as lists of Fractions."""
    points = [[Fraction(x) for x in vertex] for vertex in np.asarray(vertices).tolist()]
    used = [points[corner] for corner in np.unique(faces)]
    lower = [min(p[k] for p in used) for k in range(3)]
    upper = [max(p[k] for p in used) for k in range(3)]
    longest = max(b - a for a, b in zip(lower, upper, strict=True))
    return np.array(
        [
            [
                (p[k] - (lower[k] + upper[k]) / 2) * side / longest + Fraction(side, 2)
                for k in range(3)
            ]
            for p in points
        ],
        dtype=object,
    )


def soup(rng, count, high):
    """Triangles with integer corners in [0, high], so many lie on voxel borders."""
    corners = rng.integers(0, high + 1, (3 * count, 3)).astype(float)
    return corners, np.arange(3 * count).reshape(-1, 3)


@pytest.mark.parametrize("denominator", [1, 2, 4, 8])
def test_surface_is_exact_for_triangles_on_a_lattice(denominator):
    rng = np.random.default_rng(denominator)
    side = 5
    for _ in range(12):
        vertices, faces = soup(rng, 2, side * denominator)
        vertices /= denominator
        np.testing.assert_array_equal(
            voxel.surface_voxels(vertices, faces, side), exact_surface(vertices, faces, side)
        )


@pytest.mark.parametrize("side", [1, 2, 3, 7])
def test_fitted_surface_is_exact_where_the_scale_is_not_dyadic(side):
    rng = np.random.default_rng(side)
    for _ in range(8):
        vertices, faces = soup(rng, 2, 11)
        truth = exact_surface(exact_fit(vertices, faces, side), faces, side)
        np.testing.assert_array_equal(voxel.voxelize(vertices, faces, side), truth)


def test_surface_is_exact_for_real_coordinates():
    rng = np.random.default_rng(5)
    for _ in range(8):
        vertices = rng.uniform(-1, 7, (9, 3))
        faces = np.arange(9).reshape(3, 3)
        np.testing.assert_array_equal(
            voxel.surface_voxels(vertices, faces, 6), exact_surface(vertices, faces, 6)
        )


@pytest.mark.parametrize(
    "corners",
    [
        [(2, 2, 2)] * 3,  # a point on a corner of eight voxels
        [(1.5, 2, 2.5)] * 3,
        [(0, 0, 0), (4, 4, 4), (4, 4, 4)],  # a diagonal, which touches corners only
        [(0, 0, 0), (2, 2, 2), (4, 4, 4)],
        [(0, 1, 0.5), (4, 3, 2.5), (2, 2, 1.5)],
        [(1, 1, 0), (1, 1, 4), (1, 1, 2)],  # along a voxel edge
        [(0, 4, 0), (4, 0, 0), (2, 2, 4)],  # in a plane through voxel edges
        [(0.125, 0.125, 1), (3.875, 0.125, 1), (0.125, 3.875, 1)],  # in a voxel border
        [(-9, -9, 1.5), (30, -9, 1.5), (-9, 30, 1.5)],  # larger than the grid
        [(5, 5, 5), (6, 5, 5), (5, 6, 5)],  # outside
        [(3.8, 4.4, 1.5), (4.4, 3.8, 1.5), (4.4, 4.4, 1.5)],  # its box reaches in, it does not
        [(4, 0, 0), (4, 4, 0), (4, 0, 4)],  # on the grid's own border
    ],
)
def test_surface_is_exact_for_special_triangles(corners):
    vertices, faces = np.array(corners, float), np.array([[0, 1, 2]])
    np.testing.assert_array_equal(
        voxel.surface_voxels(vertices, faces, 4), exact_surface(vertices, faces, 4)
    )


def test_a_point_on_a_corner_touches_eight_voxels():
    grid = voxel.surface_voxels([[2, 2, 2]] * 3, [[0, 1, 2]], 4)
    assert np.argwhere(grid).tolist() == [[x, y, z] for x in (1, 2) for y in (1, 2) for z in (1, 2)]


def test_splitting_of_large_boxes_changes_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    vertices, faces = soup(rng, 6, 40)
    direct = 41**3
    split = voxel.surface_voxels(vertices, faces, 41)
    monkeypatch.setattr(voxel, "_DIRECT_BOX", direct)
    monkeypatch.setattr(voxel, "_PAIRS_AT_ONCE", direct)
    np.testing.assert_array_equal(split, voxel.surface_voxels(vertices, faces, 41))


def test_small_pieces_change_nothing(monkeypatch):
    mesh = trimesh.creation.icosphere(subdivisions=2)
    whole = voxel.voxelize(mesh.vertices, mesh.faces, 20)
    monkeypatch.setattr(voxel, "_PAIRS_AT_ONCE", 100)
    monkeypatch.setattr(voxel, "_FACES_AT_ONCE", 7)
    np.testing.assert_array_equal(whole, voxel.voxelize(mesh.vertices, mesh.faces, 20))


def test_one_large_triangle_is_found_from_its_plane():
    """Marked voxels straddle the plane; voxels that do, away from the edges, are marked."""
    corners = np.array([[0, 0, 0], [128, 40, 15], [10, 125, 128.0]])
    grid = voxel.surface_voxels(corners, [[0, 1, 2]], 128)
    normal = np.cross(corners[1], corners[2])
    at = np.indices(grid.shape).transpose(1, 2, 3, 0) + 0.5
    straddles = np.abs(at @ normal) <= 0.5 * np.abs(normal).sum()
    assert not (grid & ~straddles).any()
    weights = at @ np.linalg.pinv(corners[1:])  # barycentric coordinates of the foot
    inside = (weights > 0.02).all(axis=-1) & (weights.sum(axis=-1) < 0.98)
    assert grid[straddles & inside].all() and (straddles & inside).sum() > 10000


@pytest.mark.parametrize("step", [-1e-12, 0, 1e-12])
def test_rounding_does_not_decide_contact(step):
    flat = np.array([[0.5, 0.5, 2 + step], [0.6, 0.5, 2 + step], [0.5, 0.6, 2 + step]])
    slanted = np.array([[0.125, 3.875 + step, 1], [3.875, 0.125 + step, 1], [0.125, 0.125, 1]])
    assert voxel.surface_voxels(flat, [[0, 1, 2]], 4)[0, 0].tolist() == [False, True, True, False]
    assert voxel.surface_voxels(slanted, [[0, 1, 2]], 4)[2, 2, 0]


def test_a_gap_that_is_not_rounding_separates():
    flat = np.array([[0.5, 0.5, 2 + 1e-6], [0.6, 0.5, 2 + 1e-6], [0.5, 0.6, 2 + 1e-6]])
    slanted = np.array([[0.125, 3.875 - 1e-6, 1], [3.875, 0.125 - 1e-6, 1], [0.125, 0.125, 1]])
    assert voxel.surface_voxels(flat, [[0, 1, 2]], 4)[0, 0].tolist() == [False, False, True, False]
    assert not voxel.surface_voxels(slanted, [[0, 1, 2]], 4)[2, 2, 0]


def test_sphere_marks_the_voxels_a_fine_mesh_must():
    """A mesh sphere lies between two true spheres; so does what it touches."""
    mesh = trimesh.creation.icosphere(subdivisions=4)
    side = 16
    grid = voxel.voxelize(mesh.vertices, mesh.faces, side)
    low = np.abs(np.indices((side,) * 3) + 0.5 - side / 2) - 0.5
    near = np.sqrt((np.maximum(low, 0) ** 2).sum(axis=0))
    far = np.sqrt(((low + 1) ** 2).sum(axis=0))
    radius, sag = side / 2, 0.02
    assert grid[(near < radius - sag) & (far > radius)].all()
    assert not grid[(near > radius + 1e-6) | (far < radius - sag)].any()


# ---------------------------------------------------------------- voxelize


@pytest.mark.parametrize("side", [1, 2, 3, 24, 33])
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (3.7, 11.3), (1 / 3, -1e4)])
def test_cube_becomes_the_outer_shell(side, scale, shift):
    grid = voxel.voxelize(CUBE_VERTICES * scale + shift, CUBE_FACES, side)
    shell = np.ones((side,) * 3, dtype=bool)
    shell[1:-1, 1:-1, 1:-1] = False
    np.testing.assert_array_equal(grid, shell)
    assert voxel.voxelize(CUBE_VERTICES * scale + shift, CUBE_FACES, side, fill=True).all()


def test_plane_between_two_voxels_marks_both():
    sheet = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.0]])
    grid = voxel.voxelize(sheet, [[0, 1, 2], [0, 2, 3]], 8)
    assert grid[:, :, 3:5].all() and grid.sum() == 2 * 64


def test_axes_and_scale_are_those_of_the_mesh():
    grid = voxel.voxelize(CUBE_VERTICES * [8, 4.4, 1.4], CUBE_FACES, 8, fill=True)
    assert grid.any(axis=(1, 2)).sum() == 8
    assert np.flatnonzero(grid.any(axis=(0, 2))).tolist() == [1, 2, 3, 4, 5, 6]
    assert np.flatnonzero(grid.any(axis=(0, 1))).tolist() == [3, 4]


def test_fill_needs_a_closed_mesh():
    closed = voxel.voxelize(CUBE_VERTICES, CUBE_FACES, 8, fill=True)
    lidless = voxel.voxelize(CUBE_VERTICES, CUBE_FACES[2:], 8, fill=True)  # x = 0 is missing
    assert closed.all()
    assert lidless.sum() == 8**3 - 7 * 36


def test_fill_uses_common_sides_only():
    grid = np.ones((3, 3, 3), dtype=bool)
    grid[1, 1, 1] = grid[0, 0, 1] = False  # the hole meets the outside at an edge only
    filled = voxel.fill_interior(grid)
    assert filled[1, 1, 1] and not filled[0, 0, 1]


def test_faces_and_corners_may_come_in_any_order():
    mesh = trimesh.creation.torus(1.0, 0.3, major_sections=16, minor_sections=8)
    rng = np.random.default_rng(0)
    faces = rng.permuted(rng.permutation(mesh.faces), axis=1)
    np.testing.assert_array_equal(
        voxel.voxelize(mesh.vertices, faces, 17), voxel.voxelize(mesh.vertices, mesh.faces, 17)
    )


def test_translation_and_scale_of_the_mesh_change_nothing():
    rng = np.random.default_rng(1)
    vertices, faces = soup(rng, 10, 9)  # integer corners: many contacts are exact
    grid = voxel.voxelize(vertices, faces, 12)
    for scale, shift in [(0.1, 3.3), (7.7, -123.4), (1e-6, 1e-4), (1e9, 1e9)]:
        moved = vertices * scale + shift
        np.testing.assert_array_equal(voxel.voxelize(moved, faces, 12), grid)


def test_unused_vertices_do_not_count():
    stray = np.concatenate([CUBE_VERTICES, [[1e300, 0, 0]]])
    np.testing.assert_array_equal(
        voxel.voxelize(stray, CUBE_FACES, 6), voxel.voxelize(CUBE_VERTICES, CUBE_FACES, 6)
    )


@pytest.mark.parametrize(
    ("vertices", "faces", "resolution", "message"),
    [
        (CUBE_VERTICES[:, :2], CUBE_FACES, 4, "vertices have shape"),
        (CUBE_VERTICES[:0], CUBE_FACES, 4, "vertices have shape"),
        (CUBE_VERTICES, CUBE_FACES[:, :2], 4, "faces have shape"),
        (CUBE_VERTICES, CUBE_FACES[:0], 4, "faces have shape"),
        (CUBE_VERTICES, CUBE_FACES.astype(float), 4, "faces have type"),
        (CUBE_VERTICES, CUBE_FACES + 1, 4, "use 0 to 7"),
        (CUBE_VERTICES, CUBE_FACES - 1, 4, "use 0 to 7"),
        (CUBE_VERTICES * np.nan, CUBE_FACES, 4, "NaN or infinity"),
        (CUBE_VERTICES * 0, CUBE_FACES, 4, "extent 0.0"),
        ((2 * CUBE_VERTICES - 1) * 1.5e308, CUBE_FACES, 4, "extent inf"),
        ([["a", "b", "c"]], CUBE_FACES, 4, "not numeric"),
        (CUBE_VERTICES, CUBE_FACES, 0, "resolution 0"),
        (CUBE_VERTICES, CUBE_FACES, 2.0, "resolution 2.0"),
        (CUBE_VERTICES, CUBE_FACES, True, "resolution True"),
        (CUBE_VERTICES, CUBE_FACES, 10**6, "resolution 1000000"),
    ],
)
def test_voxelize_refuses(vertices, faces, resolution, message):
    with pytest.raises(StudyError, match=message) as caught:
        voxel.voxelize(vertices, faces, resolution)
    assert "\n" not in str(caught.value)


def test_modelnet_layout_leaves_three_voxels():
    grid = voxel.modelnet_layout(CUBE_VERTICES, CUBE_FACES)
    assert grid.shape == (30, 30, 30) and grid.dtype == bool
    assert grid[3:27, 3:27, 3:27].all() and grid.sum() == 24**3


# ---------------------------------------------------------------- OFF reader

CORNERS = "0 0 0\n1 0 0\n0 1 0\n0 0 1\n"
SIDES = "3 0 2 1\n3 0 1 3\n3 0 3 2\n3 1 2 3\n"


def write(tmp_path, content):
    path = tmp_path / "mesh.off"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    "content",
    [
        TETRAHEDRON,
        f"OFF4 4 0\n{CORNERS}{SIDES}",
        f"OFF 4 4 0\n{CORNERS}{SIDES}",
        f"OFF\n4 4\n{CORNERS}{SIDES}",
        f"# caf\u00e9\n\nOFF # header\n\n4 4 6 # counts\n\n{CORNERS}# faces\n{SIDES}\n\n#",
        TETRAHEDRON.replace("\n", "\r\n"),
        TETRAHEDRON.replace("\n", "\r"),
        TETRAHEDRON.rstrip("\n"),
        TETRAHEDRON.replace(" ", " \t ").replace("\n", "  \n  "),
        "\ufeff" + TETRAHEDRON,
        TETRAHEDRON.replace("1 0 0\n", "1e0 0.0 -0\n"),
        TETRAHEDRON.replace("3 0 2 1", "3 0 2 1 255 0 0"),
        TETRAHEDRON.replace("3 1 2 3", "3 1 2 3 0.1 0.2 0.3 1"),
        f"COFF\n4 4 0\n{CORNERS.replace(chr(10), ' 255 0 0 255' + chr(10))}{SIDES}",
        f"NOFF\n4 4 0\n{CORNERS.replace(chr(10), ' 0 0 1' + chr(10))}{SIDES}",
        TETRAHEDRON.replace("1 0 0\n", "1 0 0 9 9 9\n"),
    ],
)
def test_read_off_accepts(tmp_path, content):
    vertices, faces = voxel.read_off(write(tmp_path, content))
    assert vertices.dtype == np.float64 and faces.dtype == np.int64
    assert vertices.tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert faces.tolist() == [[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]


def test_read_off_cuts_polygons_into_fans_in_file_order(tmp_path):
    content = "OFF\n5 3 0\n0 0 0\n2 0 0\n3 1 0\n1 2 0\n0 1 1\n5 0 1 2 3 4\n3 0 1 4\n4 1 2 3 4 7 7\n"
    _, faces = voxel.read_off(write(tmp_path, content))
    assert faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 1, 4], [1, 2, 3], [1, 3, 4]]


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("first", range(8))
def test_read_off_keeps_the_notch_of_a_polygon(tmp_path, axes, first):
    """A U of area 7 in a square of 9, from any corner, in any plane, either way round."""
    flat = [(0, 0), (3, 0), (3, 3), (2, 3), (2, 1), (1, 1), (1, 3), (0, 3)]
    corners = np.insert(np.array(flat[first:] + flat[:first], float), 2, 5, axis=1)[:, axes]
    lines = "\n".join(" ".join(map(str, corner)) for corner in corners)
    content = f"OFF\n8 2 0\n{lines}\n8 0 1 2 3 4 5 6 7\n8 7 6 5 4 3 2 1 0\n"
    vertices, faces = voxel.read_off(write(tmp_path, content))
    a, b, c = vertices[faces].transpose(1, 0, 2)
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    assert len(faces) == 12 and areas[:6].sum() == areas[6:].sum() == 7
    middle = vertices[faces].mean(axis=1)[:, [axes.index(0), axes.index(1)]]
    inside = (middle[:, 0] > 1) & (middle[:, 0] < 2) & (middle[:, 1] > 1)
    assert not inside.any(), "a triangle lies in the notch"


def test_a_polygon_that_crosses_itself_becomes_triangles(tmp_path):
    content = "OFF\n5 1 0\n0 0 0\n2 2 0\n2 0 0\n0 2 0\n-1 1 0\n5 0 1 2 3 4\n"
    _, faces = voxel.read_off(write(tmp_path, content))
    assert faces.shape == (3, 3) and set(faces.ravel()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6, 4500000.7, 1e8])
@pytest.mark.parametrize("side", [7, 32, 128])
def test_a_cube_far_from_the_origin_keeps_its_walls(offset, side):
    corners = np.array(list(np.ndindex(2, 2, 2)), float)
    vertices = offset + np.float64(0.7) * corners
    faces = ConvexHull(corners).simplices
    assert voxel.voxelize(vertices, faces, side, fill=True).all()


def test_extents_are_those_of_the_occupied_voxels():
    grids = np.random.default_rng(0).random((30, 6, 6, 6)) < 0.01
    assert not grids.any((1, 2, 3)).all()
    expected = [np.ptp(np.argwhere(g), axis=0) + 1 if g.any() else (0, 0, 0) for g in grids]
    np.testing.assert_array_equal(voxel.extents(grids), expected)


def test_which_shapes_fill_their_grids():
    grids = np.zeros((4, 6, 6, 6), bool)
    grids[0, :, 2, 2] = True
    grids[1, 1:, 2, 2] = True
    grids[2, 3, 0, 0] = grids[2, 3, 2, 5] = True
    assert voxel.fills_grid(grids).tolist() == [True, False, True, False]


def test_off_centre_is_the_distance_of_the_boxes_middle():
    grids = np.zeros((2, 10, 10, 10), bool)
    grids[0, 3:7, 0:4, 9] = True  # middles 4.5, 1.5, 9 of a grid whose middle is 4.5
    grids[1, 2:8, 4:6, 4:6] = True
    assert voxel.off_centre(grids) == pytest.approx(np.array([[0, 0.3, 0.45], [0, 0, 0]]))


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("", 1, "empty"),
        (" \n\n", 1, "empty"),
        ("# only this\n", 1, "only comments"),
        ("PLY\n4 4 0\n", 1, "header 'PLY'"),
        ("\n4OFF\n4 4 0\n", 2, "header '4OFF'"),
        ("nOFF\n3\n4 4 0\n", 1, "header 'nOFF'"),
        ("OFFICE\n", 1, "header 'OFFICE'"),
        ("OFF BINARY\n\x00\x01", 2, "not a text file"),
        ("OFF BINARY\n", 1, "'BINARY' is not a line of counts"),
        (b"solid\x00\x01\x02", 1, "not a text file"),
        (TETRAHEDRON.encode("utf-16"), 1, "not a text file"),
        ("OFF\n", 1, "ends behind the header"),
        (f"OFF\n-4 4 0\n{CORNERS}{SIDES}", 2, "not a line of counts"),
        (f"OFF\n4.0 4 0\n{CORNERS}{SIDES}", 2, "not a line of counts"),
        (f"OFF\n4\n{CORNERS}{SIDES}", 2, "not a line of counts"),
        ("OFF\n0 0 0\n", 2, "no vertices"),
        (f"OFF\n4 0 0\n{CORNERS}", 2, "no faces"),
        ("OFF\n999999999999 999999999999 0\n0 0 0\n", 3, "truncated: 999999999999 vertices"),
        (f"OFF\n{'9' * 5000} 4 0\n", 2, "not a line of counts"),
        (f"OFF\n4 4 0\n{CORNERS}3 0 2 1\n", 7, "truncated: 4 vertices and 4 faces"),
        (f"OFF\n4 3 0\n{CORNERS}\n{SIDES}", 11, "more lines"),
        (TETRAHEDRON.replace("0 1 0", "0 nan 0"), 5, "'nan' is not finite"),
        (TETRAHEDRON.replace("0 1 0", "0 1 -inf"), 5, "'-inf' is not finite"),
        (TETRAHEDRON.replace("0 1 0", "0 1e999 0"), 5, "'1e999' is not finite"),
        (TETRAHEDRON.replace("0 1 0", "0 one 0"), 5, "'one' is not a number"),
        (TETRAHEDRON.replace("0 1 0", "0 1_0 0"), 5, "'1_0' is not a number"),
        (TETRAHEDRON.replace("0 1 0", "0 0x1 0"), 5, "'0x1' is not a number"),
        (TETRAHEDRON.replace("0 1 0", "0 1"), 5, "a vertex of 2 coordinates"),
        ("OFF\n2 1 0\n0 0\n1 1\n3 0 1 1\n", 3, "a vertex of 2 coordinates"),
        (TETRAHEDRON.replace("3 0 3 2", "3 0 4 2"), 9, "'4' is out of range"),
        (TETRAHEDRON.replace("3 0 3 2", "3 0 -1 2"), 9, "'-1' is out of range"),
        (TETRAHEDRON.replace("3 0 3 2", f"3 0 {'9' * 30} 2"), 9, "is out of range"),
        (TETRAHEDRON.replace("3 0 3 2", "3 0 1.0 2"), 9, "'1.0' is not an integer"),
        (TETRAHEDRON.replace("3 0 3 2", "3 0 0_1 2"), 9, "'0_1' is not an integer"),
        (TETRAHEDRON.replace("3 0 3 2", "3 0 3"), 9, "3' corners announced, 2 found"),
        (TETRAHEDRON.replace("3 0 3 2", f"{'9' * 30} 0 3"), 9, "corners announced, 2 found"),
        (TETRAHEDRON.replace("3 0 3 2", "2 0 3"), 9, "a face of 2 corners"),
        (TETRAHEDRON.replace("3 0 3 2", "-3 0 3 2"), 9, "a face of -3 corners"),
        (TETRAHEDRON.replace("3 0 3 2", "three 0 3 2"), 9, "'three' is not a number of corners"),
        ("OFF\n3 1 0\n" + "1 2 3\n" * 3 + "3 0 1 2\n", 6, "all corners coincide"),
        ("OFF\n4 1 0\n" + "1 2 3\n" * 3 + "9 9 9\n3 0 1 2\n", 7, "all corners coincide"),
        ("OFF\n3 1 0\n-1e308 0 0\n1e308 0 0\n0 1 0\n3 0 1 2\n", 6, "overflows"),
    ],
)
def test_read_off_refuses_with_the_line(tmp_path, content, line, message):
    path = write(tmp_path, content)
    with pytest.raises(StudyError) as caught:
        voxel.read_off(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:{line}: ") and message in text
    assert "\n" not in text and "; " in text


def test_read_off_refuses_what_is_not_a_file(tmp_path):
    with pytest.raises(StudyError, match="no such file"):
        voxel.read_off(tmp_path / "none.off")
    with pytest.raises(StudyError, match="is a folder"):
        voxel.read_off(tmp_path)
    with pytest.raises(StudyError, match="cannot be read"):
        voxel.read_off("a\0b")


def test_read_off_raises_nothing_but_study_errors_on_damaged_files(tmp_path):
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(TETRAHEDRON.encode())
        for at in rng.integers(0, len(damaged), 2):
            damaged[at] = rng.choice(list(b" \n09-.e#_3x\x00\xff"))
        try:
            voxel.read_off(write(tmp_path, bytes(damaged[: rng.integers(60, len(damaged) + 1)])))
            outcomes.add("read")
        except StudyError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# ---------------------------------------------------------------- voxel files


@pytest.fixture
def grids():
    return np.random.default_rng(0).random((3, 5, 5, 5)) < 0.3


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_unpack_undoes_pack(side):
    voxels = np.random.default_rng(side).random((4, side, side, side)) < 0.5
    packed = voxel.pack(voxels)
    assert packed.dtype == np.uint8 and packed.shape == (4, -(-(side**3) // 8))
    np.testing.assert_array_equal(voxel.unpack(packed, voxels.shape), voxels)


def test_first_voxel_is_the_highest_bit():
    voxels = np.zeros((1, 2, 2, 2), dtype=bool)
    voxels[0, 0, 0, 0] = voxels[0, 1, 1, 0] = True
    assert voxel.pack(voxels).tolist() == [[0b10000010]]


def test_saved_voxels_load_and_are_byte_stable(tmp_path, grids, monkeypatch):
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    voxel.save_voxels(first, grids)
    monkeypatch.setattr("time.time", lambda: 2e9)
    voxel.save_voxels(second, np.asfortranarray(grids))
    assert first.read_bytes() == second.read_bytes()
    loaded = voxel.load_voxels(first)
    assert loaded.dtype == bool and loaded.flags.writeable
    np.testing.assert_array_equal(loaded, grids)
    with zipfile.ZipFile(first) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(first, allow_pickle=False) as plain:
        assert plain["shape"].tolist() == [3, 5, 5, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_a_failed_write_leaves_the_old_file(tmp_path, grids, monkeypatch):
    path = tmp_path / "a.npz"
    voxel.save_voxels(path, grids)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StudyError, match="cannot be written"):
        voxel.save_voxels(path, ~grids)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", [bool, np.uint8, np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("saver", [np.savez, np.savez_compressed])
def test_load_accepts_plain_arrays(tmp_path, grids, kind, order, saver):
    path = tmp_path / "a.npz"
    saver(path, voxels=np.array(grids, dtype=kind, order=order))
    loaded = voxel.load_voxels(path)
    assert loaded.dtype == (np.float32 if np.dtype(kind).kind == "f" else bool)
    np.testing.assert_array_equal(loaded, grids)


HALF = np.full((2, 4, 4, 4), 0.5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"grid": HALF}, "no array `voxels`"),
        ({"voxels": HALF[0]}, "not \\(N, D, D, D\\)"),
        ({"voxels": HALF[:, :3]}, "not \\(N, D, D, D\\)"),
        ({"voxels": HALF[:0]}, "not \\(N, D, D, D\\)"),
        ({"voxels": HALF[:, :0, :0, :0]}, "not \\(N, D, D, D\\)"),
        ({"voxels": HALF * np.nan}, "from nan"),
        ({"voxels": HALF * np.inf}, "to inf"),
        ({"voxels": HALF + 0.6}, "from 1.1"),
        ({"voxels": HALF - 0.6}, "from -0.1 to"),
        ({"voxels": np.full((2, 4, 4, 4), 2, np.uint8)}, "voxels hold 2"),
        ({"voxels": np.ones((2, 4, 4, 4), np.int32)}, "type int32"),
        ({"voxels": np.ones((2, 4, 4, 4), complex)}, "'c' data"),
        ({"voxels": np.full((2, 4, 4, 4), None, object)}, "'O' data"),
        ({"voxels": np.full((2, 4, 4, 4), "a")}, "'U' data"),
        ({"voxels": np.zeros((2, 8), np.uint8)}, "not \\(N, D, D, D\\)"),
        ({"voxels": np.zeros((2, 8), np.uint8), "shape": [2, 5, 5, 5]}, "needs uint8 \\(2, 16\\)"),
        ({"voxels": np.zeros((2, 8), np.uint8), "shape": [3, 4, 4, 4]}, "needs uint8 \\(3, 8\\)"),
        ({"voxels": np.zeros((2, 8), np.int8), "shape": [2, 4, 4, 4]}, "int8 \\(2, 8\\)"),
        ({"voxels": np.zeros((2, 8), np.uint8), "shape": [2, 4, 4]}, "not four integers"),
        ({"voxels": np.zeros((2, 8), np.uint8), "shape": [2.0, 4, 4, 4]}, "not four integers"),
        ({"voxels": np.zeros((2, 8), np.uint8), "shape": [2, 4, 4, 0]}, "not \\(N, D, D, D\\)"),
        ({"voxels": np.zeros((2, 8), np.uint8), "shape": [2, -4, -4, -4]}, "not \\(N, D, D, D\\)"),
        ({"voxels": np.zeros((2, 8), np.uint8), "shape": [2] + [2**40] * 3}, "split the file"),
        ({"voxels": HALF, "shape": [1, 4, 4, 4]}, "is not that of voxels"),
    ],
)
def test_load_refuses_arrays(tmp_path, arrays, message):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(StudyError, match=message) as caught:
        voxel.load_voxels(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_load_refuses_files_that_are_no_archives(tmp_path, grids):
    path = tmp_path / "a.npz"
    voxel.save_voxels(path, grids)
    whole = path.read_bytes()
    for content, message in [
        (b"", "not an .npz"),
        (b"OFF\n", "not an .npz"),
        (b"\x93NUMPY" + whole, "not an .npz"),
        (whole[:-30], "damaged archive"),
        (b"PK\x03\x04", "damaged archive"),
    ]:
        path.write_bytes(content)
        with pytest.raises(StudyError, match=message):
            voxel.load_voxels(path)
    with pytest.raises(StudyError, match="no such file"):
        voxel.load_voxels(tmp_path / "none.npz")
    with pytest.raises(StudyError, match="is a folder"):
        voxel.load_voxels(tmp_path)


def test_load_compares_sizes_before_it_takes_memory(tmp_path):
    path = tmp_path / "a.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1, 1000, 1000, 1000)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("voxels.npy", header.getvalue() + b"\0" * 10)
    with pytest.raises(StudyError, match="announces 1000000000 numbers"):
        voxel.load_voxels(path)


def test_load_raises_nothing_but_study_errors_on_damaged_files(tmp_path, grids):
    path = tmp_path / "a.npz"
    voxel.save_voxels(path, grids)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            voxel.load_voxels(path)
        except StudyError as error:
            refused += "\n" not in str(error)
    assert refused > 100


@pytest.mark.parametrize("wrong", [HALF, HALF[0] > 0, HALF[:, 1:] > 0, HALF[:0] > 0])
def test_save_refuses(tmp_path, wrong):
    with pytest.raises(StudyError):
        voxel.save_voxels(tmp_path / "a.npz", wrong)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- layouts


def test_crop_undoes_pad(grids):
    padded = voxel.pad(grids, 2)
    assert padded.shape == (3, 9, 9, 9) and padded.sum() == grids.sum()
    np.testing.assert_array_equal(voxel.crop(padded, 2), grids)
    np.testing.assert_array_equal(voxel.crop(grids, 0), grids)
    with pytest.raises(StudyError, match="cannot crop"):
        voxel.crop(grids, 3)


def smooth(side, n=2):
    noise = np.random.default_rng(side).standard_normal((n, side, side, side))
    return ndimage.gaussian_filter(noise, (0, 2, 2, 2)) > 0


def test_judge_grid_of_padded_layouts():
    grid = voxel.pad(smooth(24), 3)
    np.testing.assert_array_equal(voxel.to_judge_grid(grid), grid)
    np.testing.assert_array_equal(voxel.to_judge_grid(voxel.pad(grid, 1)), grid)
    double = voxel.pad(grid, 1).repeat(2, 1).repeat(2, 2).repeat(2, 3)
    np.testing.assert_array_equal(voxel.to_judge_grid(double), grid)


@pytest.mark.parametrize("side", [30, 32, 64])
def test_judge_grid_of_tight_layouts(side):
    grid = smooth(side)
    mapped = voxel.to_judge_grid(grid.astype(np.float32) * 0.8, layout="tight")
    assert mapped.shape == (2, 30, 30, 30) and mapped.dtype == bool
    if side == 64:
        grid = ndimage.maximum_filter(grid, (1, 2, 2, 2), origin=(0, -1, -1, -1))[:, ::2, ::2, ::2]
    zoomed = ndimage.zoom(grid[1].astype(float), 24 / grid.shape[1], order=3, mode="nearest")
    np.testing.assert_array_equal(mapped[1], np.pad(zoomed > 0.5, 3))
    full = voxel.to_judge_grid(np.ones((1, side, side, side), bool), layout="tight")
    assert full.sum() == 24**3 and voxel.crop(full, 3).all()


@pytest.mark.parametrize(
    "shape, hint",
    [
        ((3, 1, 8, 8, 8), r"drop the channel axis, voxels.squeeze\(1\)"),
        ((3, 8, 8, 8, 1), r"drop the channel axis, voxels.squeeze\(4\)"),
        ((8, 8, 8), r"save one grid as voxels\[None\]"),
        ((3, 512), "reshape the grids, or save `shape` beside packed bits"),
        ((0, 8, 8, 8), "save at least one grid"),
        ((2, 8, 8, 7), "reshape the grids$"),
        ((), "reshape the grids$"),
    ],
)
def test_other_shapes_are_refused_with_a_hint(tmp_path, shape, hint):
    np.savez(tmp_path / "a.npz", voxels=np.zeros(shape, bool))
    with pytest.raises(StudyError, match=hint):
        voxel.load_voxels(tmp_path / "a.npz")


def test_a_header_that_is_no_python_is_a_damaged_archive(tmp_path):
    for header in (b"{'descr': __impo", b"  {\n'a'", b"{'descr': '|b1', 'shape': (((((("):
        member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("voxels.npy", member)
        with pytest.raises(StudyError, match="damaged archive") as error:
            voxel.load_voxels(tmp_path / "a.npz")
        assert "\n" not in str(error.value)


def test_judge_grid_thresholds_first():
    grid = voxel.pad(np.full((1, 28, 28, 28), 0.4), 1)
    assert voxel.to_judge_grid(grid, threshold=0.3).sum() == 28**3
    assert voxel.to_judge_grid(grid).sum() == 0
    assert voxel.to_judge_grid(np.full((1, 30, 30, 30), 0.5)).sum() == 0  # strictly above


def test_judge_grid_of_extra_sides():
    grid = smooth(24)
    mapped = voxel.to_judge_grid(grid, layout="tight", extra_sides=(24,))
    np.testing.assert_array_equal(mapped, voxel.pad(grid, 3))
    small = smooth(16)
    np.testing.assert_array_equal(voxel.to_judge_grid(small, judge_side=16), small)


@pytest.mark.parametrize(
    ("side", "options", "message"),
    [
        (31, {}, "use 30, 32, 64$"),
        (24, {"layout": "tight"}, "use 30, 32, 64$"),
        (24, {"extra_sides": (24,)}, "24 \\(tight\\)$"),
        (30, {"layout": "loose"}, "'padded' or 'tight'"),
        (30, {"judge_side": 16}, "give grids of 16"),
    ],
)
def test_judge_grid_refuses(side, options, message):
    with pytest.raises(StudyError, match=message):
        voxel.to_judge_grid(np.zeros((1, side, side, side), bool), **options)


def test_judge_grid_refuses_wrong_arrays():
    with pytest.raises(StudyError, match="not \\(N, D, D, D\\)"):
        voxel.to_judge_grid(np.zeros((30, 30, 30), bool))
    with pytest.raises(StudyError, match="NaN"):
        voxel.to_judge_grid(np.full((1, 30, 30, 30), np.nan))


def test_pairwise_iou():
    grids = np.float32([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert voxel.pairwise_iou(grids) == pytest.approx((0.5 + 0 + 0 + 0 + 0 + 1) / 6)


def test_intersection_over_union():
    a, b = np.zeros((2, 4, 4, 4), dtype=bool)
    assert voxel.intersection_over_union(a, b) == 1
    a[:2], b[1:] = True, True
    assert voxel.intersection_over_union(a, b) == voxel.intersection_over_union(b, a) == 16 / 64
    assert voxel.intersection_over_union(a, a) == 1
    with pytest.raises(StudyError, match="cannot compare"):
        voxel.intersection_over_union(a, b[1:])
    with pytest.raises(StudyError, match="cannot compare"):
        voxel.intersection_over_union(a, b * 0.5)


# ---------------------------------------------------------------- surfaces


def ball(side):
    return ((np.indices((side,) * 3) + 0.5 - side / 2) ** 2).sum(axis=0) < (side / 2) ** 2


def test_exposed_faces_of_one_voxel():
    grid = np.zeros((3, 3, 3), dtype=bool)
    grid[0, 1, 2] = True
    vertices, quads = voxel.exposed_faces(grid)
    assert vertices.shape == (8, 3) and vertices.dtype == np.int16
    assert quads.shape == (6, 4) and quads.dtype == np.int32
    assert vertices.min(axis=0).tolist() == [0, 1, 2] and vertices.max(axis=0).tolist() == [1, 2, 3]
    corners = vertices[quads].astype(float)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    outward = corners.mean(axis=1) - [0.5, 1.5, 2.5]
    np.testing.assert_array_equal(normals, 2 * outward)


def test_exposed_faces_counts_every_border_once(grids):
    vertices, quads = voxel.exposed_faces(grids[0])
    padded = np.pad(grids[0], 1).astype(int)
    assert len(quads) == sum(np.abs(np.diff(padded, axis=axis)).sum() for axis in range(3))
    assert len(np.unique(vertices, axis=0)) == len(vertices)
    assert set(quads.ravel().tolist()) == set(range(len(vertices)))
    empty_vertices, empty_quads = voxel.exposed_faces(np.zeros((4, 4, 4), bool))
    assert empty_vertices.shape == (0, 3) and empty_quads.shape == (0, 4)


@pytest.mark.parametrize("name", ["shape.obj", "shape.stl"])
@pytest.mark.parametrize("case", ["ball", "hollow", "noise"])
def test_written_surfaces_enclose_the_voxels(tmp_path, name, case, grids):
    grid = {"ball": ball(9), "noise": grids[0]}.get(case)
    if grid is None:
        grid = ball(9)
        grid[3:6, 3:6, 3:6] = False
    path = tmp_path / name
    writer = voxel.write_obj if name.endswith("obj") else voxel.write_stl
    writer(path, grid)
    mesh = trimesh.load(path, force="mesh")
    assert mesh.volume == pytest.approx(grid.sum(), rel=1e-6)
    if case != "noise":  # voxels that meet at an edge only share it four times
        assert mesh.is_watertight and mesh.is_winding_consistent
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_stl_normals_and_size(tmp_path):
    path = tmp_path / "a.stl"
    voxel.write_stl(path, np.ones((1, 1, 1), dtype=bool))
    assert path.stat().st_size == 84 + 50 * 12
    record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    triangles = np.frombuffer(path.read_bytes()[84:], record)
    outward = triangles["corners"].mean(axis=1) - 0.5
    assert (np.linalg.norm(triangles["normal"], axis=1) == 1).all()
    assert ((triangles["normal"] * outward).sum(axis=1) > 0).all()


def test_surfaces_of_empty_grids_are_refused(tmp_path):
    for writer in (voxel.write_obj, voxel.write_stl):
        with pytest.raises(StudyError, match="empty"):
            writer(tmp_path / "a", np.zeros((3, 3, 3), dtype=bool))
    with pytest.raises(StudyError, match="give one bool grid"):
        voxel.exposed_faces(np.zeros((1, 3, 3, 3), dtype=bool))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match="cannot be written"):
        voxel.write_obj(tmp_path / "file" / "a.obj", np.ones((1, 1, 1), dtype=bool))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------- real data


@pytest.mark.real
def test_real_grids_have_the_layout_and_survive_files_and_surfaces(modelnet10, tmp_path):
    with np.load(modelnet10, allow_pickle=False) as archive:
        grids = archive["X_test"][:20].astype(bool)
    assert grids.shape == (20, 30, 30, 30) and grids.any(axis=(1, 2, 3)).all()
    # No real object of these reaches into the margin, and its longest side is 24.
    assert voxel.crop(grids, 3).sum() == grids.sum()
    for grid in grids:
        assert np.ptp(np.argwhere(grid), axis=0).max() == 23
    voxel.save_voxels(tmp_path / "a.npz", grids)
    np.testing.assert_array_equal(voxel.load_voxels(tmp_path / "a.npz"), grids)
    np.testing.assert_array_equal(voxel.to_judge_grid(voxel.pad(grids, 1)), grids)
    # The surface of a real grid, voxelised again and filled, holds it and one layer at most.
    vertices, quads = voxel.exposed_faces(grids[0])
    faces = quads[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3)
    again = voxel.fill_interior(voxel.surface_voxels(vertices, faces, 30))
    cube = np.ones((3, 3, 3), dtype=bool)
    assert (again >= voxel.fill_interior(grids[0])).all()
    assert (again <= voxel.fill_interior(ndimage.binary_dilation(grids[0], cube))).all()
