"""Bits by timestep, and how layers come to know the timestep."""

import copy
import gc
import inspect
import weakref

import pytest
import torch
from torch import Tensor, nn

from dit_qat.dit.models import DiT
from dit_qat.layers import StepBits, follow_timesteps_, timestep_scope
from dit_qat.layers.step_bits import timesteps_in_scope


class Probe(nn.Module):
    """Notes the timesteps that a layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(timesteps_in_scope())
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Probe()

    def forward(self, x: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        return self.layer(x)


def test_nearest_timestep() -> None:
    bits = StepBits((900, 600, 300), (3, 4, 8))
    assert [bits.at(t) for t in (900, 760, 740, 451, 449, 300)] == [3, 3, 4, 4, 8, 8]
    assert bits.index(1150.0) == 0
    assert bits.index(5.0) == 2
    assert StepBits([0.5], [4]).at(0.5) == 4  # type: ignore[arg-type]


def test_timesteps_beyond_the_covered_range_are_refused() -> None:
    bits = StepBits((900, 600, 500), (3, 4, 8))
    bits.index(1200)
    for timestep in (1201, 199):
        with pytest.raises(ValueError, match=rf"{timestep} is not covered by bits for 500 .. 900"):
            bits.index(timestep)
    with pytest.raises(ValueError, match="not covered"):
        StepBits((500,), (4,)).index(600)
    with pytest.raises(ValueError, match="not covered"):
        bits.index(float("nan"))


@pytest.mark.parametrize(
    ("timesteps", "bits", "message"),
    [
        ((), (), "at least one"),
        ((1, 2), (4,), "2 timesteps with 1 bits"),
        ((1, 1), (4, 3), "one twice"),
        ((1, 2), (4, 9), "bits=9"),
    ],
)
def test_bad_policies_are_refused(
    timesteps: tuple[float, ...], bits: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StepBits(timesteps, bits)


@pytest.mark.parametrize("given", [7, 7.0, torch.tensor(7), torch.tensor([7.0])])
def test_by_position_and_keyword_in_any_form(given: Tensor | float) -> None:
    model = Model()
    follow_timesteps_(model, "timestep")
    x = torch.zeros(2, 3)
    model(x, given)
    model(x, timestep=given)
    model.forward(x, given)
    assert model.layer.seen == [(7.0,)] * 3
    model(x, torch.tensor([7, 9]))
    assert model.layer.seen[-1] == (7.0, 9.0)


def test_without_a_timestep_the_error_says_what_to_call() -> None:
    model = Model()
    with pytest.raises(RuntimeError, match=r"follow_timesteps_\(model, argument\)"):
        model(torch.zeros(2, 3), 5)
    handle = follow_timesteps_(model, "timestep")
    with pytest.raises(RuntimeError, match="follow_timesteps_"):
        model(torch.zeros(2, 3))
    model(torch.zeros(2, 3), 5)
    handle.remove()
    handle.remove()
    assert "forward" not in model.__dict__
    with pytest.raises(RuntimeError, match="follow_timesteps_"):
        model(torch.zeros(2, 3), 5)


def test_the_scope_ends_with_the_call_even_if_that_fails() -> None:
    class Failing(Model):
        def forward(self, x: Tensor, timestep: Tensor | float | None = None) -> Tensor:
            raise KeyError("failed")

    model = Failing()
    follow_timesteps_(model, "timestep")
    with pytest.raises(KeyError):
        model(torch.zeros(1), 3)
    with pytest.raises(RuntimeError):
        timesteps_in_scope()


def test_models_within_models_see_their_own_timestep() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.layer = Model(), Probe()

        def forward(self, x: Tensor, t: float) -> Tensor:
            return self.layer(self.inner(x, t + 1))

    outer = Outer()
    follow_timesteps_(outer, "t")
    follow_timesteps_(outer.inner, "timestep")
    outer(torch.zeros(1), 4)
    assert outer.inner.layer.seen == [(5.0,)]
    assert outer.layer.seen == [(4.0,)]
    with timestep_scope(1):
        outer(torch.zeros(1), 4)
        assert timesteps_in_scope() == (1.0,)


def test_a_deep_copy_runs_its_own_layers() -> None:
    model = Model()
    handle = follow_timesteps_(model, "timestep")
    twin = copy.deepcopy(model)
    twin(torch.zeros(1), 3)
    assert twin.layer.seen == [(3.0,)]
    assert not model.layer.seen
    handle.remove()
    twin(torch.zeros(1), 4)
    assert twin.layer.seen[-1] == (4.0,)


def test_following_keeps_signature_state_and_class() -> None:
    model = Model()
    before, keys = inspect.signature(model.forward), list(model.state_dict())
    follow_timesteps_(model, "timestep")
    assert inspect.signature(model.forward) == before
    assert list(model.state_dict()) == keys
    assert type(model) is Model


def test_removal_under_a_later_replacement_leaves_that_in_place() -> None:
    model = Model()
    handle = follow_timesteps_(model, "timestep")
    inner = model.forward
    model.forward = later = lambda *args, **kwargs: inner(*args, **kwargs)  # type: ignore[method-assign]
    handle.remove()
    assert model.forward is later
    with pytest.raises(RuntimeError, match="follow_timesteps_"):
        model(torch.zeros(1), 3)


def test_two_handles_come_off_in_any_order() -> None:
    for first in (0, 1):
        model = Model()
        handles = [follow_timesteps_(model, "timestep") for _ in range(2)]
        handles[first].remove()
        model(torch.zeros(1), 3)
        handles[1 - first].remove()
        with pytest.raises(RuntimeError):
            model(torch.zeros(1), 3)


def test_a_model_that_is_followed_can_be_freed() -> None:
    model = Model()
    follow_timesteps_(model, "timestep")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_argument_that_forward_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Model has no argument 't'; it has x, timestep"):
        follow_timesteps_(Model(), "t")


def test_a_table_of_timesteps_is_refused() -> None:
    for bad in (torch.zeros(2, 3), torch.zeros(0)):
        with (
            pytest.raises(ValueError, match="neither one number nor one per row"),
            timestep_scope(bad),
        ):
            pass


def dit() -> DiT:
    sizes = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 16}
    return DiT(**sizes, depth=1, num_heads=2, num_classes=3)


def test_our_dit_with_and_without_guidance() -> None:
    model = dit()
    model.blocks[0].attn = Probe()
    follow_timesteps_(model, "t")
    x, t, y = torch.randn(2, 1, 4, 4), torch.tensor([5, 9]), torch.tensor([1, 3])
    model(x, t, y)
    model(x, t=t, y=y)
    model.forward_with_cfg(x, t, y, 2.0)
    assert model.blocks[0].attn.seen == [(5.0, 9.0)] * 3


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "PixArtTransformer2DModel"])
def test_diffusers_transformers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1}
    extra = {"cross_attention_dim": 16, "caption_channels": 16} if name.startswith("Pix") else {}
    model = getattr(diffusers, name)(
        **sizes, sample_size=8, patch_size=2, norm_type=_norm(name), **extra
    )
    model.transformer_blocks[0].ff = Probe()
    follow_timesteps_(model, "timestep")
    given = (
        {"encoder_hidden_states": torch.randn(2, 3, 16)}
        if extra
        else {"class_labels": torch.tensor([1, 2])}
    )
    if extra:
        given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}  # type: ignore[assignment]
    model(torch.randn(2, 4, 8, 8), timestep=torch.tensor([7, 7]), **given)
    assert model.transformer_blocks[0].ff.seen == [(7.0, 7.0)]


def _norm(name: str) -> str:
    return "ada_norm_single" if name.startswith("Pix") else "ada_norm_zero"
