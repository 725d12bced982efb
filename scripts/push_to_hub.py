"""Uploads a safetensors export (convert_checkpoint.py --to safetensors) to the Hugging Face hub with a model card."""

import argparse
from pathlib import Path

from cosmos_mcore.checkpoint.publish import push
from cosmos_mcore.parallel.command_line import configure_logging, run_command


def main(argv: list[str]) -> int:
    """Parses the arguments and uploads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="folder with safetensors, index and config.json")
    parser.add_argument("--repo_id", required=True, help="owner/name; made if it is not there")
    parser.add_argument("--public", action="store_true", help="a new repository is private without this")
    args = parser.parse_args(argv)
    configure_logging()
    print(push(args.input, args.repo_id, private=not args.public))
    return 0


if __name__ == "__main__":
    run_command(main)
