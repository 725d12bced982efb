"""The command lines of the tools, as users run them."""

import subprocess
import sys

import pytest
import torch

from tests.checkpoint.models import random_weights, reduced, save_model
from tests.processes import ROOT, environment


def run(script, *arguments):
    """Exit code, output, errors."""
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    return result.returncode, result.stdout, result.stderr


def test_shard_and_merge_with_the_original_flags(tmp_path):
    model = save_model(tmp_path / "model.pt", random_weights(reduced("12b")))
    code, output, _ = run("shard_autoregressive_base_checkpoints.py", "-c", model, "-t", 4)
    assert code == 0
    assert output.split() == [str(tmp_path / f"model_model_mp_{rank}.pt") for rank in range(4)]
    arguments = ("--checkpoint_path", model, "--output_path", tmp_path / "merged.pt", "--tensor_parallel_size", 4)
    code, output, _ = run("merge_autoregressive_tp_checkpoints.py", *arguments, "--model_family", "cosmos")
    assert code == 0 and output.split() == [str(tmp_path / "merged.pt")]
    one, other = (torch.load(path, weights_only=True) for path in (model, tmp_path / "merged.pt"))
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_damaged_tensor_is_one_line(tmp_path):
    model = save_model(tmp_path / "model.pt", random_weights(reduced("4b")))
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    code, _, errors = run("convert_checkpoint.py", "--input", model, "--output", tmp_path / "x.pt", "--to", "te")
    assert code == 2
    assert "does not match its checksum" in errors and len(errors.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_convert_and_verify_in_place(tmp_path):
    # The shards lie beside model.pt, so verifying must not take model.pt itself for the output.
    model = save_model(tmp_path / "model.pt", random_weights(reduced("4b")))
    arguments = ("--input", model, "--output", model, "--to", "mp", "--tensor_parallel_size", 2, "--verify")
    code, output, _ = run("convert_checkpoint.py", *arguments)
    assert code == 0
    assert [line.split()[:2] for line in output.splitlines() if line.startswith(("input", "output"))] == [
        ["input", "monolithic"],
        ["output", "mp"],
    ]
    assert output.splitlines()[-1].split() == ["result", "equal"]


@pytest.mark.parametrize(
    ("to", "size", "form"), [("monolithic", 1, "plain"), ("mp", 2, "prefixed"), ("safetensors", 1, "prefixed")]
)
def test_verify_needs_the_input_afterwards(tmp_path, to, size, form):
    """Where the output took its place, it would be compared with itself."""
    model = save_model(tmp_path / "model.pt", random_weights(reduced("4b")))
    if to == "mp":
        code, *_ = run("shard_autoregressive_base_checkpoints.py", "-c", model, "-t", 4)
        model.unlink()
    elif to == "safetensors":
        code, *_ = run("convert_checkpoint.py", "--input", model, "--output", tmp_path / "hub", "--to", to)
        model = tmp_path / "hub"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = ("--input", model, "--output", model, "--to", to, "--tensor_parallel_size", size, "--form", form)
    code, _, errors = run("convert_checkpoint.py", *arguments, "--force", "--verify")
    assert code == 2 and "--verify compares with the input" in errors and len(errors.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("shard_autoregressive_base_checkpoints.py", ("-c", "{m}", "-t", 2, "-s", "4b"), "is not a 4b model"),
        ("merge_autoregressive_tp_checkpoints.py", ("-c", "{m}", "-o", "x.pt", "-t", 2), "model_model_mp_0.pt"),
        ("convert_checkpoint.py", ("--input", "{m}", "--output", "{m}", "--to", "monolithic"), "exists already"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, script, arguments, message):
    model = save_model(tmp_path / "model.pt", random_weights(reduced("4b")))
    code, _, errors = run(script, *(str(argument).format(m=model) for argument in arguments))
    assert code == 2
    assert message in errors and len(errors.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
