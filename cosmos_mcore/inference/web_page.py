"""The page of ``examples/demo_app.py`` in Gradio, and its command line."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_mcore.inference.arguments import add_model_arguments, stay_offline
from cosmos_mcore.inference.main import adapted_config, check_decoder, find_model, load_pipeline, prompt_source
from cosmos_mcore.model.presets import check_arch_layout
from cosmos_mcore.parallel.command_line import configure_logging
from cosmos_mcore.parallel.launch import world_size

if TYPE_CHECKING:
    from cosmos_mcore.inference.web import Studio

_VISITORS = 8  # that may wait for each other
_SECONDS_KEPT = 24 * 3600  # of uploads and videos
_LARGEST_UPLOAD = "1gb"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="A page in the browser that continues images and videos with a trained model, in one process on a "
        "GPU or a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("the model, as for generate_video.py")
    add_model_arguments(model, model)
    parser.set_defaults(prompt=None, input_type=None)  # a prompt is typed into the page
    add = parser.add_argument_group("the page").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets everybody in who reaches this machine")
    add("--port", type=int, default=7860, help="port to listen on")
    return parser


def main(arguments: list[str]) -> int:
    """Loads the model and serves the page until Ctrl-C.

    Returns:
        The exit code.

    Raises:
        ValueError: for a user's mistake.
    """
    args = _parser().parse_args(arguments)
    if world_size() > 1:
        raise ValueError("the page runs in one process: start it with python, not with torchrun")
    if not 0 < args.port < 2**16:
        raise ValueError(f"--port {args.port} must lie between 1 and {2**16 - 1}")
    stay_offline()
    _import_gradio()
    configure_logging()
    from cosmos_mcore.inference import assemble
    from cosmos_mcore.inference.guardrail import find_guardrail
    from cosmos_mcore.inference.web import Studio
    from cosmos_mcore.parallel.initialize import shut_down

    checkpoint, config_file = find_model(args)
    arch = assemble.read_arch(checkpoint, config_file)
    config = assemble.share_over_processes(adapted_config(args, config_file), 1)
    check_arch_layout(config, arch)
    check_decoder(args, config)
    device, group = assemble.join_processes(config)
    pipeline = load_pipeline(args, config, arch, checkpoint, device, group)
    prompts = prompt_source(args, config) if arch.text_to_video else None
    guardrail = None if args.disable_guardrail else find_guardrail(pipeline.device, arch.text_to_video)
    with (
        tempfile.TemporaryDirectory(prefix="cosmos_mcore_") as folder,
        Studio(pipeline, config, prompts, guardrail, Path(folder)) as studio,
    ):
        _serve(build_page(studio, checkpoint.name), args.host, args.port)
    shut_down()
    return 0


def build_page(studio: Studio, model: str) -> Any:
    """The page as ``gradio.Blocks``.

    Args:
        studio: does the work.
        model: its name, for the headline.
    """
    gr = _import_gradio()
    from cosmos_mcore.inference.web import MOST_CLIPS, status_line

    clip, (_, *cells) = studio.pipeline.clip_frames, studio.pipeline.layout.latent_shape
    kept = (_SECONDS_KEPT // 24, _SECONDS_KEPT)  # how often is looked for what is too old, and from when on it is
    with gr.Blocks(title=f"cosmos_mcore: {model}", analytics_enabled=False, delete_cache=kept) as page:
        gr.Markdown(
            f"## Continue an image or a video\n`{model}` goes on from the last 9 frames of a video, or from an image: "
            f"clips of {clip} frames, {16 * cells[0]}x{16 * cells[1]}."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                source = gr.File(label="Image or video", height=130, elem_id="source")
                prompt = gr.Textbox(
                    "",
                    label="Prompt",
                    info="what the video shows",
                    lines=3,
                    visible=studio.reads_text,
                    elem_id="prompt",
                )
                num_frames = gr.Slider(2, MOST_CLIPS * clip, clip, step=1, label="Frames", elem_id="frames")
                temperature = gr.Slider(
                    0, 2, 1.0, step=0.05, label="Temperature", info="0: always the most likely token"
                )
                top_p = gr.Slider(
                    0, 1, 0.8, step=0.01, label="Top p", info="the most likely tokens that make up this probability"
                )
                seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=2, min_width=480):
                status = gr.HTML(elem_id="status")
                frames = gr.HTML(elem_id="film")
                video = gr.Video(
                    label="Result", interactive=False, autoplay=True, loop=True, buttons=[], height=320, elem_id="video"
                )
                download = gr.DownloadButton("Download MP4", interactive=False, elem_id="download")

        def generate(*settings: Any) -> Iterator[list[Any]]:
            for state in studio.continue_upload(*settings):
                path = None if state.video is None else str(state.video)
                yield [status_line(state), state.film, path, gr.update(value=path, interactive=path is not None)]

        button.click(
            generate,
            [source, prompt, num_frames, temperature, top_p, seed],
            [status, frames, video, download],
            show_progress="hidden",
            concurrency_limit=_VISITORS,
            api_visibility="private",
        )
    return page


def _serve(page: Any, host: str, port: int) -> None:
    """Shows the page to this machine, or to whoever reaches ``host``, until Ctrl-C; never by a public link."""
    gr = _import_gradio()
    from cosmos_mcore.inference.web import STYLE

    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            max_file_size=_LARGEST_UPLOAD,
            theme=gr.themes.Default(primary_hue="orange"),
            css=STYLE,
        )
    except OSError:
        raise ValueError(
            f"the page cannot be served on {host}:{port}: the port is taken, or the address is not this machine's; "
            "change --port or --host"
        ) from None
    print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def _import_gradio() -> Any:
    # Read when gradio is imported, or a page made: nothing about anybody leaves this machine or stays in the browser.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.update(NO_PROXY="*", no_proxy="*")  # Gradio looks whether its page is there, which a proxy cannot say
    try:
        import gradio
    except ImportError:
        raise ValueError("the page needs gradio: pip install '.[app]' -c constraints.txt") from None
    return gradio
