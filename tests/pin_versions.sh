#!/usr/bin/env bash
# Pin the newest versions of everything in constraints.txt that the oldest Python of settings.ini takes, its first
# release included (Debian 12 has 3.11.2). Nothing is installed; `make test` then tries them. Run it with that Python:
#   source .venv/bin/activate && bash tests/pin_versions.sh
set -euo pipefail
cd "$(dirname "$0")/.."
oldest="$(sed -n 's/^min_python *= *//p' settings.ini)"
python -c "import sys; '%d.%d' % sys.version_info[:2] == '$oldest' or sys.exit('run this with Python $oldest')"
report="$(mktemp)"
trap 'rm -f "$report"' EXIT
python -m pip install -q --disable-pip-version-check --dry-run --ignore-installed --target "$report.none" \
  --python-version "$oldest.0" --only-binary=:all: --report "$report" '.[lab,cloud,log,hub,fid,bench,dev]'
{
  grep '^#' constraints.txt
  python -c 'import json, sys
for package in json.load(sys.stdin)["install"]:
    print("%(name)s==%(version)s" % package["metadata"])' < "$report" \
    | grep -Eiv '^(nvidia|cuda|triton|tinycats|(setuptools|wheel|pip)=)' | sed 's/+.*//' | sort -uf
} > constraints.new
mv constraints.new constraints.txt
