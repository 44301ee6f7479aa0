"""What is in a model, and how it leaves the package."""

from dit_qat.export.inspect import (
    LayerDescription,
    ModelDescription,
    RotationDescription,
    describe,
)

__all__ = ["LayerDescription", "ModelDescription", "RotationDescription", "describe"]
