"""Our quantizer in the tables of transformers, as soon as transformers has tables.

Importing those takes seconds, which nobody should pay for ``import dit_qat.llm``, and they may be
imported before or after it.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["register_when_imported"]

_TABLES = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Enter our quantizer and its configuration, now or when transformers' tables are imported."""
    if _TABLES in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from transformers.quantizers import auto

    from dit_qat.export.manifest import QUANT_METHOD
    from dit_qat.llm.hf.quantizer import PackedConfig, PackedQuantizer

    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(PackedConfig)
        auto.register_quantizer(QUANT_METHOD)(PackedQuantizer)


class _Finder(MetaPathFinder):
    """Finds one module as Python does, and has it loaded with a word to say after."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            sys.meta_path.remove(self)
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Does what another loader does, and registers then."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # what shows sources and reads data asks for more
