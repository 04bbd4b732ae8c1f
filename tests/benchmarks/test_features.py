"""The suite features: both compute the same, and what is wrong or missing has no time."""

import pytest
import torch

from fastdiff.benchmarks import features
from fastdiff.evaluation.extractors import Extractor

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BATCH", 2)


def test_both_are_timed() -> None:
    plain, ours = features.measure_features(CPU, 2)
    assert (plain.candidate, ours.candidate) == ("plain module", "extractor")
    for row in (plain, ours):
        assert row.timing is not None
        assert row.as_dict()["images_per_s"] == pytest.approx(2 / row.timing.median, rel=1e-3)


def test_other_features_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Extractor.__call__

    def wrong(self: Extractor, images: torch.Tensor) -> object:
        return real(self, images.flip(3))

    monkeypatch.setattr(Extractor, "__call__", wrong)
    rows = features.measure_features(CPU, 2)
    assert all(row.failed and row.timing is None and "wrong: the features differ" in row.remark for row in rows)


def test_without_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ValueError("extractor efficientnet-lite0 needs its weights")

    monkeypatch.setattr(features, "weights_of_package", missing)
    (row,) = features.measure_features(CPU, 2)
    assert not row.failed
    assert "needs its weights" in row.remark
