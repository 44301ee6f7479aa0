import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import (
    BlockView,
    CallStore,
    Needs,
    Prefix,
    ResumeState,
    drive,
    find_blocks,
)
from dit_qat.calibration.driver import check_store

MakeStore = Callable[..., CallStore]
MakeToy = Callable[..., nn.Module]
LinearsOf = Callable[[nn.Module], dict[str, nn.Linear]]
Quantize = Callable[[BlockView], Mapping[str, nn.Module]]
ALL = Needs(second_moment=True, tokens=1000, call_ranges=True)


@pytest.fixture
def driven(make_toy: MakeToy, make_store: MakeStore, linears_of: LinearsOf) -> Callable[..., Any]:
    """Drive a fresh toy; return it and the inputs that each linear was seen to receive."""

    def run(quantize: Quantize, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
        model, seen = make_toy(), {}
        store = options.pop("store", None) or make_store(make_toy(), options.pop("calls", 3))

        def watch(view: BlockView) -> Mapping[str, nn.Module]:
            seen.update({name: s.rows for name, s in view.statistics.items()})
            return quantize(view)

        found, needs = linears_of(model), options.pop("needs", ALL)
        blocks = find_blocks(model)
        drive(model, store, blocks, linears=found, needs=needs, quantize=watch, **options)
        return model, seen

    return run


def _received(model: nn.Module, store: CallStore, names: list[str]) -> dict[str, Tensor]:
    """What linears receive when the model runs on the calls."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for call in store:
            model(*call.args, **call.kwargs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("prefix", ["all", "previous", "none"])
def test_without_quantization_the_record_is_that_of_the_float_model(
    driven: Callable[..., Any], make_toy: MakeToy, make_store: MakeStore, prefix: Prefix
) -> None:
    model, seen = driven(lambda view: {}, prefix=prefix)
    expected = _received(make_toy(), make_store(make_toy()), list(seen))
    assert len(seen) == 5 * 6
    assert all(torch.equal(seen[name], expected[name]) for name in expected)
    assert _same_weights(model, make_toy())


def test_inputs_have_passed_the_quantized_prefix_and_a_float_block(
    driven: Callable[..., Any],
    make_toy: MakeToy,
    make_store: MakeStore,
    round_block: Quantize,
    linears_of: LinearsOf,
) -> None:
    """The cheap chain equals the exact re-run on fixed inputs, block by block."""
    quantized, seen = driven(round_block)
    names = [name for name, _ in find_blocks(quantized)]
    for at, block in enumerate(names):
        mixed = make_toy()
        for name in linears_of(mixed):
            if name.startswith(tuple(f"{b}." for b in names[:at])):
                mixed.set_submodule(name, quantized.get_submodule(name))
        mine = [name for name in seen if name.startswith(f"{block}.")]
        expected = _received(mixed, make_store(make_toy()), mine)
        assert all(torch.equal(seen[name], expected[name]) for name in mine)
        if at:
            floats = _received(make_toy(), make_store(make_toy()), mine)
            assert not torch.equal(seen[mine[0]], floats[mine[0]])


def test_previous_quantizes_one_block_before_and_none_quantizes_no_block(
    driven: Callable[..., Any],
    make_toy: MakeToy,
    make_store: MakeStore,
    round_block: Quantize,
    linears_of: LinearsOf,
) -> None:
    for prefix in ("previous", "none"):
        quantized, seen = driven(round_block, prefix=prefix)
        names = [name for name, _ in find_blocks(quantized)]
        for at, block in enumerate(names):
            mixed = make_toy()
            before = names[at - 1] if at and prefix == "previous" else "?"
            for name in linears_of(mixed):
                if name.startswith(f"{before}."):
                    mixed.set_submodule(name, quantized.get_submodule(name))
            mine = [name for name in seen if name.startswith(f"{block}.")]
            expected = _received(mixed, make_store(make_toy()), mine)
            assert all(torch.equal(seen[name], expected[name]) for name in mine)
        everywhere, _ = driven(round_block)
        assert _same_weights(quantized, everywhere)


def test_a_layer_that_is_not_replaced_stays_as_it_was(
    driven: Callable[..., Any], make_toy: MakeToy
) -> None:
    def only_up(view: BlockView) -> Mapping[str, nn.Module]:
        return {f"{view.name}.up": nn.Linear(8, 16)}

    model, _ = driven(only_up)
    assert not torch.equal(model.blocks[0].up.weight, make_toy().blocks[0].up.weight)
    assert torch.equal(model.blocks[0].down.weight, make_toy().blocks[0].down.weight)


class _Killed(BaseException):
    """What no code catches by the way."""


@pytest.mark.parametrize("prefix", ["all", "previous", "none"])
@pytest.mark.parametrize("fatal", [0, 2, 3])
@pytest.mark.parametrize("within", [False, True])
def test_a_killed_run_goes_on_to_the_same_bytes(
    driven: Callable[..., Any],
    round_block: Quantize,
    tmp_path: Path,
    prefix: Prefix,
    fatal: int,
    within: bool,
) -> None:
    visited: list[int] = []

    def killed(view: BlockView) -> Mapping[str, nn.Module]:
        visited.append(view.index)
        modules = round_block(view)
        if view.index == fatal and within:
            raise _Killed
        return modules

    class Fatal(ResumeState):
        def save(
            self, index: int, modules: Mapping[str, nn.Module], model: nn.Module | None = None
        ) -> None:
            super().save(index, modules, model)
            if index == fatal and not within:
                raise _Killed

    with pytest.raises(_Killed):
        driven(killed, prefix=prefix, state=Fatal(tmp_path, "run"))
    fatal_again, first = fatal, visited.copy()
    fatal, visited[:] = -1, []
    resumed, seen = driven(killed, prefix=prefix, state=ResumeState(tmp_path, "run"))
    assert first == list(range(fatal_again + 1))
    assert visited == list(range(fatal_again + (not within), 5))
    straight, expected = driven(round_block, prefix=prefix)
    assert _same_weights(resumed, straight)
    assert all(torch.equal(seen[name], expected[name]) for name in seen)


def test_a_store_on_disk_gives_what_memory_gives_and_leaves_no_states(
    driven: Callable[..., Any],
    make_toy: MakeToy,
    make_store: MakeStore,
    round_block: Quantize,
    tmp_path: Path,
) -> None:
    held, files = make_store(make_toy(), folder=tmp_path), []

    def watch(view: BlockView) -> Mapping[str, nn.Module]:
        files.append(len(list((tmp_path / "states").glob("*"))))
        return round_block(view)

    for prefix in ("all", "previous"):
        model, seen = driven(watch, store=held, prefix=prefix)
        expected_model, expected = driven(round_block, prefix=prefix)
        assert _same_weights(model, expected_model)
        assert all(torch.equal(seen[name], expected[name]) for name in expected)
    assert min(files) == 3
    assert not (tmp_path / "states").exists()


def test_step_weights_reach_their_layer_alone(
    driven: Callable[..., Any], make_toy: MakeToy, make_store: MakeStore
) -> None:
    weights = torch.tensor([0.7, 0.2, 0.1])
    found = {}

    def look(view: BlockView) -> Mapping[str, nn.Module]:
        found.update({n: (s.second_moment.matrix, s.rows) for n, s in view.statistics.items()})
        return {}

    driven(look, step_weights={"blocks.0.attn.k": weights})
    for name, expected in (
        ("blocks.0.attn.k", lambda x: sum(w * r.T @ r / 10 for w, r in zip(weights, x, strict=1))),
        ("blocks.0.attn.q", lambda x: sum(r.T @ r for r in x)),
    ):
        matrix, rows = found[name]
        torch.testing.assert_close(matrix, expected(rows.split(10)))


def test_layers_of_one_input_share_their_statistics(driven: Callable[..., Any]) -> None:
    views: list[BlockView] = []
    driven(lambda view: views.append(view) or {})
    statistics = views[0].statistics
    assert views[0].shared_inputs == [tuple(f"blocks.0.attn.{n}" for n in "qkv")]
    assert statistics["blocks.0.attn.q"] is statistics["blocks.0.attn.v"]
    assert statistics["blocks.0.attn.q"] is not statistics["blocks.0.up"]
    assert list(statistics) == list(views[0].linears)


def test_an_input_that_is_not_finite_names_layer_and_timestep_and_keeps_blocks(
    make_toy: MakeToy, make_store: MakeStore, linears_of: LinearsOf, tmp_path: Path
) -> None:
    model = make_toy()
    with torch.no_grad():
        model.blocks[2].attn.out.bias[0] = float("nan")
    state = ResumeState(tmp_path, "run")
    linears, blocks, kept = linears_of(model), find_blocks(model), make_store(model)
    with pytest.raises(ValueError, match=r"layer blocks\.2\.up at timestep 900: 10 of 10 inputs"):
        drive(
            model,
            kept,
            blocks,
            linears=linears,
            needs=Needs(),
            quantize=lambda view: {},
            state=state,
        )
    assert [state.load(n) for n in range(3)] == [{}, {}, None]


def test_what_cannot_be_driven_is_refused_before_the_run(
    driven: Callable[..., Any], make_toy: MakeToy, make_store: MakeStore
) -> None:
    never = pytest.fail
    with pytest.raises(ValueError, match="no recorded calls"):
        check_store(make_toy(), CallStore())
    with pytest.raises(ValueError, match="recorded from another Toy"):
        driven(never, store=make_store(make_toy(seed=1)))
    with pytest.raises(ValueError, match="prefix='some' is unknown"):
        driven(never, prefix="some")
    with pytest.raises(ValueError, match=r"above the limit of 1 kB: record fewer.*on disk"):
        driven(never, limit_bytes=1000)
    model = make_toy()
    with pytest.raises(ValueError, match="1 linears to quantize lie in no block, such as head"):
        drive(
            model,
            make_store(model),
            find_blocks(model),
            linears={"head": model.head},
            needs=ALL,
            quantize=never,
        )


@pytest.mark.parametrize("failing", ["method", "input"])
def test_a_run_that_fails_leaves_no_states_on_disk(
    make_toy: MakeToy, make_store: MakeStore, linears_of: LinearsOf, tmp_path: Path, failing: str
) -> None:
    model, there = make_toy(), []
    if failing == "input":
        with torch.no_grad():
            model.blocks[2].attn.out.bias[0] = float("nan")

    def quantize(view: BlockView) -> Mapping[str, nn.Module]:
        there.append((tmp_path / "states").exists())
        if failing == "method" and view.index == 1:
            raise RuntimeError("no")
        return {}

    store = make_store(model, folder=tmp_path)
    with pytest.raises((RuntimeError, ValueError)):
        drive(
            model,
            store,
            find_blocks(model),
            linears=linears_of(model),
            needs=Needs(),
            quantize=quantize,
        )
    assert there[-1]
    assert not (tmp_path / "states").exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"blocks.0.attn.k": torch.ones(2)}, r"shape \(2,\); the calls reach step 2, so give 3"),
        ({"head": torch.ones(3)}, "head, which is not to be quantized"),
        ({"blocks.0.attn.k": torch.tensor([1, -1, 1])}, "must be finite and at least 0"),
    ],
)
def test_step_weights_that_do_not_fit_are_refused_before_the_run(
    driven: Callable[..., Any], weights: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        driven(pytest.fail, step_weights=weights)


def test_a_method_may_only_replace_what_it_was_given(driven: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"replaced blocks\.0\.condition in block blocks\.0"):
        driven(lambda view: {"blocks.0.condition": nn.Linear(8, 8)})


@pytest.mark.filterwarnings("error")
def test_too_few_tokens_are_warned_of(driven: Callable[..., Any]) -> None:
    driven(lambda view: {}, calls=2)
    with pytest.warns(UserWarning, match=r"blocks\.0\.down \(10 tokens, 16 inputs\).*damping"):
        driven(lambda view: {}, calls=1)
    driven(lambda view: {}, calls=1, needs=Needs(tokens=9))
    with pytest.warns(UserWarning, match=r"\(6 tokens, 8 inputs\)"):
        driven(lambda view: {}, calls=3, needs=Needs(True, moment_tokens=2, tokens=9))


def test_the_peak_is_stated_and_grows_with_what_is_kept(
    driven: Callable[..., Any],
    make_toy: MakeToy,
    make_store: MakeStore,
    linears_of: LinearsOf,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plans = []
    for calls, needs in ((3, Needs()), (6, Needs()), (3, ALL)):
        model = make_toy()
        with caplog.at_level(logging.INFO):
            plans.append(
                drive(
                    model,
                    make_store(model, calls),
                    find_blocks(model),
                    linears=linears_of(model),
                    needs=needs,
                    quantize=lambda view: {},
                )
            )
        assert str(plans[-1]) in caplog.text
    few, many, rich = plans
    # x of 2 x 10 tokens and 8 channels behind the break, and the condition of 2 x 8, in float32.
    state = 4 * (2 * 10 * 8 + 2 * 8)
    assert few.states == 3 * state + state
    assert many.states == 6 * state + state
    # q, k and v share theirs: five different inputs, one of them 16 wide.
    widths = [8, 8, 8, 16]
    assert few.statistics == 4 * sum(3 * w for w in widths)
    assert rich.statistics == sum(ALL.bytes(w, 3) for w in widths)
    linears = sum(x.weight.numel() for x in linears_of(model).values())
    assert few.weights == 4 * (sum(p.numel() for p in model.parameters()) + linears)


def test_progress_names_the_block(
    driven: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    driven(lambda view: {})
    assert capsys.readouterr().err == ""
    driven(lambda view: {}, progress=True)
    shown = capsys.readouterr().err
    assert "late.1" in shown
    assert "30/30" in shown


@pytest.mark.cuda
@pytest.mark.parametrize("prefix", ["all", "previous"])
def test_a_model_on_a_gpu_is_driven_there(
    make_toy: MakeToy,
    make_store: MakeStore,
    linears_of: LinearsOf,
    round_block: Quantize,
    prefix: Prefix,
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = []
    for device in ("cpu", "cuda"):
        model = make_toy().to(device)

        def quantize(view: BlockView) -> Mapping[str, nn.Module]:
            modules = round_block(view)
            found.append(view.error(modules))
            return modules

        drive(
            model,
            make_store(make_toy()),
            find_blocks(model),
            linears=linears_of(model),
            needs=ALL,
            quantize=quantize,
            prefix=prefix,
        )
        assert {p.device.type for p in model.parameters()} == {device}
    torch.testing.assert_close(found[5:], found[:5], rtol=1e-3, atol=1e-4)
