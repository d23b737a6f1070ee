"""Carrying complete runs between machines: ``pack`` writes parts, ``unpack`` places them.

A part is an uncompressed zip of at most 15 MiB that holds whole ``final`` folders or pieces of
one; its manifest lists the SHA-256 of every file. A run is placed when all its files have come.
"""

import hashlib
import io
import json
import tempfile
import zipfile
from pathlib import Path

from lib import config, files, paths
from lib.errors import StudyError
from lib.train import engine, runs

PART_BYTES = 15 * 2**20
MANIFEST = "manifest.json"


def pack(profiles: list[config.Profile], folder: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Write every complete, unpublished run of the profiles into ``<folder>/part-<k>.zip``.

    Raises StudyError when the folder holds a parcel, a single file exceeds a part, a file is
    damaged, or nothing is complete.
    """
    # Parts of an older, larger parcel would stay beside the new ones and be carried with them.
    if any(Path(folder).glob("part-*.zip")):
        raise StudyError(
            f"{folder}: holds parts of another parcel; give a new folder, or delete its part-*.zip"
        )
    complete = [(r, p) for p in profiles for r in runs.complete_unpublished(p)]
    entries = []
    for run, profile in complete:
        final = runs.state_folder(run, profile) / "final"
        runs.check_final(run, final)
        found = sorted(final.iterdir())
        entries += [(f"{final.parent.name}/{f.name}", f.read_bytes()) for f in found]
    if not entries:
        raise StudyError(
            f"no complete run to pack; `python -m lib queue --run --profile {profiles[0].name}` "
            "trains what is wanted"
        )
    whole = _manifest(entries)
    room = part_bytes - len(_zip([], whole))
    for name, content in entries:
        if _zipped(name, content) > room:
            raise StudyError(f"{name}: {len(content)} bytes do not fit a part of {part_bytes}")
    written = []
    for number, part in enumerate(_parts(entries, room)):
        path = Path(folder) / f"part-{number:03d}.zip"
        files.write_bytes(path, _zip(part, whole))
        written.append(path)
    return written


def _manifest(entries: list[tuple[str, bytes]]) -> dict[str, dict[str, str]]:
    """Key -> file name -> SHA-256, for every run of the parcel."""
    out: dict[str, dict[str, str]] = {}
    for name, content in entries:
        key, file = name.split("/")
        out.setdefault(key, {})[file] = hashlib.sha256(content).hexdigest()
    return out


def _zipped(name: str, content: bytes) -> int:
    """Bytes that a stored file takes in a zip: content, local header and directory entry."""
    return len(content) + 30 + 46 + 2 * len(name.encode())


def _parts(entries: list[tuple[str, bytes]], part_bytes: int) -> list[list[tuple[str, bytes]]]:
    """First-fit decreasing; the order within a part is that of the names."""
    bins: list[list[tuple[str, bytes]]] = []
    room: list[int] = []
    for entry in sorted(entries, key=lambda e: (-len(e[1]), e[0])):
        size = _zipped(*entry)
        place = next((k for k, r in enumerate(room) if r >= size), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(part_bytes)
        bins[place].append(entry)
        room[place] -= size
    return [sorted(part) for part in bins]


def _zip(part: list[tuple[str, bytes]], manifest: dict) -> bytes:
    buffer = io.BytesIO()
    text = json.dumps(manifest, indent=1, sort_keys=True).encode()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in [(MANIFEST, text), *part]:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return buffer.getvalue()


def unpack(parts: list[Path], profiles: list[config.Profile]) -> list[str]:
    """Check the parts and put complete runs where their notebooks adopt them; returns their keys.

    Nothing is placed unless every part is sound, every run complete, and every key is one that a
    profile asks for with the parameters and recipes of this checkout. A run that is in place
    already is left as it is. Raises Locked for a run that is trained here now.
    """
    content, manifest = _read(parts)
    known = _known(profiles, {key.rpartition("-")[0] for key in manifest})
    for key, listed in manifest.items():
        lacking = sorted(set(listed) - set(content.get(key, {})))
        if lacking:
            raise StudyError(f"{key}: {', '.join(lacking)} missing; give all parts of the parcel")
        if key not in known:
            raise StudyError(
                f"{key}: no profile asks for this run as it was trained (other parameters, data or "
                "recipe); nothing was unpacked"
            )
        _check_whole(known[key], key, content.get(key, {}))
    for key, found in content.items():
        final = paths.CHECKPOINTS / key / "final"
        if final.is_dir():
            continue
        with engine.lock(final.parent):
            files.commit_folder(final, lambda stage, found=found: _fill(stage, found))
    return sorted(content)


def _known(profiles: list[config.Profile], ids: set[str]) -> dict[str, runs.Run]:
    """Wanted runs of these ids by key; other profiles need not be prepared for their keys."""
    return {runs.key(r, p): r for p in profiles for r in runs.wanted(p) if r.id in ids}


def _check_whole(run: runs.Run, key: str, found: dict[str, bytes]) -> None:
    """Raise StudyError unless a run's files, written beside nothing else, are a complete run."""
    with tempfile.TemporaryDirectory() as folder:
        _fill(Path(folder), found)
        try:
            runs.check_final(run, Path(folder))
        except StudyError as error:
            # What follows the semicolon is advice for a run that is in place.
            reason = str(error).replace(f"{folder}/", "").split(";")[0]
            raise StudyError(f"{key}: no whole run ({reason}); nothing was unpacked") from None


def _fill(stage: Path, found: dict[str, bytes]) -> None:
    for name, data in found.items():
        files.write_bytes(stage / name, data)


def _checked_manifest(found: object) -> dict[str, dict[str, str]]:
    """A manifest of the right form, or ValueError."""
    if isinstance(found, dict) and all(isinstance(v, dict) for v in found.values()):
        return found
    raise ValueError("its manifest does not list files by run")


def _read(parts: list[Path]) -> tuple[dict[str, dict[str, bytes]], dict[str, dict[str, str]]]:
    """Files by key and the joined manifest; StudyError for a damaged part or file."""
    content: dict[str, dict[str, bytes]] = {}
    manifest: dict[str, dict[str, str]] = {}
    for part in parts:
        try:
            with zipfile.ZipFile(part) as archive:
                manifest |= _checked_manifest(json.loads(archive.read(MANIFEST)))
                names = [n for n in archive.namelist() if n != MANIFEST]
                entries = [(n, archive.read(n)) for n in names]
        except FileNotFoundError:
            raise StudyError(f"{part}: no such file") from None
        except files.DAMAGED_ZIP as error:
            raise StudyError(f"{part}: damaged part ({error}); nothing was unpacked") from None
        for name, data in entries:
            key, _, file = name.partition("/")
            if "/" in file or "\\" in file or key in ("", ".", "..") or file in ("", ".", ".."):
                raise StudyError(f"{part}: {name!r} is no file of a run; nothing was unpacked")
            if hashlib.sha256(data).hexdigest() != manifest.get(key, {}).get(file):
                raise StudyError(f"{part}: {name} does not match its SHA-256; nothing was unpacked")
            content.setdefault(key, {})[file] = data
    if not any(manifest.values()):
        raise StudyError(f"{parts[0]}: holds no run; pack the runs again")
    return content, manifest
