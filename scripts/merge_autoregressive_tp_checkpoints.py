"""Joins tensor-parallel shards ``X_model_mp_{rank}.pt`` to one file, with cosmos-predict1's flags."""

import argparse
from pathlib import Path

from cosmos_mcore.checkpoint.original import open_shards, write_original
from cosmos_mcore.parallel.command_line import run_command


def main(argv: list[str]) -> int:
    """Parses the arguments and joins."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", "--checkpoint_path", type=Path, required=True, help="base name X.pt of the shards")
    parser.add_argument("-o", "--output_path", type=Path, required=True, help="the file to write")
    parser.add_argument("-t", "--tensor_parallel_size", type=int, required=True, help="number of shards")
    parser.add_argument("-s", "--model_size", default="auto", help="auto (from the tensors), 1b, 4b, 5b, 12b, 13b")
    parser.add_argument("-f", "--model_family", default="cosmos", choices=["cosmos"])
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    arguments = parser.parse_args(argv)

    checkpoint = open_shards(arguments.checkpoint_path, arguments.model_size, arguments.tensor_parallel_size)
    for file in write_original(checkpoint, arguments.output_path, force=arguments.force):
        print(file)
    return 0


if __name__ == "__main__":
    run_command(main)
