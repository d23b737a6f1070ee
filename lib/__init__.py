"""Volumetric generative models, rebuilt and judged by one judge.

Conventions, stated once:

* Voxels are ``(B, 1, D, D, D)`` floats in [0, 1], axes (x, y, z), z up; on disk bit-packed.
* Every energy-based model gives ``energy(x) -> (B,)``, lower is more likely.
* Every stochastic function takes a generator or seeds; a sample set is named by one seed per shape.

``lib`` computes, notebooks argue, DVC remembers, tests disbelieve.
"""
