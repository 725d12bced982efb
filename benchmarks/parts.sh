# shellcheck shell=bash
# For the other scripts beside it, sourced by them: several commands, of which one that fails is named and the others go on.
# "$1" is the folder for what the commands print; by default it is called after the script.
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD"
output="${1:-outputs/$(basename "$0" .sh)}"
mkdir -p "$output"
# shellcheck disable=SC2034  # the scripts read it
gpus=$(python -c "import torch; print(torch.cuda.device_count())")

part() { # name, command
  local name="$1"
  shift
  echo "== $name: $*"
  if "$@" >"$output/$name.out" 2>"$output/$name.err"; then
    tail -n 24 "$output/$name.out"
  else
    echo "FAILED with code $?"
    grep -h "^error: " "$output/$name.err" || tail -n 30 "$output/$name.out" "$output/$name.err"
  fi
}

curves() { # folders of two runs: the largest relative difference of their losses, over the iterations of both
  python - "$1/metrics.jsonl" "$2/metrics.jsonl" <<'END'
import json, sys
from pathlib import Path
def curve(file):
    return {record["iteration"]: record["lm loss"] for record in map(json.loads, Path(file).read_text().splitlines())}
one, other = map(curve, sys.argv[1:])
both = one.keys() & other.keys()
print(f"{sys.argv[2]}: loss within {max(abs(other[i] / one[i] - 1) for i in both):.1e} of {sys.argv[1]}, {len(both)} iterations")
END
}
