"""The classifier's pools, each against its definition in PyTorch's own modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import Classifier, ClassifierConfig, build_classifier
from fastdiff.config import ClassifierPool

from ..support import randomise

CONFIG = {
    "image_size": 16,
    "classifier_width": 64,
    "classifier_depth": 1,
    "channel_mult": (1, 2),
    "classifier_attention_resolutions": (8,),
    "num_classes": 5,
}


def plain(model: Classifier, h: Tensor, means: Tensor) -> Tensor:
    """The pool of a last feature map h (N, C, H, W) and the means (N, F) of every block's output."""
    out = model.out
    assert isinstance(out, nn.Sequential)
    match model.config.classifier_pool:
        case ClassifierPool.SPATIAL:
            return out[2](F.relu(out[0](means)))
        case ClassifierPool.SPATIAL_V2:
            hidden = out[0](means)
            return out[3](F.silu(F.group_norm(hidden, 32, out[1].weight, out[1].bias, 1e-5)))
    h = F.silu(F.group_norm(h, 32, out[0].weight, out[0].bias, 1e-5))
    if model.config.classifier_pool is ClassifierPool.ADAPTIVE:
        return out[3](h.mean((2, 3), keepdim=True))[:, :, 0, 0]
    pool = out[2]
    tokens = h.flatten(2)  # (N, C, T)
    tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], dim=2) + pool.positional_embedding
    q, k, v = (F.linear(tokens.mT, pool.qkv_proj.weight[:, :, 0], pool.qkv_proj.bias)).chunk(3, dim=2)
    heads = [part.unflatten(2, (2, 64)).transpose(1, 2) for part in (q, k, v)]  # heads of 64 channels
    attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    return F.linear(attended[:, 0], pool.c_proj.weight[:, :, 0], pool.c_proj.bias)


@pytest.mark.parametrize("pool", ClassifierPool)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_pool_is_its_definition(pool: ClassifierPool, backend: str) -> None:
    config = ClassifierConfig(**CONFIG, classifier_pool=pool)  # type: ignore[arg-type]
    model = randomise(build_classifier(config, backend).double().eval(), seed=0)
    x, t = torch.randn(3, 3, 16, 16, dtype=torch.float64).requires_grad_(), torch.tensor([0.0, 10.0, 900.0])
    h, skips = model.encode(x, model.embed(t))
    expected = plain(model, h, torch.cat([block.mean((2, 3)) for block in (*skips, h)], dim=1))
    logits = model(x, t)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    found, wanted = (torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (logits, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    assert found.abs().max() > 0


@pytest.mark.parametrize("pool", ClassifierPool)
def test_for_inference_computes_the_same(pool: ClassifierPool) -> None:
    """The logits and, for guidance, the gradient of x."""
    config = ClassifierConfig(**CONFIG, classifier_pool=pool)  # type: ignore[arg-type]
    model = randomise(build_classifier(config, "torch").double().eval(), seed=0)
    x, t = torch.randn(3, 3, 16, 16, dtype=torch.float64).requires_grad_(), torch.tensor([0.0, 10.0, 900.0])
    logits = model(x, t)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    found = model.for_inference()(x, t)
    torch.testing.assert_close(found, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("pool", ClassifierPool)
def test_the_keys_of_the_pool(pool: ClassifierPool) -> None:
    """Those of guided-diffusion."""
    with torch.device("meta"):
        model = build_classifier(ClassifierConfig(**CONFIG, classifier_pool=pool))  # type: ignore[arg-type]
    shapes = {key.removeprefix("out."): tuple(v.shape) for key, v in model.state_dict().items() if "out." in key[:4]}
    width = 64 + 64 + 64 + 128 + 128  # of the first convolution, a block, its halving, a block and the middle
    expected = {
        "attention": {
            "0.weight": (128,),
            "0.bias": (128,),
            "2.positional_embedding": (128, 65),
            "2.qkv_proj.weight": (384, 128, 1),
            "2.qkv_proj.bias": (384,),
            "2.c_proj.weight": (5, 128, 1),
            "2.c_proj.bias": (5,),
        },
        "adaptive": {"0.weight": (128,), "0.bias": (128,), "3.weight": (5, 128, 1, 1), "3.bias": (5,)},
        "spatial": {"0.weight": (2048, width), "0.bias": (2048,), "2.weight": (5, 2048), "2.bias": (5,)},
        "spatial_v2": {
            "0.weight": (2048, width),
            "0.bias": (2048,),
            "1.weight": (2048,),
            "1.bias": (2048,),
            "3.weight": (5, 2048),
            "3.bias": (5,),
        },
    }
    assert shapes == expected[pool]
