"""What all calls hold between two blocks, in memory or on disk."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from dit_qat.calibration.chain import Source, State
from dit_qat.calibration.trees import load_tree, save_tree

__all__ = ["ChainStates"]


class ChainStates:
    """The state of every call, before one block; on the CPU.

    Args:
        folder: Where states go, one file per call; None: memory. It is scratch space: nothing in
            it outlives the run.

    Attributes:
        block: The block that all states stand before; None: there are none.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.block: int | None = None
        self._held: dict[int, State] = {}

    def begin(self, block: int) -> None:
        """Forget all states; those to come stand before ``block``."""
        self.clear()
        self.block = block

    def put(self, call: int, state: State) -> None:
        """Set the state of a call; a tensor that equals one of the call before is held once."""
        state = {source: _alone(tensor.detach().cpu()) for source, tensor in state.items()}
        if self.folder is not None:
            entries = [[*source, tensor] for source, tensor in state.items()]
            save_tree(self._path(call), entries)
            return
        before = self._held.get(call - 1, {})
        self._held[call] = {s: _kept(before.get(s), tensor) for s, tensor in state.items()}

    def get(self, call: int) -> State:
        """The state of a call."""
        if self.folder is None:
            return self._held[call]
        entries = load_tree(self._path(call))
        return {Source(kind, block, leaf): tensor for kind, block, leaf, tensor in entries}

    def clear(self) -> None:
        """Forget all states."""
        self.block, self._held = None, {}
        if self.folder is not None and self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _path(self, call: int) -> Path:
        assert self.folder is not None
        return self.folder / f"call_{call:06d}.safetensors"


def _alone(tensor: Tensor) -> Tensor:
    """A view would hold all that it is a part of."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _kept(before: Tensor | None, tensor: Tensor) -> Tensor:
    """The tensor of the call before, if equal: rotary tables, text embeddings."""
    if before is None or before.dtype != tensor.dtype or not torch.equal(before, tensor):
        return tensor
    return before
