"""Packed language models written as GGUF: planned, written, read back and compared, and named."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_qat.export.extras import import_extra
from dit_qat.export.files import written_whole
from dit_qat.llm.gguf.architecture import EXTRA, add_sizes, architecture_of
from dit_qat.llm.gguf.tensors import Options, Stored, plan_tensors
from dit_qat.llm.gguf.vocabulary import add_vocabulary, vocabulary_of

__all__ = ["SavedGGUF", "write_gguf"]


@dataclass(frozen=True)
class SavedGGUF:
    """What was written.

    Attributes:
        path: Where.
        types: How many quantized layers are of each type of GGUF.
        bytes: Of the file.
        bits: Per weight of the quantized layers, with their scales.
    """

    path: Path
    types: Mapping[str, int]
    bytes: int
    bits: float


@torch.no_grad()
def write_gguf(
    model: Any,
    tokenizer: Any,
    path: Path,
    options: Options | None = None,
    *,
    name: str = "model",
) -> SavedGGUF:
    """Write a packed language model as GGUF; every weight reads back as its layer decodes it.

    Args:
        model: Of transformers, quantized, in float32.
        tokenizer: Its tokenizer.
        path: Written whole or not at all.
        options: How tensors are stored.
        name: Of the model, as readers show it.

    Raises:
        ValueError: before anything is written, for an architecture, a tokenizer or a layer that
            GGUF cannot hold, naming the layer, its code and what to do; or without the package
            gguf.
        OSError: if the file cannot be written.
    """
    gguf = import_extra("gguf", EXTRA)
    found = architecture_of(model)
    vocabulary = vocabulary_of(tokenizer, len(model.get_input_embeddings().weight))
    plan = plan_tensors(model, found, options or Options())
    with written_whole(path) as temporary:
        writer = gguf.GGUFWriter(temporary, found.name)
        try:
            writer.add_name(name)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(_file_type(gguf, plan))
            add_sizes(writer, model)
            add_vocabulary(writer, vocabulary)
            _write_tensors(gguf, writer, plan)
        finally:
            writer.close()
        _check(gguf, temporary, plan)
    return _report(gguf, path, plan)


def _write_tensors(gguf: Any, writer: Any, plan: Sequence[Stored]) -> None:
    """Names and sizes first, then one tensor after the other, so that memory holds one."""
    for stored in plan:
        shape, kind = _byte_shape(gguf, stored), gguf.GGMLQuantizationType[stored.type]
        writer.add_tensor_info(stored.name, shape, np.dtype(np.uint8), prod(shape), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for stored in plan:
        writer.write_tensor_data(stored.packed().numpy())


def _check(gguf: Any, path: Path, plan: Sequence[Stored]) -> None:
    """Read the file as others do, and compare every number with what it stands for."""
    wanted = {stored.name: stored for stored in plan}
    for tensor in gguf.GGUFReader(path).tensors:
        stored = wanted.pop(tensor.name)
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.tensor_type.name != stored.type or not torch.equal(found, stored.values()):
            raise ValueError(
                f"{tensor.name} reads back from {stored.type} with other values than the model's; "
                "nothing was written. This is an error of this package: please report it"
            )
    if wanted:
        raise ValueError(f"{', '.join(wanted)} cannot be read back; nothing was written")


def _report(gguf: Any, path: Path, plan: Sequence[Stored]) -> SavedGGUF:
    quantized = [stored for stored in plan if stored.quantized]
    stored_bytes = sum(prod(_byte_shape(gguf, stored)) for stored in quantized)
    bits = 8 * stored_bytes / sum(prod(stored.shape) for stored in quantized)
    counts = Counter(stored.type for stored in quantized)
    return SavedGGUF(path, dict(counts.most_common()), path.stat().st_size, bits)


def _byte_shape(gguf: Any, stored: Stored) -> tuple[int, ...]:
    kind = gguf.GGMLQuantizationType[stored.type]
    shape: tuple[int, ...] = gguf.quant_shape_to_byte_shape(stored.shape, kind)
    return shape


def _file_type(gguf: Any, plan: Sequence[Stored]) -> int:
    """What readers show as the type of the whole: that of most quantized layers."""
    common = Counter(stored.type for stored in plan if stored.quantized).most_common(1)[0][0]
    kinds = gguf.LlamaFileType
    names = ("ALL_" + common, "MOSTLY_" + common, f"MOSTLY_{common}_S")
    return int(next(kinds[name] for name in names if name in kinds.__members__))
