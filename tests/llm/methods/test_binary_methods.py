"""BiLLM, ARB, STBLLM, PBS2P and PB-LLM: weights and modules, good input and bad."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import LinearStatistics, Needs, Run, Target, record_calls
from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.rounding import GPTQSettings, round_gptq
from dit_qat.layers.weight_code import WEIGHT_CODES, WeightCode
from dit_qat.llm.methods import arb, billm, pb_llm, pbs2p, stbllm
from dit_qat.llm.methods.binarizer import Binarizer
from dit_qat.llm.methods.zones import ZoneSearch
from dit_qat.primitives.compensation import compensate
from dit_qat.primitives.integer import IntegerGrid
from dit_qat.primitives.second_moment import SecondMoment

N, M, BLOCK = 24, 48, 32  # the last block is short
FEW = ZoneSearch(most_salient=5, quantiles=9)

CASES: list[tuple[Any, dict[str, Any]]] = [
    (billm.BiLLM, {"preset": "paper"}),
    (billm.BiLLM, {}),
    *(
        (arb.ARB, {"variant": variant, "preset": preset, "cgb": cgb})
        for variant in ("arb", "arb_x", "arb_rc")
        for preset in ("paper", "exact")
        for cgb in (True, False)
    ),
    (arb.ARB, {"groups": 4, "variant": "arb_x"}),
    (stbllm.STBLLM, {"preset": "paper", "kept": 6}),
    (stbllm.STBLLM, {}),
    (stbllm.STBLLM, {"search_on": "ria"}),
    (stbllm.STBLLM, {"search_on": "saliency", "keep_mask": "as_released"}),
    (pbs2p.PBS2P, {"preset": "paper", "kept": 5}),
    (pbs2p.PBS2P, {}),
    (pbs2p.PBS2P, {"groups": 2}),
    (pb_llm.PBLLM, {"preset": "paper"}),
    (pb_llm.PBLLM, {}),
]


def small(kind: Any, fields: dict[str, Any]) -> Any:
    if kind is not pb_llm.PBLLM:
        fields = {"search": FEW} | fields
    if kind in (arb.ARB, pbs2p.PBS2P) or (kind is stbllm.STBLLM and "preset" not in fields):
        fields = {"iterations": 3} | fields
    return kind(block_size=BLOCK, **fields)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight() -> Tensor:
    return 0.05 * normal(N, M) ** 3 * (0.3 + normal(M, seed=1).abs())


def tokens(seed: int = 3) -> Tensor:
    mix = torch.eye(M) + normal(M, M, seed=4) / M**0.5
    return normal(400, M, seed=seed) @ mix * (0.3 + normal(M, seed=5).abs()) + 0.3


def moment(X: Tensor | None = None) -> SecondMoment:
    found = SecondMoment(M)
    found.add(tokens() if X is None else X)
    return found


def error(W: Tensor, code: WeightCode) -> float:
    X = tokens()
    return float((X @ (W - code.decode()).T).square().sum() / (X @ W.T).square().sum())


def code_of(kind: Any, fields: dict[str, Any], W: Tensor, H: SecondMoment) -> Any:
    return small(kind, fields).code("layer", W, H)


@cache
def usual_code(case: int) -> Any:
    """Of the weight and the tokens above."""
    return code_of(*CASES[case], weight(), moment())


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_code_is_finite_restored_bit_for_bit_and_close(case: int) -> None:
    W, code = weight(), usual_code(case)
    decoded = code.decode()
    again = WEIGHT_CODES[code.name].restore(code.settings(), code.tensors())
    assert torch.equal(again.decode(), decoded)
    assert decoded.shape == W.shape
    assert 0.001 < error(W, code) < 0.5
    assert 0.5 < code.nominal_bits < 2 < code.effective_bits


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_what_is_compensated_is_what_is_stored(
    kind: Any, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def listen(*args: Any, **kwargs: Any) -> Any:
        found.append(compensate(*args, **kwargs))
        return found[-1]

    for module in ("binarizer", "pb_llm"):
        monkeypatch.setattr(f"dit_qat.llm.methods.{module}.compensate", listen)
    code = code_of(kind, fields, weight(), moment())
    assert torch.equal(found[0].weight, code.decode())


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_degenerate_weights_and_inputs_give_defined_results(
    kind: Any, fields: dict[str, Any]
) -> None:
    W, X = weight(), tokens()
    W[3], W[:, 7], X[:, 40:44] = 0, 0, 0
    code = code_of(kind, fields, W, moment(X))
    assert bool(code.decode().isfinite().all())
    assert bool(code_of(kind, fields, 0 * W, moment(X)).decode().abs().max() < 1e-4)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_scale_of_the_moment_does_not_matter(case: int) -> None:
    H = moment()
    larger = SecondMoment.from_state({"matrix": 64 * H.matrix, "tokens": torch.tensor(H.tokens)})
    found = code_of(*CASES[case], weight(), larger).decode()
    torch.testing.assert_close(found, usual_code(case).decode(), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("kind", [billm.BiLLM, arb.ARB, stbllm.STBLLM, pbs2p.PBS2P, pb_llm.PBLLM])
def test_exact_is_not_worse_than_paper(kind: Any) -> None:
    W = weight()
    errors = [error(W, code_of(kind, {"preset": p}, W, moment())) for p in ("paper", "exact")]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("kind", [billm.BiLLM, arb.ARB, pbs2p.PBS2P])
def test_exact_takes_no_more_salient_columns_than_the_releases_find(kind: Any) -> None:
    """Each is a bit per weight that would flatter it."""
    W = normal(64, 256) ** 3
    H = SecondMoment.from_state({"matrix": torch.eye(256), "tokens": torch.tensor(999)})
    code = kind(**({} if kind is billm.BiLLM else {"iterations": 1})).code("layer", W, H)
    assert code.nominal_bits <= (1 + 12 / 128) * code.layout.kept / code.layout.of


@pytest.mark.parametrize("variant", ["arb", "arb_x", "arb_rc"])
def test_exact_variants_of_arb_are_not_worse_than_paper(variant: str) -> None:
    W = weight()
    errors = [
        error(W, code_of(arb.ARB, {"preset": p, "variant": variant}, W, moment()))
        for p in ("paper", "exact")
    ]
    assert errors[1] < errors[0]


def test_no_iterations_with_the_zones_of_billm_are_billm() -> None:
    same = {"search_on": "weight", "update": "exact"}
    fields = {"variant": "arb", "cgb": False, "iterations": 0} | same
    one = code_of(arb.ARB, fields, weight(), moment())
    other = code_of(billm.BiLLM, same, weight(), moment())
    torch.testing.assert_close(one.decode(), other.decode(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_weights_beyond_float16_are_refused(kind: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="float16"):
        code_of(kind, fields, 1e7 * weight(), moment())


@pytest.mark.parametrize("kind", [arb.ARB, pbs2p.PBS2P, pb_llm.PBLLM])
@pytest.mark.parametrize("rows", [1, 2])
def test_quantizers_leave_the_weights_of_a_block_alone(
    kind: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a single row, a transposed block is contiguous as it stands."""

    def watched(weight: Tensor, H: Any, quantizer: Any, *args: Any, **kwargs: Any) -> Any:
        def quantize(W: Tensor, block: Any) -> Tensor:
            before = W.clone()
            Q = quantizer(W, block)
            assert torch.equal(W, before)
            return Q

        return compensate(weight, H, quantize, *args, **kwargs)

    for module in ("binarizer", "pb_llm"):
        monkeypatch.setattr(f"dit_qat.llm.methods.{module}.compensate", watched)
    code_of(kind, {}, weight()[:rows], moment())


@pytest.mark.parametrize("kept", [2, 4, 6, 8])
@pytest.mark.parametrize("kind", [stbllm.STBLLM, pbs2p.PBS2P])
def test_exactly_n_of_m_are_kept_and_the_others_zero(kind: Any, kept: int) -> None:
    code = code_of(kind, {"kept": kept}, weight(), moment())
    zeros = (code.decode() == 0).view(N, -1, 8).sum(-1)
    assert bool((zeros >= 8 - kept).all())
    assert code.layout.kept == kept
    assert int(code._keep().sum()) == N * M * kept // 8 if kept < 8 else code._keep() is None


def test_stbllm_as_released_is_neither_sparse_nor_counted_so() -> None:
    code = code_of(stbllm.STBLLM, {"keep_mask": "as_released"}, weight(), moment())
    assert float((code.decode() == 0).double().mean()) < 0.01
    assert code.nominal_bits > 1


def test_a_budget_is_kept_by_fewer_groups_and_columns() -> None:
    W, H = weight().repeat(4, 1), moment()
    free = code_of(arb.ARB, {"groups": 3}, W, H)
    for budget in (4.0, 7.0):
        code = code_of(arb.ARB, {"groups": 3, "budget": budget}, W, H)
        assert code.effective_bits <= budget + 8 * 32 / W.numel()
    assert code_of(arb.ARB, {"groups": 3, "budget": 99.0}, W, H).layout == free.layout
    with pytest.raises(ValueError, match="budget"):
        code_of(arb.ARB, {"budget": 1.2}, W, H)
    with pytest.raises(ValueError, match=r"layer layers\.0\.0: budget"):
        small(arb.ARB, {"budget": 1.2}).start(run_of(Decoder([0.1])))


def test_all_binary_is_plain_row_binarisation_and_none_is_gptq_at_eight_bits() -> None:
    W, H = weight(), moment()
    ones = code_of(
        pb_llm.PBLLM,
        {"low_share": 1.0, "refits": 0},
        W,
        SecondMoment.from_state({"matrix": torch.eye(M), "tokens": torch.tensor(1000)}),
    )
    block = W[:, :BLOCK]
    mean = block.mean(1, keepdim=True)
    scale = (block - mean).abs().mean(1, keepdim=True)
    expected = mean + scale * torch.where(block >= mean, 1.0, -1.0)
    torch.testing.assert_close(ones.decode()[:, :BLOCK], expected, rtol=2e-3, atol=1e-4)
    eight = code_of(pb_llm.PBLLM, {"low_share": 0.0}, W, H)
    rounded = round_gptq(W, H, IntegerGrid(8, False), GPTQSettings(block_size=BLOCK))
    torch.testing.assert_close(eight.decode(), rounded.values)
    assert eight.nominal_bits == 8


@pytest.mark.parametrize(("kind", "fields"), CASES[::5])
def test_a_layer_becomes_a_coded_linear(kind: Any, fields: dict[str, Any]) -> None:
    linear = nn.Linear(M, N)
    linear.weight.data = weight()
    method = small(kind, fields)
    assert method.needs.second_moment
    statistics = LinearStatistics(M, 1, method.needs)
    statistics.add(tokens(), 0)
    layer = method.quantize_linear("layer", linear, statistics)
    assert isinstance(layer, CodedLinear)
    x = tokens(9)[:5]
    expected = nn.functional.linear(x, layer.dequantized(), linear.bias)
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match="second"):
        method.quantize_linear("layer", linear, LinearStatistics(M, 1, Needs()))


@pytest.mark.parametrize(
    ("kind", "fields", "name"),
    [
        (arb.ARB, {"variant": "arb_y"}, "variant"),
        (arb.ARB, {"preset": "papers"}, "preset"),
        (arb.ARB, {"groups": 0}, "groups"),
        (arb.ARB, {"iterations": -1}, "iterations"),
        (arb.ARB, {"metric": "norm"}, "metric"),
        (arb.ARB, {"update": "none"}, "update"),
        (billm.BiLLM, {"damping": -1.0}, "damping"),
        (billm.BiLLM, {"search_on": "both"}, "search_on"),
        (stbllm.STBLLM, {"kept": 9}, "9:8"),
        (stbllm.STBLLM, {"keep_mask": "no"}, "keep_mask"),
        (pbs2p.PBS2P, {"of": 3}, "pattern"),
        (pbs2p.PBS2P, {"score": "random"}, "score"),
        (pbs2p.PBS2P, {"importance": "cos"}, "importance"),
        (pb_llm.PBLLM, {"low_share": 1.5}, "low_share"),
    ],
)
def test_bad_settings_are_refused_by_name(kind: Any, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        kind(**fields)


@pytest.mark.parametrize("kind", [stbllm.STBLLM, pbs2p.PBS2P])
def test_widths_that_patterns_do_not_fill_are_refused_before_any_work(kind: Any) -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        kind().code("layer", torch.zeros(4, 100), SecondMoment(100))
    run = run_of(Decoder([0.1], width=12))
    with pytest.raises(ValueError, match=r"layer layers\.0\.0: 12 columns are not a multiple"):
        kind().start(run)


class Decoder(nn.Module):
    """A residual chain; how much a layer turns its input is known."""

    def __init__(self, sizes: list[float], width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in sizes)
        for size, layer in zip(sizes, self.layers, strict=True):
            turn = size * normal(width, width, seed=int(100 * size))
            layer[0].weight.data = torch.eye(width) + turn
            layer[0].bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def run_of(model: Decoder) -> Run:
    store = record_calls(
        model,
        lambda: [model(normal(4, 6, model.width, seed=s)) for s in range(3)],
        timestep_argument=None,
    )
    return Run(model, Target(model, ("layers.*",), ("layers.*",)), store)


def test_coarse_search_gives_turning_layers_more_within_an_exact_budget() -> None:
    model = Decoder([0.5, 0.05, 0.06, 0.3, 0.04, 0.4])
    run, method = run_of(model), pbs2p.PBS2P(kept=4, block_size=16)
    method.start(run)
    kept = [run.report["kept_by_layer"][f"layers.{i}"] for i in range(6)]
    assert sum(kept) == 4 * 6
    assert min(kept[0], kept[3], kept[5]) > max(kept[1], kept[2], kept[4])
    H = SecondMoment.from_state({"matrix": torch.eye(16), "tokens": torch.tensor(99)})
    codes = [method.code(f"layers.{i}.0", normal(8, 16), H) for i in range(6)]
    assert [code.layout.kept for code in codes] == kept


@torch.no_grad()
def test_cosines_are_those_of_inputs_and_outputs() -> None:
    model = Decoder([0.2, 0.4])
    run = run_of(model)
    blocks = [block for _, block in run.target.find_blocks(run.store[0])]
    found = pbs2p.layer_cosines(model, blocks, run.store)
    expected = [0.0, 0.0]
    for seed in range(3):
        x = normal(4, 6, 16, seed=seed)
        for at, layer in enumerate(model.layers):
            y = layer(x)
            expected[at] += float(nn.functional.cosine_similarity(x, y, dim=-1).mean()) / 3
            x = y
    assert found == pytest.approx(expected, rel=1e-5)
    assert pbs2p.layer_importance([0.9, 0.7], "one_minus_cos") == pytest.approx([0.5, 1.5])
    assert pbs2p.layer_importance([0.5, 1.0], "reciprocal") == pytest.approx([4 / 3, 2 / 3])
    assert pbs2p.layer_importance([1.0, 1.0], "one_minus_cos") == [1, 1]


def test_stbllm_allocates_only_if_asked_to() -> None:
    run = run_of(Decoder([0.5, 0.05, 0.3]))
    for strength, expected in ((0.08, 1), (3.0, 2)):
        method = stbllm.STBLLM(strength=strength, outliers=1.5, block_size=16)
        method.start(run)
        H = SecondMoment.from_state({"matrix": torch.eye(16), "tokens": torch.tensor(99)})
        kept = {method.code(n, normal(8, 16), H).layout.kept for n in run.names}
        assert len(kept) >= expected


def test_a_binarizer_sees_the_undamped_moment_of_its_columns() -> None:
    recipe, H = arb.ARBConfig(block_size=BLOCK, search=FEW).recipe(), moment().matrix
    seen = []

    class Spy(Binarizer):
        def fit(self, W: Tensor, zones: Any, block: Any, S: Tensor, keep: Any) -> Any:
            seen.append((block.columns, S))
            return super().fit(W, zones, block, S, keep)

    compensate(weight(), H, Spy(recipe, H), BLOCK)
    for columns, S in seen:
        assert torch.equal(S, H[columns][:, columns])
    assert [len(columns) for columns, _ in seen] == [32, 16]
