"""A small calibrated DiT, and a view of a block with separate q, k and v."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import BlockView, Call, CallStore, Needs, drive, find_blocks, fingerprint
from dit_qat.dit.models import DiT
from dit_qat.dit.ptq import calibrate_dit
from dit_qat.dit.sampling import SamplerConfig

WIDTH = 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.to_q(x) @ self.to_k(x).mT / WIDTH**0.5).softmax(-1)
        return self.to_out[0](scores @ self.to_v(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))
        gain = torch.ones(WIDTH)
        gain[3], gain[10] = 20, 8  # channels that stand out, as in real models
        self.gain = nn.Parameter(gain)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x * self.gain)
        return x + self.ff(x * self.gain)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * (1 + t[:, None, None] / 1000)


@pytest.fixture
def toy() -> tuple[Toy, CallStore]:
    """A model of two blocks and eight recorded calls at four timesteps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Toy().eval()
        store = CallStore(fingerprint(model))
        for index in range(8):
            time = 900.0 - 300 * (index // 2)
            x = torch.randn(4, 12, WIDTH) * (1 + index / 4)
            store.append(Call((x, torch.full((4,), time)), {}, index // 2, time, 4))
    return model, store


@pytest.fixture
def view_of(toy: tuple[Toy, CallStore]) -> Callable[..., BlockView]:
    """The view of the first block with what a method needs."""

    def view_of(needs: Needs) -> BlockView:
        model, store = toy
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        views: list[BlockView] = []

        def look(view: BlockView) -> Mapping[str, nn.Module]:
            views.append(view)
            return {}

        drive(model, store, find_blocks(model), linears=linears, needs=needs, quantize=look)
        return views[0]

    return view_of


@pytest.fixture
def calibrated(make_dit: Callable[..., DiT]) -> tuple[Callable[[], DiT], CallStore]:
    """A maker of the same small DiT, and its recorded calls."""

    def make() -> DiT:
        return make_dit(num_heads=2)

    return make, calibrate_dit(make(), SamplerConfig(steps=4, batch_size=32), images=32)


@pytest.fixture
def output_of() -> Callable[[nn.Module, CallStore], Tensor]:
    """What a model makes of the recorded calls, all in one row."""

    @torch.no_grad()
    def output_of(model: nn.Module, store: CallStore) -> Tensor:
        outputs: list[Any] = [model(*call.args, **call.kwargs).flatten() for call in store]
        return torch.cat(outputs)

    return output_of
