"""Cuts ``X.pt`` into tensor-parallel shards ``X_model_mp_{rank}.pt`` beside it, with cosmos-predict1's flags."""

import argparse
from pathlib import Path

from cosmos_mcore.checkpoint.original import write_original
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.parallel.command_line import run_command


def main(argv: list[str]) -> int:
    """Parses the arguments and cuts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", "--checkpoint_path", type=Path, required=True, help="for example model.pt")
    parser.add_argument("-t", "--tensor_parallel_size", type=int, required=True, help="1, 2, 4 or 8")
    parser.add_argument("-b", "--target_backend", default="pytorch", choices=["pytorch", "transformer_engine"])
    parser.add_argument("-s", "--model_size", default="auto", help="auto (from the tensors), 1b, 4b, 5b, 12b, 13b")
    parser.add_argument("-f", "--model_family", default="cosmos", choices=["cosmos"])
    parser.add_argument("--force", action="store_true", help="replace existing shards")
    arguments = parser.parse_args(argv)

    naming = "te" if arguments.target_backend == "transformer_engine" else "originals"
    checkpoint = open_checkpoint(arguments.checkpoint_path, arguments.model_size)
    size, path = arguments.tensor_parallel_size, arguments.checkpoint_path
    for file in write_original(checkpoint, path, size, naming, force=arguments.force, sharded_name=True):
        print(file)
    return 0


if __name__ == "__main__":
    run_command(main)
