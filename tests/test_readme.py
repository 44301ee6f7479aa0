"""Every command of the README runs, made short."""

import re
import shlex
from pathlib import Path

import pytest
from readme_command import README, command

from dit_qat.cli.main import main

ROOT = Path(__file__).parent.parent

SHORTER = {
    "demo": ["--steps", "3", "--samples", "16", "--sampling_steps", "2"],
    "sample": ["--num", "16", "--sampler.steps", "2"],
}
QUICK_FIT = ["--samples.every_n_steps", "0", "--trainer.limit_val_batches", "0"]


def program_lines() -> list[list[str]]:
    """The arguments of every ``dit-qat`` line in the README's shell blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
    lines = [part.strip() for block in blocks for part in re.split(r"\n|&&", block)]
    programs = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in programs if words and words[0].endswith("dit-qat")]


def test_the_readme_names_every_verb() -> None:
    assert {words[0] for words in program_lines()} >= {
        "demo",
        "fit",
        "validate",
        "sample",
        "evaluate",
        "inspect",
    }


def test_ci_runs_the_test_command() -> None:
    assert "readme_command.py tests" in (ROOT / ".ci" / "run").read_text()
    assert command("tests").endswith("pytest -q")
    assert "-m venv" in command("tests")
    assert "-m venv" in command("demo")
    with pytest.raises(ValueError, match="no command 'deploy'"):
        command("deploy")


@pytest.mark.filterwarnings("ignore:FD-digits from")
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    steps = 2
    for words in program_lines():
        extra = SHORTER.get(words[0], [])
        if words[0] == "fit":
            extra = [*QUICK_FIT, "--trainer.max_steps", str(steps)]
            steps += 2
        assert main([*words, *extra]) == 0, words
    for result in ("demo/report.html", "demo/metrics.json", "samples/grid.png", "scores"):
        assert (tmp_path / result).exists(), result


def test_the_python_example_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    scope: dict[str, object] = {}
    exec(block, scope)
    assert "QuantLinear" in str(scope["network"])
