"""Telling transformers that a model is quantized, wherever it came from."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from dit_qat.export.manifest import Manifest
from dit_qat.llm.packed import ARCHITECTURE

__all__ = ["attach", "attach_fresh"]


def attach(model: Any, carried: Mapping[str, Any]) -> None:
    """Give a model with packed layers the quantizer with which ``save_pretrained`` works.

    Args:
        model: Of transformers.
        carried: Of :meth:`~dit_qat.export.manifest.Manifest.carried`.
    """
    from dit_qat.llm.hf.quantizer import PackedConfig, PackedQuantizer

    config = PackedConfig(**carried)
    model.config.quantization_config = config
    model.hf_quantizer = PackedQuantizer(config, pre_quantized=True)
    model.quantization_method = config.quant_method
    model.is_quantized = model.config._is_quantized = True


def attach_fresh(model: Any, provenance: Mapping[str, Any] | None = None) -> None:
    """Do so with a model that has just been quantized and never been stored.

    Args:
        model: Of transformers.
        provenance: Plain values: source, method, calibration.
    """
    written_by = {"dit_qat": version("dit-qat"), "torch": torch.__version__}
    manifest = Manifest(ARCHITECTURE, {}, {}, {}, {}, provenance or {}, written_by, embedded=True)
    attach(model, manifest.carried())
