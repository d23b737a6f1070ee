"""Attacks on classifiers of voxels, and what is counted of them.

``f`` maps voxels x (B, 1, D, D, D) in [0, 1] to logits (B, K), each shape by itself (evaluation
mode); ``y`` (B,) are the true classes. Attacks are untargeted and return new tensors. Random ones
take one generator a shape, so what happens to a shape depends on no other shape of the batch.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from lib.errors import StudyError

Network = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, y) -> (B,), larger is worse for the classifier


def surprise(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of each shape, (B,): the loss that FGSM and PGD ascend."""
    return cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """How far the best wrong logit lies above the right one, (B,); positive means misclassified.

    Unlike the cross entropy it does not flatten where the classifier is sure (Carlini and Wagner
    2017, loss f6 without its floor).
    """
    right = logits.gather(1, y[:, None])[:, 0]
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - right


def gradient(f: Network, x: Tensor, y: Tensor, loss: Loss = surprise) -> tuple[Tensor, Tensor]:
    """The gradient of each shape's loss by its voxels, like x, and the logits (B, K)."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = f(x)
        # A sum over shapes: with a mean the gradient would depend on the size of the batch.
        (g,) = torch.autograd.grad(loss(logits, y).sum(), x)
    return g, logits.detach()


@torch.no_grad()
def misclassified(f: Network, x: Tensor, y: Tensor) -> Tensor:
    """Which shapes get another class than y, bool (B,)."""
    return f(x).argmax(1) != y


def adversarial_error(wrong_a: Tensor) -> float:
    """N_A / N over all shapes, errors on untouched shapes included (3DWINN, Table 7).

    wrong_a: bool (N,), the shapes attacked on A that A misclassifies. NaN for no shapes.
    """
    return float(wrong_a.sum()) / len(wrong_a) if len(wrong_a) else float("nan")


def correction_rate(wrong_a: Tensor, wrong_b: Tensor) -> float:
    """1 - N_(A and B) / N_A: the part of A's errors that B gets right (3DWINN, Table 7).

    wrong_a, wrong_b: bool (N,), the shapes attacked on A that A and B misclassify. NaN where A
    makes no error: nothing was there to correct. Raises StudyError for different lengths.
    """
    if len(wrong_a) != len(wrong_b):
        raise StudyError(f"correction rate: {len(wrong_a)} answers of A, {len(wrong_b)} of B")
    n_a = int(wrong_a.sum())
    return 1 - int((wrong_a & wrong_b).sum()) / n_a if n_a else float("nan")


# ---------------------------------------------------------------------------------------------
# Small changes of every voxel


def fgsm(f: Network, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Fast gradient sign method (Goodfellow et al. 2015): x + eps sign(grad), cut to [0, 1]."""
    g, _ = gradient(f, x, y)
    return (x + eps * g.sign()).clamp(0, 1)


def iterative_fgsm(
    f: Network,
    x: Tensor,
    y: Tensor,
    step: float,
    n_steps: int,
    ball: float | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Basic iterative method (Kurakin et al. 2016): n steps of FGSM, each cut to [0, 1].

    ``ball`` bounds the whole change of a voxel of x; without it n steps reach n * step. The source
    bounds it; 3DWINN states "perturbation size .005" and 5 or 10 steps, which both readings fit.
    ``start`` is where the steps begin, else x itself.
    """
    found = x if start is None else start
    for _ in range(n_steps):
        found = fgsm(f, found, y, step)
        if ball is not None:
            found = _into_ball(found, x, ball)
    return found


def pgd(
    f: Network,
    x: Tensor,
    y: Tensor,
    eps: float,
    step: float,
    n_steps: int,
    restarts: int,
    generators: Sequence[torch.Generator],
    random_start: bool = True,
    loss: Loss = surprise,
) -> Tensor:
    """Projected gradient descent (Madry et al. 2018) in the ball of eps, worst of all restarts.

    A shape stops at its first misclassification. The untouched shape counts as a start too, so
    the error never falls below that on untouched shapes; a shape that is never misclassified
    comes back as the end with the largest margin. Without ``random_start`` one restart says all.
    """
    best = x.clone()
    with torch.no_grad():
        logits = f(x)
    worst, fooled = margin(logits, y), logits.argmax(1) != y
    for _ in range(restarts):
        rows = (~fooled).nonzero()[:, 0]
        if not len(rows):
            break
        start = x[rows]
        if random_start:
            noise = torch.stack([_uniform(x[0], generators[r]) for r in rows.tolist()])
            start = _into_ball(start + eps * noise, start, eps)
        end = _ascend(f, x[rows], y[rows], start, eps, step, n_steps, loss)
        _keep_worse(f, y, rows, end, best, worst, fooled)
    return best


def _ascend(
    f: Network,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    eps: float,
    step: float,
    n_steps: int,
    loss: Loss,
) -> Tensor:
    """Signed steps up the loss inside the ball around x; a shape rests once misclassified."""
    found, active = start.clone(), torch.arange(len(x), device=x.device)
    for _ in range(n_steps):
        g, logits = gradient(f, found[active], y[active], loss)
        right = logits.argmax(1) == y[active]
        active = active[right]
        if not len(active):
            break
        found[active] = _into_ball(found[active] + step * g[right].sign(), x[active], eps)
    return found


def _into_ball(found: Tensor, x: Tensor, eps: float) -> Tensor:
    """The nearest point within eps of x in every voxel, and within [0, 1]."""
    return torch.minimum(torch.maximum(found, x - eps), x + eps).clamp(0, 1)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """U(-1, 1) in the shape of ``like``, drawn on the CPU."""
    return (2 * torch.rand(like.shape, generator=generator) - 1).to(like)


@torch.no_grad()
def _keep_worse(
    f: Network, y: Tensor, rows: Tensor, tried: Tensor, best: Tensor, worst: Tensor, fooled: Tensor
) -> None:
    """Take up, in place, those tries (for ``rows``) that are worse for the classifier."""
    logits = f(tried)
    found = margin(logits, y[rows])
    better = found > worst[rows]
    best[rows[better]], worst[rows[better]] = tried[better], found[better]
    fooled[rows[better]] = (logits.argmax(1) != y[rows])[better]


# ---------------------------------------------------------------------------------------------
# Flips of a few voxels: the grid stays binary


def surface(x: Tensor) -> Tensor:
    """Voxels with a face on the surface, inside or outside of it, bool like x; x is binary.

    Outside of the grid counts as empty, and an empty voxel at the border is no surface by that.
    """
    filled = _checked_binary(x) > 0.5
    empty = ~pad(filled, [1] * 6)
    return torch.where(filled, _beside(empty), _beside(pad(filled, [1] * 6)))


def _beside(mask: Tensor) -> Tensor:
    """Which inner voxels of a padded mask have one of their six neighbours in it."""
    inner = slice(1, -1)
    out = torch.zeros_like(mask[..., inner, inner, inner])
    for axis in range(3):
        for ends in (slice(None, -2), slice(2, None)):
            at = [inner] * 3
            at[axis] = ends
            out |= mask[(..., *at)]
    return out


def greedy_flips(
    f: Network, x: Tensor, y: Tensor, counts: Sequence[int], on_surface: bool = False
) -> Tensor:
    """The voxels to flip, in order, by gradient: flat indices (B, counts[-1]), -1 for none.

    At each of the ascending ``counts`` the gradient of the margin is taken anew, and the voxels
    with the largest first-order gain g (1 - 2x) are flipped up to that count, each voxel at most
    once; where no gain is positive, none is. For a linear classifier of two classes no choice of
    as many flips does better. ``on_surface`` allows voxels of the untouched ``surface`` only.
    Raises StudyError when x is not binary.
    """
    current, free = x.clone(), surface(x) if on_surface else torch.ones_like(x, dtype=torch.bool)
    order = torch.full((len(x), counts[-1]), -1, device=x.device)
    done = 0
    _checked_binary(x)
    for k in counts:
        g, _ = gradient(f, current, y, margin)
        gain = torch.where(free, g * (1 - 2 * current), -torch.inf).flatten(1)
        top = gain.topk(k - done, dim=1)
        new = torch.where(top.values > 0, top.indices, -1)
        order[:, done:k], done = new, k
        current, free = flip(current, new), free & ~_hit(x, new)
    return order


def random_flips(
    x: Tensor, n: int, generators: Sequence[torch.Generator], on_surface: bool = False
) -> Tensor:
    """Voxels to flip in random order, as ``greedy_flips``: flat indices (B, n), -1 for none."""
    allowed = surface(x) if on_surface else torch.ones_like(_checked_binary(x), dtype=torch.bool)
    order = torch.full((len(x), n), -1, device=x.device)
    for row, generator in zip(range(len(x)), generators, strict=True):
        free = allowed[row].flatten().nonzero()[:, 0]
        chosen = free[torch.randperm(len(free), generator=generator)[:n].to(x.device)]
        order[row, : len(chosen)] = chosen
    return order


def flip(x: Tensor, order: Tensor) -> Tensor:
    """x with the voxels of ``order`` (B, k) turned over; -1 turns none."""
    return torch.where(_hit(x, order), 1 - x, x)


def _hit(x: Tensor, order: Tensor) -> Tensor:
    """Mask like x of the flat indices (B, k) in ``order``; -1 marks none."""
    count = torch.zeros_like(x).flatten(1)
    count.scatter_add_(1, order.clamp(min=0), (order >= 0).to(x.dtype))
    return (count > 0).view_as(x)


def fooled_within(f: Network, x: Tensor, y: Tensor, order: Tensor, counts: Sequence[int]) -> Tensor:
    """Whether at most k of the flips, for each k of ``counts``, are enough: bool (B, len(counts)).

    Tried are no flip and the first k of ``order`` for every k, so the answer never turns back.
    """
    wrong = [misclassified(f, x, y)]
    wrong += [misclassified(f, flip(x, order[:, :k]), y) for k in counts]
    return torch.stack(wrong, 1).cummax(1).values[:, 1:]


def _checked_binary(x: Tensor) -> Tensor:
    if not ((x == 0) | (x == 1)).all():
        raise StudyError("flips need binary grids of 0 and 1; threshold the shapes first")
    return x


# ---------------------------------------------------------------------------------------------
# Parts that go missing


def remove_components(
    f: Network,
    x: Tensor,
    y: Tensor,
    share: float,
    n_starts: int,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Take a connected part away: the worst of ``n_starts`` random parts, or none of them.

    A part is a random occupied voxel and those nearest to it, counted in steps through the
    object from face to face, ``share`` of all its voxels; where the voxel's component is smaller,
    that whole component. Empty grids come back as they are. Raises StudyError unless binary.
    """
    best = _checked_binary(x).clone()
    with torch.no_grad():
        logits = f(x)
    worst, fooled = margin(logits, y), logits.argmax(1) != y
    filled = x.flatten(1).any(1)
    for _ in range(n_starts):
        rows = (filled & ~fooled).nonzero()[:, 0]
        if not len(rows):
            break
        start = torch.zeros_like(x[rows])
        for k, row in enumerate(rows.tolist()):
            places = x[row].flatten().nonzero()[:, 0]
            pick = torch.randint(len(places), (1,), generator=generators[row])
            start[k].view(-1)[places[pick.to(x.device)]] = 1
        size = (share * x[rows].flatten(1).sum(1)).round().long().clamp(min=1)
        tried = x[rows] * ~_nearest_part(x[rows] > 0.5, start > 0.5, size)
        _keep_worse(f, y, rows, tried, best, worst, fooled)
    return best


def _nearest_part(filled: Tensor, start: Tensor, size: Tensor) -> Tensor:
    """The ``size`` (B,) voxels of ``filled`` that are fewest steps from ``start``, as a mask."""
    far = filled[0].numel()
    distance = torch.full(filled.shape, far, device=filled.device)
    reached, steps = start, 0
    while (new := reached & (distance == far)).any():
        distance[new] = steps
        reached, steps = _beside(pad(reached, [1] * 6)) & filled | reached, steps + 1
    # Equal distances are taken in the order of the grid.
    place = torch.arange(far, device=filled.device)
    key = distance.flatten(1) * far + place
    rank = key.argsort(1).argsort(1)
    return ((rank < size[:, None]) & (distance.flatten(1) < far)).view_as(filled)


def drop_slices(f: Network, x: Tensor, y: Tensor, width: int) -> Tensor:
    """Empty ``width`` neighbouring slices: the worst place along any of the three axes, or none."""
    best = _checked_binary(x).clone()
    with torch.no_grad():
        logits = f(x)
    worst, fooled = margin(logits, y), logits.argmax(1) != y
    for axis in (2, 3, 4):
        for first in range(x.shape[axis] - width + 1):
            slab = x.narrow(axis, first, width)
            rows = (slab.flatten(1).any(1) & ~fooled).nonzero()[:, 0]
            if len(rows):
                tried = x[rows]
                tried.narrow(axis, first, width).zero_()
                _keep_worse(f, y, rows, tried, best, worst, fooled)
    return best


# ---------------------------------------------------------------------------------------------
# Without gradients: from logits alone, from answers alone


def square_attack(
    f: Network,
    x: Tensor,
    y: Tensor,
    eps: float,
    n_queries: int,
    generators: Sequence[torch.Generator],
    p: float = 0.05,
) -> Tensor:
    """Square attack (Andriushchenko et al. 2020, Algorithms 1 and 2) with cubes for squares.

    Random search on the margin in the ball of eps: columns of +-eps along z first, then cubes of
    +-eps whose share of the grid starts at ``p`` and is halved as in the paper; a try stays when
    the margin grows. A shape stops once misclassified. Needs logits, no gradient.
    """
    best, (low, high) = x.clone(), _box(x, eps)
    with torch.no_grad():
        logits = f(x)
    worst, fooled = margin(logits, y), logits.argmax(1) != y
    for query in range(n_queries):
        rows = (~fooled).nonzero()[:, 0]
        if not len(rows):
            break
        tried = best[rows]
        for k, row in enumerate(rows.tolist()):
            if query == 0:
                sign = torch.randint(2, (*x.shape[1:4], 1), generator=generators[row]) * 2 - 1
                tried[k] = x[row] + eps * sign.to(x)
            else:
                side = _cube_side(query / n_queries, p, x.shape[-1])
                _set_cube(tried[k, 0], x[row, 0], eps, side, generators[row])
        tried = torch.minimum(torch.maximum(tried, low[rows]), high[rows])
        _keep_worse(f, y, rows, tried, best, worst, fooled)
    return best


def _box(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)


def _cube_side(progress: float, p: float, side: int) -> int:
    """Side of the cube: p is halved at the paper's counts out of its 10 000 queries."""
    halvings = sum(progress * 10_000 > q for q in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return max(1, round((p / 2**halvings) ** (1 / 3) * side))


def _set_cube(grid: Tensor, x: Tensor, eps: float, side: int, generator: torch.Generator) -> None:
    """Set a random cube of ``grid`` (D, D, D) to x + eps or to x - eps, in place."""
    a, b, c = torch.randint(len(grid) - side + 1, (3,), generator=generator).tolist()
    sign = 2 * int(torch.randint(2, (1,), generator=generator)) - 1
    at = (slice(a, a + side), slice(b, b + side), slice(c, c + side))
    grid[at] = x[at] + sign * eps


@torch.no_grad()
def rays(f: Network, x: Tensor, y: Tensor, n_tries: int, halvings: int = 10) -> Tensor:
    """RayS (Chen and Gu 2020, Algorithms 2 and 3): the nearest error along rays of signs.

    A decision-based attack: it asks for answers only. The ray x + r d, d in {-1, 1}, cut to
    [0, 1], starts with all signs +1; halves, quarters, ... of the flattened grid are turned over
    in turn, kept when the present radius r still fools, and r is then shrunk by bisection. Comes
    back as the nearest misclassified shape found, or as x itself; its distance is
    ``(found - x).abs()`` at most. Deterministic.
    """
    sign, radius = torch.ones_like(x).flatten(1), torch.ones(len(x), device=x.device)
    best, rows = x.clone(), (~misclassified(f, x, y)).nonzero()[:, 0]
    for block in itertools.islice(_blocks(x[0].numel()), n_tries if len(rows) else 0):
        attempt = sign.clone()
        attempt[:, block] *= -1
        hit = rows[misclassified(f, _on_ray(x[rows], attempt[rows], radius[rows]), y[rows])]
        if len(hit):
            radius[hit] = _bisect(f, x[hit], y[hit], attempt[hit], radius[hit], halvings)
            sign[hit] = attempt[hit]
            best[hit] = _on_ray(x[hit], sign[hit], radius[hit])
    return best


def _blocks(n: int) -> Iterator[slice]:
    """Nothing, then the whole of n places, its halves, its quarters, down to single places."""
    yield slice(0, 0)
    for level in range((n - 1).bit_length() + 1):
        size = -(-n // 2**level)
        yield from (slice(first, first + size) for first in range(0, n, size))


def _on_ray(x: Tensor, sign: Tensor, radius: Tensor) -> Tensor:
    return (x + (radius[:, None] * sign).view_as(x)).clamp(0, 1)


def _bisect(f: Network, x: Tensor, y: Tensor, sign: Tensor, high: Tensor, halvings: int) -> Tensor:
    """A radius (B,) up to ``high``, which is known to fool, that fools as well."""
    low, high = torch.zeros_like(high), high.clone()
    for _ in range(halvings):
        middle = (low + high) / 2
        hit = misclassified(f, _on_ray(x, sign, middle), y)
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    return high


# ---------------------------------------------------------------------------------------------
# What the loss looks like


def gradient_sizes(f: Network, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of the gradient of each shape's cross entropy: its length (B,), its share of exact zeros."""
    g = gradient(f, x, y)[0].flatten(1)
    return g.norm(dim=1), (g == 0).float().mean(1)


@torch.no_grad()
def loss_surface(f: Network, x: Tensor, y: Tensor, extents: Sequence[float], generators) -> Tensor:
    """Cross entropy (B, n, n) at x + a u + b v cut to [0, 1], for a and b of ``extents`` (n,).

    u is the sign of the gradient, v a random vector of signs; first index a, second b.
    """
    u = gradient(f, x, y)[0].sign()
    v = torch.stack([_uniform(x[0], g).sign() for g in generators])
    lines = [[surprise(f((x + a * u + b * v).clamp(0, 1)), y) for b in extents] for a in extents]
    return torch.stack([torch.stack(line, 1) for line in lines], 1)
