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
