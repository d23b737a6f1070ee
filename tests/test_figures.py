"""Pictures: faces and their order, sizes, byte stability, bad input."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lib import figures
from lib.errors import StudyError


def chair(size=16):
    """A chair: four legs, a seat, a back; bool (size, size, size), z up."""
    grid = np.zeros((size, size, size), bool)
    low, high, seat = size // 5, size - size // 5, size // 2
    grid[low:high, low:high, seat : seat + 2] = True
    grid[low:high, high - 2 : high, seat:-1] = True
    for x in (low, high - 2):
        for y in (low, high - 2):
            grid[x : x + 2, y : y + 2, :seat] = True
    return grid


@pytest.fixture
def shapes():
    return np.stack([chair(), chair()[::-1], chair().transpose(1, 0, 2)])


def brute_cover(grid, points):
    """March from each point of the image plane towards the scene; return the first voxel hit."""
    right, up, eye = figures.camera()
    depths = np.arange(3 * len(grid), -3 * len(grid), -0.005)
    hits = []
    for a, b in points:
        line = a * right + b * up + depths[:, None] * eye
        cells = np.floor(line).astype(int)
        inside = ((cells >= 0) & (cells < len(grid))).all(1)
        cells = cells[inside]
        filled = np.flatnonzero(grid[tuple(cells.T)])
        hits.append(tuple(cells[filled[0]].tolist()) if len(filled) else None)
    return hits


def painted_cover(grid, points):
    """Return the voxel of the last painted face over each point of the image plane."""
    corners, _, voxels = figures.visible_faces(grid)
    right, up, _ = figures.camera()
    flat = np.stack([corners @ right, corners @ up], -1)
    edge = np.roll(flat, -1, axis=1) - flat
    hits = []
    for point in points:
        to = point - flat
        side = edge[..., 0] * to[..., 1] - edge[..., 1] * to[..., 0]
        over = np.flatnonzero((side > 0).all(1) | (side < 0).all(1))
        hits.append(tuple(voxels[over[-1]].tolist()) if len(over) else None)
    return hits


# ---------------------------------------------------------------- the renderer


def test_camera_is_orthonormal_and_looks_down():
    frame = np.stack(figures.camera())
    np.testing.assert_allclose(frame @ frame.T, np.eye(3), atol=1e-12)
    right, up, eye = frame
    assert right[2] == 0 and up[2] > 0 and eye[2] == pytest.approx(np.sin(np.deg2rad(25)))


@pytest.mark.parametrize("side", [1, 3])
def test_a_cube_shows_three_sides(side):
    grid = np.zeros((5, 5, 5), bool)
    grid[1 : 1 + side, 1 : 1 + side, 1 : 1 + side] = True
    corners, normals, voxels = figures.visible_faces(grid)
    assert corners.shape == (3 * side**2, 4, 3)
    seen, count = np.unique(normals, axis=0, return_counts=True)
    assert seen.tolist() == [[-1, 0, 0], [0, -1, 0], [0, 0, 1]] and set(count) == {side**2}
    # A face lies half a voxel from the centre of its voxel, along its normal.
    np.testing.assert_array_equal(corners.mean(1), voxels + 0.5 + normals / 2)


def test_faces_come_far_to_near():
    _, _, voxels = figures.visible_faces(chair())
    depth = voxels @ figures.camera()[2]
    assert (np.diff(depth) >= 0).all() and np.ptp(depth) > 5


def test_a_nearer_voxel_is_painted_later():
    eye = figures.camera()[2]
    grid = np.zeros((6, 6, 6), bool)
    near, far = (4, 1, 4), (1, 4, 1)
    grid[near] = grid[far] = True
    _, _, voxels = figures.visible_faces(grid)
    assert np.dot(near, eye) > np.dot(far, eye)
    assert [tuple(v) for v in voxels.tolist()] == [far] * 3 + [near] * 3


def test_painting_agrees_with_ray_casting():
    rng = np.random.default_rng(5)
    grid = rng.random((6, 6, 6)) < 0.25
    right, up, _ = figures.camera()
    points = rng.uniform(0, 6, (150, 3)) @ np.stack([right, up], 1)
    cast, painted = brute_cover(grid, points), painted_cover(grid, points)
    # The march steps over corners thinner than its step: a hit at a grazed edge may differ.
    same = sum(a == b for a, b in zip(cast, painted, strict=True))
    assert same >= 149 and sum(hit is not None for hit in painted) > 100


def test_top_is_lightest_and_hollows_are_darker():
    grid = np.zeros((9, 9, 9), bool)
    grid[1:8, 1:8, 1:4] = True
    grid[4, 4, 3] = False  # a pit of one voxel
    _, normals, voxels = figures.visible_faces(grid)
    light = figures._shades(grid, normals, voxels, "#5b84b1").sum(1)
    top = normals[:, 2] == 1
    pit = top & (voxels == (4, 4, 2)).all(1)
    middle = top & (voxels == (2, 2, 3)).all(1)
    assert light[pit] < light[middle]
    assert light[top & ~pit].min() > light[normals[:, 1] == -1].max()
    assert light[normals[:, 1] == -1].mean() > light[normals[:, 0] == -1].mean()


# ---------------------------------------------------------------- changed voxels


def test_marked_voxels_are_red_and_nothing_else_is(shapes):
    grid, mark = shapes[0], np.zeros_like(shapes[0])
    mark[:, :, 8:] = True
    axes = figures.Picture(2, 2).subplots()
    faces = figures.draw_shape(axes, grid, marks=mark.astype(int))
    plain = figures.draw_shape(axes, grid)
    voxels = figures.visible_faces(grid)[2]
    red = mark[tuple(voxels.T)]
    ours, theirs = faces.get_facecolor(), plain.get_facecolor()
    np.testing.assert_array_equal(ours[~red], theirs[~red])
    assert red.any() and (ours[red, 0] > 1.5 * ours[red, 2]).all()


def test_marks_that_fit_no_row_are_refused(shapes):
    with pytest.raises(StudyError, match="no row 'b'"):
        figures.gallery({"a": shapes}, marks={"b": shapes})
    with pytest.raises(StudyError, match="2 marks for 3 shapes"):
        figures.gallery({"a": shapes}, marks={"a": shapes[:2]})


# ---------------------------------------------------------------- static pictures


def test_changed_voxels_are_kept_and_marked(shapes):
    after = shapes.copy()
    after[0, 0, 0, 0] = True
    gone = tuple(np.argwhere(shapes[0])[0])
    after[(0, *gone)] = False
    union, marks = figures.changed(shapes, after)
    assert (union == (shapes | after)).all()
    assert marks[0, 0, 0, 0] == 1 and marks[(0, *gone)] == 2 and (marks != 0).sum() == 2


def test_marks_colour_their_voxels_alone(shapes):
    """In the picture and in the viewer; without a change both are as they were."""
    marks = np.zeros(shapes.shape, np.int8)
    plain = figures.gallery({"a": shapes})
    assert figures.png_bytes(figures.gallery({"a": shapes}, marks={"a": marks})) == (
        figures.png_bytes(plain)
    )
    grid = np.zeros((1, 4, 4, 4), bool)
    grid[0, 1, 1, 1] = grid[0, 1, 1, 2] = True
    marks = np.where(grid, 0, 0)
    marks[0, 1, 1, 2] = 1
    mesh = figures.viewer(grid, marks=marks).data[0]
    colours = list(mesh.facecolor)
    assert len(colours) == len(mesh.i) == 20 and colours.count(figures.ADDED) == 10
    for triangle, colour in enumerate(colours):
        corners = [mesh.z[getattr(mesh, axis)[triangle]] for axis in "ijk"]
        assert (min(corners) >= 2) <= (colour == figures.ADDED) <= (max(corners) >= 2)
    assert figures.viewer(grid).data[0].facecolor is None


def test_error_curves_and_surfaces_repeat():
    table = pd.DataFrame(
        {"kind": list("aabb"), "row": "x", "budget": [1, 2, 1, 2], "value": 0.5, "low": 0.4}
        | {"high": 0.6}
    )
    one = figures.error_curves(table, log=("a",), xlabel="voxels")
    assert [p.get_xscale() for p in one.axes] == ["log", "linear"]
    assert figures.png_bytes(one) == figures.png_bytes(
        figures.error_curves(table, log=("a",), xlabel="voxels")
    )
    flat = {"flat": np.ones((3, 3)), "tilted": np.arange(9.0).reshape(3, 3)}
    two = figures.surfaces(flat, [-1, 0, 1], xlabel="x", ylabel="y", title="loss")
    assert figures.png_bytes(two) == figures.png_bytes(
        figures.surfaces(flat, [-1, 0, 1], xlabel="x", ylabel="y", title="loss")
    )


# ---------------------------------------------------------------- static pictures


def faces_drawn(figure):
    return [len(faces.get_paths()) for faces in figure.axes[0].collections]


def test_gallery_draws_every_visible_face_inside_its_cell(shapes):
    figure = figures.gallery({"real": shapes, "ours": shapes[:2]}, columns=2)
    expected = [len(figures.visible_faces(g)[0]) for g in [*shapes, *shapes[:2]]]
    assert faces_drawn(figure) == expected
    centres = []
    for faces in figure.axes[0].collections:
        points = np.concatenate([path.vertices for path in faces.get_paths()])
        assert np.ptp(points, axis=0).max() == pytest.approx(0.92)
        centres.append((points.min(0) + points.max(0)) / 2)
    centres = np.array(centres)
    np.testing.assert_allclose(centres[:, 0], [0.5, 1.5, 0.5, 0.5, 1.5])
    assert centres[0, 1] > centres[2, 1] > centres[3, 1]  # later rows lie lower


def test_specks_look_like_specks():
    """Of three shapes the smallest is drawn in the scale of the middle one, the others fill."""
    grids = np.zeros((3, 8, 8, 8), bool)
    grids[0, 3, 3, 3], grids[1, :4, :4, :4], grids[2] = True, True, True

    def sizes(**options):
        faces = figures.gallery({"a": grids}, **options).axes[0].collections
        return [np.ptp(np.concatenate([p.vertices for p in f.get_paths()]), 0).max() for f in faces]

    assert sizes() == pytest.approx([0.92 / 4, 0.92, 0.92])
    assert sizes(same_scale=True) == pytest.approx([0.92 / 8, 0.92 / 2, 0.92])


def test_gallery_texts_and_empty_grids(shapes):
    shapes[1] = False
    figure = figures.gallery(
        {"ours": shapes}, titles=["a", "b", "c"], captions={"ours": ["IoU .83", "", "IoU .91"]}
    )
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"ours", "a", "c", "IoU .83", "IoU .91", "empty"} <= texts
    assert len(faces_drawn(figure)) == 2


def test_neighbours_share_a_scale(shapes):
    small = np.zeros_like(shapes)
    small[:, 6:9, 6:9, 6:9] = True
    figure = figures.neighbours_figure(shapes, small, ["d = 1", "d = 2", "d = 3"])
    sizes = [
        np.ptp(np.concatenate([p.vertices for p in c.get_paths()]), axis=0).max()
        for c in figure.axes[0].collections
    ]
    assert max(sizes[:3]) == pytest.approx(0.92) and max(sizes[3:]) < 0.5
    assert "d = 2" in {text.get_text() for text in figure.axes[0].texts}


def test_png_is_stable_and_carries_no_origin(shapes):
    first, second = (figures.png_bytes(figures.gallery({"a": shapes})) for _ in range(2))
    assert first == second
    assert b"tEXt" not in first and b"tIME" not in first and b"Matplotlib" not in first


def test_the_style_stays_inside(shapes):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.gallery({"a": shapes[:1]})
    figures.histogram({"a": [1.0, 2.0]})
    assert dict(matplotlib.rcParams) == before


def test_save_writes_picture_and_data(tmp_path, shapes):
    data = pd.DataFrame({"x": [1, 2], "y": [0.1, np.nan]})
    paths = figures.save(figures.gallery({"a": shapes}), tmp_path / "new" / "fig1.5_a", data)
    assert [p.name for p in paths] == ["fig1.5_a.png", "fig1.5_a.csv"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[1].read_bytes() == b"x,y\n1,0.1\n2,\n"
    assert len(list(paths[0].parent.iterdir())) == 2


# ---------------------------------------------------------------- the viewer


def test_viewer_mesh_is_the_surface():
    grid = np.zeros((1, 4, 4, 4), bool)
    grid[0, 1:3, 1:3, 1:3] = True
    (mesh,) = figures.viewer(grid).data
    assert len(mesh.i) == 2 * 24 and len(mesh.x) == 26
    assert mesh.x.dtype == mesh.i.dtype == np.uint8
    points = np.stack([mesh.x, mesh.y, mesh.z], 1).astype(float)
    a, b, c = points[mesh.i], points[mesh.j], points[mesh.k]
    # Outward triangles enclose the volume with a positive sign.
    assert (np.cross(a, b) * c).sum() / 6 == pytest.approx(8.0)


def test_viewer_shows_one_shape_at_a_time(shapes):
    figure = figures.viewer(shapes, ["a", "b", "c"])
    assert [mesh.visible for mesh in figure.data] == [None, False, False]
    (menu,) = figure.layout.updatemenus
    assert [b.label for b in menu.buttons] == ["a", "b", "c"]
    assert menu.buttons[2].args[0]["visible"] == [False, False, True]
    assert not figures.viewer(shapes[:1]).layout.updatemenus


def test_viewer_is_compact_and_stable():
    one = chair(32)[None]
    four = np.repeat(one, 4, 0)
    assert len(figures.figure_json(figures.viewer(one))) < 60 * 1024
    assert len(figures.figure_json(figures.viewer(four))) < 200 * 1024
    first, second = (figures.figure_json(figures.viewer(four)) for _ in range(2))
    assert first == second and '"uid"' not in first


def test_viewer_keeps_an_empty_grid():
    (mesh,) = figures.viewer(np.zeros((1, 8, 8, 8), bool)).data
    assert len(mesh.i) == 0 and len(mesh.x) == 0


def test_page_needs_no_network_and_is_stable(tmp_path, shapes):
    parts = {"a </script> & b": figures.viewer(shapes, ["</script>", "b", "c"])}
    path = figures.page(tmp_path / "site" / "shapes.html", parts, "Shapes")
    first = path.read_bytes()
    assert figures.page(path, parts, "Shapes").read_bytes() == first
    assert sorted(p.name for p in path.parent.iterdir()) == ["plotly.min.js", "shapes.html"]
    text = first.decode()
    assert "http" not in text and text.count("</script>") == 2
    assert 'src="plotly.min.js"' in text and 'id="figure-1"' in text


def test_display_is_a_picture_and_a_viewer(monkeypatch, shapes):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: shown.append(data))
    figures.display_shapes(shapes, ["a", "b", "c"])
    figures.display_shapes(shapes, ["a", "b", "c"])
    assert shown[:2] == shown[2:]
    picture, turnable = shown[:2]
    assert picture["image/png"].startswith(b"\x89PNG")
    plot = json.loads(json.dumps(turnable["application/vnd.plotly.v1+json"]))
    assert len(plot["data"]) == 3 and plot["data"][0]["x"]["dtype"] == "u1"


# ---------------------------------------------------------------- charts


def test_curves_draw_a_line_a_group():
    table = pd.DataFrame({"step": [0, 1, 0, 1], "loss": [4, np.nan, 2, 1], "m": list("aabb")})
    figure = figures.curves(table, ["loss"], by="m", log=["loss"])
    (axes,) = figure.axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 4]], [[0, 2], [1, 1]]]
    assert axes.get_yscale() == "log"
    plain = figures.curves({"step": [0, 1], "a": [1, 2], "b": [1, 2]}, ["a", "b"])
    assert [axes.get_title(loc="left") for axes in plain.axes] == ["a", "b"]


def test_intervals_and_anchors():
    table = pd.DataFrame(
        {
            "row": ["ours", "noise", "ours"],
            "category": ["chair", "chair", "bed"],
            "metric": "fid",
            "value": [2.0, 9.0, 3.0],
            "low": [1.5, 8.0, np.nan],
            "high": [2.5, 9.5, np.nan],
            "published": [2.2, np.nan, np.nan],
        }
    )
    figure = figures.bars_with_intervals(table, "fid", anchors=["noise"])
    chairs, beds = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["chair", "bed"]
    assert chairs.lines[0].get_xdata().tolist() == [1.5, 2.5]
    assert chairs.lines[2].get_marker() == "D" and chairs.lines[2].get_xdata()[0] == 2.2
    assert chairs.lines[0].get_color() != chairs.lines[3].get_color() == "#a3a8b0"
    assert beds.lines[1].get_xdata()[0] == 3.0
    figures.png_bytes(figure)


def test_bars_leave_out_empty_cells_and_label_every_column():
    """An empty text is no published value; two columns of three panels have two labelled axes."""
    parts = {"row": "ours", "metric": "kid", "value": 0.2, "low": 0.1, "high": 0.3}
    rows = [parts | {"category": c, "published": ""} for c in ("bed", "chair", "sofa")]
    table = pd.DataFrame(rows)
    figure = figures.bars_with_intervals(table, "kid", columns=2, linear_to=0.1)
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "kid", "kid"]
    assert all(axes.get_xscale() == "symlog" for axes in figure.axes) and not figure.legends
    assert not [line for axes in figure.axes for line in axes.lines if line.get_marker() == "D"]
    alone = figures.bars_with_intervals(table[:1].assign(row="a row of a long name " * 3), "kid")
    assert alone.get_figwidth() > figure.get_figwidth()


def test_confusion_matrix_prints_entries_and_shades_shares():
    figure = figures.confusion_matrix(np.array([[8, 2], [0, 5]]), ["bed", "sofa"])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["8", "2", "5"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2], [0.0, 1.0]])


def test_histogram_uses_common_bins_and_densities():
    figure = figures.histogram({"a": [0.0, 1.0, 1.0], "b": [4.0]}, bins=4)
    fills = [patch.get_data() for patch in figure.axes[0].patches]
    assert all(fill.edges.tolist() == [0, 1, 2, 3, 4] for fill in fills)
    np.testing.assert_allclose(fills[0].values, [1 / 3, 2 / 3, 0, 0])


def test_strips_are_rows_of_dots_with_their_medians():
    figure = figures.strips({"real": [0.0, 1.0, 5.0], "noise": [-90.0]}, linear=2.0)
    (axes,) = figure.axes
    real, middle, noise, _ = axes.lines
    assert real.get_xdata().tolist() == [0, 1, 5] and noise.get_xdata().tolist() == [-90]
    assert len(set(real.get_ydata())) == 3 and np.ptp(real.get_ydata()) < 0.5
    assert middle.get_xdata().tolist() == [1, 1]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["real", "noise"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is on top
    assert axes.get_xscale() == "symlog"
    assert figures.strips({"real": [0.0]}).axes[0].get_xscale() == "linear"


def test_a_reliability_diagram_leaves_empty_bins_out():
    kind = [("n", int), ("confidence", float), ("accuracy", float)]
    bins = np.array([(0, np.nan, np.nan), (3, 0.6, 0.5), (1, 0.9, 1.0)], kind)
    figure = figures.reliability_diagram({"a": bins, "b": bins[1:]})
    line = figure.axes[0].lines[1]
    assert line.get_xdata().tolist() == [0.6, 0.9] and line.get_ydata().tolist() == [0.5, 1.0]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b"]


# ---------------------------------------------------------------- bad input

cubes = np.zeros((2, 4, 4, 4), bool)
rows = pd.DataFrame({"step": [0], "loss": [1.0]})
BAD = {
    "not four axes": lambda tmp: figures.gallery({"a": cubes[0]}),
    "not cubes": lambda tmp: figures.viewer(np.zeros((1, 4, 4, 5), bool)),
    "no shapes": lambda tmp: figures.viewer(cubes[:0]),
    "not thresholded": lambda tmp: figures.gallery({"a": cubes.astype(float)}),
    "no rows": lambda tmp: figures.gallery({}),
    "captions of another row": lambda tmp: figures.gallery({"a": cubes}, captions={"b": ["x"]}),
    "too few captions": lambda tmp: figures.gallery({"a": cubes}, captions={"a": ["x"]}),
    "too many titles": lambda tmp: figures.gallery({"a": cubes}, titles=["x"] * 3),
    "pairs that are none": lambda tmp: figures.neighbours_figure(cubes, cubes[:1], ["x", "y"]),
    "too few names": lambda tmp: figures.viewer(cubes, ["x"]),
    "names to display": lambda tmp: figures.display_shapes(cubes, ["x"]),
    "no answers": lambda tmp: figures.reliability_diagram({"a": np.zeros(2, [("n", int)])}),
    "empty page": lambda tmp: figures.page(tmp / "a.html", {}, "title"),
    "unknown column": lambda tmp: figures.curves(rows, ["gap"]),
    "no columns": lambda tmp: figures.curves(rows, []),
    "empty table": lambda tmp: figures.curves(rows[:0], ["loss"]),
    "table of another kind": lambda tmp: figures.bars_with_intervals(rows, "fid"),
    "matrix and names": lambda tmp: figures.confusion_matrix(np.eye(3), ["a", "b"]),
    "negative count": lambda tmp: figures.confusion_matrix(-np.eye(2), ["a", "b"]),
    "nothing to count": lambda tmp: figures.histogram({"a": []}),
    "not finite": lambda tmp: figures.histogram({"a": [1.0, np.nan]}),
    "no numbers": lambda tmp: figures.strips({"a": []}),
    "no linear middle": lambda tmp: figures.strips({"a": [1.0]}, linear=0.0),
    "pairs of two sizes": lambda tmp: figures.changed(cubes, cubes[:1]),
    "too few marks": lambda tmp: figures.viewer(cubes, marks=np.zeros((1, 4, 4, 4), int)),
    "marks of another row": lambda tmp: figures.gallery({"a": cubes}, marks={"b": cubes}),
    "curves without intervals": lambda tmp: figures.error_curves(rows),
    "surface of another size": lambda tmp: figures.surfaces({"a": np.eye(3)}, [0, 1]),
    "surface not finite": lambda tmp: figures.surfaces({"a": np.full((2, 2), np.nan)}, [0, 1]),
    "no surface": lambda tmp: figures.surfaces({}, [0, 1]),
    "suffix given": lambda tmp: figures.save(figures.histogram({"a": [1.0]}), tmp / "a.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, tmp_path):
    with pytest.raises(StudyError) as error:
        BAD[case](tmp_path)
    assert "\n" not in str(error.value) and ":" in str(error.value)


# ---------------------------------------------------------------- shares of the labels


def shares_table():
    lines = [
        dict(row=row, share=share, value=0.5 + k / 10 + share / 5, low=0.4 + k / 10, high=0.9)
        for k, row in enumerate(["ours", "raw voxels"])
        for share in (1.0, 0.01, 0.1)
    ]
    return pd.DataFrame(lines)


def test_label_curves_draw_every_row_in_order_of_shares():
    table = shares_table()
    figure = figures.label_curves(table, label="accuracy")
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1 %", "10 %", "100 %"]
    assert axes.get_xscale() == "log"
    lines = [container.lines[0] for container in axes.containers]
    assert len(lines) == 2
    for name, line in zip(("ours", "raw voxels"), lines, strict=True):
        own = table[table["row"] == name].sort_values("share")
        assert line.get_ydata().tolist() == own["value"].tolist()
        x = np.asarray(line.get_xdata(), float)
        assert (np.abs(np.log(x / own["share"].to_numpy())) < 0.1).all()
    assert figures.png_bytes(figure) == figures.png_bytes(figures.label_curves(table))


def test_label_curves_name_what_is_missing():
    with pytest.raises(StudyError, match="label_curves: no column share"):
        figures.label_curves(shares_table().drop(columns="share"))
    with pytest.raises(StudyError, match="label_curves: the table has no rows"):
        figures.label_curves(shares_table()[:0])


# ---------------------------------------------------------------- files


def test_pictures_keep_their_looks_in_fewer_bytes():
    picture = figures.gallery({"noise": np.random.default_rng(0).random((4, 12, 12, 12)) < 0.3})
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=figures.DPI)
    full, few = buffer.getvalue(), figures.png_bytes(picture)
    assert len(few) < len(full) / 2
    was, shown = (np.asarray(Image.open(io.BytesIO(p)).convert("RGB"), int) for p in (full, few))
    assert np.abs(shown - was).mean() < 2 and np.abs(shown - was).max() < 64
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) <= 256
    assert figures.few_colours(few) == few


def test_pictures_that_can_be_seen_through_or_are_small_stay():
    clear = Image.fromarray(np.zeros((20, 20, 4), np.uint8))
    plain = Image.fromarray(np.zeros((4, 4), np.uint8)).convert("1")
    for picture in (clear, plain):
        buffer = io.BytesIO()
        picture.save(buffer, "png", optimize=True)
        assert figures.few_colours(buffer.getvalue()) == buffer.getvalue()
