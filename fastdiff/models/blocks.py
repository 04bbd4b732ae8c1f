"""The two blocks of the UNet: a residual block conditioned on the timestep, and self-attention over pixels."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdiff import kernels
from fastdiff.kernels.backend import runs_triton
from fastdiff.models.layers import Conv1x1, Conv3x3, GroupNormSiLU, QKVLinear, Resize, TokenLinear, zeroed

BIAS_IN_NORM = 32
"""Least size of a feature map to which a norm's kernel adds the bias of the convolution before it. The tiles of smaller
ones lie in registers, where the sum that is its gradient leaves room for one program less."""


def set_fuses(model: nn.Module, fuses: bool) -> None:
    """Let the norms of all blocks take over work beside them, as they do by default, or not: to test or time that."""
    for module in model.modules():
        if isinstance(module, (ResBlock, AttentionBlock)):
            module.fuses = fuses


class ResBlock(nn.Module):
    """norm, SiLU, conv; the embedding; norm, SiLU, dropout, conv; plus the input.

    The embedding scales and shifts the second norm's output, or is added before it (Nichol & Dhariwal 2021, section 2).
    ``resize`` halves or doubles the feature map between the first norm and its convolution, and the input likewise
    (Dhariwal & Nichol 2021, section 3). The nn.Identity layers replace the original's separate SiLU modules, to keep
    the indices in the state-dict keys.
    """

    fuses = True
    """Whether the norms' kernels take over work beside them: the biases of convolutions before them, the concatenation
    of their inputs, whose 1x1 convolution then adds its product and all biases at once, and sums of gradients."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float,
        use_scale_shift_norm: bool,
        use_checkpoint: bool,
        backend: str,
        resize: Resize = None,
    ) -> None:
        super().__init__()
        self.resize = resize
        self.backend = backend
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(GroupNormSiLU(channels, backend), nn.Identity(), Conv3x3(channels, out_channels))
        self.emb_layers: nn.Module = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNormSiLU(out_channels, backend),
            nn.Identity(),
            nn.Dropout(dropout),
            zeroed(Conv3x3(out_channels, out_channels)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else Conv1x1(channels, out_channels)
        self.condition_at: slice | None = None
        """This block's columns in the output of the layer that replaces all embedding layers, see for_inference()."""

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W), emb: (N, E), or (N, all conditions) -> (N, C', H', W').

        ``skip``: None, or (N, C2, H, W), a skip connection, whose channels follow x's.
        """
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, skip, use_reentrant=False)
        return self._forward(x, emb, skip)

    def _forward(self, x: Tensor, emb: Tensor, skip: Tensor | None) -> Tensor:
        kernel = self.fuses and runs_triton(self.backend, x)
        joined = kernel and isinstance(self.skip_connection, Conv1x1) and (skip is None or skip.dtype == x.dtype)
        if skip is not None and not joined:
            x, skip = torch.cat([x, skip], dim=1), None
        norm, _, conv = self.in_layers
        h, *inputs = norm(x, second=skip, with_input=True) if self.fuses else (norm(x), x)
        if self.resize is not None:
            h, *inputs = (self.resize(each) for each in (h, *inputs))
        in_norm = kernel and min(h.shape[2:]) >= BIAS_IN_NORM
        h, bias = conv(h, add_bias=not in_norm), conv.bias if in_norm else None
        condition = self.emb_layers(emb) if self.condition_at is None else emb[:, self.condition_at]  # (N, C' or 2C')
        norm, _, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = condition.chunk(2, dim=1)
            h = norm(h, scale, shift, input_bias=bias)
        else:
            h = norm(h + condition[:, :, None, None], input_bias=bias)
        h = conv(dropout(h), add_bias=not joined)
        return (self.skip_connection(*inputs, other_bias=conv.bias) if joined else self.skip_connection(*inputs)) + h


class AttentionBlock(nn.Module):
    """Residual self-attention over the pixels of a feature map."""

    fuses = True
    """Whether the norm's kernel adds the gradient of its input's other use."""

    def __init__(self, channels: int, heads: int, use_checkpoint: bool, backend: str, new_order: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.use_checkpoint = use_checkpoint
        self.norm = GroupNormSiLU(channels, backend, silu=False)
        self.qkv = QKVLinear(channels, heads, new_order)
        self.proj_out = zeroed(TokenLinear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        y, x = self.norm(x, with_input=True) if self.fuses else (self.norm(x), x)
        tokens = y.flatten(2).transpose(1, 2)  # (N, T, C), a view if x is channels_last
        h = self.proj_out(kernels.attention(self.qkv(tokens), self.heads, backend=self.backend))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])
