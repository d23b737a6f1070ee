"""Procedural furniture: seeded meshes of the ten ModelNet10 categories, for work without the data.

A shape is a union of closed convex or hollow parts. Parts are drawn with the floor at z = 0, the
front at -y and the width along x, one unit being about one voxel; `mesh` then turns the whole to
the direction that its category faces in ModelNet10. Proportions imitate that data set's medians.
Nothing here is taken from it.
"""

from itertools import product

import numpy as np

from lib.config import CATEGORIES
from lib.errors import StudyError
from lib.voxel import modelnet_layout

# Quarter turns about z: beds, chairs and toilets face -y, a bathtub has no front, the rest face -x.
_TURNS = {"desk": 3, "dresser": 3, "night_stand": 3, "sofa": 3, "table": 3, "monitor": 3}


# ---- primitives: each returns one closed part (vertices (V, 3), faces (F, 3)), faces outward ----


def outline(size, sides=4, power=2.0):
    """Return a convex polygon (sides, 2) about the origin that spans exactly `size` = (x, y).

    Four sides give a rectangle; more give the superellipse |x|^power + |y|^power = 1.
    """
    angle = 2 * np.pi * (np.arange(sides) + 0.5) / sides  # the half step puts 4 sides on corners
    wave = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    wave = np.sign(wave) * np.abs(wave) ** (2 / power)
    return wave / np.abs(wave).max(axis=0) * np.asarray(size) / 2


def loft(rings):
    """Join rings (K, n, 3) of equal length by a skin, and cap the first and last, both convex."""
    rings = np.asarray(rings, dtype=np.float64)
    count, n = rings.shape[:2]
    here = np.arange(n) + n * np.arange(count - 1)[:, None]
    beside = np.roll(here, -1, axis=1)
    fan = np.arange(1, n - 1)
    last = n * (count - 1)
    faces = np.concatenate(
        [
            np.stack([here, beside, beside + n], axis=-1).reshape(-1, 3),
            np.stack([here, beside + n, here + n], axis=-1).reshape(-1, 3),
            np.stack([0 * fan, fan + 1, fan], axis=-1),
            np.stack([0 * fan, fan, fan + 1], axis=-1) + last,
        ]
    )
    vertices = rings.reshape(-1, 3)
    a, b, c = np.moveaxis((vertices - vertices[0])[faces], 1, 0)
    inward = (a * np.cross(b, c)).sum() < 0  # six times the enclosed volume
    return vertices, faces[:, ::-1] if inward else faces


def prism(x, y, z, sides=4, power=2.0, taper=1.0, lean=(0.0, 0.0)):
    """Stand a box or cylinder on intervals x, y, z; `taper` scales its top, `lean` shifts it."""
    flat = outline((x[1] - x[0], y[1] - y[0]), sides, power)
    base = np.column_stack([flat + (np.mean(x), np.mean(y)), np.full(sides, z[0])])
    top = np.column_stack([flat * taper + (np.mean(x), np.mean(y)) + lean, np.full(sides, z[1])])
    return loft([base, top])


def rod(start, end, size, sides=4, taper=1.0):
    """Lay a prism from point `start` to point `end`; `size` = (across, upward) of its section."""
    start, end = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
    along = (end - start) / np.linalg.norm(end - start)
    across = np.array([1.0, 0.0, 0.0])
    if abs(along[2]) < 0.99:  # otherwise upright: any horizontal direction will do
        across = np.cross(along, (0.0, 0.0, 1.0))
        across /= np.linalg.norm(across)
    section = outline(size, sides) @ np.stack([across, np.cross(across, along)])
    return loft([start + section, end + section * taper])


def bowl(x, y, z, wall, floor, powers=(2.0, 2.0), taper=0.7, rise=0.0, sides=24):
    """Hollow out a vessel open at the top: up the outer wall, over the rim, down to the floor.

    `powers` shape the outer and inner outlines, `taper` is foot over rim, and `rise` lifts the
    rim at the +y end.
    """
    outer = outline((x[1] - x[0], y[1] - y[0]), sides, powers[0])
    inner = outline((x[1] - x[0] - 2 * wall, y[1] - y[0] - 2 * wall), sides, powers[1])
    foot = outer * taper
    pit = inner * (0.4 + 0.6 * taper)
    heights = ((foot, z[0]), (outer, z[1]), (inner, z[1]), (pit, z[0] + floor))
    rings = np.array([np.column_stack([flat, np.full(sides, height)]) for flat, height in heights])
    rings[1:3, :, 2] += rise * np.clip(rings[1:3, :, 1] / np.ptp(y), 0, 1)
    return loft(rings + (np.mean(x), np.mean(y), 0))


def arc(radii, y, z, thickness, opening, lean=0.0, steps=8):
    """Bend an upright wall round the back of the ellipse at (0, y), from `opening` to pi - it."""
    angle = np.linspace(opening, np.pi - opening, steps + 1)[:, None]
    ellipse = np.stack([np.cos(angle), np.sin(angle)], axis=-1)  # (steps + 1, 1, 2)
    inside, outside = ellipse * (np.asarray(radii) - thickness), ellipse * radii
    flat = np.concatenate([inside, outside, outside + (0, lean), inside + (0, lean)], axis=1)
    height = np.broadcast_to((z[0], z[0], z[1], z[1]), flat.shape[:2])[..., None]
    return loft(np.concatenate([flat + (0, y), height], axis=-1))


# ---- components shared by several categories: each returns a list of parts ----


def edges(x, thick):
    """Return the two intervals of width `thick` at the ends of interval x."""
    return (x[0], x[0] + thick), (x[1] - thick, x[1])


def corners(x, y, z, thick, foot=1.0, lean=0.0, sides=4):
    """Put four legs in the corners of x, y; `foot` is foot over top, `lean` draws the top in."""
    lean = lean + thick * (1 - foot) / 2  # so that the outer sides of a tapered leg stay upright
    ways = product((lean, -lean), repeat=2)
    return [
        prism(*spot, z, sides, taper=1 / foot, lean=way)
        for spot, way in zip(
            product(edges(x, thick * foot), edges(y, thick * foot)), ways, strict=True
        )
    ]


def pedestal(g, x, y, height):
    """Stand a central column on a disc, a plate or a star of feet."""
    reach, thick = 0.42 * min(np.ptp(x), np.ptp(y)), g.uniform(1, 3)
    centre = np.mean(x), np.mean(y)
    post = prism(*([c - thick / 2, c + thick / 2] for c in centre), (0, height), sides=8)
    kind = g.choice(("disc", "plate", "star"))
    if kind == "star":
        count = g.integers(3, 6)
        angles = np.pi / 2 + 2 * np.pi * np.arange(count) / count
        tips = [(centre[0] + reach * np.cos(a), centre[1] + reach * np.sin(a), 0.7) for a in angles]
        return [post] + [rod((*centre, 1.8), tip, (1, 1)) for tip in tips]
    foot = ([c - reach, c + reach] for c in centre)
    return [post, prism(*foot, (0, 1.3), sides=4 if kind == "plate" else 12, taper=0.8)]


def supports(g, kind, x, y, height):
    """Carry the rectangle x, y at `height` on the named kind of legs."""
    thick = g.uniform(0.6, 1.7)
    if kind == "pedestal":
        return pedestal(g, x, y, height)
    if kind == "panels":
        return [prism(edge, y, (0, height)) for edge in edges(x, thick)]
    if kind == "sled":
        legs = corners(x, y, (0, height), 0.9)
        return legs + [prism(edge, y, (0, 1)) for edge in edges(x, 0.9)]
    shape = {
        "straight": {},
        "tapered": {"foot": 0.5},
        "round": {"sides": 8},
        "splayed": {"lean": g.uniform(1.0, 2.2)},
    }[kind]
    return corners(x, y, (0, height), thick, **shape)


def drawers(g, x, front, z, rows, columns):
    """Cover the plane y = `front` with drawer fronts; now and then one is pulled out."""
    style = g.choice(("flush", "panel", "knob", "bar"))
    pulled = g.integers(rows * columns) if g.random() < 0.15 else -1
    parts = []
    edges_x, edges_z = np.linspace(*x, columns + 1), np.linspace(*z, rows + 1)
    for i, (row, column) in enumerate(product(range(rows), range(columns))):
        wide = edges_x[column] + 1.0, edges_x[column + 1] - 1.0
        tall = edges_z[row] + 1.0, edges_z[row + 1] - 1.0  # gaps of two voxels stay open
        out = g.uniform(3, 6) if i == pulled else {"flush": 0.0, "panel": 0.9}.get(style, 0.3)
        if out > 0:
            parts.append(prism(wide, (front - out, front + 0.2), tall))
        if style in ("knob", "bar"):
            half = 0.6 if style == "knob" else 0.3 * np.ptp(wide)
            middle, level = np.mean(wide), np.mean(tall)
            parts.append(
                prism(
                    (middle - half, middle + half),
                    (front - out - 1.2, front),
                    (level - 0.5, level + 0.5),
                )
            )
    return parts


def shelves(x, y, z, boards, thick=0.8):
    """Build an open case: two sides, a back, and `boards` boards, top and bottom among them."""
    levels = np.linspace(z[0], z[1] - thick, boards)
    parts = [prism(edge, y, z) for edge in edges(x, thick)]
    parts.append(prism(x, (y[1] - thick, y[1]), z))
    return parts + [prism(x, y, (level, level + thick)) for level in levels]


def backrest(g, x, y, z):
    """Raise a solid, oval, slatted, laddered or curved back of a chair whose rear edge is `y`."""
    kind = g.choice(("solid", "oval", "slats", "ladder", "curved"))
    lean, thick = g.uniform((0, 0.7), (3.5, 1.6))
    run, half, tall = (y - thick, y), np.ptp(x) / 2, np.ptp(z)
    if kind == "solid":
        return [prism(x, run, z, taper=(g.uniform(0.75, 1.05), 1), lean=(0, lean))]
    if kind == "curved":
        deep = half * 0.8
        return [arc((half, deep), y - deep, z, thick, g.uniform(0, 0.6), lean)]
    if kind == "oval":
        level = z[0] + 0.6 * tall
        plate = rod((0, run[0], level), (0, y, level), (2 * half, 0.75 * tall), sides=16)
        return [plate] + [prism((c - 0.6, c + 0.6), run, (z[0], level)) for c in np.array(x) * 0.4]
    posts = list(edges(x, 1))
    if kind == "slats":
        posts += [(c - 0.4, c + 0.4) for c in np.linspace(*x, g.integers(1, 4) + 2)[1:-1]]
    parts = [prism(post, run, z, lean=(0, lean)) for post in posts]
    for share in (1.0,) if kind == "slats" else np.linspace(1.0, 0.3, g.integers(2, 4)):
        level, shift = z[0] + share * tall, share * lean
        parts.append(prism(x, (run[0] + shift, y + shift), (level - 1.5, level)))
    return parts


# ---- the ten categories: each takes a generator and returns a list of parts ----


def _bathtub(g):
    half, height = g.uniform(4.5, 8), g.uniform(6, 11)
    x, y, wall = (-half, half), (-12, 12), g.uniform(0.4, 1.8)
    kind = g.choice(("built-in", "oval", "claw", "corner"))
    if kind == "built-in":
        parts = [bowl(x, y, (0, height), wall, 2, (40, g.choice((2.5, 4, 40))), g.uniform(0.9, 1))]
    elif kind == "corner":
        half, powers = g.uniform(9, 12), (g.choice((3, 6, 40)), g.uniform(2, 3))
        parts = [bowl((-half, half), y, (0, height), wall + 0.5, 2, powers, 1.0)]
    else:
        lift = g.uniform(1.5, 3) if kind == "claw" else 0.0
        shape = g.uniform(2, 4)
        parts = [
            bowl(
                x,
                y,
                (lift, height),
                wall,
                1.5,
                (shape, shape),
                g.uniform(0.6, 0.9),
                rise=g.choice((0, g.uniform(3, 7))),
            )
        ]
        if lift:
            parts += corners((-0.6 * half, 0.6 * half), (-8, 8), (0, lift + 2), 1.8)
    if g.random() < 0.6:
        spout = (0, 12 - wall / 2, height - 1), (0, 12 - wall / 2, height + g.uniform(2, 4))
        parts += [rod(*spout, (1.3, 1.2)), rod(spout[1], np.add(spout[1], (0, -3, 0)), (1.2, 1.2))]
    return parts


def _bed(g):
    half, lift, top = g.uniform(5.5, 11), g.uniform(1.5, 3), g.uniform(5, 7.5)
    x, y, head = (-half, half), (-12, 12), g.uniform(9, 15)
    base = (
        corners(x, y, (0, lift + 1), g.uniform(1.5, 2.5))
        if g.random() < 0.6
        else [prism((0.85 * x[0], 0.85 * x[1]), (-10, 11), (0, lift + 1))]
    )
    parts = base + [prism(x, y, (lift, top))]
    kind = g.choice(("solid", "slats", "arch", "none"), p=(0.4, 0.25, 0.25, 0.1))
    if kind == "solid":
        parts.append(
            prism(
                np.array(x) * g.uniform(1, 1.15), (11, 12), (0, head), lean=(0, g.uniform(0, 1.5))
            )
        )
    elif kind == "arch":
        radius = min(head - top, top)  # its lower half hides behind the mattress
        parts.append(rod((0, 11, top), (0, 12, top), (2 * half, 2 * radius), sides=16))
    elif kind == "slats":
        posts = np.linspace(x[0] + 0.6, x[1] - 0.6, g.integers(4, 6))
        parts += [prism((c - 0.6, c + 0.6), (11, 12.2), (top - 1, head)) for c in posts]
        parts.append(prism(x, (11, 12.2), (head - 1.5, head)))
    if g.random() < 0.4:
        parts.append(prism(x, (-12.5, -11.6), (0, g.uniform(top + 0.5, head))))
    single = half < 7.5
    wide = (0.6 if single else 0.35) * half
    for c in (0.0,) if single else (-0.5 * half, 0.5 * half):
        parts.append(
            prism((c - wide, c + wide), (6.5, 10.5), (top, top + g.uniform(1, 2)), taper=0.8)
        )
    extra = g.choice(("none", "canopy", "tables", "bunk"), p=(0.72, 0.1, 0.12, 0.06))
    if extra == "tables":
        parts += [prism(edge, (7, 12), (0, top - 0.5)) for edge in edges((x[0] - 5, x[1] + 5), 5)]
    elif extra != "none":
        tall = g.uniform(16, 21)
        parts += corners(x, y, (0, tall), 1)
        parts += (
            [prism(x, y, (tall - 5, tall - 3))]
            if extra == "bunk"
            else [prism(edge, y, (tall - 1, tall)) for edge in edges(x, 1)]
        )
    return parts


def _chair(g):
    half, deep, seat, thick = g.uniform((5.5, 11, 8, 0.5), (9, 16, 12, 2))
    x, y, power = (-half, half), (-deep / 2, deep / 2), g.uniform(3, 6)
    kind = g.choice(
        ("straight", "tapered", "round", "splayed", "sled", "pedestal", "panels"),
        p=(0.2, 0.15, 0.1, 0.15, 0.1, 0.2, 0.1),
    )
    rounded = kind not in ("sled", "panels") and g.random() < 0.4
    inset = 0.85 if rounded else 1.0
    parts = supports(g, kind, np.array(x) * inset, np.array(y) * inset, seat + 0.5)
    parts.append(
        prism(x, y, (seat, seat + thick), 16 if rounded else 4, power, taper=g.uniform(0.9, 1))
    )
    parts += backrest(g, x, y[1], (seat + thick - 0.5, 24))
    if g.random() < 0.4:
        rest = seat + g.uniform(4.5, 6.5)
        front, solid = y[0] + g.uniform(0, 3), g.random() < 0.3
        for edge in edges((x[0] - 0.8, x[1] + 0.8), 1):
            parts.append(prism(edge, (front, y[1]), (seat if solid else rest - 0.8, rest)))
            parts.append(prism(edge, (front, front + 1), (seat, rest)))
    if kind in ("straight", "tapered", "round") and g.random() < 0.25:
        level = g.uniform(2.5, 4.5)
        parts += [prism(edge, y, (level, level + 0.8)) for edge in edges(x, 0.8)]
    return parts


def _desk(g):
    deep, height, thick = g.uniform((9, 9, 0.5), (15, 15, 1.5))
    x, y = (-12, 12), (-deep / 2, deep / 2)
    wide = g.uniform(5, 7)
    blocks = {-1: (x[0] + 0.5, x[0] + wide), 1: (x[1] - wide, x[1] - 0.5)}
    parts = [prism(x, y, (height - thick, height))]
    kind = g.choice(("double", "single", "panels", "legs"), p=(0.35, 0.3, 0.2, 0.15))
    side = g.choice((-1, 1))
    for s in {"double": (-1, 1), "single": (side,)}.get(kind, ()):
        low = g.choice((0, 2.5))
        front = y[0] + 1
        parts.append(prism(blocks[s], (front, y[1]), (low, height)))
        parts += drawers(g, blocks[s], front, (low, height - thick), g.integers(2, 4), 1)
        if low:
            parts += corners(blocks[s], (front, y[1]), (0, low + 0.5), 1.3)
    if kind == "single":
        parts += corners((-side * 11.5 - 0.5, -side * 11.5 + 0.5), y, (0, height), 1)
    elif kind != "double":
        legs = "panels" if kind == "panels" else g.choice(("straight", "tapered", "sled"))
        parts += supports(g, legs, x, y, height)
        parts += drawers(g, (-8, 8), y[0] + 0.5, (height - 4.5, height - thick + 0.5), 1, 2)
        parts.append(prism((-9, 9), (y[0] + 1, y[1] - 1), (height - 3.5, height)))
    if g.random() < 0.6:
        parts.append(prism(x, (y[1] - 0.8, y[1]), (g.uniform(0, 0.6) * height, height)))
    extra = g.choice(("none", "hutch", "return"), p=(0.6, 0.2, 0.2))
    if extra == "hutch":
        top = height + g.uniform(5, 9)
        parts += shelves(x, (y[1] - 4.5, y[1]), (height - 0.5, top), g.integers(2, 4))
    elif extra == "return":
        near, far = sorted((side * 12, side * (12 - wide))), y[0] - g.uniform(6, 10)
        parts.append(prism(near, (far, y[0] + 1), (height - thick, height)))
        parts.append(prism(near, (far, far + g.choice((1.2, 5))), (0, height)))
    return parts


def _chest(g, x, y, height, rows, columns):
    """A closed case with drawers, on a plinth, legs or the floor: dressers and night stands."""
    base = g.choice(("floor", "legs", "plinth"), p=(0.3, 0.45, 0.25))
    lift = 0.0 if base == "floor" else g.uniform(2, 4) if base == "legs" else 1.5
    parts = [prism(x, y, (lift, height))] + drawers(g, x, y[0], (lift, height - 1), rows, columns)
    if base == "legs":
        parts += corners(x, y, (0, lift + 0.5), g.uniform(1.2, 2), foot=g.choice((0.6, 1)))
    elif base == "plinth":
        parts.append(prism(np.array(x) * 0.9, (y[0] + 1.5, y[1]), (0, lift + 0.5)))
    if g.random() < 0.5:
        parts.append(prism(np.array(x) * 1.08, (y[0] - 1, y[1]), (height - 0.6, height + 0.6)))
    return parts


def _dresser(g):
    half, deep, height = g.uniform((7.5, 8, 13), (12, 13, 24))
    x, y, rows = (-half, half), (-deep / 2, deep / 2), g.integers(3, 6)
    if g.random() < 0.12:
        return shelves(x, y, (0, height), rows)
    columns = g.integers(1, 4 if half > 9.5 else 3)
    parts = _chest(g, x, y, height, min(rows, int(height / 4)), columns)
    if height < 17 and g.random() < 0.5:
        tall, wide = g.uniform(8, 11), g.uniform(0.55, 0.9)
        middle = height + tall / 2  # a mirror, rectangular or oval
        parts.append(
            rod(
                (0, y[1] - 1.2, middle),
                (0, y[1], middle),
                (wide * 2 * half, tall + 1),
                g.choice((4, 16)),
            )
        )
    return parts


def _monitor(g):
    tall, low, tilt, thick = g.uniform((12, 4, -0.5, 0.7), (18, 7, 2, 2.2))
    kind = g.choice(("flat", "curved", "tube", "framed"), p=(0.4, 0.15, 0.2, 0.25))
    z, middle = (low, low + tall), low + tall / 2
    if kind == "curved":
        parts = [arc((13, g.uniform(4, 6)), -4, z, 1.5, 0.4)]
    elif kind == "tube":
        half, deep = g.uniform((9, 9), (11, 15))
        parts = [
            prism((-half, half), (-2, 1.5), z),
            rod(
                (0, 1, middle),
                (0, deep, middle - 0.1 * tall),
                (1.9 * half, 0.9 * tall),
                taper=g.uniform(0.4, 0.7),
            ),
        ]
    else:
        parts = [prism((-12, 12), (-thick / 2, thick / 2), z, lean=(0, tilt))]
    if kind == "framed":
        parts.append(
            prism(
                (-8, 8), (0, thick / 2 + 2.2), (low + 0.2 * tall, low + 0.8 * tall), lean=(0, tilt)
            )
        )
    wide, deep = g.uniform(4, 8), g.uniform(3, 5.5)
    neck = g.uniform(1, 3)
    back = 3.0 if kind == "tube" else 1.0 + max(tilt, 0)  # the neck stays behind the screen
    foot = g.choice(("disc", "plate", "feet"))
    if foot == "feet":
        for edge in edges((-wide, wide), 1.2):
            parts += [
                prism(edge, (-deep, deep), (0, 1.2)),
                prism(edge, (back - 1, back + 0.5), (0, middle)),
            ]
        return parts
    parts.append(prism((-neck, neck), (back - 1, back + 1), (0, middle)))
    parts.append(prism((-wide, wide), (-deep, deep), (0, 1.2), 16 if foot == "disc" else 4))
    return parts


def _night_stand(g):
    half, deep, height = g.uniform((7, 12, 19), (11, 18, 24))
    x, y = (-half, half), (-deep / 2, deep / 2)
    kind = g.choice(("chest", "open", "table"), p=(0.45, 0.3, 0.25))
    if kind == "chest":
        return _chest(g, x, y, height, g.integers(2, 4), 1)
    drop = height - g.uniform(5, 8)
    parts = [prism(x, y, (drop, height))] + drawers(g, x, y[0], (drop, height), 1, 1)
    if kind == "open":
        case = shelves(x, y, (g.choice((0, 2)), drop + 0.5), g.integers(2, 4))
        return parts + case + corners(x, y, (0, 4), 1)
    parts += supports(g, g.choice(("straight", "tapered", "round", "splayed")), x, y, drop + 0.5)
    if g.random() < 0.7:
        level = g.uniform(2.5, 5)
        parts.append(prism(x, y, (level, level + 0.8)))
    return parts


def _sofa(g):
    half, deep, seat, height = g.uniform((9, 8.5, 3, 7), (12, 12.5, 5, 11))
    lift, arm, back = g.uniform((0, 0.6, 1), (2, 2.6, 2.6))
    x, y = (-half, half), (-deep / 2, deep / 2)
    parts = [
        prism(x, y, (lift, seat)),
        prism(x, (y[1] - back, y[1]), (lift, height), taper=(1, 0.8), lean=(0, g.uniform(0, 1.5))),
    ]
    if lift > 0.7:
        parts += corners(x, y, (0, lift + 0.5), g.uniform(1.2, 2))
    kind = g.choice(("box", "round", "slope", "none"), p=(0.4, 0.25, 0.2, 0.15))
    rest = seat + g.uniform(1.8, 3.2)
    for edge in () if kind == "none" else edges(x, arm):
        parts.append(prism(edge, y, (lift, rest)))
        if kind == "round":
            middle = np.mean(edge)
            parts.append(rod((middle, y[0], rest), (middle, y[1], rest), (arm + 1.2, 2.4), 8))
        elif kind == "slope":
            parts.append(
                prism(edge, y, (rest - 0.2, height), taper=(1, 0.3), lean=(0, 0.33 * deep))
            )
    count, inner = g.integers(1, 4), half - (0 if kind == "none" else arm)
    bounds = np.linspace(-inner, inner, count + 1)
    for left, right in zip(bounds[:-1], bounds[1:], strict=True) if g.random() < 0.6 else ():
        parts.append(
            prism(
                (left + 1, right - 1),
                (y[1] - back - 2, y[1] - back + 0.5),
                (seat, height - g.uniform(0, 2)),
                lean=(0, 0.6),
            )
        )
    extra = g.choice(("none", "chaise", "corner"), p=(0.66, 0.2, 0.14))
    side = g.choice((-1, 1))
    if extra != "none":
        near, far = sorted((side * half, side * (half - g.uniform(7, 9)))), y[0] - g.uniform(4, 9)
        parts.append(prism(near, (far, y[0] + 1), (0, seat)))
        if extra == "corner":
            outer = sorted((side * half, side * (half - back)))
            parts.append(prism(outer, (far, y[1]), (0, height)))
    return parts


def _table(g):
    half, height, thick = g.uniform((5.5, 8, 0.4), (12, 18, 1.5))
    shape = g.choice(("rectangle", "round", "oval"), p=(0.65, 0.2, 0.15))
    half = 12.0 if shape == "round" else half
    x, y = (-12, 12), (-half, half)
    sides = 4 if shape == "rectangle" else g.choice((8, 16))
    parts = [prism(x, y, (height - thick, height), sides)]
    kind = g.choice(
        (
            "straight",
            "straight",
            "tapered",
            "round",
            "splayed",
            "sled",
            "panels",
            "pedestal",
            "twin",
        )
    )
    inset = (1.0 if g.random() < 0.5 else 0.85) if shape == "rectangle" else 0.68
    under_x, under_y = np.array(x) * inset, np.array(y) * inset
    if kind == "twin":
        for c in (-6, 6):
            parts.append(prism((c - 1, c + 1), under_y * 0.4, (0, height)))
            parts.append(prism((c - 1.2, c + 1.2), under_y * 0.9, (0, 1)))
        return parts + [prism((-6, 6), (-0.7, 0.7), (height * 0.3, height * 0.3 + 1))]
    parts += supports(g, kind, under_x, under_y, height)
    legged = kind not in ("pedestal", "panels", "sled")
    if legged and g.random() < 0.35:
        parts.append(prism(under_x, under_y, (height - thick - 1.5, height)))
    if legged and g.random() < 0.25:
        level = g.uniform(2, 0.4 * height)
        parts.append(prism(under_x, under_y, (level, level + 0.7)))
    return parts


def _toilet(g):
    half, front, seat, rim = g.uniform((5, -14, 10, 0.9), (7, -10, 13, 1.9))
    x, y, z = (-half, half), (front, 4), (seat - 4.5, seat)
    foot_y, foot = (front * g.uniform(0.3, 0.7), 6), half * g.uniform(0.4, 0.75)
    hung = g.random() < 0.12
    parts = [bowl(x, y, z, rim, 1.2, (2.3, 2.0), taper=g.uniform(0.65, 0.85))]
    parts.append(
        prism(
            (-foot, foot),
            (1, 6) if hung else foot_y,
            (2 if hung else 0, seat - 2),
            12,
            g.uniform(2, 5),
            taper=1 if hung else g.uniform(1, 1.15),
        )
    )
    wide, deep, top = g.uniform((6, 2.6, 18), (9, 5, 24))
    tank = g.choice(("tank", "low", "wall"), p=(0.75, 0.15, 0.1))
    top = {"tank": top, "low": seat + 3, "wall": 24}[tank]
    rear = (4.5, 4.5 + deep) if tank != "wall" else (5, 6.6)
    low = seat - 2 if tank != "wall" else 0
    parts += [
        prism((-half * 0.7, half * 0.7), (1, rear[1]), (seat - 3.5, seat)),
        prism((-wide, wide), rear, (low, top), taper=g.uniform(0.95, 1.1)),
    ]
    if tank == "tank":
        parts.append(prism((-wide - 0.7, wide + 0.7), (3.8, rear[1] + 0.5), (top, top + 1.3)))
    lid = g.choice(("none", "closed", "open"), p=(0.35, 0.4, 0.25))
    if lid == "closed":
        parts.append(prism(x, y, (seat - 0.3, seat + 1.2), 16, 2.3, taper=0.95))
    elif lid == "open":
        parts.append(rod((0, 2.2, seat + 5), (0, 3.7, seat + 5.5), (2 * half, 11), sides=16))
    return parts


_BUILDERS = {
    "bathtub": _bathtub,
    "bed": _bed,
    "chair": _chair,
    "desk": _desk,
    "dresser": _dresser,
    "monitor": _monitor,
    "night_stand": _night_stand,
    "sofa": _sofa,
    "table": _table,
    "toilet": _toilet,
}


def _known(category):
    if category not in CATEGORIES:
        raise StudyError(f"unknown category {category!r}: choose one of {', '.join(CATEGORIES)}")


def mesh(category, generator):
    """Draw one piece of furniture as a union of closed parts, posed as its category in ModelNet10.

    Returns vertices (V, 3) float64, z up, and outward faces (F, 3) int64; the scale is arbitrary.
    `generator` is a `numpy.random.Generator`. Raises StudyError for an unknown category.
    """
    _known(category)
    parts = _BUILDERS[category](generator)
    starts = np.cumsum([0] + [len(v) for v, _ in parts[:-1]])
    faces = np.concatenate([f + start for (_, f), start in zip(parts, starts, strict=True)])
    vertices = np.concatenate([v for v, _ in parts])
    for _ in range(_TURNS.get(category, 0)):
        vertices = vertices[:, [1, 0, 2]] * (-1.0, 1.0, 1.0)
    return vertices, faces.astype(np.int64)


def shapes(category, n, seed):
    """Voxelise n pieces of furniture; piece k depends on category, seed and k alone.

    Returns bool (n, 30, 30, 30): the longest side fills 24 voxels, inside is solid, and a margin
    of 3 surrounds it, as in ModelNet10. Raises StudyError for an unknown category or n < 0.
    """
    _known(category)
    if n < 0:
        raise StudyError(f"cannot draw {n} shapes of {category}: n must be 0 or more")
    label = CATEGORIES.index(category)
    grids = np.zeros((n, 30, 30, 30), dtype=bool)
    for k in range(n):
        grids[k] = modelnet_layout(*mesh(category, np.random.default_rng([seed, label, k])))
    return grids
