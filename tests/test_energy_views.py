"""Energies of shapes and the way from noise to a shape, for the three energy-based models."""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from lib import config, data, energy, paths, samplers, voxel
from lib.errors import StudyError
from lib.train import runs, winn3d


@pytest.fixture(scope="module")
def own(workspace, tmp_path_factory):
    """A place of this file for runs and results, on the shared shapes."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("energies")
        patch.setattr(paths, "WORKSPACE", folder)
        patch.setattr(paths, "CHECKPOINTS", folder / ".ckpt")
        yield folder


@pytest.fixture(scope="module", params=list(energy.VIEWS))
def trained(request, own, smoke):
    """A smoke run of each model, published, and the networks that sample it."""
    run = runs.Run("smoke", request.param, "chair", 0)
    runs.publish(run, runs.train(run, smoke, progress=False))
    return run, runs.load_networks(run, smoke, run.weights)


def last(networks):
    """The network whose energies count: the only one, or that of the last cascade."""
    return list(networks.values())[-1]


@pytest.fixture
def visited(monkeypatch):
    """Where samplers ask for a gradient: the voxels (B, 1, D, D, D) at every step."""
    seen, ask = [], samplers.input_gradient

    def spy(f, x):
        seen.append(x.detach().clone())
        return ask(f, x)

    monkeypatch.setattr(samplers, "input_gradient", spy)
    return seen


def chairs(smoke):
    """Training part and validation part of the chairs, on the model grid."""
    split = data.load_train(smoke.data).category("chair")
    grids = data.model_grid(split.voxels, smoke.data.side)
    return grids[~split.validation], grids[split.validation]


# ---------------------------------------------------------------- energies


def test_energies_are_those_of_the_shapes_they_name(trained, smoke):
    run, networks = trained
    network = last(networks)
    train, held_out = chairs(smoke)
    found = energy.energies(run, smoke, network, 100)

    def of(shapes):
        with torch.no_grad():
            return np.sort(network.energy(torch.as_tensor(shapes)[:, None].float()).numpy())

    samples = voxel.load_voxels(run.samples / "samples-0.5.npz")
    expected = {"training": train, "held-out": held_out, "generated": samples}
    for kind, shapes in expected.items():
        np.testing.assert_allclose(np.sort(found[kind]), of(shapes), rtol=1e-4, atol=1e-4)
    assert len(found["corrupted"]) == len(held_out) and len(found["noise"]) == len(samples)
    assert all(e.dtype == np.float32 and np.isfinite(e).all() for e in found.values())


def test_noise_is_where_the_samples_start(trained, smoke, visited):
    run, networks = trained
    runs.sample(run, smoke, networks, [3])
    start = energy.VIEWS[run.model].start(smoke, list(networks.values())[0], [3])
    assert torch.equal(visited[0], start)


def test_fewer_shapes_are_a_part_of_more(trained, smoke):
    run, networks = trained
    few = energy.energies(run, smoke, last(networks), 2)
    more = energy.energies(run, smoke, last(networks), 16)
    assert {len(e) for e in few.values()} == {2}
    for kind, values in few.items():
        np.testing.assert_allclose(values, more[kind][:2], rtol=1e-4, atol=1e-4)


def test_corruption_turns_over_a_tenth_of_the_neighbourhood(workspace, smoke):
    grids = chairs(smoke)[1]
    before, corrupted = grids.copy(), energy.corrupt(grids, 0)
    np.testing.assert_array_equal(grids, before)
    for grid, changed in zip(grids, corrupted, strict=True):
        near = binary_dilation(grid, np.ones((3, 3, 3)))
        flipped = grid ^ changed
        assert flipped.sum() == round(near.sum() / 10) and not (flipped & ~near).any()
        # On the object and around it, in proportion to the voxels of each.
        assert abs(flipped[grid].mean() - 0.1) < 0.03
    np.testing.assert_array_equal(energy.corrupt(grids, 0), corrupted)
    assert (energy.corrupt(grids, 1) != corrupted).any()


def test_the_sentence_counts_pairs():
    found = {
        "training": np.array([0.0, 2.0]),
        "held-out": np.array([1.0, 1.0]),
        "generated": np.array([0.0]),
        "corrupted": np.array([0.5, 3.0]),
        "noise": np.array([9.0]),
    }
    text = energy.in_words(found)
    assert "raises the energy of 50% of" in text and "in 100% of its pairs with noise" in text
    assert text.endswith("in 50% with a training shape and in 0% with a generated one.")


# ---------------------------------------------------------------- films


def without_repeats(shapes):
    """Shapes without those that equal the one before; where a climb ends they are met twice."""
    moved = (shapes[1:] != shapes[:-1]).any((1, 2, 3))
    return shapes[np.append(True, moved)]


def test_frames_are_moments_of_one_sample(trained, smoke, visited):
    run, networks = trained
    sample = runs.sample(run, smoke, networks, [5])
    path = np.concatenate([*(x[:, 0].numpy() for x in visited), sample])
    film = energy.film(run, smoke, networks, 5, [0, 1, 2, 3])
    frames = np.concatenate(list(film.values()))
    np.testing.assert_array_equal(without_repeats(frames), without_repeats(path))


def test_a_climb_that_ends_early_repeats_its_end_and_the_next_goes_on_there(own, smoke, visited):
    profile = config.with_changes(smoke, winn3d={"max_steps": 9})
    run, names = runs.Run("smoke", "winn3d", "chair", 0), winn3d.cascade_names(profile.winn3d)
    networks = {}
    for k, name in enumerate(names):
        networks[name] = winn3d.build(profile.winn3d, profile.data.side)
        winn3d.winn3d.initialise(networks[name], 0.02, torch.Generator().manual_seed(k))
        networks[name].threshold.fill_(1e9)
    critics = list(networks.values())
    winn3d.sample_cascade(profile.winn3d, critics[:1], [0])
    values = critics[0](torch.cat(visited)).detach()
    assert (values.diff() > 0).all()  # so that a threshold between two values names a step
    critics[0].threshold.fill_(float(values[4] + values[3]) / 2)
    film = energy.film(run, profile, networks, 0, [0, 2, 4, 6, 9])
    first, second = film["cascade 1"], film["cascade 2"]
    assert (first[1] != first[2]).any() and (second[3] != second[4]).any()
    for later in (first[3], first[4], second[0]):
        np.testing.assert_array_equal(later, first[2])
    expected, taken = winn3d.sample_cascade(profile.winn3d, critics, [0])
    assert taken.tolist() == [[4, 9]]
    np.testing.assert_array_equal(second[4], expected[0])


def test_moments_begin_with_noise_and_end_with_the_sample():
    assert energy.moments(3) == [0, 1, 2, 3]
    moments = energy.moments(1000)
    assert len(moments) == 10 and moments[0] == 0 and moments[-1] == 1000
    assert (np.diff(moments, 2) > 0).all()


def test_no_film_where_noise_is_annealed(smoke):
    profile = config.with_changes(smoke, winn3d={"sigma": 0.01})
    with pytest.raises(StudyError, match="sigma"):
        energy.film(runs.Run("smoke", "winn3d", "chair", 0), profile, {}, 0, [0])


def test_models_without_energies_are_refused(smoke):
    with pytest.raises(StudyError, match="gan3d has no energies"):
        energy.film(runs.Run("smoke", "gan3d", "chair", 0), smoke, {}, 0, [0])
