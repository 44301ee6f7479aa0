"""Rotating the residual stream of a language model, offline and exactly."""

from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.llm.models.roles import Roles
from dit_qat.primitives.hadamard import Rotation

__all__ = ["rotate_residual_"]


@torch.no_grad()
def rotate_residual_(model: nn.Module, roles: Roles, block_size: int, seed: int = 0) -> Rotation:
    """Rotate what flows between blocks, in blocks of channels; the function stays the same.

    Norms are fused into the layers that read them first. The embedding keeps its mean: an RMSNorm
    does not remove it. Nothing is rotated at run time, and what MLPs compute inside is as it was.

    Args:
        model: Of Hugging Face, float, with RMSNorms; changed in place, its head untied.
        roles: Of the model.
        block_size: Order of the Hadamard matrix, in groups of which channels are mixed.
        seed: Of random signs.

    Returns:
        The rotation.

    Raises:
        ValueError: for norms with a bias or without a weight, weights that are not in memory, or a
            width that the block does not divide; nothing is changed then.
    """
    whole: Any = model
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    rotation = Rotation(embedding.weight.shape[1], seed, block_size)
    norms = _norms(model, roles, head)
    _check(model, norms)
    _untie(whole, embedding, head)
    for norm, readers in norms.items():
        _fuse(model.get_submodule(norm), [model.get_submodule(name) for name in readers])
    _set(embedding, rotation.apply(_wide(embedding.weight)))
    for readers in norms.values():
        for name in readers:
            reader = model.get_submodule(name)
            _set(reader, rotation.apply(_wide(reader.weight)))
    for block in roles.block_names:
        for role in ("o", "down"):
            writer = model.get_submodule(roles.name(block, role))
            _set(writer, rotation.apply(_wide(writer.weight).T).T)
            if isinstance(writer.bias, Tensor):
                writer.bias.copy_(rotation.apply(_wide(writer.bias)))
    return rotation


def _norms(model: nn.Module, roles: Roles, head: nn.Module) -> dict[str, list[str]]:
    """Norms by name, and the layers that read them."""
    found: dict[str, list[str]] = {}
    for name in roles.linears:
        norm = roles.norm_before(name)
        if norm is not None:
            found.setdefault(norm, []).append(name)
    head_name = next(name for name, module in model.named_modules() if module is head)
    if roles.final_norm is None or len(found) != 2 * len(roles.block_names):
        raise ValueError("rotation needs a norm before every attention and MLP, and a last one")
    return found | {roles.final_norm: [head_name]}


def _check(model: nn.Module, norms: dict[str, list[str]]) -> None:
    for name in norms:
        norm = model.get_submodule(name)
        if getattr(norm, "bias", None) is not None or not isinstance(norm.weight, nn.Parameter):
            raise ValueError(
                f"{name} is a {type(norm).__name__}, which takes more than a scale off its input: "
                "a rotation would change the function; set rotation=False"
            )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("rotation needs all weights in memory; load the model whole")


def _untie(model: Any, embedding: nn.Embedding, head: nn.Linear) -> None:
    """Give the head weights of its own: the last norm is fused into them alone."""
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        # transformers made the list when the model was built; a writer would leave the head out.
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)


def _fuse(norm: nn.Module, readers: list[nn.Module]) -> None:
    assert isinstance(norm.weight, Tensor)
    scale = _wide(norm.weight)
    for reader in readers:
        _set(reader, _wide(reader.weight) * scale)
    norm.weight.fill_(1)


def _wide(tensor: Tensor | nn.Module) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor.detach().double()


def _set(module: nn.Module, weight: Tensor) -> None:
    assert isinstance(module.weight, Tensor)
    module.weight.copy_(weight)
