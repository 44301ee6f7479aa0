"""Rules: which pattern reaches which module, and what a pattern that reaches none says."""

import pytest

from dit_qat.layers.attention import AttentionConfig
from dit_qat.layers.linear import LayerConfig
from dit_qat.layers.rules import ModuleConfig, Rule, resolve

MODULES: dict[str, type[ModuleConfig]] = {
    "embed": LayerConfig,
    "blocks.0.attn": AttentionConfig,
    "blocks.0.attn.qkv": LayerConfig,
    "blocks.0.mlp.fc1": LayerConfig,
    "blocks.10.attn.qkv": LayerConfig,
}
ONE, TWO = LayerConfig(), LayerConfig(low_rank=None)


def test_the_last_match_wins() -> None:
    rules = [Rule("blocks.*", ONE), Rule("*.qkv", TWO)]
    assert resolve(rules, MODULES) == {
        "blocks.0.attn.qkv": TWO,
        "blocks.0.mlp.fc1": ONE,
        "blocks.10.attn.qkv": TWO,
    }
    assert set(resolve(rules[::-1], MODULES).values()) == {ONE}


def test_none_skips_and_can_be_overruled() -> None:
    skipping = [Rule("*", ONE), Rule("blocks.0.*", None)]
    assert set(resolve(skipping, MODULES)) == {"embed", "blocks.10.attn.qkv"}
    assert "blocks.0.mlp.fc1" in resolve([*skipping, Rule("*.fc1", TWO)], MODULES)


def test_a_config_reaches_its_own_kind_of_module() -> None:
    attention = AttentionConfig()
    assert resolve([Rule("*", attention)], MODULES) == {"blocks.0.attn": attention}
    assert "blocks.0.attn" not in resolve([Rule("*", ONE)], MODULES)


def test_patterns_are_globs_over_whole_names() -> None:
    assert set(resolve([Rule("blocks.?.attn.qkv", ONE)], MODULES)) == {"blocks.0.attn.qkv"}
    with pytest.raises(ValueError, match="pattern 'qkv' matches no layer"):
        resolve([Rule("qkv", ONE)], MODULES)
    with pytest.raises(ValueError, match="'Embed' matches no layer"):
        resolve([Rule("Embed", ONE)], MODULES)


def test_no_rules_decide_nothing() -> None:
    assert resolve([], MODULES) == {}


def test_a_pattern_without_match_lists_near_names() -> None:
    message = r"'blocks\.0\.mlp\.fc' matches no layer to quantize; near names: blocks\.0\.mlp\.fc1"
    with pytest.raises(ValueError, match=message):
        resolve([Rule("*", ONE), Rule("blocks.0.mlp.fc", ONE)], MODULES)
    with pytest.raises(ValueError, match=r"no attention to quantize; near names: blocks\.0\.attn$"):
        resolve([Rule("blocks.*.atn", AttentionConfig())], MODULES)
    with pytest.raises(ValueError, match="'x' matches no module to quantize; near names: embed"):
        resolve([Rule("x", None)], MODULES)
    with pytest.raises(ValueError, match="matches no layer to quantize; this model has none"):
        resolve([Rule("*", ONE)], {})
