"""Six AdamW steps from given weights, images, timesteps and noise."""

import numpy as np
import pytest
import torch

from fastdiff import build_diffusion
from fastdiff.training.ema import EMA

from .support import ENGINES, diffusion_config, golden_model, load, projection, tensor, tensor_for

EMA_RATES = [0.9, 0.99]


@pytest.mark.parametrize(
    ("kernels", "memory_format"),
    [pytest.param(*engine, marks=[pytest.mark.slow] if engine[0] == "triton" else []) for engine in ENGINES],
)
def test_trajectory(kernels: str, memory_format: str) -> None:
    data = load("train_hybrid.npz")
    hyper = data["hyper"]
    arrays = {"x_start_u8", "t", "noise", "losses", "grad_norm", "names", "param_projection"}
    assert set(data) == {"flags", "hyper"} | arrays | {f"ema_{rate}_projection" for rate in EMA_RATES}
    assert set(hyper) == {"lr", "weight_decay", "ema_rates", "microbatch"}
    assert hyper["ema_rates"] == EMA_RATES

    model = golden_model(data["flags"], kernels, memory_format).train()
    diffusion = build_diffusion(diffusion_config(data["flags"]), kernels=kernels)
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    assert names == data["names"].tolist()
    optimizer = torch.optim.AdamW(parameters, lr=hyper["lr"], weight_decay=hyper["weight_decay"])
    averages = {rate: EMA(parameters, rate, warmup=False) for rate in EMA_RATES}

    losses, norms = [], []
    for images, t, noise in zip(data["x_start_u8"], data["t"], data["noise"], strict=True):
        optimizer.zero_grad()
        x_start = tensor(images).float() / 127.5 - 1
        for rows in torch.arange(len(t)).split(hyper["microbatch"]):
            terms = diffusion.training_losses(model, x_start[rows], tensor(t)[rows], noise=tensor(noise)[rows])
            # The original adds the micro-batches' gradients instead of averaging them.
            terms["loss"].mean().backward()
            losses.append(terms["loss"].detach().cpu().numpy())
        norms.append(float(torch.stack([p.grad.double().square().sum() for p in parameters]).sum().sqrt()))
        optimizer.step()
        for average in averages.values():
            average.update()

    np.testing.assert_allclose(np.concatenate(losses).reshape(data["losses"].shape), data["losses"], rtol=1e-4)
    np.testing.assert_allclose(norms, data["grad_norm"], rtol=1e-4)
    # What only shifts the one channel of a norm's group has no effect: its gradient is rounding, of which Adam makes
    # steps of full size in random directions.
    effect = np.array([float(p.grad.norm()) > 1e-6 * norms[-1] for p in parameters])
    assert effect.mean() > 0.9
    weights = np.array([p.ndim > 1 for p in parameters])
    tolerance = np.where(weights, 1e-3, np.where(effect, 1e-2, 2.0))
    start = np.array([projection(k, torch.from_numpy(tensor_for(k, v.shape))) for k, v in model.named_parameters()])
    results = {"param": parameters, **{f"ema_{rate}": average.tensors() for rate, average in averages.items()}}
    for what, tensors in results.items():
        golden = data[f"{what}_projection"]
        found = np.array([projection(k, v) for k, v in zip(names, tensors, strict=True)])
        # Relative to the movement, which is a hundredth of the weights themselves and much less for an average.
        error = np.abs(found - golden) / np.abs(golden - start).max()
        over = [(names[i], error[i]) for i in np.flatnonzero(~(error <= tolerance))]
        assert not over, what
