#!/usr/bin/env bash
# The steps of the Dockerfile, which also run in a plain virtual environment:  PYTHON=.venv/bin/python install.sh STEP
#
#   packages   what pyproject.toml needs and the environment lacks; torch and what it brings must be there
#   project    the package itself, without its dependencies
#   test       imports, and the checks of one config's values

set -euo pipefail

PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/../.."

torch_version() { "$PYTHON" -c 'import torch; print(torch.__version__)'; }

case "${1:-}" in
  packages)
    before=$(torch_version)
    # megatron-core and the small packages; torch and triton are the image's.
    "$PYTHON" - <<'EOF' >/tmp/cosmos_mcore_requirements.txt
import tomllib

with open("pyproject.toml", "rb") as file:
    wanted = tomllib.load(file)["project"]["dependencies"]
print("\n".join(line for line in wanted if not line.startswith(("torch>", "torch=", "triton"))))
EOF
    "$PYTHON" -m pip install -r /tmp/cosmos_mcore_requirements.txt
    rm /tmp/cosmos_mcore_requirements.txt
    [ "$(torch_version)" = "$before" ] || { echo "pip has replaced torch $before by $(torch_version)" >&2; exit 1; }
    ;;
  project)
    # Nothing else is installed, so no pins are needed; older pips hold the build's own setuptools to them, too.
    PIP_CONSTRAINT='' "$PYTHON" -m pip install --no-deps -e .
    ;;
  test)
    "$PYTHON" -c 'import megatron.core, torch, cosmos_mcore.training.trainer; print("torch", torch.__version__)'
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    OUTPUT_ROOT=$folder "$PYTHON" examples/pretrain_cosmos_ar.py conf/tiny_cpu.yaml --print-config >/dev/null
    echo "the container works"
    ;;
  *)
    echo "usage: $0 packages|project|test" >&2
    exit 2
    ;;
esac
