"""The whole story on the embedded digits: train under quantization, sample, score, report."""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dit_qat import __version__
from dit_qat.dit.data import digit_images
from dit_qat.dit.evaluation.images import image_grid, save_png
from dit_qat.dit.evaluation.sensitivity import Sensitivity, layer_sensitivity
from dit_qat.dit.experiment import Curve, Recipe, Scored, digits_sampler, score, train_quantized
from dit_qat.dit.exporting import compare_pixels
from dit_qat.dit.methods import AMPN, BitNetV2, Method, MinMax, RobuQ
from dit_qat.dit.models import load_dit
from dit_qat.dit.report import (
    Comparison,
    ComparisonRow,
    Report,
    loss_plot,
    sensitivity_plot,
    side_by_side,
    write_report,
)
from dit_qat.dit.sampling import SamplerConfig
from dit_qat.dit.training.allocation import BIT_MAP, PICTURE
from dit_qat.dit.training.bit_maps import read_bit_map
from dit_qat.export.files import write_json, written_whole
from dit_qat.export.inspect import describe
from dit_qat.layers import quantize_

__all__ = ["PACKED", "DemoSettings", "baselines", "run_demo"]

PACKED = "packed"
"""Folder of the packed model."""

_SHOWN = 100
_SENSITIVITY_BITS = (1, 2, 3, 4)


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs.

    Attributes:
        bits: Activation bits of the block linears; on average, with ``ampn``.
        preset: Preset of RobuQ.
        compare: Train the baselines as well.
        seed: Seed of training and sampling.
        steps: Optimizer steps of quantization-aware training.
        samples: Images to score; scores compare only at equal numbers.
        sampling_steps: DDIM steps.
        rank: Rank of the low-rank branches (16 for DiT-XL/2; these layers are 128 wide).
        ampn: Allocate bits by layer after a warm-up.
    """

    bits: int = 3
    preset: Literal["paper", "exact"] = "exact"
    compare: bool = False
    seed: int = 0
    steps: int = 600
    samples: int = 1797
    sampling_steps: int = 50
    rank: int = 4
    ampn: bool = False

    @property
    def name(self) -> str:
        """Bits, in words."""
        average = " on average, allocated after a warm-up" if self.ampn else ""
        return f"W1.58A{self.bits}{average}"

    def method(self) -> RobuQ:
        """RobuQ under these settings; AMPN spends a sixth of the steps on its warm-up."""
        if not self.ampn:
            return RobuQ(preset=self.preset, activation_bits=self.bits, rank=self.rank)
        return AMPN(
            preset=self.preset,
            average_bits=self.bits,
            rank=self.rank,
            warmup_steps=max(1, self.steps // 6),
            score="local_gradient",
        )

    def check(self) -> None:
        """Refuse what could only fail after minutes of work.

        Raises:
            ValueError: for numbers out of range.
        """
        least = 2 if self.ampn else 1
        if self.steps < least or self.samples < 4:
            raise ValueError(
                f"steps={self.steps}, samples={self.samples}: train at least {least} steps"
                f"{' (one is the warm-up)' if self.ampn else ''} and score at least 4 images"
            )
        digits_sampler(self.seed, self.sampling_steps)
        quantize_(load_dit("digits"), self.method().quant_config(), initialize=False)


def baselines(settings: DemoSettings) -> dict[str, Method]:
    """The two recipes that RobuQ builds on, at the same bits; before them, RobuQ beside AMPN."""
    bits, rank = settings.bits, settings.rank
    found: dict[str, Method] = {}
    if settings.ampn:
        found["robuq"] = RobuQ(preset=settings.preset, activation_bits=bits, rank=rank)
    found["bitnet_v2"] = BitNetV2(activation_bits=bits)
    found["minmax"] = MinMax(activation_bits=bits, rank=rank)
    return found


def run_demo(
    out: Path, settings: DemoSettings, say: Callable[[str], None], progress: bool = True
) -> dict[str, Any]:
    """Train, sample, score and write everything into a folder.

    Args:
        out: Folder for the results; exists and holds none.
        settings: What to run.
        say: Called with a line of text at each stage.
        progress: Show progress bars.

    Returns:
        The content of ``metrics.json``.
    """
    started = time.perf_counter()
    sampler = digits_sampler(settings.seed, settings.sampling_steps)
    recipe = Recipe(steps=settings.steps)
    method = settings.method()
    say(f"1/4 training {settings.steps} steps at {settings.name} ({settings.preset} preset)")
    module, curve = train_quantized(method, recipe, settings.seed, out, progress)
    say(f"2/4 sampling {settings.samples} images from the float and the quantized model")
    scored_float = score(load_dit("digits").eval(), sampler, settings.samples, progress)
    scored = score(module.network, sampler, settings.samples, progress)
    say("3/4 measuring every layer's sensitivity to its activation bits")
    images, labels = digit_images()
    sensitivity = layer_sensitivity(
        module.network, images[:16], labels[:16], _SENSITIVITY_BITS, settings.seed, timesteps=4
    )
    curves: dict[str, Curve] = {method.name: curve}
    others: dict[str, Scored] = {}
    if settings.compare:
        for name, baseline in baselines(settings).items():
            say(f"    baseline {name}: training and sampling")
            other, curves[name] = train_quantized(
                baseline, recipe, settings.seed, out / "baselines" / name, progress
            )
            others[name] = score(other.network, sampler, settings.samples, progress)
    say("4/4 packing the model, drawing from it once more, and writing the report")
    model = describe(module.network)
    metrics = {
        "float": scored_float.scores,
        "quantized": {
            "method": method.name,
            "preset": settings.preset,
            "bits": settings.bits,
            "average_bits": model.average_activation_bits,
            "effective_weight_bits": model.effective_weight_bits,
            **scored.scores,
            **({"bit_map": read_bit_map(out / BIT_MAP).by_layer} if settings.ampn else {}),
        },
        "baselines": {name: other.scores for name, other in others.items()},
        "packed": compare_pixels(module.network, out / PACKED, sampler, scored.images),
        "settings": vars(settings),
        "versions": _versions(),
        "seconds": time.perf_counter() - started,
    }
    _write_pictures(out, scored_float, scored, curves, sensitivity)
    _write_page(out, settings, metrics, sampler)
    write_json(out / "metrics.json", metrics)
    return metrics


def _write_pictures(
    out: Path,
    scored_float: Scored,
    scored: Scored,
    curves: Mapping[str, Curve],
    sensitivity: Sensitivity,
) -> None:
    for name, images in (("float", scored_float.images), ("quantized", scored.images)):
        save_png(out / f"{name}.png", image_grid(images[:_SHOWN], columns=10, scale=4))
    pictures = {
        "side_by_side.png": _pair(scored_float.images, scored.images),
        "loss.png": loss_plot(curves),
        "sensitivity.png": sensitivity_plot(sensitivity),
    }
    for name, png in pictures.items():
        with written_whole(out / name) as temporary:
            temporary.write_bytes(png)


def _pair(left: Tensor, right: Tensor) -> bytes:
    return side_by_side(left[:_SHOWN], right[:_SHOWN], ("float", "quantized"))


def _write_page(
    out: Path, settings: DemoSettings, metrics: Mapping[str, Any], sampler: SamplerConfig
) -> None:
    quantized = metrics["quantized"]
    rows = [(quantized["method"], quantized["fd_digits"])]
    rows += [(name, scores["fd_digits"]) for name, scores in metrics["baselines"].items()]
    ablation = Comparison(
        tuple(ComparisonRow(name, settings.bits, (value,)) for name, value in rows),
        metrics["float"]["fd_digits"],
    )
    report = Report(
        title=f"{'AMPN' if settings.ampn else 'RobuQ'} on digits, W1.58A{settings.bits}",
        method=f"{quantized['method']} ({settings.preset})",
        bits=settings.bits,
        steps=settings.steps,
        seed=settings.seed,
        seconds=metrics["seconds"],
        hardware=_hardware(),
        versions=metrics["versions"],
        sampling=f"DDIM, {sampler.steps} steps, no guidance",
        float_scores=metrics["float"],
        quantized_scores={
            key: value for key, value in quantized.items() if key in metrics["float"]
        },
        average_bits=quantized["average_bits"],
        effective_weight_bits=quantized["effective_weight_bits"],
        packed=metrics["packed"],
        samples=(out / "side_by_side.png").read_bytes(),
        loss=(out / "loss.png").read_bytes(),
        sensitivity=(out / "sensitivity.png").read_bytes(),
        bit_map=(out / PICTURE).read_bytes() if settings.ampn else None,
        ablation=ablation if metrics["baselines"] else None,
    )
    write_report(out / "report.html", report)


def _versions() -> dict[str, str]:
    return {
        "dit_qat": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _hardware() -> str:
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
