"""What the blocks put out, beside what they put out while the model predicts."""

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastdiff.models import UNet

from ..support import inputs
from .support import ONE_LEVEL, small_model

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "by class": {"class_cond": True, "num_classes": 5, "learn_sigma": True},
    "super-resolution": {"small_size": 4},
}


def seen_in_forward(model: UNet, given: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """The outputs of the blocks in the order in which they run, and the model's."""
    seen: list[Tensor] = []
    blocks: list[nn.Module] = [*model.input_blocks, model.middle_block, *model.output_blocks]
    handles = [block.register_forward_hook(lambda *call: seen.append(call[2])) for block in blocks]
    output = model(**given)
    for handle in handles:
        handle.remove()
    return seen, output


@pytest.mark.parametrize("variant", VARIANTS)
def test_they_are_those_of_forward(variant: str) -> None:
    model = small_model(**VARIANTS[variant]).eval()
    given = inputs(model)
    with torch.no_grad():
        seen, output = seen_in_forward(model, given)
        features = model.get_feature_vectors(**given)
        assert torch.equal(model.out(features["up"][-1]), output)
    assert set(features) == {"down", "middle", "up"}
    assert (len(features["down"]), len(features["up"])) == (4, 4)
    found = [*features["down"], features["middle"], *features["up"]]
    assert all(torch.equal(one, other) for one, other in zip(found, seen, strict=True))
    # two levels of one block: the second is half as large and twice as wide
    assert [tuple(h.shape) for h in features["down"]] == [(2, 32, 8, 8), (2, 32, 8, 8), (2, 32, 4, 4), (2, 64, 4, 4)]
    assert features["middle"].shape == (2, 64, 4, 4)
    assert [tuple(h.shape) for h in features["up"]] == [(2, 64, 4, 4), (2, 64, 8, 8), (2, 32, 8, 8), (2, 32, 8, 8)]


def test_they_have_the_type_of_x() -> None:
    model = small_model().eval()
    given = inputs(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert seen_in_forward(model, given)[0][0].dtype is torch.bfloat16
        features = model.get_feature_vectors(**given)
    assert {h.dtype for h in [*features["down"], features["middle"], *features["up"]]} == {torch.float32}


def test_they_carry_gradients() -> None:
    model = small_model(use_checkpoint=True)
    model.get_feature_vectors(**inputs(model))["middle"].square().mean().backward()
    assert model.input_blocks[0][0].weight.grad.any()
    assert model.out[2].weight.grad is None


def test_the_conditions_are_asked_for() -> None:
    model = small_model(class_cond=True, num_classes=5, small_size=4)
    given = inputs(model)
    for missing, reason in (("y", "class_cond True"), ("low_res", "needs low_res")):
        with pytest.raises(ValueError, match=reason):
            model.get_feature_vectors(**{name: value for name, value in given.items() if name != missing})


def test_they_compile_without_a_break() -> None:
    torch._dynamo.reset()
    model = small_model(**ONE_LEVEL).eval()
    given = inputs(model)
    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        found = torch.compile(model.get_feature_vectors, backend=counter, fullgraph=True)(**given)
        expected = model.get_feature_vectors(**given)
    for one, other in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def flat(found: Any) -> list[Tensor]:
    return [*found["down"], found["middle"], *found["up"]]
