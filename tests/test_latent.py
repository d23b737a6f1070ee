"""Latent spaces: every number against a space whose answer is known."""

import math

import numpy as np
import pytest
import torch

from lib import config, data, latent, paths, rng, voxel
from lib.errors import StudyError
from lib.models import gan3d
from lib.train import autoencoder, runs

CHAIR = runs.Run("smoke", "vae3d", "chair", 0)
SIDE = 24


def toy(encode=True, reach=2.0, **changes):
    """Two dimensions on 24^3: the first fills as many slices along x as it says, the second none.

    Dimension 0 in units of slices has mean 12 and deviation 3; codes of grids count their slices.
    """

    def decode(codes):
        slices = torch.arange(SIDE)[None, :, None, None] < codes[:, 0].round()[:, None, None, None]
        return slices.expand(-1, -1, SIDE, SIDE).float().numpy()

    def encoder(grids):
        counts = torch.from_numpy(grids.any((2, 3)).sum(1)).float()
        return torch.stack([counts, torch.zeros_like(counts)], dim=1)

    def draw(seeds):
        return torch.tensor([[9.0 + s % 7, 0.0] for s in seeds])

    parts = dict(run=CHAIR, draw=draw, decode=decode, encode=encoder if encode else None)
    parts |= dict(centre=torch.tensor([12.0, 0.0]), spread=torch.tensor([3.0, 1.0]), reach=reach)
    parts |= dict(threshold=0.5)
    return latent.Space(**parts | changes)


@pytest.fixture(scope="module")
def own(workspace, smoke, tmp_path_factory):
    """A smoke run of every latent model, and joint generators, published for this file."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("latent")
        patch.setattr(paths, "WORKSPACE", folder)
        patch.setattr(paths, "CHECKPOINTS", folder / ".ckpt")
        alone = [(m, "chair") for m in latent.STUDIED]
        for model, category in [*alone, *((m, "all") for m in latent.GENERATORS)]:
            run = runs.Run("smoke", model, category, 0)
            runs.publish(run, runs.train(run, smoke, progress=False))
        yield folder


@pytest.fixture(scope="module")
def found(own, smoke):
    return latent.spaces(smoke)


# ---------------------------------------------------------------- spaces


def test_spaces_are_those_of_the_published_runs_and_the_others_are_named(found, smoke):
    spaces, absent = found
    labels = ["3D-GAN, chair", "3D-VAE, chair", "autoencoder + Gaussian, chair"]
    labels += ["3D-VAE-GAN, chair", "3D-GAN, all", "3D-VAE-GAN, all"]
    assert [s.label for s in spaces] == [t for s in labels for t in (s, f"{s}, above 0.1")]
    assert absent == ["smoke-vae3d-all-s0", "smoke-autoencoder-all-s0"]


def test_a_space_is_read_above_each_threshold_of_its_tables(found, smoke):
    """A voxel of probability .3 is filled above .1 and empty above .5."""
    spaces = found[0]
    assert [s.threshold for s in spaces[:2]] == [0.5, 0.1]
    faint = [toy(decode=lambda z: np.full((len(z), 2, 2, 2), 0.3), threshold=t) for t in (0.5, 0.1)]
    z = torch.zeros(1, 2)
    assert [latent._read(space, z).mean() for space in faint] == [0, 1]


def test_a_space_draws_what_the_run_samples(found, smoke):
    for space in found[0]:
        networks = runs.load_networks(space.run, smoke, space.run.weights)
        expected = runs.sample(space.run, smoke, networks, [0, 5])
        np.testing.assert_allclose(space.decode(space.draw([0, 5])), expected, atol=1e-6)


def test_centre_and_spread_are_those_of_the_draws(found):
    for space in found[0]:
        z = space.draw(list(range(4000)))
        torch.testing.assert_close(z.std(0), space.spread, rtol=0.06, atol=1e-6)
        assert ((z.mean(0) - space.centre).abs() < 0.08 * space.spread).all()
    uniform = found[0][0]
    ends = latent.along(uniform, uniform.draw([1])[0], torch.eye(16)[3], 2)[:, 3]
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)


def test_without_any_weights_there_is_one_clear_line(workspace, smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "WORKSPACE", tmp_path)
    with pytest.raises(StudyError, match="no latent space to look at") as error:
        latent.spaces(smoke)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- dimensions


def test_a_sweep_moves_one_coordinate_from_end_to_end():
    space, z = toy(), torch.tensor([14.0, 0.7])
    moved = latent.along(space, z, torch.tensor([1.0, 0.0]), 3)
    torch.testing.assert_close(moved, torch.tensor([[6.0, 0.7], [12.0, 0.7], [18.0, 0.7]]))
    slanted = torch.tensor([0.6, 0.8])
    moved = (latent.along(space, z, slanted, 5) - space.centre) / space.spread
    torch.testing.assert_close(moved @ slanted, torch.linspace(-2, 2, 5))
    across = torch.tensor([0.8, -0.6])
    torch.testing.assert_close(
        moved @ across, ((z - space.centre) / space.spread @ across).expand(5)
    )


def test_changed_voxels_are_counted(smoke):
    profile = config.with_changes(smoke, latent={"dimensions": 2, "bases": 3, "values": 5})
    swept = latent.sweep(toy(), profile)
    axes = swept[swept["kind"] == "dimension"].set_index(["number", "base"])["changed"]
    for base in range(3):  # slices 6 to 18, of a shape of 9 + base
        assert axes[0, base] == pytest.approx(12 / (9 + base)) and axes[1, base] == 0
    table = latent.sweep_table({"toy": swept}).set_index("measure")
    assert table.loc["dimensions that act", "value"] == 0.5
    assert table.loc["change by a dimension", "value"] == pytest.approx(
        np.mean([6 / 9, 6 / 10, 6 / 11])
    )
    # A random direction moves the first dimension by its cosine.
    assert 0.4 < table.loc["change by a dimension", "its value"] / (12 / 10) < 0.85


def test_the_strongest_dimension_is_shown_with_what_its_ends_do_not_share(smoke):
    space = toy()
    swept = latent.sweep(space, smoke)
    shapes, marks, captions = latent.sweep_ends(space, swept, 1)
    low, high = (s[0] for s in shapes.values())
    assert (low.any((1, 2)).sum(), high.any((1, 2)).sum()) == (6, 18)
    for mark in marks.values():
        np.testing.assert_array_equal(np.flatnonzero(mark[0].any((1, 2))), np.arange(6, 18))
    assert captions[0].startswith("dimension 0: ")


# ---------------------------------------------------------------- ways


def test_codes_go_in_small_steps_and_voxels_jump():
    a, b = torch.tensor([[4.0, 0.0]]), torch.tensor([[20.0, 0.0]])
    codes, blend = (w[0] > 0.5 for w in latent.ways(toy(), a, b, 5))
    assert codes.any((2, 3)).sum(1).tolist() == [4, 8, 12, 16, 20]
    assert blend.any((2, 3)).sum(1).tolist() == [4, 4, 4, 20, 20]
    assert latent.least_overlap(codes) == 4 / 8 and latent.least_overlap(blend) == 4 / 20


def test_pairs_are_of_one_category_or_of_two():
    labels = np.array([0, 0, 0, 1, 1])
    same, other = (latent.draw_pairs(labels, 100, kind, "test") for kind in (True, False))
    assert sorted(map(tuple, same.tolist())) == [(0, 1), (0, 2), (1, 2), (3, 4)]
    assert len(other) == 6 and all(labels[i] != labels[j] for i, j in other)
    few = latent.draw_pairs(labels, 3, False, "test")
    np.testing.assert_array_equal(few, other[:3])
    assert len(latent.draw_pairs(np.zeros(4), 5, False, "test")) == 0


def test_the_ends_of_ways_are_held_out_shapes(workspace, smoke):
    points = latent.known_points(toy(), smoke)
    split = data.load_train(smoke.data).category("chair")
    held_out = data.model_grid(split.voxels[split.validation], SIDE)
    np.testing.assert_array_equal(points.grids, held_out)
    assert (points.codes[:, 0].numpy() == held_out.any((2, 3)).sum(1)).all()


def test_draws_are_labelled_by_their_nearest_training_shape(found, smoke):
    joint = next(s for s in found[0] if s.label == "3D-GAN, all")
    points = latent.known_points(joint, smoke)
    split = data.load_train(smoke.data)
    real, labels = split.voxels[~split.validation], split.labels[~split.validation]
    real = data.model_grid(real, SIDE)
    shape = joint.decode(points.codes[:1])[0] > 0.5
    overlaps = [voxel.intersection_over_union(shape, r) for r in real]
    assert points.grids is None and points.labels[0] == labels[int(np.argmax(overlaps))]
    assert len(points.codes) == 4 * smoke.latent.pairs


def test_interpolation_is_measured_against_the_blend_and_the_ends(workspace, smoke):
    space = toy(encode=False)
    way = latent.interpolation(space, smoke, True)
    codes, blend = way["smoothness"]
    assert len(codes) == smoke.latent.pairs and (codes >= blend).all() and (codes > blend).any()
    assert way["ways"][0].shape == (smoke.latent.steps, SIDE, SIDE, SIDE)
    assert latent.interpolation(space, smoke, False) is None
    table, pictures = latent.interpolation_table([space], smoke)
    assert list(table["measure"]) == ["smoothness, one category", "resemblance, one category"]
    assert len(pictures) == 2


# ---------------------------------------------------------------- arithmetic


def test_squeezing_keeps_thin_parts_and_three_quarters_of_the_extent():
    grid = np.zeros((1, SIDE, SIDE, SIDE), bool)
    grid[0, 4:20, 5, 5] = True
    squeezed = latent.squeeze(grid)
    np.testing.assert_array_equal(np.flatnonzero(squeezed[0].any((1, 2))), np.arange(6, 18))
    for x in range(SIDE):  # a slice is one voxel thick and never lost
        thin = np.zeros_like(grid)
        thin[0, x, 3, 4] = True
        kept = np.argwhere(latent.squeeze(thin)[0])
        assert len(kept) in (1, 2) and (kept[:, 1:] == (3, 4)).all()
        assert abs(kept[:, 0].mean() + 0.5 - 12 - 0.75 * (x + 0.5 - 12)) <= 0.5


def test_sums_of_codes_find_the_answer_where_the_code_is_the_attribute(smoke, monkeypatch):
    """Bars along x whose code is their extent: the sum of codes is right, that of voxels is not."""
    bars = np.zeros((6, SIDE, SIDE, SIDE), bool)
    for k, bar in enumerate(bars):
        bar[: 8 + 2 * k] = True
    space = toy()
    known = latent.Known(space.encode(bars), np.zeros(6), bars)
    monkeypatch.setattr(latent, "known_points", lambda *_: known)
    monkeypatch.setattr(latent, "squeeze", lambda x: np.roll(x, -4, 1) & x)  # 4 slices shorter
    monkeypatch.setattr(latent, "_training", lambda *_: bars)
    overlaps, terms = latent.known_arithmetic(space, smoke)
    assert (overlaps["codes"] == 1).all() and (overlaps["reconstruction"] == 1).all()
    i, j = latent.draw_pairs(known.labels, smoke.latent.pairs, True, "triples")[0]
    b, c = 8 + 2 * i, 8 + 2 * j
    # a - b + c: the bar of c without the slices that b lost.
    left = c - (min(b, c) - min(b - 4, c))
    both = min(c, b - 4) + max(0, min(c - 4, c) - max(b, 0))
    assert terms["voxels"].any((1, 2)).sum() == left
    assert overlaps["voxels"][0] == pytest.approx(both / (left + c - 4 - both))
    assert overlaps["c unchanged"][0] == pytest.approx((c - 4) / c)


def test_sums_of_draws_are_compared_with_sums_of_voxels_and_with_draws(workspace, smoke):
    overlaps, terms = latent.drawn_arithmetic(toy(), smoke)
    n = smoke.latent.pairs
    assert {k: len(v) for k, v in overlaps.items()} == {"codes": n, "voxels": n, "c": n}
    sizes = {k: int(v.any((1, 2)).sum()) for k, v in terms.items()}
    assert sizes["codes"] == sizes["a"] - sizes["b"] + sizes["c"]


def test_the_arithmetic_table_has_known_answers_for_encoders_only(found, smoke):
    table, terms = latent.arithmetic_table(found[0][0:3:2], smoke)
    rows = table.groupby("row")["measure"].unique()
    assert list(rows["3D-GAN, chair"]) == ["resemblance of a - b + c"]
    assert "overlap with the answer" in rows["3D-VAE, chair"]
    assert "answer" in terms["3D-VAE\nchair"] and "answer" not in terms["3D-GAN\nchair"]


# ---------------------------------------------------------------- neurons


def test_only_joint_runs_publish_a_discriminator(own, smoke):
    assert [run.id for run in latent.discriminators(smoke)] == [
        "smoke-gan3d-all-s0",
        "smoke-vaegan3d-all-s0",
    ]


def test_the_top_shapes_are_those_that_excite_a_neuron_most(own, smoke):
    run = latent.discriminators(smoke)[0]
    network = runs.model("gan3d").build(smoke)["discriminator"]
    file = run.weights / "discriminator.safetensors"
    network = latent.checkpoint.load_weights(file, network)
    split = data.load_train(smoke.data)
    grids = data.model_grid(split.voxels[~split.validation], SIDE)
    for neuron in latent.neurons(run, smoke):
        with torch.no_grad():
            x = torch.from_numpy(grids[:, None]).float()
            answers = network.responses(x)[-1][:, neuron.number].flatten(1).max(1).values
        best = answers.topk(smoke.latent.top).indices
        np.testing.assert_array_equal(neuron.shapes, grids[best.numpy()])
        a, b = neuron.shapes
        assert neuron.shape_overlap[0] == pytest.approx(voxel.intersection_over_union(a, b))
        for shape, mark in zip(neuron.shapes, neuron.marks, strict=True):
            assert not (mark & ~shape).any() and mark.sum() == max(1, round(shape.sum() / 10))


def test_marks_are_where_the_answer_is_most_sensitive():
    network = gan3d.Discriminator(base=3, channels=(2, 2, 2)).eval()
    gan3d.initialise(network, 0.5, rng.torch_generator("salient"))
    mark = torch.from_numpy(latent.salient(network, np.ones((1, SIDE, SIDE, SIDE), bool), 1)[0])
    x = torch.ones(1, 1, SIDE, SIDE, SIDE, requires_grad=True)
    network.responses(x)[-1][0, 1].max().backward()
    sizes = x.grad[0, 0].abs()
    assert mark.sum() == round(SIDE**3 / 10) and sizes.max() > 0
    assert sizes[mark].min() >= sizes[~mark].max()


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "ours, theirs, verdict",
    [
        ([0.9, 0.8, 0.9, 0.85], [0.5, 0.5, 0.5, 0.5], "higher"),
        ([0.5, 0.4, 0.5, 0.45], [0.9, 0.9, 0.9, 0.9], "lower"),
        ([0.9, 0.1, 0.9, 0.1], [0.5, 0.5, 0.5, 0.5], "undecided"),
        ([0.9], [0.1], "undecided"),
    ],
)
def test_a_verdict_needs_an_interval_that_leaves_out_zero(ours, theirs, verdict):
    line = latent.against("row", "measure", "baseline", ours, theirs)
    assert line["verdict"] == verdict and line["n"] == len(ours)
    assert line["difference"] == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert len(ours) > 1 or math.isnan(line["low"])


def test_the_encoder_of_a_space_is_that_of_the_run(found, smoke):
    space = found[0][2]
    networks = runs.load_networks(space.run, smoke, space.run.weights)
    split = data.load_train(smoke.data).category("chair")
    grids = data.model_grid(split.voxels[:3], SIDE)
    assert torch.equal(space.encode(grids), autoencoder.encode(networks["encoder"], grids))
    assert found[0][0].encode is None
