"""The names that users import, and what an import may cost."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fastdiff
from fastdiff import GaussianDiffusion, LossType, ModelConfig, ModelMeanType, ModelVarType, build_model, kernels

from .support import inputs

PROMISED = {
    *("ModelConfig", "DiffusionConfig", "build_model", "build_diffusion", "load_checkpoint", "save_checkpoint"),
    *("GaussianDiffusion", "ModelMeanType", "ModelVarType", "LossType", "space_timesteps"),
    *("UniformSampler", "LossSecondMomentSampler", "ImageFolder"),
}

METHODS = {
    "q_mean_variance": "x_start t",
    "q_sample": "x_start t noise",
    "q_posterior_mean_variance": "x_start x_t t",
    "p_mean_variance": "model x t clip_denoised denoised_fn model_kwargs",
    "p_sample": "model x t clip_denoised denoised_fn model_kwargs noise",
    "p_sample_loop": "model shape",
    "p_sample_loop_progressive": "model shape",
    "ddim_sample": "model x t clip_denoised denoised_fn model_kwargs eta noise",
    "ddim_reverse_sample": "model x t clip_denoised denoised_fn model_kwargs",
    "ddim_sample_loop": "model shape eta",
    "training_losses": "model x_start t model_kwargs noise",
    "vb_terms_bpd": "model x_start x_t t clip_denoised model_kwargs",
    "prior_bpd": "x_start",
    "calc_bpd_loop": "model x_start clip_denoised model_kwargs step_noise",
}


def test_the_promised_names_are_there() -> None:
    assert set(fastdiff.__all__) >= PROMISED
    assert {"attention", "group_norm_silu"} <= set(kernels.__all__)


@pytest.mark.parametrize("name", fastdiff.__all__)
def test_every_name_resolves(name: str) -> None:
    assert getattr(fastdiff, name) is not None


@pytest.mark.parametrize("name", kernels.__all__)
def test_every_kernel_name_resolves(name: str) -> None:
    assert getattr(kernels, name) is not None


def test_the_type_checker_sees_the_same_names() -> None:
    source = Path(inspect.getfile(fastdiff)).read_text()
    block = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(fastdiff.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="GaussianDiffusions"):
        fastdiff.GaussianDiffusions  # noqa: B018
    assert not hasattr(fastdiff, "torch")


def test_importing_configurations_does_not_import_torch() -> None:
    code = (
        "import sys, fastdiff, fastdiff.config, fastdiff.presets; fastdiff.ModelConfig(); fastdiff.PRESETS; "
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(inspect.getfile(fastdiff)).parents[1]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0


@pytest.mark.parametrize(("name", "parameters"), METHODS.items())
def test_methods_of_the_process(name: str, parameters: str) -> None:
    found = list(inspect.signature(getattr(GaussianDiffusion, name)).parameters)
    assert found[1 : 1 + len(parameters.split())] == parameters.split()


def test_enum_members() -> None:
    assert list(ModelMeanType.__members__) == ["PREVIOUS_X", "START_X", "EPSILON", "V", "FLOW"]
    assert set(ModelVarType.__members__) == {"FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"}
    assert set(LossType.__members__) == {"MSE", "RESCALED_MSE", "KL", "RESCALED_KL"}


@pytest.mark.parametrize("small_size", [None, 4])
def test_the_models_call(small_size: int | None) -> None:
    model = build_model(ModelConfig(image_size=8, num_channels=32, num_res_blocks=1, small_size=small_size))
    assert isinstance(model, fastdiff.SuperResUNet if small_size else fastdiff.UNet)
    assert isinstance(model, fastdiff.SuperResUNet) == bool(small_size)
    parameters = list(inspect.signature(model.forward).parameters)
    assert parameters[:3] == ["x", "timesteps", "y"]
    assert ("low_res" in parameters) == bool(small_size)
    assert model(**inputs(model)).shape == (2, 3, 8, 8)
