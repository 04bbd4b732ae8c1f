"""The UNet: conditions, memory layouts, precisions, gradient checkpointing, compilation."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastdiff.config import ClassifierConfig
from fastdiff.models import SuperResUNet, build_classifier, build_model
from fastdiff.models.layers import TimestepEmbedding

from ..numerics import relative
from ..support import gradients, inputs, randomise
from .support import ONE_LEVEL, assert_near, small_config, small_model

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned variance": {"learn_sigma": True},
    "by class": {"class_cond": True, "num_classes": 5},
    "added embedding": {"use_scale_shift_norm": False},
    "super-resolution": {"small_size": 4},
    "one head up": {"num_heads": 4, "num_heads_upsample": 1},
    "guided": {"num_head_channels": 16, "resblock_updown": True, "use_new_attention_order": True},
    "patches": {"patch_size": 2, "learn_sigma": True},
    "patches of both images": {"patch_size": 2, "small_size": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_but_the_bias_of_the_keys_has_an_effect(variant: str) -> None:
    """That bias shifts all scores of a query by one number, which softmax does not see."""
    # At 32 channels a group of a norm would be one channel, and what shifts it would have no effect either.
    model = small_model(num_channels=64, **VARIANTS[variant]).double().eval()
    given = {name: v.double() if v.is_floating_point() else v for name, v in inputs(model).items()}
    out, grads = gradients(model, given)
    assert out.shape == (2, model.config.out_channels, 8, 8)
    assert set(grads) == {name for name, _ in model.named_parameters()}
    parts = {}
    for name in [name for name in grads if name.endswith("qkv.bias")]:
        heads = model.get_submodule(name.removesuffix(".qkv.bias")).heads
        if model.config.use_new_attention_order:
            q_k_v = grads.pop(name).view(3, heads, -1).unbind(0)
        else:
            q_k_v = grads.pop(name).view(heads, 3, -1).unbind(1)  # heads outermost, the q, the k and the v of each
        parts |= {f"{name}, {part}": gradient for part, gradient in zip("qkv", q_k_v, strict=True)}
    norms = {name: float(gradient.norm()) for name, gradient in (grads | parts).items()}
    rounding = 1e-12 * max(norms.values())
    keys = {name for name in parts if name.endswith(", k")}
    assert len(keys) == len(parts) / 3 > 0
    assert {name for name, norm in norms.items() if norm <= rounding} == keys


@pytest.mark.parametrize("variant", VARIANTS)
def test_fresh_models_predict_zero(variant: str) -> None:
    model = build_model(small_config(**VARIANTS[variant]))
    assert isinstance(model, SuperResUNet) == ("small_size" in VARIANTS[variant])
    assert not model(**inputs(model)).any()


def test_the_first_level_sees_a_patch_as_a_pixel() -> None:
    model = small_model(memory_format="contiguous", patch_size=2, learn_sigma=True).eval()
    seen: list[Tensor] = []
    model.input_blocks[0][0].register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model.out[2].register_forward_hook(lambda _, __, out: seen.append(out))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        out = model(x, torch.tensor([3, 500]))
    for image, patches in zip((x, out), seen, strict=True):
        for colour in range(image.shape[1]):
            for row in range(2):
                for column in range(2):
                    pixel = patches[:, 4 * colour + 2 * row + column]
                    assert torch.equal(pixel, image[:, colour, row::2, column::2])
    assert out.shape == (2, 6, 8, 8)
    assert (seen[0].shape[1], model.config.attention_levels) == (12, {0})


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_do_not_see_each_other(variant: str) -> None:
    model = small_model(**VARIANTS[variant]).eval()
    given = inputs(model, 3)
    with torch.no_grad():
        whole = model(**given)
        for i in range(3):
            alone = model(**{name: value[i : i + 1] for name, value in given.items()})
            torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["timesteps", "y", "low_res", "x"])
def test_every_input_has_an_effect(name: str) -> None:
    model = small_model(class_cond=True, num_classes=5, small_size=4).eval()
    given = inputs(model)
    with torch.no_grad():
        before = model(**given)
        given[name] = given[name] + 1
        assert relative(model(**given), before) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kernels", ["torch", "reference"])
def test_channels_last_is_contiguous(kernels: str, variant: str) -> None:
    results = []
    for memory_format in ("contiguous", "channels_last"):
        model = small_model(kernels, memory_format, **VARIANTS[variant]).eval()
        results.append(gradients(model, inputs(model)))
    contiguous, channels_last = results
    assert_near(channels_last, contiguous, 1e-4)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_the_layout_of_the_input_does_not_matter(memory_format: str) -> None:
    model = small_model(memory_format=memory_format).eval()
    given = inputs(model)
    with torch.no_grad():
        expected = model(**given)
        for x in (
            given["x"].to(memory_format=torch.channels_last),
            given["x"].transpose(2, 3).contiguous().transpose(2, 3),
            torch.cat([given["x"]] * 2, dim=1)[:, 3:],
        ):
            torch.testing.assert_close(model(**{**given, "x": x}), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_changes_nothing(variant: str) -> None:
    plain = small_model(**VARIANTS[variant])
    recomputing = small_model(**VARIANTS[variant], use_checkpoint=True)
    assert recomputing.state_dict().keys() == plain.state_dict().keys()
    out, grads = gradients(plain, inputs(plain))
    out_again, grads_again = gradients(recomputing, inputs(plain))
    assert torch.equal(out_again, out)
    assert grads_again.keys() == grads.keys()
    for name, value in grads.items():
        torch.testing.assert_close(grads_again[name], value, msg=name)


@pytest.mark.parametrize("updown", [False, True])
def test_checkpointing_changes_nothing_in_a_classifier(updown: bool) -> None:
    config = ClassifierConfig(16, 64, 1, (8,), classifier_resblock_updown=updown, channel_mult=(1, 1), num_classes=3)
    plain = randomise(build_classifier(config), seed=0)
    recomputing = build_classifier(replace(config, use_checkpoint=True))
    recomputing.load_state_dict(plain.state_dict())
    assert all(block.use_checkpoint for block in recomputing.modules() if hasattr(block, "use_checkpoint"))
    given = {"x": torch.randn(2, 3, 16, 16), "timesteps": torch.tensor([3.25, 990])}
    out, grads = gradients(plain, given)
    out_again, grads_again = gradients(recomputing, given)
    assert torch.equal(out_again, out)
    assert grads_again.keys() == grads.keys()
    for name, value in grads.items():
        torch.testing.assert_close(grads_again[name], value, msg=name)


def test_checkpointing_recomputes() -> None:
    calls = []
    for use_checkpoint in (False, True):
        model = small_model(use_checkpoint=use_checkpoint)
        count = []
        for norm in (model.middle_block[0].in_layers[0], model.middle_block[1].norm):
            norm.register_forward_hook(lambda layer, *_, count=count: count.append(layer.silu))
        gradients(model, inputs(model))
        calls.append(
            (count.count(True), count.count(False))
        )  # the residual block's norm has a SiLU, the attention's not
    assert calls == [(1, 1), (2, 2)]


def test_checkpointing_repeats_the_dropout() -> None:
    results = []
    for use_checkpoint in (False, True):
        model = small_model(dropout=0.5, use_checkpoint=use_checkpoint).train()
        torch.manual_seed(3)
        results.append(gradients(model, inputs(model)))
    assert torch.equal(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, msg=name)


def test_dropout_is_for_training() -> None:
    model = small_model(dropout=0.5)
    undropped = small_model()
    given = inputs(model)
    with torch.no_grad():
        assert not torch.equal(model.train()(**given), model(**given))
        assert torch.equal(model.eval()(**given), undropped(**given))
        assert torch.equal(undropped.train()(**given), undropped.eval()(**given))


# conditions


def test_class_cond_needs_y() -> None:
    model = small_model(class_cond=True, num_classes=5)
    given = inputs(model)
    del given["y"]
    with pytest.raises(ValueError, match="class_cond True: pass class indices as y"):
        model(**given)


def test_y_needs_class_cond() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="class_cond False: pass class indices as y if true, no y"):
        model(**inputs(model), y=torch.zeros(2, dtype=torch.int64))


def test_super_resolution_needs_low_res() -> None:
    model = small_model(small_size=4)
    given = inputs(model)
    del given["low_res"]
    with pytest.raises(ValueError, match="needs low_res"):
        model(**given)


@pytest.mark.parametrize("side", [2, 4, 8, 5])
def test_low_res_of_any_size_is_enlarged(side: int) -> None:
    model = small_model(small_size=4).eval()
    given = inputs(model)
    given["low_res"] = torch.full((2, 3, side, side), 0.5)
    expected = model(**{**given, "low_res": torch.full((2, 3, 8, 8), 0.5)})
    torch.testing.assert_close(model(**given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_for_inference_moves_weights_and_computes_the_same(variant: str) -> None:
    model = small_model(**VARIANTS[variant]).train()
    given, before = inputs(model), model.state_dict()
    with torch.no_grad():
        expected = model.eval()(**given)
        for _ in range(2):
            found = model.train().for_inference()(**given)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert not model.training
    after = model.state_dict()
    assert sum(value.numel() for value in after.values()) == sum(value.numel() for value in before.values())
    moved = {name for name in after.keys() & before.keys() if not torch.equal(after[name], before[name])}
    assert moved == {n for n in before if ".qkv." in n and model.config.use_new_attention_order}
    for name in moved:
        assert torch.equal(after[name].sort(0).values, before[name].sort(0).values)
    joined = {name for name in before if ".emb_layers." in name}
    assert before.keys() - after.keys() == joined
    rows = torch.cat([before[name] for name in before if name in joined and name.endswith("weight")])
    assert torch.equal(after["emb_layers.1.weight"], rows)


# sizes


@pytest.mark.parametrize("size", [28, 48])
def test_odd_sizes(size: int) -> None:
    model = small_model(image_size=size, channel_mult=None, attention_resolutions=(8,), num_heads=2).eval()
    assert size >> (len(model.config.multipliers) - 1) in (6, 7)
    given = inputs(model, 1)
    out, grads = gradients(model, given)
    assert out.shape == (1, 3, size, size)
    assert all(torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("shape", [(16, 16), (8, 16), (6, 10)])
def test_images_of_another_size_than_trained_for(shape: tuple[int, int]) -> None:
    model = small_model().eval()
    assert model(torch.randn(1, 3, *shape), torch.tensor([5.0])).shape == (1, 3, *shape)


def test_attention_stands_where_the_config_says() -> None:
    model = small_model(image_size=16, channel_mult=(1, 2, 2), attention_resolutions=(16, 4), num_res_blocks=2)
    heads = small_model(num_heads=4, num_heads_upsample=1)
    names = {name.removesuffix(".qkv") for name, _ in model.named_modules() if name.endswith(".qkv")}
    assert names == {
        *("input_blocks.1.1", "input_blocks.2.1", "input_blocks.7.1", "input_blocks.8.1", "middle_block.1"),
        *(f"output_blocks.{i}.1" for i in (0, 1, 2, 6, 7, 8)),
    }
    assert {(name.split("_")[0], m.heads) for name, m in heads.named_modules() if hasattr(m, "heads")} == {
        ("input", 4),
        ("middle", 4),
        ("output", 1),
    }


# precision


@pytest.mark.parametrize("kernels", ["torch", "reference"])
def test_bf16_autocast_is_near(kernels: str) -> None:
    model = small_model(kernels, class_cond=True, num_classes=5)
    given = inputs(model)
    out, grads = gradients(model, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_out, cast_grads = gradients(model, given)
    assert cast_out.dtype == torch.float32  # x's
    assert 1e-5 < relative(cast_out, out) < 0.03
    flat, cast_flat = (torch.cat([g.flatten() for g in found.values()]) for found in (grads, cast_grads))
    assert cast_flat.dtype == torch.float32
    assert relative(cast_flat, flat) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_model_in_another_precision(variant: str, dtype: torch.dtype) -> None:
    model = small_model(**VARIANTS[variant]).eval()
    given = inputs(model)
    given["timesteps"] = torch.tensor([0.0, 1.0])  # see test_the_embedding_of_a_bf16_model
    with torch.no_grad():
        expected = model(**given)
        model.to(dtype)
        out = model(**{name: v.to(dtype) if name in ("x", "low_res") else v for name, v in given.items()})
    assert out.dtype == dtype
    assert relative(out, expected) < (0.05 if dtype == torch.bfloat16 else 1e-4)


def test_the_output_has_the_dtype_of_x() -> None:
    model = small_model().eval()
    given = inputs(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert model(**{**given, "x": given["x"].to(dtype)}).dtype == dtype


# timestep embedding


def test_timestep_embedding() -> None:
    t = torch.tensor([0.0, 1.0, 250.5, 999.0])
    found = TimestepEmbedding(32)(t)
    frequencies = 10_000 ** -(torch.arange(16, dtype=torch.float64) / 16)
    angles = t.double()[:, None] * frequencies
    torch.testing.assert_close(found.double(), torch.cat([angles.cos(), angles.sin()], 1), rtol=0, atol=2e-4)
    assert TimestepEmbedding(32).state_dict() == {}


def test_whole_timesteps_may_be_integers() -> None:
    embedding = TimestepEmbedding(32)
    assert torch.equal(embedding(torch.tensor([3, 999])), embedding(torch.tensor([3.0, 999.0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_embedding_of_a_bf16_model(dtype: torch.dtype) -> None:
    t = torch.tensor([1.0, 250.5, 999.0])
    expected = TimestepEmbedding(128)(t)
    torch.testing.assert_close(TimestepEmbedding(128).to(dtype)(t).float(), expected, rtol=0, atol=1e-2)


# torch.compile


@pytest.mark.parametrize("variant", ["plain", pytest.param("guided", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(variant: str) -> None:
    """One graph without a break, and no second one for other timesteps or images."""
    torch._dynamo.reset()
    conditions = VARIANTS["by class"] | VARIANTS["super-resolution"]
    model = small_model(**VARIANTS[variant], **conditions, learn_sigma=True).eval()
    given = inputs(model)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for t in (0.0, 1.0, 250.5, 999.0):
            given["timesteps"] = torch.full((2,), t)
            given["x"] = given["x"] * 0.9
            torch.testing.assert_close(compiled(**given), model(**given), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiles_with_its_gradients() -> None:
    """Of a level, in PyTorch's kernels; test_kernels_in_the_model.py has two under Inductor, and what lies between."""
    torch._dynamo.reset()
    model = small_model(use_checkpoint=True, **ONE_LEVEL)
    given = inputs(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_near(gradients(model, given, compiled), gradients(model, given), 1e-5)
