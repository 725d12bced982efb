"""Embeds 60 prompts that others embed at the same time: ``python -m tests.text.cache_worker CACHE FOLDER NUMBER``."""

import json
import random
import sys
from pathlib import Path

from cosmos_mcore.text.cache import EmbeddingCache
from tests.text.models import DrawnEncoder


def main(cache, folder, number):
    """Writes FOLDER/NUMBER.json: how many this process has made."""
    prompts = [f"prompt {i}" for i in range(60)]
    random.Random(number).shuffle(prompts)
    encoder = DrawnEncoder()
    for first in range(0, 60, 4):
        EmbeddingCache(Path(cache)).embed(prompts[first : first + 4], lambda: encoder)
    (Path(folder) / f"{number}.json").write_text(json.dumps(len(encoder.encoded)))


if __name__ == "__main__":
    main(*sys.argv[1:])
