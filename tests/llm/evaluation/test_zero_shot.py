"""What is asked of the harness, and what is made of its answer; the harness itself stands aside."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from dit_qat.llm.evaluation import average, known_tasks, zero_shot


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put a harness in place that knows three tasks; return what it was asked."""
    found: dict[str, Any] = {}

    def evaluate(**keywords: Any) -> dict[str, Any]:
        found.update(keywords)
        assert not keywords["model"].pretrained.training
        results = {
            "piqa": {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75},
            "boolq": {"acc,none": 0.25},
            "poems": {"bleu,none": 1.0},
        }
        return {"results": results}

    modules = {
        "lm_eval": SimpleNamespace(simple_evaluate=evaluate),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=lambda **kw: SimpleNamespace(**kw)),
        "lm_eval.tasks": SimpleNamespace(
            TaskManager=lambda: SimpleNamespace(
                all_tasks=["piqa", "boolq", "poems", "ai2_arc"], all_tags=["ai2_arc"]
            )
        ),
    }

    def give(name: str, extra: str) -> Any:
        assert extra == "llm"
        return modules[name]

    monkeypatch.setitem(zero_shot.__globals__, "import_extra", give)
    return found


def test_accuracies_in_percent(asked: dict[str, Any]) -> None:
    model = nn.Linear(1, 1).train()
    found = zero_shot(model, "words", ["piqa", "boolq"], limit=10, seed=3)
    assert found == {"piqa": {"acc": 50.0, "acc_norm": 75.0}, "boolq": {"acc": 25.0}}
    assert asked["model"].pretrained is model
    assert asked["model"].tokenizer == "words"
    assert (asked["num_fewshot"], asked["limit"]) == (0, 10)
    assert {value for key, value in asked.items() if key.endswith("_seed")} == {3}
    assert model.training
    assert average(found) == 37.5
    assert average(found, "acc_norm") == 50


def test_refusals(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="there are no tasks"):
        zero_shot(nn.Linear(1, 1), None, [])
    with pytest.raises(ValueError, match="lm-eval knows no chess"):
        zero_shot(nn.Linear(1, 1), None, ["piqa", "chess"])
    with pytest.raises(ValueError, match="ai2_arc are tags of lm-eval"):
        zero_shot(nn.Linear(1, 1), None, ["piqa", "ai2_arc"])
    with pytest.raises(ValueError, match="lm-eval knows no chess"):
        known_tasks(["piqa", "chess"])
    assert known_tasks(["boolq"]).all_tags == ["ai2_arc"]
    assert not asked
    with pytest.raises(ValueError, match=r"poems has no accuracy \(it measures bleu"):
        zero_shot(nn.Linear(1, 1), None, ["poems"])
    with pytest.raises(ValueError, match="measure 'f1' is unknown"):
        average({"piqa": {"acc": 1.0}}, "f1")
    with pytest.raises(ValueError, match="no results"):
        average({})


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"lm_eval is needed here.*dit-qat\[llm\]"):
        zero_shot(nn.Linear(1, 1), None)
