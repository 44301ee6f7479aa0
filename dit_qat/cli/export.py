"""``dit-qat export``: a checkpoint as a packed folder, checked before it gets its name."""

from pathlib import Path
from typing import Literal

from dit_qat.dit.checkpoint_export import check_exportable, export_checkpoint
from dit_qat.dit.exporting import Exported, check_target
from dit_qat.export.layer_entry import Storage
from dit_qat.layers.linear import BranchDtype

__all__ = ["export"]


def export(
    checkpoint: Path,
    out: Path,
    weights: Literal["ema", "current"] = "ema",
    storage: Storage = "ternary_1.6",
    branch_dtype: BranchDtype | None = None,
    float_dtype: BranchDtype = "float32",
    bit_map: Path | None = None,
    pipeline: Path | None = None,
    vae: str | None = None,
    across_conventions: bool = False,
    overwrite: bool = False,
) -> None:
    """Pack a quantized checkpoint: ternary codes, scales, branches and what stays float.

    Runs the packed model against the trained one on fixed inputs, layer by layer and as a whole,
    and writes nothing if they differ beyond float rounding. Leaves config.json, model.safetensors
    and metrics.json.

    Args:
        checkpoint: A .ckpt of dit-qat fit.
        out: Folder of the packed model, for load_quantized and for --weights of other commands.
        weights: The averaged weights (ema), or those the optimizer was at (current).
        storage: How the file holds codes: five or four per byte; in memory there are four.
        branch_dtype: What low-rank branches are rounded to; by default what training rounded them
            to. With another one, what that changes is measured and said.
        float_dtype: What embedders, final layer and other float parts are rounded to, likewise.
        bit_map: Refuse a checkpoint that was not trained with this allocation.
        pipeline: Also write a folder of diffusers' DiTPipeline, with dequantized weights (latent
            models of 1,000 classes).
        vae: Its autoencoder: a folder or a hub id.
        across_conventions: Write that pipeline although its timestep frequencies are others.
        overwrite: Replace what an earlier export wrote.

    Raises:
        ValueError: if both models differ, or for a checkpoint that cannot be packed.
        OSError: if a folder is in use or cannot be written.
    """
    if (pipeline is None) != (vae is None):
        raise ValueError("--pipeline DIR and --vae SOURCE go together: give both, or neither")
    check_target(out, overwrite)
    if pipeline is not None:
        _check_apart(out, pipeline)
        check_exportable(checkpoint, weights, bit_map)
        _write_pipeline(checkpoint, pipeline, vae, weights, across_conventions, overwrite)
    exported = export_checkpoint(
        checkpoint,
        out,
        weights=weights,
        storage=storage,
        branch_dtype=branch_dtype,
        float_dtype=float_dtype,
        bit_map=bit_map,
        overwrite=overwrite,
    )
    _say(exported)


def _check_apart(out: Path, pipeline: Path) -> None:
    """Refuse two targets of which one would replace the other."""
    first, second = out.resolve(), pipeline.resolve()
    if first == second or first in second.parents or second in first.parents:
        raise ValueError(
            f"--out {out} and --pipeline {pipeline} are one inside the other, and each is written "
            "as a whole; give two folders beside each other"
        )


def _write_pipeline(
    checkpoint: Path,
    folder: Path,
    vae: str | None,
    weights: Literal["ema", "current"],
    across_conventions: bool,
    overwrite: bool,
) -> None:
    from dit_qat.dit.convert import convert_checkpoint  # diffusers, seconds

    report = convert_checkpoint(
        checkpoint,
        folder,
        "pipeline",
        vae,
        "ema" if weights == "ema" else "model",
        across_conventions,
        dequantize=True,
        overwrite=overwrite,
    )
    changes = ", ".join(f"{name} {found.overall:.1e}" for name, found in report.differences.items())
    print(f"{folder}: DiTPipeline of dequantized weights (relative differences: {changes})")


def _say(exported: Exported) -> None:
    name, difference = exported.agreement.worst_layer
    print(
        f"{exported.folder}: {exported.bytes / 1e6:.2f} MB, {exported.ratio:.1f}x smaller than "
        f"{4 * exported.float_parameters / 1e6:.1f} MB in float32"
    )
    print(
        f"packed against trained, largest relative difference: layers {difference:.1e} ({name}), "
        f"output {exported.agreement.output:.1e}"
    )
    if exported.rounded is not None:
        print(
            f"rounded beyond what training did, as asked: outputs changed by {exported.rounded:.1e}"
            " (norm of the difference over the norm)"
        )
