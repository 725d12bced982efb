"""Says what this machine has, what that limits and how to mend it.

    python scripts/doctor.py [--json] [conf/NAME.yaml [section.key=value ...]]

Exit code 1 when something that every run needs fails, or when the given config could not run here.
"""

import argparse
import json
from dataclasses import asdict

from cosmos_mcore.config import load_config
from cosmos_mcore.parallel.command_line import run_command


def main(argv: list[str]) -> int:
    """Prints one line per finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a run's YAML, to check whether it could run here")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    args = parser.parse_intermixed_args(argv)
    config = None if args.config is None else load_config(args.config, args.overrides)

    from cosmos_mcore.training.doctor import FAILS, examine

    findings = examine(config)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print("\n".join(map(str, findings)))
    return int(any(finding.status == FAILS for finding in findings))


if __name__ == "__main__":
    run_command(main)
