"""Where things lie. Everything below ``WORKSPACE`` is written; ``CODE`` is only read."""

import os
from pathlib import Path

CODE = Path(__file__).resolve().parent.parent
NOTEBOOKS = CODE / "notebooks"
PARAMS = CODE / "params"

# Data, results and checkpoints live in the repository unless STUDY_WORKSPACE names another folder
# (a large disk, or the scratch folder of the tests).
WORKSPACE = Path(os.environ.get("STUDY_WORKSPACE", CODE)).resolve()
RAW = WORKSPACE / "data" / "raw"
PREPARED = WORKSPACE / "data" / "prepared"
CHECKPOINTS = WORKSPACE / ".ckpt"


def results(profile: str) -> Path:
    """The folder of everything that a profile wrote."""
    return WORKSPACE / "results" / profile


def run_id(profile: str, model: str, category: str, seed: int) -> str:
    """The name of a run everywhere: ``<profile>-<model>-<category>-s<seed>``."""
    return f"{profile}-{model}-{category}-s{seed}"


def relative(path: Path) -> str:
    """A path as a reader should see it: relative to the workspace where possible."""
    path = Path(path)
    return str(path.relative_to(WORKSPACE)) if path.is_relative_to(WORKSPACE) else str(path)
