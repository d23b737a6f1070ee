"""Checkpoints: nested states of tensors and plain values in one safetensors file, no pickle.

The file carries a digest of its own contents, so that a truncated or altered one is recognised.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lib import files
from lib.errors import StudyError


def _flatten(tree: object, tensors: dict[str, Tensor]) -> object:
    """``tree`` with every tensor replaced by a reference into ``tensors``."""
    if isinstance(tree, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"items": [[k, _flatten(v, tensors)] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"list": [_flatten(v, tensors) for v in tree]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise TypeError(f"a checkpoint cannot hold {type(tree).__name__}")


def _restore(node: dict, tensors: dict[str, Tensor]) -> object:
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "items" in node:
        return {k: _restore(v, tensors) for k, v in node["items"]}
    if "list" in node:
        return [_restore(v, tensors) for v in node["list"]]
    return node["value"]


def _digest(tensors: dict[str, Tensor], structure: str) -> str:
    digest = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save(path: Path, tree: dict) -> None:
    """Write a nested state atomically; the last whole file stays beside it as ``<name>.previous``.

    Values may be tensors, numbers, strings, None, lists, tuples (read back as lists) and dicts.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_flatten(tree, tensors))
    meta = {"structure": structure, "digest": _digest(tensors, structure)}
    data = safetensors.torch.save(tensors, meta)
    path = Path(path)
    if path.exists():
        path.replace(path.with_name(f"{path.name}.previous"))
    files.write_bytes(path, data)


def load(path: Path) -> dict:
    """Read a nested state. Raises StudyError for a missing, truncated or altered file."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        structure, digest = meta["structure"], meta["digest"]
    except FileNotFoundError:
        raise StudyError(f"{path}: no such checkpoint") from None
    except (SafetensorError, KeyError, TypeError, OSError, ValueError) as error:
        raise StudyError(f"{path}: damaged checkpoint ({error})") from None
    if _digest(tensors, structure) != digest:
        raise StudyError(f"{path}: damaged checkpoint (its digest does not match)")
    try:
        return _restore(json.loads(structure), tensors)
    except KeyError as error:
        raise StudyError(f"{path}: damaged checkpoint (tensor {error} is missing)") from None


def load_latest(path: Path) -> tuple[dict | None, str]:
    """The state at ``path`` or, when that is damaged or gone, the previous one; and a warning.

    (None, "") when there is none at all. A damaged one is removed once the previous one is found
    sound; else the next ``save`` would put it in that one's place. Raises StudyError when all that
    exist are damaged.
    """
    path = Path(path)
    candidates = [p for p in (path, path.with_name(f"{path.name}.previous")) if p.exists()]
    problems = []
    for candidate in candidates:
        try:
            state = load(candidate)
        except StudyError as error:
            problems.append(str(error))
            continue
        if problems:
            path.unlink()
        return state, "; ".join(f"{p}, going on from the one before" for p in problems)
    if problems:
        raise StudyError(f"{'; '.join(problems)}; delete it to train from the beginning")
    return None, ""


def save_weights(path: Path, module: nn.Module) -> None:
    """Final weights: kernels in half precision, everything of one dimension in single."""
    state = {
        name: (t.half() if t.ndim > 1 and t.is_floating_point() else t).contiguous()
        for name, t in module.state_dict().items()
    }
    files.write_bytes(path, safetensors.torch.save({n: t.cpu() for n, t in state.items()}))


def load_weights(path: Path, module: nn.Module) -> nn.Module:
    """Put stored weights into ``module`` and set it to evaluation.

    Raises StudyError when the file is missing, damaged or of another network.
    """
    try:
        state = safetensors.torch.load_file(path)
        module.load_state_dict(
            {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
        )
    except FileNotFoundError:
        raise StudyError(
            f"{path}: no such weights; train the run, or pull it from the store"
        ) from None
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StudyError(f"{path}: not the weights of this network ({reason})") from None
    return module.eval()


def n_parameters(module: nn.Module) -> int:
    """Number of parameters, trained or not."""
    return int(np.sum([p.numel() for p in module.parameters()]))
