"""Pictures of voxel shapes: random cameras, lights and procedural backgrounds, each view by name.

Every face of a voxel that looks at the camera is intersected exactly with the rays of the pixels
that it can cover; the nearest hit wins. A mesh is drawn through ``voxel.voxelize`` at any side.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from lib import rng
from lib.errors import StudyError

# What a view is drawn from, uniformly; angles in degrees.
ELEVATION = (0.0, 40.0)
ROLL = (-3.0, 3.0)
DISTANCE = (2.0, 4.5)  # of the camera, in radii of the object
FILL = (0.7, 0.98)  # share of the picture's side that the object spans
AMBIENT = (0.3, 0.6)
COARSE = (2, 4, 8, 16)  # cells a side of the background's wall
CLUTTER = 6  # the background has fewer boxes than this

BLUR = 5  # voxels over which a surface is smoothed before its normals are taken
EDGE = 1e-4  # voxels by which faces overlap, so that rounding leaves no gap between them
NOTHING = torch.iinfo(torch.int64).max


class Cameras(NamedTuple):
    """Pinhole cameras of B views, in voxel units.

    origin: (B, 3). rays: (B, 3, 3), so that ``rays @ (column, row, 1)`` is the direction through
    that point of the picture, one unit deep; pixel (i, j) has its centre at row i + 1/2, column
    j + 1/2.
    """

    origin: Tensor
    rays: Tensor


class Hits(NamedTuple):
    """What the pixels of B views see.

    depth: (B, S, S) along the optical axis in voxels, infinite where nothing is. normal:
    (B, S, S, 3) of unit length, 0 where nothing is.
    """

    depth: Tensor
    normal: Tensor


def views(
    grids: np.ndarray, names: list[tuple], side: int, where: torch.device | str = "cpu"
) -> Tensor:
    """Pictures (B, 3, side, side) float32 in [0, 1] of bool grids (B, D, D, D), one name a view.

    Camera, light, colours and background of a view follow from its name alone, its framing from
    the shape too. Raises StudyError for an empty grid.
    """
    if len(grids) != len(names):
        raise StudyError(f"{len(grids)} shapes and {len(names)} names of views")
    chunk = 16 if torch.device(where).type == "cpu" else 64  # only speed and memory depend on it
    parts = [
        _draw(grids[i : i + chunk], names[i : i + chunk], side, where)
        for i in range(0, len(grids), chunk)
    ]
    return torch.cat(parts) if parts else torch.empty(0, 3, side, side, device=where)


def _draw(grids: np.ndarray, names: list[tuple], side: int, where) -> Tensor:
    streams = [rng.numpy_generator("view", *name) for name in names]
    cameras = [camera(g, stream, side) for g, stream in zip(grids, streams, strict=True)]
    looks = [_look(stream) for stream in streams]
    stacked = Cameras(*(torch.stack(part).to(where) for part in zip(*cameras, strict=True)))
    hits = cast(torch.from_numpy(np.ascontiguousarray(grids)).to(where), stacked, side)
    light, colour, ambient = (
        torch.tensor(np.stack(part), dtype=torch.float32, device=where)
        for part in zip(*looks, strict=True)
    )
    # The light is fixed to the camera's right, up and back, so that it never shines from behind.
    turned = torch.einsum("bij,bj->bi", _frame(stacked), light)
    lit = torch.einsum("bhwc,bc->bhw", hits.normal, turned).clamp(min=0)
    shade = ambient[:, None, None] + (1 - ambient[:, None, None]) * lit
    shape = colour[:, :, None, None] * shade[:, None]
    behind = torch.stack([background(stream, side, where) for stream in streams])
    return torch.where(hits.depth.isfinite()[:, None], shape, behind).clamp(0, 1)


def camera(grid: np.ndarray, stream: np.random.Generator, side: int) -> tuple[Tensor, Tensor]:
    """Origin (3,) and rays (3, 3) of a random camera that has the whole object in its picture."""
    centres = np.argwhere(grid) + 0.5
    if not len(centres):
        raise StudyError("an empty grid cannot be drawn; leave it out")
    low, high = centres.min(0) - 0.5, centres.max(0) + 0.5
    azimuth = np.deg2rad(stream.uniform(0, 360))
    elevation, roll = np.deg2rad(stream.uniform(*ELEVATION)), np.deg2rad(stream.uniform(*ROLL))
    back = np.array(
        [
            np.cos(elevation) * np.cos(azimuth),
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation),
        ]
    )
    level = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
    upright = np.cross(back, level)
    right = np.cos(roll) * level + np.sin(roll) * upright
    up = np.cos(roll) * upright - np.sin(roll) * level
    radius = np.linalg.norm(high - low) / 2
    origin = (low + high) / 2 + stream.uniform(*DISTANCE) * radius * back
    # Framing: the projections of the voxels' centres, with room for half a voxel's diagonal.
    offset = centres - origin
    depth = -(offset @ back)
    flat = np.stack([offset @ right, -(offset @ up)], 1) / depth[:, None]
    room = np.sqrt(0.75) / depth.min()
    first, last = flat.min(0) - room, flat.max(0) + room
    scale = side * stream.uniform(*FILL) / (last - first).max()  # pixels a unit of slope
    slack = side - scale * (last - first)
    corner = slack * (0.5 + 0.3 * stream.uniform(-1, 1, 2))
    # A pixel (column, row) has the slope first + ((column, row) - corner) / scale.
    zero = first - corner / scale
    rays = np.stack([right / scale, -up / scale, -back + zero[0] * right - zero[1] * up], 1)
    return torch.tensor(origin, dtype=torch.float32), torch.tensor(rays, dtype=torch.float32)


def _frame(cameras: Cameras) -> Tensor:
    """Unit vectors right, up and back of each camera as columns, (B, 3, 3)."""
    right, down = normalize(cameras.rays[:, :, 0], dim=1), normalize(cameras.rays[:, :, 1], dim=1)
    return torch.stack([right, -down, torch.linalg.cross(right, -down)], 2)


def cast(grids: Tensor, cameras: Cameras, side: int) -> Hits:
    """What every pixel of ``side`` x ``side`` pictures sees of bool grids (B, D, D, D).

    Normals lie half way between that of the voxel's face and that of the smoothed surface.
    """
    where, n = grids.device, len(grids)
    nearest = torch.full((n * side * side,), NOTHING, device=where)
    faces, n_faces = [], 0
    for axis in range(3):
        found = _faces(grids, cameras, axis)
        faces.append(found)
        index, key = _cover(found, cameras, axis, side, n_faces)
        nearest.scatter_reduce_(0, index, key, "amin")
        n_faces += len(found)
    hit = nearest != NOTHING
    depth = torch.full((n * side * side,), torch.inf, device=where)
    depth[hit] = (nearest[hit] >> 32).to(torch.int32).view(torch.float32)
    normal = torch.zeros(n * side * side, 3, device=where)
    normal[hit] = _normals(grids, faces)[nearest[hit] & 0xFFFFFFFF]
    return Hits(depth.view(n, side, side), normal.view(n, side, side, 3))


def _faces(grids: Tensor, cameras: Cameras, axis: int) -> Tensor:
    """Exposed faces across ``axis`` that look at their camera: rows (view, i, j, k, sign).

    sign is 1 for the face at the voxel's higher end, else 0.
    """
    around = pad(grids, [1, 1] * 3)
    size = grids.shape[1]
    found = []
    for sign in (0, 1):
        start = [1, 1, 1]
        start[axis] += 2 * sign - 1
        beside = around[
            :,
            start[0] : start[0] + size,
            start[1] : start[1] + size,
            start[2] : start[2] + size,
        ]
        rows = (grids & ~beside).nonzero()
        ahead = cameras.origin[rows[:, 0], axis] - (rows[:, 1 + axis] + sign)
        rows = rows[(ahead > 0) if sign else (ahead < 0)]
        found.append(torch.cat([rows, torch.full_like(rows[:, :1], sign)], 1))
    return torch.cat(found)


def _cover(
    faces: Tensor, cameras: Cameras, axis: int, side: int, first: int
) -> tuple[Tensor, Tensor]:
    """Pixels that faces cover: flat pixel numbers, and keys that sort by depth, then by face."""
    b, c = (axis + 1) % 3, (axis + 2) % 3
    view, sign = faces[:, 0], faces[:, 4]
    origin, rays = cameras.origin[view], cameras.rays[view]
    plane = (faces[:, 1 + axis] + sign) - origin[:, axis]
    low_b, low_c = faces[:, 1 + b] - origin[:, b], faces[:, 1 + c] - origin[:, c]
    inverse = torch.linalg.inv(cameras.rays)[view]
    column, row, wide, high = _boxes(inverse, axis, plane, low_b, low_c)
    dx = torch.arange(wide, device=faces.device)[None, None]
    dy = torch.arange(high, device=faces.device)[None, :, None]
    column, row = column[:, None, None] + dx, row[:, None, None] + dy  # (F, 1, W) and (F, H, 1)
    x, y = column + 0.5, row + 0.5

    def along(k: int) -> Tensor:
        m = rays[:, k, :, None, None]
        return m[:, 0] * x + (m[:, 1] * y + m[:, 2])  # (F, H, W)

    depth = plane[:, None, None] / along(axis)
    in_b = depth * along(b) - low_b[:, None, None]
    in_c = depth * along(c) - low_c[:, None, None]
    inside = ((in_b - 0.5).abs() <= 0.5 + EDGE) & ((in_c - 0.5).abs() <= 0.5 + EDGE) & (depth > 0)
    inside &= (column >= 0) & (column < side) & (row >= 0) & (row < side)
    face, i, j = inside.nonzero(as_tuple=True)
    pixel = (view[face] * side + row[face, i, 0]) * side + column[face, 0, j]
    bits = depth[face, i, j].view(torch.int32).to(torch.int64)  # positive floats sort as integers
    return pixel, (bits << 32) | (first + face)


def _boxes(inverse: Tensor, axis: int, plane: Tensor, low_b: Tensor, low_c: Tensor) -> tuple:
    """First column and row (F,) of each face's box of pixels, and the largest width and height."""
    corners = torch.empty(len(plane), 3, 4, device=plane.device)
    corners[:, axis] = plane[:, None]
    corners[:, (axis + 1) % 3] = low_b[:, None] + torch.tensor([0, 1, 0, 1], device=plane.device)
    corners[:, (axis + 2) % 3] = low_c[:, None] + torch.tensor([0, 0, 1, 1], device=plane.device)
    projected = inverse @ corners  # (F, 3, 4): depth times (column, row, 1)
    flat = projected[:, :2] / projected[:, 2:]
    first = (flat.amin(2) - 0.51).ceil().to(torch.int64)
    last = (flat.amax(2) - 0.49).floor().to(torch.int64)
    extent = (last - first).amax(0) + 1 if len(plane) else torch.zeros(2, dtype=torch.int64)
    wide, high = (max(int(v), 0) for v in extent)
    return first[:, 0], first[:, 1], wide, high


def _normals(grids: Tensor, faces: list[Tensor]) -> Tensor:
    """Unit normals (F, 3) of the faces of all three axes, in their order."""
    soft = pad(grids.float(), [BLUR // 2 + 1] * 6)
    for dim in (1, 2, 3):
        soft = soft.unfold(dim, BLUR, 1).sum(-1)
    out = []
    for axis, found in enumerate(faces):
        b, i, j, k, sign = found.T
        i, j, k = i + 1, j + 1, k + 1
        slope = torch.stack(
            [
                soft[b, i - 1, j, k] - soft[b, i + 1, j, k],
                soft[b, i, j - 1, k] - soft[b, i, j + 1, k],
                soft[b, i, j, k - 1] - soft[b, i, j, k + 1],
            ],
            1,
        )
        face = torch.zeros_like(slope)
        face[:, axis] = 2.0 * sign - 1
        # Below a flat surface the slope is 2 BLUR^2 along its normal; a thin plate has less.
        out.append(normalize(face + slope / (2 * BLUR**2), dim=1))
    return torch.cat(out)


def _look(stream: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Direction of the light in the camera's frame (3,), colour (3,) and share of ambient light."""
    light = np.array([stream.uniform(-1, 1), stream.uniform(0, 1), stream.uniform(0.2, 1)])
    return light / np.linalg.norm(light), _colour(stream), stream.uniform(*AMBIENT)


def _colour(stream: np.random.Generator) -> np.ndarray:
    """A colour (3,) between a grey and any other; rooms are seldom gaudy."""
    grey, tint = stream.uniform(0.1, 1), stream.uniform(0, 1, 3)
    return grey + stream.uniform(0, 0.6) * (tint - grey)


def background(stream: np.random.Generator, side: int, where="cpu") -> Tensor:
    """A wall of soft or sharp patches, a floor and boxes, or plain white; (3, side, side)."""
    plain, cells = stream.random() < 0.2, int(stream.choice(COARSE))
    depth, sharp = stream.uniform(0, 0.4, (3, 1, 1)), stream.random() < 0.5
    patches = _colour(stream)[:, None, None] + depth * stream.uniform(-1, 1, (3, cells, cells))
    horizon, floor = stream.uniform(0.5, 1), _colour(stream)
    boxes = [(*stream.uniform(0, 1, 4), _colour(stream)) for _ in range(stream.integers(CLUTTER))]
    if plain:
        return torch.full((3, side, side), float(stream.uniform(0.9, 1)), device=where)
    wall = torch.tensor(patches, dtype=torch.float32, device=where)[None]
    mode = {"mode": "nearest"} if sharp else {"mode": "bilinear", "align_corners": False}
    picture = interpolate(wall, (side, side), **mode)[0]
    picture[:, int(horizon * side) :] = _column(floor, where)
    for x, y, wide, high, colour in boxes:
        top, left = int(y * side), int(x * side)
        down, across = 1 + int(high * side / 2), 1 + int(wide * side / 4)
        picture[:, top : top + down, left : left + across] = _column(colour, where)
    return picture.clamp(0, 1)


def _column(colour, where) -> Tensor:
    return torch.tensor(np.asarray(colour), dtype=torch.float32, device=where)[:, None, None]
