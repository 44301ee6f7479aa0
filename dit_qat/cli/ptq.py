"""``dit-qat ptq``: post-training quantization of a DiT or of a pipeline's transformer."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from dit_qat.dit.methods.adatsq import AdaTSQ
from dit_qat.dit.methods.clq import CLQ
from dit_qat.dit.methods.duquant import DuQuant
from dit_qat.dit.methods.gptq import GPTQ
from dit_qat.dit.methods.ptq4dit import PTQ4DiT
from dit_qat.dit.methods.q_dit import QDiT
from dit_qat.dit.methods.quarot import QuaRot
from dit_qat.dit.methods.rtn import RTN
from dit_qat.dit.methods.smoothquant import SmoothQuant
from dit_qat.dit.methods.svdquant import SVDQuant
from dit_qat.dit.methods.vidit_q import ViDiTQ
from dit_qat.dit.processes import pick_device
from dit_qat.dit.ptq.execute import run_job
from dit_qat.dit.ptq.job import PTQJob, prepare
from dit_qat.dit.ptq.method import PTQMethod
from dit_qat.dit.ptq.results import check_results_folder
from dit_qat.dit.ptq.settings import Calibration, Evaluation, Patterns, PipelineCall
from dit_qat.dit.sampling import SamplerConfig

__all__ = ["METHODS", "MethodName", "ptq"]

MethodName = Literal[
    "adatsq",
    "clq",
    "duquant",
    "gptq",
    "ptq4dit",
    "q_dit",
    "quarot",
    "rtn",
    "smoothquant",
    "svdquant",
    "vidit_q",
]

METHODS: dict[str, type[PTQMethod]] = {
    method.name: method
    for method in (
        AdaTSQ,
        CLQ,
        DuQuant,
        GPTQ,
        PTQ4DiT,
        QDiT,
        QuaRot,
        RTN,
        SmoothQuant,
        SVDQuant,
        ViDiTQ,
    )
}
"""By the name that ``--method`` takes."""

_SAMPLER, _CALIBRATION, _PIPELINE = SamplerConfig(), Calibration(), PipelineCall()
_PATTERNS, _EVALUATION = Patterns(), Evaluation()


def ptq(
    out: Path,
    method: PTQMethod | MethodName,
    model: str = "digits",
    calibration: Calibration = _CALIBRATION,
    sampler: SamplerConfig = _SAMPLER,
    pipeline: PipelineCall = _PIPELINE,
    patterns: Patterns = _PATTERNS,
    evaluation: Evaluation = _EVALUATION,
    vae: str | None = None,
    memory_gb: float | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Quantize a trained DiT, or a diffusers pipeline's transformer, without training it.

    Calibrates on what the sampler or pipeline feeds the model, quantizes it block by block,
    compares it with the float model, and leaves a packed folder for dit-qat sample and inspect,
    metrics.json, report.html and pictures. After a kill the same command goes on with the blocks
    that are left; until the end, what it needs for that is kept beside --out.

    Args:
        out: Folder for the results.
        method: By name with its defaults (rtn, gptq, clq, ...), or by class with options: --method
            GPTQ --method.weight_bits 8.
        model: digits, a .safetensors file of ours, a published .pt, a .ckpt of a float dit-qat fit
            (its averaged weights), a folder or hub id of diffusers' DiTTransformer2DModel or
            DiTPipeline, or of any other pipeline with a transformer.
        calibration: What it is calibrated on: images and classes, or prompts; steps that are kept.
        sampler: How a DiT draws, while calibrated and compared; take the seed from --seed.
        pipeline: How a diffusers pipeline is called.
        patterns: Which layers are quantized; by default what papers agree on for the model's class.
        evaluation: What both models are compared on.
        vae: Decoder for the pictures of a DiT of latents: a folder or a hub id; by default the one
            beside the model, if any.
        memory_gb: Refuse a run whose calibration would take more, before it starts.
        seed: Of noise, rotations and searches.
        device: auto, cpu, cuda or cuda:1.
        overwrite: Replace the results in the folder, and start over.

    Raises:
        ValueError: before the run, for a model, settings, patterns and a method that do not fit
            together; within it, for what the method cannot quantize.
        OSError: if a file is not found, or the folder holds results.
    """
    check_results_folder(out, overwrite)
    job = PTQJob(
        model=model,
        method=METHODS[method]() if isinstance(method, str) else method,
        calibration=calibration,
        sampler=sampler,
        pipeline=pipeline,
        patterns=patterns,
        evaluation=evaluation,
        vae=vae,
        seed=_seed(seed, sampler),
        limit_bytes=_limit(memory_gb),
        device=pick_device(device),
    )
    prepared = prepare(job)
    with _told():
        metrics = run_job(prepared, out, tqdm.write, overwrite)
    _print(metrics, out)


def _seed(seed: int, sampler: SamplerConfig) -> int:
    if sampler.seed:
        raise ValueError(f"--sampler.seed {sampler.seed}: give --seed, which all noise comes from")
    return seed


def _limit(memory_gb: float | None) -> int | None:
    if memory_gb is None:
        return None
    if not memory_gb > 0:
        raise ValueError(f"--memory_gb {memory_gb:g}: must be above 0")
    return int(memory_gb * 1e9)


class _Teller(logging.Handler):
    """Prints what the engine logs, above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        tqdm.write(record.getMessage())


@contextmanager
def _told() -> Iterator[None]:
    """Show what calibration says before it starts, such as its peak memory."""
    logger, teller = logging.getLogger("dit_qat"), _Teller(logging.INFO)
    level = logger.level
    logger.addHandler(teller)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(teller)


def _print(metrics: dict[str, Any], out: Path) -> None:
    if "trajectory_error" in metrics:
        print(f"trajectory error          {metrics['trajectory_error']:.4g}")
    print(f"output error on calls     {metrics['output_error']:.4g}")
    if "quantized" in metrics:
        before, after = (metrics[key]["fd_digits"] for key in ("float", "quantized"))
        print(f"FD-digits                 {after:.2f} ({before:.2f} float)")
    for name, value in (metrics.get("similarity") or {}).items():
        print(f"{name:<26}{value:.4g}")
    print(
        f"weight bits               {metrics['weight_bits']:.3g} "
        f"({metrics['effective_weight_bits']:.2f} with scales, transforms and branches)\n"
        f"activation bits           {metrics['activation_bits']:.4g} "
        f"({metrics['activation_bits_by_macs']:.4g} weighted by operations)\n"
        f"{metrics['packed']['bytes'] / 1e6:.2f} MB from "
        f"{metrics['packed']['float_bytes'] / 1e6:.2f} MB; {metrics['seconds']:.0f} s\n"
        f"report: {out / 'report.html'}"
    )
