"""Our packed folders as transformers' own loader reads them, and its own writer writes them.

Only what loads with transformers imports this module.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dit_qat.export.digests import digest_for, digest_of
from dit_qat.export.entry import owned
from dit_qat.export.loader import check_header
from dit_qat.export.manifest import (
    CARRIER,
    CONFIG_FILE,
    QUANT_METHOD,
    VERSIONS,
    Manifest,
    TensorEntry,
    carried_digest,
    check_arguments,
    file_header,
    manifest_of,
)
from dit_qat.export.packers import PACKERS, PackOptions, quantized_layers
from dit_qat.export.skeleton import add_biases, swap_linears
from dit_qat.export.tensor_file import dtype_name, open_tensors
from dit_qat.llm.packed import plain_config, tied_names

__all__ = ["PackedConfig", "PackedQuantizer"]

_MARKER = "_extra_state"
_OPTIONS = PackOptions(branch_dtype=None, storage="ternary_1.6")


class PackedConfig(QuantizationConfigMixin):
    """A manifest, as ``config.json`` carries it under ``quantization_config``.

    Args:
        sections: Its parts by name, not checked here.
    """

    def __init__(self, **sections: Any) -> None:
        for name, value in sections.items():
            setattr(self, name, value)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # theirs is a closed list

    def manifest(self) -> Manifest:
        """What the parts say.

        Raises:
            ValueError: for another version, or anything that no writer writes.
        """
        try:
            return manifest_of(self.to_dict(), {})
        except ValueError as error:
            raise ValueError(f"quantization_config in config.json: {error}") from error


class PackedQuantizer(HfQuantizer):
    """Makes room for packed layers, checks what came, and hands out what is to be saved."""

    quantization_config: PackedConfig
    requires_calibration = True  # float models become such by dit_qat.llm.quantize_llm

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a manifest that this version does not understand, before anything is loaded."""
        self.quantization_config.manifest()

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        manifest = self.quantization_config.manifest()
        expected = file_header(manifest, carried_digest(self.quantization_config.to_dict()))
        for path in checkpoint_files or ():
            _check_file(Path(path), expected)
        for config in {Path(path).parent / CONFIG_FILE for path in checkpoint_files or ()}:
            _check_config(config)
        swap_linears(model, manifest.layers)
        add_biases(model, manifest.tensors)
        # Markers are no tensors, which transformers takes all of a state dict for.
        self._hook = model.register_state_dict_post_hook(_without_markers)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._hook.remove()
        manifest = self.quantization_config.manifest()
        for name, entry in manifest.layers.items():
            layer = model.get_submodule(name)
            try:
                _check_digests(name, layer, manifest)
                entry.check(layer)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        return model

    def is_serializable(self) -> bool:
        """Yes: ``save_pretrained`` writes what we write."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: codes have no gradients."""
        return False

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], Any]:
        """All tensors as a file holds them, and its header; the manifest is brought up to date."""
        state = _stored(model)
        old = self.quantization_config.manifest()
        tied = tied_names(model)
        manifest = Manifest(
            old.architecture,
            plain_config(model),
            {n: PACKERS[type(m)].entry(m, _OPTIONS) for n, m in quantized_layers(model).items()},
            old.attention_bits,
            {name: _entry(tensor) for name, tensor in state.items() if name not in tied},
            old.provenance,
            old.written_by,
            embedded=True,
        )
        carried = manifest.carried()
        self.quantization_config = model.config.quantization_config = PackedConfig(**carried)
        return state, file_header(manifest, carried_digest(carried))

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in quantized_layers(model).items():
            model.set_submodule(name, layer.to_float().to(dtype))  # type: ignore[operator]
        return model


def _check_file(path: Path, expected: Mapping[str, str]) -> None:
    with open_tensors(path) as file:
        try:
            check_header(file.metadata, expected)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _check_config(path: Path) -> None:
    """The file, for the configuration in memory may have been given other settings on purpose."""
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        carried = content.pop(CARRIER, {})
        try:
            check_arguments(carried, content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of packed layers as their packers give them, all others as they are."""
    layers = quantized_layers(model)
    found = {
        f"{name}.{leaf}": tensor
        for name, layer in layers.items()
        for leaf, tensor in PACKERS[type(layer)].tensors(layer, _OPTIONS)
    }
    entries = {name: PACKERS[type(m)].entry(m, _OPTIONS) for name, m in layers.items()}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and owned(name, entries) is None:
            found[name] = value.detach()
    return found


def _entry(tensor: Tensor) -> TensorEntry:
    digest = digest_of(tensor, digest_for(VERSIONS[-1]))
    return TensorEntry(dtype_name(tensor.dtype), tuple(tensor.shape), digest)


def _check_digests(name: str, layer: nn.Module, manifest: Manifest) -> None:
    """Compare what is in memory now with what was written; a tensor that never came differs."""
    digest = digest_for(manifest.version)
    for leaf, tensor in layer.named_buffers():
        stored = manifest.tensors.get(f"{name}.{leaf}")
        if stored is None or digest_of(tensor, digest) != stored.digest:
            raise ValueError(
                f"{leaf} is not what was written (its {digest} differs, or it is missing); the "
                "files are damaged, so copy or export them again"
            )


def _without_markers(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
    for name in [name for name in state if name.endswith(f".{_MARKER}")]:
        del state[name]
