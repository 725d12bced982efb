"""What ``test_optimizer_state.py`` runs: six steps at once, and three before and three after a save, in many forms.

``python -m tests.training.optimizer_state_worker FOLDER`` writes ``curves.json``: losses and grad norms by name.
"""

import json
import sys
from pathlib import Path

import torch

from cosmos_mcore.checkpoint.distributed import load_checkpoint, save_checkpoint
from cosmos_mcore.checkpoint.load import initialize_weights
from cosmos_mcore.config import RunConfig, derive_video_layout
from cosmos_mcore.model.presets import ModelArch
from cosmos_mcore.parallel.initialize import initialize, shut_down
from cosmos_mcore.training.optimizer import set_learning_rate
from cosmos_mcore.training.setup import build_trainable
from cosmos_mcore.training.step import LossPositions, train_step

ARCH = ModelArch(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
                 kv_channels=8, vocab_size=128, embedding_size=128)  # fmt: skip
FORMS = {
    "plain": {},
    "lean": {"precision.main_grads": "bf16", "precision.moments": "bf16"},
    "fp32": {"precision.dtype": "fp32"},
    "another rate": {"optimizer.lr": 2e-3},
    "unsharded": {"parallel.use_distributed_optimizer": False},
}


def start(form):
    """A model and its optimizer in one of the forms, weights not yet set."""
    config = RunConfig()
    config.data.height, config.data.width, config.data.num_frames = 32, 48, 17
    for key, value in FORMS[form].items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    layout = derive_video_layout(config)
    chunks, model, optimizer = build_trainable(config, ARCH, layout, torch.device("cpu"))
    return config, layout, chunks, model, optimizer


def train(parts, first, last):
    """(loss, grad norm) of the steps ``first`` to ``last - 1``."""
    config, layout, _, model, optimizer = parts
    positions, curve = LossPositions(layout, ARCH, 1e-4, torch.device("cpu")), []
    for step in range(first, last):
        ids = torch.randint(ARCH.vocab_size, (2, layout.num_tokens), generator=torch.Generator().manual_seed(step))
        set_learning_rate(optimizer, 1e-3)
        result = train_step(model, optimizer, positions, ids**3 // ARCH.vocab_size**2, 2).read()
        curve.append((result.loss, result.grad_norm))
    return curve


def whole(form):
    """Six steps from new weights."""
    parts = start(form)
    initialize_weights(parts[2], ARCH, seed=0)
    parts[4].reload_model_params()
    return parts, train(parts, 0, 6)


def untouched_by_nan(form):
    """Whether a step whose gradient is not finite leaves every weight as it was, and is known as such."""
    config, layout, chunks, model, optimizer = parts = start(form)
    initialize_weights(chunks, ARCH, seed=0)
    chunks[0].output_layer.weight.data[3, 3] = float("nan")
    optimizer.reload_model_params()
    before = [parameter.clone() for parameter in chunks[0].parameters()]
    ((_, norm),) = train(parts, 0, 1)
    same = [
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, chunks[0].parameters(), strict=True)
    ]
    return all(same) and norm != norm


def main():
    """Writes all curves."""
    folder = Path(sys.argv[1])
    initialize(RunConfig().parallel, seed=0)
    curves = {}
    for form in ("plain", "lean", "fp32"):
        curves[form] = whole(form)[1]
        parts = start(form)
        initialize_weights(parts[2], ARCH, seed=0)
        parts[4].reload_model_params()
        train(parts, 0, 3)
        save_checkpoint(folder / form, 3, parts[2], parts[4], {})
    for saved, form in (("plain", "plain"), ("lean", "lean"), ("fp32", "fp32"), ("plain", "lean"), ("lean", "plain"),
                        ("fp32", "plain"), ("plain", "another rate")):  # fmt: skip
        parts = start(form)
        load_checkpoint(folder / saved / "iter_000000003", parts[2], parts[4])
        curves[f"{saved} > {form}"] = train(parts, 3, 6)
    curves["untouched by nan"] = {form: untouched_by_nan(form) for form in ("plain", "lean", "fp32", "unsharded")}
    (folder / "curves.json").write_text(json.dumps(curves))
    shut_down()


if __name__ == "__main__":
    main()
