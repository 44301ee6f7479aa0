"""Parameter groups and the course of the learning rate."""

import pytest
from torch import nn

from dit_qat.dit.methods import RobuQ
from dit_qat.dit.models import DiT
from dit_qat.dit.training import OptimizerConfig
from dit_qat.dit.training.optimizer import learning_rate_factor, parameter_groups
from dit_qat.layers import QuantLinear, quantize_


def test_groups_hold_every_trainable_parameter_once() -> None:
    network = DiT(8, 4, 1, 32, 1, 2, num_classes=10)
    quantize_(network, RobuQ(rank=2).quant_config())
    config = OptimizerConfig(lr_ternary=1.0, lr_low_rank=2.0, lr_float=3.0)
    groups = {group["name"]: group for group in parameter_groups(network, config)}
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates == {"ternary": 1.0, "low_rank": 2.0, "float": 3.0}
    listed = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    layers = [m for m in network.modules() if isinstance(m, QuantLinear)]
    assert {id(p) for p in groups["ternary"]["params"]} == {id(m.weight) for m in layers}
    assert len(groups["low_rank"]["params"]) == 2 * len(layers)


def test_a_float_network_has_one_group() -> None:
    (group,) = parameter_groups(nn.Linear(3, 3), OptimizerConfig())
    assert group["name"] == "float"


def test_course_of_the_learning_rate() -> None:
    config = OptimizerConfig(warmup_steps=10, decay="cosine", final_factor=0.1)
    factors = [learning_rate_factor(step, 110, config) for step in range(111)]
    assert factors[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.1 + 0.9 / 2)
    assert factors[110] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_linear_and_constant_courses() -> None:
    linear = OptimizerConfig(warmup_steps=0, decay="linear")
    assert learning_rate_factor(50, 100, linear) == pytest.approx(0.5)
    constant = OptimizerConfig(warmup_steps=0, decay="constant")
    assert learning_rate_factor(99, 100, constant) == 1.0


@pytest.mark.parametrize("field", ["lr_ternary", "lr_low_rank", "lr_float", "warmup_steps"])
def test_negative_settings_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.{field}=-1 must not be negative"):
        OptimizerConfig(**{field: -1})


def test_unknown_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="'step' is not constant, cosine or linear"):
        OptimizerConfig(decay="step")  # type: ignore[arg-type]
