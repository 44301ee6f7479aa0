"""A quantized language model as a folder: written, loaded again, run, and only then named."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.calibration import evaluating
from dit_qat.export.extras import import_extra
from dit_qat.export.files import write_json
from dit_qat.export.folders import written_folder
from dit_qat.export.manifest import CONFIG_FILE, TENSOR_FILE, Manifest
from dit_qat.export.verify import Agreement, verify_packed
from dit_qat.export.writer import check_target, write_packed
from dit_qat.llm.models.checks import check_windows

__all__ = ["SavedLLM", "save_quantized"]


@dataclass(frozen=True)
class SavedLLM:
    """What was written, and how it was checked.

    Attributes:
        folder: Where.
        manifest: What ``config.json`` says of quantization.
        agreement: Of the model as transformers loads it with the one in memory.
        bytes: Of the model's two files.
    """

    folder: Path
    manifest: Manifest
    agreement: Agreement
    bytes: int


def save_quantized(
    model: Any,
    folder: Path | str,
    windows: Tensor,
    *,
    tokenizer: Any = None,
    provenance: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> SavedLLM:
    """Write a quantized model as a folder that transformers and ``load_quantized`` read.

    Args:
        model: Of transformers, quantized; unchanged. Floats are stored in the dtype that they have.
        folder: Made at once or not at all.
        windows: Token ids (count, length) on which both are run.
        tokenizer: Saved beside the model; None: the folder has none.
        provenance: Plain values beside those of the run that quantized it.
        metrics: Plain values that go into a ``metrics.json`` beside the model; None: no such file.
        overwrite: Replace a packed folder that is there.

    Raises:
        FileExistsError: if the folder is in use.
        ValueError: if both differ, naming the layer, or for what the format cannot hold.
        OSError: if there is no room, or the folder cannot be written.
    """
    folder = Path(folder)
    check_target(folder, overwrite)
    check_windows(model, windows)
    known = getattr(getattr(model.config, "quantization_config", None), "provenance", {})
    with written_folder(folder) as place:
        written = place / "model"
        manifest = write_packed(model, written, provenance={**known, **(provenance or {})})
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        if model.can_generate():
            model.generation_config.save_pretrained(place)
        for name in (CONFIG_FILE, TENSOR_FILE):
            (written / name).rename(place / name)
        written.rmdir()
        if metrics is not None:
            write_json(place / "metrics.json", metrics)
        agreement = _agreement(model, place, windows)
    size = sum((folder / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE))
    return SavedLLM(folder, manifest, agreement, size)


def _agreement(model: nn.Module, place: Path, windows: Tensor) -> Agreement:
    """Load what was written as its users will, and compare."""
    first = next(model.parameters())
    auto = import_extra("transformers", "llm").AutoModelForCausalLM
    packed = auto.from_pretrained(place, dtype=first.dtype, local_files_only=True).to(first.device)
    named = {"input_ids": windows.to(first.device), "use_cache": False}
    with evaluating(model), torch.no_grad():
        agreement = verify_packed(model, packed, (), named)
    try:
        agreement.check()
    except ValueError as error:
        raise ValueError(f"{error}; nothing was written") from error
    return agreement
