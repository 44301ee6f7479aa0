"""Processor time and memory of methods for language models: one layer, tokens, a Llama-7B block.

``layer``: a weight of 4096 x 4096 with its second moment given. Peak memory is what a process of
its own takes beyond what stood before (interpreter, weight, second moment), over the weight's bytes
in float32. ``tokens``: the same, the second moment coming from few tokens or many. ``block``: a
block of Llama-7B's shape with random weights, quantized as ``dit-qat llm quantize`` does it, on two
numbers of tokens; the cost that grows with tokens and the one that does not give the projection to
128 windows of 2048 tokens and 32 blocks.
"""

import argparse
import json
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from ptq_cost import forget_peak, memory
from torch import Tensor

from dit_qat.calibration import Method
from dit_qat.llm.methods import (
    ARB,
    GPTQ,
    PT2,
    ARBConfig,
    BiLLMConfig,
    D2QuantConfig,
    GPTAQConfig,
    GPTQConfig,
    PBLLMConfig,
    PBS2PConfig,
    PT2Config,
    SliMConfig,
    STBLLMConfig,
    arb,
    billm,
    d2quant,
    gptaq,
    gptq,
    pb_llm,
    pbs2p,
    pt2,
    slim,
    stbllm,
)
from dit_qat.llm.quantize import quantize_llm
from dit_qat.primitives.second_moment import SecondMoment

LIMITS = {"arb_rc": 60, "pt2": 40, "gptq": 20}  # seconds on two cores
MEMORY_LIMIT = 6  # times the weight in float32
BLOCKS, PROTOCOL_TOKENS = 32, 128 * 2048  # of Llama-7B, and of the papers' calibration


def weight_and_moment(size: int, tokens: int) -> tuple[Tensor, SecondMoment]:
    """A random weight (size, size), and the second moment of correlated tokens."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) * 0.02
    gains = torch.randn(size, generator=generator).mul(0.8).exp()
    mixing = torch.randn(64, size, generator=generator) / 8
    moment = SecondMoment(size)
    for _ in range(-(-tokens // 1024)):
        own = torch.randn(1024, size, generator=generator)
        moment.add((own + torch.randn(1024, 64, generator=generator) @ mixing) * gains)
    return weight, moment


def solvers() -> dict[str, Callable[[Tensor, SecondMoment], object]]:
    """What quantizes one weight, by name of method and preset."""
    found: dict[str, Callable[[Tensor, SecondMoment], object]] = {
        "gptq": lambda w, h: gptq.quantize_weight(w, h, GPTQConfig()),
        "gptaq": lambda w, h: gptaq.quantize_weight(w, h, h.matrix, GPTAQConfig(strength=0.02)),
        "slim": lambda w, h: slim.quantize_weight(w, h, SliMConfig(), torch.randn(256, len(w))),
    }
    for preset in ("paper", "exact"):
        end = "" if preset == "paper" else "_exact"
        configs: dict[str, Any] = {
            "pt2": (pt2.quantize_weight, PT2Config(preset=preset)),
            "d2quant_down": (d2quant.quantize_weight, D2QuantConfig(preset=preset)),
            "billm": (billm.quantize_weight, BiLLMConfig(preset=preset)),
            "pb_llm": (pb_llm.quantize_weight, PBLLMConfig(preset=preset)),
            "arb_x": (arb.quantize_weight, ARBConfig(variant="arb_x", preset=preset)),
            "arb_rc": (arb.quantize_weight, ARBConfig(variant="arb_rc", preset=preset)),
        }
        for name, (solve, config) in configs.items():
            found[name + end] = lambda w, h, s=solve, c=config: s(w, h, c)  # type: ignore[misc]
        pruned: dict[str, Any] = {
            "stbllm": (stbllm.quantize_weight, STBLLMConfig(preset=preset)),
            "pbs2p": (pbs2p.quantize_weight, PBS2PConfig(preset=preset)),
        }
        for name, (solve, config) in pruned.items():
            found[name + end] = lambda w, h, s=solve, c=config: s(w, h, c, c.kept)  # type: ignore[misc]
    return found


def layer(name: str, size: int, tokens: int, threads: int) -> dict[str, float]:
    """One cell, in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_layer, (name, size, tokens, threads))


def measure_layer(name: str, size: int, tokens: int, threads: int) -> dict[str, float]:
    """Time and memory of one weight."""
    torch.set_num_threads(threads)
    solve = solvers()[name]
    solve(*weight_and_moment(256, 512))  # what only the first call of a process pays
    weight, moment = weight_and_moment(size, tokens)
    forget_peak()
    before = memory("VmRSS")
    wall, started = time.perf_counter(), time.process_time()
    solve(weight, moment)
    found = {
        "processor_seconds": time.process_time() - started,
        "seconds": time.perf_counter() - wall,
    }
    if before is not None:
        found["memory"] = ((memory("VmHWM") or 0) - before) / weight.nbytes
    return found


BLOCK_METHODS: dict[str, Callable[[], Method]] = {
    "gptq": lambda: GPTQ(bits=2),
    "pt2": lambda: PT2(preset="paper"),
    "arb_rc": lambda: ARB(variant="arb_rc", preset="paper"),
}


def block(name: str, tokens: tuple[int, int], threads: int) -> dict[str, float]:
    """A block of Llama-7B's shape on two numbers of tokens, and what they project to."""
    few, many = (_block_seconds(name, count, threads) for count in tokens)
    per_token = max(0.0, (many - few) / (tokens[1] - tokens[0]))
    fixed = few - per_token * tokens[0]
    whole = fixed + per_token * PROTOCOL_TOKENS
    return {
        "seconds_few": few,
        "seconds_many": many,
        "per_1000_tokens": 1000 * per_token,
        "fixed": fixed,
        "protocol_block": whole,
        "protocol_model_hours": BLOCKS * whole / 3600,
    }


def _block_seconds(name: str, tokens: int, threads: int) -> float:
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_block, (name, tokens, threads))


def measure_block(name: str, tokens: int, threads: int) -> float:
    """Processor seconds of quantizing one block on windows of 512 tokens."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=1,
        num_attention_heads=32,
        max_position_embeddings=2048,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    windows = torch.randint(256, (tokens // 512, 512))
    started = time.process_time()
    quantize_llm(model, BLOCK_METHODS[name](), windows)
    return time.process_time() - started


def layer_table(found: dict[str, dict[str, float]]) -> str:
    """One row per method, against GPTQ's time where it was measured."""
    lines = [
        "| method | processor seconds | of GPTQ's | memory, of the weight | within the limit |",
        "|---|---|---|---|---|",
    ]
    base = found.get("gptq", {}).get("processor_seconds")
    for name, run in sorted(found.items(), key=lambda item: item[1]["processor_seconds"]):
        seconds, room = run["processor_seconds"], run.get("memory")
        limit = LIMITS.get(name.removesuffix("_exact"))
        fits = seconds <= (limit or seconds) and (room or 0) <= MEMORY_LIMIT
        ratio = f"{seconds / base:.1f}" if base else ""
        lines.append(
            f"| {name} | {seconds:.1f} | {ratio} | {'' if room is None else f'{room:.2f}'} | "
            f"{'yes' if fits else 'no'}{f' ({limit} s)' if limit else ''} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["layer", "tokens", "block"])
    names = [*solvers()]
    parser.add_argument("--methods", nargs="+", help="of one layer: " + ", ".join(names))
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs=2, help="few and many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    known = [*BLOCK_METHODS] if arguments.what == "block" else names
    chosen = arguments.methods or known
    if unknown := sorted({*chosen} - {*known}):
        parser.error(f"--methods {' '.join(unknown)}: choose among {', '.join(known)}")
    found = run_all(arguments, chosen)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def run_all(arguments: argparse.Namespace, chosen: list[str]) -> dict[str, Any]:
    """Measure, and print as it comes."""
    found: dict[str, Any] = {}
    size, threads = arguments.size, arguments.threads
    for name in chosen:
        if arguments.what == "layer":
            found[name] = layer(name, size, (arguments.tokens or [2 * size])[0], threads)
        elif arguments.what == "tokens":
            few, many = arguments.tokens or (2 * size, 16 * size)
            runs = [layer(name, size, t, threads)["processor_seconds"] for t in (few, many)]
            found[name] = {"few": runs[0], "many": runs[1], "ratio": runs[1] / runs[0]}
        else:
            few, many = arguments.tokens or (1024, 3072)
            found[name] = block(name, (few, many), threads)
        print(name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
    if arguments.what == "layer":
        print(layer_table(found))
    return found


if __name__ == "__main__":
    main()
