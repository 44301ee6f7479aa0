"""PT2-LLM on one weight: fit, align, compensate, and choose the next columns."""

import torch
from torch import Tensor

from dit_qat.layers.ternary_code import TernaryCode, stored_half
from dit_qat.llm.methods.pt2.config import PT2Config, Reference
from dit_qat.primitives.asymmetric import Asymmetric, retarget
from dit_qat.primitives.column_order import Chooser, Order
from dit_qat.primitives.compensation import Block, compensate
from dit_qat.primitives.second_moment import SecondMoment
from dit_qat.primitives.ternary_fit import (
    TernaryRows,
    align_ternary,
    fit_ternary_rows,
    start_ternary,
)

__all__ = ["most_alike", "quantize_weight"]


def quantize_weight(
    weight: Tensor,
    second_moment: SecondMoment,
    config: PT2Config,
    cross_moment: Tensor | None = None,
    ordered: bool = True,
) -> TernaryCode:
    """Quantize a weight to asymmetric ternary; PT2-LLM, arXiv:2510.03267.

    Layers that read the same input get one order if their weights come stacked.

    Args:
        weight: (out, in).
        second_moment: H (in, in) of the inputs.
        config: How.
        cross_moment: (X_fp - X)^T X (in, in); None: the asymmetric term is left out.
        ordered: Whether columns may be reordered.

    Raises:
        ValueError: for shapes that do not fit, values that are not finite, or scales beyond
            float16.
    """
    weight, recipe, term = weight.detach().float(), config.recipe, None
    if cross_moment is not None and config.crossed:
        if config.retarget:
            moments = second_moment, cross_moment
            weight = retarget(weight, *moments, recipe.asymmetric, config.damping)
        else:
            term = Asymmetric(cross_moment, recipe.asymmetric, within=False)
    blocks = _TernaryBlocks(weight.shape, second_moment.matrix, config)
    result = compensate(
        weight,
        second_moment if config.compensated else _uncorrelated(second_moment),
        blocks,
        config.group_size,
        recipe.update,
        _order(config, weight.shape[1]) if ordered else None,
        damping=config.damping,
        asymmetric=term,
    )
    return TernaryCode.build(
        blocks.codes, blocks.scale, blocks.offset, config.group_size, result.order
    )


def most_alike(reference: Reference) -> Chooser:
    """Structural-similarity reordering: next come the columns closest to the mean of those left.

    Args:
        reference: The mean of columns divided by their norms (``normalised``), or of columns as
            they are (``raw``).
    """

    def choose(W: Tensor, count: int) -> Tensor:
        norms = torch.linalg.vector_norm(W, dim=0).clamp_min(torch.finfo(W.dtype).tiny)
        centre = W @ norms.reciprocal() if reference == "normalised" else W.sum(1)
        nearest: Tensor = ((centre @ W) / norms).topk(count).indices
        return nearest

    return choose


def _uncorrelated(second_moment: SecondMoment) -> SecondMoment:
    """The same sizes of inputs, of which none can make up for another."""
    diagonal = second_moment.matrix.diagonal().diag()
    tokens = torch.tensor(second_moment.tokens)
    return SecondMoment.from_state({"matrix": diagonal, "tokens": tokens})


def _order(config: PT2Config, width: int) -> Chooser | Order | Tensor | None:
    match config.order:
        case "similarity":
            return most_alike(config.reference)
        case "activation":
            return "activation"
        case "random":
            return torch.randperm(width, generator=torch.Generator().manual_seed(config.seed))
        case "none":
            return None


class _TernaryBlocks:
    """The block quantizer; it keeps codes in the order in which blocks come."""

    def __init__(self, shape: torch.Size, H: Tensor, config: PT2Config) -> None:
        rows, width = shape
        self.config, self._H, self._done = config, H, 0
        self.codes = torch.empty(rows, width, dtype=torch.int8, device=H.device)
        groups = -(-width // config.group_size)
        self.scale = torch.empty(rows, groups, device=H.device)
        self.offset = torch.empty(rows, groups, device=H.device)

    def __call__(self, W: Tensor, block: Block) -> Tensor:
        fit = fit_ternary_rows(W, self.config.sweeps) if self.config.fitting else start_ternary(W)
        if self.config.alignment:
            # Undamped, and of the inputs behind the quantized prefix, as H.
            S = self._H[block.columns][:, block.columns]
            fit = align_ternary(W, fit, S)
        # Rounded before the error is formed, so that what is made up for is what is stored.
        stored = TernaryRows(
            fit.codes, stored_half(fit.scale, "a scale"), stored_half(fit.offset, "an offset")
        )
        self._keep(stored)
        return stored.values

    def _keep(self, fit: TernaryRows) -> None:
        group, stop = self._done // self.config.group_size, self._done + fit.codes.shape[1]
        self.codes[:, self._done : stop] = fit.codes
        self.scale[:, group : group + 1] = fit.scale
        self.offset[:, group : group + 1] = fit.offset
        self._done = stop
