"""Parcels carry complete runs whole, or place nothing."""

import json
import shutil
import zipfile

import pytest
import yaml

from lib import cli, files, paths
from lib.errors import StudyError
from lib.train import engine, parcel, runs

LIMIT = 46_000


@pytest.fixture(scope="module")
def complete(workspace, smoke, smoke_chair, smoke_toilet, tmp_path_factory):
    """Checkpoints of two complete runs, none of them published."""
    folder = tmp_path_factory.mktemp("complete")
    for run in (smoke_chair, smoke_toilet):
        source = runs.state_folder(run, smoke)
        shutil.copytree(source / "final", folder / source.name / "final")
    return folder


@pytest.fixture
def unpublished(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "results", lambda profile: tmp_path / "results" / profile)


@pytest.fixture
def parts(complete, unpublished, smoke, tmp_path, monkeypatch):
    """Several parts of a parcel; an empty machine to unpack them on."""
    monkeypatch.setattr(paths, "CHECKPOINTS", complete)
    written = parcel.pack([smoke], tmp_path / "parcel", LIMIT)
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path / "other machine")
    return written


def tree(folder):
    found = [f for f in folder.glob("**/*") if f.is_file() and f.name != "lock"]
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


def refused(parts, smoke, said):
    with pytest.raises(StudyError, match=said) as error:
        parcel.unpack(parts, [smoke])
    assert "\n" not in str(error.value)
    assert not paths.CHECKPOINTS.exists()


def test_round_trip(parts, complete, smoke, smoke_chair, smoke_toilet):
    assert len(parts) > 1
    assert max(p.stat().st_size for p in parts) <= LIMIT
    keys = sorted(runs.key(r, smoke) for r in (smoke_chair, smoke_toilet))
    assert parcel.unpack(parts[::-1], [smoke]) == keys
    assert tree(paths.CHECKPOINTS) == tree(complete)
    assert set(runs.complete_unpublished(smoke)) == {smoke_chair, smoke_toilet}


def test_packing_twice_gives_the_same_bytes(parts, complete, smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", complete)
    again = parcel.pack([smoke], tmp_path / "again", LIMIT)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in parts]


def test_parts_never_exceed_their_limit(complete, unpublished, smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", complete)
    largest = max(len(content) for content in tree(complete).values())
    for limit in range(largest + 2500, largest + 4500, 397):
        for part in parcel.pack([smoke], tmp_path / str(limit), limit):
            assert part.stat().st_size <= limit


def test_a_file_too_large_for_a_part(complete, unpublished, smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", complete)
    with pytest.raises(StudyError, match="bytes do not fit a part of 5000"):
        parcel.pack([smoke], tmp_path / "parcel", 5000)
    assert not (tmp_path / "parcel").exists()


def test_nothing_to_pack(unpublished, smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path / "empty")
    with pytest.raises(StudyError, match="to pack; `.* queue --run --profile smoke` trains"):
        parcel.pack([smoke], tmp_path / "parcel")


def test_a_folder_that_holds_a_parcel_is_left_alone(parts, complete, smoke, monkeypatch):
    """A smaller parcel must not lie among the parts of a larger one."""
    monkeypatch.setattr(paths, "CHECKPOINTS", complete)
    before = tree(parts[0].parent)
    with pytest.raises(StudyError, match="parcel: holds parts of another parcel; give a new"):
        parcel.pack([smoke], parts[0].parent)
    assert tree(parts[0].parent) == before


@pytest.fixture
def forged(tmp_path, unpublished, smoke, smoke_chair, monkeypatch):
    """Write a part that carries these files as those of the chair run; an empty machine."""
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path / "other machine")
    key = runs.key(smoke_chair, smoke)

    def write(found):
        entries = [(f"{key}/{name}", content) for name, content in found.items()]
        manifest = parcel._manifest(entries) or {key: {}}
        path = tmp_path / "part-000.zip"
        path.write_bytes(parcel._zip(entries, manifest))
        return [path]

    return write


def test_a_run_that_is_not_whole_is_refused(forged, complete, smoke, smoke_chair):
    final = complete / runs.key(smoke_chair, smoke) / "final"
    whole = {p.name: p.read_bytes() for p in final.iterdir()}
    record = files.read_json(final / "run.json")
    said = r"-s0-\w+: no whole run \({}\); nothing was unpacked"
    refused(forged({"evil.txt": b"x"}), smoke, said.format("run.json: no such file"))
    lacking = whole | {"run.json": json.dumps(record | {"weights": {}}).encode()}
    refused(forged(lacking), smoke, said.format("run.json: damaged, it has no weights"))
    other = whole | {"generator.safetensors": whole["discriminator.safetensors"]}
    refused(forged(other), smoke, r"no whole run \(generator.safetensors: damaged, or of another")
    lacking = {n: content for n, content in whole.items() if n != "generator.safetensors"}
    refused(forged(lacking), smoke, said.format("generator.safetensors is missing"))
    record["weights"].pop("generator.safetensors")
    lacking["run.json"] = json.dumps(record).encode()
    refused(forged(lacking), smoke, said.format("generator.safetensors is missing"))
    unlisted = whole | {"run.json": lacking["run.json"]}
    refused(
        forged(unlisted), smoke, r"no whole run \(generator.safetensors: damaged, or of another"
    )


def test_a_parcel_without_files_is_refused(forged, parts, smoke):
    refused(forged({}), smoke, "part-000.zip: holds no run; pack the runs again")
    rewrite(parts[0], lambda entries: entries.clear() or entries.update({parcel.MANIFEST: b"{}"}))
    refused(parts[:1], smoke, "part-000.zip: holds no run; pack the runs again")


def test_the_command_unpacks_what_it_packed_of_every_profile(parts, complete, capsys, monkeypatch):
    """Profiles whose runs the parcel does not hold need no data here."""
    assert cli.main(["unpack", *map(str, parts)]) == 0
    assert capsys.readouterr().out.split() == sorted(p.name for p in complete.iterdir())
    assert tree(paths.CHECKPOINTS) == tree(complete)


def test_a_missing_part(parts, smoke):
    for missing in parts:
        refused([p for p in parts if p != missing], smoke, "missing; give all parts of the parcel")
    refused([*parts, parts[0].with_name("part-999.zip")], smoke, "part-999.zip: no such file")


@pytest.mark.parametrize("where", [0.3, 0.5, 0.7, 0.99])
def test_a_truncated_part(parts, smoke, where):
    whole = parts[0].read_bytes()
    parts[0].write_bytes(whole[: int(where * len(whole))])
    refused(parts, smoke, "part-000.zip: damaged part")


def test_flipped_bits(parts, complete, smoke):
    """Anywhere in a part: refused, or (dates and the like in the zip) unpacked as it was packed."""
    refusals = 0
    whole = parts[-1].read_bytes()
    for place in [*range(0, len(whole), len(whole) // 25), *range(-220, -20, 9)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        parts[-1].write_bytes(damaged)
        try:
            parcel.unpack(parts, [smoke])
        except StudyError as error:
            assert "\n" not in str(error)
            assert not paths.CHECKPOINTS.exists()
            refusals += 1
        else:
            assert tree(paths.CHECKPOINTS) == tree(complete)
            shutil.rmtree(paths.CHECKPOINTS)
    assert refusals > 25


def rewrite(part, change):
    """Write a part anew after ``change`` has edited its entries, checksums of the zip intact."""
    with zipfile.ZipFile(part) as archive:
        entries = {n: archive.read(n) for n in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(part, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_content_that_its_manifest_does_not_know(parts, smoke):
    def change(entries):
        name = next(n for n in entries if n != parcel.MANIFEST)
        entries[name] += b"x"

    rewrite(parts[0], change)
    refused(parts, smoke, "does not match its SHA-256; nothing was unpacked")


def test_names_that_lead_elsewhere(parts, smoke, tmp_path):
    """A part that would write outside the folder of its run, its manifest made to fit."""

    def change(entries):
        manifest = json.loads(entries[parcel.MANIFEST])
        name = next(n for n in entries if n != parcel.MANIFEST)
        key, file = name.split("/")
        manifest[key]["../../../escaped"] = manifest[key].pop(file)
        entries[f"{key}/../../../escaped"] = entries.pop(name)
        entries[parcel.MANIFEST] = json.dumps(manifest).encode()

    rewrite(parts[0], change)
    refused(parts, smoke, "is no file of a run; nothing was unpacked")
    assert not list(tmp_path.glob("**/escaped"))


def test_a_part_without_a_manifest(parts, smoke):
    rewrite(parts[0], lambda entries: entries.pop(parcel.MANIFEST))
    refused(parts, smoke, "part-000.zip: damaged part")


def test_runs_of_another_recipe_are_refused(parts, smoke, params):
    recipes = yaml.safe_load((params / "recipes.yaml").read_text())
    recipes["gan3d"]["recipe"] += 1
    (params / "recipes.yaml").write_text(yaml.safe_dump(recipes))
    refused(parts, smoke, "no profile asks for this run as it was trained")


def test_runs_that_are_in_place_are_left_alone(parts, smoke, smoke_chair):
    final = runs.state_folder(smoke_chair, smoke) / "final"
    final.mkdir(parents=True)
    (final / "mine").write_text("kept")
    parcel.unpack(parts, [smoke])
    assert [p.name for p in final.iterdir()] == ["mine"]
    assert len(list(paths.CHECKPOINTS.glob("*/final/generator.safetensors"))) == 1


def test_a_run_that_trains_here_is_not_written_over(parts, smoke, smoke_chair):
    with engine.lock(runs.state_folder(smoke_chair, smoke)):
        with pytest.raises(engine.Locked, match="smoke-gan3d-chair-s0-.* trains this run"):
            parcel.unpack(parts, [smoke])
    assert not runs.is_complete(smoke_chair, smoke)
    parcel.unpack(parts, [smoke])
    assert runs.is_complete(smoke_chair, smoke)
