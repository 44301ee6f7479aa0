"""What a post-training method of a diffusion transformer is given beside any other."""

from copy import deepcopy
from dataclasses import dataclass, field

from torch import nn

from dit_qat.calibration.method import BlockMethod, Run
from dit_qat.dit.ptq.trajectory import Trajectory
from dit_qat.layers.int_linear import IntLinear

__all__ = ["PTQMethod", "PTQRun", "float_twin"]


@dataclass
class PTQRun(Run):
    """One run of a method over one diffusion transformer.

    Attributes:
        trajectory: Steps of a sampler; None for a diffusers pipeline.
        reference: The float model; it shares every tensor with ``model`` but those of layers that
            have been replaced, so a method must not change tensors in place.
    """

    trajectory: Trajectory | None = None
    reference: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reference = float_twin(self.model)


class PTQMethod(BlockMethod[PTQRun, IntLinear]):
    """A method that quantizes the weights and activations of a diffusion transformer."""


def float_twin(model: nn.Module) -> nn.Module:
    """A copy of a model's modules around the same tensors: layers replaced in one stay in it."""
    tensors = (*model.parameters(), *model.buffers())
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})
