"""The packed product: integers, exactly, on every path."""

import pytest
import torch
from torch import Tensor

from dit_qat.kernels import packed_matmul as module
from dit_qat.kernels.packed_matmul import (
    exact_matmul,
    float_matmul,
    int8_fits,
    int8_matmul,
    packed_matmul,
)
from dit_qat.primitives.packing import pack_ternary

SHAPES = [(1, 1, 1), (3, 7, 5), (17, 64, 16), (40, 96, 44), (2, 1152, 9)]


def operands(tokens: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + inputs)
    x = torch.randint(-128, 128, (tokens, inputs), generator=generator).to(torch.int8)
    weight = torch.randint(-1, 2, (outputs, inputs), generator=generator).to(torch.int8)
    return x, weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("matmul", [packed_matmul, exact_matmul, int8_matmul])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_every_path_is_the_integer_product(
    matmul: object, shape: tuple[int, int, int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(matmul)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    x, weight = operands(*shape)
    result = matmul(x, pack_ternary(weight))
    assert result.dtype == torch.int32
    assert torch.equal(result, x.int() @ weight.int().T)


@pytest.mark.parametrize("inputs", [1 << 16, 1 << 18])
def test_sums_beyond_float32_stay_exact(inputs: int) -> None:
    x = torch.full((1, inputs), -128, dtype=torch.int8)
    x[0, 0] = 1
    codes = pack_ternary(torch.ones(1, inputs))
    assert packed_matmul(x, codes).item() == -128 * (inputs - 1) + 1


def test_autocast_does_not_round_the_sums() -> None:
    x, weight = operands(40, 1152, 8)
    with torch.autocast("cpu", torch.bfloat16):
        result = packed_matmul(x, pack_ternary(weight))
    assert torch.equal(result, x.int() @ weight.int().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_floats_keep_their_dtype(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 24, dtype=dtype), operands(1, 24, 6)[1]
    result = float_matmul(x, pack_ternary(weight))
    torch.testing.assert_close(result, x @ weight.to(dtype).T)


def test_int8_is_used_where_it_is_fast() -> None:
    x, weight = operands(64, 64, 16)
    codes = pack_ternary(weight)
    assert int8_fits(x, codes) == torch.cpu._is_vnni_supported()
    assert not int8_fits(x[:1], codes)


def test_the_operator_is_sound_for_compilers() -> None:
    x, weight = operands(3, 8, 4)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.dit_qat.packed_matmul.default, (x, pack_ternary(weight)), test_utils=tests
    )


def test_other_operands_are_refused() -> None:
    x, weight = operands(3, 8, 4)
    codes = pack_ternary(weight)
    with pytest.raises(ValueError, match=r"multiplies torch\.int8"):
        packed_matmul(x.float(), codes)
    for bad_x, bad_codes in ((x[:, :4], codes), (x[0], codes), (x, codes[:, :1])):
        with pytest.raises(ValueError, match="do not fit"):
            packed_matmul(bad_x, bad_codes)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(17, 64, 16), (40, 96, 44), (1, 64, 16), (300, 1152, 3456)])
def test_cuda_gives_the_same_integers(shape: tuple[int, int, int]) -> None:
    x, weight = operands(*shape)
    result = packed_matmul(x.cuda(), pack_ternary(weight).cuda())
    assert torch.equal(result.cpu(), packed_matmul(x, pack_ternary(weight)))
