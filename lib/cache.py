"""What classifiers answered, kept in ``.ckpt`` so that an interrupted notebook goes on."""

import ast
import functools
import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

from lib import classify, config, files, paths


def classifier_hash(profile: config.Profile, model: str, network: nn.Module) -> str:
    """Hash of a classifier: its name, its parameters in the profile, its weights and its code.

    Parameters count as well as weights: how many views are averaged, say, changes the answers.
    """
    parameters = config.section(profile, model) if hasattr(profile, model) else {}
    kinds = {type(m) for m in network.modules() if type(m).__module__.startswith("lib.")}
    code = sorted(_code(kind) for kind in kinds)
    digest = hashlib.sha256(json.dumps([model, parameters, repr(network), code]).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@functools.cache
def code_hash(module) -> str:
    """Hash of a module's code, comments left out."""
    tree = ast.parse(Path(module.__file__).read_text())
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


@functools.cache
def _code(kind: type) -> str:
    """Hash of what a network computes: all of its file in ``lib/models``, else the class alone."""
    module = inspect.getmodule(kind)
    if module.__name__.startswith("lib.models."):
        return code_hash(module)
    tree = ast.parse(inspect.getsource(kind))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


def kept(path: Path, compute: Callable[..., np.ndarray], *arguments) -> np.ndarray:
    """The array in a file; where there is none it is computed and stored."""
    if not path.is_file():
        files.save_npz(path, found=compute(*arguments))
    return files.load_npz(path)["found"]


def logits(key: str, network: nn.Module, grids: np.ndarray) -> np.ndarray:
    """Logits (N, 10) of bool grids (N, 30, 30, 30), kept under the classifier's hash ``key``."""
    shapes = hashlib.sha256(np.packbits(grids).tobytes() + str(grids.shape).encode())
    path = paths.CHECKPOINTS / "answers" / key / f"{shapes.hexdigest()[:12]}.npz"
    return kept(path, classify.logits, network, grids)
