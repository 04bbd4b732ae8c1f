"""The metrics against torch-fidelity's figures (torch_fidelity.npz), against plain code, and where they are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.evaluation import metrics
from fastdiff.evaluation.metrics import (
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_distances,
    nearest_in,
    neighbourhoods,
    squared_mmd,
    statistics_of,
)

JUDGE = Path(__file__).with_name("torch_fidelity.npz")


@pytest.fixture(scope="module")
def judge():
    with np.load(JUDGE) as stored:
        return {name: stored[name] for name in stored.files}


@pytest.fixture(params=[7, 100, 1024])
def blocks(request, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", request.param)


def distances(x, y):
    return np.sqrt(((x[:, None].astype(np.float64) - y[None]) ** 2).sum(-1))


@pytest.mark.usefixtures("blocks")
class TestAgainstTorchFidelity:
    def test_frechet_distance(self, judge):
        found = frechet_distance(statistics_of(judge["samples"]), statistics_of(judge["reference"]))
        assert found == pytest.approx(float(judge["fid"]), rel=1e-6)

    def test_precision_and_recall(self, judge):
        found = neighbourhoods(judge["samples"], judge["reference"])
        assert found.precision == pytest.approx(float(judge["precision"]), rel=1e-6)
        assert found.recall == pytest.approx(float(judge["recall"]), rel=1e-6)


def test_mmd_is_torch_fidelity_s(judge):
    x, y = (torch.from_numpy(judge[name]).double() for name in ("samples", "reference"))
    found = [squared_mmd(x[a.astype(int)], y[b.astype(int)]) for a, b in judge["mmd_rows"]]
    np.testing.assert_allclose(found, judge["mmd"], rtol=1e-6, atol=1e-10)


def test_inception_score_is_torch_fidelity_s(judge, monkeypatch):
    probabilities = torch.from_numpy(judge["logits"]).double().softmax(1).numpy()
    assert inception_score(probabilities, splits=1)[0] == pytest.approx(float(judge["score"]), rel=1e-6)

    class InOrder:
        def permutation(self, count):
            return np.arange(count)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: InOrder())
    assert inception_score(probabilities) == pytest.approx(judge["scores"], rel=1e-6)


def test_density_and_coverage_are_those_of_their_definition(judge, blocks):
    samples, reference = judge["samples"], judge["reference"]
    own = distances(reference, reference)
    radii = np.sort(own + np.diag(np.full(len(own), np.inf)), axis=1)[:, metrics.NEAREST_OF_DENSITY - 1]
    inside = distances(samples, reference) < radii
    found = neighbourhoods(samples, reference)
    assert found.density == pytest.approx(inside.sum() / (metrics.NEAREST_OF_DENSITY * len(samples)), rel=1e-12)
    assert found.coverage == pytest.approx(inside.any(0).mean(), rel=1e-12)


def test_statistics_are_numpy_s(judge, blocks):
    found, features = statistics_of(judge["samples"]), judge["samples"].astype(np.float64)
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-10, atol=1e-14)
    assert found.count == len(features)


def test_statistics_keep_their_precision_far_from_zero():
    features = (1e4 + np.random.default_rng(0).normal(size=(500, 3))).astype(np.float32)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(statistics_of(features).covariance, expected, rtol=1e-10)


@pytest.mark.parametrize("turned", [False, True])
def test_frechet_distance_of_gaussians_is_analytic(turned):
    """Of covariances with common eigenvectors it is |Δμ|² + Σ (√λ - √λ')²."""
    rng = np.random.default_rng(0)
    one, other = rng.uniform(0, 4, 16), rng.uniform(0, 4, 16)
    one[:5] = 0  # as of fewer vectors than dimensions
    axes = np.linalg.qr(rng.normal(size=(16, 16)))[0] if turned else np.eye(16)
    shift = rng.normal(size=16)
    a = Statistics(np.zeros(16), (axes * one) @ axes.T)
    b = Statistics(shift, (axes * other) @ axes.T)
    expected = (shift**2).sum() + ((np.sqrt(one) - np.sqrt(other)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_fewer_vectors_than_dimensions():
    rng = np.random.default_rng(1)
    one, other = (rng.normal(size=(20, 64)).astype(np.float32) for _ in range(2))
    a, b = one.astype(np.float64), other.astype(np.float64)
    shared = np.linalg.svd((a - a.mean(0)) @ (b - b.mean(0)).T / 19, compute_uv=False).sum()
    traces = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * shared
    assert frechet_distance(statistics_of(one), statistics_of(other)) == pytest.approx(expected, rel=1e-9)


def test_equal_sets(judge):
    features = judge["samples"]
    assert abs(frechet_distance(statistics_of(features), statistics_of(features))) < 1e-9
    assert neighbourhoods(features, features) == metrics.Neighbourhoods(1, 1, pytest.approx(1), 1)


def test_sets_far_apart(judge):
    features = judge["samples"]
    assert neighbourhoods(features, features + np.float32(1e3)) == metrics.Neighbourhoods(0, 0, 0, 0)


def test_copies_in_the_reference_span_no_ball(judge):
    """A vector with five copies has a ball of radius 0, whose surface holds the copies and whose interior nothing."""
    one = np.repeat(judge["reference"][:1], 7, axis=0)
    found = neighbourhoods(one, one)
    assert (found.precision, found.recall, found.density, found.coverage) == (1, 1, 0, 0)


def test_kernel_distance_of_one_distribution_is_nothing():
    rng = np.random.default_rng(3)
    one, other = (rng.normal(size=(600, 8)).astype(np.float32) for _ in range(2))
    near = kernel_distance(one, other, subsets=50)
    far = kernel_distance(one, other + np.float32(0.5), subsets=50)
    assert (near.subsets, near.size) == (50, 300)
    assert abs(near.mean) < 3 * near.deviation
    assert kernel_distance(one, one[:401]).size == 200
    assert far.mean > 10 * far.deviation


def test_kernel_distance_depends_on_the_seed_alone(judge):
    x, y = judge["samples"], judge["reference"]
    assert kernel_distance(x, y, seed=1) == kernel_distance(x, y, seed=1)
    assert kernel_distance(x, y, seed=1) != kernel_distance(x, y, seed=2)
    assert kernel_distance(x, y, size=100).size == 100


def test_nearest_of_a_set(judge, blocks):
    features = judge["samples"][:90]
    expected = np.sort(distances(features, features) + np.diag(np.full(90, np.inf)), axis=1)[:, :4]
    np.testing.assert_allclose(nearest_distances(features, 4).sqrt().numpy(), expected, rtol=1e-10)


def test_nearest_in_another_set(judge, blocks):
    samples, reference = judge["samples"][:50], judge["reference"]
    expected = distances(samples, reference)
    values, rows = nearest_in(samples, reference, 3)
    np.testing.assert_array_equal(rows.numpy(), np.argsort(expected, axis=1, kind="stable")[:, :3])
    np.testing.assert_allclose(values.sqrt().numpy(), np.sort(expected, axis=1)[:, :3], rtol=1e-10)


def test_an_equal_vector_is_at_no_distance(judge):
    """Rounding would put it at some 1e-6, and each image of the training set at another."""
    features = judge["reference"] * np.float32(1e3)
    values, rows = nearest_in(features[5:9], features, 1)
    assert values.eq(0).all()
    assert rows.flatten().tolist() == [5, 6, 7, 8]


def test_inception_score_of_one_class_and_of_all():
    one = np.tile(np.eye(10, dtype=np.float32)[0], (100, 1))
    each = np.eye(10, dtype=np.float32)[np.arange(1000) % 10]
    assert inception_score(one) == (1, 0)
    assert inception_score(each, splits=1)[0] == pytest.approx(10, rel=1e-6)
    assert math.isclose(inception_score(np.full((50, 4), 0.25, np.float32))[0], 1)


def test_progress_is_told(judge, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 100)
    told = []
    neighbourhoods(judge["samples"], judge["reference"], on_progress=lambda *at: told.append(at))
    assert told == [(i + 1, len(told)) for i in range(len(told))]
