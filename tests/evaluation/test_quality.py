"""Sets of images compared: the figures, their names, and what they are computed from."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff.config import DataConfig, Metric
from fastdiff.data import normalised
from fastdiff.evaluation import features, metrics
from fastdiff.evaluation.features import extract
from fastdiff.evaluation.image_sets import (
    ImageSet,
    ReferenceStatistics,
    holds_images,
    holds_statistics,
    open_images,
    read_statistics,
    refuse_statistics_file,
    save_statistics,
)
from fastdiff.evaluation.neighbours import lines, neighbours_of
from fastdiff.evaluation.quality import Comparison, Figure
from fastdiff.runtime.display import Lines
from fastdiff.runtime.distributed import World
from fastdiff.training.augmentation import whole

from ..support import refusal
from .colours import DIMENSIONS, Colours, Quarters, pictures, program

CPU = torch.device("cpu")


def images(count: int = 40, **changes: int) -> ImageSet:
    return ImageSet(pictures(count, **changes), about={"data": "pictures", "count": count, "size": 8})


def by_hand(pixels: np.ndarray) -> np.ndarray:
    return Quarters()(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).numpy()


@pytest.fixture
def compare(tmp_path):
    """``compare.of(extractor)`` is a Comparison; ``compare.said`` are its log lines, ``compare.told`` its progress."""
    said, told = [], []

    def of(extractor=None, seed=0):
        def progress(what):
            return lambda *at: told.append((what, *at))

        return Comparison(extractor or Colours(), CPU, tmp_path, World(), said.append, progress, seed)

    return SimpleNamespace(of=of, said=said, told=told)


def test_larger_images_are_resized_as_in_training():
    large = pictures(9, size=10)
    found = ImageSet(large, size=8).only(np.arange(1, 9))
    expected = whole(normalised(torch.from_numpy(large[1:])), 8).permute(0, 2, 3, 1) * 127.5 + 127.5
    levels = found.read(2, 7)
    assert levels.shape == (5, 8, 8, 3)
    assert np.abs(levels - expected[2:7].numpy()).max() <= 1.1  # rounded after each dimension
    assert np.array_equal(found[6], levels[4])


@pytest.mark.parametrize("batch", [7, 64])
def test_features_are_those_of_every_image(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(features, "BATCH", batch)
    ours, told = images(), []
    found = extract(ours, Colours(spatial=True), tmp_path, CPU, World(), lambda *at: told.append(at[:2]))
    assert found is not None
    np.testing.assert_allclose(found.features, by_hand(ours.images), rtol=1e-6)
    np.testing.assert_array_equal(found.spatial, found.features[:, ::2])
    assert found.probabilities is None
    assert isinstance(found.features, np.memmap)
    assert told == [(min(done, 40), 40) for done in range(batch, 40 + batch, batch)]


def test_figures(compare):
    ours, theirs = images(), images(50, seed=1)
    comparison = compare.of(Colours("", spatial=True, probabilities=True), seed=3)
    found = {figure.key: figure for figure in comparison.figures(ours, comparison.reference(theirs))}
    one, other = by_hand(ours.images), by_hand(theirs.images)
    distance = metrics.frechet_distance(metrics.statistics_of(one), metrics.statistics_of(other))
    assert found[Metric.FD].value == pytest.approx(distance, rel=1e-5)
    kernel = metrics.kernel_distance(one, other, seed=3)
    assert (found[Metric.KD].value, found[Metric.KD].deviation) == pytest.approx(
        (kernel.mean, kernel.deviation), abs=1e-6
    )
    shares = metrics.neighbourhoods(one, other)
    for key in (Metric.PRECISION, Metric.RECALL, Metric.DENSITY, Metric.COVERAGE):
        assert found[key].value == pytest.approx(getattr(shares, key))
    assert found[Metric.SFID].value == pytest.approx(
        metrics.frechet_distance(metrics.statistics_of(one[:, ::2]), metrics.statistics_of(other[:, ::2])), rel=1e-4
    )
    assert found[Metric.SCORE].value == pytest.approx(1.01, abs=0.01)
    assert {figure.name for figure in found.values()} == {
        "FID (n=40, colours)",
        "KID (n=40, colours, 100 subsets of 20, seed 3)",
        "sFID (n=40, colours)",
        "Inception score (n=40, colours, 10 splits, seed 3)",
        *(f"{name} (n=40, colours)" for name in ("precision", "recall", "density", "coverage")),
    }
    assert not compare.said
    assert {"samples", "reference", "distances"} == {what for what, *_ in compare.told}


def test_other_extractors_give_no_fid(compare):
    comparison = compare.of(Colours(probabilities=True))
    found = comparison.figures(images(), comparison.reference(images(seed=1)))
    names = [figure.name.partition(" (")[0] for figure in found]
    assert names == ["FD-Colours", "KD-Colours", "precision", "recall", "density", "coverage"]


def test_equal_sets(compare):
    comparison = compare.of()
    found = {figure.key: figure.value for figure in comparison.figures(images(), comparison.reference(images()))}
    assert abs(found[Metric.FD]) < 1e-6
    assert found[Metric.PRECISION] == found[Metric.RECALL] == found[Metric.COVERAGE] == 1


def test_few_images_are_warned_about_once(compare):
    comparison = compare.of()
    theirs = comparison.reference(images(30, seed=1))
    for _ in range(2):
        comparison.figures(images(DIMENSIONS), theirs)
    (said,) = compare.said
    assert said.startswith(f"warning: {DIMENSIONS} images for {DIMENSIONS} features: ")
    assert "KD-Colours" in said


def test_no_neighbourhoods_of_five(compare):
    comparison = compare.of()
    found = comparison.figures(images(5), comparison.reference(images(50, seed=1)))
    assert [figure.key for figure in found] == [Metric.FD, Metric.KD]
    assert compare.said[-1] == "precision, recall, density and coverage need 6 images or more on both sides, not 5"


def test_features_that_say_nothing(compare):
    class Nothing(Colours):
        def _extract(self, images):
            found = super()._extract(images)
            return type(found)(found.features * 0)

    comparison = compare.of(Nothing())
    comparison.figures(images(), comparison.reference(images(seed=1)))
    assert compare.said == ["warning: colours gives all samples the same features, which say nothing of them"]


def test_a_figure_that_is_no_number(compare):
    class Huge(Colours):
        def _extract(self, images):
            found = super()._extract(images)
            return type(found)(found.features * 1e30)

    comparison = compare.of(Huge())
    said = refusal(lambda: comparison.figures(images(), comparison.reference(images(seed=1))))
    assert "is not a finite number" in said


def test_a_line_ends_in_its_value():
    assert Figure(Metric.FD, "FID (n=2, x)", 1.25).line() == "FID (n=2, x) 1.2500"
    assert Figure(Metric.KD, "KID (n=2, x)", 0.25, 0.5).line() == "KID (n=2, x, deviation 0.5) 0.25"


class TestStatistics:
    @pytest.fixture
    def saved(self, tmp_path, compare):
        known = compare.of(Colours(spatial=True)).reference(images(50, seed=1))
        save_statistics(tmp_path / "stats.npz", known.statistics, known.spatial, Colours(), known.size)
        return tmp_path / "stats.npz"

    def test_read_back_they_give_the_same_figures(self, compare, saved):
        comparison = compare.of(Colours("", spatial=True))
        expected = {f.key: f.value for f in comparison.figures(images(), comparison.reference(images(50, seed=1)))}
        known = comparison.reference(read_statistics(saved, comparison.extractor, CPU, 8))
        found = {f.key: f.value for f in comparison.figures(images(), known)}
        assert found == {key: pytest.approx(expected[key], rel=1e-9) for key in (Metric.FD, Metric.SFID)}
        assert known.about["count"] == 50

    def test_what_holds_them(self, saved, tmp_path):
        np.savez(tmp_path / "images.npz", arr_0=pictures(3))
        np.savez(tmp_path / "both.npz", arr_0=pictures(3), mu=np.zeros(3), sigma=np.eye(3))
        (tmp_path / "text.npz").write_text("mu.npy sigma.npy")
        found = [holds_statistics(tmp_path / f"{name}.npz") for name in ("stats", "images", "both", "text", "none")]
        assert found == [True, False, True, False, False]
        assert (holds_images(saved), holds_images(tmp_path / "both.npz")) == (False, True)

    def test_of_another_extractor(self, saved, tmp_path):
        class Other(Colours):
            name = "others"

        class Newer(Colours):
            sha256 = "0"

        assert "has the statistics of colours, and the extractor is others" in refusal(
            lambda: read_statistics(saved, Other(), CPU, 8)
        )
        assert "of colours with other weights" in refusal(lambda: read_statistics(saved, Newer(), CPU, 8))

        class Impostor(Colours):
            name = "inception-2015-12-05"

        np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3))
        for extractor in (Colours(), Impostor()):
            assert "has the statistics of inception-2015-12-05, as those of guided-diffusion's evaluator" in refusal(
                lambda extractor=extractor: read_statistics(tmp_path / "adm.npz", extractor, CPU, 8)
            )

    def test_of_guided_diffusion_s_evaluator(self, tmp_path, compare):
        class Inception(Colours):
            name = "inception-2015-12-05"

        arrays = {"mu": np.zeros(12, np.float32), "sigma": np.eye(12, dtype=np.float32)}
        np.savez(tmp_path / "adm.npz", **arrays, mu_s=np.zeros(6), sigma_s=np.eye(6))
        found = read_statistics(tmp_path / "adm.npz", Inception("", spatial=True), CPU, 8)
        assert found.spatial is not None
        assert found.about["count"] is None
        comparison = compare.of(Inception("", spatial=True))
        figures = comparison.figures(images(), comparison.reference(found))
        assert [figure.key for figure in figures] == [Metric.FD, Metric.SFID]

    @pytest.mark.parametrize(
        ("arrays", "said"),
        [
            ({"mu": np.zeros(3), "sigma": np.eye(4)}, "mu of 3 values and sigma of (4, 4)"),
            ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [0, 1]])}, "not symmetric"),
            ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
            ({"mu": np.zeros((2, 2)), "sigma": np.eye(2)}, "as mu"),
            ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "as mu"),
            ({"mu": np.zeros(2), "sigma": np.eye(2), "count": np.float64("inf")}, "as count"),
            ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "negative eigenvalues"),
            ({"mu": np.zeros(2), "sigma": np.eye(2), "count": -5}, "below 0"),
        ],
    )
    def test_damaged(self, tmp_path, arrays, said):
        class Inception(Colours):
            name = "inception-2015-12-05"

        np.savez(tmp_path / "bad.npz", **arrays)
        assert said in refusal(lambda: read_statistics(tmp_path / "bad.npz", Inception(""), CPU, 8))

    def test_of_other_features(self, tmp_path):
        class Inception(Colours):
            name = "inception-2015-12-05"

        arrays = {"mu": np.zeros(12), "sigma": np.eye(12), "mu_s": np.zeros(6), "sigma_s": np.eye(6)}
        for wrong in (("mu", "sigma"), ("mu_s", "sigma_s")):
            changed = dict(zip(wrong, (np.zeros(3), np.eye(3)), strict=True))
            np.savez(tmp_path / "stats.npz", **(arrays | changed))
            said = refusal(lambda: read_statistics(tmp_path / "stats.npz", Inception("", spatial=True), CPU, 8))
            assert "has statistics of 3 features, and inception-2015-12-05 has " in said

    def test_of_images_of_another_size(self, saved):
        said = refusal(lambda: read_statistics(saved, Colours(spatial=True), CPU, 16))
        assert said.endswith("has the statistics of images of 8 pixels, not 16: compare one size")

    def test_with_images_beside_them(self, compare):
        """As in guided-diffusion's references: the distance is that of the statistics, the shares are the images'."""
        theirs = images(50, seed=1)
        known = compare.of().reference(theirs)
        both = ReferenceStatistics(known.statistics, None, {"data": "adm.npz"}, images=theirs.first(20))
        comparison = compare.of()
        found = {f.key: f.value for f in comparison.figures(images(), comparison.reference(both))}
        expected = {f.key: f.value for f in comparison.figures(images(), comparison.reference(theirs))}
        few = {f.key: f.value for f in comparison.figures(images(), comparison.reference(theirs.first(20)))}
        assert found[Metric.FD] == pytest.approx(expected[Metric.FD], rel=1e-9)
        assert {k: v for k, v in found.items() if k is not Metric.FD} == pytest.approx(
            {k: v for k, v in few.items() if k is not Metric.FD}
        )

    def test_where_they_are_written(self, saved, tmp_path):
        assert "exists" in refusal(lambda: refuse_statistics_file(saved))
        assert "must end in .npz" in refusal(lambda: refuse_statistics_file(tmp_path / "stats"))


class TestImages:
    @pytest.fixture
    def opened(self, tmp_path):
        config = DataConfig(cache_dir=str(tmp_path / "cache"))
        return lambda place, size=None: open_images(place, size, World(), Lines(lambda _: None), config)

    def folder(self, path: Path, *sizes: int) -> Path:
        path.mkdir()
        for i, size in enumerate(sizes):
            Image.fromarray(pictures(1, size, seed=i)[0]).save(path / f"{i}.png")
        return path

    def test_of_an_npz(self, opened, tmp_path):
        np.savez(tmp_path / "a.npz", arr_0=pictures(3))
        found = opened(tmp_path / "a.npz")
        np.testing.assert_array_equal(found.images, pictures(3))
        assert (len(found), found.size) == (3, 8)
        assert "of 8 pixels, not 16" in refusal(lambda: opened(tmp_path / "a.npz", 16))

    def test_of_a_folder(self, opened, tmp_path):
        found = opened(self.folder(tmp_path / "a", 8, 8, 8))
        assert found.images.shape == (3, 8, 8, 3)
        assert found.names == ("0.png", "1.png", "2.png")
        assert isinstance(found.images, np.memmap)

    def test_of_several_sizes(self, opened, tmp_path):
        folder = self.folder(tmp_path / "a", 8, 16)
        assert "has images of 8x8 to 16x16 pixels: give the size to compare at with --image-size" in refusal(
            lambda: opened(folder)
        )
        assert opened(folder, 8).images.shape == (2, 8, 8, 3)

    def test_one_is_none_to_compare(self, opened, tmp_path):
        assert "has one image" in refusal(lambda: opened(self.folder(tmp_path / "a", 8)))
        np.savez(tmp_path / "a.npz", arr_0=pictures(1))
        assert "has one image" in refusal(lambda: opened(tmp_path / "a.npz"))

    def test_not_square(self, opened, tmp_path):
        np.savez(tmp_path / "a.npz", arr_0=np.zeros((3, 8, 9, 3), np.uint8))
        assert "9x8 pixels: they must be square" in refusal(lambda: opened(tmp_path / "a.npz"))

    def test_the_first_ones(self):
        ours = images(5)
        np.testing.assert_array_equal(ours.first(2).read(0, 2), ours.images[:2])
        assert (len(ours.first(2)), ours.first(2).about["count"], ours.first(5)) == (2, 2, ours)
        assert refusal(lambda: ours.first(6)) == "num_samples 6: pictures has 5 images"


class TestNeighbours:
    def test_by_hand(self):
        training = np.array([[0.0], [10], [13]], np.float32)
        samples = np.array([[1.0], [9], [11.4], [14]], np.float32)
        found = neighbours_of(samples, training)
        assert found.rows[:, 0].tolist() == [0, 1, 1, 2]
        assert found.distances[:, 0].tolist() == pytest.approx([1, 1, 1.4, 1])
        # the nearest other training image is at 10, 3, 3 and 3
        assert found.ratios == pytest.approx([0.1, 1 / 3, 1.4 / 3, 1 / 3])
        assert found.authenticity == 0
        assert found.suspects(2).tolist() == [0, 1]

    def test_copies_and_strangers(self):
        training = by_hand(pictures(30))
        far = training + 100
        assert neighbours_of(training, training).authenticity == 0
        assert neighbours_of(training, training).ratios.max() == 0
        assert neighbours_of(far, training).authenticity == 1

    def test_copies_among_the_training_images(self):
        """They have no distance to each other: only an equal sample is a copy of theirs."""
        training = np.repeat(by_hand(pictures(1)), 2, axis=0)
        found = neighbours_of(np.concatenate([training[:1], training[:1] + 1]), training)
        assert found.ratios.tolist() == [0, np.inf]
        ours = ImageSet(pictures(2))
        assert lines(found, ours, ours, "colours")[-2] == "1 of 2 samples have the pixels of a training image"
        assert lines(found, ours, ours, "colours")[-1] == "authenticity (n=2, colours) 0.5000"


class TestInPython:
    """fastdiff.sample_metrics"""

    @pytest.fixture
    def settings(self, tmp_path):
        return {
            "extractor": str(program(tmp_path / "colours.pt")),
            "trust": True,
            "extractor_size": 8,
            "device": "cpu",
            "cache_dir": str(tmp_path / "cache"),
        }

    def test_arrays_and_files_give_the_same(self, settings, tmp_path):
        ours, theirs = pictures(40), pictures(50, seed=1)
        np.savez(tmp_path / "a.npz", arr_0=ours)
        np.savez(tmp_path / "b.npz", arr_0=theirs)
        found = fastdiff.sample_metrics(ours, theirs, **settings)
        assert found.keys() == {"fd", "kd", "kd_deviation", "precision", "recall", "density", "coverage"}
        for pair in (
            (ours, tmp_path / "b.npz"),
            (tmp_path / "a.npz", theirs),
            (tmp_path / "a.npz", tmp_path / "b.npz"),
        ):
            assert fastdiff.sample_metrics(*pair, **settings) == found

    def test_bad_arguments(self, settings):
        ours = pictures(4)
        said = [
            refusal(lambda: fastdiff.sample_metrics(ours / 255, ours, **settings)),
            refusal(lambda: fastdiff.sample_metrics(ours, pictures(4, size=16), **settings)),
            refusal(lambda: fastdiff.sample_metrics(ours, ours[:1], **settings)),
            refusal(lambda: fastdiff.sample_metrics(ours, ours, steps=3, **settings)),
        ]
        assert said == [
            "samples must be square images, uint8 (N, H, H, 3), not float64 (4, 8, 8, 3)",
            "reference has images of 16 pixels, not 8: compare images of one size",
            "reference: a comparison needs two images or more, not 1",
            "sample_metrics has no setting steps",
        ]
