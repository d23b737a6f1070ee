"""``python -m benchmarks``: every subject as a Markdown table; status 1 when values disagree."""

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks import SUBJECTS
from lib import config, device
from lib.errors import StudyError

# Before numpy and torch are imported: the threads of background training, unless the user has
# set others.
device.apply_environment(config.load("lite").device)


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen subjects; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=SUBJECTS, metavar="NAME",
                        help=", ".join(SUBJECTS))  # fmt: skip
    parser.add_argument(
        "--full", action="store_true", help="large sizes too, which take much longer"
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help="also write the Markdown there")
    options = parser.parse_args(arguments)
    from benchmarks import harness
    from lib import files

    parts, disagreeing = [], []

    def say(text: str) -> None:
        parts.append(text)
        print(text, end="\n\n", flush=True)

    say(f"{harness.machine()}. Ratio: plain over ours. Memory: peak growth, ours / plain.")
    for name in options.only:
        subject = importlib.import_module(f"benchmarks.{name}")
        cases = subject.cases(options.full)
        say(f"## {subject.__doc__.splitlines()[0]}\n\n{harness.table(cases)}")
        disagreeing += [f"{name}: {case.name}" for case in cases if not case.agrees]
    if options.out:
        try:
            files.write_text(options.out, "\n\n".join(parts) + "\n")
        except StudyError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if disagreeing:
        print(f"error: values disagree in {'; '.join(disagreeing)}", file=sys.stderr)
    return 1 if disagreeing else 0


if __name__ == "__main__":
    sys.exit(main())
