"""``dit-qat llm``: language models quantized, judged, sampled, and written in plain form."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from dit_qat.calibration import LayerRow, Method, RunResult, remove_state
from dit_qat.cli.llm_methods import method_of
from dit_qat.dit.processes import pick_device
from dit_qat.export.files import locked, write_json
from dit_qat.export.finite import is_finite
from dit_qat.export.folders import check_place, written_folder
from dit_qat.export.writer import check_target
from dit_qat.llm.data import calibration_windows, evaluation_windows
from dit_qat.llm.decoding import decode_
from dit_qat.llm.evaluation.perplexity import perplexity
from dit_qat.llm.evaluation.zero_shot import known_tasks, zero_shot
from dit_qat.llm.gguf import Options, write_gguf
from dit_qat.llm.hf.folder import save_quantized
from dit_qat.llm.models import LoadedLLM, load_llm, load_llm_to_quantize
from dit_qat.llm.models.checks import window_length, window_limit
from dit_qat.llm.quantize import least_bytes, quantize_llm
from dit_qat.llm.report import LLMReport, write_llm_report

__all__ = ["evaluate", "export", "generate", "quantize"]

METRICS = "metrics.json"
REPORT = "report.html"

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
    residency: Literal["auto", "all", "block"] = "auto",
    memory_gb: float | None = None,
    state: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Quantize a language model block by block into a packed folder.

    transformers loads the folder after import dit_qat.llm. A run that was interrupted goes on
    where it was.

    Args:
        out: Folder of the packed model, with its tokenizer, metrics.json and report.html.
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
        residency: What of the float model is in memory: all of it, one block, or auto: all if 1.5
            times its bytes are free. Same results.
        memory_gb: What the model and calibration may take.
        state: Where finished blocks are kept meanwhile; by default beside the folder.
        overwrite: Replace a packed folder that is there.

    Raises:
        ValueError: for an unknown method, and for what it cannot quantize.
        OSError: if a folder is in use or cannot be written, or there is no room.
    """
    kept = out.with_name(f".{out.name}.state") if state is None else state
    check_target(out, overwrite)
    for folder in (out, kept):
        check_place(folder)
    chosen, limit = method_of(method, settings), _limit(memory_gb)
    place = pick_device(device)
    loaded = load_llm_to_quantize(model, place, getattr(torch, dtype), residency, limit)
    size = window_length(loaded.model, length)
    ids = calibration_windows(calibration, loaded.tokenizer, windows, size, seed)
    check_place(out, least_bytes(loaded.model))
    with locked(kept):
        result = quantize_llm(
            loaded.model,
            chosen,
            ids,
            batch_size=batch,
            seed=seed,
            state_folder=kept,
            limit_bytes=limit,
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
    _write_page(out, chosen, result, saved.bytes, told)
    remove_state(kept)
    _print_table(result.table)
    print(
        f"{out}: {saved.bytes / 1e6:.2f} MB, {result.averages['weight_bits']:.3f} nominal and "
        f"{result.averages['effective_weight_bits']:.3f} effective bits per weight of the "
        f"quantized layers, {result.seconds:.0f} s\nreport: {out / REPORT}"
    )


def _write_page(
    out: Path, method: Method, result: RunResult, size: int, told: Mapping[str, Any]
) -> None:
    settings = asdict(method.config)
    named = ", ".join(f"{k}={settings[k]}" for k in ("variant", "preset", "bits") if k in settings)
    text = f"{told['windows']} windows of {told['length']} tokens of {told['calibration']}"
    page = LLMReport(
        str(told["model"]),
        f"{method.name} ({named})" if named else method.name,
        text,
        result.seconds,
        result.averages,
        size,
        result.table,
    )
    write_llm_report(out / REPORT, page)


def evaluate(
    model: str = "tiny",
    text: str = "tiny",
    window: int | None = None,
    windows: int | None = None,
    batch: int | None = None,
    tasks: list[str] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    decoded: bool | None = None,
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
        decoded: Decode packed weights once, into a float model's memory, instead of at every call;
            by default where 0.8 of the free memory holds them.
        out: Folder for metrics.json; by default the numbers are only printed.

    Raises:
        ValueError: for a text that is too short, a window that is too long, or unknown tasks.
        OSError: if a file cannot be read or written.
    """
    if out is not None:
        check_place(out / METRICS)
    if tasks:
        known_tasks(tasks)  # before what takes long
    loaded = load_llm(model, pick_device(device), getattr(torch, dtype))
    _decode(loaded.model, decoded)
    size = window_length(loaded.model, window)
    ids = evaluation_windows(text, loaded.tokenizer, size, windows)
    found = perplexity(loaded.model, ids, batch, progress=True)
    metrics: dict[str, Any] = {"model": model, "text": text, "window": size, "windows": len(ids)}
    metrics["perplexity"] = found
    print(f"perplexity {found:.4f} on {text} ({len(ids)} windows of {size} tokens)")
    if tasks:
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
    decoded: bool | None = None,
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
        decoded: Decode packed weights once, into a float model's memory, instead of at every call;
            by default where 0.8 of the free memory holds them.

    Raises:
        ValueError: for tokens or a temperature out of range, an empty prompt, or more tokens than
            the model has positions for.
    """
    if tokens < 1 or temperature < 0:
        raise ValueError(
            f"tokens={tokens}, temperature={temperature}: use at least 1 token, and 0 or more"
        )
    loaded = load_llm(model, pick_device(device), getattr(torch, dtype))
    given = loaded.tokenizer(prompt, return_tensors="pt").to(next(loaded.model.parameters()).device)
    _check_room(given["input_ids"].shape[1], tokens, window_limit(loaded.model))
    _decode(loaded.model, decoded)
    torch.manual_seed(seed)
    drawing: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        drawing["temperature"] = temperature
    continuing: Any = loaded.model
    drawn = continuing.generate(**given, max_new_tokens=tokens, **drawing)
    print(loaded.tokenizer.decode(drawn[0], skip_special_tokens=True))


def _check_room(given: int, tokens: int, limit: int) -> None:
    if not given:
        raise ValueError("--prompt has no tokens, so that there is nothing to continue; give some")
    if given + tokens > limit:
        raise ValueError(
            f"a prompt of {given} tokens and {tokens} more are beyond the {limit} that the model "
            "has positions for; use fewer --tokens or a shorter --prompt"
        )


def export(
    model: str,
    out: Path,
    format: Literal["folder", "gguf"] = "folder",
    dtype: Literal["float32", "bfloat16", "float16"] = "float16",
    ternary: Literal["tq2_0", "tq1_0"] = "tq2_0",
    dequantize: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a packed model as a plain folder of transformers, or as GGUF.

    The folder has dequantized weights. GGUF keeps codes and scales, in types that hold them
    exactly; layers that none holds are refused.

    Args:
        model: A packed folder.
        out: The folder, or the file of GGUF; made at once or not at all.
        format: Which of the two.
        dtype: What the weights are rounded to; of GGUF: embeddings and the head.
        ternary: Type of symmetric ternary weights in GGUF: 2.06 bits and quick, or 1.69 bits.
        dequantize: In GGUF, write layers that no type holds as floats, instead of refusing.
        overwrite: Replace what an earlier export wrote.

    Raises:
        ValueError: if the model is not packed, numbers are beyond the dtype, or GGUF does not hold
            a layer.
        OSError: if the folder is in use or cannot be written.
    """
    _check_export(model, out, out / "config.json" if format == "folder" else out, overwrite)
    loaded = load_llm(model, dtype=torch.float32)
    if getattr(loaded.model, "hf_quantizer", None) is None:
        raise ValueError(f"{model} is not packed, so that there is nothing to export")
    if format == "gguf":
        saved = write_gguf(
            loaded.model, loaded.tokenizer, out, Options(dtype, ternary, dequantize), name=out.stem
        )
        types = ", ".join(f"{count} {name}" for name, count in saved.types.items())
        told = f"layers: {types}, {saved.bits:.3f} bits per weight, each as it is decoded"
        print(f"{out}: {saved.bytes / 1e6:.2f} MB; {told}")
        return
    size = _export_folder(loaded, out, getattr(torch, dtype))
    print(f"{out}: {size / 1e6:.2f} MB in {dtype}, every weight as it is decoded")


def _check_export(model: str, out: Path, known: Path, overwrite: bool) -> None:
    """Refuse a place where something is that no earlier export wrote, or the model itself."""
    if out.exists() and out.resolve() == Path(model).resolve():
        raise FileExistsError(f"{out} exists; choose another place than the packed model's own")
    if out.exists() and not known.is_file():
        raise FileExistsError(f"{out} exists; choose another place, for no export wrote it")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another place, or add --overwrite")
    check_place(out)


def _export_folder(loaded: LoadedLLM, out: Path, dtype: torch.dtype) -> int:
    """Write dequantized weights; returns their bytes."""
    quantized: Any = loaded.model
    plain = quantized.dequantize(torch.float32).to(dtype)
    _check_plain(plain)
    for name, parameter in plain.named_parameters():
        if not is_finite(parameter):
            raise ValueError(f"{name} holds numbers beyond {dtype}; use another --dtype")
    with written_folder(out) as place:
        plain.save_pretrained(place)
        loaded.tokenizer.save_pretrained(place)
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def _check_plain(model: Any) -> None:
    """Refuse parameters that the model's own class lacks: its loader would drop them."""
    with torch.device("meta"):
        own = type(model)(model.config).state_dict().keys()
    extra = [name for name in model.state_dict() if name not in own]
    if extra:
        raise ValueError(
            f"{extra[0]} ({len(extra)} such) has no place in a plain {type(model).__name__}, and "
            "transformers would drop it; keep the packed folder, or quantize without it (d2quant: "
            "correction false and final_correction false)"
        )


def _limit(memory_gb: float | None) -> int | None:
    if memory_gb is None:
        return None
    if not memory_gb > 0:
        raise ValueError(f"--memory_gb {memory_gb:g} is no room; give what the run may take")
    return int(memory_gb * 1e9)


def _decode(model: Any, wanted: bool | None) -> None:
    """Decode a packed model once, and say what that takes."""
    told = decode_(model, wanted)
    if told.packed:
        sizes = f"{told.packed / 1e6:.1f} MB of codes, {told.decoded / 1e6:.1f} MB decoded"
        how = "decoded once" if told.done else "decoded at every call"
        dtype = str(model.dtype).removeprefix("torch.")
        # Where a continued text is piped, it goes alone.
        print(f"weights are {how} ({sizes} in {dtype})", file=sys.stderr)


def _print_table(rows: Sequence[LayerRow]) -> None:
    width = max(len(row.name) for row in rows)
    print(f"{'layer':<{width}}  nominal  effective  error")
    for row in rows:
        print(
            f"{row.name:<{width}}  {row.weight_bits:7.3f}  {row.effective_weight_bits:9.3f}  "
            f"{row.error:.4g}"
        )
