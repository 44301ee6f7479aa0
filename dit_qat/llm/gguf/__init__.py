"""Packed language models as single files that llama.cpp and its relatives read."""

from dit_qat.llm.gguf.tensors import Options
from dit_qat.llm.gguf.writer import SavedGGUF, write_gguf

__all__ = ["Options", "SavedGGUF", "write_gguf"]
