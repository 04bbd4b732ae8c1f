"""The UNet of Nichol & Dhariwal 2021 (after Ho et al. 2020) and Dhariwal & Nichol 2021, read top to bottom."""

from typing import Self, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.config import Kernels, MemoryFormat, ModelConfig
from fastdiff.models.blocks import AttentionBlock, ResBlock
from fastdiff.models.layers import (
    Conv3x3,
    Downsample,
    GroupNormSiLU,
    QKVLinear,
    Resize,
    TimestepEmbedding,
    Upsample,
    average_pixels,
    repeat_pixels,
    zeroed,
)

NULL_CLASS = -1
"""The class label that makes a class-conditional model predict without a class (Ho & Salimans 2022, section 3)."""


class Features(TypedDict):
    """The outputs of the input blocks, of the middle block and of the output blocks."""

    down: list[Tensor]
    middle: Tensor
    up: list[Tensor]


class EmbedSequential(nn.Sequential):
    """A sequence of layers that passes the embedding to its residual blocks, and a skip connection to the first one."""

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:  # type: ignore[override]  # more
        """x: (N, C, H, W), emb: (N, E), skip: (N, C2, H, W) or None."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x, skip = layer(x, emb, skip), None
            else:
                assert skip is None
                x = layer(x)
        return x


class Encoder(nn.Module):
    """The timestep embedding, the downsampling half and the middle block, shared by the UNet and the classifier.

    In the downsampling half each level has ``num_res_blocks`` residual blocks. The middle block is a residual block,
    attention and a residual block.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels | str, in_channels: int) -> None:
        super().__init__()
        self.kernels = kernels
        width = config.num_channels
        self.emb_channels = 4 * width
        self.timestep_embedding = TimestepEmbedding(width)
        self.time_embed = nn.Sequential(
            nn.Linear(width, self.emb_channels), nn.SiLU(), nn.Linear(self.emb_channels, self.emb_channels)
        )
        if config.class_cond:
            self.label_emb = nn.Embedding(config.num_classes, self.emb_channels)
        self.emb_layers: nn.Module | None = None

        channels = config.widths[0]
        self.input_blocks = nn.ModuleList([EmbedSequential(Conv3x3(in_channels, channels))])
        self.skips = [channels]
        """The channels of every input block's output."""
        for level, width in enumerate(config.widths):
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [self._res_block(config, channels, width)]
                channels = width
                if level in config.attention_levels:
                    layers.append(self._attention(config, channels))
                self.input_blocks.append(EmbedSequential(*layers))
                self.skips.append(channels)
            if level != len(config.widths) - 1:
                half = (
                    self._res_block(config, channels, channels, average_pixels)
                    if config.resblock_updown
                    else Downsample(channels)
                )
                self.input_blocks.append(EmbedSequential(half))
                self.skips.append(channels)
        self.middle_block = EmbedSequential(
            self._res_block(config, channels, channels),
            self._attention(config, channels),
            self._res_block(config, channels, channels),
        )

    def _res_block(self, config: ModelConfig, channels: int, out_channels: int, resize: Resize = None) -> ResBlock:
        return ResBlock(
            channels,
            out_channels,
            self.emb_channels,
            config.dropout,
            config.use_scale_shift_norm,
            config.use_checkpoint,
            self.kernels,
            resize,
        )

    def _attention(self, config: ModelConfig, channels: int, upsample: bool = False) -> AttentionBlock:
        heads = config.heads_of(channels, upsample=upsample)
        return AttentionBlock(
            channels, heads, config.use_checkpoint, self.kernels, new_order=config.use_new_attention_order
        )

    def lay_out(self, memory_format: MemoryFormat | str) -> Self:
        """Put the weights of convolutions into a memory format, in which every activation will be, too."""
        self.channels_last = MemoryFormat(memory_format) is MemoryFormat.CHANNELS_LAST
        wanted = torch.channels_last if self.channels_last else torch.contiguous_format
        return self.to(memory_format=wanted)  # type: ignore[call-overload]  # missing from its annotations

    def for_inference(self) -> Self:
        """Evaluation mode, not to be trained or saved.

        The rows of qkv are reordered in place (see QKVLinear), and one layer replaces the embedding layers of all
        residual blocks.
        """
        for module in self.modules():
            if isinstance(module, QKVLinear):
                module.reorder()
        if self.emb_layers is None:
            self.emb_layers = self._joined_embedding_layers()
        return self.eval()

    def _joined_embedding_layers(self) -> nn.Sequential:
        """One product for the conditions of all residual blocks, which give up their own weights."""
        blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        start = 0
        for block in blocks:
            _, linear = block.emb_layers.children()
            assert isinstance(linear, nn.Linear)
            weights.append(linear.weight)
            biases.append(linear.bias)
            block.condition_at = slice(start, start := start + len(linear.bias))
            block.emb_layers = nn.Identity()
        joined = nn.Linear(self.emb_channels, start, device="meta")
        joined.weight = nn.Parameter(torch.cat(weights).detach(), requires_grad=weights[0].requires_grad)
        joined.bias = nn.Parameter(torch.cat(biases).detach(), requires_grad=biases[0].requires_grad)
        return nn.Sequential(nn.SiLU(), joined)

    def embed(self, timesteps: Tensor) -> Tensor:
        """The embedding (N, E) of timesteps (N,), which may be fractional."""
        return self.time_embed(self.timestep_embedding(timesteps).to(self.time_embed[0].weight.dtype))

    def conditions(self, emb: Tensor) -> Tensor:
        """What the residual blocks take for the embedding (N, E): that, or for inference their conditions at once."""
        return emb if self.emb_layers is None else self.emb_layers(emb)

    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The middle block's output and that of every input block, for x (N, C, H, W) and what conditions() returns."""
        h = x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        return self.middle_block(h, emb), skips


class UNet(Encoder):
    """Predicts the noise (epsilon) or x_0 of noisy images, and with learn_sigma also the variance.

    In the upsampling half each level has one residual block more than in the downsampling half, and each takes the
    matching skip connection. State-dict keys and shapes match improved-diffusion's and guided-diffusion's, unless
    patch_size is above 1: the first level then sees every patch as one pixel (Luhman & Luhman 2022).
    """

    in_channels = 3

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels | str = Kernels.AUTO,
        memory_format: MemoryFormat | str = MemoryFormat.CONTIGUOUS,
    ) -> None:
        pixels = config.patch_size**2
        super().__init__(config, kernels, self.in_channels * pixels)
        self.config = config
        skips, channels = list(self.skips), config.widths[-1]
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(config.widths))):
            for i in range(config.num_res_blocks + 1):
                layers: list[nn.Module] = [self._res_block(config, channels + skips.pop(), width)]
                channels = width
                if level in config.attention_levels:
                    layers.append(self._attention(config, channels, upsample=True))
                if level and i == config.num_res_blocks:
                    layers.append(
                        self._res_block(config, channels, channels, repeat_pixels)
                        if config.resblock_updown
                        else Upsample(channels)
                    )
                self.output_blocks.append(EmbedSequential(*layers))
        self.out = nn.Sequential(
            GroupNormSiLU(channels, kernels), nn.Identity(), zeroed(Conv3x3(channels, config.out_channels * pixels))
        )
        if config.patch_size > 1:
            self.out.append(nn.PixelShuffle(config.patch_size))
        if config.augment_dim:
            self.augment_emb = nn.Linear(config.augment_dim, self.emb_channels, bias=False)
        self.lay_out(memory_format)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """The model's output at x.

        x: (N, 3, H, W) in [-1, 1]; timesteps: (N,), may be fractional; y: (N,) int64 class indices, for
        class-conditional models only. NULL_CLASS adds no embedding: that image is predicted without a class. augment:
        (N, augment_dim), what was done to each image (Karras et al. 2022, appendix F.2), in training only; none means
        zeros. Returns (N, out_channels, H, W) in x's dtype.
        """
        output = self.out(self._run(x, timesteps, y, augment))
        if output.dtype == x.dtype:
            return output
        # the cast is a pass in any case: in x's layout the loss and the sampling step read its output whole
        return output.to(x.dtype, memory_format=torch.contiguous_format if x.is_contiguous() else torch.preserve_format)

    def get_feature_vectors(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, augment: Tensor | None = None
    ) -> Features:
        """The output of every block at x, each (N, C, h, w) in x's dtype, in the order in which the blocks run.

        The arguments are forward's. ``out`` maps the last block's output to forward's.
        """
        seen: list[Tensor] = []
        self._run(x, timesteps, y, augment, seen)
        features, middle = [h.to(x.dtype) for h in seen], len(self.input_blocks)
        return {"down": features[:middle], "middle": features[middle], "up": features[middle + 1 :]}

    def _run(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None,
        augment: Tensor | None,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """The last block's output; every block's output is appended to ``seen``, if given."""
        if (y is not None) != self.config.class_cond:
            raise ValueError(
                f"the model has class_cond {self.config.class_cond}: pass class indices as y if true, no y if false"
            )
        emb = self.embed(timesteps)
        if y is not None:
            null = y == NULL_CLASS
            emb = emb + self.label_emb(y.masked_fill(null, 0)).masked_fill(null[:, None], 0)
        if augment is not None:
            if not self.config.augment_dim:
                raise ValueError("the model has augment_dim 0: pass no augment")
            emb = emb + self.augment_emb(augment.to(self.augment_emb.weight.dtype))
        if self.config.patch_size > 1:
            x = F.pixel_unshuffle(x, self.config.patch_size)
        emb = self.conditions(emb)
        h, skips = self.encode(x, emb)
        if seen is not None:
            seen += [*skips, h]
        for block in self.output_blocks:
            h = block(h, emb, skips.pop())
            if seen is not None:
                seen.append(h)
        return h
