"""Speed and memory of `lib` beside plain alternatives: ``python -m benchmarks``.

One file a subject, each with ``cases(full) -> list[Case]``; ``harness`` times and renders. Nothing
here is a test: only the values that are timed must agree, how fast they come is printed.
"""

SUBJECTS = (
    "judge",
    "training",
    "energy",
    "rounded",
    "allocator",
    "gpu",
    "frechet",
    "neighbours",
    "voxeliser",
    "viewer",
    "startup",
    "background",
    "devices",
    "budget",
)
