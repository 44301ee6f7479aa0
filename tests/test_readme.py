"""Every command of the README runs, made short; those on other pages are spelled right."""

import re
import shlex
from functools import wraps
from importlib import import_module
from pathlib import Path

import pytest
from readme_command import README, command

from dit_qat.cli.main import VERBS, main
from dit_qat.cli.training import TrainingCLI, run_training
from dit_qat.cli.verbs import run_function

ROOT = Path(__file__).parent.parent

SHORTER = {
    "demo": ["--steps", "3", "--samples", "16", "--sampling_steps", "2"],
    "sample": ["--num", "16", "--sampler.steps", "2"],
    "ptq": [
        *("--calibration.images", "8", "--calibration.steps", "2", "--sampler.steps", "3"),
        *("--evaluation.images", "4", "--evaluation.samples", "16"),
    ],
    "llm quantize": ["--windows", "4", "--length", "64"],
    "llm evaluate": ["--windows", "4"],
    "llm generate": ["--tokens", "4"],
}
QUICK_FIT = ["--samples.every_n_steps", "0", "--trainer.limit_val_batches", "0"]


def program_lines(page: Path, runnable: bool) -> list[list[str]]:
    """The arguments of every ``dit-qat`` line in a page's shell blocks, in order."""
    blocks = re.findall(r"(<!-- needs .*?-->\n)?```bash\n(.*?)```", page.read_text(), re.DOTALL)
    text = "\n".join(block for needs, block in blocks if not (runnable and needs))
    lines = [part.strip() for part in re.split(r"\n|&&", text.replace("\\\n", " "))]
    programs = [shlex.split(line, comments=True) for line in lines]
    found = []
    for words in programs:
        names = [index for index, word in enumerate(words) if re.search(r"dit[-_]qat$", word)]
        found += [words[names[0] + 1 :]] if names and words[0] != "pip" else []
    return found


def test_the_readme_names_every_verb() -> None:
    assert {words[0] for words in program_lines(README, runnable=False)} >= {*VERBS} - {"test"}


def test_ci_runs_the_test_command() -> None:
    assert "readme_command.py tests" in (ROOT / ".ci" / "run").read_text()
    assert command("tests").endswith("pytest -q -n 2 --dist worksteal")
    assert "-m venv" in command("tests")
    assert "-m venv" in command("demo")
    with pytest.raises(ValueError, match="no command 'deploy'"):
        command("deploy")


@pytest.mark.filterwarnings("ignore:FD-digits from")
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    steps = 2
    for words in program_lines(README, runnable=True):
        verb = " ".join(words[:2]) if VERBS[words[0]].inner else words[0]
        extra = SHORTER.get(verb, [])
        if words[0] == "fit":
            extra = [*QUICK_FIT, "--trainer.max_steps", str(steps)]
            steps += 2
        assert main([*words, *extra]) == 0, words
    for result in (
        "demo/report.html",
        "demo/metrics.json",
        "samples/grid.png",
        "scores",
        "runs/llm/pt2_tiny_plain",
    ):
        assert (tmp_path / result).exists(), result


class Parsed(Exception):  # noqa: N818
    """A command has read its options."""


def stop(*_: object, **__: object) -> None:
    raise Parsed


def parse(words: list[str]) -> None:
    """Let a command read its options, and stop before it does anything."""
    verb = VERBS[words[0]]
    if verb.module is None:
        run_training(words)
        return
    name, *options = words[1:] if verb.inner else words
    function = getattr(import_module(verb.module), name.replace("-", "_"))
    run_function(wraps(function)(stop), "dit-qat", options)


@pytest.mark.parametrize("page", [README, *sorted(ROOT.glob("docs/*.md"))], ids=lambda p: p.name)
def test_every_command_is_spelled_right(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(TrainingCLI, "before_instantiate_classes", stop)
    for words in program_lines(page, runnable=False):
        given = [word.replace("CONFIG", "configs/digits/float.yaml") for word in words]
        with pytest.raises(Parsed):
            parse(given)


def test_the_python_example_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    scope: dict[str, object] = {}
    exec(block, scope)
    assert "QuantLinear" in str(scope["network"])
