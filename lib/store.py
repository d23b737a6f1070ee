"""The artifact store that travels with the repository: are its files what their names say?"""

import hashlib
from pathlib import Path

from lib import paths
from lib.errors import StudyError

STORE = paths.CODE / "data" / "store"


def check(folder: Path = STORE) -> int:
    """How many files the store holds, each named by its MD5; StudyError where one is another.

    DVC alone would leave a damaged file out without a word where missing ones are allowed.
    """
    named = (folder / "files" / "md5").glob("??/*")
    found = sorted(p for p in named if len(p.stem) == 30)  # a killed push leaves other names
    damaged = [paths.relative(p) for p in found if _digest(p) != p.parent.name + p.stem]
    if damaged:
        more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
        raise StudyError(
            f"{damaged[0]}{more}: damaged; bring back what is committed with "
            f"`git checkout -- {paths.relative(folder)}`"
        )
    return len(found)


def _digest(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
