"""Adds records to a token cache until it is killed: ``python -m tests.data.cache_worker FOLDER NUMBER CLIPS``."""

import sys
from pathlib import Path

from cosmos_mcore.data.token_cache import TokenCache
from tests.data.test_token_cache import SETTINGS, clip_ids, key


def main(folder, number, clips):
    """Worker ``number`` adds clips number·10^6 to number·10^6 + clips - 1 (0: for ever) and prints after each."""
    cache = TokenCache(Path(folder), SETTINGS)
    done = 0
    while not clips or done < clips:
        name = 10**6 * number + done
        cache.add(key(name), clip_ids(name))
        done += 1
        print(done, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
