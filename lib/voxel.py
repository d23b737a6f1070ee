"""Meshes to voxels, voxel files, the judge's grid, and voxels back to surfaces.

Grids are indexed [x, y, z], z up. Voxel (i, j, k) of a grid of side D is the closed box
[i, i+1] x [j, j+1] x [k, k+1] of the cube [0, D]^3.
"""

import io
import itertools
import numbers
import re
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
from scipy import ndimage

from lib import files
from lib.errors import StudyError

# Contact closer than this many voxels counts as contact, so that rounding never decides.
TOLERANCE = 1e-9
MAX_RESOLUTION = 1024
MAX_VOXELS = 2**32
JUDGE_SIDE = 30
OBJECT_SIDE = 24
OBJECT_SPAN = 23.5
MARGIN = 3

_FACES_AT_ONCE = 1 << 16
_PAIRS_AT_ONCE = 1 << 15
_DIRECT_BOX = 64
_OCTANTS = np.array(list(itertools.product((0, 1), repeat=3)))

_HEADER = re.compile(rb"(?:ST)?C?N?OFF(?![A-Za-z])(.*)", re.DOTALL)
_COUNT = re.compile(rb"[0-9]{1,18}")
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


# ---------------------------------------------------------------- reading OFF files


def read_off(path):
    """Read a polygon mesh from an OFF file, as found in ModelNet.

    Accepts counts on or glued to the header line, comments, blank lines, CRLF, the headers COFF,
    NOFF and STOFF, and extra columns behind a vertex or a face, which are ignored. A polygon is
    cut into a fan of triangles around its first corner or, where that would leave it, into ears.

    Returns vertices (V, 3) float64 in file units and faces (F, 3) int64, in file order. Vertices
    that no face uses are kept; they do not count for the extent.
    Raises StudyError, `path:line: what; what to do`, for anything else: truncated or binary files,
    numbers that are not finite, corners out of range, faces of fewer than 3 corners, empty meshes
    and meshes of zero extent.
    Source: Princeton Shape Benchmark, description of the Object File Format.
    """
    numbers_, rows = _content(_read_text(path))
    n_vertices, n_faces, start = _counts(path, numbers_, rows)
    _check_counts(path, numbers_, rows, start, n_vertices, n_faces)
    middle, end = start + n_vertices, start + n_vertices + n_faces
    vertices = _parse_vertices(path, numbers_[start:middle], rows[start:middle])
    faces = _parse_faces(path, numbers_[middle:end], rows[middle:end], vertices)
    used = vertices[faces.ravel()]
    with np.errstate(over="ignore"):
        extent = np.max(used.max(axis=0) - used.min(axis=0))
    if not 0 < extent < np.inf:
        what = "all corners coincide" if extent == 0 else "the extent overflows"
        raise _fault(path, numbers_[middle], what, "give a mesh with a positive finite extent")
    return vertices, faces


def _fault(path, line, what, todo):
    return StudyError(f"{path}:{line}: {what}; {todo}")


def _show(token):
    return ascii(token[:24].decode("latin-1"))


def _read_bytes(path):
    path = Path(path)
    try:
        if path.is_dir():
            raise StudyError(f"{path}: is a folder; give a file")
        if path.exists() and not path.is_file():
            raise StudyError(f"{path}: is not a regular file; give a file")
        return path.read_bytes()
    except FileNotFoundError:
        raise StudyError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StudyError(f"{path}: cannot be read ({reason}); check the path") from None


def _read_text(path):
    data = _read_bytes(path).removeprefix(_BYTE_ORDER_MARK)
    if not data.strip():
        raise _fault(path, 1, "the file is empty", "give an OFF mesh")
    data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    control = _CONTROL.search(data)
    if control:
        line = data.count(b"\n", 0, control.start()) + 1
        raise _fault(path, line, "not a text file", "save the mesh as ASCII OFF")
    return data


def _content(data):
    """Line numbers and tokens of the lines that hold more than comments and spaces."""
    lines = data.split(b"\n")
    if b"#" in data:
        lines = [line.partition(b"#")[0] for line in lines]
    rows = [line.split() for line in lines]
    numbers_ = [number for number, row in enumerate(rows, 1) if row]
    return numbers_, [row for row in rows if row]


def _counts(path, numbers_, rows):
    """Numbers of vertices and faces, and the index of the first row behind the header."""
    if not rows:
        raise _fault(path, 1, "only comments", "give an OFF mesh")
    header = _HEADER.fullmatch(b" ".join(rows[0]))
    if not header:
        raise _fault(
            path,
            numbers_[0],
            f"header {_show(rows[0][0])} is not OFF, COFF, NOFF or STOFF",
            "give an ASCII OFF mesh",
        )
    tokens, start, line = header[1].split(), 1, numbers_[0]
    if not tokens:
        if len(rows) < 2:
            raise _fault(path, line, "the file ends behind the header", "get the whole file")
        tokens, start, line = rows[1], 2, numbers_[1]
    if not 2 <= len(tokens) <= 3 or not all(_COUNT.fullmatch(token) for token in tokens):
        raise _fault(
            path,
            line,
            f"{_show(b' '.join(tokens))} is not a line of counts",
            "write the numbers of vertices, faces and edges",
        )
    n_vertices, n_faces = int(tokens[0]), int(tokens[1])
    if n_vertices == 0 or n_faces == 0:
        what = "no vertices" if n_vertices == 0 else "no faces"
        raise _fault(path, line, what, "give a mesh with a surface")
    return n_vertices, n_faces, start


def _check_counts(path, numbers_, rows, start, n_vertices, n_faces):
    """Compare the counts with the lines that are there, before anything is allocated."""
    found = len(rows) - start
    if found < n_vertices + n_faces:
        raise _fault(
            path,
            numbers_[-1],
            f"truncated: {n_vertices} vertices and {n_faces} faces announced, {found} lines found",
            "get the whole file or correct the counts",
        )
    if found > n_vertices + n_faces:
        raise _fault(
            path,
            numbers_[start + n_vertices + n_faces],
            f"more lines than the {n_vertices} vertices and {n_faces} faces announced",
            "correct the counts",
        )


def _number(kind, token):
    """int or float of a token, None where it is not one (Python's `1_000` is not)."""
    try:
        return None if b"_" in token else kind(token)
    except ValueError:
        return None


def _parse_vertices(path, numbers_, rows):
    rows = [row[:3] for row in rows]
    try:
        if any(b"_" in b"".join(row) for row in rows):
            raise ValueError
        vertices = np.array(rows, dtype=np.float64)
    except ValueError:  # ragged rows or words: find the line
        for line, row in zip(numbers_, rows, strict=True):
            _check_vertex(path, line, row)
        raise _fault(path, numbers_[0], "the vertices cannot be read", "check them") from None
    if vertices.ndim != 2 or vertices.shape[1] != 3:
        _check_vertex(path, numbers_[0], rows[0])
    bad = np.flatnonzero(~np.isfinite(vertices).all(axis=1))
    if len(bad):
        _check_vertex(path, numbers_[bad[0]], rows[bad[0]])
    return vertices


def _check_vertex(path, line, row):
    if len(row) < 3:
        raise _fault(path, line, f"a vertex of {len(row)} coordinates", "give x, y and z")
    for token in row:
        value = _number(float, token)
        if value is None:
            raise _fault(path, line, f"coordinate {_show(token)} is not a number", "correct it")
        if not np.isfinite(value):
            raise _fault(path, line, f"coordinate {_show(token)} is not finite", "correct it")


def _parse_faces(path, numbers_, rows, vertices):
    """Corner lists to triangles, in file order."""
    n_vertices = len(vertices)
    try:
        sizes = np.array([row[0] for row in rows], dtype=np.int64)
        parts, order = [], []
        for size in np.unique(sizes):
            where = np.flatnonzero(sizes == size)
            tokens = [rows[i][1 : size + 1] for i in where]
            if size < 3 or any(b"_" in b"".join(row) for row in tokens):
                raise ValueError
            corners = np.array(tokens, dtype=np.int64)
            if corners.shape != (len(where), size):
                raise ValueError
            if corners.min() < 0 or corners.max() >= n_vertices:
                raise ValueError
            parts.append(_triangulate(vertices, corners).reshape(-1, 3))
            order.append(np.repeat(where, size - 2))
    except (ValueError, OverflowError):  # find the line
        for line, row in zip(numbers_, rows, strict=True):
            _check_face(path, line, row, n_vertices)
        raise _fault(path, numbers_[0], "the faces cannot be read", "check them") from None
    return np.concatenate(parts)[np.argsort(np.concatenate(order), kind="stable")]


def _triangulate(vertices, corners):
    """Polygons (n, size) to triangles (n, size - 2, 3): fans, where these cover the polygon."""
    fans = np.stack([corners[:, [0, k, k + 1]] for k in range(1, corners.shape[1] - 1)], axis=1)
    if corners.shape[1] > 3:
        points = vertices[corners]
        with np.errstate(over="ignore", invalid="ignore"):
            points = points - points[:, :1]
            points /= np.maximum(np.abs(points).max(axis=(1, 2), keepdims=True), 1e-300)
        normals = np.cross(points[:, 1:-1], points[:, 2:])  # the first corner is the origin
        whole = normals.sum(axis=1, keepdims=True)
        # The fan leaves a polygon that is not convex where its triangles turn over.
        for k in np.flatnonzero(((normals * whole).sum(axis=2) < -1e-12).any(axis=1)):
            fans[k] = corners[k][_ears(points[k], whole[k, 0])]
    return fans


def _ears(points, normal):
    """Triangles (size - 2, 3) of one plane polygon (size, 3), by cutting off its ears.

    Of a polygon that crosses itself what has no ear becomes a fan. Source: Meisters, Polygons have
    ears (1975).
    """
    axis = np.abs(normal).argmax()
    x, y = np.delete(points, axis, axis=1).T
    x = x * np.sign(normal[axis]) * (-1 if axis == 1 else 1)  # so that corners run to the left

    def left_of(a, b, c):
        return (x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a])

    def is_ear(a, b, c):
        others = np.array([p for p in left if p not in (a, b, c)])
        sides = (left_of(a, b, others), left_of(b, c, others), left_of(c, a, others))
        return left_of(a, b, c) >= 0 and not (np.stack(sides) > 0).all(axis=0).any()

    left, found = list(range(len(points))), []
    while len(left) > 3:
        turns = [(left[k - 1], left[k], left[(k + 1) % len(left)]) for k in range(len(left))]
        ear = next((turn for turn in turns if is_ear(*turn)), turns[1])
        found.append(ear)
        left.remove(ear[1])
    return np.array([*found, left])


def _check_face(path, line, row, n_vertices):
    size = _number(int, row[0])
    if size is None:
        raise _fault(
            path,
            line,
            f"{_show(row[0])} is not a number of corners",
            "start a face with the number of its corners",
        )
    if size < 3:
        raise _fault(path, line, f"a face of {size} corners", "give at least 3")
    if len(row) - 1 < size:
        raise _fault(
            path,
            line,
            f"{_show(row[0])} corners announced, {len(row) - 1} found",
            "complete the face",
        )
    for token in row[1 : size + 1]:
        corner = _number(int, token)
        if corner is None:
            raise _fault(path, line, f"corner {_show(token)} is not an integer", "correct it")
        if not 0 <= corner < n_vertices:
            raise _fault(
                path,
                line,
                f"corner {_show(token)} is out of range",
                f"use 0 to {n_vertices - 1}",
            )


# ---------------------------------------------------------------- voxelisation


def voxelize(vertices, faces, resolution, fill=False):
    """Fit a mesh to a grid and mark exactly the voxels that its surface touches.

    The mesh is scaled uniformly so that the longest side of its bounding box spans D voxels, and
    centred. The bounding box is that of the vertices that faces use. Contact is decided as in
    `surface_voxels`: a plane between two voxels marks both, on the grid's own border the only one
    there is, so a cube becomes the outer shell of the grid. `fill=True` adds the interior: empty
    voxels that no path over common sides joins to the outside. A leaky mesh stays a shell.

    vertices (V, 3) finite, faces (F, 3) integers, resolution D from 1 to 1024.
    Returns bool (D, D, D), axes as in the mesh. Raises StudyError.
    """
    vertices, faces = _check_mesh(vertices, faces)
    _check_resolution(resolution)
    # Far from the origin rounding would move walls on the grid's border out of it.
    placed = np.clip(_fit(vertices, faces, resolution), 0, resolution)
    grid = surface_voxels(placed, faces, resolution)
    return fill_interior(grid) if fill else grid


def modelnet_layout(vertices, faces):
    """Voxelise as in ModelNet10's 30^3 grids: longest side 24, filled, 3 voxels of margin.

    The mesh spans 23.5 voxels, centred in 24: the planes of its bounding box then fall inside
    voxels, where 24 would put them on borders and double the walls. Overlap with the published
    grids of the same meshes is .95 to .98 for closed ones so, and .81 to .98 at 24.

    vertices (V, 3), faces (F, 3). Returns bool (30, 30, 30). Raises StudyError.
    Source: Wu et al. 2015 (3D ShapeNets), objects of 24^3 in grids of 30^3.
    """
    vertices, faces = _check_mesh(vertices, faces)
    placed = _fit(vertices, faces, OBJECT_SIDE, span=OBJECT_SPAN)
    return pad(fill_interior(surface_voxels(placed, faces, OBJECT_SIDE)), MARGIN)


def fill_interior(grid):
    """Add to a bool grid (D, D, D) the empty voxels not joined to the outside by common sides."""
    labels, _ = ndimage.label(np.pad(~np.asarray(grid, dtype=bool), 1, constant_values=True))
    return (labels != labels[0, 0, 0])[1:-1, 1:-1, 1:-1]


def surface_voxels(vertices, faces, resolution):
    """Mark exactly the voxels touched by a mesh given in grid coordinates [0, D]^3.

    A voxel is marked if its closed box and a closed triangle have a point in common, by the
    separating-axis test of Akenine-Moeller (Fast 3D Triangle-Box Overlap Testing, 2001) in
    float64. A gap below 1e-9 voxel counts as contact, so that rounding cannot undo a touch.
    Points and segments are triangles too. What lies outside the grid marks nothing.

    vertices (V, 3) in voxels, faces (F, 3), resolution D from 1 to 1024.
    Returns bool (D, D, D). Raises StudyError.
    """
    vertices, faces = _check_mesh(vertices, faces)
    grid = np.zeros((_check_resolution(resolution),) * 3, dtype=bool)
    for first in range(0, len(faces), _FACES_AT_ONCE):
        _mark_triangles(grid, vertices[faces[first : first + _FACES_AT_ONCE]])
    return grid


def _check_mesh(vertices, faces):
    try:
        vertices = np.asarray(vertices, dtype=np.float64)
        faces = np.asarray(faces)
    except (TypeError, ValueError) as error:
        raise StudyError(f"the mesh is not numeric ({error}); give arrays of numbers") from None
    if vertices.ndim != 2 or vertices.shape[1] != 3 or len(vertices) == 0:
        raise StudyError(f"vertices have shape {vertices.shape}; give (V, 3) with V > 0")
    if faces.ndim != 2 or faces.shape[1] != 3 or len(faces) == 0:
        raise StudyError(f"faces have shape {faces.shape}; give (F, 3) with F > 0")
    if faces.dtype.kind not in "iu":
        raise StudyError(f"faces have type {faces.dtype}; give integers")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise StudyError(
            f"faces use corners {faces.min()} to {faces.max()}; use 0 to {len(vertices) - 1}"
        )
    if not np.isfinite(vertices).all():
        raise StudyError("vertices hold NaN or infinity; give finite coordinates")
    return vertices, faces.astype(np.int64, copy=False)


def _check_resolution(resolution):
    integral = isinstance(resolution, numbers.Integral) and not isinstance(resolution, bool)
    if not integral or not 1 <= resolution <= MAX_RESOLUTION:
        raise StudyError(
            f"resolution {resolution!r} is not possible; give an integer from 1 to {MAX_RESOLUTION}"
        )
    return int(resolution)


def _fit(vertices, faces, resolution, span=None):
    """Vertices in voxels: longest side of the used bounding box `span` (D), centred in [0, D]^3."""
    used = vertices[np.unique(faces)]
    lower, upper = used.min(axis=0), used.max(axis=0)
    with np.errstate(over="ignore"):
        longest = np.max(upper - lower)
    if not 0 < longest < np.inf:
        raise StudyError(f"the mesh has extent {longest}; give one with a positive finite extent")
    centre = lower + (upper - lower) / 2
    # Unused vertices may lie anywhere: keep them out of the arithmetic.
    inside = np.clip(vertices, lower, upper)
    return (inside - centre) / longest * (span or resolution) + resolution / 2


def _mark_triangles(grid, triangles):
    """Mark the voxels touched by triangles (F, 3, 3), from coarse boxes down to voxels."""
    # Voxels i with [i, i+1] touching [lower, upper], limited to the grid.
    a, b, c = triangles.transpose(1, 0, 2)  # much faster than a reduction over three corners
    first = np.ceil(np.minimum(np.minimum(a, b), c) - TOLERANCE) - 1
    last = np.floor(np.maximum(np.maximum(a, b), c) + TOLERANCE)
    # A triangle is connected: if its whole box is one row of voxels, it touches them all.
    row = (last > first).sum(axis=1) <= 1
    first = np.maximum(first, 0)
    last = np.minimum(last, len(grid) - 1)
    seen = (first <= last).all(axis=1)
    triangles, row = triangles[seen], row[seen]
    first, last = first[seen].astype(int), last[seen].astype(int)
    size = last - first + 1
    for these in _pieces(row, _PAIRS_AT_ONCE // len(grid)):
        _, voxels = _boxes(first[these], last[these])
        grid[tuple(voxels.T)] = True

    # Small triangles start at voxels, others at boxes of 2^level voxels, at most 3 along an axis.
    level = np.ceil(np.log2(size.max(axis=1, initial=1))).astype(int) - 1
    level[size.prod(axis=1) <= _DIRECT_BOX] = 0
    level[row] = -1
    for height in range(level.max(initial=-1) + 1):
        for these in _pieces(level == height, _PAIRS_AT_ONCE // 8):
            _refine(grid, triangles[these], first[these], last[these], height)


def _pieces(mask, length):
    """Indices where a mask holds, at most `length` at a time."""
    chosen = np.flatnonzero(mask)
    return [chosen[start : start + length] for start in range(0, len(chosen), length)]


def _boxes(first, last):
    """All integer points of the boxes first..last (F, 3): box of each point (P,), points (P, 3)."""
    size = last - first + 1
    count = size.prod(axis=1)
    box = np.repeat(np.arange(len(first)), count)
    rank = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    size = size[box]
    x, yz = np.divmod(rank, size[:, 1] * size[:, 2])
    y, z = np.divmod(yz, size[:, 2])
    return box, first[box] + np.stack([x, y, z], axis=1)


def _refine(grid, triangles, first, last, level):
    """Depth first: test pairs (face, box), split the boxes that are touched, mark the voxels."""
    face, cell = _boxes(first >> level, last >> level)
    if level == 0:  # what other faces have touched needs no test
        fresh = ~grid[tuple(cell.T)]
        face, cell = face[fresh], cell[fresh]
    these, face = np.unique(face, return_inverse=True)
    last, first = last[these], first[these]
    planes = _separating_axes(triangles[these])
    stack = [(level, face, cell)]
    while stack:
        level, face, cell = stack.pop()
        if len(face) > _PAIRS_AT_ONCE:
            half = len(face) // 2
            stack += [(level, face[:half], cell[:half]), (level, face[half:], cell[half:])]
            continue
        if level == 0:
            fresh = ~grid[tuple(cell.T)]
            face, cell = face[fresh], cell[fresh]
        touched = _touch(planes, face, (cell + 0.5) * 2**level, 2**level / 2 + TOLERANCE)
        face, cell = face[touched], cell[touched]
        if level == 0:
            grid[tuple(cell.T)] = True
            continue
        level -= 1
        face = np.repeat(face, 8)
        cell = (2 * cell[:, None] + _OCTANTS).reshape(-1, 3)
        # The three box axes, in integers: the box must reach the voxels of the face's own box.
        reaches = (cell << level <= last[face]) & (((cell + 1) << level) > first[face])
        reaches = reaches.all(axis=1)
        stack.append((level, face[reaches], cell[reaches]))


def _separating_axes(triangles):
    """The ten axes other than the box's own, and each triangle's shadow on them.

    Returns axes (10, F, 3), lowest and highest projection (10, F), and the projection (10, F) of a
    box of half side 1. All three corners are projected on the normal too: then an axis spoilt by
    rounding, as of a sliver, cannot separate what touches.
    """
    edges = np.roll(triangles, -1, axis=1) - triangles
    crosses = np.cross(edges[:, :, None], np.eye(3)).reshape(-1, 9, 3)
    normal = np.cross(edges[:, 0], edges[:, 1])[:, None]
    axes = np.ascontiguousarray(np.concatenate([normal, crosses], axis=1).transpose(1, 0, 2))
    shadow = np.einsum("kfc,fvc->kfv", axes, triangles)
    return axes, shadow.min(axis=2), shadow.max(axis=2), np.abs(axes).sum(axis=2)


def _touch(planes, face, centre, half):
    """Indices of the pairs (face, box) that none of the ten axes separates."""
    kept = np.arange(len(face))
    for axis, lowest, highest, reach in zip(*planes, strict=True):
        at = np.einsum("pc,pc->p", axis[face], centre)
        radius = half * reach[face]
        joined = np.flatnonzero((at + radius >= lowest[face]) & (at - radius <= highest[face]))
        if len(joined) < len(face):
            face, centre, kept = face[joined], centre[joined], kept[joined]
    return kept


# ---------------------------------------------------------------- voxel files


def pack(voxels):
    """Eight voxels to a byte, first voxel in the highest bit, each shape padded to whole bytes.

    voxels bool (N, D, D, D). Returns uint8 (N, ceil(D^3 / 8)). Raises StudyError.
    """
    voxels = np.asarray(voxels)
    _check_cubes(voxels.shape, "voxels")
    if voxels.dtype != bool:
        raise StudyError(f"voxels have type {voxels.dtype}; threshold them to bool first")
    return np.packbits(voxels.reshape(len(voxels), -1), axis=1)


def unpack(packed, shape):
    """Inverse of `pack`: uint8 (N, ceil(D^3 / 8)) and (N, D, D, D) to bool. Raises StudyError."""
    packed = np.asarray(packed)
    n, side = _check_cubes(shape, "shape")
    wanted = (n, -(-(side**3) // 8))
    if packed.dtype != np.uint8 or packed.shape != wanted:
        raise StudyError(
            f"packed voxels are {packed.dtype} {packed.shape}; "
            f"shape {(n, side, side, side)} needs uint8 {wanted}"
        )
    bits = np.unpackbits(packed, axis=1, count=side**3)
    return bits.view(bool).reshape(n, side, side, side)


def _check_cubes(shape, name):
    """N and D of a shape (N, D, D, D)."""
    shape = tuple(int(length) for length in shape)
    if len(shape) != 4 or min(shape) < 1 or len(set(shape[1:])) != 1:
        raise StudyError(
            f"{name}: {shape} is not (N, D, D, D) with N and D > 0; {_shape_hint(shape)}"
        )
    if shape[0] * shape[1] ** 3 > MAX_VOXELS:
        raise StudyError(f"{name}: {shape} is more than {MAX_VOXELS} voxels; split the file")
    return shape[0], shape[1]


def _shape_hint(shape):
    """What to do with arrays of the forms that other projects save."""
    if len(shape) == 5 and 1 in (shape[1], shape[4]):
        return f"drop the channel axis, voxels.squeeze({1 if shape[1] == 1 else 4})"
    if len(shape) == 3:
        return "save one grid as voxels[None]"
    if len(shape) == 2:
        return "reshape the grids, or save `shape` beside packed bits"
    return "save at least one grid" if 0 in shape else "reshape the grids"


def load_voxels(path):
    """Read the voxels of an `.npz` file.

    The file holds `voxels`: (N, D, D, D) bool, uint8 {0, 1} or float in [0, 1]; or bit-packed
    uint8 (N, ceil(D^3 / 8)) with `shape` = (N, D, D, D), as `save_voxels` writes.
    Returns (N, D, D, D), float32 if the file holds floats, else bool.
    Raises StudyError, one line, for anything else. Sizes are checked before memory is taken;
    pickles are never read.
    """
    arrays = _read_npz(path, ("voxels", "shape"))
    if "voxels" not in arrays:
        raise StudyError(f"{path}: no array `voxels`; save the grids under that name")
    voxels, shape = arrays["voxels"], arrays.get("shape")
    try:
        if voxels.ndim == 2 and shape is not None:
            return unpack(voxels, _check_shape_array(shape))
        _check_cubes(voxels.shape, "voxels")
        if shape is not None and _check_shape_array(shape) != voxels.shape:
            raise StudyError(f"shape {shape.tolist()} is not that of voxels {voxels.shape}")
        return _check_values(voxels)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None


def _check_shape_array(shape):
    if shape.dtype.kind not in "iu" or shape.shape != (4,):
        raise StudyError("`shape` is not four integers; give (N, D, D, D)")
    return tuple(shape.tolist())


def _check_values(voxels):
    if voxels.dtype == bool:
        return voxels.view(np.uint8) != 0
    if voxels.dtype == np.uint8:
        if voxels.max() > 1:
            raise StudyError(f"voxels hold {voxels.max()}; uint8 is 0 or 1, so save voxels > 0")
        return voxels.astype(bool)
    if voxels.dtype.kind != "f":
        raise StudyError(f"voxels have type {voxels.dtype}; save bool, uint8 or float")
    # NaN fails both comparisons.
    if not (voxels.min() >= 0 and voxels.max() <= 1):
        raise StudyError(
            f"voxels run from {voxels.min():.9g} to {voxels.max():.9g}; floats must be "
            "probabilities in [0, 1]"
        )
    return voxels.astype(np.float32)


_BROKEN = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    RuntimeError,
    NotImplementedError,
    OverflowError,
    MemoryError,
    zlib.error,
    zipfile.BadZipFile,
    struct.error,
    # What numpy lets through of a damaged header.
    TypeError,
    SyntaxError,
    tokenize.TokenError,
)


def _read_npz(path, names):
    """The arrays of these names that the archive holds, without pickle."""
    data = _read_bytes(path)
    if not data.startswith(b"PK"):
        raise StudyError(f"{path}: not an .npz archive; save the grids with numpy.savez")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            present = [name for name in names if f"{name}.npy" in archive.namelist()]
            return {name: _read_npy(archive, f"{name}.npy") for name in present}
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None
    except _BROKEN as error:
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise StudyError(f"{path}: damaged archive ({reason}); get the whole file") from None


def _read_npy(archive, member):
    size = archive.getinfo(member).file_size
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise StudyError(f"{member} has format {version}; save plain arrays")
        shape, fortran, dtype = readers[version](file)
        if dtype.kind not in "biuf":
            raise StudyError(f"{member} holds {dtype.kind!r} data, not numbers; save plain arrays")
        count = 1
        for length in shape:
            count *= length
        if count > MAX_VOXELS:
            raise StudyError(f"{member} announces {count} numbers; split the file")
        if count * dtype.itemsize != size - file.tell():
            raise StudyError(f"{member} announces {count} numbers, holds fewer or more; rewrite it")
        values = np.frombuffer(file.read(), dtype=dtype)
    return values.reshape(shape, order="F" if fortran else "C")


def save_voxels(path, voxels):
    """Write voxels bool (N, D, D, D) bit-packed to an `.npz` file, in one step.

    Equal arrays give equal bytes: the archive holds no time. Raises StudyError.
    """
    voxels = np.asarray(voxels)
    shape = np.array(voxels.shape, dtype="<i8")
    files.save_npz(path, voxels=pack(voxels), shape=shape)


# ---------------------------------------------------------------- layouts


def pad(voxels, margin):
    """Add `margin` empty voxels on every side of grids (..., D, D, D)."""
    voxels = np.asarray(voxels)
    return np.pad(voxels, [(0, 0)] * (voxels.ndim - 3) + [(margin, margin)] * 3)


def crop(voxels, margin):
    """Remove `margin` voxels on every side of grids (..., D, D, D); undoes `pad`."""
    voxels = np.asarray(voxels)
    if not 0 <= 2 * margin < voxels.shape[-1]:
        raise StudyError(f"cannot crop {margin} voxels of a side of {voxels.shape[-1]}")
    inner = slice(margin, voxels.shape[-1] - margin)
    return voxels[..., inner, inner, inner]


def max_pool(voxels, factor=2):
    """Largest value of each block of factor^3 voxels; grids (..., D, D, D), factor divides D."""
    voxels = np.asarray(voxels)
    side = voxels.shape[-1] // factor
    blocks = voxels.reshape(*voxels.shape[:-3], side, factor, side, factor, side, factor)
    return blocks.max(axis=(-5, -3, -1))


def to_judge_grid(voxels, layout="padded", judge_side=JUDGE_SIDE, threshold=0.5, extra_sides=()):
    """Map grids of any supported side to the judge's grid, and never stretch an object.

    Voxels above `threshold` count as occupied; everything behind works on that binary grid.
    Padded grids (24^3 object, margin): 30 as is, 32 cropped by 1. Tight grids (object fills the
    grid): 30 and 32 are zoomed to 24 (cubic spline, mode nearest), padded by 3, then > .5. A grid
    of 64 is max-pooled by 2, then treated as 32. Side 24 is tight, padded by 3, and allowed only
    where `extra_sides` names it. A judge of another side takes grids of its own side, as they are.

    voxels (N, D, D, D) bool or float in [0, 1]. Returns bool (N, judge_side^3). Raises StudyError.
    Source: Qi et al. 2016 for the 30^3 grid; `util/data_io.py` of DescriptorNet (Xie et al. 2018)
    for the tight grids.
    """
    voxels = np.asarray(voxels)
    _, side = _check_cubes(voxels.shape, "voxels")
    if layout not in ("padded", "tight"):
        raise StudyError(f"layout {layout!r} is unknown; use 'padded' or 'tight'")
    if np.isnan(voxels).any():
        raise StudyError("voxels hold NaN; check the sampler that made them")
    binary = voxels if voxels.dtype == bool else voxels > threshold
    if judge_side != JUDGE_SIDE:
        if side != judge_side:
            raise StudyError(f"side {side} is not that of the judge; give grids of {judge_side}")
        return binary
    if side == 64:
        binary, side = max_pool(binary, 2), 32
    if side == OBJECT_SIDE and layout == "tight" and OBJECT_SIDE in extra_sides:
        return pad(binary, MARGIN)
    if side not in (30, 32):
        allowed = "30, 32, 64" + (", 24 (tight)" if OBJECT_SIDE in extra_sides else "")
        raise StudyError(f"grids of side {side} cannot be judged; use {allowed}")
    if layout == "tight":
        return pad(_zoom(binary, OBJECT_SIDE / side), MARGIN)
    return crop(binary, 1) if side == 32 else binary


def extents(voxels):
    """Voxels from the first to the last occupied one along x, y and z: bool (N, D, D, D) to (N, 3).

    0 for empty grids.
    """
    found = []
    for others in ((2, 3), (1, 3), (1, 2)):
        line = voxels.any(others)
        span = line.shape[1] - line.argmax(1) - line[:, ::-1].argmax(1)
        found.append(span * line.any(1))
    return np.stack(found, 1)


def fills_grid(voxels):
    """Which shapes (N, D, D, D), bool, reach both ends of the grid along some axis, bool (N,)."""
    ends = [voxels.any(axis=others)[:, [0, -1]].all(axis=1) for others in ((2, 3), (1, 3), (1, 2))]
    return np.any(ends, axis=0)


def off_centre(voxels):
    """How far bounding boxes stand from the middle of the grid, as a fraction of its side.

    voxels: bool (N, D, D, D), none empty. Returns (N, 3) in [0, .5], an axis a column.
    """
    side, out = voxels.shape[1], []
    for others in ((2, 3), (1, 3), (1, 2)):
        spans = voxels.any(axis=others)
        first, last = spans.argmax(1), side - 1 - spans[:, ::-1].argmax(1)
        out.append(np.abs(first + last - (side - 1)) / (2 * side))
    return np.stack(out, 1)


def _zoom(binary, factor):
    """Cubic spline zoom of each grid, then > .5."""
    zoomed = [
        ndimage.zoom(grid.astype(np.float64), factor, order=3, mode="nearest") for grid in binary
    ]
    return np.stack(zoomed) > 0.5


def intersection_over_union(a, b):
    """Voxels in both grids over voxels in either; bool arrays of one shape. 1 for two empty ones.

    Returns a float in [0, 1]. Raises StudyError where the shapes differ or a type is not bool.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != bool or b.dtype != bool:
        raise StudyError(
            f"cannot compare {a.dtype} {a.shape} with {b.dtype} {b.shape}; "
            "give bool grids of one shape"
        )
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 1.0


def mean_iou(a, b):
    """Mean ``intersection_over_union`` over pairs of bool grids, both (N, ...), N >= 1."""
    return float(np.mean([intersection_over_union(p, q) for p, q in zip(a, b, strict=True)]))


def pairwise_iou(voxels):
    """Mean IoU over all pairs of flat {0, 1} float grids (N, V); two empty ones count as alike."""
    both = voxels @ voxels.T
    size = voxels.sum(1)
    either = size[:, None] + size[None] - both
    iou = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    return float(iou[np.triu_indices(len(voxels), 1)].mean())


# ---------------------------------------------------------------- surfaces of grids


def exposed_faces(grid):
    """Squares between an occupied voxel and an empty one or the outside.

    grid bool (D, D, D) (any three lengths). Returns vertices (V, 3) int16, lattice points in
    voxels, each once, and quads (F, 4) int32, counter-clockwise seen from outside.
    Raises StudyError.
    """
    grid = np.asarray(grid)
    if grid.ndim != 3 or grid.dtype != bool:
        raise StudyError(f"grid is {grid.dtype} {grid.shape}; give one bool grid (D, D, D)")
    padded = np.pad(grid, 1)
    corners = []
    for axis, sign in itertools.product(range(3), (-1, 1)):
        exposed = grid & ~np.roll(padded, -sign, axis)[1:-1, 1:-1, 1:-1]
        corners.append(np.argwhere(exposed)[:, None] + _square(axis, sign))
    corners = np.concatenate(corners)
    lattice = np.array(grid.shape) + 1
    code, quads = np.unique(
        np.ravel_multi_index(tuple(corners.reshape(-1, 3).T), tuple(lattice)), return_inverse=True
    )
    vertices = np.stack(np.unravel_index(code, tuple(lattice)), axis=1)
    return vertices.astype(np.int16), quads.reshape(-1, 4).astype(np.int32)


def _square(axis, sign):
    """Corners (4, 3) of one side of the unit cube, counter-clockwise seen from outside."""
    turn = [(0, 0), (1, 0), (1, 1), (0, 1)][::sign]
    square = np.zeros((4, 3), dtype=int)
    square[:, axis] = sign > 0
    square[:, [(axis + 1) % 3, (axis + 2) % 3]] = turn
    return square


def _surface(grid):
    vertices, quads = exposed_faces(grid)
    if len(quads) == 0:
        raise StudyError("the grid is empty and has no surface; choose another shape")
    return vertices, quads


def write_obj(path, grid):
    """Write the surface of a bool grid (D, D, D) as Wavefront OBJ quads, in voxels."""
    vertices, quads = _surface(grid)
    lines = [f"v {x} {y} {z}" for x, y, z in vertices.tolist()]
    lines += [f"f {a} {b} {c} {d}" for a, b, c, d in (quads + 1).tolist()]
    files.write_bytes(path, ("\n".join(lines) + "\n").encode("ascii"))


def write_stl(path, grid):
    """Write the surface of a bool grid (D, D, D) as binary STL, two triangles a quad, in voxels."""
    vertices, quads = _surface(grid)
    triangles = vertices[quads[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3)].astype("<f4")
    layout = [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")]
    records = np.zeros(len(triangles), dtype=layout)
    records["corners"] = triangles
    records["normal"] = np.cross(
        triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    )
    header = b"voxel surface, unit one voxel".ljust(80)
    files.write_bytes(path, header + struct.pack("<I", len(records)) + records.tobytes())
