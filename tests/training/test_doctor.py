"""The report on this machine, and on configs that could not run here."""

import json
import subprocess
import sys

import pytest

from cosmos_mcore.config import RunConfig
from cosmos_mcore.training.doctor import FAILS, LIMITS, OK, _of_config, examine
from tests.processes import ROOT, environment


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    config = RunConfig()
    config.data.path = str(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"")
    return config


def test_everything_is_looked_at_and_tried():
    found = {finding.name: finding for finding in examine()}
    assert {"Python", "torch", "Megatron-Core", "memory", "disk", "matrix product", "decoding a clip"} <= set(found)
    assert all(finding.status in (OK, LIMITS) for finding in found.values())
    assert all(finding.mend for finding in found.values() if finding.status == LIMITS)
    assert found["decoding a clip"].found == "17 frames with PyAVDecoder" or found["GPU 0"]


@pytest.mark.parametrize(
    ("section", "key", "value", "name"),
    [
        ("data", "path", "/nowhere", "config"),
        ("precision", "fp8", "delayed", "precision.fp8"),
        ("data", "decoder", "dali", "data.decoder=dali"),
    ],
)
@pytest.mark.parametrize("installed", [None, "1.0"])  # which is of no use without a GPU
def test_a_config_that_could_not_run_here(config, monkeypatch, section, key, value, name, installed):
    monkeypatch.setattr("cosmos_mcore.training.doctor._trials", list)
    monkeypatch.setattr("cosmos_mcore.training.doctor._version", lambda *_: installed)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not [finding for finding in examine(config) if finding.status == FAILS]
    setattr(getattr(config, section), key, value)
    assert [finding.name for finding in examine(config) if finding.status == FAILS] == [name]


@pytest.mark.parametrize(("recipe", "engine", "wrong"), [
    (None, "2.20.2", []), ("delayed", "2.20.2", []), ("mxfp8", "2.20.2", ["precision.fp8"]), (None, None, ["layers"]),
])  # fmt: skip
def test_what_a_config_needs_of_an_h100(config, monkeypatch, recipe, engine, wrong):
    monkeypatch.setattr("cosmos_mcore.training.doctor._version", lambda *_: engine)
    for name, value in {
        "is_available": True, "device_count": 1, "get_device_capability": (9, 0), "get_device_name": "NVIDIA H100",
    }.items():  # fmt: skip
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    config.precision.fp8 = recipe
    assert [finding.name for finding in _of_config(config) if finding.status == FAILS] == wrong


def test_the_script(tmp_path):
    command = [sys.executable, "scripts/doctor.py", "--json", "conf/tiny_cpu.yaml", f"data.path={tmp_path / 'none'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert [finding["name"] for finding in json.loads(done.stdout) if finding["status"] == FAILS] == ["config"]
