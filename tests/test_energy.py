"""Training of the energy-based models: what a step changes, what it keeps, and how it resumes."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from lib import cards, config, data, device, files, metrics, paths, rng, samplers, voxel
from lib.errors import StudyError
from lib.models.desnet3d import BlockedConvolution, TransformedConvolution
from lib.train import beyond, desnet3d, engine, runs, winn3d
from lib.train.checkpoint import n_parameters

CPU = torch.device("cpu")
MODELS = ("desnet3d", "winn3d", "beyond")


def profile_of(smoke, model, **changes):
    return config.with_changes(smoke, **{model: changes})


def task_of(smoke, model, **changes):
    """A task on the smoke chairs with some parameters changed."""
    profile = profile_of(smoke, model, **changes)
    chairs = data.load_train(profile.data).category("chair")
    return runs.model(model).task(profile, chairs, 0, CPU)


def trained(smoke, model, n_steps=None, **changes):
    task = task_of(smoke, model, **changes)
    for step in range(task.n_steps if n_steps is None else n_steps):
        task.step(step)
    return task


def weights(network):
    return {name: t.clone() for name, t in network.state_dict().items()}


def same(a, b):
    """True when two states hold the same tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def spied(monkeypatch, module, name):
    """Let ``module.name`` work as before and keep its calls: (positional, keyword, result)."""
    calls, original = [], getattr(module, name)

    def spy(*given, **named):
        kept = tuple(g.clone() if isinstance(g, torch.Tensor) else g for g in given)
        found = original(*given, **named)
        calls.append((kept, named, found))
        return found

    monkeypatch.setattr(module, name, spy)
    return calls


pytestmark = pytest.mark.usefixtures("workspace")


# ---------------------------------------------------------------- all three


@pytest.mark.parametrize("model", MODELS)
def test_steps_teach_the_networks_and_log_finite_numbers(smoke, model):
    task = task_of(smoke, model)
    before = {name: weights(network) for name, network in task.networks.items()}
    for step in range(task.n_steps):
        logged = task.step(step) | task.monitor(step + 1)
        assert len(logged) >= 3
        assert all(math.isfinite(value) for value in logged.values()), logged
    for name, network in task.networks.items():
        assert not same(weights(network), before[name]), name
    assert all(p.requires_grad for p in next(iter(task.networks.values())).parameters())


@pytest.mark.parametrize("model", MODELS)
def test_only_training_shapes_are_seen(smoke, model):
    task = task_of(smoke, model)
    split = data.load_train(smoke.data).category("chair")
    np.testing.assert_array_equal(task.voxels, data.model_grid(split.voxels[~split.validation], 24))
    assert len(task.voxels) < len(split.labels)
    for network in task.networks.values():
        assert network.mean.item() == pytest.approx(task.voxels.mean())


@pytest.fixture(scope="module", params=MODELS)
def final(request, workspace, smoke, tmp_path_factory):
    """A complete smoke run of each model, not published, and its folder."""
    run = runs.Run("smoke", request.param, "chair", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CHECKPOINTS", tmp_path_factory.mktemp("whole") / ".ckpt")
        yield run, runs.train(run, smoke, progress=False)


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_stopped_after_every_step_a_run_ends_with_the_same_bytes(final, checkpoints, smoke):
    run, whole = final
    torch.manual_seed(123)
    calls = 1
    while (found := runs.train(run, smoke, progress=False, deadline=-math.inf)) is None:
        calls += 1
    assert (
        calls
        == runs.model(run.model)
        .task(smoke, data.load_train(smoke.data).category("chair"), 0, CPU)
        .n_steps
    )
    assert content(found) == content(whole)


def test_what_a_run_leaves(final, smoke):
    run, folder = final
    networks = runs.model(run.model).build(smoke)
    stored = {"log.csv", "run.json", "samples-0.5.npz"}
    assert set(content(folder)) == stored | {f"{name}.safetensors" for name in networks}
    facts = files.read_json(folder / "run.json")
    assert facts["n_parameters"] == n_parameters(next(iter(networks.values())))
    shapes = voxel.load_voxels(folder / "samples-0.5.npz")
    assert shapes.shape == (16, 24, 24, 24)
    assert len(np.unique(shapes.reshape(16, -1), axis=0)) == 16


def test_samples_of_a_run_are_named_by_their_seeds(final, smoke):
    run, folder = final
    drawn = runs.sample(run, smoke, runs.load_networks(run, smoke, folder), [3, 11])
    stored = voxel.load_voxels(folder / "samples-0.5.npz")[[3, 11]]
    assert drawn.shape == (2, 24, 24, 24) and drawn.dtype == np.float32
    assert ((drawn > 0.5) != stored).mean() < 1e-3  # a voxel at .5 may fall on either side


OPTIONS = [
    ("desnet3d", {"clip": False}),
    ("desnet3d", {"observed": 0}),
    ("desnet3d", {"noise_until": 0}),
    ("desnet3d", {"dtype": "bfloat16"}),
    ("desnet3d", {"s": 0.3}),
    ("desnet3d", {"restart": 0.0}),
    ("winn3d", {"centre": "batch"}),
    ("winn3d", {"norm_first": False}),
    ("winn3d", {"start": "network"}),
    ("winn3d", {"clip": False}),
    ("winn3d", {"sigma": 0.05}),
    ("winn3d", {"sampler_beta2": 0.0}),
    ("winn3d", {"dtype": "bfloat16"}),
    ("beyond", {"dtype": "bfloat16"}),
    ("beyond", {"restart": 1.0}),
    ("beyond", {"data_noise": 0.2}),
    ("beyond", {"sigma": 0.1}),
]


@pytest.fixture(scope="module")
def plain(workspace, smoke):
    """What the first step of each model logs."""
    return {model: task_of(smoke, model).step(0) for model in MODELS}


@pytest.mark.parametrize("model, changes", OPTIONS)
def test_options_change_the_training_of_energies(smoke, plain, model, changes):
    other = task_of(smoke, model, **changes).step(0)
    assert other.keys() == plain[model].keys() and other != plain[model]
    assert all(math.isfinite(value) for value in other.values())


@pytest.mark.parametrize("model, layout", [("winn3d", "contiguous"), ("desnet3d", "blocked")])
def test_layouts_change_rounding_only(smoke, plain, model, layout):
    other = task_of(smoke, model, layout=layout).step(0)
    assert other == pytest.approx(plain[model], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "model, module, said",
    [
        (
            "desnet3d",
            desnet3d,
            "the chains diverged: .Y. reaches .* at step 1; the last checkpoint",
        ),
        ("winn3d", winn3d, "the critic diverged: f_real is .*; the last checkpoint is kept"),
        ("beyond", winn3d, "the critic diverged: f_real is .*; the last checkpoint is kept"),
    ],
)
def test_divergence_is_one_line_and_keeps_the_state(
    smoke, tmp_path, monkeypatch, model, module, said
):
    task = task_of(smoke, model)
    engine.fit(task, tmp_path, name="x", progress=False, deadline=-math.inf)
    before = (tmp_path / "state.safetensors").read_bytes()
    monkeypatch.setattr(module, "LIMIT", 0.0)
    with pytest.raises(StudyError, match=said) as error:
        engine.fit(task_of(smoke, model), tmp_path, name="x", progress=False)
    assert "\n" not in str(error.value)
    assert f"{model}." in str(error.value)  # where its parameters stand
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert files.read_json(tmp_path / "status.json")["stopped"] == str(error.value)


def fitted(smoke, folder, lr, restarts=0):
    return engine.fit_again(
        lambda: task_of(smoke, "winn3d", lr=lr, passes=3),
        folder,
        restarts=restarts,
        name="x",
        progress=False,
    )


def test_a_run_begun_again_is_the_run_at_half_the_rates(smoke, tmp_path, monkeypatch, capsys):
    calls, sizes, runs_at = spied(monkeypatch, winn3d, "guard"), {}, {}
    for lr in (0.2, 0.1):
        runs_at[lr] = fitted(smoke, tmp_path / str(lr), lr)
        sizes[lr] = max(abs(v) for given, _, _ in calls for v in given[0].values())
        calls.clear()
    assert sizes[0.2] > 1.1 * sizes[0.1]
    monkeypatch.setattr(winn3d, "LIMIT", (sizes[0.2] + sizes[0.1]) / 2)
    folder = tmp_path / "again"
    again = fitted(smoke, folder, 0.2, restarts=1)
    assert same(weights(again.critic), weights(runs_at[0.1].critic))
    assert (folder / "log.csv").read_text() == (tmp_path / "0.1" / "log.csv").read_text()
    (reason,) = engine.read_restarts(folder)
    assert reason.startswith("the critic diverged: f_")
    assert f"{reason}. Begun again at 0.5 of the rates" in capsys.readouterr().err


def test_a_run_begins_again_so_many_times_and_then_stops(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(winn3d, "LIMIT", 0.0)
    for _ in range(2):  # the second call goes on where the first gave up
        with pytest.raises(engine.Diverged, match="the critic diverged"):
            fitted(smoke, tmp_path, 0.1, restarts=2)
        assert len(engine.read_restarts(tmp_path)) == 2
    assert "the critic diverged" in files.read_json(tmp_path / "status.json")["stopped"]


def test_a_run_begun_again_says_so_in_its_record(smoke, monkeypatch):
    run = runs.Run("smoke", "winn3d", "chair", 0)
    folder = runs.state_folder(run, smoke)
    folder.mkdir(parents=True)
    files.write_json(folder / "restarts.json", {"reasons": ["the critic diverged: f is 1e7"]})
    facts = files.read_json(runs.train(run, smoke, progress=False) / "run.json")
    assert facts["restarts"] == ["the critic diverged: f is 1e7"]
    assert "- Restarts: the critic diverged: f is 1e7." in cards.card(facts, draws=True)
    assert {runs.model(m).restarts for m in MODELS} == {2}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2e6])
def test_a_critic_that_runs_away_is_stopped(value):
    winn3d.guard({"f_real": 9e5, "f_pool": -9e5}, "winn3d")
    with pytest.raises(StudyError, match="the critic diverged: f_pool is"):
        winn3d.guard({"f_real": 0.0, "f_pool": value}, "winn3d")


# ---------------------------------------------------------------- 3DWINN


def test_the_pool_begins_with_noise_and_only_grows(smoke):
    task = task_of(smoke, "winn3d", new=3, new_last=5)
    pool, sizes = task.buffers["pool"], []
    assert pool.shape == (8, 1, 24, 24, 24) and pool.dtype == torch.uint8
    noise = winn3d.start(task.winn, 24, task.mean, [(0, "pool", k) for k in range(8)])
    assert torch.equal(pool, (noise * 255).round().to(torch.uint8))
    for step in range(4):
        assert task.step(step)["pool"] == len(task.buffers["pool"])
        assert torch.equal(task.buffers["pool"][: len(pool)], pool)
        pool = task.buffers["pool"]
        sizes.append(len(pool))
    assert sizes == [11, 16, 19, 24] and pool.dtype == torch.uint8


def test_bytes_keep_a_voxel_to_half_a_level():
    x = torch.linspace(-0.5, 1.5, 4000)
    kept = winn3d.from_bytes(winn3d.to_bytes(x))
    assert (kept - x.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(winn3d.to_bytes(winn3d.from_bytes(levels)), levels)


def test_the_starts_of_3dwinn(smoke):
    normal = winn3d.start(smoke.winn3d, 24, 0.2, [7, (0, "a"), 7])
    noise = samplers.gaussian_noise(24, rng.torch_generator("start", 7))
    assert torch.equal(normal[0], (noise + 0.2).clamp(0, 1)) and torch.equal(normal[0], normal[2])
    assert not torch.equal(normal[0], normal[1])
    free = config.with_changes(smoke, winn3d={"clip": False}).winn3d
    assert torch.equal(winn3d.start(free, 24, 0.2, [7])[0], noise + 0.2)
    network = config.with_changes(smoke, winn3d={"start": "network"}).winn3d
    image = samplers.network_noise(24, rng.torch_generator("start", 7))
    assert torch.equal(winn3d.start(network, 24, 0.2, [7])[0], image)


def test_thresholds_are_the_extremes_of_the_last_pass(smoke, monkeypatch):
    """Batch means of f over real shapes, two batches a pass, as the critic met them."""
    task = task_of(smoke, "winn3d", passes=3, lr=0.01)
    updates = spied(monkeypatch, task, "_update")
    task._critic_passes(0)
    assert len(updates) == 3 * 2
    real = [found["f_real"] for _, _, found in updates]
    low, high = task.critic.threshold.tolist()
    assert (low, high) == pytest.approx((min(real[4:]), max(real[4:]))) and low < high
    assert (min(real), max(real)) != pytest.approx((low, high))


@pytest.mark.parametrize("positives, n_updates", [(8, 2), (11, 2), (0, 5)])
def test_a_pass_of_the_critic_is_half_real_and_half_pool(smoke, monkeypatch, positives, n_updates):
    """Whole batches of real shapes, none twice in a pass; 0 stands for all 22 of them."""
    task = task_of(smoke, "winn3d", positives=positives)
    assert len(task.voxels) == 22
    updates = spied(monkeypatch, task, "_update")
    task._critic_passes(0)
    rows = set()
    for (positives, negatives, _), _, _ in updates:
        assert positives.shape == negatives.shape == (4, 1, 24, 24, 24)
        for x in positives[:, 0].numpy():
            rows |= set(np.flatnonzero((task.voxels == x).all((1, 2, 3))))
        for x in winn3d.to_bytes(negatives):
            assert (task.buffers["pool"] == x).flatten(1).all(1).any()
    assert len(updates) == n_updates and len(rows) == 4 * n_updates


def test_every_batch_climbs_to_a_threshold_of_its_own(smoke, monkeypatch):
    task = task_of(smoke, "winn3d", new=7, sampler_batch=3)
    climbs = spied(monkeypatch, winn3d, "climb")
    task.step(0)
    low, high = task.critic.threshold.tolist()
    thresholds = [given[3] for given, _, _ in climbs]
    assert [len(t) for t in thresholds] == [3, 3, 1]
    assert all(len(t.unique()) == 1 and low <= t[0] <= high for t in thresholds)
    assert len({t[0].item() for t in thresholds}) == 3


def test_a_climb_ends_at_its_threshold(smoke):
    """Batches stop together, shapes one by one, and the cap holds."""
    task = trained(smoke, "winn3d", 1)
    x = winn3d.start(task.winn, 24, task.mean, list(range(4)))
    f, _ = samplers.input_gradient(task.critic, x)
    options = dict(max_steps=60)
    end, taken = winn3d.climb(task.winn, task.critic, x, f + 1e-3, stop="batch", **options)
    assert len(taken.unique()) == 1 and 0 < taken[0] < 60
    assert task.critic(end).mean() >= (f + 1e-3).mean() - 1e-5
    end, taken = winn3d.climb(task.winn, task.critic, x, f + 1e-3, stop="shape", **options)
    assert (task.critic(end) >= f + 1e-3 - 1e-5).all() and taken.max() < 60
    _, taken = winn3d.climb(task.winn, task.critic, x, f + 1e6, stop="shape")
    assert (taken == task.winn.max_steps).all()
    assert 0 <= end.min() and end.max() <= 1


def test_a_cascade_begins_where_the_last_one_ended(smoke, monkeypatch):
    task = task_of(smoke, "winn3d", new=2, new_last=6)
    climbs = spied(monkeypatch, winn3d, "climb")
    held = []
    for step in range(4):
        task.step(step)
        held.append(task.buffers["start"].clone())
    assert [len(h) for h in held] == [0, 6, 6, 6]
    assert torch.equal(held[1], held[2]) and not torch.equal(held[2], held[3])
    assert torch.equal(held[1], task.buffers["pool"][10:16])  # after 8 of noise and 2
    starts = [winn3d.to_bytes(given[2]) for given, _, _ in climbs]
    assert [len(s) for s in starts] == [2, 4, 2, 2, 4, 2]  # a climb holds four
    for k, found in enumerate(starts):
        known = [(held[1] == x).flatten(1).all(1).any().item() for x in found]
        assert all(known) if k >= 3 else not any(known)


def test_earlier_cascades_keep_their_critic(smoke):
    task = task_of(smoke, "winn3d", cascades=2, iterations=2, lr=0.01)
    begun = weights(task.networks["cascade_1"])
    ends = []
    for step in range(4):
        task.step(step)
        ends.append(weights(task.critic))
        assert same(weights(task.networks["cascade_1"]), begun if step == 0 else ends[1])
    assert task.critic is task.networks["cascade_2"]
    for name in ("convolutions.1.weight", "threshold"):
        assert not torch.equal(ends[1][name], ends[3][name])
    # One optimiser, which goes on: 2 updates a step.
    assert {int(s["step"]) for s in task.optimizers["critic"].state.values()} == {8}


@pytest.fixture(scope="module")
def cascades(workspace, smoke):
    """Two critics that were taught something, with thresholds that six steps may reach or not."""
    task = trained(smoke, "winn3d", lr=0.005)
    x = winn3d.start(task.winn, 24, task.mean, list(range(8)))
    never = torch.full((8,), math.inf)
    for network in task.networks.values():
        low, _ = samplers.input_gradient(network, x)
        x, _ = winn3d.climb(task.winn, network, x, never, stop="shape", max_steps=6)
        high, _ = samplers.input_gradient(network, x)
        network.threshold.copy_(torch.stack([low.min(), high.max()]))
    return list(task.networks.values())


@pytest.mark.parametrize("sigma", [0.0, 0.02])
def test_a_shape_of_the_cascades_does_not_depend_on_its_batch(smoke, cascades, sigma):
    winn = profile_of(smoke, "winn3d", max_steps=8, sigma=sigma).winn3d
    many, steps = winn3d.sample_cascade(winn, cascades, [4, 17, 2, 30])
    assert many.shape == (4, 24, 24, 24) and steps.shape == (4, 2)
    assert len(np.unique(steps)) > 2
    for k, seed in enumerate([4, 17, 2, 30]):
        one, taken = winn3d.sample_cascade(winn, cascades, [seed])
        assert (taken[0] == steps[k]).all()
        apart = np.abs(one[0] - many[k])
        # Adam divides by a gradient's own size: rounding shows in the few voxels where it is 0.
        assert np.quantile(apart, 0.999) < 1e-3 and apart.max() < 0.05
    between = np.abs(many[0] - many[1])
    assert between.max() > 0.5 and np.median(between) > 0.01


def test_shapes_climb_to_the_end_where_training_never_stops(smoke, cascades):
    winn = profile_of(smoke, "winn3d", max_steps=8, stop="never").winn3d
    _, steps = winn3d.sample_cascade(winn, cascades, [4, 17])
    assert (steps == 8).all()


def test_the_way_through_the_cascades(smoke, cascades):
    winn = profile_of(smoke, "winn3d", max_steps=8).winn3d
    begun, steps = winn3d.sample_cascade(winn, cascades, [1, 2], max_steps=0)
    mean = cascades[0].mean.item()
    assert not steps.any()
    np.testing.assert_array_equal(begun, winn3d.start(winn, 24, mean, [1, 2])[:, 0].numpy())
    first, _ = winn3d.sample_cascade(winn, cascades[:1], [1, 2])
    both, steps = winn3d.sample_cascade(winn, cascades, [1, 2])
    moved = steps > 0
    assert ((first != begun).any((1, 2, 3)) == moved[:, 0]).all()
    assert ((both != first).any((1, 2, 3)) == moved[:, 1]).all() and moved.any()


def test_critics_of_the_last_iterations_share_the_samples_of_a_joint_run(smoke):
    budget = dict(cascades=1, iterations=3, snapshots=2, new=2, new_last=2, max_steps=2)
    profile = profile_of(smoke, "winn3d", n_samples=5, **budget)
    split, shares = data.load_train(profile.data), []
    task = runs.model("winn3d").task(profile, split.category("all"), 0, CPU)
    for step in range(3):
        task.step(step)
        critics = list(task.networks.values())
        shares.append(winn3d.sample_cascade(profile.winn3d, critics, list(range(5)))[0])
        assert bool(task.other_samples()) == (step > 0)
    found = task.other_samples()["multi"].numpy()
    assert found.shape == (5, 24, 24, 24)
    for seed, moment in enumerate([2, 1, 2, 1, 2]):
        np.testing.assert_allclose(found[seed], shares[moment][seed], atol=0.5 / 255 + 1e-3)
    assert np.abs(shares[1] - shares[2]).max() > 0.003
    alone = task_of(smoke, "winn3d", n_samples=5, **budget)
    alone.step(2)
    assert alone.other_samples() == {}


# ---------------------------------------------------------------- 3D DescriptorNet


def test_one_update_a_learning_step_from_the_sum_over_batches(smoke):
    task = task_of(smoke, "desnet3d", observed=8, batch=4, chains=3)
    before = copy.deepcopy(task.network)
    task.step(0)
    chains = task.buffers["chains"]
    assert chains.shape == (2 * 3, 1, 24, 24, 24)
    for k in range(2):
        observed = torch.from_numpy(task.voxels[task._observed_rows(0, k)][:, None]).float()
        assert len(observed) == 4
        gap = before(chains[3 * k : 3 * k + 3]).mean() - before(observed).mean()
        gap.backward()
    for a, b in zip(task.network.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    (state,) = {int(s["step"]) for s in task.optimizers["descriptor"].state.values()}
    assert state == 1
    task.step(1)
    assert {int(s["step"]) for s in task.optimizers["descriptor"].state.values()} == {2}


def test_all_shapes_are_observed_once_in_fixed_pairs(smoke):
    task = task_of(smoke, "desnet3d", observed=0, batch=4)
    n = len(task.voxels)
    assert task.n_batches == math.ceil(n / 4) and n % 4 != 0
    for step in (0, 5):
        rows = [task._observed_rows(step, k) for k in range(task.n_batches)]
        assert np.concatenate(rows).tolist() == list(range(n))
    assert len(task.buffers["chains"]) == task.n_batches * 4


def test_some_shapes_are_observed_in_turn(smoke):
    task = task_of(smoke, "desnet3d", observed=8, batch=4)
    n, rows = len(task.voxels), []
    for step in range(n):
        rows += [i for k in range(2) for i in task._observed_rows(step, k)]
    assert np.bincount(rows, minlength=n).tolist() == [8] * n


def test_chains_persist(smoke, monkeypatch):
    task = task_of(smoke, "desnet3d", restart=0.0)
    begun = task.buffers["chains"].clone()
    noise = samplers.gaussian_noise(24, rng.torch_generator("start", 0, "chain", 1))
    assert torch.equal(begun[1], noise + task.network.mean)
    calls = spied(monkeypatch, desnet3d, "run_chains")
    for step in range(3):
        task.step(step)
    assert len(calls) == 6
    for k in range(2):
        part = begun[4 * k : 4 * k + 4]
        for given, _, end in calls[k::2]:
            assert torch.equal(given[2], part) and not torch.equal(end, part)
            part = end
        assert torch.equal(task.buffers["chains"][4 * k : 4 * k + 4], part)


@pytest.mark.parametrize("restart, least, most", [(0.25, 1, 40), (1.0, 48, 48)])
def test_chains_restart_from_noise_of_their_own(smoke, monkeypatch, restart, least, most):
    task = task_of(smoke, "desnet3d", restart=restart)
    before, mean = task.buffers["chains"].clone(), task.network.mean.clone()
    calls, fresh = spied(monkeypatch, desnet3d, "run_chains"), 0
    for step in range(6):
        task.step(step)
        for k, (given, _, end) in enumerate(calls[-2:]):
            for r, chain in enumerate(given[2]):
                noise = rng.torch_generator("start", 0, "restart", step, k, r)
                new = torch.equal(chain, samplers.gaussian_noise(24, noise) + mean)
                assert new or torch.equal(chain, before[4 * k + r])
                fresh += new
            before[4 * k : 4 * k + 4] = end
    assert least <= fresh <= most


@pytest.mark.parametrize("noise_until", [0, 1, 3])
def test_from_some_step_on_chains_only_descend(smoke, noise_until):
    task = task_of(smoke, "desnet3d", noise_until=noise_until, restart=0.0)
    for step in range(3):
        before, network = task.buffers["chains"].clone(), copy.deepcopy(task.network)
        task.step(step)
        still = samplers.langevin(network.energy, before, delta=0.1, steps=2, box=(0.0, 1.0))
        difference = (task.buffers["chains"] - still).abs().max()
        assert (difference < 1e-5) == (step >= noise_until), step


@pytest.mark.parametrize("until, shares", [(1, [1, 1, 2 / 3, 1 / 3]), (4, [1] * 4), (9, [1] * 4)])
def test_the_rate_of_the_descriptor_falls_linearly_to_the_end(smoke, until, shares):
    task = task_of(smoke, "desnet3d", steps=4, lr=0.01, lr_until=until)
    for step, share in enumerate(shares):
        task.step(step)
        group = task.optimizers["descriptor"].param_groups[0]
        assert group["lr"] == pytest.approx(0.01 * share), step


def test_without_bfloat16_instructions_blocks_are_computed_by_transforms(smoke, monkeypatch):
    """The same training but for the order of sums, by other layers."""
    changes = dict(dtype="bfloat16", layout="blocked")
    before = parameters_to_vector(task_of(smoke, "desnet3d", **changes).network.parameters())
    layers, chains, moves = spied(monkeypatch, desnet3d, "_layers"), [], []
    for native in (True, False):
        monkeypatch.setattr(device, "has_bfloat16", lambda native=native: native)
        task = trained(smoke, "desnet3d", 2, **changes)
        kind = BlockedConvolution if native else TransformedConvolution
        assert layers and {type(layer) for _, _, found in layers for layer in found} == {kind}
        layers.clear()
        chains.append(task.buffers["chains"])
        moves.append(parameters_to_vector(task.network.parameters()) - before)
    torch.testing.assert_close(*chains, rtol=1e-3, atol=1e-3)
    # Adam's first steps are signs, which rounding turns where a gradient is nearly 0.
    assert 0 < (moves[0] - moves[1]).norm() < 0.1 * moves[0].norm()


@pytest.mark.parametrize("clip", [True, False])
def test_chains_are_clipped_where_the_profile_says_so(smoke, clip):
    task = trained(smoke, "desnet3d", 1, clip=clip)
    inside = task.buffers["chains"].min() >= 0 and task.buffers["chains"].max() <= 1
    assert inside == clip


def test_one_batch_of_chains_that_runs_away_is_enough(smoke):
    """The reach is that of the farthest chain, not a mean over batches."""
    task = task_of(smoke, "desnet3d", clip=False, langevin_steps=1)
    task.buffers["chains"][:4] = 1.5 * desnet3d.LIMIT
    with pytest.raises(StudyError, match="the chains diverged"):
        task.step(0)


def test_a_network_that_runs_away_from_clipped_chains_is_stopped(smoke):
    """Clipped chains cannot leave the box, however large f becomes; a high rate makes it so."""
    task = task_of(smoke, "desnet3d", clip=True, langevin_steps=1, lr=1e4)
    with pytest.raises(StudyError, match="the network diverged: .f. reaches .* at step"):
        for step in range(8):
            assert task.step(step)["reach"] <= 1


@pytest.mark.parametrize("noise_until, noisy", [(0, False), (2, False), (3, True), (9, True)])
def test_samples_have_noise_when_training_ended_with_it(smoke, monkeypatch, noise_until, noisy):
    profile = profile_of(smoke, "desnet3d", noise_until=noise_until)
    network = trained(smoke, "desnet3d", 1).network
    calls = spied(monkeypatch, samplers, "langevin")
    desnet3d.sample_chains(profile.desnet3d, network, [1], 2)
    assert [named["noise"] is not None for _, named, _ in calls] == [noisy]


@pytest.mark.parametrize("noise_until", [0, 9])
def test_distances_are_those_of_chains_of_each_number_of_steps(smoke, monkeypatch, noise_until):
    changes = dict(noise_until=noise_until, sample_steps=[1, 3, 4], n_validation=5)
    desnet = profile_of(smoke, "desnet3d", **changes).desnet3d
    task = trained(smoke, "desnet3d", 2)
    seen = spied(monkeypatch, metrics, "overlap_distance")
    found = desnet3d.distances_by_steps(desnet, task.network, task.held_out)
    assert list(found) == [1, 3, 4] and list(found.values()) == [value for *_, value in seen]
    keys = [("desnet3d", "validation", k) for k in range(5)]
    for steps, (given, _, _) in zip(found, seen, strict=True):
        noise = samplers.SeededNoise(keys, 24, CPU) if noise_until else None
        x = desnet3d.start(task.network, keys)
        x = desnet3d.run_chains(desnet, task.network, x, steps=steps, noise=noise)
        np.testing.assert_array_equal(given[0], voxel.pack(x[:, 0].numpy() > 0.5))
        np.testing.assert_array_equal(given[1], voxel.pack(task.held_out))


def test_one_validation_shape_is_too_few_to_choose_steps_by(smoke):
    chairs = data.load_train(smoke.data).category("chair")
    chairs.validation[:] = np.arange(len(chairs.validation)) == 3
    with pytest.raises(StudyError, match=r"data.validation leaves 1 of \d+ shapes"):
        runs.model("desnet3d").task(smoke, chairs, 0, CPU)


def test_the_fewest_steps_of_the_least_distance_draw_the_samples(smoke, monkeypatch):
    """What is chosen is stored with the weights and in the record, and only validation sees it."""
    distances = iter([0.5, 0.25, 0.25, 0.75])
    monkeypatch.setattr(metrics, "overlap_distance", lambda drawn, real: next(distances))
    task = trained(smoke, "desnet3d", 1, sample_steps=[1, 2, 3, 4])
    shapes = {len(task.voxels), len(task.held_out)}
    assert sum(shapes) == len(data.load_train(smoke.data).category("chair").voxels)
    task.finish()
    assert task.facts() == {
        "sample steps": 2,
        "distance by sample steps": {1: 0.5, 2: 0.25, 3: 0.25, 4: 0.75},
    }
    drawn = runs.model("desnet3d").sample(smoke, task.networks, [3])
    expected = desnet3d.sample_chains(smoke.desnet3d, task.network, [3], 2)
    np.testing.assert_array_equal(drawn, expected)
    loaded = desnet3d.build(smoke.desnet3d, 24)
    loaded.load_state_dict(task.network.state_dict())
    assert int(loaded.sample_steps) == 2


@pytest.mark.parametrize("noise_until", [0, 9])
def test_a_sampled_chain_does_not_depend_on_its_batch(smoke, noise_until):
    desnet = profile_of(smoke, "desnet3d", noise_until=noise_until).desnet3d
    network = trained(smoke, "desnet3d").network
    many = desnet3d.sample_chains(desnet, network, [4, 17, 2], 5)
    one = desnet3d.sample_chains(desnet, network, [17], 5)
    np.testing.assert_allclose(many[1], one[0], atol=1e-5)
    assert np.abs(many[1] - many[0]).max() > 0.5
    start = desnet3d.start(network, [(17,)])[0, 0].numpy()
    np.testing.assert_array_equal(desnet3d.sample_chains(desnet, network, [17], 0)[0], start)


# ---------------------------------------------------------------- ours


def changed_rows(before, after):
    return set((before != after).flatten(1).any(1).nonzero()[:, 0].tolist())


def test_a_few_chains_go_on_at_every_step(smoke):
    task = task_of(smoke, "beyond")
    chains, seen = [task.buffers["chains"].clone()], []
    for step in range(4):
        task.step(step)
        chains.append(task.buffers["chains"].clone())
        seen.append(changed_rows(*chains[-2:]))
    assert [len(rows) for rows in seen] == [4, 4, 4, 4]
    assert seen[0] | seen[1] == seen[2] | seen[3] == set(range(8))


def test_chains_begin_around_the_mean_and_stay_in_their_box(smoke):
    task = task_of(smoke, "beyond", start_std=0.1, sigma=0.3, margin=0.25)
    assert task.buffers["chains"].dtype == torch.float16
    begun = task.buffers["chains"].float()
    noise = samplers.gaussian_noise(24, rng.torch_generator("start", 0, "chain", 3))
    expected = (0.1 * noise + task.critic.mean).clamp(-0.25, 1.25)
    torch.testing.assert_close(begun[3], expected, rtol=0, atol=1e-3)
    for step in range(4):
        task.step(step)
    # The bounds are numbers of half precision.
    assert task.buffers["chains"].min() == -0.25 and task.buffers["chains"].max() == 1.25


@pytest.mark.parametrize("restart", [0.0, 1.0])
def test_chains_start_anew_or_go_on(smoke, monkeypatch, restart):
    task = task_of(smoke, "beyond", restart=restart)
    calls = spied(monkeypatch, beyond, "run_chains")
    for step in range(4):
        before = task.buffers["chains"].clone()
        task.step(step)
        (given, named, end), now = calls[-1], task.buffers["chains"]
        rows = [(now == x.half()).flatten(1).all(1).nonzero().item() for x in end]
        went_on = (given[2].half() == before[rows]).flatten(1).all(1)
        assert went_on.all() if restart == 0 else not went_on.any()
        fresh = beyond.start(task.beyond, task.critic, [(0, "restart", step, 1)])[0]
        assert torch.equal(given[2][1], fresh) == (restart == 1)
        assert named["steps"] == 2


def test_the_weights_that_sample_are_a_running_mean(smoke):
    """Of all steps so far while they are few, then with the decay ``average``."""
    task = task_of(smoke, "beyond", average=0.6, lr=0.01)
    mean = None
    for step in range(4):
        task.step(step)
        now = weights(task.critic)
        share = (1, 1 / 2, 0.4, 0.4)[step]
        mean = now if mean is None else {n: mean[n] + share * (now[n] - mean[n]) for n in now}
        for name, value in weights(task.networks["average"]).items():
            torch.testing.assert_close(value, mean[name])
    assert not same(weights(task.networks["average"]), weights(task.critic))
    assert not any(p.requires_grad for p in task.networks["average"].parameters())


def test_the_running_mean_samples(smoke):
    task, model = trained(smoke, "beyond", lr=0.05), runs.model("beyond")
    assert model.sampling == ("average",)
    found = model.sample(smoke, {"average": task.networks["average"]}, [0, 1])
    drawn = [
        beyond.sample_chains(smoke.beyond, task.networks[n], [0, 1], smoke.beyond.sample_steps)
        for n in ("average", "critic")
    ]
    np.testing.assert_array_equal(found, drawn[0])
    assert (drawn[0] != drawn[1]).any()


def test_a_sampled_chain_of_ours_does_not_depend_on_its_batch(smoke):
    critic = trained(smoke, "beyond", lr=0.01).networks["average"]
    many = beyond.sample_chains(smoke.beyond, critic, [4, 17, 2], 4)
    one = beyond.sample_chains(smoke.beyond, critic, [17], 4)
    np.testing.assert_allclose(many[1], one[0], atol=1e-3)
    assert np.abs(many[1] - many[0]).max() > 0.5
    margin = smoke.beyond.margin
    assert -margin - 1e-6 <= many.min() and many.max() <= 1 + margin + 1e-6
    start = beyond.start(smoke.beyond, critic, [(17,)])[0, 0].numpy()
    np.testing.assert_array_equal(beyond.sample_chains(smoke.beyond, critic, [17], 0)[0], start)


def test_a_joint_run_draws_by_the_critics_of_its_last_iterations(workspace, smoke):
    split = data.load_train(smoke.data)
    task = runs.model("winn3d").task(smoke, split, 0, CPU)
    for step in range(task.n_steps - 1):
        task.step(step)
    assert (task.buffers["multi"][1::2] > 0).any() and not task.buffers["multi"][::2].any()
    task.step(task.n_steps - 1)
    multi = task.other_samples()["multi"]
    assert multi.shape == (smoke.winn3d.n_samples, 24, 24, 24)
    single = runs.sample(runs.Run("smoke", "winn3d", "all", 0), smoke, task.networks, [0, 2])
    np.testing.assert_allclose(multi[[0, 2]], single, atol=0.5 / 255 + 1e-6)
    one = runs.model("winn3d").task(smoke, split.category("chair"), 0, CPU)
    assert one.other_samples() == {} and not one.joint
