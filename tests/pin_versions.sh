#!/usr/bin/env bash
# Pin the newest versions of everything in constraints.txt. Run it in an environment of the oldest supported Python:
#   source .venv/bin/activate && bash tests/pin_versions.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pip install -q -U --upgrade-strategy eager -e '.[lab,cloud,log,hub,fid,bench,dev]'
{
  grep '^#' constraints.txt
  python -m pip freeze --exclude-editable \
    | grep -Eiv '^(nvidia|cuda|triton|tinycats|setuptools|wheel|#)' | sed 's/+.*//' | sort -f
} > constraints.new
mv constraints.new constraints.txt
