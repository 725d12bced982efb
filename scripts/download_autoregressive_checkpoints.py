"""Downloads the released models, tokenizers and decoder, with cosmos-predict1's flags; run again to go on."""

import argparse
from pathlib import Path

from cosmos_mcore.checkpoint.released import MODELS, download_models
from cosmos_mcore.parallel.command_line import configure_logging, run_command


def main(argv: list[str]) -> int:
    """Parses the arguments and downloads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_sizes", nargs="*", default=list(MODELS), metavar="SIZE", help="of 4B 5B 12B 13B")
    parser.add_argument("--checkpoint_dir", type=Path, default=Path("checkpoints"))
    args = parser.parse_args(argv)
    configure_logging()
    for folder in download_models(args.model_sizes, args.checkpoint_dir):
        print(folder)
    return 0


if __name__ == "__main__":
    run_command(main)
