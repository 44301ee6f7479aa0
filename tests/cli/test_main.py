import errno
import subprocess
import sys

import pytest

import dit_qat
from dit_qat.cli.main import VERBS, main
from dit_qat.cli.verbs import spell_out


def test_help_lists_every_verb_without_torch():
    code = (
        "import sys; from dit_qat.cli.main import main; code = main(['--help']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == list(VERBS)
    assert {"demo", "fit", "cache-latents", "sample", "evaluate", "convert"} < set(listed)


def test_no_verb_shows_the_help(capsys):
    assert main([]) == 0
    assert "verbs:" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dit-qat {dit_qat.__version__}\n"


def test_unknown_verb_names_near_ones(capsys):
    assert main(["smaple"]) == 2
    message = capsys.readouterr().err
    assert "'smaple'" in message
    assert "sample" in message
    assert "fit" not in message.split("near names:")[1]


@pytest.mark.parametrize("verb", ["fit", "sample", "evaluate", "inspect"])
def test_every_verb_has_help(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--config" in text
    assert "--print_config" in text


def test_abbreviated_options_are_refused(refused, config):
    assert "--trainer.max_step" in refused("fit", "--config", config, "--trainer.max_step", 3)
    assert "--weight" in refused("inspect", "--weight", "digits")


def test_printed_configuration_can_be_read_back(capsys, tmp_path):
    path = tmp_path / "sample.yaml"
    assert main(["sample", "--out", "x", "--sampler.steps", "7", "--print_config"]) == 0
    path.write_text(capsys.readouterr().out)
    assert "steps: 7" in path.read_text()
    assert main(["sample", "--config", str(path), "--print_config"]) == 0
    assert capsys.readouterr().out == path.read_text()


def _failing(error: BaseException):
    def evaluate(samples: str = "x") -> None:
        """Fail."""
        raise error

    return evaluate


def test_interruption(monkeypatch, capsys):
    monkeypatch.setattr("dit_qat.cli.evaluate.evaluate", _failing(KeyboardInterrupt()))
    assert main(["evaluate"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_second_interruption_of_a_run(monkeypatch):
    def evaluate() -> None:
        """Leave as Lightning does when a KeyboardInterrupt reaches it."""
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr("dit_qat.cli.evaluate.evaluate", evaluate)
    assert main(["evaluate"]) == 130


def test_full_disk(monkeypatch, refused):
    error = OSError(errno.ENOSPC, "No space left on device", "/full/grid.png")
    monkeypatch.setattr("dit_qat.cli.evaluate.evaluate", _failing(error))
    message = refused("evaluate")
    assert "No space left" in message
    assert "/full/grid.png" in message


def test_debugging_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("DIT_QAT_DEBUG", "1")
    with pytest.raises(ValueError, match="neither is given"):
        main(["inspect"])


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("dit_qat.cli.evaluate.evaluate", _failing(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["evaluate"])


def test_flags_and_lists_are_spelled_out():
    hints = {"npz": bool, "classes": list[int] | None, "out": str}

    def spelled(text: str) -> str:
        return " ".join(spell_out(text.split(), hints))

    assert spelled("--npz --out x") == "--npz true --out x"
    assert spelled("--npz false") == "--npz false"
    assert spelled("--classes 0 1 2 --npz") == "--classes [0,1,2] --npz true"
    assert spelled("--classes [3,4]") == "--classes [3,4]"
    assert spelled("--classes=[3] --npz=true --other 1 2") == (
        "--classes=[3] --npz=true --other 1 2"
    )
