"""How fast is the text encoder? Random weights of T5-11B's size, written to a folder and loaded as released ones are.

    python benchmarks/text_encoder.py [--folder /tmp/t5] [--words 60]

Needs 10 GB of disk. One JSON line: seconds of the fingerprint and of loading; prompts per second in the batches of
``scripts/embed_prompts.py``; peak memory of the GPU and of the process; the relative difference of bf16 from float32
embeddings, which random weights make no smaller than trained ones would.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from cosmos_mcore.text.cache import BATCH
from cosmos_mcore.text.encoder import TextEncoder, fingerprint_of

PROMPTS = 20 * BATCH
SIZES = {"d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_layers": 24, "num_heads": 128}
VOCABULARY = 32128


def write_random_t5(folder: Path) -> None:
    """The encoder half in bf16, with a tokenizer of numbered words."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=VOCABULARY, **SIZES))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/random_t5_11b"))
    parser.add_argument("--words", type=int, default=60, help="of each prompt")
    args = parser.parse_args()
    device = torch.device("cuda")
    if not (args.folder / "config.json").is_file():
        write_random_t5(args.folder)
        torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    draw = random.Random(0)
    prompts = [" ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(args.words)) for _ in range(PROMPTS)]
    times = [time.perf_counter()]
    fingerprint_of(args.folder)
    times.append(time.perf_counter())
    encoder = TextEncoder.from_folder(args.folder, device)
    first = encoder(prompts[:BATCH]).float().cpu()
    times.append(time.perf_counter())
    for start in range(0, PROMPTS, BATCH):
        encoder(prompts[start : start + BATCH]).cpu()  # which waits for the GPU
    times.append(time.perf_counter())
    peak = torch.cuda.max_memory_allocated()
    del encoder
    torch.cuda.empty_cache()
    exact = TextEncoder.from_folder(args.folder, device, torch.float32)(prompts[:BATCH]).cpu()
    fingerprint, load, embed = (after - before for before, after in zip(times, times[1:], strict=False))
    result = {
        "device": torch.cuda.get_device_name(),
        "fingerprint_seconds": round(fingerprint, 2),
        "load_and_first_batch_seconds": round(load, 1),
        "prompts_per_second": round(PROMPTS / embed, 1),
        "words": args.words,
        "peak_gpu_gb": round(peak / 1e9, 2),
        "peak_host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
        "bf16_from_fp32": float((first - exact).norm() / exact.norm()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
