"""The null class: a class-conditional model that is not told the class."""

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastdiff.models import NULL_CLASS, UNet

from ..support import gradients, inputs
from .support import ONE_LEVEL, assert_near, small_model

CLASSES = 5


def conditional(**changes: object) -> UNet:
    return small_model(class_cond=True, num_classes=CLASSES, **changes)


def with_zero_row(model: UNet) -> UNet:
    """The same model with the class 5, whose embedding is zero: what the null class must come to."""
    twin = conditional()
    twin.load_state_dict(model.state_dict())
    weight = model.label_emb.weight.detach()
    twin.label_emb = nn.Embedding.from_pretrained(torch.cat([weight, torch.zeros_like(weight[:1])]), freeze=False)
    return twin


@pytest.mark.parametrize("sizes", [{}, {"small_size": 4}], ids=["plain", "super-resolution"])
def test_no_image_has_a_class(sizes: dict[str, int]) -> None:
    """Then the model is the one without an embedding."""
    model, plain = conditional(**sizes), small_model(**sizes)
    plain.load_state_dict({name: v for name, v in model.state_dict().items() if name != "label_emb.weight"})
    given = inputs(plain, 3)
    with torch.no_grad():
        assert torch.equal(model(**given, y=torch.full((3,), NULL_CLASS)), plain(**given))


def test_some_images_have_a_class() -> None:
    """Bit for bit, with all gradients; those of the classes get nothing from images without one."""
    model = conditional()
    twin = with_zero_row(model)
    given = inputs(model, 4)
    out, grads = gradients(model, {**given, "y": torch.tensor([0, NULL_CLASS, 3, NULL_CLASS])})
    expected, wanted = gradients(twin, {**given, "y": torch.tensor([0, CLASSES, 3, CLASSES])})
    assert torch.equal(out, expected)
    assert wanted["label_emb.weight"][CLASSES].any()
    wanted["label_emb.weight"] = wanted["label_emb.weight"][:CLASSES]
    assert grads.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(grads[name], value), name
    assert [bool(row.any()) for row in grads["label_emb.weight"]] == [True, False, False, True, False]


def test_a_batch_without_a_class_has_gradients_of_zero() -> None:
    """Not none: DDP waits for every parameter's."""
    model = conditional()
    _, grads = gradients(model, {**inputs(model), "y": torch.full((2,), NULL_CLASS)})
    assert not grads["label_emb.weight"].any()
    assert set(grads) == {name for name, _ in model.named_parameters()}


def test_no_row_of_the_embedding_is_read() -> None:
    model = conditional()
    given = {**inputs(model), "y": torch.tensor([NULL_CLASS, 2])}
    before, _ = gradients(model, given)
    with torch.no_grad():
        model.label_emb.weight[[0, 1, 3, 4]] = torch.nan
    out, grads = gradients(model, given)
    assert torch.equal(out, before)
    assert all(bool(value.isfinite().all()) for value in grads.values())


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_what_the_blocks_are_given(precision: str) -> None:
    """The embedding of the timestep plus that of the class, or nothing, to the bit."""
    model = conditional().eval()
    if precision == "bf16":
        model.bfloat16()
    seen = {}
    model.time_embed.register_forward_hook(lambda layer, args, out: seen.update(time=out))
    model.middle_block.register_forward_pre_hook(lambda layer, args: seen.update(emb=args[1]))
    given = inputs(model, 3)
    given["x"] = given["x"].to(model.label_emb.weight.dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        for y in ([4, 0, 2], [4, NULL_CLASS, 0]):
            model(**{**given, "y": torch.tensor(y)})
            expected = seen["time"] + model.label_emb.weight[y]
            if NULL_CLASS in y:
                expected[1] = seen["time"][1]
            assert seen["emb"].dtype == expected.dtype
            assert torch.equal(seen["emb"], expected)


def test_it_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model = conditional(**ONE_LEVEL)
    given = inputs(model, 3)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for y in ([0, 1, 2], [NULL_CLASS, 4, NULL_CLASS], [NULL_CLASS] * 3):
        given["y"] = torch.tensor(y)
        assert_near(gradients(model, given, compiled), gradients(model, given), 1e-5)
    assert counter.frame_count == 1
