"""``dit-qat VERB``: find the verb, run it, and turn user errors into one line and exit code 2."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module

from dit_qat import __version__

__all__ = ["main"]

_BOILERPLATE = (
    "Does not validate against any of the Union subtypes",
    "Subtypes: ",
    "Errors:",
    "- Expected a <class 'NoneType'>",
    "Given value type: ",
    "Given value: Namespace(",
)

USER_ERROR = 2
INTERRUPTED = 130


@dataclass(frozen=True)
class Verb:
    """One command.

    Attributes:
        summary: One line for ``dit-qat --help``.
        module: Where the function of the verb's name lives; None for Lightning's verbs.
        inner: Summaries of the verbs that follow this one, whose functions are there instead.
    """

    summary: str
    module: str | None = None
    inner: Mapping[str, str] = field(default_factory=dict)


VERBS = {
    "demo": Verb("The whole story on the embedded digits, in minutes on a CPU", "dit_qat.cli.demo"),
    "fit": Verb("Train a float or a quantized DiT; --ckpt_path last continues a run"),
    "validate": Verb("Loss on the validation data, with the EMA weights of a checkpoint"),
    "test": Verb("Loss on the test data, with the EMA weights of a checkpoint"),
    "cache-latents": Verb(
        "Images to latents on disk: VAE moments of both mirrors", "dit_qat.cli.cache_latents"
    ),
    "sample": Verb("Draw images from a checkpoint or from float weights", "dit_qat.cli.sample"),
    "evaluate": Verb(
        "Score images against real ones: FID, sFID, IS, KID, precision, recall",
        "dit_qat.cli.evaluate",
    ),
    "convert": Verb(
        "Between published .pt files, ours, and diffusers' folders", "dit_qat.cli.convert"
    ),
    "allocate": Verb(
        "Score the layers of a checkpoint; activation bits by layer (AMPN)", "dit_qat.cli.allocate"
    ),
    "ptq": Verb("Quantize a trained DiT or pipeline, with a report", "dit_qat.cli.ptq"),
    "export": Verb("Pack a quantized checkpoint into a small folder", "dit_qat.cli.export"),
    "inspect": Verb("Layers, bits and sizes of a checkpoint or of weights", "dit_qat.cli.inspect"),
    "llm": Verb(
        "Language models: quantize, evaluate, generate, export",
        "dit_qat.cli.llm",
        {
            "quantize": "Quantize a language model block by block into a packed folder",
            "evaluate": "Measure perplexity on a text, and accuracy in zero-shot tasks",
            "generate": "Continue a text",
            "export": "Write a packed model as a plain folder of transformers, or as GGUF",
        },
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; return the exit code: 0, 2 for a user's error, 128 + the number of a signal.

    With ``DIT_QAT_DEBUG=1`` in the environment, errors keep their traceback.

    Args:
        arguments: Verb first; by default those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if given[0] == "--version":
        print(f"dit-qat {__version__}")
        return 0
    verb = given[0]
    if verb not in VERBS:
        return _fail("dit-qat", _unknown(verb, VERBS))
    inner = VERBS[verb].inner
    if inner and (len(given) < 2 or given[1] in ("-h", "--help")):
        print(_listing(f"dit-qat {verb}", inner))
        return 0
    if inner and given[1] not in inner:
        return _fail(f"dit-qat {verb}", _unknown(given[1], inner))
    try:
        return _run(verb, given[1:])
    except KeyboardInterrupt:
        print(f"dit-qat {verb}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as ended:  # argparse's way out of --help, and Lightning's of a second Ctrl-C
        if isinstance(ended.__context__, KeyboardInterrupt):
            print(f"dit-qat {verb}: interrupted", file=sys.stderr)
            return INTERRUPTED
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Exception as error:
        if os.environ.get("DIT_QAT_DEBUG") == "1" or not _is_users(error):
            raise
        return _fail(f"dit-qat {verb}", str(error))


def _run(verb: str, arguments: list[str]) -> int:
    from dit_qat.cli.quiet import silence_known_noise

    silence_known_noise()
    module = VERBS[verb].module
    if module is None:
        from dit_qat.cli.training import run_training

        return run_training([verb, *arguments])
    from dit_qat.cli.verbs import run_function

    names = [verb]
    if VERBS[verb].inner:
        names.append(arguments[0])
        arguments = arguments[1:]
    function = getattr(import_module(module), names[-1].replace("-", "_"))
    run_function(function, f"dit-qat {' '.join(names)}", arguments)
    return 0


def _is_users(error: Exception) -> bool:
    """Whether the message alone tells the user what to change."""
    from argparse import ArgumentError

    from lightning_fabric.utilities.exceptions import MisconfigurationException

    from dit_qat.dit.training import NonFiniteLossError

    kinds = (ArgumentError, ValueError, OSError, MisconfigurationException, NonFiniteLossError)
    return isinstance(error, kinds)


def _fail(program: str, message: str) -> int:
    print(f"{program}: error: {_readable(message)}", file=sys.stderr)
    return USER_ERROR


def _readable(message: str) -> str:
    """Cut jsonargparse's account of every alternative that it tried down to what went wrong."""
    lines = [line for line in message.splitlines() if not line.strip().startswith(_BOILERPLATE)]
    return "\n".join(lines).strip().removeprefix("- ") if lines else message


def _unknown(verb: str, known: Iterable[str]) -> str:
    known = list(known)
    near = get_close_matches(verb, known, n=3) or known
    return f"there is no verb {verb!r}; near names: {', '.join(near)} (dit-qat --help lists all)"


def _overview() -> str:
    about = (
        "Train, sample and score diffusion transformers at 1.58-bit weights and 2-4 bit",
        "activations; quantize language models to 0.55-3 bits.",
        "",
    )
    summaries = {name: verb.summary for name, verb in VERBS.items()}
    return _listing("dit-qat", summaries, "[--help] [--version] VERB ...", about)


def _listing(
    program: str,
    summaries: Mapping[str, str],
    usage: str = "[--help] VERB ...",
    about: Iterable[str] = (),
) -> str:
    width = max(map(len, summaries))
    return "\n".join(
        [
            f"usage: {program} {usage}",
            "",
            *about,
            "verbs:",
            *(f"  {name:<{width}}  {summary}" for name, summary in summaries.items()),
            "",
            f"{program} VERB --help lists a verb's options; every verb takes --config FILE.yaml",
            "and --print_config.",
        ]
    )
