"""The one training loop: logs, checkpoints, resumes, guards against divergence.

What is trained is a ``Task``. Random numbers of a task are named by the step (``lib.rng``), so a
checkpoint holds tensors and counters only, and N steps equal N/2, a kill, and N/2 more.
"""

import contextlib
import csv
import fcntl
import functools
import io
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib import device, files
from lib.errors import StudyError
from lib.train import checkpoint
from lib.train.ranks import Alone


class Diverged(StudyError):
    """A run left the range in which it can learn: what was found, and what to do about it."""

    def __init__(self, finding: str, advice: str = ""):
        super().__init__(f"{finding}; the last checkpoint is kept. {advice}".strip())
        self.finding = finding


class Locked(StudyError):
    """Another process trains the run now."""


class Task:
    """A model in training: networks, optimizers, counters, and one step.

    A subclass fills the attributes in its constructor and defines ``step``. ``counters`` are plain
    values that the next step needs; ``buffers`` are tensors (chains, pools, best weights).

    Where a step shares its batch among the processes of ``ranks``, ``gradients`` says how theirs
    make the batch's: ``mean`` or ``sum``. None: several would not train what one trains.
    """

    ranks: Alone = Alone()
    gradients: str | None = None
    fused: bool = False  # whether optimizers take each step in one kernel, see ``lib.device``

    n_steps: int
    log_every: int
    networks: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    counters: dict[str, float]
    buffers: dict[str, object]

    def step(self, step: int) -> dict[str, float]:
        """One update; returns what to log."""
        raise NotImplementedError

    def monitor(self, step: int) -> dict[str, float | str]:
        """What is measured at every log line beside the losses; ``warning`` is shown at once."""
        return {}

    def finish(self) -> None:
        """Called once after the last step, before the weights are stored."""

    def facts(self) -> dict:
        """What the run's record says of it beside the rest, such as what ``finish`` chose."""
        return {}

    def other_samples(self) -> dict[str, Tensor]:
        """Sample sets beside those of the stored weights: name -> voxels (n, D, D, D) in [0, 1]."""
        return {}

    def state(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "networks": {n: m.state_dict() for n, m in self.networks.items()},
            "optimizers": {n: o.state_dict() for n, o in self.optimizers.items()},
            "counters": dict(self.counters),
            "buffers": dict(self.buffers),
        }

    def load_state(self, state: dict) -> None:
        """Take up a state of the same task."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.counters.update(state["counters"])
        self.buffers.update(state["buffers"])


@dataclass(frozen=True)
class Model:
    """How a model is trained and stored; every ``lib/train/<model>.py`` defines one ``MODEL``.

    task(profile, split, seed, where) -> Task; build(profile) -> {name: network};
    sample(profile, networks, seeds) -> probabilities (N, D, D, D), or None for classifiers;
    ``sampling`` names the networks that it needs, the only ones published for one category.
    A run that diverges is begun again ``restarts`` times at most. ``modules`` are the model's files
    whose code decides what training computes.
    """

    task: Callable
    build: Callable
    modules: tuple[str, ...]
    sample: Callable | None = None
    sampling: tuple[str, ...] = ()
    restarts: int = 0


# Files that decide what training computes for every model.
SHARED_MODULES = ("lib/data.py", "lib/rng.py", "lib/train/engine.py", "lib/train/ranks.py")

LOCK_TRIES, LOCK_WAIT = 10, 0.02  # ``is_locked`` holds a lock too, for a moment


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder; Locked when another process trains it now.

    Temporary files of a killed process are removed: nobody else writes there now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        if not _held(file):
            file.seek(0)
            raise Locked(
                f"{folder.name}: process {file.read().strip() or 'unknown'} trains this run; "
                "wait for it or stop it"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for leftover in folder.glob(".*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield


def _held(file) -> bool:
    """Whether this process could take the lock."""
    for _ in range(LOCK_TRIES):
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(LOCK_WAIT)
    return False


def fit(
    task: Task,
    folder: Path,
    *,
    name: str,
    deadline: float = math.inf,
    checkpoint_seconds: float = 120.0,
    progress: bool = True,
) -> bool:
    """Train ``task`` to its last step, from wherever ``folder`` says it stopped; True when done.

    folder: holds ``state.safetensors``, ``log.csv`` and ``status.json``. deadline: in seconds of
    ``time.monotonic``; when it passes, the state is saved and False returned. The state is also
    saved every ``checkpoint_seconds`` and, at the end of the step, on Ctrl-C and SIGTERM, which
    then raise KeyboardInterrupt.
    Raises Diverged when a loss is no longer finite or the task says so; the last
    good state stays, the log shows the way there and ``status.json`` the reason.
    Of several processes (``task.ranks``) the first reads and writes, and all stop together.
    """
    ranks = task.ranks
    for optimizer in task.optimizers.values():
        ranks.join_gradients(optimizer, task.gradients)
    state, warning = ranks.agree(lambda: checkpoint.load_latest(folder / "state.safetensors"))
    first, rows, spent = 0, [], 0.0
    if state is not None:
        task.load_state(state["task"])
        first, rows, spent = state["step"], state["rows"], state["seconds"]
    for optimizer in task.optimizers.values():
        device.fuse(optimizer, task.fused)
    bar = tqdm(
        total=task.n_steps,
        initial=first,
        desc=name,
        disable=not progress,
        mininterval=2,
        unit="step",
    )
    if warning and ranks.rank == 0:
        bar.write(f"warning: {warning}", file=sys.stderr)
    started = saved = time.monotonic()
    step = first

    def save() -> None:
        seconds = spent + max(0.0, time.monotonic() - started)
        done = {"task": task.state(), "step": step, "rows": rows, "seconds": seconds}
        checkpoint.save(folder / "state.safetensors", done)
        files.write_text(folder / "log.csv", log_csv(rows))
        status = {"step": step, "n_steps": task.n_steps, "seconds": round(seconds, 1)}
        files.write_json(folder / "status.json", status)

    signals, restore = _deferred_signals()
    try:
        while step < task.n_steps:
            logged = task.step(step)
            _guard(logged, name, step)
            step += 1
            if step % task.log_every == 0 or step == task.n_steps:
                logged |= task.monitor(step)
                if (text := logged.get("warning")) and ranks.rank == 0:
                    bar.write(f"warning: {name} step {step}: {text}", file=sys.stderr)
                rows.append({"step": step} | logged)
                bar.set_postfix_str(_summary(logged), refresh=False)
            bar.update()
            now = time.monotonic()
            late, due, told = ranks.any(
                now > deadline, now - saved > checkpoint_seconds, bool(signals)
            )
            if late and step < task.n_steps:
                break
            if due:
                ranks.agree(save)
                saved = now
            if told:
                ranks.agree(save)
                raise KeyboardInterrupt(f"{name}: stopped at step {step}, saved")
    except Diverged as error:
        # The state of the last checkpoint is sound; what led here is for the reader.
        if ranks.rank == 0:
            files.write_text(folder / "log.csv", log_csv(rows))
            stopped = {"step": step, "n_steps": task.n_steps, "seconds": 0, "stopped": str(error)}
            files.write_json(folder / "status.json", stopped)
        raise
    finally:
        bar.close()
        restore()
    if step == task.n_steps:
        task.finish()
    ranks.agree(save)
    return step == task.n_steps


def fit_again(
    make: Callable[[], Task], folder: Path, *, restarts: int, **options: object
) -> Task | None:
    """``fit`` of what ``make`` builds, begun again at half the rates where it diverges.

    Returns the complete task, or None when the deadline came first. The reasons are kept in
    ``restarts.json``; after ``restarts`` of them Diverged is raised. A run begins again at its
    start, not at its last checkpoint: where that lies depends on the clock, and runs must repeat.
    """
    while True:
        task = make()
        reasons = task.ranks.agree(lambda: read_restarts(folder))
        for optimizer in task.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] *= 0.5 ** len(reasons)
        try:
            return task if fit(task, folder, **options) else None
        except Diverged as error:
            if len(reasons) >= restarts:
                raise
            again = functools.partial(_begin_again, folder, [*reasons, error.finding])
            task.ranks.agree(again)


def read_restarts(folder: Path) -> list[str]:
    """Why the run in ``folder`` was begun again, a sentence a time."""
    path = folder / "restarts.json"
    return files.read_json(path)["reasons"] if path.is_file() else []


def _begin_again(folder: Path, reasons: list[str]) -> None:
    """Forget the diverged state first: killed in between, the run diverges and comes here again."""
    for left in (*folder.glob("state.safetensors*"), folder / "status.json"):
        left.unlink(missing_ok=True)
    files.write_json(folder / "restarts.json", {"reasons": reasons})
    again = f"Begun again at {0.5 ** len(reasons):g} of the rates"
    print(f"warning: {folder.name}: {reasons[-1]}. {again}", file=sys.stderr)


def _deferred_signals() -> tuple[list[int], Callable[[], None]]:
    """Collect SIGINT and SIGTERM instead of being cut in the middle of a step; and how to undo it.

    Only the main thread may do so; elsewhere signals act as before.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        return received, lambda: None
    both = (signal.SIGINT, signal.SIGTERM)
    before = {s: signal.signal(s, lambda number, _: received.append(number)) for s in both}
    return received, lambda: [signal.signal(s, handler) for s, handler in before.items()]


def _guard(logged: dict, name: str, step: int) -> None:
    for key, value in logged.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise Diverged(
                f"{name}: {key} became {value} at step {step}",
                "Lower the learning rate or change the seed in params",
            )


def _summary(logged: dict) -> str:
    return " ".join(f"{k}={v:.3g}" for k, v in logged.items() if isinstance(v, float))


def log_csv(rows: list[dict]) -> str:
    """The log of record: one line a log step, columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def is_locked(folder: Path) -> bool:
    """True while some process trains the run in ``folder``."""
    try:
        with open(folder / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
