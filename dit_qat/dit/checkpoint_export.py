"""A checkpoint of ``dit-qat fit`` as a packed folder, with where it came from."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dit_qat.dit.exporting import METRICS, Exported, check_target, export_network
from dit_qat.dit.methods import AMPN, Method
from dit_qat.dit.training.bit_maps import read_bit_map
from dit_qat.dit.training.loading import load_checkpoint, read_checkpoint
from dit_qat.dit.training.module import DiTTraining
from dit_qat.export.layer_entry import Storage
from dit_qat.export.manifest import is_packed_folder
from dit_qat.layers import QuantLinear
from dit_qat.layers.linear import BranchDtype

__all__ = ["check_exportable", "export_checkpoint"]

_LAST = Path("checkpoints", "last.ckpt")  # in the folder of a run


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    weights: Literal["ema", "current"] = "ema",
    storage: Storage = "ternary_1.6",
    branch_dtype: BranchDtype | None = None,
    float_dtype: BranchDtype = "float32",
    bit_map: Path | None = None,
    overwrite: bool = False,
) -> Exported:
    """Pack a checkpoint of ``dit-qat fit``, with where it came from.

    Args:
        checkpoint: The file.
        folder: Made at once or not at all.
        weights: The averaged weights, or those the optimizer was at.
        storage: As for :func:`export_network`.
        branch_dtype: As there.
        float_dtype: As there.
        bit_map: An allocation that the checkpoint must have been trained with; None: any.
        overwrite: As there.

    Raises:
        ValueError: for a checkpoint that is damaged, not quantized, in AMPN's warm-up, or trained
            with other bits; as :func:`export_network`.
        OSError: if a file is missing, or the folder is in use or cannot be written.
    """
    check_target(folder, overwrite)
    module = check_exportable(checkpoint, weights, bit_map)
    return export_network(
        module.network,
        folder,
        provenance=_provenance(checkpoint, weights),
        storage=storage,
        branch_dtype=branch_dtype,
        float_dtype=float_dtype,
        overwrite=overwrite,
    )


def check_exportable(
    checkpoint: Path, weights: Literal["ema", "current"] = "ema", bit_map: Path | None = None
) -> DiTTraining:
    """Load a checkpoint, and refuse what cannot be packed before anything is computed.

    Arguments and errors as for :func:`export_checkpoint`.
    """
    _check_file(checkpoint)
    module = load_checkpoint(checkpoint, weights)
    _check_allocated(module.method, checkpoint)
    if not any(isinstance(layer, QuantLinear) for layer in module.network.modules()):
        raise ValueError(
            f"{checkpoint} holds a float network: there are no quantized layers to pack; train one "
            "with a method, or write the float model with dit-qat convert"
        )
    if bit_map is not None:
        _check_bits(module.network, checkpoint, bit_map)
    return module


def _check_file(checkpoint: Path) -> None:
    """Say of a folder what it is instead, and what to do with it."""
    if not checkpoint.is_dir():
        return
    if is_packed_folder(checkpoint):
        what = "is packed already (by export, ptq or llm quantize); use it as it is"
    elif (checkpoint / _LAST).is_file():
        what = f"is the folder of a run; give {checkpoint / _LAST}"
    else:
        what = (
            "is a folder, and export packs a .ckpt of dit-qat fit; float models are quantized and "
            "packed by dit-qat ptq (transformers of images) and dit-qat llm quantize"
        )
    raise ValueError(f"{checkpoint} {what}")


def _check_allocated(method: Method | None, checkpoint: Path) -> None:
    if isinstance(method, AMPN) and method.bits is None:
        raise ValueError(
            f"{checkpoint} is from AMPN's warm-up: its layers still have "
            f"{method.config.activation_bits} activation bits each, not the "
            f"{method.config.average_bits:g} on average that were asked for; take a checkpoint of "
            f"after step {method.config.warmup_steps}"
        )


def _check_bits(network: nn.Module, checkpoint: Path, bit_map: Path) -> None:
    wanted = read_bit_map(bit_map).by_layer
    trained = {
        name: None if module.config.activation is None else module.config.activation.bits
        for name, module in network.named_modules()
        if isinstance(module, QuantLinear)
    }
    foreign = [name for name in wanted if name not in trained]
    if foreign:
        raise ValueError(
            f"{bit_map} is a bit map of another model: {checkpoint} has no quantized layer "
            f"{foreign[0]}; give the bit_map.json of its own run, or leave --bit_map out"
        )
    differing = [name for name, bits in wanted.items() if trained[name] != bits]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{checkpoint} was not trained with {bit_map}: {len(differing)} of {len(wanted)} "
            f"layers have other bits, such as {name} ({trained[name]} trained, {wanted[name]} in "
            "the map); train with that map (model.method.init_args.bit_map), or leave --bit_map "
            "out to export the bits of the checkpoint"
        )


def _provenance(checkpoint: Path, weights: Literal["ema", "current"]) -> dict[str, Any]:
    """Where a packed model came from; names of files only, so that bytes do not depend on paths."""
    content = read_checkpoint(checkpoint)
    settings, run = content["hyper_parameters"], checkpoint.absolute().parent.parent
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    averaged = weights == "ema" and "current_model_state" in content
    found: dict[str, Any] = {
        "checkpoint": {"file": checkpoint.name, "sha256": digest},
        "weights": "ema" if averaged else "current",
        "step": int(content["global_step"]),
        "training": {
            name: settings.get(name) for name in ("method", "float_layers", "float_weights", "seed")
        },
    }
    if (run / "config.yaml").is_file():
        found["config.yaml"] = (run / "config.yaml").read_text(encoding="utf-8")
    if (run / METRICS).is_file():
        found["metrics"] = _read_metrics(run / METRICS)
    space = content.get("Latents", {}).get("latent_space")
    return found if space is None else found | {"latent_space": dict(space)}


def _read_metrics(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
    except ValueError as error:
        raise ValueError(
            f"{path}, beside the checkpoint, is no JSON ({error}); mend it, or move it away"
        ) from error
