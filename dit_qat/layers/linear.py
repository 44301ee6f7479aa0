"""QuantLinear: rotate, quantize the activation, ternary residual plus low-rank branch plus bias."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_qat.layers.activation import ActivationQuantizer, RobustQuantizer
from dit_qat.layers.ternary_matmul import TernaryWeight, ternary_matmul
from dit_qat.primitives.hadamard import Rotation
from dit_qat.primitives.lowrank import split_alternating, split_svd
from dit_qat.primitives.scales import widen
from dit_qat.primitives.ste import straight_through

__all__ = [
    "BranchDtype",
    "HadamardRotation",
    "LayerConfig",
    "LowRank",
    "QuantLinear",
    "TernaryWeight",
    "marker",
    "refuse_other_marker",
]

FORMAT = "dit_qat.quant_linear.1"

BranchDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class HadamardRotation:
    """Full-width orthonormal Hadamard rotation of a layer's input.

    Attributes:
        signs: Flip inputs by fixed random signs first, so that no channel collects the mean.
        block_size: Rotate contiguous blocks of this width; None rotates the full width.
    """

    signs: bool = True
    block_size: int | None = None

    def for_width(self, width: int, seed: int) -> Rotation:
        """The rotation of one width; raises ValueError if the width has no Hadamard order."""
        return Rotation(width, seed if self.signs else None, self.block_size)


@dataclass(frozen=True)
class LowRank:
    """Float low-rank branch beside the ternary residual (RobuQ, arXiv:2509.23582).

    Attributes:
        rank: 1 .. min(out, in).
        start: ``svd`` of the rotated weight (the paper's), or ``alternating`` with the ternary fit.
        iterations: Rounds of the alternating start.
        dtype: What the factors are rounded to, in training as in a packed model; ``float32`` leaves
            them as they are.
    """

    rank: int = 16
    start: Literal["svd", "alternating"] = "svd"
    iterations: int = 5
    dtype: BranchDtype = "float32"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} is below 1; use low_rank=None for no branch")
        if self.start not in ("svd", "alternating"):
            raise ValueError(f"start={self.start!r} is unknown; use svd or alternating")
        if self.dtype not in get_args(BranchDtype):
            raise ValueError(f"dtype={self.dtype!r} is unknown; use one of {get_args(BranchDtype)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the factors are stored in."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def split(self, weight: Tensor, ternary: TernaryWeight) -> tuple[Tensor, Tensor]:
        """Factors A (out, rank) and B (rank, in), rounded, so that the residual makes up for it."""
        if self.start == "svd":
            up, down = split_svd(weight, self.rank)
        else:
            up, down = split_alternating(weight, self.rank, ternary.fake_quantize, self.iterations)
        return self.round(up), self.round(down)

    def round(self, factor: Tensor) -> Tensor:
        """The values that a factor computes with, in its own dtype; straight-through gradient."""
        if self.dtype == "float32":
            return factor
        return straight_through(factor, factor.detach().to(self.torch_dtype).to(factor.dtype))


@dataclass(frozen=True)
class LayerConfig:
    """What one linear layer becomes."""

    weight: TernaryWeight = field(default_factory=TernaryWeight)
    activation: ActivationQuantizer | None = field(default_factory=RobustQuantizer)
    rotation: HadamardRotation | None = field(default_factory=HadamardRotation)
    low_rank: LowRank | None = field(default_factory=LowRank)


class QuantLinear(nn.Module):
    """``y = Q_a(x H) Q_w(W)^T + (x H) B^T A^T + bias`` (RobuQ, arXiv:2509.23582).

    ``weight`` (out, in) is the float latent of the ternary residual, kept in the rotated basis;
    ``low_rank_up`` is A (out, rank), ``low_rank_down`` is B (rank, in). The branch reads the
    unquantized rotated input. Values enter through :meth:`from_float` only; the constructor makes
    room for them and for a state dict.

    Args:
        in_features: Input width; needs a Hadamard order if ``config.rotation`` is set.
        out_features: Output width.
        bias: Whether there is a bias.
        config: What to quantize and how.
        seed: Seed of the rotation's signs.

    Raises:
        ValueError: for a width without a Hadamard order or a rank beyond min(out, in).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: LayerConfig | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.config = LayerConfig() if config is None else config
        self.seed = seed
        rotation = self.config.rotation
        self.rotation = None if rotation is None else rotation.for_width(in_features, seed)
        rank = 0 if self.config.low_rank is None else self.config.low_rank.rank
        if rank > min(in_features, out_features):
            raise ValueError(
                f"rank={rank} is beyond {min(in_features, out_features)} for a layer of "
                f"{in_features} inputs and {out_features} outputs; choose it lower"
            )
        room = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **room))  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.zeros(out_features, **room)) if bias else None  # type: ignore[arg-type]
        self.low_rank_up = nn.Parameter(torch.zeros(out_features, rank, **room)) if rank else None  # type: ignore[arg-type]
        self.low_rank_down = nn.Parameter(torch.zeros(rank, in_features, **room)) if rank else None  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.rotation is not None:
            x = self.rotation.apply(x)
        addend, branch = None, self._branch()
        if branch is not None:
            up, down = branch
            addend = F.linear(F.linear(x, down), up, self.bias)
        elif self.bias is not None:
            addend = self.bias.expand(*x.shape[:-1], -1)
        return ternary_matmul(x, self.weight, self.config.activation, self.config.weight, addend)

    def _branch(self) -> tuple[Tensor, Tensor] | None:
        """The factors A and B as they compute."""
        if self.low_rank_up is None or self.low_rank_down is None:
            return None
        assert self.config.low_rank is not None
        return self.config.low_rank.round(self.low_rank_up), self.config.low_rank.round(
            self.low_rank_down
        )

    @classmethod
    def from_float(cls, linear: nn.Linear, config: LayerConfig, seed: int = 0) -> "QuantLinear":
        """Rotate and split a float layer; without quantization the result computes the same map."""
        layer = cls.empty_like(linear, config, seed)
        with torch.no_grad():
            weight = widen(linear.weight.detach())
            if layer.rotation is not None:
                weight = layer.rotation.apply(weight)
            if config.low_rank is not None:
                up, down = config.low_rank.split(weight, config.weight)
                layer.low_rank_up.copy_(up)  # type: ignore[union-attr]
                layer.low_rank_down.copy_(down)  # type: ignore[union-attr]
                weight = weight - up @ down
            layer.weight.copy_(weight)
        layer.bias = linear.bias
        return layer

    @classmethod
    def empty_like(cls, linear: nn.Linear, config: LayerConfig, seed: int = 0) -> "QuantLinear":
        """A layer of the same shape, device and dtype, whose values a state dict will supply."""
        return cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            config,
            seed,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )

    def to_float(self, quantized: bool = False) -> nn.Linear:
        """Return the layer as ``nn.Linear`` in the original basis.

        Args:
            quantized: Use the ternary weight that the layer computes with, rather than its float
                latent. Either way the branch is merged and activations are no longer quantized.
        """
        with torch.no_grad():
            weight = self.weight.detach()
            weight = widen(self.config.weight.fake_quantize(weight) if quantized else weight)
            branch = self._branch()
            if branch is not None:
                weight = weight + widen(branch[0]) @ widen(branch[1])
            if self.rotation is not None:
                weight = self.rotation.inverse(weight)
            linear = nn.Linear(
                self.in_features,
                self.out_features,
                self.bias is not None,
                device="meta",
            )
            linear.weight = nn.Parameter(weight.to(self.weight.dtype, copy=True))
            if self.bias is not None:
                linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear

    def get_extra_state(self) -> dict[str, Any]:
        """Format marker: plain types that say how the tensors are to be read."""
        return marker(FORMAT, self.config, self.seed)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse tensors that were written under another configuration."""
        refuse_other_marker(self.get_extra_state(), state)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if prefix + "weight" in state_dict and prefix + "_extra_state" not in state_dict:
            raise ValueError(
                f"{prefix}weight is a float weight, but {prefix[:-1] or 'this'} is a QuantLinear, "
                "whose weight lives in a rotated, split basis; load the float model first, then "
                "call quantize_(model, config), or QuantLinear.from_float(linear, config)"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """One line: shape, bits, rank, rotation."""
        activation = self.config.activation
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight={self.config.weight.fit} ternary, "
            f"activation={activation}, rank="
            f"{0 if self.config.low_rank is None else self.config.low_rank.rank}, "
            f"rotation={self.rotation}"
        )


def marker(format: str, config: LayerConfig, seed: int) -> dict[str, Any]:
    """Plain types that say how a layer's tensors are to be read, for its extra state."""
    activation, plain = config.activation, asdict(config)
    if config.low_rank is not None and config.low_rank.dtype == "float32":
        del plain["low_rank"]["dtype"]  # which checkpoints from before this setting lack
    kind = None if activation is None else type(activation).__name__
    return {"format": format, "seed": seed, **plain, "activation_kind": kind}


def refuse_other_marker(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Compare what is saved with what is here.

    Raises:
        ValueError: if they differ, with both values of what differs.
    """
    differing = sorted(key for key in {**own, **saved} if own.get(key) != saved.get(key))
    if differing:
        detail = "; ".join(f"{k}: {saved.get(k)!r} saved, {own.get(k)!r} here" for k in differing)
        raise ValueError(
            f"quantized layer saved under another configuration ({detail}); "
            "build the model from the configuration of the checkpoint"
        )
