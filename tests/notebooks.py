"""Plugin for nbval: the smoke pipeline. Notebooks in order of dependency, in a scratch workspace.

`pytest --nbval-lax --nbval-current-env -p tests.notebooks notebooks`
"""

import os
import tempfile

from lib import device
from lib.config import load

SMOKE = load("smoke")
FIRST_LOOK = "00_tour"  # looks at what the others made, so it comes last


def pytest_configure(config):
    """Point the kernels at an empty scratch folder, on pinned threads and instructions."""
    folder = tempfile.TemporaryDirectory(prefix="smoke-")
    config.add_cleanup(folder.cleanup)
    os.environ["STUDY_WORKSPACE"] = folder.name
    os.environ.update(device.environment(SMOKE.device))


def pytest_collection_modifyitems(items):
    """Cells stay in order; notebooks by number, the tour at the end."""
    items.sort(key=lambda item: (item.path.stem == FIRST_LOOK, item.path.stem))
