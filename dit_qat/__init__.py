"""dit_qat: diffusion transformers at 1.58-bit weights and 2-4 bit activations.

The public names resolve lazily, so that ``import dit_qat`` does not import torch.
"""

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

# Who loads a packed model needs the architectures, which enter themselves when imported.
_ARCHITECTURES = {"load_quantized": ("dit_qat.dit.models",)}

if TYPE_CHECKING:
    from dit_qat.export.loader import load_quantized
    from dit_qat.layers.linear import LayerConfig
    from dit_qat.layers.rules import QuantConfig, Rule
    from dit_qat.layers.swap import quantize_


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        for architecture in _ARCHITECTURES.get(name, ()):
            import_module(architecture)
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
