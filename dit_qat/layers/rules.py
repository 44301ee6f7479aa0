"""Where: glob patterns over module names, the last match wins."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from dit_qat.layers.attention import AttentionConfig
from dit_qat.layers.linear import LayerConfig

__all__ = ["ModuleConfig", "QuantConfig", "Rule", "resolve"]

ModuleConfig = LayerConfig | AttentionConfig


@dataclass(frozen=True)
class Rule:
    """Settings for the modules whose name matches; None leaves them float.

    Attributes:
        pattern: Glob over dotted names; ``*`` also spans dots.
        config: A :class:`LayerConfig` reaches linear layers, an :class:`AttentionConfig` attention.
    """

    pattern: str
    config: ModuleConfig | None = None


@dataclass(frozen=True)
class QuantConfig:
    """All rules of a model and the seed of its rotations' signs."""

    rules: Sequence[Rule]
    seed: int = 0


def resolve(
    rules: Iterable[Rule], modules: Mapping[str, type[ModuleConfig]]
) -> dict[str, ModuleConfig]:
    """Decide what every module becomes.

    Args:
        rules: In order; the last one that matches a module wins.
        modules: Name of every module that can be quantized, and the type of config that reaches it.

    Returns:
        Configs by module name; modules that no rule reaches, or that None reaches last, are absent.

    Raises:
        ValueError: for a pattern that matches no module it could act on, with near names.
    """
    decided: dict[str, ModuleConfig | None] = {}
    for rule in rules:
        names = [
            name
            for name, reached_by in modules.items()
            if fnmatchcase(name, rule.pattern)
            and (rule.config is None or isinstance(rule.config, reached_by))
        ]
        if not names:
            raise ValueError(_no_match(rule, modules))
        decided |= dict.fromkeys(names, rule.config)
    return {name: config for name, config in decided.items() if config is not None}


def _no_match(rule: Rule, modules: Mapping[str, type[ModuleConfig]]) -> str:
    candidates = [
        n for n, t in modules.items() if rule.config is None or isinstance(rule.config, t)
    ]
    near = get_close_matches(rule.pattern, candidates, n=3, cutoff=0.4) or candidates[:3]
    hint = f"near names: {', '.join(near)}" if near else "this model has none"
    kind = "module" if rule.config is None else type(rule.config).__name__.removesuffix("Config")
    return f"pattern {rule.pattern!r} matches no {kind.lower()} to quantize; {hint}"
