"""Fills a token cache from a config's videos, so that training decodes nothing. See docs/data.md.

torchrun --nproc-per-node 8 scripts/tokenize_videos.py conf/teal_tp1.yaml --output FOLDER
"""

from cosmos_mcore.data.tokenize_videos import main
from cosmos_mcore.parallel.command_line import run_command

if __name__ == "__main__":
    run_command(main)
