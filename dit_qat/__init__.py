"""dit_qat: diffusion transformers and language models in few bits.

The public names resolve lazily, so that ``import dit_qat`` does not import torch.
"""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LayerConfig", "QuantConfig", "Rule", "__version__", "load_quantized", "quantize_"]

_HOMES = {
    "LayerConfig": "dit_qat.layers.linear",
    "QuantConfig": "dit_qat.layers.rules",
    "Rule": "dit_qat.layers.rules",
    "load_quantized": "dit_qat.export.loader",
    "quantize_": "dit_qat.layers.swap",
}

# Who loads a packed model needs the architectures, which enter themselves when imported; those
# whose packages take long to import do so when a folder names them.
_ARCHITECTURES = {"load_quantized": ("dit_qat.dit.models",)}
_LATER = {"load_quantized": {"causal_lm": "dit_qat.llm"}}

if TYPE_CHECKING:
    from dit_qat.export.loader import load_quantized
    from dit_qat.layers.linear import LayerConfig
    from dit_qat.layers.rules import QuantConfig, Rule
    from dit_qat.layers.swap import quantize_


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        for architecture in _ARCHITECTURES.get(name, ()):
            import_module(architecture)
        for architecture, home in _LATER.get(name, {}).items():
            import_module("dit_qat.export.registry").enter_later(
                architecture, partial(import_module, home)
            )
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
