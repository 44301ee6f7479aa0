"""Rebuild the shipped language model: a byte-level Llama trained on Python's standard library.

The text is that of the running Python, so that the calibration and held-out texts ship with the
model. One thread, float32, seeded draws: the same machine and torch version give the same bytes.
Training resumes where its last checkpoint is; ``--steps`` with a smaller number ends it sooner,
for the learning rate is a function of the step and of the number of steps.
"""

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dit_qat.export.files import write_json, written_whole
from dit_qat.llm.data.byte_alphabet import byte_letters

ROOT = Path(__file__).resolve().parent.parent
END = "<|end|>"  # after every file; also what generation stops at
END_ID = 256  # bytes are their own ids
WINDOW = 256
# Tests and generated tables teach little; _sysconfigdata and config-* describe one machine.
SKIPPED = ("test", "tests", "idle_test", "__pycache__", "encodings", "site-packages", "turtledemo")
CALIBRATION_BYTES = 384 * 1024
HELDOUT_BYTES = 256 * 1024
MOST_BYTES_OF_A_FILE = 16 * 1024  # of a calibration or held-out file, for variety
LICENCE = (
    "The calibration and held-out texts are excerpts of the Python standard library, "
    "Copyright (c) 2001 Python Software Foundation, all rights reserved, under the PSF licence "
    "agreement (https://docs.python.org/3/license.html); some files carry notices of their own."
)


@dataclass(frozen=True)
class Training:
    """How the model is trained: batches of random windows, AdamW, a cosine after a warm-up."""

    steps: int
    batch: int = 8
    rate: float = 3e-3
    last_rate: float = 1e-4
    warm_up: int = 100
    decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        done = min((step - self.warm_up) / max(self.steps - self.warm_up, 1), 1.0)
        half = (1 + math.cos(math.pi * done)) / 2
        return self.last_rate + (self.rate - self.last_rate) * half


@dataclass(frozen=True)
class Texts:
    """Training ids (one byte each, END_ID after a file) and the two texts that ship."""

    training: Tensor
    calibration: str
    heldout: str
    files: dict[str, int]


def source_files(library: Path) -> list[Path]:
    """The library's sources, in the order of a hash of their names (any machine has the same)."""
    found = [
        path.relative_to(library)
        for path in library.rglob("*.py")
        if not set(path.relative_to(library).parts) & set(SKIPPED)
        and not path.name.startswith("_sysconfigdata")
        and not path.relative_to(library).parts[0].startswith("config-")
    ]
    return sorted(found, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())


def read_texts(library: Path) -> Texts:
    """Divide the sources: files for calibration, files to hold out, and the rest to train on."""
    names = iter(source_files(library))
    calibration, for_calibration = _take(library, names, CALIBRATION_BYTES)
    heldout, for_heldout = _take(library, names, HELDOUT_BYTES)
    pieces: list[Tensor] = []
    for name in names:
        content = (library / name).read_bytes()
        pieces.append(torch.tensor([*content, END_ID], dtype=torch.int16))
    counts = {
        "training": len(pieces),
        "calibration": for_calibration,
        "heldout": for_heldout,
    }
    return Texts(torch.cat(pieces), calibration, heldout, counts)


def _take(library: Path, names: Iterator[Path], limit: int) -> tuple[str, int]:
    """Up to ``limit`` bytes of text, whole lines of as many files as that takes."""
    text, taken = "", 0
    for name in names:
        lines = (library / name).read_bytes()[:MOST_BYTES_OF_A_FILE].decode("utf-8", "ignore")
        piece = lines[: lines.rfind("\n") + 1]
        if "\r" in piece or len(piece) < 512:  # the text must survive any reader of text files
            continue
        text, taken = text + piece, taken + 1
        if len(text.encode()) >= limit:
            break
    cut = text.encode()[:limit].decode("utf-8", "ignore")
    return cut[: cut.rfind("\n") + 1], taken


def model_config() -> LlamaConfig:
    """2.75 million parameters; every width a multiple of 128."""
    return LlamaConfig(
        vocab_size=END_ID + 1,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the bytes of the text in UTF-8."""
    vocabulary = {letter: byte for byte, letter in enumerate(byte_letters())}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def batch_at(ids: Tensor, training: Training, step: int) -> Tensor:
    """The windows of a step, a function of the seed and the step."""
    generator = torch.Generator().manual_seed(training.seed * 1_000_003 + step)
    starts = torch.randint(len(ids) - WINDOW + 1, (training.batch,), generator=generator)
    return torch.stack([ids[start : start + WINDOW] for start in starts.tolist()]).long()


def bits_per_byte(model: LlamaForCausalLM, text: str, windows: int) -> float:
    """Mean over the first windows of the text, without their first bytes."""
    content = text.encode()
    windows = min(windows, len(content) // WINDOW)
    ids = torch.tensor([*content[: windows * WINDOW]]).view(windows, WINDOW)
    losses = []
    with torch.no_grad():
        for rows in ids.split(16):
            losses.append(model(input_ids=rows, labels=rows).loss * len(rows))
    return float(torch.stack(losses).sum()) / len(ids) / math.log(2)


def make_optimizer(model: LlamaForCausalLM, training: Training) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": training.decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.rate, betas=(0.9, 0.95))


def train(texts: Texts, training: Training, run: Path) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train from the last checkpoint in ``run`` to the last step."""
    torch.manual_seed(training.seed)
    model = LlamaForCausalLM(model_config())
    optimizer = make_optimizer(model, training)
    last = run / "last.pt"
    step, seconds = 0, 0.0
    if last.exists():
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        print(f"resumed at step {step}")
    began = time.process_time() - seconds
    while step < training.steps:
        for group in optimizer.param_groups:
            group["lr"] = training.rate_at(step)
        rows = batch_at(texts.training, training, step)
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            bits = float(loss.detach()) / math.log(2)
            seconds = time.process_time() - began
            print(f"step {step}  bits/byte {bits:.3f}  {seconds:.0f} s of a core", flush=True)
        if step % 100 == 0 or step == training.steps:
            seconds = time.process_time() - began
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            with written_whole(last) as temporary:
                torch.save(state | {"step": step, "seconds": seconds}, temporary)
            print(
                f"step {step}  held-out {bits_per_byte(model, texts.heldout, 32):.4f}", flush=True
            )
    return model.eval(), {"steps": step, "seconds_of_a_core": round(seconds)}


def ship(model: LlamaForCausalLM, texts: Texts, training: Training, run: Any, out: Path) -> None:
    """Write the model folder, the two texts and how they were made."""
    folder = out / "model"
    float32_bits = bits_per_byte(model, texts.heldout, 256)
    model.generation_config.max_new_tokens = 128
    half = model.half()
    half.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # made readable by its owner only
    for name, text in (("calibration.txt", texts.calibration), ("heldout.txt", texts.heldout)):
        with written_whole(out / name) as temporary:
            temporary.write_bytes(text.encode())
    about = {
        "made_by": "tools/build_llm_assets.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "training": vars(training) | {"window": WINDOW} | run,
        "files": texts.files,
        "bytes": {
            "training": len(texts.training),
            "calibration": len(texts.calibration.encode()),
            "heldout": len(texts.heldout.encode()),
        },
        "heldout_bits_per_byte": {
            "float32": round(float32_bits, 4),
            "float16_weights": round(bits_per_byte(half.float(), texts.heldout, 256), 4),
        },
        "licence_of_the_texts": LICENCE,
    }
    write_json(out / "README.json", about)
    print(json.dumps(about, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dit_qat" / "llm" / "assets")
    parser.add_argument("--run", type=Path, default=Path("runs/llm_assets"))
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")))
    arguments = parser.parse_args()
    # The order of floating-point sums depends on the number of threads.
    torch.set_num_threads(1)
    texts = read_texts(arguments.library)
    training = Training(steps=arguments.steps, batch=arguments.batch)
    model, run = train(texts, training, arguments.run)
    ship(model, texts, training, run, arguments.out)


if __name__ == "__main__":
    main()
