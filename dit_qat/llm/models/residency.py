"""A model larger than memory: its blocks are read from their files when they run."""

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.calibration.footprint import uncounted
from dit_qat.export.finite import is_finite
from dit_qat.llm.models.files import StoredTensors
from dit_qat.llm.models.roles import Family, roles_of

__all__ = ["BlockResidency", "check_weight"]


class BlockResidency:
    """Keeps few blocks of a model in memory, and the others as shapes.

    A block that is about to run is read first, in place of the one that ran longest ago. What was
    replaced or changed in place since it was read is kept and never read again (changes through
    ``.data`` go unseen); a linear that quantization put another module in the place of is not read
    again either. What lies outside of the blocks (embeddings, head, last norm) stays in memory, and
    so do norms and biases, which are too small to be worth reading again. State dictionaries are
    whole: what is not in memory comes as views of the files.

    Args:
        model: Of transformers, with all tensors on the meta device.
        folder: The folder with its weights.
        device: Where what is in memory goes.
        dtype: What floating-point weights become there.
        limit: Blocks in memory at most.
        family: As for :func:`~dit_qat.llm.models.roles.roles_of`.

    Attributes:
        model: The model, to be run, calibrated and changed as any other.
        blocks: Full names of its blocks, in order.

    Raises:
        ValueError: if the folder lacks a tensor or one has another shape, blocks share weights, or
            the architecture has no known roles.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        limit: int = 1,
        family: Family | None = None,
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit={limit} blocks in memory cannot run a model; use at least 1")
        self.model, self.limit = model, limit
        self.blocks = roles_of(model, family).block_names
        self._device, self._dtype = torch.device(device), dtype
        self._stored = StoredTensors(folder)
        self._slots: dict[str, list[_Slot]] = {name: [] for name in self.blocks}
        self._resident: OrderedDict[str, None] = OrderedDict()
        outside = self._assign()
        _rebuild_buffers(model, self._device)
        self._fill(outside)
        for name in self.blocks:
            block = model.get_submodule(name)
            block.register_forward_pre_hook(self._reader(name))
            hook = self._completer(name)
            block.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]

    @property
    def resident(self) -> tuple[str, ...]:
        """The blocks in memory, the one that ran last at the end."""
        return tuple(self._resident)

    def load(self, block: str) -> None:
        """Have a block in memory, at the expense of the one that ran longest ago.

        Raises:
            ValueError: if there is no such block, or its file was damaged since.
        """
        if block not in self._slots:
            raise ValueError(
                f"{block!r} is no block; they are {self.blocks[0]} to {self.blocks[-1]}"
            )
        if block not in self._resident:
            while len(self._resident) >= self.limit:
                self.drop(next(iter(self._resident)))
        # Every time: a linear that another module stood for may have come back.
        self._fill(slot for slot in self._slots[block] if slot.is_in(self.model))
        self._resident[block] = None
        self._resident.move_to_end(block)

    def drop(self, block: str) -> None:
        """Let go of what can be read again; nothing happens if the block is not in memory."""
        if block in self._resident:
            del self._resident[block]
            self._slots[block] = [slot for slot in self._slots[block] if slot.empty()]

    def _reader(self, name: str) -> Any:
        def read(*_: Any) -> None:
            self.load(name)

        return read

    def _completer(self, name: str) -> Any:
        def complete(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
            slots = [slot for slot in self._slots[name] if slot.waits()]
            stored = dict(self._stored.read([slot.key for slot in slots]))
            for slot in slots:
                inner = prefix + slot.name[len(name) + 1 :]
                # A linear that something else stands for now has no entry.
                if slot.is_in(self.model) and inner in state:
                    state[inner] = stored[slot.key]

        return complete

    def _assign(self) -> "list[_Slot]":
        """Find every parameter in the files; return those that stay in memory."""
        outside: list[_Slot] = []
        home: dict[int, str] = {}
        parameters = list(self.model.named_parameters(remove_duplicate=False))
        twins: dict[int, list[str]] = {}
        for name, parameter in parameters:
            twins.setdefault(id(parameter), []).append(name)
        for name, parameter in parameters:
            block = next((b for b in self.blocks if name.startswith(f"{b}.")), "")
            if home.setdefault(id(parameter), block) != block:
                raise ValueError(
                    f"{name} is shared between blocks, and blocks come one at a time; load the "
                    "whole model instead"
                )
            owner, _, leaf = name.rpartition(".")
            key = self._key(twins[id(parameter)], parameter)
            slot = _Slot(self.model.get_submodule(owner), name, leaf, key)
            (self._slots[block] if block and parameter.ndim > 1 else outside).append(slot)
        return outside

    def _key(self, names: Sequence[str], parameter: Tensor) -> str:
        """The name under which a parameter is stored, which is one if it stands in many places."""
        inner = str(getattr(self.model, "base_model_prefix", "")) + "."
        # Some published files hold the model without its head.
        candidates = [*names, *(name.removeprefix(inner) for name in names)]
        key = next((key for key in candidates if key in self._stored), None)
        if key is None:
            raise ValueError(f"{self._stored.folder} lacks {names[0]}; download the model again")
        shape = self._stored.shapes[key]
        if shape != tuple(parameter.shape):
            raise ValueError(
                f"{self._stored.folder} holds {key} of shape {shape}, and its config.json makes "
                f"it {tuple(parameter.shape)}; download the model again"
            )
        return key

    def _fill(self, slots: "Iterable[_Slot]") -> None:
        waiting: dict[str, list[_Slot]] = {}
        for slot in slots:
            if slot.waits():
                waiting.setdefault(slot.key, []).append(slot)
        # Tensors made in inference mode have no version, by which changes are seen.
        with torch.inference_mode(False), torch.no_grad(), uncounted():
            for key, tensor in self._stored.read(list(waiting)):
                dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
                copied = tensor.to(self._device, dtype, copy=True)
                check_weight(key, copied)
                parameter = nn.Parameter(copied, requires_grad=False)
                for slot in waiting[key]:
                    slot.fill(parameter)


class _Slot:
    """The place of one parameter, which is a mere shape while nothing fills it."""

    def __init__(self, owner: nn.Module, name: str, leaf: str, key: str) -> None:
        self.name, self.leaf, self.key = name, leaf, key
        # Nobody else holds a linear that was replaced, and it is not read again.
        self._owner = weakref.ref(owner)
        self._shape = owner._parameters[leaf]
        self._shape_version = _version(self._shape)
        self._filled: nn.Parameter | None = None
        self._version = 0

    def waits(self) -> bool:
        """Whether a mere shape is in the place.

        Raises:
            ValueError: if somebody worked on that shape, which changes no numbers.
        """
        owner = self._owner()
        here = None if owner is None else owner._parameters.get(self.leaf)
        if here is None or not here.is_meta:
            return False
        if here is not self._shape or _version(here) != self._shape_version:
            raise ValueError(
                f"{self.name} was changed while it was not in memory; what changes the weights of "
                "all blocks needs the whole model in memory (--residency all)"
            )
        return True

    def fill(self, parameter: nn.Parameter) -> None:
        """Put a parameter into the place."""
        owner = self._owner()
        if owner is not None:
            owner._parameters[self.leaf] = parameter
            self._filled, self._version = parameter, parameter._version

    def unchanged(self) -> bool:
        """Whether the file still holds what is, or would be, in the place."""
        owner = self._owner()
        if owner is None:
            return False
        here = owner._parameters.get(self.leaf)
        if here is self._shape:
            return True
        return here is self._filled and here is not None and here._version == self._version

    def empty(self) -> bool:
        """Put the mere shape back; False if what is there has to stay."""
        owner = self._owner()
        if owner is None or not self.unchanged():
            return False
        owner._parameters[self.leaf] = self._shape
        self._filled = None
        return True

    def is_in(self, model: nn.Module) -> bool:
        """Whether the owner still has its place in the model."""
        path = self.name.rpartition(".")[0]
        return _found(model, path) is self._owner()


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse a weight that holds NaN or infinities, as a cast to 16 bits may bring.

    Raises:
        ValueError: naming it.
    """
    if weight.is_floating_point() and not is_finite(weight):
        raise ValueError(
            f"{name} holds NaN or infinite values in {weight.dtype}; the weights are damaged, or "
            "the dtype is too narrow for them (try float32 or bfloat16)"
        )


def _version(parameter: Tensor | None) -> int:
    """How often a tensor changed in place; those of inference mode do not tell."""
    return 0 if parameter is None or parameter.is_inference() else parameter._version


def _found(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _rebuild_buffers(model: nn.Module, device: torch.device) -> None:
    """Make anew the modules whose constants (of rotary positions) the meta device swallowed."""
    for name, module in _with_empty_buffers(model):
        try:
            fresh = type(module)(module.config)
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"{name} ({type(module).__name__}) has buffers that no file holds, and cannot be "
                "made from its configuration; load the whole model instead"
            ) from error
        model.set_submodule(name, fresh.to(device).eval())


def _with_empty_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            yield name, module
