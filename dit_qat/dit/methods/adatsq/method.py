"""AdaTSQ (arXiv:2602.09883): activation bits by timestep and layer, weights solved once.

The float model's Fisher information says which layers matter when: it weights the second moments
that the weights are solved on, and it ranks layers for the candidates of a search over the
denoising steps, which the distance to the float trajectory guides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dit_qat.allocation.beam import Keep
from dit_qat.calibration import BlockView, Needs
from dit_qat.dit.methods.adatsq.candidates import (
    Fractions,
    candidates,
    capacity,
    default_fractions,
)
from dit_qat.dit.methods.adatsq.fisher import StepScores, temporal_fisher, temporal_weights
from dit_qat.dit.methods.adatsq.policy import Policy
from dit_qat.dit.methods.adatsq.search import (
    BitSwitch,
    LayerBits,
    additive_table,
    search_additive,
    search_path,
)
from dit_qat.dit.methods.adatsq.weights import WeightSettings, solve_block
from dit_qat.dit.methods.settings import refuse_both
from dit_qat.dit.models.dit import DiT
from dit_qat.dit.ptq.method import PTQMethod, PTQRun
from dit_qat.dit.ptq.trajectory import Trajectory, trajectory_error
from dit_qat.dit.randomness import derive_seed
from dit_qat.layers.int_linear import IntLinear

__all__ = ["AdaTSQ", "AdaTSQConfig", "Mode"]

Mode = Literal["path", "teacher_forced"]
"""Steps follow on what the policy made of the earlier ones, or on the float model's latents."""


@dataclass(frozen=True)
class AdaTSQConfig:
    """Settings of :class:`AdaTSQ`.

    Attributes:
        average_bits: Budget: largest plain mean of activation bits over timesteps and layers.
        activation_bits: Lowest, middle and highest bits that a layer can get at a step.
        weights: How the weights are quantized; ``activation_bits`` there are the choice nearest to
            the budget, whatever is given.
        fisher_weighting: Weight second moments by the softmax of Fisher information over steps;
            otherwise all steps alike.
        tau: Temperature of the softmax, of scores over their mean.
        ratio_cap: Largest quotient of two steps' weights.
        fisher_rows: Samples of each step for the Fisher information.
        mode: ``path``, or ``teacher_forced``, which needs no trajectory and is solved exactly.
        beam: Paths kept after a step.
        keep: Which: nearest to the ``origin`` of bits and error, as in the paper, or a ``spread``
            over the bits that they take.
        fractions: Shares of layers with the highest and the middle bits, one pair per candidate;
            None: at most five that suit the budget.
        search_images: Images (or rows of recorded calls at each step) that guide the search.
        final_images: Images that the policies which are left are compared on.

    Raises:
        ValueError: for a budget that cannot be met, with the feasible range, and for other values
            out of range.
    """

    average_bits: float = 4.0
    activation_bits: tuple[int, int, int] = (3, 4, 8)
    weights: WeightSettings = field(default_factory=WeightSettings)
    fisher_weighting: bool = True
    tau: float = 1.0
    ratio_cap: float = 10.0
    fisher_rows: int = 16
    mode: Mode = "path"
    beam: int = 4
    keep: Keep = "origin"
    fractions: tuple[tuple[float, float], ...] | None = None
    search_images: int = 4
    final_images: int = 16

    def __post_init__(self) -> None:
        bits = tuple(self.activation_bits)  # files hand tuples over as lists
        object.__setattr__(self, "activation_bits", bits)
        if len(bits) != 3 or sorted(set(bits)) != list(bits) or not 2 <= bits[0] <= bits[2] <= 8:
            raise ValueError(f"activation_bits={bits} must be three rising numbers from 2 to 8")
        capacity(self.average_bits, bits, 1, 1)
        if self.average_bits > bits[2]:
            raise ValueError(
                f"average_bits={self.average_bits} is above the highest choice of {bits}; lower "
                "it, or raise activation_bits"
            )
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} is unknown; use one of {get_args(Mode)}")
        for name in ("fisher_rows", "beam", "search_images", "final_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        temporal_weights(torch.ones(1, 1), self.tau, self.ratio_cap)  # refuses bad settings
        if self.fractions is not None:
            pairs = tuple((high, middle) for high, middle in self.fractions)
            object.__setattr__(self, "fractions", pairs)
            if any(min(pair) < 0 or sum(pair) > 1 + 1e-9 for pair in pairs):
                raise ValueError(f"fractions={pairs} must be pairs of shares, together at most 1")

    @property
    def shares(self) -> tuple[Fractions, ...]:
        """Of all candidates; all layers at the lowest bits always are one, which is feasible."""
        chosen = self.fractions
        if chosen is None:
            chosen = default_fractions(self.activation_bits, self.average_bits)
        return (Fractions(0, 0), *(Fractions(*pair) for pair in chosen))

    @property
    def base_bits(self) -> int:
        """The choice nearest to the budget: what weights are prepared for."""
        return min(self.activation_bits, key=lambda b: abs(b - self.average_bits))


class AdaTSQ(PTQMethod):
    """AdaTSQ.

    Args:
        config: The whole configuration, or else
        quality: Of a quantized model, higher being better, such as the CLIPScore of its images; it
            decides between the last policies. None: the distance to the float trajectory does.
        kwargs: fields of :class:`AdaTSQConfig`.
    """

    name: ClassVar[str] = "adatsq"
    config: AdaTSQConfig

    def __init__(
        self,
        config: AdaTSQConfig | None = None,
        quality: Callable[[nn.Module], float] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_both("AdaTSQ", config, kwargs)
        self.config = AdaTSQConfig(**kwargs) if config is None else config
        self.quality = quality
        self._seed, self._widest = 0, 0
        self._scores: StepScores | None = None
        self._step_weights: dict[str, Tensor] = {}

    @property
    def needs(self) -> Needs:
        """Second moments, and channel maxima for the smoothing."""
        weights = self._weights
        tokens = weights.rows(self._widest)
        return Needs(second_moment=True, tokens=tokens, probe_calls=weights.probe_calls)

    def start(self, run: PTQRun) -> None:
        """Measure the temporal Fisher information, and weight second moments by it.

        Raises:
            ValueError: for a search along a path without a trajectory.
        """
        if self.config.mode == "path" and run.trajectory is None:
            raise ValueError(
                'mode="path" follows a sampler of our DiT, and there is none; use '
                'mode="teacher_forced", which needs recorded calls only'
            )
        layers = run.target.linears()
        self._seed = run.seed
        self._widest = max(layer.in_features for layer in layers.values())
        scores = temporal_fisher(
            run.model,
            run.store,
            layers,
            rows=self.config.fisher_rows,
            seed=run.seed,
            blocks=[block for _, block in run.target.find_blocks()],
        )
        self._scores = scores
        tau = self.config.tau if self.config.fisher_weighting else float("inf")
        alpha = temporal_weights(scores.values, tau, self.config.ratio_cap)
        self._step_weights = scores.by_step(alpha)
        run.step_weights.update(self._step_weights)
        run.report["fisher"] = {
            "timesteps": [*scores.timesteps],
            "layers": [*scores.layers],
            "scores": scores.values.tolist(),
            "alpha": alpha.tolist(),
        }

    def quantize_block(self, view: BlockView) -> dict[str, IntLinear]:
        """Solve the weights of a block once, for all steps."""
        return solve_block(view, self._weights, self._seed, self._step_weights)

    @property
    def _weights(self) -> WeightSettings:
        return replace(self.config.weights, activation_bits=self.config.base_bits)

    def finish(self, run: PTQRun) -> None:
        """Search the policy and give every layer its bits by timestep."""
        assert self._scores is not None
        search = _Search(self.config, run, self._scores)
        policies = search.policies()
        chosen, judged = search.best(policies, self.quality)
        for name in chosen.layers:
            layer = run.model.get_submodule(name)
            assert isinstance(layer, IntLinear)
            run.model.set_submodule(name, layer.with_step_bits(chosen.step_bits(name)))
        run.report["policy"] = chosen.as_dict()
        run.report["compared"] = judged


class _Search:
    """Candidates, search and final choice for one quantized model."""

    def __init__(self, config: AdaTSQConfig, run: PTQRun, scores: StepScores) -> None:
        self.config, self.run, self.scores = config, run, scores
        modules = dict(run.model.named_modules())
        found = {n: m for n in scores.layers if isinstance(m := modules[n], IntLinear)}
        self.layers: dict[str, IntLinear] = found
        self.switch = BitSwitch(found)
        along = run.trajectory is not None and config.mode == "path"
        assert not along or run.trajectory is not None
        self.timesteps = (
            tuple(run.trajectory.timesteps)
            if along and run.trajectory is not None
            else scores.timesteps
        )
        index = [scores.layers.index(name) for name in found]
        self.ranks = [scores.at(timestep)[index] for timestep in self.timesteps]
        self.capacity = capacity(
            config.average_bits, config.activation_bits, len(self.timesteps), len(found)
        )

    def policies(self) -> list[Policy]:
        """What the search left, and the constant policies within the budget.

        With a budget for the highest bits everywhere there is nothing to search.
        """
        config = self.config
        if config.average_bits >= max(config.activation_bits):
            highest = (max(config.activation_bits),) * len(self.layers)
            return [self._policy([highest] * len(self.timesteps))]
        offered = [candidates(row, config.activation_bits, config.shares) for row in self.ranks]
        searched = self._along(offered) if config.mode == "path" else [self._additive(offered)]
        constant = [
            [(bits,) * len(self.layers)] * len(self.timesteps)
            for bits in config.activation_bits
            if bits * len(self.layers) * len(self.timesteps) <= self.capacity
        ]
        return [self._policy(bits) for bits in _different([*searched, *constant])]

    def best(
        self, policies: Sequence[Policy], quality: Callable[[nn.Module], float] | None
    ) -> tuple[Policy, list[dict[str, float]]]:
        """The policy of best quality, and what each came to."""
        loss = self._loss(quality)
        judged = [
            {
                "average_bits": policy.average_bits,
                "average_bits_by_operations": policy.average_bits_by_operations,
                "loss": loss(policy),
            }
            for policy in policies
        ]
        best = min(range(len(policies)), key=lambda i: judged[i]["loss"])
        return policies[best], judged

    def _along(self, offered: Sequence[Sequence[LayerBits]]) -> list[list[LayerBits]]:
        """Beam search along the sampler's path."""
        trajectory = self._images("search", self.config.search_images)
        reference = trajectory.run(self._dit(self.run.reference))
        most = len(offered) * self.config.beam * max(map(len, offered))
        with tqdm(total=most, disable=not self.run.progress, unit="step", desc="search") as bar:
            return search_path(
                self._dit(self.run.model),
                self.switch,
                trajectory,
                reference,
                offered,
                self.capacity,
                width=self.config.beam,
                keep=self.config.keep,
                on_step=lambda: _tick(bar),
            )

    def _additive(self, offered: Sequence[Sequence[LayerBits]]) -> list[LayerBits]:
        table = additive_table(
            self.run.model,
            self.run.reference,
            self.switch,
            self.run.store,
            offered,
            rows=self.config.search_images,
        )
        return search_additive(table, offered, self.capacity)

    def _loss(self, quality: Callable[[nn.Module], float] | None) -> Callable[[Policy], float]:
        """What the last choice makes small."""
        if quality is not None:
            return lambda policy: -self._with(policy, quality)
        if self.config.mode == "path":
            trajectory = self._images("final", self.config.final_images)
            reference = trajectory.run(self._dit(self.run.reference))

            def distance(model: nn.Module) -> float:
                return trajectory_error(reference, trajectory.run(self._dit(model)))

            return lambda policy: self._with(policy, distance)

        def output_error(policy: Policy) -> float:
            table = additive_table(
                self.run.model,
                self.run.reference,
                self.switch,
                self.run.store,
                [[row] for row in policy.bits],
                rows=self.config.final_images,
            )
            return sum(row[0] for row in table) / len(table)

        return output_error

    def _with(self, policy: Policy, measure: Callable[[nn.Module], float]) -> float:
        """Measure the model while its layers follow a policy."""
        kept = {name: layer.config for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.config = replace(kept[name], step_bits=policy.step_bits(name))
            return measure(self.run.model)
        finally:
            for name, layer in self.layers.items():
                layer.config = kept[name]

    def _images(self, purpose: str, count: int) -> Trajectory:
        """A trajectory of other images than those of the run, on which the model may be judged."""
        assert self.run.trajectory is not None
        config = self.run.trajectory.config
        seed = derive_seed(config.seed, "adatsq", purpose)
        return Trajectory(self._dit(self.run.reference), replace(config, seed=seed), count)

    def _policy(self, bits: Sequence[LayerBits]) -> Policy:
        return Policy(
            tuple(self.layers),
            self.timesteps,
            tuple(bits),
            tuple(layer.in_features * layer.out_features for layer in self.layers.values()),
            tuple(tuple(row.tolist()) for row in self.ranks),
            self.config.average_bits,
        )

    def _dit(self, model: nn.Module) -> DiT:
        assert isinstance(model, DiT)
        return model


def _different(tables: Sequence[Sequence[LayerBits]]) -> list[tuple[LayerBits, ...]]:
    return list(dict.fromkeys(tuple(table) for table in tables))


def _tick(bar: "tqdm[Any]") -> None:
    bar.update()
