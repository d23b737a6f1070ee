"""The data: what they hold, how they are split, what is refused, who may see the test split."""

import ast
import hashlib

import numpy as np
import pytest

from lib import config, data, files, heldout, metrics, paths, voxel
from lib.errors import StudyError
from lib.train import engine, runs

TRAIN = (106, 515, 889, 200, 200, 465, 200, 680, 392, 344)
TEST = (50, 100, 100, 86, 86, 100, 86, 100, 100, 100)
HASH = "c9c0da779e64c9de"


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- overlaps and the validation split


def dense_iou(a, b):
    """Every pair, voxel by voxel, in integers."""
    return np.array([[(x & y).sum() / max((x | y).sum(), 1) for y in b] for x in a])


def flat_shapes(rng, n, side=6):
    """Blobs of many sizes with copies that differ in a few voxels."""
    base = rng.random((n, side**3)) < rng.uniform(0.02, 0.6, (n, 1))
    near = base ^ (rng.random(base.shape) < 0.01)
    return np.concatenate([base, near])


@pytest.mark.parametrize("least", [0.5, 0.9, 0.95, 1.0])
def test_overlaps_equals_the_dense_comparison(least):
    rng = np.random.default_rng(int(100 * least))
    a, b = flat_shapes(rng, 150), flat_shapes(rng, 40)
    b[:30] = a[rng.choice(len(a), 30, replace=False)]
    expected = dense_iou(a, b)
    i, j, iou = data.overlaps(a, b, least)
    assert len(set(zip(i, j, strict=True))) == len(i) == (expected >= least).sum() > 0
    np.testing.assert_allclose(iou, expected[i, j], rtol=1e-6)


def test_overlaps_of_nothing():
    a = np.eye(3, 8, dtype=bool)
    i, j, iou = data.overlaps(a, np.roll(a, 4, axis=1), 0.9)
    assert len(i) == len(j) == len(iou) == 0
    assert (data.highest_overlap(3, (i, j, iou)) == 0).all()
    empty = np.zeros((2, 8), bool)
    assert len(data.overlaps(empty, a, 0.9)[0]) == 0


def test_highest_overlap_takes_the_largest():
    pairs = np.array([0, 2, 0]), np.array([1, 1, 2]), np.array([0.91, 0.95, 0.99], np.float32)
    np.testing.assert_array_equal(data.highest_overlap(3, pairs), np.float32([0.99, 0, 0.95]))


def links(pairs):
    """Both directions of links of IoU 1 between rows."""
    i, j = np.array(pairs).T
    return np.r_[i, j], np.r_[j, i], np.ones(2 * len(pairs), np.float32)


def test_validation_is_stratified_and_keeps_linked_shapes_together():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 100)
    pairs = rng.choice(1000, (80, 2), replace=False)
    chosen = data.split_validation(labels, links(pairs), 0.1, seed=0)
    assert (chosen[pairs[:, 0]] == chosen[pairs[:, 1]]).all()
    per_category = np.bincount(labels[chosen], minlength=10)
    assert ((per_category >= 9) & (per_category <= 10)).all()
    assert chosen[pairs[:, 0]].any() and not chosen[pairs[:, 0]].all()


def test_validation_depends_on_its_seed_alone():
    labels = np.repeat(np.arange(10), 50)
    pairs = links([(0, 1)])
    first = data.split_validation(labels, pairs, 0.1, seed=0)
    np.testing.assert_array_equal(first, data.split_validation(labels, pairs, 0.1, seed=0))
    assert (first != data.split_validation(labels, pairs, 0.1, seed=1)).any()
    assert 45 <= data.split_validation(labels, pairs, 0.1, seed=1).sum() <= 50


def test_shapes_below_the_threshold_are_not_linked():
    labels = np.zeros(40, int)
    i = np.repeat(np.arange(40), 40)
    j = np.tile(np.arange(40), 40)
    weak = data.split_validation(labels, (i, j, np.full(1600, 0.94)), 0.25, seed=0)
    assert weak.sum() == 10
    strong = data.split_validation(labels, (i, j, np.full(1600, 0.96)), 0.25, seed=0)
    assert strong.sum() == 0


# ---------------------------------------------------------------- prepared smoke data


def test_the_smoke_shapes(workspace, smoke):
    card = data.card(smoke.data)
    train, test = data.load_train(smoke.data), heldout.load_test(smoke.data)
    assert train.voxels.shape == (240, 30, 30, 30) and train.voxels.dtype == bool
    assert np.bincount(train.labels).tolist() == [24] * 10
    assert np.bincount(test.labels).tolist() == [12] * 10
    assert not test.validation.any()
    assert 0.05 < train.validation.mean() < 0.12
    assert {c: n["validation"] for c, n in card["counts"].items()} == {
        c: int(train.category(c).validation.sum()) for c in config.CATEGORIES
    }
    inner = train.voxels[:, 3:27, 3:27, 3:27]
    assert inner.sum() == train.voxels.sum()


def test_duplicates_in_the_smoke_data_are_those_of_a_dense_comparison(workspace, smoke):
    train, test = data.load_train(smoke.data), heldout.load_test(smoke.data)
    a = test.voxels.reshape(len(test.labels), -1).astype(np.int64)
    b = train.voxels.reshape(len(train.labels), -1).astype(np.int64)
    both = a @ b.T
    iou = both / (a.sum(1)[:, None] + b.sum(1) - both)
    expected = np.where(iou.max(1) >= 0.9, iou.max(1), 0)
    np.testing.assert_allclose(test.duplicate, expected, rtol=1e-6)


def test_preparing_twice_gives_the_same_bytes(workspace, smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PREPARED", tmp_path)
    data.prepare(smoke.data)
    for name in ("train.npz", "test.npz", "card.json"):
        assert files.sha256(tmp_path / "tiny" / name) == files.sha256(
            workspace / "data" / "prepared" / "tiny" / name
        )


def test_the_reference_is_one_category_without_empty_grids(workspace, smoke, monkeypatch):
    split = heldout.load_test(smoke.data)
    emptied = split.voxels.copy()
    emptied[np.flatnonzero(split.labels == 2)[0]] = False
    changed = data.Split(emptied, split.labels, split.ids, split.validation, split.duplicate)
    monkeypatch.setattr(heldout, "load_test", lambda settings: changed)
    found = heldout.reference(smoke.data, "chair")
    assert len(found.labels) == 11 and (found.labels == 2).all()
    assert found.voxels.any((1, 2, 3)).all()


def test_data_of_another_profile_are_refused(workspace, smoke):
    for change in ({"seed": 1}, {"source": "off"}):
        with pytest.raises(StudyError, match="card.json: made with .* prepare it again") as error:
            data.load_train(config.with_changes(smoke, data=change).data)
        one_line(error)
    with pytest.raises(StudyError, match="data/prepared/nothing is missing; run") as error:
        data.load_train(config.with_changes(smoke, data={"name": "nothing"}).data)
    one_line(error)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04damage"])
def test_damaged_prepared_data_are_refused(smoke, tmp_path, monkeypatch, workspace, content):
    monkeypatch.setattr(paths, "PREPARED", tmp_path)
    files.write_bytes(
        tmp_path / "tiny" / "card.json",
        (workspace / "data" / "prepared" / "tiny" / "card.json").read_bytes(),
    )
    (tmp_path / "tiny" / "train.npz").write_bytes(content)
    with pytest.raises(StudyError, match="train.npz: not a readable .npz") as error:
        data.load_train(smoke.data)
    one_line(error)


def test_model_grids_lose_nothing(workspace, smoke):
    voxels = data.load_train(smoke.data).voxels[:20]
    tight, padded = data.model_grid(voxels, 24), data.model_grid(voxels, 32)
    assert tight.shape == (20, 24, 24, 24) and padded.shape == (20, 32, 32, 32)
    np.testing.assert_array_equal(voxel.pad(tight, 3), voxels)
    np.testing.assert_array_equal(voxel.crop(padded, 1), voxels)
    for side, grids in ((24, tight), (32, padded)):
        back = voxel.to_judge_grid(grids, layout=data.layout_of(side), extra_sides=(24,))
        np.testing.assert_array_equal(back, voxels)


# ---------------------------------------------------------------- sources


def test_fetch_refuses_missing_and_other_files(workspace, tmp_path):
    with pytest.raises(StudyError, match="no such file; give a copy of modelnet10.npz") as error:
        data.fetch(tmp_path / "no.npz")
    one_line(error)
    with pytest.raises(StudyError, match="modelnet10.npz: no such file"):
        data.fetch(tmp_path)
    (tmp_path / "modelnet10.npz").write_bytes(b"something else")
    for source in (tmp_path, tmp_path / "modelnet10.npz"):
        with pytest.raises(StudyError, match="expected 85fb9d01bbaa...; this is another") as error:
            data.fetch(source)
        one_line(error)
    assert not (paths.RAW / "modelnet10.npz").exists()


def test_fetch_takes_the_right_file(workspace, tmp_path, monkeypatch):
    content = b"pretend"
    source = (data.MODELNET10, hashlib.sha256(content).hexdigest(), data.MODELNET10_URL)
    monkeypatch.setitem(data.SOURCES, "modelnet10", source)
    monkeypatch.setattr(paths, "RAW", tmp_path / "raw")
    (tmp_path / "modelnet10.npz").write_bytes(content)
    assert data.fetch(tmp_path).read_bytes() == content


def test_fetch_without_a_network(workspace, monkeypatch):
    address = "http://127.0.0.1:9/modelnet10.npz"
    source = (data.MODELNET10, data.MODELNET10_SHA256, address)
    monkeypatch.setitem(data.SOURCES, "modelnet10", source)
    with pytest.raises(StudyError, match="not reachable .*fetch modelnet10 --from PATH") as error:
        data.fetch()
    one_line(error)


def test_raw_file_missing_or_damaged(workspace, tmp_path):
    with pytest.raises(StudyError, match="is missing; run `python -m lib fetch`") as error:
        data.read_modelnet10(tmp_path / "modelnet10.npz")
    one_line(error)
    (tmp_path / "modelnet10.npz").write_bytes(b"PK")
    with pytest.raises(StudyError, match="is damaged; delete it and run") as error:
        data.read_modelnet10(tmp_path / "modelnet10.npz")
    one_line(error)


def box_off(a, b, c):
    """A box of these lengths as OFF text."""
    corners = [(x, y, z) for x in (0, a) for y in (0, b) for z in (0, c)]
    sides = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    lines = ["OFF", "8 6 0", *(f"{x} {y} {z}" for x, y, z in corners)]
    return "\n".join([*lines, *("4 " + " ".join(map(str, s)) for s in sides)]) + "\n"


@pytest.fixture
def meshes(workspace, tmp_path, monkeypatch):
    """Boxes in the layout of ModelNet10.zip: eight to train and two to test a category."""
    folder = tmp_path / "raw" / "ModelNet10"
    monkeypatch.setattr(paths, "RAW", tmp_path / "raw")
    monkeypatch.setattr(paths, "PREPARED", tmp_path / "prepared")
    for label, category in enumerate(config.CATEGORIES):
        for number in range(10):
            split = "train" if number < 8 else "test"
            place = folder / category / split / f"{category}_{number:04d}.off"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(box_off(24, 2 + 2 * label, 3 + 2 * number))
    return folder


def test_a_folder_of_meshes(meshes, smoke):
    settings = config.with_changes(smoke, data={"name": "boxes", "source": "off"}).data
    card = data.prepare(settings)
    assert card["counts"]["sofa"]["train"] == 8 and card["counts"]["sofa"]["test"] == 2
    train = data.load_train(settings)
    np.testing.assert_array_equal(train.labels, np.arange(10).repeat(8))
    for row in (0, 5, 79):
        label, number = divmod(row, 8)
        category = config.CATEGORIES[label]
        mesh = meshes / category / "train" / f"{category}_{number:04d}.off"
        np.testing.assert_array_equal(
            train.voxels[row], voxel.modelnet_layout(*voxel.read_off(mesh))
        )


def test_a_folder_of_meshes_with_holes(meshes, smoke):
    settings = config.with_changes(smoke, data={"name": "boxes", "source": "off"}).data
    bad = meshes / "desk" / "train" / "desk_0003.off"
    bad.write_text("OFF\n8 6 0\n0 0")
    with pytest.raises(StudyError, match="desk_0003.off") as error:
        data.prepare(settings)
    one_line(error)
    for mesh in (meshes / "desk" / "test").iterdir():
        mesh.unlink()
    with pytest.raises(StudyError, match="desk/test holds no .off file; unpack") as error:
        data.prepare(settings)
    one_line(error)
    assert not list(paths.PREPARED.glob("**/*.npz"))


# ---------------------------------------------------------------- who may see the test split


def imports_of(file):
    """Dotted names that a module of this repository imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "lib"}


def module_file(name):
    stem = paths.CODE / name.replace(".", "/")
    return next((f for f in (stem.with_suffix(".py"), stem / "__init__.py") if f.is_file()), None)


def uses_of(file):
    """``imports_of``; in place of lib.metrics, which only re-exports, the modules behind it."""
    nodes = ast.walk(ast.parse(file.read_text()))
    attributes = (node for node in nodes if isinstance(node, ast.Attribute))
    used = {a.attr for a in attributes if getattr(a.value, "id", "") == "metrics"}
    behind = {getattr(metrics, name).__module__ for name in used}
    # Imported in another way, the whole package counts.
    return imports_of(file) - {"lib.metrics"} | behind if behind else imports_of(file)


def reachable(start, follow=imports_of):
    """Files that importing ``start`` can load, by the text of the imports."""
    todo, seen = [start], set()
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += [f for f in map(module_file, follow(file)) if f]
    return {str(f.relative_to(paths.CODE)) for f in seen}


def test_training_code_never_imports_the_test_split():
    assert "lib/heldout.py" in reachable(paths.CODE / "lib" / "evaluate.py")
    for file in sorted((paths.CODE / "lib" / "train").glob("*.py")):
        found = reachable(file)
        assert "lib/heldout.py" not in found and "lib/evaluate.py" not in found, file


def test_training_code_never_names_the_test_split():
    """``data.load_split`` could open it too; outside heldout only ``load_train`` calls it."""
    calls = {
        str(file.relative_to(paths.CODE))
        for file in paths.CODE.glob("lib/**/*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "load_split"
    }
    assert calls == {"lib/heldout.py"}


def test_every_module_that_decides_training_is_in_a_recipe():
    """What lib.train.<model> reaches is hashed, or decides no number of the training."""
    neutral = {"errors", "paths", "files", "config", "device", "__init__", "voxel", "furniture"}
    neutral = {f"lib/{n}.py" for n in neutral} | {"lib/models/__init__.py", "lib/train/__init__.py"}
    neutral |= {"lib/train/checkpoint.py", "lib/metrics/_checks.py"}
    for name in runs.MODELS:
        hashed = {*runs.model(name).modules, *engine.SHARED_MODULES}
        reached = reachable(paths.CODE / "lib" / "train" / f"{name}.py", uses_of)
        assert reached - neutral <= hashed <= reached


# ---------------------------------------------------------------- the real data


@pytest.fixture(scope="module")
def real(modelnet10, tmp_path_factory):
    """ModelNet10, prepared once in a folder of its own: settings, card, train and test."""
    settings = config.load("study").data
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RAW", folder / "raw")
        patch.setattr(paths, "PREPARED", folder / "prepared")
        data.fetch(modelnet10)
        card = data.prepare(settings)
        return settings, card, data.load_train(settings), heldout.load_test(settings)


@pytest.mark.real
def test_real_counts(real):
    _, card, train, test = real
    empty = [6, 15, 21, 24, 60, 3392, 3857]
    assert card["empty"] == {"train": empty, "test": [304]}
    labels = np.arange(10).repeat(TRAIN)
    np.testing.assert_array_equal(train.labels, np.delete(labels, empty))
    np.testing.assert_array_equal(train.ids, np.delete(np.arange(3991), empty))
    np.testing.assert_array_equal(test.labels, np.arange(10).repeat(TEST))
    assert card["distinct training grids"] == 3800


@pytest.mark.real
def test_real_duplicates(real):
    _, card, train, test = real
    exact = test.duplicate == 1
    assert exact.sum() == card["test equal to a training shape"] == 71
    per_category = np.bincount(test.labels[exact], minlength=10)
    named = dict(zip(config.CATEGORIES, per_category.tolist(), strict=True))
    expected = {"toilet": 17, "dresser": 13, "chair": 11, "night_stand": 8, "sofa": 7}
    assert {c: named[c] for c in expected} == expected
    assert named["bed"] == named["monitor"] == 5
    known = {x.tobytes() for x in np.packbits(train.voxels.reshape(len(train.ids), -1), axis=1)}
    packed = np.packbits(test.voxels.reshape(908, -1), axis=1)
    np.testing.assert_array_equal(exact, [x.tobytes() in known for x in packed])
    assert card["counts"]["toilet"]["test equal to a training shape"] == 17


@pytest.mark.real
def test_real_occupancy(real):
    test = real[3]
    grids = data.model_grid(test.voxels, 32)
    # The 3D ShapeNets volumes, made by another voxeliser, have a mean of .066.
    assert grids.mean() == pytest.approx(0.0704, abs=1e-4)
    expected = (0.0454, 0.0667, 0.0365, 0.0463, 0.151, 0.0529, 0.149, 0.0515, 0.0237, 0.0874)
    found = [grids[test.labels == k].mean() for k in range(10)]
    np.testing.assert_allclose(found, expected, atol=6e-4)
    assert test.voxels[:, 3:27, 3:27, 3:27].sum() == test.voxels.sum()


@pytest.mark.real
def test_real_validation(real):
    _, _, train, _ = real
    share = [train.validation[train.labels == k].mean() for k in range(10)]
    np.testing.assert_allclose(share, 0.1, atol=0.01)
    flat = train.voxels.reshape(len(train.ids), -1)
    i, j, _ = data.overlaps(flat, flat, 0.95)
    assert (i != j).sum() > 100
    assert (train.validation[i] == train.validation[j]).all()


@pytest.mark.real
def test_real_runs_of_this_checkout_were_trained_on_these_data(real):
    """The hash is part of every run's key; a change of the preparation would orphan them all."""
    assert real[1]["hash"].startswith(HASH)
