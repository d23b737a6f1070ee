"""Files are whole or absent, their bytes depend on their content alone, damage is recognised."""

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest

from lib import files
from lib.errors import StudyError


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(StudyError, match="No space left on device.*nothing was changed"):
        files.write_text(path, "new")
    with pytest.raises(StudyError, match="No space left"):
        files.write_text(tmp_path / "b.txt", "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StudyError, match="cannot be written"):
        files.write_text(tmp_path / "file" / "below.txt", "y")
    with pytest.raises(StudyError, match="cannot be written"):
        files.write_text(tmp_path, "y")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("path", ["/dev/null", "a\0b"])
def test_devices_and_impossible_names_are_refused(path):
    """Renaming a file over a device would replace it."""
    with pytest.raises(StudyError, match="cannot be written") as error:
        files.check_place(path)
    assert "\n" not in str(error.value)


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "a.txt", "x")
    assert list(tmp_path.iterdir()) == []


def test_parents_are_made_and_others_may_read(tmp_path):
    files.write_json(tmp_path / "a" / "b.json", {"z": 1, "a": [1.5, None]})
    assert (tmp_path / "a" / "b.json").read_text().index('"a"') == 3
    assert (tmp_path / "a" / "b.json").stat().st_mode & 0o777 == 0o644
    assert files.read_json(tmp_path / "a" / "b.json") == {"a": [1.5, None], "z": 1}


def test_npz_bytes_depend_on_the_arrays_alone(tmp_path):
    a, b = np.arange(60).reshape(3, 20), np.eye(4, dtype=bool)
    files.save_npz(tmp_path / "one.npz", a=a, b=b)
    time.sleep(2.1)  # zip archives count time in steps of two seconds
    files.save_npz(tmp_path / "two.npz", b=np.asfortranarray(b), a=a.copy())
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    found = files.load_npz(tmp_path / "one.npz")
    assert found.keys() == {"a", "b"}
    np.testing.assert_array_equal(found["a"], a)
    assert found["b"].dtype == bool
    assert files.sha256(tmp_path / "one.npz") == files.sha256(tmp_path / "two.npz")


def test_missing_files(tmp_path):
    with pytest.raises(StudyError, match="no such file"):
        files.read_json(tmp_path / "no.json")
    with pytest.raises(StudyError, match="no such file"):
        files.load_npz(tmp_path / "no.npz")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"nul", b"[]", b"null"])
def test_damaged_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(StudyError, match="a.json: not readable as JSON"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_what_is_no_npz(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(StudyError, match="a.npz: not a readable .npz file"):
        files.load_npz(tmp_path / "a.npz")


def test_one_plain_array_is_no_npz(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(3))
    with pytest.raises(StudyError, match="not a readable .npz file"):
        files.load_npz(tmp_path / "a.npy")


def test_pickled_objects_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}], dtype=object))
    with pytest.raises(StudyError, match="not a readable .npz file"):
        files.load_npz(tmp_path / "a.npz")


def test_no_damage_of_an_npz_escapes_as_another_exception(tmp_path):
    """Every cut, and a thousand flipped bits: the same arrays or a StudyError."""
    rng = np.random.default_rng(0)
    array = rng.integers(0, 9, (4, 50))
    files.save_npz(tmp_path / "a.npz", x=array)
    whole = (tmp_path / "a.npz").read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 7)]
    for bit in rng.choice(8 * len(whole), min(1000, 8 * len(whole)), replace=False):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        (tmp_path / "b.npz").write_bytes(content)
        try:
            found = files.load_npz(tmp_path / "b.npz")
        except StudyError:
            refused += 1
        else:
            assert all(np.array_equal(v, array) for v in found.values())
    assert refused > 0.8 * len(damaged)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    files.commit_folder(target, lambda stage: (stage / "a").write_text("1"))

    def fails(stage):
        (stage / "a").write_text("2")
        raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        files.commit_folder(target, fails)
    assert (target / "a").read_text() == "1"
    files.commit_folder(target, lambda stage: (stage / "b").write_text("3"))
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "out"
    files.commit_folder(target, lambda stage: (stage / "a").write_text("1"))
    with pytest.raises(StudyError, match="out: cannot be written .No space left"):
        files.commit_folder(target, full_disk)
    assert (target / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failing_rename_leaves_the_old_folder(tmp_path, monkeypatch):
    """Renaming is the last thing that can fail, after the old folder has been moved aside."""
    target, replace = tmp_path / "out", os.replace
    files.commit_folder(target, lambda stage: (stage / "a").write_text("1"))

    def fails(source, destination):
        if Path(source).name == "new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(StudyError, match="out: cannot be written .No space left"):
        files.commit_folder(target, lambda stage: (stage / "a").write_text("2"))
    assert (target / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
