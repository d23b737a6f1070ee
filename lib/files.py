"""Files that are either whole or absent: every write goes to a temporary name, then is renamed."""

import errno
import hashlib
import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lib.errors import StudyError

# All that numpy and zipfile raise when bytes of an archive are missing or altered. A file that
# holds one plain array is a TypeError; an altered flag or method is a RuntimeError.
DAMAGED_ZIP = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file, durably and atomically; parents are made.

    Raises StudyError when the disk is full or the place cannot be written; nothing is left behind.
    """
    path = Path(path)
    check_place(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise StudyError(
            f"{path}: cannot be written ({error.strerror}); nothing was changed"
        ) from None
    finally:  # after Ctrl-C too
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def check_place(path: Path) -> None:
    """Raise StudyError where a file cannot be written, before any work is done; makes the parents.

    Folders and devices are refused: renaming a file over ``/dev/null`` would replace the device.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            kind = "Is a directory" if path.is_dir() else "Not a regular file"
            raise OSError(errno.EINVAL, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StudyError(f"{path}: cannot be written ({reason}); nothing was changed") from None


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write JSON with sorted keys and a final newline, atomically."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises StudyError for a missing or damaged file."""
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} where an object belongs")
        return value
    except FileNotFoundError:
        raise StudyError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise StudyError(f"{path}: not readable as JSON ({error})") from None


def save_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write a compressed ``.npz`` whose bytes depend on the arrays alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(
                member, np.ascontiguousarray(arrays[name]), allow_pickle=False
            )
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, member.getvalue())
    write_bytes(path, buffer.getvalue())


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an ``.npz``. Raises StudyError for a missing or damaged file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise StudyError(f"{path}: no such file") from None
    except DAMAGED_ZIP as error:
        raise StudyError(f"{path}: not a readable .npz file ({error})") from None


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def commit_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder appear complete or not at all: ``fill`` writes into a temporary sibling.

    Raises StudyError when the disk is full or the place cannot be written; the old folder stays.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            stage, old = Path(temporary) / "new", Path(temporary) / "old"
            stage.mkdir()
            fill(stage)
            if folder.exists():
                os.replace(folder, old)
            try:
                os.replace(stage, folder)
            except BaseException:
                if old.exists():
                    os.replace(old, folder)
                raise
    except OSError as error:
        raise StudyError(
            f"{folder}: cannot be written ({error.strerror}); free space or choose another place"
        ) from None
