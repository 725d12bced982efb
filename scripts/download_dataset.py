"""Downloads the example clips (nvidia/Cosmos-NeMo-Assets) and leaves them ready for training."""

import argparse
from pathlib import Path

from cosmos_mcore.checkpoint.released import download_dataset
from cosmos_mcore.parallel.command_line import configure_logging, run_command


def main(argv: list[str]) -> int:
    """Parses the arguments and downloads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_dir", type=Path, default=Path("datasets/cosmos_nemo_assets"))
    args = parser.parse_args(argv)
    configure_logging()
    print(f"data.path={download_dataset(args.dataset_dir)}")
    return 0


if __name__ == "__main__":
    run_command(main)
