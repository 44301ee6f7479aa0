"""Language models of Hugging Face: loading, the roles of their layers, blocks one at a time."""

from dit_qat.llm.models.checks import (
    check_tokenizer,
    check_windows,
    window_length,
    window_limit,
)
from dit_qat.llm.models.loading import (
    LoadedLLM,
    Residency,
    load_llm,
    load_llm_by_block,
    load_llm_to_quantize,
)
from dit_qat.llm.models.residency import BlockResidency
from dit_qat.llm.models.roles import (
    FAMILIES,
    Family,
    Roles,
    check_unshared,
    roles_of,
    shared_weights,
)
from dit_qat.llm.models.shipped import shipped_model, shipped_text

__all__ = [
    "FAMILIES",
    "BlockResidency",
    "Family",
    "LoadedLLM",
    "Residency",
    "Roles",
    "check_tokenizer",
    "check_unshared",
    "check_windows",
    "load_llm",
    "load_llm_by_block",
    "load_llm_to_quantize",
    "roles_of",
    "shared_weights",
    "shipped_model",
    "shipped_text",
    "window_length",
    "window_limit",
]
