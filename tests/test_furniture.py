"""Procedural furniture: closed parts, the ModelNet10 layout and poses, seeds, and real variety."""

import numpy as np
import pytest
import trimesh
from scipy import ndimage

from lib import furniture
from lib.errors import StudyError
from lib.furniture import CATEGORIES, mesh, shapes

N = 24  # shapes a category in most tests


@pytest.fixture(scope="module")
def hundred():
    return {category: shapes(category, 100, seed=7) for category in CATEGORIES}


@pytest.fixture(scope="module")
def grids(hundred):
    return {category: voxels[:N] for category, voxels in hundred.items()}


def _solid(part):
    return trimesh.Trimesh(*part, process=False)


PRIMITIVES = {
    "box": (furniture.prism((0, 2), (0, 3), (0, 4)), 24.0),
    "leaning box": (furniture.prism((0, 2), (0, 3), (0, 4), lean=(1, -1)), 24.0),
    "pyramid stump": (furniture.prism((-1, 1), (-1, 1), (0, 3), taper=0.5), 7.0),
    "square rod": (furniture.rod((0, 0, 0), (3, 4, 12), (2, 1)), 26.0),
    "upright rod": (furniture.rod((1, 1, 5), (1, 1, 0), (2, 1)), 10.0),
    "cylinder": (furniture.prism((-1, 1), (-1, 1), (0, 2), sides=64), 2 * np.pi),
    "bowl": (furniture.bowl((-2, 2), (-3, 3), (0, 4), 1, 1, (60, 60), taper=1.0), 96 - 24),
    "arc": (furniture.arc((3, 3), 0, (0, 2), 1, 0.0, steps=64), np.pi * (9 - 4)),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive_is_closed_outward_and_of_known_volume(name):
    part, volume = PRIMITIVES[name]
    solid = _solid(part)
    assert solid.is_watertight and solid.is_winding_consistent
    assert solid.volume == pytest.approx(volume, rel=0.02)


@pytest.mark.parametrize("sides, power", [(4, 2.0), (8, 2.0), (16, 3.0), (24, 40.0)])
def test_outline_spans_the_size_and_is_convex(sides, power):
    polygon = furniture.outline((6, 2), sides, power)
    np.testing.assert_allclose(np.ptp(polygon, axis=0), (6, 2))
    step = np.roll(polygon, -1, axis=0) - polygon
    after = np.roll(step, -1, axis=0)
    assert (step[:, 0] * after[:, 1] - step[:, 1] * after[:, 0] > -1e-9).all()


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_part_is_closed_and_outward(category):
    for seed in range(12):
        vertices, faces = mesh(category, np.random.default_rng(seed))
        assert vertices.dtype == np.float64 and faces.dtype == np.int64
        assert np.isfinite(vertices).all() and vertices[:, 2].min() >= 0
        pieces = trimesh.Trimesh(vertices, faces, process=False).split(only_watertight=False)
        assert len(pieces) > 0
        for piece in pieces:
            assert piece.is_watertight and piece.is_winding_consistent and piece.volume > 0


def test_layout_is_that_of_modelnet(grids):
    for category, voxels in grids.items():
        assert voxels.shape == (N, 30, 30, 30) and voxels.dtype == bool
        inner = voxels[:, 3:27, 3:27, 3:27]
        assert inner.sum() == voxels.sum(), category
        for shape in voxels:
            assert np.ptp(np.argwhere(shape), axis=0).max() + 1 == 24


def test_shapes_are_whole_filled_and_of_sane_size(grids):
    for category, voxels in grids.items():
        occupancy = voxels.mean(axis=(1, 2, 3)) * (30 / 24) ** 3
        assert 0.02 < occupancy.min() and occupancy.max() < 0.95, category
        for shape in voxels[:12]:
            assert ndimage.label(shape, np.ones((3, 3, 3)))[1] == 1, category
            assert ndimage.binary_fill_holes(shape).sum() == shape.sum(), category


def test_each_category_keeps_its_pose(grids):
    place = np.arange(30) - 14.5
    for category, axis in (("chair", 1), ("bed", 1), ("toilet", 1), ("sofa", 0)):
        mean = grids[category].mean(axis=0)
        top = np.argwhere(mean.sum(axis=(0, 1)) > 0.1 * mean.sum(axis=(0, 1)).max()).max()
        high = mean[:, :, top - 2 :].sum(axis=(1 - axis, 2))
        assert high @ place > 3 * high.sum(), category  # backs, heads and tanks are at the far end
    assert all(s.any(axis=(1, 2)).sum() < s.any(axis=(0, 2)).sum() for s in grids["monitor"])
    below = grids["desk"][:, :, 11:19, 3:12].mean(axis=(0, 2, 3))
    assert below[8:11].mean() < below[17:20].mean()  # knees go in at -x


def test_deep_monitors_show_their_screen_to_minus_x(hundred):
    widths = hundred["monitor"][:, :, :, 16:].any(axis=3).sum(axis=2)  # (100, x)
    tubes = [width[width > 0] for width in widths if (width > 0).sum() > 8]
    assert len(tubes) > 5
    assert all(width[0] > width[-1] for width in tubes)


def test_seed_decides_and_shape_k_does_not_depend_on_n():
    for category in CATEGORIES:
        few, many = shapes(category, 2, seed=3), shapes(category, 5, seed=3)
        np.testing.assert_array_equal(few, many[:2])
        assert (shapes(category, 2, seed=4) != few).any(axis=(1, 2, 3)).all()


def test_mesh_is_deterministic():
    for category in CATEGORIES:
        first, second = (mesh(category, np.random.default_rng(5)) for _ in range(2))
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])


def test_shapes_are_distinct(hundred):
    for category, voxels in hundred.items():
        assert len({shape.tobytes() for shape in voxels}) > 95, category


def test_variety_within_a_category_is_real(grids):
    for category, voxels in grids.items():
        flat = voxels.reshape(N, -1).astype(np.float64)
        both = flat @ flat.T
        size = flat.sum(axis=1)
        iou = both / (size[:, None] + size - both)
        others = iou[~np.eye(N, dtype=bool)]
        assert others.mean() < 0.8, category
        assert others.min() < 0.5, category


def test_a_classifier_has_to_look_at_the_shape(grids):
    voxels = np.stack([grids[category].reshape(N, -1) for category in CATEGORIES])
    train, test = (voxels[:, part].reshape(-1, 27000) for part in (slice(0, 18), slice(18, N)))
    label = np.repeat(np.arange(10), 18)
    truth = np.repeat(np.arange(10), N - 18)

    both = test.astype(np.float32) @ train.T.astype(np.float32)
    iou = both / (test.sum(axis=1)[:, None] + train.sum(axis=1) - both)
    by_shape = (label[iou.argmax(axis=1)] == truth).mean()

    gap = np.abs(test.sum(axis=1)[:, None] - train.sum(axis=1))
    by_occupancy = (label[gap.argmin(axis=1)] == truth).mean()

    assert by_shape > 0.7
    assert by_occupancy < 0.45


@pytest.mark.parametrize(
    "call",
    [
        lambda: shapes("lamp", 1, seed=0),
        lambda: mesh("Chair", np.random.default_rng(0)),
    ],
)
def test_unknown_category_is_refused(call):
    with pytest.raises(StudyError, match="unknown category.*choose one of bathtub"):
        call()


def test_negative_count_is_refused_and_zero_is_empty():
    with pytest.raises(StudyError, match="n must be 0 or more"):
        shapes("bed", -1, seed=0)
    assert shapes("bed", 0, seed=0).shape == (0, 30, 30, 30)


def test_categories_are_alphabetical():
    assert list(CATEGORIES) == sorted(CATEGORIES) and len(CATEGORIES) == 10
