"""Exit codes and what the user reads after an error."""

import subprocess
import sys

import pytest

from cosmos_mcore.config.schema import ModelConfig
from cosmos_mcore.model.presets import resolve_arch
from cosmos_mcore.parallel import command_line
from cosmos_mcore.parallel.command_line import run_command
from tests.processes import environment


@pytest.fixture(autouse=True)
def rank_zero(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def users_mistake(arguments):
    resolve_arch(ModelConfig(preset=arguments[0]))
    raise AssertionError("no error")


def our_bug(arguments):
    raise ValueError(f"{arguments} from outside the package")


def interrupted(arguments):
    raise KeyboardInterrupt


def ended(command, capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        run_command(command, arguments)
    return caught.value.code, capsys.readouterr().err


def test_the_code_that_a_command_returns(capsys):
    assert ended(len, capsys, "a", "b", "c") == (3, "")


def test_a_users_mistake_is_one_line(capsys):
    code, text = ended(users_mistake, capsys, "nonsense")
    assert code == 2
    assert text.startswith("error: model.preset=nonsense is unknown") and text.count("\n") == 1


def test_any_other_error_keeps_its_traceback(capsys):
    code, text = ended(our_bug, capsys, "x")
    assert code == 1
    assert "Traceback" in text and "our_bug" in text


def test_interrupt(capsys):
    assert ended(interrupted, capsys) == (130, "")


def test_other_ranks_let_rank_zero_speak_first(capsys, monkeypatch):
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(command_line.time, "sleep", waited.append)
    code, text = ended(users_mistake, capsys, "nonsense")
    assert waited and code == 2 and text.startswith("error: ")


def test_a_file_name_that_is_not_text_can_be_told():
    """Names of files are bytes; where the terminal's language is not C, writing such a one raises."""
    code = (
        "import logging; from cosmos_mcore.parallel.command_line import configure_logging; configure_logging(); "
        "logging.getLogger('cosmos_mcore').warning('skipped %s', b'clip\\xff.mp4'.decode('utf-8', 'surrogateescape'))"
    )
    strict = environment(PYTHONIOENCODING="utf-8:strict")
    result = subprocess.run([sys.executable, "-c", code], env=strict, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("skipped clip\\udcff.mp4\n", "")
