"""The diffusion transformer with adaLN-zero conditioning, on timm's blocks.

Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748. Parameter names
are those of the published checkpoints. Linear layers are only ever called, so any of them may be
replaced by a quantized layer with the same call.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_qat.dit.models.hub import HubModel

__all__ = ["DiT", "DiTBlock", "FinalLayer", "LabelEmbedder", "TimestepEmbedder"]

_EXTRA_STATE = "._extra_state"


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _axis_embedding(width: int, positions: Tensor) -> Tensor:
    """Sines, then cosines, of positions (L,) at ``width / 2`` frequencies: (L, width)."""
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.outer(positions, frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _position_embedding(width: int, grid: int) -> Tensor:
    """Fixed 2-D embedding (1, grid*grid, width), rows outermost.

    The first half of the features holds the column and the second half the row: so do MAE and the
    published checkpoints, whose variable names say the opposite.
    """
    steps = torch.arange(grid, dtype=torch.float64)
    row, column = torch.meshgrid(steps, steps, indexing="ij")
    halves = [_axis_embedding(width // 2, axis.flatten()) for axis in (column, row)]
    return torch.cat(halves, dim=1).float().unsqueeze(0)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep, then a two-layer MLP: (N,) to (N, hidden_size).

    Args:
        hidden_size: Width of the output.
        shift: The lowest frequency is ``1e4 ** -((half - 1) / (half - shift))``; 0 in the original,
            1 in diffusers.
        features: Number of sinusoidal features.
    """

    def __init__(self, hidden_size: int, shift: int = 0, features: int = 256) -> None:
        super().__init__()
        self.shift = shift
        self.features = features
        self.mlp = nn.Sequential(
            nn.Linear(features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Embed timesteps (N,), long or float; the angles are float32 whatever ``dtype`` is."""
        half = self.features // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10000.0) * steps / (half - self.shift))
        out: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype))
        return out


class LabelEmbedder(nn.Module):
    """Table of class embeddings: (N,) long to (N, hidden_size)."""

    def __init__(self, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Look up labels; only CPU labels are range-checked, for a check would stall a GPU."""
        rows = self.embedding_table.num_embeddings
        if y.device.type == "cpu" and y.numel() and not torch.compiler.is_compiling():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= rows:
                raise ValueError(
                    f"labels span [{low}, {high}], but the table has rows 0 to {rows - 1}; "
                    "build the DiT with a larger num_classes or map the labels into that range"
                )
        out: Tensor = self.embedding_table(y)
        return out


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-zero).

    Args:
        hidden_size: Width of the tokens.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP over ``hidden_size``.
        norm2_eps: Epsilon of the norm before the MLP; 1e-5 in diffusers.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, norm2_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm2_eps)
        self.mlp = Mlp(
            hidden_size,
            hidden_features=int(hidden_size * mlp_ratio),
            act_layer=lambda: nn.GELU(approximate="tanh"),
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Transform tokens x (N, L, hidden_size) under the condition c (N, hidden_size)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(_modulate(self.norm1(x), shift1, scale1))
        x = x + gate2.unsqueeze(1) * self.mlp(_modulate(self.norm2(x), shift2, scale2))
        return x


class FinalLayer(nn.Module):
    """Modulated norm and projection to pixels of a patch: (N, L, hidden_size) to (N, L, out)."""

    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Project tokens x (N, L, hidden_size) under the condition c (N, hidden_size)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.linear(_modulate(self.norm_final(x), shift, scale))
        return out


class DiT(nn.Module, HubModel):
    """Diffusion transformer that predicts the noise and, if asked, the variance of a step.

    It draws no random numbers: who trains with label dropout replaces labels by ``null_class``.

    Args:
        input_size: Height and width of the image or latent.
        patch_size: Height and width of a patch; divides ``input_size``.
        in_channels: Channels of the image or latent.
        hidden_size: Width of the tokens; a multiple of 4 and of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP over ``hidden_size``, finite and at least ``1 / hidden_size``.
        class_dropout_prob: Above 0, the label table gets a row for the null class.
        num_classes: Number of labels; 0 for an unconditional model.
        learn_sigma: Whether ``in_channels`` further outputs interpolate the log-variance.
        timestep_shift: 0 for the original's timestep frequencies, 1 for those of diffusers.
        norm2_eps: Epsilon of the norm before each MLP; 1e-5 in diffusers.

    Attributes:
        gradient_checkpointing: When true, training recomputes each block in the backward pass.

    Raises:
        ValueError: If a size is out of its range or the sizes do not fit together.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        timestep_shift: int = 0,
        norm2_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        _check_least(1, input_size=input_size, patch_size=patch_size, in_channels=in_channels)
        _check_least(1, hidden_size=hidden_size, num_heads=num_heads)
        _check_least(0, depth=depth, num_classes=num_classes)
        _check_fit(input_size, patch_size, hidden_size, num_heads)
        _check_ratios(hidden_size, mlp_ratio, class_dropout_prob)
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.hidden_size = in_channels, hidden_size
        self.depth, self.num_heads, self.mlp_ratio = depth, num_heads, mlp_ratio
        self.class_dropout_prob, self.num_classes = class_dropout_prob, num_classes
        self.learn_sigma, self.timestep_shift = learn_sigma, timestep_shift
        self.norm2_eps = norm2_eps
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, timestep_shift)
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes + (class_dropout_prob > 0), hidden_size)
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(_position_embedding(hidden_size, grid), requires_grad=False)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, norm2_eps) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self._initialize()
        self.register_load_state_dict_pre_hook(_refuse_quantized_state)  # type: ignore[no-untyped-call]

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, plain values only: ``DiT(**model.config)`` is alike."""
        return {name: getattr(self, name) for name in _ARGUMENTS}

    @property
    def null_class(self) -> int:
        """The label that stands for "no label".

        Raises:
            ValueError: If the model has no such row.
        """
        if not self.num_classes or not self.class_dropout_prob:
            raise ValueError(
                f"a DiT with num_classes={self.num_classes} and class_dropout_prob="
                f"{self.class_dropout_prob} has no null class; both must be above 0 for "
                "label dropout and classifier-free guidance"
            )
        return self.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise in x, and the variance if it is learned.

        Args:
            x: Noisy images (N, in_channels, input_size, input_size).
            t: Timesteps (N,), long or float, in steps of the training schedule (0 to 999).
            y: Labels (N,), long; None for an unconditional model.

        Returns:
            (N, out_channels, input_size, input_size): noise first, then variance values.

        Raises:
            ValueError: If a shape does not fit, or labels are missing, unwanted or out of range.
        """
        self._check_inputs(x, t, y)
        condition = self.t_embedder(t, x.dtype)
        if y is not None:
            condition = condition + self.y_embedder(y)
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                tokens = checkpoint(block, tokens, condition, use_reentrant=False)
            else:
                tokens = block(tokens, condition)
        return self._unpatchify(self.final_layer(tokens, condition))

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        guided_channels: int | None = 3,
    ) -> Tensor:
        """Predict with classifier-free guidance, both halves of the batch in one pass.

        Args:
            x: (2N, C, H, W); the first half is used for both.
            t: Timesteps (2N,).
            y: (2N,): N labels, then N times ``null_class``.
            cfg_scale: 1 gives the conditional prediction, 0 the unconditional one.
            guided_channels: How many noise channels are guided, None for all. The published
                samples guide the first 3 of 4 latent channels.

        Returns:
            (2N, out_channels, H, W); both halves hold the guided noise, and each half its own
            unguided channels.
        """
        if x.shape[0] % 2:
            raise ValueError(
                f"guidance needs an even batch (labels, then null labels), not {x.shape[0]} rows"
            )
        half = x[: x.shape[0] // 2]
        output = self.forward(torch.cat([half, half]), t, y)
        wanted = self.in_channels if guided_channels is None else guided_channels
        guided = min(wanted, self.in_channels)
        conditional, unconditional = output[:, :guided].chunk(2)
        noise = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([noise, noise]), output[:, guided:]], dim=1)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(N, L, patch * patch * out_channels) to (N, out_channels, H, W)."""
        grid, size = self.input_size // self.patch_size, self.patch_size
        patches = patches.reshape(-1, grid, grid, size, size, self.out_channels)
        image = patches.permute(0, 5, 1, 3, 2, 4)
        return image.reshape(-1, self.out_channels, self.input_size, self.input_size)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        expected = (self.in_channels, self.input_size, self.input_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"expected images of shape (N, {', '.join(map(str, expected))}), got "
                f"{tuple(x.shape)}; resize them or build the DiT with other in_channels, input_size"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"expected one timestep per image, shape ({x.shape[0]},), got {tuple(t.shape)}"
            )
        if y is None and self.num_classes:
            raise ValueError(
                f"this DiT has num_classes={self.num_classes} and needs labels y of shape (N,); "
                "pass null_class for images without a label"
            )
        if y is not None:
            self._check_labels(y, x.shape[0])

    def _check_labels(self, y: Tensor, rows: int) -> None:
        if not self.num_classes:
            raise ValueError(
                "this DiT is unconditional (num_classes=0) and takes no labels: y=None"
            )
        if tuple(y.shape) != (rows,) or y.is_floating_point():
            raise ValueError(
                f"expected one integer label per image, shape ({rows},), got "
                f"{tuple(y.shape)} of {y.dtype}"
            )

    def _initialize(self) -> None:
        """Initialise as the paper does: every block starts as the identity, the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)
        tables = [self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        if self.num_classes:
            tables.append(self.y_embedder.embedding_table)
        for table in tables:
            nn.init.normal_(table.get_parameter("weight"), std=0.02)
        modulations = [layer.adaLN_modulation[1] for layer in (*self.blocks, self.final_layer)]
        for linear in (*modulations, self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


_ARGUMENTS = tuple(name for name in DiT.__init__.__annotations__ if name != "return")


def _check_least(least: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name}={size} is too small; it must be at least {least}")


def _check_fit(input_size: int, patch_size: int, hidden_size: int, num_heads: int) -> None:
    if input_size % patch_size:
        raise ValueError(
            f"input_size={input_size} is no multiple of patch_size={patch_size}; "
            "choose a patch size that divides it"
        )
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(
            f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads} and, for the "
            "position embedding, of 4"
        )


def _check_ratios(hidden_size: int, mlp_ratio: float, class_dropout_prob: float) -> None:
    if not math.isfinite(mlp_ratio) or int(hidden_size * mlp_ratio) < 1:
        raise ValueError(
            f"mlp_ratio={mlp_ratio} gives hidden_size={hidden_size} no MLP; it must be finite and "
            f"at least 1/{hidden_size}, as 4.0 is"
        )
    if not 0 <= class_dropout_prob <= 1:
        raise ValueError(f"class_dropout_prob={class_dropout_prob} is no probability in [0, 1]")


def _refuse_quantized_state(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object
) -> None:
    """Stop the values of quantized layers (another basis) from landing in plain linear layers."""
    plain = {
        f"{prefix}{name}" for name, child in module.named_modules() if type(child) is nn.Linear
    }
    for key in state_dict:
        if key.endswith(_EXTRA_STATE) and key.removesuffix(_EXTRA_STATE) in plain:
            raise RuntimeError(
                f"{key!r} marks a quantized checkpoint, but this model's layer is a plain "
                "nn.Linear; call dit_qat.quantize_(model, config) before loading, or turn the "
                "quantized layers into float ones with to_float first"
            )
