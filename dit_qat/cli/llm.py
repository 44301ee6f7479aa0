"""``dit-qat llm``: language models quantized, judged, sampled, and written in plain form."""

import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, Literal

import torch

from dit_qat.calibration import LayerRow, Method
from dit_qat.dit.processes import pick_device
from dit_qat.export.files import write_json
from dit_qat.export.folders import written_folder
from dit_qat.export.writer import check_target
from dit_qat.llm.data import calibration_windows, evaluation_windows
from dit_qat.llm.evaluation.perplexity import perplexity
from dit_qat.llm.hf.folder import save_quantized
from dit_qat.llm.models import load_llm
from dit_qat.llm.models.checks import window_length
from dit_qat.llm.quantize import quantize_llm

__all__ = ["evaluate", "export", "generate", "methods", "quantize"]

METRICS = "metrics.json"

_METHODS = "dit_qat.llm.methods"
_CHECKED = 2  # windows on which what is written is run


def quantize(
    out: Path,
    method: Method | str,
    model: str = "tiny",
    calibration: str = "tiny",
    settings: dict[str, Any] | None = None,
    windows: int = 128,
    length: int | None = None,
    batch: int = 1,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    memory_gb: float | None = None,
    state: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Quantize a language model block by block into a packed folder.

    transformers loads the folder after import dit_qat.llm. A run that was interrupted goes on
    where it was.

    Args:
        out: Folder of the packed model, with its tokenizer and metrics.json.
        method: Name of a method, such as arb, pt2, d2quant or gptq; or a class path in YAML.
        model: Float: a folder or a hub id; tiny is the shipped one.
        calibration: A text file, wikitext2, c4 or ptb; tiny is the shipped text.
        settings: Of a method given by name: {preset: exact, ...}.
        windows: How many windows to calibrate on.
        length: Tokens of each; by default 2048, or what the model allows.
        batch: Windows per call.
        seed: Of the windows, and of what the method draws.
        dtype: What the model computes in.
        device: auto, cpu, cuda or cuda:1.
        memory_gb: What calibration may take.
        state: Where finished blocks are kept meanwhile; by default beside the folder.
        overwrite: Replace a packed folder that is there.

    Raises:
        ValueError: for an unknown method, and for what it cannot quantize.
        OSError: if a folder is in use or cannot be written.
    """
    check_target(out, overwrite)
    chosen = _chosen(method, settings)
    loaded = load_llm(model, pick_device(device), getattr(torch, dtype))
    size = window_length(loaded.model, length)
    ids = calibration_windows(calibration, loaded.tokenizer, windows, size, seed)
    kept = out.with_name(f".{out.name}.state") if state is None else state
    result = quantize_llm(
        loaded.model,
        chosen,
        ids,
        batch_size=batch,
        seed=seed,
        state_folder=kept,
        limit_bytes=None if memory_gb is None else int(memory_gb * 1e9),
        progress=True,
    )
    told = {"model": model, "calibration": calibration, "windows": windows, "length": size}
    saved = save_quantized(
        loaded.model,
        out,
        ids[:_CHECKED],
        tokenizer=loaded.tokenizer,
        provenance=told,
        metrics={"method": chosen.name, **told, **result.plain()},
        overwrite=overwrite,
    )
    shutil.rmtree(kept)
    _print_table(result.table)
    print(
        f"{out}: {saved.bytes / 1e6:.2f} MB, {result.averages['weight_bits']:.3f} nominal and "
        f"{result.averages['effective_weight_bits']:.3f} effective bits per weight of the "
        f"quantized layers, {result.seconds:.0f} s"
    )


def evaluate(
    model: str = "tiny",
    text: str = "tiny",
    window: int | None = None,
    windows: int | None = None,
    batch: int | None = None,
    tasks: list[str] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    out: Path | None = None,
) -> None:
    """Measure perplexity on a text, and accuracy in zero-shot tasks.

    Args:
        model: Float or packed: a folder or a hub id; tiny is the shipped one.
        text: A text file, wikitext2, c4 or ptb; tiny is the shipped held-out text.
        window: Tokens that are read at once; by default 2048, or what the model allows.
        windows: How many windows at most; by default the protocol's, or all.
        batch: Windows per call.
        tasks: Of lm-eval; by default none.
        dtype: What the model computes in.
        device: auto, cpu, cuda or cuda:1.
        out: Folder for metrics.json; by default the numbers are only printed.

    Raises:
        ValueError: for a text that is too short, or a window that is too long.
        OSError: if a file cannot be read or written.
    """
    loaded = load_llm(model, pick_device(device), getattr(torch, dtype))
    size = window_length(loaded.model, window)
    ids = evaluation_windows(text, loaded.tokenizer, size, windows)
    found = perplexity(loaded.model, ids, batch, progress=True)
    metrics: dict[str, Any] = {"model": model, "text": text, "window": size, "windows": len(ids)}
    metrics["perplexity"] = found
    print(f"perplexity {found:.4f} on {text} ({len(ids)} windows of {size} tokens)")
    if tasks:
        from dit_qat.llm.evaluation.zero_shot import zero_shot

        metrics["tasks"] = zero_shot(loaded.model, loaded.tokenizer, tasks)
        for task, values in metrics["tasks"].items():
            print(f"{task}: {', '.join(f'{k} {v:.2f}' for k, v in values.items())}")
    if out is not None:
        write_json(out / METRICS, metrics)


def generate(
    prompt: str,
    model: str = "tiny",
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
) -> None:
    """Continue a text.

    Args:
        prompt: The text.
        model: Float or packed: a folder or a hub id; tiny is the shipped one.
        tokens: How many to add at most.
        temperature: 0 takes the likeliest token each time.
        seed: Of the draws at higher temperatures.
        dtype: What the model computes in.
        device: auto, cpu, cuda or cuda:1.

    Raises:
        ValueError: for tokens or a temperature out of range.
    """
    if tokens < 1 or temperature < 0:
        raise ValueError(
            f"tokens={tokens}, temperature={temperature}: use at least 1 token, and 0 or more"
        )
    loaded = load_llm(model, pick_device(device), getattr(torch, dtype))
    given = loaded.tokenizer(prompt, return_tensors="pt").to(next(loaded.model.parameters()).device)
    torch.manual_seed(seed)
    drawing: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        drawing["temperature"] = temperature
    continuing: Any = loaded.model
    drawn = continuing.generate(**given, max_new_tokens=tokens, **drawing)
    print(loaded.tokenizer.decode(drawn[0], skip_special_tokens=True))


def export(
    model: str,
    out: Path,
    dtype: Literal["float32", "bfloat16", "float16"] = "float16",
    overwrite: bool = False,
) -> None:
    """Write a packed model as a plain folder of transformers, with dequantized weights.

    Args:
        model: A packed folder.
        out: Made at once or not at all.
        dtype: What the weights are rounded to.
        overwrite: Replace a folder that an earlier export wrote.

    Raises:
        ValueError: if the model is not packed.
        OSError: if the folder is in use or cannot be written.
    """
    if out.exists() and (not overwrite or not (out / "config.json").is_file()):
        raise FileExistsError(f"{out} exists; choose another folder, or add --overwrite")
    loaded = load_llm(model, dtype=torch.float32)
    quantized: Any = loaded.model
    if getattr(quantized, "hf_quantizer", None) is None:
        raise ValueError(f"{model} is not packed, so that there is nothing to dequantize")
    plain = quantized.dequantize(torch.float32).to(getattr(torch, dtype))
    with written_folder(out) as place:
        plain.save_pretrained(place)
        loaded.tokenizer.save_pretrained(place)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"{out}: {size / 1e6:.2f} MB in {dtype}, every weight as it is decoded")


def methods() -> dict[str, type[Method]]:
    """All methods by the name that ``--method`` takes."""
    package = import_module(_METHODS)
    for module in walk_packages(package.__path__, f"{_METHODS}."):
        import_module(module.name)
    found, rest = {}, [Method]
    while rest:
        kind = rest.pop()
        rest += kind.__subclasses__()
        if kind.__module__.startswith(_METHODS) and "name" in kind.__dict__:
            found[kind.name] = kind
    return dict(sorted(found.items()))


def _chosen(method: Method | str, settings: Mapping[str, Any] | None) -> Method:
    if isinstance(method, Method):
        if settings:
            raise ValueError("--settings are for a method given by its name; leave them out")
        return method
    known = methods()
    if method not in known:
        raise ValueError(f"--method {method!r} is unknown; there are {', '.join(known)}")
    try:
        return known[method](**(settings or {}))
    except TypeError as error:
        raise ValueError(f"--settings of {method}: {error}") from error


def _print_table(rows: Sequence[LayerRow]) -> None:
    width = max(len(row.name) for row in rows)
    print(f"{'layer':<{width}}  nominal  effective  error")
    for row in rows:
        print(
            f"{row.name:<{width}}  {row.weight_bits:7.3f}  {row.effective_weight_bits:9.3f}  "
            f"{row.error:.4g}"
        )
