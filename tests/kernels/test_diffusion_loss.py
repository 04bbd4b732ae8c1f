"""diffusion_loss: every implementation against the definition in float64, values and gradient."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from fastdiff.kernels import diffusion_loss
from fastdiff.kernels.diffusion_loss import kernel
from fastdiff.kernels.gaussian import TABLES

from .process import LAYOUTS, STEPS, images, model_output, process, tables, timesteps
from .support import DEVICE, TRITON_DTYPES, assert_all_within_budget, joined, pairwise, random

AXES: dict[str, list[Any]] = {
    "mean_type": list(ModelMeanType),
    "var_type": list(ModelVarType),
    "loss_type": list(LossType),
    "shape": [(16, 3, 1, 1), (3, 3, 3, 5), (3, 3, 7, 7), (1, 3, 8, 8), (3, 5, 8, 8), (3, 3, 24, 24)],
    "layout": list(LAYOUTS),
    "output_layout": list(LAYOUTS),
    "dtype": TRITON_DTYPES,
}


def run(
    backend: str, tensors: dict[str, Tensor], t: Tensor, wide: bool, chosen: dict[str, Any], seed: int = 5
) -> dict[str, Tensor]:
    """loss, mse, vb as far as they are defined, and the gradient of the model's output for random gradients of them."""
    dtype = torch.float64 if wide else torch.float32
    inputs = {name: x.to(dtype) for name, x in tensors.items() if name != "output"}
    output = (tensors["output"].double() if wide else tensors["output"]).detach().requires_grad_()
    losses = diffusion_loss(
        output, inputs["x_start"], inputs["x_t"], inputs["noise"], t, tables(dtype), **chosen, backend=backend
    )
    found = {name: value for name, value in losses._asdict().items() if value is not None}
    upstream = [random(len(t), seed=seed + i).to(DEVICE).to(dtype) for i in range(len(found))]
    (gradient,) = torch.autograd.grad(list(found.values()), output, upstream)
    assert gradient.dtype == output.dtype
    return {name: value.detach() for name, value in found.items()} | {"gradient": gradient}


def three(tensors: dict[str, Tensor], t: Tensor, chosen: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Kernel, reference and truth."""
    runs = (("triton", False), ("reference", False), ("reference", True))
    return [run(backend, tensors, t, wide, chosen) for backend, wide in runs]


def batch(
    mean_type: str,
    var_type: str,
    shape: tuple[int, ...],
    layout: str,
    output_layout: str,
    dtype: torch.dtype,
    t: Tensor,
) -> dict[str, Tensor]:
    x_start, noise = images(*shape, seed=1), random(*shape, seed=2).to(DEVICE)
    output = model_output(mean_type, x_start, noise, ModelVarType(var_type).learned, seed=3).to(dtype)
    return {
        "output": LAYOUTS[output_layout](output),
        "x_start": LAYOUTS[layout](x_start),
        "x_t": process().q_sample(x_start, t, noise),
        "noise": LAYOUTS[layout](noise),
    }


def hold(
    mean_type: str,
    var_type: str,
    loss_type: str,
    shape: tuple[int, ...],
    layout: str,
    output_layout: str,
    dtype: torch.dtype,
) -> None:
    """Values and gradient within the error budget of the reference, over all timesteps together.

    One timestep alone would hold a single number to what may be the reference's luck.
    """
    chosen = {"mean_type": mean_type, "var_type": var_type, "loss_type": loss_type}
    batches = []
    for first in range(0, 5, shape[0]):
        t = timesteps(shape[0], first)
        batches.append(three(batch(mean_type, var_type, shape, layout, output_layout, dtype, t), t, chosen))
    assert_all_within_budget(*joined(batches))


@pytest.mark.parametrize("case", pairwise(AXES), ids=lambda case: "-".join(map(str, case.values())))
def test_budget(case: dict[str, Any]) -> None:
    hold(**case)


@pytest.mark.slow
@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("var_type", ModelVarType)
@pytest.mark.parametrize("loss_type", LossType)
def test_budget_of_every_combination(loss_type: str, var_type: str, mean_type: str) -> None:
    """Of the kernel's switches, each with a share of the pairs of shapes, layouts and dtypes."""
    tensors = pairwise({name: AXES[name] for name in ("shape", "layout", "output_layout", "dtype")})
    for case in tensors[list(LossType).index(LossType(loss_type)) % 3 :: 3]:
        hold(mean_type, var_type, loss_type, **case)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 20, 4, 4), (2, 3, 6), (2, 3, 2, 4, 5), (2, 3, 40, 52)], ids=str)
def test_other_shapes(shape: tuple[int, ...]) -> None:
    t = timesteps(2, 1)
    x_start, noise = images(*shape, seed=1), random(*shape, seed=2).to(DEVICE)
    output = torch.cat([noise + 0.1, random(*shape, seed=3).to(DEVICE)], dim=1)
    tensors = {"output": output, "x_start": x_start, "x_t": process().q_sample(x_start, t, noise), "noise": noise}
    expected, found = (run(backend, tensors, t, False, {}) for backend in ("reference", "triton"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


LIMITS: dict[str, list[Any]] = {
    "log_variance": [-30.0, -9.0, 0.0, 9.0, 60.0],
    "mean": [0.0, 0.99, -1.0, 3.0, 300.0],
    "scale": [0.01, 1.0, 30.0],
}


def hold_likelihood(log_variance: float, mean: float, scale: float) -> None:
    """t = 0, with pixels at and around both ends, far from the mean and near it, in wide and narrow Gaussians.

    Eight draws together: where hardly a pixel counts, one draw's gradient would be held to the reference's luck.
    """
    levels = torch.cat([torch.linspace(-1, 1, 256), torch.tensor([-0.9991, -0.9989, 0.9989, 0.9991])])
    x_start = levels.repeat(8).view(1, 1, -1).to(DEVICE)
    means, log_variances = mean + scale * random(8 * 260, seed=1), log_variance + 0.1 * random(8 * 260, seed=2)
    output = torch.stack([means, log_variances])[None].to(DEVICE)
    tensors = {"output": output, "x_start": x_start, "x_t": x_start, "noise": x_start}
    t = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    chosen = {"mean_type": "previous_x", "var_type": "learned", "loss_type": "kl"}
    assert_all_within_budget(*three(tensors, t, chosen))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's infinities
@pytest.mark.parametrize("limits", pairwise(LIMITS), ids=lambda limits: "-".join(map(str, limits.values())))
def test_the_likelihood_at_its_limits(limits: dict[str, float]) -> None:
    hold_likelihood(**limits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_the_likelihood_at_every_limit() -> None:
    for limits in product(*LIMITS.values()):
        hold_likelihood(*limits)


def test_the_likelihood_alone() -> None:
    """Every pixel held to the budget, where the sums of the other tests would let one pass."""
    levels = (torch.arange(0, 256, 15) / 127.5 - 1).view(-1, 1, 1).to(DEVICE)
    for mean, log_variance in ((0.0, 1.0), (0.3, -6.0), (-0.9, -9.0), (1.0, -9.8)):
        output = torch.tensor([mean, log_variance]).view(1, 2, 1).expand(len(levels), -1, -1).contiguous().to(DEVICE)
        tensors = {"output": output, "x_start": levels, "x_t": levels, "noise": levels}
        t = torch.zeros(len(levels), dtype=torch.int64, device=DEVICE)
        chosen = {"mean_type": "previous_x", "var_type": "learned", "loss_type": "kl"}
        assert_all_within_budget(*three(tensors, t, chosen), what=f"{mean} {log_variance}")


def case(shape: tuple[int, ...] = (3, 3, 8, 8), layout: str = "channels_last") -> tuple[dict[str, Tensor], Tensor]:
    t = timesteps(shape[0])
    return batch("epsilon", "learned_range", shape, "contiguous", layout, torch.float32, t), t


def test_splitting_a_sample_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, t = case((2, 3, 11, 13))
    whole = run("triton", tensors, t, False, {})
    monkeypatch.setattr(kernel, "FORWARD_TILE", 128)
    assert kernel.Tiles.of(3, 11 * 13, 128).count == 5
    for splits in (1, 2, 3, 5):
        monkeypatch.setattr(kernel, "splits_of", lambda *_, splits=splits: splits)
        split = run("triton", tensors, t, False, {})
        for name, value in whole.items():
            torch.testing.assert_close(split[name], value, rtol=2e-6, atol=1e-7)


def test_a_sample_is_split_only_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "processors", lambda _: 132)
    cpu = torch.device("cpu")
    assert kernel.splits_of(128, 8, cpu) == 1  # 64 x 64 pixels: one launch
    assert kernel.splits_of(1, 8, cpu) == 1
    assert kernel.splits_of(16, 128, cpu) == 16  # 256 x 256
    assert kernel.splits_of(1000, 128, cpu) == 1
    assert kernel.splits_of(0, 128, cpu) >= 1


def test_two_runs_are_equal() -> None:
    tensors, t = case((2, 3, 24, 24))  # two tiles a sample
    first, second = run("triton", tensors, t, False, {}), run("triton", tensors, t, False, {})
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("part", ["loss", "mse", "vb"])
def test_the_gradient_of_each_part_alone(part: str) -> None:
    """The others' gradients are None then, and a sum's is one number for all samples."""
    tensors, t = case()
    gradients = []
    for backend in ("reference", "triton"):
        output = tensors["output"].detach().requires_grad_()
        losses = diffusion_loss(
            output, tensors["x_start"], tensors["x_t"], tensors["noise"], t, tables(), backend=backend
        )
        gradients.append(torch.autograd.grad(getattr(losses, part).sum(), output)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_has_the_outputs_layout(layout: str) -> None:
    tensors, t = case(layout=layout)
    assert run("triton", tensors, t, False, {})["gradient"].stride() == tensors["output"].stride()


def test_only_what_counts_is_read() -> None:
    """What the objective does not name may be anything."""
    tensors, t = case()
    junk = torch.full_like(tensors["noise"], torch.nan)
    learned, fixed = {"loss_type": "kl"}, {"var_type": "fixed_small", "mean_type": "epsilon"}
    assert torch.isfinite(run("triton", tensors | {"noise": junk}, t, False, learned)["loss"]).all()
    few = {"output": tensors["output"][:, :3], "noise": tensors["noise"], "x_start": junk, "x_t": junk}
    assert torch.isfinite(run("triton", few, t, False, fixed)["gradient"]).all()


def test_nan_stays_nan() -> None:
    tensors, t = case()
    tensors["output"][:, 4, 2, 3] = torch.nan
    found = run("triton", tensors, t, False, {})
    assert found["loss"].isnan().all()
    assert found["gradient"].isnan().sum() == 3


def test_no_samples() -> None:
    x, output = torch.zeros(0, 3, 4, 4, device=DEVICE), torch.zeros(0, 6, 4, 4, device=DEVICE, requires_grad=True)
    losses = diffusion_loss(output, x, x, x, timesteps(0).long(), tables(), backend="triton")
    assert losses.loss.shape == (0,)
    (gradient,) = torch.autograd.grad(losses.loss.sum(), output)
    assert gradient.shape == output.shape


def test_offsets_beyond_2_to_the_31(tmp_path: Path) -> None:
    """Sample 1 lies more than 2^31 elements behind sample 0, in a sparse file."""
    if DEVICE.type == "cuda":
        whole = torch.empty(2**31 + 2**16, dtype=torch.float16, device=DEVICE)
    else:
        path = tmp_path / "sparse"
        path.touch()
        with path.open("r+b") as file:
            file.truncate(2 * (2**31 + 2**16))
        whole = torch.from_file(str(path), shared=True, size=2**31 + 2**16, dtype=torch.float16)
    tensors, t = case((2, 3, 4, 4))
    output = whole.as_strided((2, 6, 4, 4), (2**31 + 64, 16, 4, 1))
    output.copy_(tensors["output"])
    x_start = whole.as_strided((2, 3, 4, 4), (64, 2**30 + 64, 4, 1), 4096)  # channels far apart, too
    x_start.copy_(tensors["x_start"])
    far = run("triton", tensors | {"output": output, "x_start": x_start}, t, False, {})
    near = run("triton", tensors | {"output": output.clone(), "x_start": x_start.clone()}, t, False, {})
    assert all(torch.equal(far[name], near[name]) for name in far)


# within PyTorch


def raw_arguments(loss_type: str = "rescaled_mse", var_type: str = "learned_range") -> tuple[Any, ...]:
    tensors, t = case((2, 3, 2, 2))
    channels = 6 if var_type == "learned_range" else 3
    output = tensors["output"][:, :channels]
    return output, tensors["x_start"], tensors["x_t"], tensors["noise"], t, tables(), "epsilon", var_type, loss_type


GRADS = {
    "of the loss": lambda: (random(2, seed=7).to(DEVICE), None, None),
    "of its parts": lambda: (None, random(2, seed=7).to(DEVICE), random(2, seed=8).to(DEVICE)),
    "of a sum": lambda: (torch.ones((), device=DEVICE).expand(2), None, None),
}


@pytest.mark.parametrize(
    ("kinds", "grads"),
    [
        (("rescaled_mse", "learned_range"), "of its parts"),
        (("mse", "fixed_small"), "of a sum"),
        (("kl", "fixed_large"), "of the loss"),
    ],
    ids=str,
)
def test_opcheck(kinds: tuple[str, str], grads: str) -> None:
    """Of images of a few pixels: opcheck calls an operator a dozen times."""
    arguments = raw_arguments(*kinds)
    torch.library.opcheck(torch.ops.fastdiff.diffusion_loss_forward.default, arguments)
    torch.library.opcheck(torch.ops.fastdiff.diffusion_loss_backward.default, (*GRADS[grads](), *arguments))


def test_compiles_to_one_graph() -> None:
    tensors, t = case()

    def objective(weight: Tensor, output: Tensor, x_start: Tensor, x_t: Tensor, noise: Tensor) -> Tensor:
        losses = diffusion_loss(output * weight, x_start, x_t, noise, t, columns, backend="triton")
        assert losses.vb is not None
        return losses.loss.mean() + losses.vb.sum()

    columns, results = tables(), []
    for call in (objective, torch.compile(objective, fullgraph=True, backend="aot_eager")):
        weight = torch.ones((), device=DEVICE, requires_grad=True)
        loss = call(weight, *tensors.values())
        (gradient,) = torch.autograd.grad(loss, weight)
        results.append((loss.detach(), gradient))
    torch.testing.assert_close(results[1], results[0])


# in the process


@pytest.mark.parametrize("loss_type", LossType)
@pytest.mark.parametrize("var_type", ["learned_range", "fixed_small"])
def test_training_losses_are_the_op(var_type: str, loss_type: str) -> None:
    t = timesteps(3)
    tensors = batch("epsilon", var_type, (3, 3, 8, 8), "contiguous", "channels_last", torch.float32, t)
    results = []
    for backend in ("reference", "triton"):
        d = GaussianDiffusion(
            betas=get_named_beta_schedule("linear", STEPS),
            model_var_type=ModelVarType(var_type),
            loss_type=LossType(loss_type),
            kernels=backend,
        )
        results.append(d.training_losses(lambda *_: tensors["output"], tensors["x_start"], t, noise=tensors["noise"]))
    hybrid = {"loss", "mse", "vb"} if "learned" in var_type else {"loss", "mse"}
    names = {"loss"} if LossType(loss_type).is_vb else hybrid
    assert set(results[0]) == set(results[1]) == names
    for name in names:
        torch.testing.assert_close(results[1][name], results[0][name], rtol=1e-4, atol=1e-5)


def test_auto_is_torch_on_a_cpu_and_in_float64() -> None:
    tensors, t = case()
    for wide in (True, False) if DEVICE.type == "cpu" else (True,):
        auto, explicit = (run(backend, tensors, t, wide, {}) for backend in ("auto", "torch"))
        assert all(torch.equal(auto[name], explicit[name]) for name in auto)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x_t": torch.zeros(2, 3)}, r"x must be \(N, C, \*spatial\), not \(2, 3\)"),
    ({"x_start": torch.zeros(2, 6, 4, 4)}, r"x_start must be \(2, 3, 4, 4\), not \(2, 6, 4, 4\)"),
    ({"noise": torch.zeros(1, 3, 4, 4)}, r"noise must be \(2, 3, 4, 4\), not \(1, 3, 4, 4\)"),
    ({"model_output": torch.zeros(2, 3, 4, 4)}, r"model_output must be \(2, 6, 4, 4\) for a learned variance, not"),
    ({"t": torch.zeros(2)}, "t must be int64, not torch.float32"),
    ({"tables": torch.zeros(50, 3)}, rf"tables must be \(T, {len(TABLES)}\), not \(50, 3\)"),
]


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message[:32] for _, message in BAD])
def test_bad_arguments(wrong: dict[str, Any], message: str, backend: str) -> None:
    arguments: dict[str, Any] = {
        "model_output": torch.zeros(2, 6, 4, 4),
        **{name: torch.zeros(2, 3, 4, 4) for name in ("x_start", "x_t", "noise")},
        "t": torch.zeros(2, dtype=torch.int64),
        "tables": process().step_tables(torch.device("cpu"), torch.float32),
    }
    with pytest.raises(ValueError, match="^diffusion_loss: " + message):
        diffusion_loss(**{**arguments, **wrong}, backend=backend)
