"""Batches of images: how many, of which class, from which noise."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import DiffusionConfig, SampleConfig, build_diffusion
from fastdiff.config import Sampler
from fastdiff.kernels import philox_normal
from fastdiff.sampling import Loop, generate
from fastdiff.sampling.loop import StopSampling

DIFFUSION = build_diffusion(DiffusionConfig(diffusion_steps=4, noise_schedule="cosine", predict_xstart=True))
CPU = torch.device("cpu")


class Model:
    """Predicts an x_0 that shows the class, and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        self.calls.append((x.clone(), t, kwargs))
        shade = kwargs["y"] / 10 if "y" in kwargs else kwargs["low_res"].mean((1, 2, 3)) if kwargs else 0 * t
        return shade.view(-1, 1, 1, 1).expand_as(x).float()


def run(model: Model | None = None, **flags: Any) -> list[np.ndarray]:
    extra = {k: flags.pop(k) for k in ("indices", "labels", "low_res", "on_step") if k in flags}
    model = model or Model()
    return list(generate(model, DIFFUSION, SampleConfig(**flags), image_size=2, device=CPU, **extra))


def test_batches_make_up_the_number_that_was_asked_for() -> None:
    assert [len(batch) for batch in run(num_samples=5, batch_size=2)] == [2, 2, 1]
    assert [len(batch) for batch in run(num_samples=4, batch_size=2)] == [2, 2]
    assert [len(batch) for batch in run(num_samples=3, batch_size=16)] == [3]


def test_the_model_always_sees_the_same_shape() -> None:
    """Another shape would compile it again."""
    model = Model()
    run(model, num_samples=5, batch_size=2)
    assert {tuple(x.shape) for x, *_ in model.calls} == {(2, 3, 2, 2)}
    assert len(model.calls) == 3 * 4


@pytest.mark.parametrize("sampler", list(Sampler))
def test_every_image_has_its_own_class(sampler: str) -> None:
    labels = np.array([0, 3, 6, 9, 1])
    images = np.concatenate(run(num_samples=5, batch_size=2, labels=labels, sampler=sampler))
    # the last step returns the predicted x_0 itself
    expected = [int((label / 10 + 1) * 127.5) for label in labels]
    assert images.reshape(5, -1).max(1).tolist() == images.reshape(5, -1).min(1).tolist() == expected


def test_every_image_has_its_own_low_resolution_input() -> None:
    low_res = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 1, 1)
    images = np.concatenate(run(num_samples=5, batch_size=2, low_res=lambda numbers: low_res[numbers]))
    assert images[:, 0, 0, 0].tolist() == [0, 63, 127, 191, 255]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_noise_is_a_function_of_seed_and_index(batch_size: int) -> None:
    model = Model()
    run(model, num_samples=5, batch_size=batch_size, seed=9)
    first = torch.cat([x for x, t, _ in model.calls if float(t[0]) == max(float(t[0]) for _, t, _ in model.calls)])[:5]
    assert torch.equal(first, philox_normal(9, torch.arange(5), 0, (3, 2, 2)))
    assert len(first.unique()) == first.numel()


class Mixing(Model):
    """Predicts an x_0 that depends on all that it is given, image by image."""

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        return 0.5 * super().__call__(x, t, **kwargs) + 0.4 * x.flip(-1).tanh() + t.view(-1, 1, 1, 1) / 1e4


@pytest.mark.parametrize("sampler", list(Sampler))
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_part_of_the_images_is_what_all_of_them_hold(sampler: str, batch_size: int) -> None:
    """So several processes draw them together."""
    labels = np.arange(7) % 3
    flags: dict[str, Any] = {"sampler": sampler, "eta": 0.5 if sampler == "ddim" else 0.0, "seed": 4}
    whole = np.concatenate(run(Mixing(), num_samples=7, batch_size=7, labels=labels, **flags))
    assert len(np.unique(whole.reshape(7, -1), axis=0)) == 7
    for numbers in ([0, 3, 6], [5, 1, 4, 2], [6]):
        indices = np.array(numbers)
        part = run(
            Mixing(), num_samples=len(indices), batch_size=batch_size, indices=indices, labels=labels[indices], **flags
        )
        assert [len(batch) for batch in part][:-1] == [min(batch_size, len(indices))] * (len(part) - 1)
        assert np.array_equal(np.concatenate(part), whole[indices])


def test_on_step_counts_wanted_images_only() -> None:
    seen: list[int] = []
    run(num_samples=5, batch_size=2, on_step=seen.append)
    assert seen == [2] * 4 + [2] * 4 + [1] * 4


class SlowDevice:
    """Stands for a GPU, which takes a step only while the host sleeps: its streams, events and clock."""

    type = "cuda"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = self.taken = self.most_ahead = 0
        module, real = sys.modules["fastdiff.sampling.loop"], Loop.step

        def step(loop: Loop) -> None:
            self.asked += 1
            self.most_ahead = max(self.most_ahead, self.asked - self.taken)
            real(loop)

        def event() -> SimpleNamespace:
            at = self.asked
            return SimpleNamespace(query=lambda: self.taken >= at)

        def sleep(_: float) -> None:
            self.taken += 1

        stream = SimpleNamespace(record_event=event, wait_stream=lambda other: None)
        cuda = SimpleNamespace(
            Stream=lambda device: stream, current_stream=lambda device: stream, stream=lambda of: nullcontext()
        )
        monkeypatch.setattr(Loop, "step", step)
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
        monkeypatch.setattr(module, "torch", SimpleNamespace(**{**vars(torch), "cuda": cuda}))
        monkeypatch.setattr(module, "to_device", lambda tensor, device: tensor)
        monkeypatch.setattr(module, "_on_host", Tensor.clone)


@pytest.mark.parametrize("stop_at", [None, 3, 6, 8])
def test_a_gpu_is_one_batch_ahead_of_its_images_and_no_more(
    monkeypatch: pytest.MonkeyPatch, stop_at: int | None
) -> None:
    """However fast the host asks; and where it is stopped, what is finished comes, and little more is drawn."""
    expected = run(Mixing(), num_samples=20, batch_size=2)
    device, told = SlowDevice(monkeypatch), 0

    def on_step(images: int) -> None:
        nonlocal told
        told += 1
        if told == stop_at:
            raise StopSampling

    config = SampleConfig(num_samples=20, batch_size=2)
    drawn = list(generate(Mixing(), DIFFUSION, config, image_size=2, device=device, on_step=on_step))  # type: ignore[arg-type]
    assert device.most_ahead <= 2 * 4
    for ours, theirs in zip(drawn, expected, strict=False):
        assert np.array_equal(ours, theirs)
    if stop_at is None:
        assert len(drawn) == 10
    else:
        assert stop_at // 4 <= len(drawn) <= stop_at // 4 + 2
