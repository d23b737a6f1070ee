"""Pictures of voxel shapes and of results: static ones in matplotlib, turnable ones in plotly.

Shapes are boolean grids (D, D, D) with axes (x, y, z), z up. Nothing else in the package imports
matplotlib or plotly. Figures are made without pyplot, so they need no display, pile up nowhere,
and a notebook shows one when a cell ends with it. All output is byte-stable.
"""

import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D
from PIL import Image
from plotly.utils import PlotlyJSONEncoder
from scipy.ndimage import uniform_filter

from lib.errors import StudyError
from lib.files import write_bytes, write_text
from lib.voxel import exposed_faces

# One camera for every picture: from the front of both -x and -y, which the categories face.
AZIMUTH, ELEVATION = -125.0, 25.0  # degrees
LIGHT = np.array([-0.32, -0.56, 0.76])  # towards the light, from the upper right; about a unit
AMBIENT, DIFFUSE = 0.42, 0.78
ADDED, REMOVED = "#d9482b", "#f2c14e"  # voxels marked as newly filled, as newly emptied
PALETTE = ("#5b84b1", "#d08a5b", "#6fa287", "#a583b5", "#c9a94e", "#5aa0a8", "#c4737f", "#8a8f98")
INK, MUTED, FAINT = "#2b2f36", "#7a808a", "#d9dce1"
DPI = 110

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#b5bac2",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "grid.color": "#eceef1",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "figure.facecolor": "white",
    "figure.dpi": DPI,
}


def quiet_style():
    """Return a context in which matplotlib draws in the style of the study, and only there."""
    return matplotlib.rc_context(_STYLE)


class Picture(Figure):
    """A matplotlib figure with its own canvas, which a notebook shows as PNG."""

    def __init__(self, width: float, height: float, **options):
        super().__init__(figsize=(width, height), dpi=DPI, facecolor="white", **options)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        return png_bytes(self)


def _panels(n: int, per_line: int, width: float, height: float, **options):
    """Make a figure with n axes in lines of per_line; width and height of a panel in inches."""
    per_line = min(per_line, n)
    lines = -(-n // per_line)
    figure = Picture(width * per_line, height * lines, layout="constrained")
    axes = figure.subplots(lines, per_line, squeeze=False, **options).ravel()
    for spare in axes[n:]:
        spare.remove()
    return figure, axes[:n]


# ---------------------------------------------------------------------------------------------
# Checks


def _checked_shapes(shapes, where: str) -> np.ndarray:
    """Return shapes as a boolean array (N, D, D, D), or say what is wrong with them."""
    shapes = np.asarray(shapes)
    if shapes.ndim != 4 or len(set(shapes.shape[1:])) != 1 or 0 in shapes.shape:
        raise StudyError(
            f"{where}: shapes have size {shapes.shape}; give N >= 1 cubes as (N, D, D, D)."
        )
    if shapes.dtype != bool:
        raise StudyError(
            f"{where}: shapes are {shapes.dtype}, not bool; threshold them first (shapes > 0.5)."
        )
    return shapes


def _check_length(items, n: int, where: str, what: str) -> None:
    if items is not None and len(items) != n:
        raise StudyError(f"{where}: {len(items)} {what} for {n} shapes; give one for each.")


def _check_columns(table: pd.DataFrame, columns: Sequence[str], where: str) -> None:
    missing = [name for name in columns if name not in table]
    if missing:
        raise StudyError(
            f"{where}: no column {', '.join(missing)} in the table; "
            f"it has {', '.join(map(str, table))}."
        )
    if not len(table):
        raise StudyError(f"{where}: the table has no rows; choose rows that exist.")


def _checked_sets(values: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Return labelled numbers as flat float arrays, or say which are empty or not finite."""
    values = {name: np.asarray(v, dtype=float).ravel() for name, v in values.items()}
    bad = [name for name, v in values.items() if not len(v) or not np.isfinite(v).all()]
    if bad or not values:
        labels = ", ".join(map(str, bad)) or "any label"
        raise StudyError(f"{where}: empty or not finite: {labels}; leave such values out.")
    return values


# ---------------------------------------------------------------------------------------------
# The static renderer


def camera(azimuth: float = AZIMUTH, elevation: float = ELEVATION):
    """Return the unit vectors (right, up, eye), (3,) each, of an orthographic camera.

    Angles in degrees; azimuth turns about z from the x axis; eye points from the scene to it.
    """
    a, e = np.deg2rad([azimuth, elevation])
    right = np.array([-np.sin(a), np.cos(a), 0.0])
    up = np.array([-np.sin(e) * np.cos(a), -np.sin(e) * np.sin(a), np.cos(e)])
    return right, up, np.cross(right, up)


def visible_faces(grid, azimuth: float = AZIMUTH, elevation: float = ELEVATION):
    """Return the faces turned to the camera, far to near.

    grid: bool (D, D, D). Returns corners (F, 4, 3), outward unit normals (F, 3) and the voxels
    (F, 3) they belong to, all integers. Order: the depth of the voxel's centre. On a lattice of
    equal cubes that is exact: if cube A hides part of B from an orthographic camera, no component
    of A - B points away from it, hence A is nearer; and two visible faces of one cube never
    overlap. So the painter's algorithm needs no z-buffer.
    """
    eye = camera(azimuth, elevation)[2]
    vertices, quads = exposed_faces(grid)
    corners = np.asarray(vertices, dtype=np.int64)[quads]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 1])
    keep = normals @ eye > 1e-9
    corners, normals = corners[keep], normals[keep]
    # Outward by half a step leads from voxel to face: voxel = face centre - (normal + 1) / 2.
    voxels = (corners.sum(1) - 2 * (normals + 1)) // 4
    order = np.argsort(voxels @ eye, kind="stable")
    return corners[order], normals[order], voxels[order]


def _openness(grid: np.ndarray, voxels: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Return (F,) in [0, 1]: how open the surroundings of each face are (ambient occlusion).

    A flat surface fills 2 of 5 layers of the 5^3 box around the empty cell before it, counted as
    fully open; every further occupied cell darkens the face.
    """
    near = uniform_filter(np.pad(grid, 1).astype(np.float32), size=5, mode="constant")
    filled = near[tuple((voxels + normals + 1).T)]
    return np.clip(1.0 - (filled - 0.4) / 0.6, 0.0, 1.0)


def _shades(grid, normals, voxels, colour, marks=None) -> np.ndarray:
    """Return RGB (F, 3): Lambert's law per face, ambient occlusion, and a tint with height."""
    light = AMBIENT + DIFFUSE * np.clip(normals @ LIGHT, 0.0, 1.0)
    light *= 0.55 + 0.45 * _openness(grid, voxels, normals)
    height = (voxels[:, 2:] + 0.5) / grid.shape[2]
    base = _colours(voxels, colour, marks)
    tinted = base + (1.0 - base) * (0.04 + 0.34 * height)
    return np.clip(tinted * light[:, None], 0.0, 1.0)


def _colours(voxels: np.ndarray, colour: str, marks) -> np.ndarray:
    """Return the RGB (F, 3) of the voxels (F, 3): the shape's colour, or that of their mark."""
    table = np.array([to_rgb(colour), to_rgb(ADDED), to_rgb(REMOVED)])
    return table[0] if marks is None else table[np.asarray(marks)[tuple(voxels.T)]]


def changed(before, after) -> tuple[np.ndarray, np.ndarray]:
    """Return shapes with all voxels of either state, and the marks of those that changed.

    before, after: bool (N, D, D, D). Marks are int8 of the same size: 1 where a voxel was added,
    2 where one was removed, 0 elsewhere; removed voxels are drawn too.
    """
    before = _checked_shapes(before, "changed, before")
    after = _checked_shapes(after, "changed, after")
    if before.shape != after.shape:
        raise StudyError(f"changed: {before.shape} before and {after.shape} after; give pairs.")
    marks = (after & ~before) + 2 * (before & ~after).astype(np.int8)
    return before | after, marks.astype(np.int8)


def draw_shape(
    axes, grid, *, centre=(0.0, 0.0), size=1.0, colour=PALETTE[0], scale=None, marks=None
):
    """Draw one shape into a square of the axes and return its PolyCollection.

    grid: bool (D, D, D), not empty; centre and size: the square, in data units; scale: data units
    a voxel, by default such that the shape fills the square; marks: int (D, D, D), see `changed`.
    """
    corners, normals, voxels = visible_faces(grid)
    right, up, _ = camera()
    flat = np.stack([corners @ right, corners @ up], axis=-1)  # (F, 4, 2)
    low, high = flat.min((0, 1)), flat.max((0, 1))
    scale = scale or size / (high - low).max()
    polygons = (flat - (low + high) / 2) * scale + np.asarray(centre)
    colours = _shades(np.asarray(grid, bool), normals, voxels, colour, marks)
    # Edges in the colour of the face close the hairlines that antialiasing leaves between them.
    faces = PolyCollection(polygons, facecolors=colours, edgecolors=colours, linewidths=0.35)
    faces.set_joinstyle("round")
    axes.add_collection(faces, autolim=False)
    return faces


def _extent(grid: np.ndarray) -> float:
    """Return the longer side of the projected shape in voxels; 0 for an empty grid."""
    if not grid.any():
        return 0.0
    right, up, _ = camera()
    corners = visible_faces(grid)[0]
    return max(np.ptp(corners @ right), np.ptp(corners @ up))


def gallery(
    rows: Mapping[str, np.ndarray],
    columns: int = 8,
    titles: Sequence[str] | None = None,
    *,
    captions: Mapping[str, Sequence[str]] | None = None,
    colours: Mapping[str, str] | None = None,
    marks: Mapping[str, np.ndarray] | None = None,
    cell: float = 1.15,
    same_scale: bool = False,
    title: str | None = None,
) -> Figure:
    """Draw labelled rows of shapes, all seen from the same side.

    rows: label -> bool (N, D, D, D); a row with more than `columns` shapes goes on in the next
    line; titles: heads of the columns; captions: label -> one text under each shape; colours:
    label -> colour, else the palette in turn; marks: label -> voxels to show as added or removed,
    see `changed`; cell: inches a shape; same_scale: draw all with one voxel size, else each fills
    its cell, but one smaller than the median shape is drawn in that one's scale, so that specks
    look like specks. An empty grid shows the word "empty".
    Raises StudyError for shapes that are not boolean cubes and for lists of the wrong length.
    """
    rows = {name: _checked_shapes(s, f"gallery row '{name}'") for name, s in rows.items()}
    if not rows or columns < 1:
        raise StudyError("gallery: nothing to draw; give at least one row and one column.")
    captions, colours, marks = captions or {}, colours or {}, marks or {}
    for name in [*captions, *colours, *marks]:
        if name not in rows:
            raise StudyError(f"gallery: no row '{name}'; the rows are {', '.join(rows)}.")
    for name, texts in captions.items():
        _check_length(texts, len(rows[name]), f"gallery row '{name}'", "captions")
    marks = {name: np.asarray(m, np.int8) for name, m in marks.items()}
    for name, mark in marks.items():
        _check_length(mark, len(rows[name]), f"gallery row '{name}'", "marks")
    columns = min(columns, max(map(len, rows.values())))
    _check_length(titles, columns if titles is not None else 0, "gallery", "column titles")
    extents = np.array([_extent(g) for shapes in rows.values() for g in shapes if g.any()])
    least = np.max(extents, initial=1.0) if same_scale else np.median([*extents] or [1.0])
    with quiet_style():
        return _draw_gallery(rows, columns, titles, captions, colours, marks, cell, least, title)


def _draw_gallery(rows, columns, titles, captions, colours, marks, cell, least, title) -> Figure:
    """Lay the rows of `gallery` out on one axes whose data unit is the cell.

    least: voxels that a cell holds at least.
    """
    label = 0.10 + 0.085 / cell * max(len(line) for n in rows for line in n.split("\n"))
    head = (0.28 if titles else 0.04) + (0.30 if title else 0.0)
    top, cells, heads = head / cell, [], []
    for k, (name, shapes) in enumerate(rows.items()):
        foot = 0.20 / cell if name in captions else 0.04
        colour = colours.get(name, PALETTE[k % len(PALETTE)])
        heads.append((name, top + 0.5))
        for n, grid in enumerate(shapes):
            x, y = n % columns + 0.5, top + (n // columns) * (1 + foot) + 0.5
            caption = captions[name][n] if name in captions else None
            cells.append((grid, x, y, colour, caption, marks[name][n] if name in marks else None))
        top += -(-len(shapes) // columns) * (1 + foot) + 0.04
    figure = Picture(cell * (label + columns + 0.05), cell * top)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-label, columns + 0.05), ylim=(top, 0))
    axes.set_axis_off()
    # y counts downwards for the text; shapes are drawn upright in coordinates turned over.
    upright = Affine2D().scale(1, -1) + axes.transData
    for grid, x, y, colour, caption, marked in cells:
        _draw_cell(axes, grid, x, y, colour, caption, least, upright, marked)
    for name, y in heads:
        axes.text(0.06 - label, y, name, va="center", ha="left", fontsize=9, linespacing=1.3)
    for k, text in enumerate(titles or ()):
        axes.text(k + 0.5, (head - 0.06) / cell, text, ha="center", va="bottom", fontsize=8.5)
    if title:
        axes.text(0.06 - label, 0.08 / cell, title, ha="left", va="top", fontsize=11)
    return figure


def _draw_cell(axes, grid, x, y, colour, caption, least, upright, marks) -> None:
    if grid.any():
        scale = 0.92 / max(least, _extent(grid))
        faces = draw_shape(
            axes, grid, centre=(x, -y), size=0.92, colour=colour, scale=scale, marks=marks
        )
        faces.set_transform(upright)
    else:
        axes.text(x, y, "empty", ha="center", va="center", color=MUTED, style="italic")
    if caption is not None:
        axes.text(x, y + 0.51, caption, ha="center", va="top", fontsize=7.5, color=MUTED)


def neighbours_figure(samples, nearest, captions: Sequence[str], *, title=None) -> Figure:
    """Draw samples on the upper row and below each its nearest training shape, in one scale.

    samples, nearest: bool (N, D, D, D); captions: N texts, such as the distance of each pair.
    """
    samples = _checked_shapes(samples, "neighbours_figure samples")
    nearest = _checked_shapes(nearest, "neighbours_figure nearest")
    _check_length(nearest, len(samples), "neighbours_figure", "neighbours")
    _check_length(captions, len(samples), "neighbours_figure", "captions")
    below = "nearest\ntraining\nshape"
    rows = {"sample": samples, below: nearest}
    colours = {"sample": PALETTE[0], below: PALETTE[7]}
    texts = {below: captions}
    options = {"captions": texts, "colours": colours, "title": title}
    return gallery(rows, len(samples), same_scale=True, **options)


def pictures_and_shapes(
    pictures, rows: Mapping[str, np.ndarray], *, cell: float = 1.15, title: str | None = None
) -> Figure:
    """Draw pictures on the upper row and below each the shapes that belong to it.

    pictures: uint8 (N, 3, S, S); rows: label -> bool (N, D, D, D).
    """
    pictures = np.asarray(pictures)
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.dtype != np.uint8:
        raise StudyError(
            f"pictures_and_shapes: pictures are {pictures.dtype} of size {pictures.shape}; give "
            "N >= 1 of uint8 as (N, 3, S, S)."
        )
    rows = {
        name: _checked_shapes(s, f"pictures_and_shapes row '{name}'") for name, s in rows.items()
    }
    for shapes in rows.values():
        _check_length(shapes, len(pictures), "pictures_and_shapes", "shapes")
    with quiet_style():
        figure, axes = _panels(len(pictures) * (1 + len(rows)), len(pictures), cell, cell)
        for ax in axes:
            ax.set(xticks=[], yticks=[], xlim=(-0.5, 0.5), ylim=(-0.5, 0.5), aspect="equal")
            ax.spines[:].set_visible(False)
        for ax, picture in zip(axes, pictures, strict=False):
            ax.imshow(picture.transpose(1, 2, 0), extent=(-0.5, 0.5, -0.5, 0.5))
        for line, (name, shapes) in enumerate(rows.items(), 1):
            below = axes[line * len(pictures) : (line + 1) * len(pictures)]
            below[0].set_ylabel(name.replace(" ", "\n"), rotation=0, ha="right", va="center")
            for ax, grid in zip(below, shapes, strict=True):
                if grid.any():
                    draw_shape(ax, grid, size=0.92, colour=PALETTE[(line - 1) % len(PALETTE)])
                else:
                    ax.text(0, 0, "empty", ha="center", va="center", color=MUTED, style="italic")
        if title:
            figure.suptitle(title)
    return figure


# ---------------------------------------------------------------------------------------------
# The interactive viewer


def _smallest(array: np.ndarray) -> np.ndarray:
    """Store non-negative integers in the smallest unsigned type, which keeps the JSON short."""
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))


def _mesh(grid: np.ndarray, name: str, colour: str, marks=None) -> go.Mesh3d:
    """Return the exposed faces of a grid as a plotly mesh, two triangles a face."""
    vertices, quads = exposed_faces(grid)
    x, y, z = _smallest(np.asarray(vertices).reshape(-1, 3)).T.copy()
    triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    i, j, k = _smallest(triangles).T.copy()
    each = {} if marks is None else {"facecolor": _face_colours(vertices, quads, colour, marks)}
    return go.Mesh3d(
        x=x, y=y, z=z, i=i, j=j, k=k, name=name, color=colour, flatshading=True, hoverinfo="skip",
        **each,
        lighting={"ambient": 0.58, "diffuse": 0.68, "specular": 0.03, "roughness": 0.9,
                  "fresnel": 0.02},
        # plotly takes the light in the camera's clip space, so it turns with the camera; there
        # one unit of depth is about a thousand times one of width. From above, before the shape.
        lightposition={"x": -8000, "y": 48000, "z": -100},
    )  # fmt: skip


def _face_colours(vertices, quads, colour: str, marks) -> list[str]:
    """Return a colour for each triangle of `_mesh`, by the mark of its voxel."""
    corners = np.asarray(vertices, dtype=np.int64)[quads]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 1])
    voxels = (corners.sum(1) - 2 * (normals + 1)) // 4  # as in `visible_faces`
    named = np.array([colour, ADDED, REMOVED])[np.asarray(marks)[tuple(voxels.T)]]
    return [*named.tolist(), *named.tolist()]


def _scene(size: int) -> dict:
    """Return a plotly scene: a cube of `size` voxels without axes, seen by the common camera."""
    eye = 2.0 * camera()[2]
    hidden = {"visible": False, "range": [0, size], "autorange": False}
    return {
        "xaxis": hidden, "yaxis": hidden, "zaxis": hidden, "dragmode": "orbit",
        # The orthographic camera zooms by the size of the cube, not by its distance.
        "aspectmode": "manual", "aspectratio": dict.fromkeys("xyz", 1.4),
        "camera": {"eye": dict(zip("xyz", eye.round(4).tolist(), strict=True)),
                   "projection": {"type": "orthographic"}},
    }  # fmt: skip


def viewer(
    shapes, names: Sequence[str] | None = None, *, colour: str = "#82a7d0", marks=None
) -> go.Figure:
    """Return a plotly figure that shows one shape at a time, to be turned by hand.

    shapes: bool (N, D, D, D); names: N entries of the menu, by default "shape 1" to "shape N";
    marks: int (N, D, D, D), voxels to show as added or removed, see `changed`.
    """
    shapes = _checked_shapes(shapes, "viewer")
    _check_length(names, len(shapes), "viewer", "names")
    names = list(names or [f"shape {n + 1}" for n in range(len(shapes))])
    _check_length(marks, len(shapes), "viewer", "marks")
    each = [None] * len(shapes) if marks is None else marks
    meshes = [_mesh(*one, colour, mark) for *one, mark in zip(shapes, names, each, strict=True)]
    for mesh in meshes[1:]:
        mesh.visible = False
    shown = np.eye(len(names), dtype=bool).tolist()
    choices = [
        {"label": name, "method": "restyle", "args": [{"visible": only}]}
        for name, only in zip(names, shown, strict=True)
    ]
    menu = {"buttons": choices, "x": 0.02, "y": 0.98, "xanchor": "left", "yanchor": "top",
            "bgcolor": "white", "bordercolor": FAINT, "font": {"size": 12}}  # fmt: skip
    layout = {
        "template": "none", "height": 460, "margin": dict.fromkeys("lrtb", 0),
        "paper_bgcolor": "#f7f8fa", "scene": _scene(shapes.shape[1]), "showlegend": False,
        "font": {"family": "sans-serif", "color": INK},
        "updatemenus": [menu] if len(names) > 1 else [],
    }  # fmt: skip
    return go.Figure(data=meshes, layout=layout)


def figure_json(figure: go.Figure) -> str:
    """Return a plotly figure as JSON; equal figures give equal text."""
    parts = figure.to_dict()  # arrays become base64 with their type here
    return json.dumps(parts, cls=PlotlyJSONEncoder, sort_keys=True, separators=(",", ":"))


def display_shapes(
    shapes, names: Sequence[str] | None = None, *, columns: int = 8, marks=None
) -> None:
    """Show shapes in a notebook: a static gallery, then the viewer for those who can turn it.

    shapes: bool (N, D, D, D); marks as in `viewer`. Both outputs carry no random identifier, so
    that an executed notebook is the same each time; a site that shows no plotly shows the picture
    and one line.
    """
    from IPython.display import display

    shapes = _checked_shapes(shapes, "display_shapes")
    _check_length(names, len(shapes), "display_shapes", "names")
    names = list(names or [f"shape {n + 1}" for n in range(len(shapes))])
    marked = None if marks is None else {"": marks}
    still = gallery({"": shapes}, columns, captions={"": names}, marks=marked, cell=1.5)
    line = f"The same in three dimensions: {', '.join(names)} (open the notebook in Jupyter)."
    display({"image/png": png_bytes(still), "text/plain": ", ".join(names)}, raw=True)
    turnable = json.loads(figure_json(viewer(shapes, names, marks=marks)))
    display({"application/vnd.plotly.v1+json": turnable, "text/plain": line}, raw=True)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<script src="plotly.min.js"></script>
<style>
body {{ font: 15px/1.5 sans-serif; color: {ink}; max-width: 900px }}
body {{ margin: 2em auto; padding: 0 1em }}
h1 {{ font-size: 1.5em }} h2 {{ font-size: 1.1em; margin: 1.6em 0 .4em }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

_SECTION = """<h2>{name}</h2>
<div id="figure-{number}"></div>
<script>
(function () {{
  var figure = {data};
  var config = {{responsive: true, displaylogo: false}};
  Plotly.newPlot("figure-{number}", figure.data, figure.layout, config);
}})();
</script>"""


def page(path, figures: Mapping[str, go.Figure], title: str) -> Path:
    """Write an HTML page of plotly figures that needs no network, and return its path.

    figures: heading -> figure. The page loads `plotly.min.js` from its own folder; it is written
    there from the installed plotly, once for all pages of the folder.
    """
    from plotly.offline import get_plotlyjs

    if not figures:
        raise StudyError(f"page {path}: no figures; give at least one.")
    path = Path(path)
    sections = [
        # "<" occurs in strings only; escaped, no text can close the script element.
        _SECTION.format(
            name=escape(name), number=n, data=figure_json(figure).replace("<", "\\u003c")
        )
        for n, (name, figure) in enumerate(figures.items(), start=1)
    ]
    text = _PAGE.format(title=escape(title), ink=INK, body="\n".join(sections))
    script, bundle = path.parent / "plotly.min.js", get_plotlyjs().encode()
    if not script.exists() or script.stat().st_size != len(bundle):
        write_bytes(script, bundle)
    write_text(path, text)
    return path


# ---------------------------------------------------------------------------------------------
# Charts


def curves(
    table, columns: Sequence[str], *, x="step", by=None, log=(), title=None, sharey=False
) -> Figure:
    """Draw training curves as small multiples, one panel a column.

    table: DataFrame, or mapping of equally long arrays; columns: what to draw; x: the common
    abscissa; by: a column that splits the rows into lines; log: columns with a logarithmic axis;
    sharey: one scale for all panels.
    Rows where a column is missing (NaN) are left out of its line; a line of one row is a dot.
    """
    table = pd.DataFrame(table)
    columns = list(columns)
    if not columns:
        raise StudyError("curves: no columns to draw; name at least one.")
    _check_columns(table, [*columns, x, *([by] if by else []), *log], "curves")
    groups = list(table.groupby(by, sort=False)) if by else [(None, table)]
    with quiet_style():
        figure, panels = _panels(len(columns), 3, 3.1, 2.1, sharey=sharey)
        for axes, column in zip(panels, columns, strict=True):
            for name, rows in groups:
                rows = rows[[x, column]].dropna()
                style = {"marker": "o" if len(rows) == 1 else "", "ms": 4}
                axes.plot(rows[x], rows[column], label=None if name is None else str(name), **style)
            axes.set(title=column, xlabel=x, yscale="log" if column in log else "linear")
            axes.xaxis.set_major_locator(MaxNLocator(5))
        if by:
            panels[0].legend(title=by)
        if title:
            figure.suptitle(title, x=0.01, ha="left")
    return figure


def bars_with_intervals(
    table: pd.DataFrame,
    metric: str,
    *,
    anchors: Sequence[str] = (),
    label: str | None = None,
    columns: int = 4,
    linear_to: float | None = None,
    title: str | None = None,
) -> Figure:
    """Draw a metric as dot and interval, one line a row (method), one panel a category.

    table: DataFrame with columns row, category, metric, value, low, high, and optionally
    published, drawn as a hollow diamond; empty cells are NaN or "". Only the rows of `metric` are
    drawn, in the order given; anchors: rows that are no method (real test, noise), in grey; label:
    of the axis, which is logarithmic beyond +- `linear_to` where that is given.
    """
    _check_columns(table, ["row", "category", "metric", "value", "low", "high"], metric)
    table = table[table["metric"] == metric].replace("", np.nan)
    if not len(table):
        raise StudyError(f"bars_with_intervals: no rows for metric '{metric}' in the table.")
    names, categories = list(table["row"].unique()), list(table["category"].unique())
    height = 0.75 + 0.22 * len(names)
    several = len(categories) > 1
    # A panel that stands alone needs room for the names of its rows.
    width = 2.6 if several else 2.6 + 0.085 * max(map(len, names))
    with quiet_style():
        figure, panels = _panels(
            len(categories), columns, width, height, sharey=True, sharex=several
        )
        for axes, category in zip(panels, categories, strict=True):
            _dots(axes, table[table["category"] == category], names, anchors)
            axes.set(title=category, yticks=range(len(names)), yticklabels=names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.grid(axis="y", visible=False)
            if linear_to:
                axes.set_xscale("symlog", linthresh=linear_to)
        _label_columns(panels, columns, label or metric)
        if "published" in table and table["published"].notna().any():
            mark = {"mfc": "none", "mec": PALETTE[1], "ms": 5, "mew": 1.1, "ls": ""}
            published = Line2D([], [], marker="D", **mark, label="published")
            figure.legend(handles=[published], loc="outside upper right")
        if title:
            figure.suptitle(title, x=0.01, ha="left")
    return figure


def shares(table: Mapping[str, Sequence[float]], names: Sequence[str]) -> Figure:
    """Draw the share that each row has of every category: row -> one share a name."""
    wide = pd.DataFrame(table, index=list(names)).rename_axis("row").reset_index()
    rows = wide.melt("row", var_name="category").assign(metric="share", low="", high="")
    return bars_with_intervals(rows, "share", label="share of shapes")


def _label_columns(panels: Sequence, columns: int, label: str) -> None:
    """Label the x axis of the last panel of every column."""
    for k, axes in enumerate(panels):
        if k + columns >= len(panels):
            axes.set_xlabel(label)
            axes.tick_params(labelbottom=True)


def _dots(axes, rows: pd.DataFrame, names: Sequence[str], anchors: Sequence[str]) -> None:
    """Draw the dots and intervals of one category."""
    for row in rows.to_dict("records"):
        y = names.index(row["row"])
        colour = "#a3a8b0" if row["row"] in anchors else PALETTE[0]
        axes.plot([row["low"], row["high"]], [y, y], color=colour, lw=2.2, solid_capstyle="round")
        axes.plot(row["value"], y, "o", color=colour, ms=5.5, mec="white", mew=0.8)
        if pd.notna(row.get("published")):
            axes.plot(row["published"], y, "D", mfc="none", mec=PALETTE[1], ms=5, mew=1.1)


def confusion_matrix(matrix, names: Sequence[str], *, title: str | None = None) -> Figure:
    """Draw a confusion matrix: rows are the true class, shade is the share of the row.

    matrix: non-negative (K, K), counts or shares; names: K classes. The number in a cell is the
    entry itself; zeros are left blank.
    """
    matrix = np.asarray(matrix)
    k = len(names)
    if matrix.shape != (k, k) or not np.isfinite(matrix).all() or (matrix < 0).any():
        raise StudyError(
            f"confusion_matrix: size {matrix.shape} for {k} names; "
            "give a (K, K) array of finite entries >= 0 with K names."
        )
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1e-12)
    shades = LinearSegmentedColormap.from_list("quiet", ["#ffffff", PALETTE[0], "#2f4f75"])
    with quiet_style():
        figure = Picture(1.6 + 0.42 * k, 1.3 + 0.38 * k, layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(share, cmap=shades, vmin=0, vmax=1, aspect="auto")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        for (r, c), entry in np.ndenumerate(matrix):
            if entry:
                text = f"{entry:d}" if np.issubdtype(matrix.dtype, np.integer) else f"{entry:.2f}"
                colour = "white" if share[r, c] > 0.45 else INK
                axes.text(c, r, text, ha="center", va="center", fontsize=7.5, color=colour)
        axes.set(xlabel="predicted", ylabel="true", title=title or "")
        axes.set_xticks(range(k), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(k), names)
    return figure


def histogram(values: Mapping[str, np.ndarray], *, bins=30, xlabel="", title=None) -> Figure:
    """Draw one or several distributions as densities over common bins.

    values: label -> finite numbers (N,), not empty; bins: their number, or their edges.
    """
    values = _checked_sets(values, "histogram")
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=bins)
    with quiet_style():
        figure = Picture(4.6, 2.6, layout="constrained")
        axes = figure.add_subplot(xlabel=xlabel, ylabel="density", title=title or "")
        for k, (name, v) in enumerate(values.items()):
            density = np.histogram(v, edges, density=True)[0]
            colour = PALETTE[k % len(PALETTE)]
            axes.stairs(density, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(density, edges, color=colour, linewidth=1.3, label=name)
        if len(values) > 1:
            axes.legend()
    return figure


# ---------------------------------------------------------------------------------------------
# Files


def reliability_diagram(bins: Mapping[str, np.ndarray], *, title: str | None = None) -> Figure:
    """Draw how often answers are right by how probable they were; the diagonal is calibrated.

    bins: label -> structured array with n, confidence and accuracy as `metrics.reliability` gives
    it; the area of a dot grows with its bin, and empty bins are left out.
    """
    bins = {name: b[b["n"] > 0] for name, b in bins.items()}
    if not bins or not all(len(b) for b in bins.values()):
        raise StudyError("reliability_diagram: nothing to draw; give sets with answers in them.")
    with quiet_style():
        figure, panels = _panels(len(bins), 3, 2.5, 2.6, sharex=True, sharey=True)
        for axes, (name, b) in zip(panels, bins.items(), strict=True):
            axes.plot([0, 1], [0, 1], color=FAINT, lw=1)
            area = 8 + 160 * b["n"] / b["n"].sum()
            axes.plot(b["confidence"], b["accuracy"], color=PALETTE[0], lw=1)
            axes.scatter(b["confidence"], b["accuracy"], s=area, color=PALETTE[0], alpha=0.7)
            axes.set(title=name, xlim=(0, 1.03), ylim=(0, 1.05))
        _label_columns(panels, 3, "probability")
        panels[0].set_ylabel("share right")
        if title:
            figure.suptitle(title, x=0.01, ha="left")
    return figure


# ---------------------------------------------------------------------------------------------
# Files


def error_curves(
    table: pd.DataFrame, *, xlabel: str = "", ylabel: str = "error", log=(), title=None
) -> Figure:
    """Draw the error of classifiers over a budget with its interval, one panel a kind.

    table: DataFrame with columns kind, row, budget, value, low, high; xlabel: of all panels, else
    "budget"; log: kinds whose budgets (above 0) have a logarithmic axis.
    """
    _check_columns(table, ["kind", "row", "budget", "value", "low", "high"], "error_curves")
    kinds, names = list(table["kind"].unique()), list(table["row"].unique())
    with quiet_style():
        per_line = 2 if len(kinds) == 4 else 3
        figure, panels = _panels(len(kinds), per_line, 3.1, 2.3, sharey=True)
        for axes, kind in zip(panels, kinds, strict=True):
            for name, rows in table[table["kind"] == kind].groupby("row", sort=False):
                colour = PALETTE[names.index(name) % len(PALETTE)]
                axes.fill_between(
                    rows["budget"], rows["low"], rows["high"], color=colour, alpha=0.2
                )
                axes.plot(rows["budget"], rows["value"], "o-", ms=3, color=colour, label=name)
            axes.set(title=kind, xlabel=xlabel or "budget", ylim=(-0.03, 1.03))
            axes.set_xscale("log" if kind in log else "linear")
            if kind not in log and len(budgets := rows["budget"].unique()) <= 5:
                axes.set_xticks(budgets)
        panels[0].set_ylabel(ylabel)
        panels[0].legend()
        if title:
            figure.suptitle(title, x=0.01, ha="left")
    return figure


def surfaces(
    values: Mapping[str, np.ndarray], extents, *, xlabel="", ylabel="", title=None
) -> Figure:
    """Draw functions of two variables as shaded squares with contours, one panel a label.

    values: label -> finite (n, n), first index along y; extents: (n,), ascending, of both axes.
    All panels share the scale of their colours.
    """
    n = len(extents)
    for name, one in values.items():
        if np.shape(one) != (n, n) or not np.isfinite(one).all():
            raise StudyError(f"surfaces '{name}': size {np.shape(one)}; give finite ({n}, {n}).")
    if not values:
        raise StudyError("surfaces: nothing to draw; give at least one label.")
    low, high = min(np.min(v) for v in values.values()), max(np.max(v) for v in values.values())
    levels = np.linspace(low, high if high > low else low + 1, 12)
    shades = LinearSegmentedColormap.from_list("quiet", ["#ffffff", PALETTE[0], "#2f4f75"])
    with quiet_style():
        figure, panels = _panels(len(values), 3, 3.0, 2.6, sharey=True)
        for axes, (name, one) in zip(panels, values.items(), strict=True):
            drawn = axes.contourf(extents, extents, one, levels=levels, cmap=shades)
            axes.plot(0, 0, "+", color=INK)
            axes.set(title=name, xlabel=xlabel)
        panels[0].set_ylabel(ylabel)
        figure.colorbar(drawn, ax=list(panels), label="loss")
        if title:
            figure.suptitle(title, x=0.01, ha="left")
    return figure


def png_bytes(figure: Figure) -> bytes:
    """Return a matplotlib figure as PNG without date or program, so equal figures are equal."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return few_colours(buffer.getvalue())


def few_colours(png: bytes) -> bytes:
    """The same picture in at most 256 colours, where that is smaller.

    Figures of few hues lose nothing that can be seen and take a third of the bytes, which the
    artifact store counts. A picture that can be seen through, or has a palette, stays as it is.
    """
    with Image.open(io.BytesIO(png)) as picture:
        if picture.mode == "P" or picture.convert("RGBA").getextrema()[3] != (255, 255):
            return png
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    few.save(buffer, format="png", optimize=True)
    return min(buffer.getvalue(), png, key=len)


def save(figure: Figure, path_without_suffix, data: pd.DataFrame | None = None) -> list[Path]:
    """Write a figure as PNG and, beside it, its data as CSV; return the paths written."""
    stem = Path(path_without_suffix)
    if stem.suffix in {".png", ".csv"}:
        raise StudyError(f"save {stem}: give the path without '{stem.suffix}'; it is added.")
    contents = {".png": png_bytes(figure)}
    if data is not None:
        contents[".csv"] = data.to_csv(index=False, lineterminator="\n").encode()
    paths = [stem.with_name(stem.name + suffix) for suffix in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        write_bytes(path, content)
    return paths


def strips(values: Mapping[str, np.ndarray], *, xlabel="", linear=None, title=None) -> Figure:
    """Draw several sets of numbers as rows of dots, one a number, with the median of each row.

    values: label -> finite numbers (N,), not empty; linear: half the width of the linear middle of
    an axis that is logarithmic on both sides of 0, else the axis is linear.
    """
    values = _checked_sets(values, "strips")
    if linear is not None and not linear > 0:
        raise StudyError(f"strips: linear is {linear}; give a width above 0, or none.")
    with quiet_style():
        figure = Picture(6.2, 0.7 + 0.42 * len(values), layout="constrained")
        axes = figure.add_subplot(xlabel=xlabel, title=title or "")
        for row, v in enumerate(values.values()):
            # Multiples of the golden ratio spread any number of dots evenly over the row.
            height = row + 0.5 * (np.arange(len(v)) * 0.6180339887 % 1 - 0.5)
            colour = PALETTE[row % len(PALETTE)]
            axes.plot(v, height, "o", color=colour, ms=3.2, alpha=0.55, mew=0)
            axes.plot([np.median(v)] * 2, [row - 0.36, row + 0.36], color=INK, lw=1.4)
        axes.set(yticks=range(len(values)), yticklabels=list(values))
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        if linear is not None:
            axes.set_xscale("symlog", linthresh=linear)
    return figure


def label_curves(table: pd.DataFrame, *, of="labels", label="accuracy", title=None) -> Figure:
    """Draw a metric by the share of the labels or shapes, one line with intervals a row (method).

    table: DataFrame with columns row, share in (0, 1], value, low, high; the axis of shares is
    logarithmic. Rows are set a little apart, so that their intervals can be told apart.
    """
    _check_columns(table, ["row", "share", "value", "low", "high"], "label_curves")
    names = list(table["row"].unique())
    shares = sorted(table["share"].unique())
    with quiet_style():
        figure = Picture(6.8, 3.4, layout="constrained")
        axes = figure.add_subplot(xlabel=f"share of the {of}", ylabel=label, title=title or "")
        for k, name in enumerate(names):
            rows = table[table["row"] == name].sort_values("share")
            x = rows["share"] * 1.03 ** (k - (len(names) - 1) / 2)
            ends = np.stack([rows["value"] - rows["low"], rows["high"] - rows["value"]])
            style = ("-", "--", ":")[k // len(PALETTE) % 3]
            colour = PALETTE[k % len(PALETTE)]
            axes.errorbar(x, rows["value"], ends, color=colour, ls=style, marker="o", ms=3.5,
                          elinewidth=0.9, label=name)  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(shares, [f"{100 * s:g} %" for s in shares])
        axes.minorticks_off()
        figure.legend(loc="outside right upper")
    return figure
