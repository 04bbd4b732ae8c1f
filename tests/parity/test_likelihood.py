"""The whole variational bound, every step's noise and model output given."""

import pytest
import torch

from .support import assert_close, float32_limit, golden_diffusion, load

KEYS = ["total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"]


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, None), (torch.float64, 1e-7)], ids=["float32", "float64"])
def test_calc_bpd_loop(dtype: torch.dtype, share: float | None) -> None:
    data = load("bpd_linear40.npz")
    assert set(data) == {"config", "x_start", "step_model_output", "step_noise", *KEYS, *("err32_" + k for k in KEYS)}
    steps = data["config"]["diffusion_steps"]
    outputs = torch.from_numpy(data["step_model_output"]).to(dtype)
    run: list[int] = []

    def model(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        # The timesteps come scaled to 0..1000; the stored outputs lie in the order of the run, the last one first.
        t = (timesteps.double() * steps / 1000).round().long()
        assert (t == t[0]).all()
        run.append(int(t[0]))
        return outputs[steps - 1 - run[-1]]

    bpd = golden_diffusion(data["config"]).calc_bpd_loop(
        model, torch.from_numpy(data["x_start"]).to(dtype), step_noise=torch.from_numpy(data["step_noise"]).to(dtype)
    )
    assert run == list(range(steps))[::-1]
    for key in KEYS:
        limit = float32_limit(data, key) if share is None else 1e-11 + share * data["err32_" + key]
        assert_close(bpd[key], data[key], limit, key)
