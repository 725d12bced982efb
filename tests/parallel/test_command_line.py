"""Exit codes and what the user reads after an error."""

import pytest

from cosmos_mcore.config.schema import ModelConfig
from cosmos_mcore.model.presets import resolve_arch
from cosmos_mcore.parallel import command_line
from cosmos_mcore.parallel.command_line import run_command


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
