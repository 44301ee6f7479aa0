"""PBS2P (arXiv:2502.01705): N:M pruning in steps, binary values refitted after each.

The paper's equations are not known to us beyond what its figures show: stepwise pruning by
second-order scores with values refitted for the outputs, and layers that keep more or less by the
cosine between their inputs and outputs. What is here beyond that is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from dit_qat.calibration import CallStore, Run, evaluating
from dit_qat.calibration.trees import map_tensors, tensors_of
from dit_qat.layers.binary_code import BinaryCode, BinaryLayout, decode_block
from dit_qat.llm.methods.binarizer import (
    Binarizer,
    Recipe,
    binary_code,
    error_left,
    moment_of,
)
from dit_qat.llm.methods.binary_block import (
    BlockFit,
    Plain,
    best_rows,
    feed_back,
    fit_block,
    rounded,
    solve_jointly,
)
from dit_qat.llm.methods.binary_config import FULL_RANGE, BinaryChoices, BinaryConfig
from dit_qat.llm.methods.pruning import (
    PruningMethod,
    allocate_kept,
    drop_lowest,
    keep_highest,
)
from dit_qat.llm.methods.settings import (
    Preset,
    check_among,
    check_at_least,
    overridden,
    settled,
)
from dit_qat.llm.methods.zones import Groups, Zones, find_zones, saliency
from dit_qat.primitives.compensation import Block
from dit_qat.primitives.second_moment import SecondMoment

__all__ = [
    "PBS2P",
    "PRESETS",
    "PBS2PChoices",
    "PBS2PConfig",
    "Progressive",
    "change_of_loss",
    "layer_cosines",
    "layer_importance",
    "quantize_weight",
]

Score = Literal["obs", "delta"]
Importance = Literal["one_minus_cos", "reciprocal"]


@dataclass(frozen=True)
class PBS2PChoices(BinaryChoices):
    """What the presets differ in, with the values of ``paper``.

    Attributes:
        search_kept: Zones are sought on the entries that one-shot pruning would keep.
        score: ``obs``: the saliency; ``delta``: by how much the block's error changes exactly when
            an entry is dropped, anew after every step.
        left: Errors of a block are those left once the columns behind it have made up for it.
        feedback: Rounds of new signs with error feedback within the block, at the end.
    """

    search_kept: bool = False
    score: Score = "obs"
    left: bool = False
    feedback: int = 0


PRESETS: dict[Preset, PBS2PChoices] = {
    "paper": PBS2PChoices(),
    "exact": PBS2PChoices("exact", "weight", FULL_RANGE, True, "delta", True, 1),
}


@dataclass(frozen=True)
class PBS2PConfig(BinaryConfig):
    """Settings of :class:`PBS2P` beside those of :class:`BinaryConfig`.

    Attributes:
        kept: N on average over the decoder layers.
        of: M consecutive columns of a row; it divides ``block_size``.
        groups: Magnitude groups of plain columns, as many as STBLLM has; salient ones have one.
            With 2, 4:8 takes 2.8 effective bits in place of 3.55.
        coarse: Layers keep more or less by importance; otherwise all N.
        importance: Of a layer, from the cosine between its inputs and outputs.
        gain: How much importance counts.
        iterations: Of ARB, where a block begins.
        search_kept: As in :class:`PBS2PChoices`; None: the preset's. So for those below.
        score: As ``search_kept``.
        left: As ``search_kept``.
        feedback: As ``search_kept``.

    Raises:
        ValueError: for an unknown name or a number outside its range.
    """

    kept: int = 4
    of: int = 8
    groups: int = 3
    coarse: bool = True
    importance: Importance = "one_minus_cos"
    gain: float = 1.0
    iterations: int = 15
    search_kept: bool | None = None
    score: Score | None = None
    left: bool | None = None
    feedback: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_among("importance", self.importance, get_args(Importance))
        check_among("score", self.choices.score, get_args(Score))
        check_at_least(self, iterations=0, gain=0)
        _ = self.recipe(self.kept)

    @property
    def choices(self) -> PBS2PChoices:
        """The preset's, with this configuration's own in their place."""
        return overridden(PRESETS, self)

    def recipe(self, kept: int) -> Recipe:
        """What the binarizer is told."""
        own = self.choices
        layout = BinaryLayout(self.groups, 1, False, kept, self.of, self.block_size)
        return Recipe(
            layout,
            Groups(self.groups, 1),
            own.search,
            own.search_on,
            self.metric,
            Plain(self.iterations, closed=self.preset == "exact"),
            feedback=own.feedback,
        )


class Progressive(Binarizer):
    """Prunes a block one entry per group at a time.

    Args:
        recipe: Of the block; its layout says how much is kept.
        S: (in, in), the second moment.
        choices: How it is pruned.
    """

    def __init__(self, recipe: Recipe, S: Tensor, choices: PBS2PChoices) -> None:
        super().__init__(recipe, S)
        self.choices = choices

    def zones(self, W: Tensor, block: Block, S: Tensor, keep: Tensor | None) -> Zones:
        """Divide a block, by all entries or by those that are likely to stay."""
        recipe, layout = self.recipe, self.recipe.layout
        obs = saliency(W, block.factor)
        if self.choices.search_kept:
            keep = keep_highest(obs, layout.kept, layout.of)
        matrix = obs if recipe.search_on == "saliency" else W
        score = obs if recipe.metric == "hessian" else W.abs()
        by_column = (score if keep is None else score * keep).sum(0)
        return find_zones(matrix, by_column, recipe.search, recipe.groups, keep)

    def fit(
        self, W: Tensor, zones: Zones, block: Block, S: Tensor, keep: Tensor | None
    ) -> BlockFit:
        """Binarise all entries, then drop and refit in turn."""
        metric = error_left(block.factor) if self.choices.left else S
        fit = fit_block(W, zones, self.recipe.layout, self.recipe.plain)
        fit = fit._replace(keep=torch.ones_like(W, dtype=torch.bool))
        fit = solve_jointly(W, fit, metric)
        obs = saliency(W, block.factor)
        for _ in range(self.recipe.layout.of - self.recipe.layout.kept):
            score = obs if self.choices.score == "obs" else change_of_loss(W, fit, metric)
            assert fit.keep is not None
            kept = drop_lowest(score, fit.keep, self.recipe.layout.of)
            fit = solve_jointly(W, fit._replace(keep=kept), metric)
        for _ in range(self.recipe.feedback):
            again = solve_jointly(W, feed_back(W, fit, block.factor), metric)
            fit = best_rows(W, [fit, again], metric)
        return fit


def change_of_loss(W: Tensor, fit: BlockFit, S: Tensor) -> Tensor:
    """By how much ``tr R S R^T`` grows if one entry is dropped alone: (n, k).

    ``2 v_j (S r)_j + v_j^2 S_jj`` for an entry of value v in a row of residual r.
    """
    made = decode_block(fit.layout, rounded(fit)).to(W.dtype)
    slope = (W - made) @ S
    return 2 * made * slope + made.square() * S.diagonal()


def quantize_weight(
    weight: Tensor,
    second_moment: Tensor | SecondMoment,
    config: PBS2PConfig,
    kept: int,
) -> BinaryCode:
    """Prune and binarise a weight (out, in), given the second moment (in, in) of its inputs.

    Args:
        weight: (out, in).
        second_moment: (in, in), of any scale.
        config: How.
        kept: Entries of every ``config.of`` columns.

    Raises:
        ValueError: for a width that patterns do not fill.
    """
    recipe = config.recipe(kept)
    binarizer = Progressive(recipe, moment_of(second_moment), config.choices)
    return binary_code(weight, second_moment, binarizer, config.choices.update, config.damping)


@torch.no_grad()
def layer_cosines(model: nn.Module, blocks: list[nn.Module], store: CallStore) -> list[float]:
    """Mean over tokens of the cosine between what a block receives and what it returns."""
    sums = [[0.0, 0] for _ in blocks]
    device = next(p.device for p in model.parameters() if not p.is_meta)

    def listen(at: int) -> Any:
        def hear(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = next(iter(tensors_of((args, kwargs))))
            after = next(iter(tensors_of(output)))
            cosine = nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            sums[at][0] += float(cosine.sum())
            sums[at][1] += cosine.numel()

        return hear

    handles = [
        block.register_forward_hook(listen(at), with_kwargs=True) for at, block in enumerate(blocks)
    ]
    try:
        with evaluating(model):
            for call in store:
                args, kwargs = map_tensors(lambda x: x.to(device), (call.args, call.kwargs))
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [total / max(count, 1) for total, count in sums]


def layer_importance(cosines: list[float], kind: Importance) -> list[float]:
    """Importances of mean one: ``1 - cos``, or its reciprocal."""
    if kind == "one_minus_cos":
        raw = [1 - cosine for cosine in cosines]
    else:
        raw = [1 / max(cosine, 1e-3) for cosine in cosines]
    mean = sum(raw) / len(raw)
    return [1.0 for _ in raw] if mean <= 0 else [value / mean for value in raw]


class PBS2P(PruningMethod):
    """PBS2P.

    Args:
        config: The whole configuration, or else
        fields: fields of :class:`PBS2PConfig`.
    """

    name: ClassVar[str] = "pbs2p"

    def __init__(self, config: PBS2PConfig | None = None, **fields: Any) -> None:
        self.config = settled(PBS2PConfig, config, fields)

    def allocate(self, run: Run) -> Mapping[str, int]:
        """Look once at the float model: decoder layers that change their inputs more keep more."""
        own = self.config
        if not own.coarse:
            return {}
        blocks = run.target.find_blocks(run.store[0])
        cosines = layer_cosines(run.model, [block for _, block in blocks], run.store)
        linears = run.target.linears()
        inside = [[n for n in linears if n == b or n.startswith(f"{b}.")] for b, _ in blocks]
        sizes = [sum(linears[name].weight.numel() for name in names) for names in inside]
        low, high = max(1, own.kept - 1), min(own.of, own.kept + 2)
        importance = layer_importance(cosines, own.importance)
        kept = allocate_kept(importance, own.kept, low, high, own.gain, sizes)
        run.report["kept_by_layer"] = {b: n for (b, _), n in zip(blocks, kept, strict=True)}
        return {name: n for names, n in zip(inside, kept, strict=True) for name in names}

    def code(self, name: str, weight: Tensor, second_moment: SecondMoment) -> BinaryCode:
        """Prune and binarise one layer."""
        return quantize_weight(weight, second_moment, self.config, self.kept_of(name))
