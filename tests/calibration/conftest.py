"""A small model of blocks, with everything between them that real models have."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import Call, CallStore, fingerprint
from dit_qat.calibration.view import BlockView

WIDTH = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.q(x) @ self.k(x).mT).softmax(-1)
        return self.out(scores @ self.v(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.condition = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        x = x + self.attn(x + self.condition(condition).unsqueeze(1))
        return x + scale * self.down(self.up(x).relu()), condition


class Toy(nn.Module):
    """``blocks`` are chained; what is between them and ``late`` is not."""

    def __init__(self, blocks: int = 3, late: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.late = nn.ModuleList(Block() for _ in range(late))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
        x, condition = self.embed(x), self.time(t[:, None] / 1000)
        for block in self.blocks:
            x, condition = block(x, condition, scale=scale)
        x = torch.cat([x, x.flip(1)], dim=1)
        for block in self.late:
            x, condition = block(x, condition, scale=scale)
        return self.head(x)

    def guided(self, x: Tensor, t: Tensor) -> Tensor:
        """Call forward itself, as code that guides does."""
        return self.forward(x, t, scale=0.5)


@pytest.fixture
def make_toy() -> Callable[..., Toy]:
    def make(seed: int = 0, **sizes: int) -> Toy:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Toy(**sizes).eval()

    return make


@pytest.fixture
def make_store() -> Callable[..., CallStore]:
    """Calls at timesteps 900, 600, 300, ... of two rows of five tokens."""

    def make(model: nn.Module, calls: int = 3, **options: Any) -> CallStore:
        store = CallStore(fingerprint(model), **options)
        for step in range(calls):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(2, 5, 4, generator=generator)
            timestep = 900.0 - 300 * step
            store.append(Call((x, torch.full((2,), timestep)), {"scale": 0.7}, step, timestep, 2))
        store.finish()
        return store

    return make


@pytest.fixture
def linears_of() -> Callable[[nn.Module], dict[str, nn.Linear]]:
    """All linears in blocks but the conditions."""

    def find(model: nn.Module) -> dict[str, nn.Linear]:
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and name.startswith(("blocks.", "late."))
            and "condition" not in name
        }

    return find


@pytest.fixture
def round_block() -> Callable[[BlockView], dict[str, nn.Module]]:
    """A stand-in for a method: round every weight to 15 levels per row."""

    def quantize(view: BlockView) -> dict[str, nn.Module]:
        return {name: _rounded(linear) for name, linear in view.linears.items()}

    return quantize


@torch.no_grad()
def _rounded(linear: nn.Linear) -> nn.Linear:
    rounded = nn.Linear(linear.in_features, linear.out_features, device=linear.weight.device)
    step = linear.weight.abs().amax(dim=1, keepdim=True) / 7
    rounded.weight.copy_((linear.weight / step).round() * step)
    rounded.bias.copy_(linear.bias)
    return rounded
