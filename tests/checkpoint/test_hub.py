"""Downloads from and uploads to a stand-in for the hub on loopback, by the library that users have."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc

import pytest

pytest.importorskip("huggingface_hub")

from cosmos_mcore.checkpoint.hub import Repository, download, md5
from cosmos_mcore.checkpoint.hub_files import write_safetensors
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.checkpoint.released import COMMON, MODELS, TEXT_ENCODER, download_models
from tests.checkpoint.hub_server import HubServer
from tests.checkpoint.models import random_weights, reduced, save_model
from tests.processes import ROOT, environment

TOKEN = "hf_correct"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def start(hub, tmp_path, code_or_script, *arguments, **changes):
    """Starts a process that talks to the stand-in only."""
    what = [str(ROOT / "scripts" / code_or_script)] if code_or_script.endswith(".py") else ["-c", code_or_script]
    inherited = {name: value for name, value in environment().items() if not name.startswith(("HF_", "HUGGING"))}
    place = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", **changes}
    return subprocess.Popen(
        [sys.executable, *what, *map(str, arguments)],
        env={**inherited, **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, **changes):
    """Exit code, output, errors."""
    process = start(*arguments, **changes)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def downloading(repository, root):
    """A program that downloads one repository."""
    return (
        "from pathlib import Path\nimport sys\nfrom cosmos_mcore.checkpoint.hub import Repository, download\n"
        f"try: print(download({repository!r}, Path({str(root)!r})))\n"
        "except ValueError as error: sys.exit(str(error))\n"
    )


def fetched(hub):
    """Files whose bytes were asked for, with the first byte."""
    pattern = re.compile(r"/resolve/\w+/(.+)")
    ranges = (headers.get("range", "bytes=0-") for _, _, headers in hub.requests)
    return [
        (match[1], int(re.search(r"\d+", asked)[0]))
        for (method, path, _), asked in zip(hub.requests, ranges, strict=True)
        if method == "GET" and (match := pattern.search(path))
    ]


def test_only_the_wanted_files_and_only_once(hub, tmp_path):
    model = os.urandom(50_000)
    hub.files["models/nvidia/M"] = {"model.pt": model, "a/b.jit": b"1", "other.bin": b"2", "../evil.jit": b"3"}
    repository = Repository("nvidia/M", "M", ("model.pt", "*.jit"), {"model.pt": hashlib.md5(model).hexdigest()})
    code = downloading(repository, tmp_path / "ckpt")
    assert run(hub, tmp_path, code)[0] == 0
    folder = tmp_path / "ckpt" / "M"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == ["a/b.jit", "model.pt"]
    assert (folder / "model.pt").read_bytes() == model
    assert not (tmp_path / "ckpt" / "evil.jit").exists()
    hub.requests.clear()
    assert run(hub, tmp_path, code)[:2] == (0, f"{folder}\n")
    assert not fetched(hub)


def test_a_killed_download_goes_on_where_it_stopped(hub, tmp_path):
    model = os.urandom(25_000_000)
    hub.files["models/nvidia/M"] = {"model.pt": model}
    hub.stall_after = 21_000_000
    code = downloading(
        Repository("nvidia/M", "M", ("*",), {"model.pt": hashlib.md5(model).hexdigest()}), tmp_path / "ckpt"
    )
    process = start(hub, tmp_path, code)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size >= 10_000_000 for path in (tmp_path / "ckpt").rglob("*.incomplete")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not (tmp_path / "ckpt" / "M" / "model.pt").exists()
    hub.stall_after = None
    hub.requests.clear()
    assert run(hub, tmp_path, code)[0] == 0
    assert (tmp_path / "ckpt" / "M" / "model.pt").read_bytes() == model
    ((name, first),) = fetched(hub)
    assert name == "model.pt" and first >= 10_000_000
    assert not list((tmp_path / "ckpt").rglob("*.incomplete"))


def test_what_came_first_does_not_hide_that_the_rest_is_missing(hub, tmp_path):
    """A folder with all files of known digests counts as complete, so they come last."""
    weights = os.urandom(1000)
    hub.files["models/google/T"] = {"model.bin": weights, "tokenizer.json": os.urandom(25_000_000)}
    hub.stall_after = 21_000_000
    repository = Repository("google/T", "T", ("*",), {"model.bin": hashlib.md5(weights).hexdigest()})
    process = start(hub, tmp_path, downloading(repository, tmp_path))
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size >= 10_000_000 for path in (tmp_path / "T").glob("tokenizer*.incomplete")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    hub.stall_after = None
    assert run(hub, tmp_path, downloading(repository, tmp_path))[0] == 0
    assert sorted(path.name for path in (tmp_path / "T").iterdir()) == ["model.bin", "tokenizer.json"]


def test_a_folder_that_cannot_be_written_is_one_line(hub, tmp_path):
    hub.files["models/nvidia/M"] = {"model.pt": os.urandom(50_000)}
    code = downloading(Repository("nvidia/M", "M"), tmp_path / "file")
    (tmp_path / "file").touch()
    status, _, errors = run(hub, tmp_path, code)
    assert status == 1 and errors == f"{tmp_path}/file/M cannot be written: Not a directory\n"
    (tmp_path / "file").unlink()
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
    status, _, errors = run(hub, tmp_path, full + code)
    assert status == 1 and errors.splitlines()[-1] == f"{tmp_path}/file/M cannot be written: File too large"
    assert run(hub, tmp_path, code)[0] == 0
    assert [path.name for path in (tmp_path / "file" / "M").iterdir()] == ["model.pt"]


def test_wrong_bytes_never_get_the_name(hub, tmp_path):
    hub.files["models/nvidia/M"] = {"model.pt": b"damaged"}
    repository = Repository("nvidia/M", "M", ("*",), {"model.pt": hashlib.md5(b"released").hexdigest()})
    code, _, errors = run(hub, tmp_path, downloading(repository, tmp_path))
    assert code == 1 and "model.pt was damaged on its way (MD5 differs) and has been removed" in errors
    assert not list((tmp_path / "M").iterdir())
    (tmp_path / "M" / "model.pt").write_bytes(b"my own")
    with pytest.raises(ValueError, match=r"model\.pt is not the released file \(MD5 differs\); move it away"):
        download(repository, tmp_path)
    assert (tmp_path / "M" / "model.pt").read_bytes() == b"my own"
    (tmp_path / "M" / "model.pt").write_bytes(b"released")
    assert download(repository, tmp_path) == tmp_path / "M"  # without asking the hub


@pytest.mark.parametrize("token", [None, "hf_secret_but_wrong"])
def test_a_gated_model_gives_the_three_steps_and_keeps_the_token(hub, tmp_path, token):
    hub.files["models/nvidia/Cosmos-Predict1-4B"] = {"model.pt": b"x"}
    hub.gated.add("models/nvidia/Cosmos-Predict1-4B")
    changes = {"HF_TOKEN": token} if token else {}
    arguments = ("--model_sizes", "4B", "--checkpoint_dir", tmp_path / "ckpt")
    code, output, errors = run(hub, tmp_path, "download_autoregressive_checkpoints.py", *arguments, **changes)
    assert code == 2 and len(errors.strip().splitlines()) == 1
    for part in (
        "1. accept its terms at http",
        "2. make a token with read access at",
        "3. log in with `hf auth login`",
    ):
        assert part in errors
    assert not token or (token not in output + errors)
    assert any(headers.get("authorization") == f"Bearer {token}" for *_, headers in hub.requests) == bool(token)


def test_a_gated_model_with_the_right_token(hub, tmp_path):
    hub.files["models/nvidia/M"] = {"model.pt": b"x"}
    hub.gated.add("models/nvidia/M")
    code = downloading(Repository("nvidia/M", "M"), tmp_path)
    assert run(hub, tmp_path, code, HF_TOKEN=TOKEN)[0] == 0
    assert (tmp_path / "M" / "model.pt").read_bytes() == b"x"


def test_the_cache_serves_without_the_hub(hub, tmp_path):
    hub.files["models/nvidia/M"] = {"model.pt": b"weights", "x.bin": b"no"}
    repository = Repository("nvidia/M", "M", ("*.pt",))
    fill = "import huggingface_hub; huggingface_hub.snapshot_download('nvidia/M')"
    assert run(hub, tmp_path, fill)[0] == 0
    hub.requests.clear()
    assert run(hub, tmp_path, downloading(repository, tmp_path / "a"), HF_HUB_OFFLINE="1")[0] == 0
    assert not hub.requests
    assert run(hub, tmp_path, downloading(repository, tmp_path / "b"))[0] == 0
    assert not fetched(hub)
    for folder in ("a", "b"):
        assert [path.name for path in (tmp_path / folder / "M").iterdir()] == ["model.pt"]
    shutil.rmtree(tmp_path / "hf")
    code, _, errors = run(hub, tmp_path, downloading(repository, tmp_path / "c"), HF_HUB_OFFLINE="1")
    assert code == 1 and "is not complete in the hub's cache on this machine" in errors


def test_no_hub_at_all(tmp_path):
    with HubServer() as hub:
        pass
    code, _, errors = run(hub, tmp_path, downloading(Repository("nvidia/M", "M"), tmp_path))
    assert code == 1 and "could not be downloaded from http://127.0.0.1" in errors and "\n" not in errors.strip()


def test_the_dataset_is_left_ready_for_training(hub, tmp_path):
    name = "nemo_diffusion_example_data/clip_0.mp4"
    hub.files["datasets/nvidia/Cosmos-NeMo-Assets"] = {name: b"video", "t5/embedding.pickle": b"no"}
    arguments = ("download_dataset.py", "--dataset_dir", tmp_path / "data")
    for _ in range(2):
        code, output, _ = run(hub, tmp_path, *arguments)
        assert (code, output) == (0, f"data.path={tmp_path / 'data' / 'videos'}\n")
    assert [path.name for path in (tmp_path / "data").rglob("*") if path.is_file()] == ["clip_0.mp4"]
    assert len(fetched(hub)) == 1


def test_push_with_a_model_card(hub, tmp_path):
    model = save_model(tmp_path / "model.pt", random_weights(reduced("4b")))
    write_safetensors(open_checkpoint(model), tmp_path / "export")
    arguments = ("push_to_hub.py", "--input", tmp_path / "export", "--repo_id", "me/mine")
    code, output, errors = run(hub, tmp_path, *arguments, HF_TOKEN="hf_may_not_write")
    assert code == 2 and "me/mine could not be written (HTTP 401); log in with" in errors
    assert "hf_may_not_write" not in output + errors
    code, output, errors = run(hub, tmp_path, *arguments, HF_TOKEN=TOKEN)
    assert (code, output.strip()) == (0, f"{hub.address}/me/mine")
    assert TOKEN not in output + errors
    files = hub.commits["me/mine"]
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    assert files["model.safetensors"] == (tmp_path / "export" / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: cosmos_mcore\nlicense: other\n")
    assert hashlib.sha256(files["model.safetensors"]).hexdigest() in card
    assert f"{sum(t.numel() for t in random_weights(reduced('4b')).values()):,} in 47 tensors" in card


def test_what_is_released(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("cosmos_mcore.checkpoint.released.download", lambda repository, root: asked.append(repository))
    download_models(["4b"], tmp_path)
    assert asked == [MODELS["4B"], *COMMON]
    asked.clear()
    download_models(["12B", "5B"], tmp_path)
    assert asked == [MODELS["12B"], MODELS["5B"], *COMMON, TEXT_ENCODER]
    with pytest.raises(ValueError, match="--model_sizes 7B is unknown; known: 4B 5B 12B 13B"):
        download_models(["7B"], tmp_path)
    for repository in (*MODELS.values(), *COMMON, TEXT_ENCODER):
        assert all(re.fullmatch("[0-9a-f]{32}", digest) for digest in repository.md5.values())
    assert sum("guardrail" in name for r in (*MODELS.values(), *COMMON) for name in r.md5) == 5


def test_md5_streams(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.write(os.urandom(1_000_000))
        file.truncate(150_000_000)  # a hole behind them
    tracemalloc.start()
    found = md5(tmp_path / "file")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == hashlib.md5((tmp_path / "file").read_bytes()).hexdigest()
    assert peak < 50_000_000
