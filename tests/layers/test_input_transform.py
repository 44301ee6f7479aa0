"""InputTransform: the product with the weight stays."""

import copy
import io

import pytest
import torch
from torch import Tensor

from dit_qat.layers import InputTransform, Permute, Rotate, Scale, TransformStep
from dit_qat.primitives.hadamard import Rotation


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scale(width: int) -> Scale:
    return Scale(normal(width, seed=7).exp())


def permute(width: int) -> Permute:
    return Permute(torch.randperm(width, generator=torch.Generator().manual_seed(2)))


def chains(width: int) -> list[list[Scale | Permute | Rotate]]:
    half = Rotate(Rotation(width, 5, width // 2))
    return [
        [],
        [scale(width)],
        [permute(width)],
        [half],
        [scale(width), permute(width), half],
        [half, permute(width), Rotate(Rotation(width, None))],
        [permute(width), scale(width), permute(width), scale(width)],
    ]


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("width", [24, 1152, 1536])
def test_the_product_stays_and_the_weight_comes_back(number: int, width: int) -> None:
    transform = InputTransform(width, chains(width)[number])
    x, weight = normal(2, 3, width), normal(5, width, seed=1)
    torch.testing.assert_close(transform(x) @ transform.weight(weight).T, x @ weight.T)
    torch.testing.assert_close(transform.inverse_weight(transform.weight(weight)), weight)


@pytest.mark.parametrize("width", [3072, 8960])
def test_permutation_and_block_rotation_are_orthogonal_at_wide_widths(width: int) -> None:
    transform = InputTransform(width, [permute(width), Rotate(Rotation(width, 1, width // 2))])
    x = normal(4, width)
    y = transform(x)
    torch.testing.assert_close(y @ y.T, x @ x.T)
    torch.testing.assert_close(transform.inverse_weight(y), x)


def test_each_step_by_hand() -> None:
    x = torch.tensor([[2.0, 6.0]])
    assert InputTransform(2, [Scale(torch.tensor([2.0, 3.0]))])(x).tolist() == [[1.0, 2.0]]
    assert InputTransform(2, [Permute(torch.tensor([1, 0]))])(x).tolist() == [[6.0, 2.0]]
    y = InputTransform(2, [Rotate(Rotation(2, None))])(x)
    torch.testing.assert_close(y, torch.tensor([[8.0, -4.0]]) / 2**0.5)


def test_a_description_and_a_state_dict_rebuild_it() -> None:
    transform = InputTransform(24, chains(24)[4])
    assert transform.steps == (
        TransformStep("scale"),
        TransformStep("permute"),
        TransformStep("rotate", 5, 12),
    )
    file = io.BytesIO()
    torch.save(transform.state_dict(), file)
    file.seek(0)
    twin = InputTransform(24, transform.steps)
    assert twin.steps == transform.steps
    twin.load_state_dict(torch.load(file, weights_only=True))
    x = normal(3, 24)
    assert torch.equal(twin(x), transform(x))
    assert torch.equal(copy.deepcopy(transform)(x), transform(x))


def test_a_cast_to_half_keeps_scales_and_the_input_s_dtype() -> None:
    transform = InputTransform(24, chains(24)[4])
    before = transform.weight(normal(2, 24))
    assert torch.equal(transform.bfloat16().weight(normal(2, 24)), before)
    x = normal(3, 24).float()
    assert transform(x.bfloat16()).dtype == torch.bfloat16
    assert (transform(x.bfloat16()).float() - transform(x)).norm() < 0.02 * transform(x).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_exact_and_far_ones_survive_in_half_precision(dtype: torch.dtype) -> None:
    vector = torch.tensor([1e-9, 1e9, 1.00390625 + 2**-9])  # the last: between two of bfloat16
    x = torch.tensor([1e-6, 3e4, 1.0]).to(dtype)
    expected = (x.double() / vector.double()).to(dtype)
    assert torch.equal(InputTransform(3, [Scale(vector)])(x), expected)
    assert expected.isfinite().all()


def test_stored_bytes() -> None:
    stored = sum(buffer.nbytes for buffer in InputTransform(24, chains(24)[4]).buffers())
    assert stored == 24 * 4 * 2


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Scale(torch.ones(3)), r"shape \(3,\) in a transform of 4"),
        (Scale(torch.tensor([1.0, 0.0, 1.0, 1.0])), "scale of input 1 is 0"),
        (Scale(torch.tensor([1.0, 1.0, torch.nan, 1.0])), "scale of input 2 is nan"),
        (Permute(torch.tensor([0, 1, 1, 3])), "no permutation of 4"),
        (Permute(torch.ones(4)), "torch.float32 in a transform of 4"),
        (Rotate(Rotation(8)), "rotation of 8 in a transform of 4"),
    ],
)
def test_bad_steps_are_refused(step: Scale | Permute | Rotate, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputTransform(4, [step])


def test_a_width_without_a_rotation_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="width=30 has no Hadamard matrix"):
        InputTransform(30, [TransformStep("rotate", 0)])
    with pytest.raises(ValueError, match="step 'shear' is unknown"):
        TransformStep("shear")  # type: ignore[arg-type]
