"""Converts a checkpoint of any layout, recognised by its content, to any other. See docs/checkpoints.md."""

import argparse
from pathlib import Path

from cosmos_mcore.checkpoint.convert import LAYOUTS, convert
from cosmos_mcore.parallel.command_line import configure_logging, run_command


def main(argv: list[str]) -> int:
    """Parses the arguments and converts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="file, base name of shards, or folder")
    parser.add_argument("--output", type=Path, required=True, help="X.pt, or a folder for the last three layouts")
    parser.add_argument("--to", required=True, choices=LAYOUTS)
    parser.add_argument("--tensor_parallel_size", type=int, default=1, help="shards to cut tensors in")
    parser.add_argument("--pipeline_parallel_size", type=int, default=1, help="groups of layers (distributed only)")
    parser.add_argument("--model_size", default="auto", help="auto (read from the tensors), 1b, 4b, 5b, 12b or 13b")
    parser.add_argument("--form", default="prefixed", choices=["prefixed", "plain", "nested"], help="keys of .pt files")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--verify", action="store_true", help="compare both sides byte for byte and through the model")
    args = parser.parse_args(argv)
    configure_logging()

    files = convert(
        args.input,
        args.output,
        args.to,
        tensor_parallel_size=args.tensor_parallel_size,
        pipeline_parallel_size=args.pipeline_parallel_size,
        model_size=args.model_size,
        form=args.form,
        force=args.force,
        keep_source=args.verify,
    )
    for file in files:
        print(file)
    if not args.verify:
        return 0
    from cosmos_mcore.checkpoint.verify import verify

    report = verify(args.input, args.output if args.output.is_dir() else files[0])
    print(report.table())
    return 0 if report.equal else 1


if __name__ == "__main__":
    run_command(main)
