"""What is in a model, and how it leaves the package."""

from dit_qat.export.inspect import (
    LayerDescription,
    ModelDescription,
    RotationDescription,
    describe,
)
from dit_qat.export.loader import load_quantized
from dit_qat.export.manifest import Manifest, is_packed_folder, read_manifest
from dit_qat.export.registry import register_architecture
from dit_qat.export.verify import Agreement, verify_packed
from dit_qat.export.writer import write_packed

__all__ = [
    "Agreement",
    "LayerDescription",
    "Manifest",
    "ModelDescription",
    "RotationDescription",
    "describe",
    "is_packed_folder",
    "load_quantized",
    "read_manifest",
    "register_architecture",
    "verify_packed",
    "write_packed",
]
