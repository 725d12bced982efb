"""The page in a real browser, served by a real process, on the tiny model."""

import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import av
import pytest
import torch

from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.config import RunConfig, to_yaml
from cosmos_mcore.inference import assemble
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.inference.video_io import read_conditioning, write_mp4
from cosmos_mcore.inference.web_page import build_page, main
from cosmos_mcore.model.init import initial_tensor
from cosmos_mcore.model.presets import resolve_arch
from cosmos_mcore.parallel.initialize import shut_down
from tests.checkpoint.models import save_model
from tests.inference.models import write_guardrail
from tests.processes import ROOT, environment, free_port
from tests.videos import moving_square, write_test_clip

pytest.importorskip("gradio", reason="gradio is not installed (make setup)")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make setup)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)")

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
# Remembers how many frames the page has shown, each time that it changed.
WATCH = """
    window.shown = [];
    new MutationObserver(() => window.shown.push(document.querySelectorAll("#film img").length))
        .observe(document.body, {childList: true, subtree: true});
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights with its config, and uploads."""
    folder = tmp_path_factory.mktemp("page")
    config = RunConfig()
    config.model.preset, config.model.num_layers, config.model.hidden_size = "tiny", 2, 64
    config.data.height, config.data.width, config.data.num_frames = 64, 128, 33
    config.precision.dtype = "fp32"
    arch, cpu = resolve_arch(config.model), torch.device("cpu")
    weights = {name: initial_tensor(name, shape, arch, 0, cpu) for name, shape in original_shapes(arch).items()}
    save_model(folder / "tiny" / "model.pt", weights)
    (folder / "tiny" / "config.yaml").write_text(to_yaml(config))
    write_test_clip(folder / "clip.mp4", 12, 64, 128, fps=12, draw=moving_square)
    (folder / "sound.wav").write_bytes(b"RIFF0000WAVEfmt ")
    return folder


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """Where the page is."""
    log, port = tmp_path_factory.mktemp("log") / "log", free_port()
    script = [sys.executable, "examples/demo_app.py", "--checkpoint", str(folder / "tiny"), "--port", str(port)]
    uploads = tmp_path_factory.mktemp("uploads")
    with log.open("w") as output:
        write_guardrail(uploads / "packages")
        path, nowhere = f"{ROOT}{os.pathsep}{uploads / 'packages'}", f"http://127.0.0.1:{free_port()}"
        env = environment(GRADIO_TEMP_DIR=str(uploads), PYTHONPATH=path, http_proxy=nowhere, HTTP_PROXY=nowhere)
        process = subprocess.Popen(script, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "the page is at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert "(OSError: hub offline: True)" in log.read_text()
        yield re.search(r"the page is at (\S+)", log.read_text())[1]
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


def upload(page, path):
    page.set_input_files("#source input[type=file]", path)
    page.get_by_text(path.stem).first.wait_for()


def test_upload_watch_and_download(browser, url, folder, tmp_path):
    page, requests, errors = browser.new_page(viewport={"width": 1280, "height": 900}), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    upload(page, folder / "clip.mp4")
    page.evaluate(WATCH)
    page.click("#generate")
    page.get_by_text("33 frames of 64x128 at 12 frames per second, seed 0").wait_for(timeout=60_000)
    assert page.locator("#film img.given").count() == 9
    assert page.locator("#film img.generated").count() == 24
    shown = page.evaluate("window.shown")
    assert shown == sorted(shown) and {9, 17, 25, 33} <= set(shown), "not all at once"
    page.wait_for_function("document.querySelector('#video video')?.readyState >= 2")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "downloaded.mp4")
    assert [request for request in requests if not request.startswith((url, "data:", "blob:"))] == []
    assert errors == []
    # What the command line makes of the same input.
    checkpoint = folder / "tiny"
    config = assemble.load_config(checkpoint / "config.yaml")
    where = assemble.join_processes(config)
    pipeline = assemble.load_pipeline(config, resolve_arch(config.model), checkpoint, *where)
    given = read_conditioning(folder / "clip.mp4", 9, 64, 128)
    (made,) = pipeline.continue_videos(given, SamplingOptions(), [0])
    shut_down()
    expected = write_mp4(tmp_path / "expected.mp4", made.video, 12)
    assert (tmp_path / "downloaded.mp4").read_bytes() == expected.read_bytes()
    with av.open(str(expected)) as file:
        assert sum(1 for _ in file.decode(video=0)) == 33


@pytest.mark.parametrize("reads_text", [True, False])
def test_only_models_that_read_text_get_a_prompt(reads_text):
    pipeline = SimpleNamespace(clip_frames=33, layout=SimpleNamespace(latent_shape=(5, 4, 8)))
    page = build_page(SimpleNamespace(pipeline=pipeline, reads_text=reads_text, continue_upload=None), "tiny")
    props = {part["props"].get("elem_id"): part["props"] for part in page.get_config_file()["components"]}
    assert props["prompt"]["visible"] is reads_text and props["prompt"]["value"] == ""
    assert props["frames"]["value"] == 33 and props["frames"]["maximum"] == 132


@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(ValueError, match=f"--port {port} must lie between 1 and 65535"):
        main(["--port", port])


def test_mistakes_are_one_line_in_the_page(browser, url, folder):
    page = browser.new_page()
    page.goto(url)
    page.click("#generate")
    failed = page.locator("#status .failed")
    failed.wait_for()
    assert failed.inner_text() == "error: choose an image or a video first"
    upload(page, folder / "sound.wav")
    page.click("#generate")
    page.get_by_text("error: the video sound.wav").wait_for()
    assert "\n" not in failed.inner_text()
    assert page.locator("#film img").count() == 0 and page.locator("#download").is_disabled()
