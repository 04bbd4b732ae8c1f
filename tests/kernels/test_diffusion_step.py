"""diffusion_step: every implementation against the definition in float64."""

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.diffusion import GaussianDiffusion, ModelMeanType, ModelVarType, Philox, get_named_beta_schedule
from fastdiff.kernels import diffusion_step, philox_normal
from fastdiff.kernels.diffusion_step import kernel
from fastdiff.kernels.gaussian import TABLES, Sampler

from ..numerics import assert_equal_but_for_rounding
from .process import LAYOUTS, STEPS, images, model_output, process, tables, timesteps
from .support import DEVICE, TRITON_DTYPES, assert_all_within_budget, assert_within_budget, joined, pairwise, random

SEED = 2**63 + 5

AXES: dict[str, list[Any]] = {
    "mean_type": list(ModelMeanType),
    "var_type": list(ModelVarType),
    "sampler": [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)],
    "clip": [True, False],
    "noise": ["given", "philox"],
    "shape": [(16, 3, 1, 1), (3, 3, 3, 5), (3, 3, 7, 7), (1, 3, 8, 8), (3, 5, 8, 8), (3, 3, 24, 24)],
    "layout": list(LAYOUTS),
    "output_layout": list(LAYOUTS),
    "dtype": TRITON_DTYPES,
}


def hold(
    mean_type: str,
    var_type: str,
    sampler: tuple[str, float],
    clip: bool,
    noise: str,
    shape: tuple[int, ...],
    layout: str,
    output_layout: str,
    dtype: torch.dtype,
) -> None:
    """Sample and pred_xstart within the error budget of the reference in fp32, over all timesteps together.

    One batch alone would hold the few numbers that are large to what may be the reference's luck.
    """
    n, learned = shape[0], ModelVarType(var_type).learned
    chosen = {"mean_type": mean_type, "var_type": var_type, "sampler": sampler[0], "eta": sampler[1], "clip": clip}
    samples = torch.arange(n, device=DEVICE) + 2**40

    def run_all(first: int) -> list[dict[str, Tensor]]:
        """Kernel, reference and truth for a batch of its own."""
        x_start, z, t = images(*shape, seed=first), random(*shape, seed=first + 10).to(DEVICE), timesteps(n, first)
        x = LAYOUTS[layout](process().q_sample(x_start, t, z))
        output = LAYOUTS[output_layout](model_output(mean_type, x_start, z, learned, seed=first + 20).to(dtype))
        if noise == "philox":
            # what the kernel's normals may be off by is test_philox's
            steps = [STEPS - step for step in t.tolist()]
            one = [philox_normal(SEED, samples[i : i + 1], steps[i], shape[1:], backend="triton") for i in range(n)]
            drawn = torch.cat(one)
        else:
            drawn = LAYOUTS[layout](random(*shape, seed=first + 30).to(DEVICE))

        def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
            inside = noise == "philox" and backend == "triton"
            given: dict[str, Any] = {"seed": SEED, "samples": samples} if inside else {"noise": drawn.to(dtype)}
            values = output.double() if dtype is torch.float64 else output
            step = diffusion_step(
                x.to(dtype), values, t, tables(dtype), **given, **chosen, pred_xstart=True, backend=backend
            )
            return {name: value for name, value in step._asdict().items() if value is not None}

        return [run("triton", torch.float32), run("reference", torch.float32), run("reference", torch.float64)]

    found, reference, truth = joined([run_all(first) for first in range(0, 5, n)])
    assert found["sample"].dtype == found["pred_xstart"].dtype == torch.float32
    assert_all_within_budget(found, reference, truth)


@pytest.mark.parametrize("case", pairwise(AXES), ids=lambda case: "-".join(map(str, case.values())))
def test_budget(case: dict[str, Any]) -> None:
    hold(**case)


@pytest.mark.slow
@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("var_type", ModelVarType)
def test_budget_of_every_combination(mean_type: str, var_type: str) -> None:
    """Of the kernel's switches, each with a share of the pairs of shapes, layouts and dtypes."""
    tensors = pairwise({name: AXES[name] for name in ("shape", "layout", "output_layout", "dtype")})
    for i, (sampler, clip, noise) in enumerate(product(AXES["sampler"], AXES["clip"], AXES["noise"])):
        for case in tensors[i % 4 :: 4]:
            hold(mean_type, var_type, sampler, clip, noise, **case)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 20, 4, 4), (2, 3, 6), (2, 3, 2, 4, 5), (2, 3, 40, 52)], ids=str)
def test_other_shapes(shape: tuple[int, ...]) -> None:
    x, output, noise = (random(*shape, seed=seed).to(DEVICE) for seed in (1, 2, 3))
    arguments = x, output, timesteps(2, 1), tables()
    update = [STEPS - t for t in arguments[2].tolist()]
    drawn = torch.cat([philox_normal(SEED, torch.tensor([i]), update[i], shape[1:]) for i in range(2)]).to(DEVICE)
    for given, z in (({"noise": noise}, noise), ({"seed": SEED}, drawn)):
        truth, reference = (
            diffusion_step(
                *(t.to(dtype) for t in arguments[:2]),
                arguments[2],
                tables(dtype),
                noise=z.to(dtype),
                var_type="fixed_small",
                backend="reference",
            ).sample
            for dtype in (torch.float64, torch.float32)
        )
        found = diffusion_step(*arguments, var_type="fixed_small", backend="triton", **given).sample
        assert_equal_but_for_rounding(found, reference, truth, str(shape))


@pytest.mark.parametrize("dtype", [d for d in TRITON_DTYPES if d is not torch.float32], ids=str)
def test_low_precision_x_gives_fp32(dtype: torch.dtype) -> None:
    x, output = random(2, 3, 8, 8, seed=1, dtype=dtype).to(DEVICE), random(2, 6, 8, 8, seed=2, dtype=dtype).to(DEVICE)
    noise = random(2, 3, 8, 8, seed=3, dtype=dtype).to(DEVICE)
    truth, reference, found = (
        diffusion_step(*xs, timesteps(2), tables(xs[0].dtype), noise=noise.to(xs[0].dtype), backend=backend).sample
        for xs, backend in (
            ((x.double(), output.double()), "reference"),
            ((x, output), "reference"),
            ((x, output), "triton"),
        )
    )
    assert found.dtype == reference.dtype == torch.float32
    assert_within_budget(found, reference, truth, "sample")


# the noise


def drawn(
    x_layout: str, output_layout: str, shape: tuple[int, ...], samples: Tensor, t: Tensor, backend: str = "triton"
) -> Tensor:
    """What the kernel draws itself: with x_0 = 0 and the variance's log 0, the sample is the noise alone."""
    n, c, h, w = shape
    x, output = torch.zeros(shape, device=DEVICE), torch.zeros((n, 2 * c, h, w), device=DEVICE)
    chosen: dict[str, Any] = {"mean_type": "start_x", "var_type": "learned", "seed": SEED, "samples": samples}
    x, output = LAYOUTS[x_layout](x), LAYOUTS[output_layout](output)
    return diffusion_step(x, output, t, tables(), **chosen, backend=backend).sample


IN_EACH_LAYOUT = [(3, 8, 8), (3, 7, 7), (3, 3, 5), (3, 12, 12), (3, 20, 18), (4, 1, 1), (1, 33, 31)]
# Of both ways to cut a sample, by channel and across them: one block and several in each layout
QUICK = [("contiguous", shape) for shape in ((3, 8, 8), (3, 3, 5), (1, 33, 31))]
QUICK += [("channels_last", shape) for shape in ((3, 12, 12), (3, 7, 7), (4, 1, 1))]


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in product(("contiguous", "channels_last"), IN_EACH_LAYOUT)
    ],
    ids=str,
)
def test_the_noise_is_philox_whatever_layout_batch_and_block(
    layout: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = torch.tensor([5, 2**40, 0, -3], device=DEVICE)
    t = torch.tensor([STEPS - 1, 1, 7, 0], device=DEVICE)
    found = drawn(layout, "channels_last", (4, *shape), samples, t)
    for i in range(4):
        twin = philox_normal(SEED, samples[i : i + 1], STEPS - int(t[i]), shape, backend="torch")
        torch.testing.assert_close(found[i : i + 1], twin * float(t[i] != 0), rtol=1e-5, atol=2e-6)
        alone = drawn("contiguous", "contiguous", (1, *shape), samples[i : i + 1], t[i : i + 1])
        assert torch.equal(alone[0], found[i])
    monkeypatch.setattr(kernel, "plan", lambda _: (128, 1))
    assert torch.equal(drawn(layout, "contiguous", (4, *shape), samples, t), found)


def test_samples_are_numbered_from_0_unless_told() -> None:
    t = timesteps(3, 1)
    x, output = random(3, 3, 4, 4, seed=1).to(DEVICE), random(3, 6, 4, 4, seed=2).to(DEVICE)
    for backend in ("reference", "triton"):
        unnamed = diffusion_step(x, output, t, tables(), seed=7, backend=backend)
        named = diffusion_step(x, output, t, tables(), seed=7, samples=torch.arange(3, device=DEVICE), backend=backend)
        assert torch.equal(unnamed.sample, named.sample)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_last_step_adds_no_noise(sampler: str) -> None:
    x, output = random(2, 3, 4, 4, seed=1).to(DEVICE), random(2, 6, 4, 4, seed=2).to(DEVICE)
    t = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    samples = [
        diffusion_step(x, output, t, tables(), sampler=sampler, eta=1.0, seed=seed, backend="triton").sample
        for seed in (0, 2**64 - 1)
    ]
    assert torch.equal(*samples)


# what is kept


def test_nan_stays_nan() -> None:
    """Clipping must not make a number of it: the loop's check for damaged weights would be blind."""
    x, output = torch.zeros(1, 3, 4, 4, device=DEVICE), torch.zeros(1, 6, 4, 4, device=DEVICE)
    output[0, 1, 2, 3] = torch.nan
    for sampler in Sampler:
        step = diffusion_step(x, output, timesteps(1, 2), tables(), sampler=sampler, seed=1, backend="triton")
        assert step.sample.isnan().sum() == 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_layout_of_x_is_kept(layout: str) -> None:
    x, output = LAYOUTS[layout](random(2, 3, 8, 8, seed=1).to(DEVICE)), random(2, 6, 8, 8, seed=2).to(DEVICE)
    step = diffusion_step(x, output, timesteps(2), tables(), seed=1, pred_xstart=True, backend="triton")
    assert step.pred_xstart is not None
    assert step.sample.stride() == step.pred_xstart.stride() == x.stride()
    assert diffusion_step(x, output, timesteps(2), tables(), seed=1, backend="triton").pred_xstart is None


def test_two_runs_are_equal() -> None:
    x, output = random(2, 3, 33, 8, seed=1).to(DEVICE), random(2, 6, 33, 8, seed=2).to(DEVICE)
    first, second = (diffusion_step(x, output, timesteps(2), tables(), seed=1, backend="triton") for _ in range(2))
    assert torch.equal(first.sample, second.sample)


def test_one_image_for_all_and_one_timestep_for_all() -> None:
    """Strides of 0, as a loop's expanded timesteps have them."""
    x, output = random(1, 3, 8, 8, seed=1).to(DEVICE), random(1, 6, 8, 8, seed=2).to(DEVICE)
    t = torch.tensor([9], device=DEVICE)
    many = x.expand(3, -1, -1, -1), output.expand(3, -1, -1, -1), t.expand(3)
    found = diffusion_step(*many, tables(), seed=1, backend="triton").sample
    assert torch.equal(found[:1], diffusion_step(x, output, t, tables(), seed=1, backend="triton").sample)
    assert not torch.equal(found[0], found[1])


def test_no_samples() -> None:
    x, output = torch.zeros(0, 3, 4, 4, device=DEVICE), torch.zeros(0, 6, 4, 4, device=DEVICE)
    assert diffusion_step(x, output, timesteps(0).long(), tables(), seed=1, backend="triton").sample.shape == x.shape


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
    output = whole.as_strided((2, 6, 4, 4), (2**31 + 64, 16, 4, 1))
    output.copy_(random(2, 6, 4, 4, seed=2))
    far = whole.as_strided((2, 3, 4, 4), (64, 2**30 + 64, 4, 1), 4096)  # channels far apart, too
    far.copy_(random(2, 3, 4, 4, seed=1))
    found = diffusion_step(far, output, timesteps(2, 1), tables(), seed=1, backend="triton").sample
    near = diffusion_step(far.clone(), output.clone(), timesteps(2, 1), tables(), seed=1, backend="triton").sample
    assert torch.equal(found, near)


# within PyTorch


def raw_arguments(noise: bool, pred_xstart: bool) -> tuple[Any, ...]:
    x, output = random(2, 3, 2, 2, seed=1).to(DEVICE), LAYOUTS["channels_last"](random(2, 6, 2, 2, seed=2).to(DEVICE))
    given = random(2, 3, 2, 2, seed=3).to(DEVICE) if noise else None
    choices = "epsilon", "learned_range", "ddpm", 0.0, True, pred_xstart
    return x, output, timesteps(2), tables(), given, -5, torch.arange(2, device=DEVICE), *choices


@pytest.mark.parametrize(("noise", "pred_xstart"), [(True, False), (False, True)])
def test_opcheck(noise: bool, pred_xstart: bool) -> None:
    torch.library.opcheck(torch.ops.fastdiff.diffusion_step.default, raw_arguments(noise, pred_xstart))


def test_compiles_to_one_graph() -> None:
    x, output = random(2, 3, 8, 8, seed=1).to(DEVICE), random(2, 6, 8, 8, seed=2).to(DEVICE)

    def run(x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        step = diffusion_step(x, output * 1, t, tables_, seed=SEED, pred_xstart=True, backend="triton")
        assert step.pred_xstart is not None
        return step.sample + step.pred_xstart

    tables_ = tables()
    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, output, timesteps(2)), run(x, output, timesteps(2)))


def test_the_kernel_has_no_gradient() -> None:
    x, output = random(2, 3, 4, 4, seed=1).to(DEVICE), random(2, 6, 4, 4, seed=2).to(DEVICE).requires_grad_()
    with pytest.raises(ValueError, match=r"^diffusion_step: backend triton has no gradient: call it under torch.no_g"):
        diffusion_step(x, output, timesteps(2), tables(), seed=1, backend="triton")
    assert diffusion_step(x, output, timesteps(2), tables(), seed=1).sample.requires_grad
    with torch.no_grad():
        diffusion_step(x, output, timesteps(2), tables(), seed=1, backend="triton")


# in the process


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_processs_steps_are_the_ops(sampler: str, backend: str) -> None:
    betas = get_named_beta_schedule("linear", STEPS)
    d = GaussianDiffusion(betas=betas, model_var_type=ModelVarType.LEARNED_RANGE, kernels=backend)
    x, output = random(2, 3, 8, 8, seed=1).to(DEVICE), random(2, 6, 8, 8, seed=2).to(DEVICE)
    noise, t = random(2, 3, 8, 8, seed=3).to(DEVICE), timesteps(2)
    chosen: dict[str, Any] = {"sampler": sampler, "eta": 0.5, "backend": backend}
    step = d.p_sample if sampler == "ddpm" else lambda *args, **kwargs: d.ddim_sample(*args, eta=0.5, **kwargs)
    samples = torch.tensor([3, 9], device=DEVICE)
    for given, philox in (({"noise": noise}, noise), ({"seed": SEED, "samples": samples}, Philox(SEED, samples))):
        expected = diffusion_step(x, output, t, tables(), pred_xstart=True, **chosen, **given)
        found = step(lambda *_: output, x, t, noise=philox)
        assert torch.equal(found["sample"], expected.sample)
        assert expected.pred_xstart is not None
        assert torch.equal(found["pred_xstart"], expected.pred_xstart)
        called = step(lambda *_: output, x, t, noise=philox, denoised_fn=lambda x: x)
        torch.testing.assert_close(called["sample"], expected.sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_loops_draw_what_they_would_be_given(sampler: str) -> None:
    """x_T is step 0, the first update step 1: replayed noise and Philox inside the kernel make the same images."""
    shape, samples = (2, 3, 4, 4), torch.tensor([4, 2**33], device=DEVICE)
    draws = [philox_normal(SEED, samples, step, shape[1:]) for step in range(4)]

    def run(backend: str, noise: Any, step_noise: Any) -> Tensor:
        d = GaussianDiffusion(betas=get_named_beta_schedule("cosine", 3), kernels=backend)
        loop = d.p_sample_loop if sampler == "ddpm" else partial(d.ddim_sample_loop, eta=1.0)
        return loop(lambda x, t: 0.1 * x, shape, noise=noise, step_noise=step_noise)

    exact = [draw.double() for draw in draws]
    truth, reference = run("reference", exact[0], exact[1:]), run("reference", draws[0], draws[1:])
    philox = Philox(SEED, samples)
    for backend in ("reference", "triton"):
        assert_equal_but_for_rounding(run(backend, philox, philox), reference, truth, f"{backend}, drawn inside")
    assert_equal_but_for_rounding(run("triton", draws[0], draws[1:]), reference, truth, "triton, given")


def test_the_tables_are_the_processs() -> None:
    d, float64 = process(), tables(torch.float64)
    assert float64.shape == (STEPS, len(TABLES))
    for name, column in zip(TABLES, float64.T, strict=True):
        np.testing.assert_array_equal(column.cpu().numpy(), getattr(d, name))
    assert torch.equal(tables(), float64.float())
    assert tables(torch.float16) is tables()


def test_auto_is_torch_on_a_cpu() -> None:
    x, output = random(2, 3, 4, 4, seed=1), random(2, 6, 4, 4, seed=2)
    t, columns = timesteps(2).cpu(), process().step_tables(torch.device("cpu"), torch.float32)
    auto, explicit = (diffusion_step(x, output, t, columns, seed=1, backend=b).sample for b in ("auto", "torch"))
    assert torch.equal(auto, explicit)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(2, 3)}, r"x must be \(N, C, \*spatial\), not \(2, 3\)"),
    ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "x must have a floating-point dtype, not torch.int64"),
    ({"x": torch.zeros(2, 3, 4, 4).double()}, "tables must be torch.float64 for x in torch.float64, not torch.float32"),
    ({"model_output": torch.zeros(2, 3, 4, 4)}, r"model_output must be \(2, 6, 4, 4\) for a learned variance, not"),
    ({"var_type": "fixed_small"}, r"model_output must be \(2, 3, 4, 4\) for a fixed variance, not \(2, 6, 4, 4\)"),
    ({"t": torch.zeros(3, dtype=torch.int64)}, r"t must be \(2,\), not \(3,\)"),
    ({"t": torch.zeros(2)}, "t must be int64, not torch.float32"),
    ({"tables": torch.zeros(50, 3)}, rf"tables must be \(T, {len(TABLES)}\), not \(50, 3\)"),
    ({"noise": torch.zeros(2, 3, 4, 4)}, "give either noise or a seed"),
    ({"seed": None}, "give either noise or a seed"),
    ({"seed": None, "noise": torch.zeros(2, 6, 4, 4)}, r"noise must be \(2, 3, 4, 4\), not \(2, 6, 4, 4\)"),
    ({"seed": 2**64}, r"seed must be in 0\.\.2\^64-1, not 18446744073709551616"),
    ({"seed": -1}, r"seed must be in 0\.\.2\^64-1, not -1"),
    ({"samples": torch.zeros(3, dtype=torch.int64)}, r"samples must be \(2,\) int64, not \(3,\)"),
    ({"eta": -0.5, "sampler": "ddim"}, "eta must be at least 0, not -0.5"),
]


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message[:32] for _, message in BAD])
def test_bad_arguments(wrong: dict[str, Any], message: str, backend: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 3, 4, 4),
        "model_output": torch.zeros(2, 6, 4, 4),
        "t": torch.zeros(2, dtype=torch.int64),
        "tables": process().step_tables(torch.device("cpu"), torch.float32),
        "seed": 1,
    }
    with pytest.raises(ValueError, match="^diffusion_step: " + message):
        diffusion_step(**{**arguments, **wrong}, backend=backend)


@pytest.mark.parametrize("name", ["mean_type", "var_type", "sampler"])
def test_unknown_choices(name: str) -> None:
    x, output = torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 4, 4)
    with pytest.raises(ValueError, match="'other' is not a valid"):
        diffusion_step(x, output, timesteps(2), tables(), seed=1, **{name: "other"})
