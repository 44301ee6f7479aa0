"""Replace the modules that rules name by quantized ones, in place, keeping names."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from timm.models.vision_transformer import Attention
from torch import nn

from dit_qat.layers.attention import AttentionConfig, QuantAttention
from dit_qat.layers.linear import LayerConfig, QuantLinear
from dit_qat.layers.rules import ModuleConfig, QuantConfig, Rule, resolve

__all__ = ["quantize_", "to_float_"]

_REACHED_BY: dict[type[nn.Module], type[ModuleConfig]] = {
    nn.Linear: LayerConfig,
    Attention: AttentionConfig,
}

ModelT = TypeVar("ModelT", bound=nn.Module)


def quantize_(
    model: ModelT, config: QuantConfig | Iterable[Rule], *, initialize: bool = True
) -> ModelT:
    """Swap the modules that the rules name for quantized ones.

    Args:
        model: Changed in place. Parameter names stay; quantized layers add their own.
        config: Rules, in order; the last match wins.
        initialize: Rotate and split the float weights. False only makes room for the tensors of a
            quantized state dict, which is much faster.

    Returns:
        The same model.

    Raises:
        ValueError: for a pattern that matches nothing, or a layer that the config does not fit; the
            model is unchanged then.

    Example:
        >>> from dit_qat import LayerConfig, Rule
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64))
        >>> type(quantize_(model, [Rule("2", LayerConfig())])[2]).__name__
        'QuantLinear'
    """
    config = config if isinstance(config, QuantConfig) else QuantConfig(tuple(config))
    modules = {
        name: _REACHED_BY[type(module)]
        for name, module in model.named_modules()
        if name and type(module) in _REACHED_BY
    }
    decided = resolve(config.rules, modules)
    # Everything that can fail is tried without memory first; then one layer after the other is
    # swapped, so that never more than one exists twice.
    trial = partial(_on_meta, seed=config.seed, initialize=initialize)
    for name, chosen in decided.items():
        _swapped(name, model.get_submodule(name), chosen, trial)
    make = partial(
        QuantLinear.from_float if initialize else QuantLinear.empty_like, seed=config.seed
    )
    # Attention first: it takes over its submodules, some of which are swapped after it.
    for name in sorted(decided, key=lambda name: isinstance(decided[name], LayerConfig)):
        module = _swapped(name, model.get_submodule(name), decided[name], make)
        model.set_submodule(name, module)
    return model


def to_float_(model: ModelT, *, quantized: bool = False) -> ModelT:
    """Swap every quantized module back to its float class (see :meth:`QuantLinear.to_float`)."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantAttention):
            model.set_submodule(name, module.to_float())
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, module.to_float(quantized))
    return model


def _swapped(
    name: str,
    module: nn.Module,
    config: ModuleConfig,
    make_linear: Callable[[nn.Linear, LayerConfig], QuantLinear],
) -> nn.Module:
    try:
        if isinstance(config, AttentionConfig):
            return QuantAttention(module, config)
        assert isinstance(module, nn.Linear)
        return make_linear(module, config)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _on_meta(linear: nn.Linear, config: LayerConfig, seed: int, initialize: bool) -> QuantLinear:
    if initialize and not linear.weight.is_meta and not linear.weight.isfinite().all():
        raise ValueError("the weight holds infinities or NaN; load another checkpoint")
    return QuantLinear(
        linear.in_features, linear.out_features, config=config, seed=seed, device="meta"
    )
