"""Peak memory of one call, for ``harness.peak``.

``python -m benchmarks.peak MODULE FUNCTION ARGUMENTS``, the last a JSON list: what the call
FUNCTION(*ARGUMENTS)() takes; what FUNCTION sets up before it does not count.
"""

import importlib
import json
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _mib(field: str) -> float:
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def main(module: str, function: str, arguments: str) -> float | None:
    """MiB above the level before the call, or None where the system keeps no such record."""
    work = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    if not CLEAR.exists():
        return None
    CLEAR.write_text("5")  # the peak starts anew: importing and setting up is forgotten
    before = _mib("VmRSS")
    work()
    return _mib("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
