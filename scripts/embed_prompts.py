"""Embeds the prompts of a config's videos, so that training needs no text encoder. See docs/video2world.md.

torchrun --nproc-per-node 8 scripts/embed_prompts.py conf/video2world_5b.yaml
"""

from cosmos_mcore.data.embed_prompts import main
from cosmos_mcore.parallel.command_line import run_command

if __name__ == "__main__":
    run_command(main)
