#!/bin/sh
# Build the wheel and try it as a user would: in a clean environment, from another directory. The wheel stays in dist/; with
# KEEP=yes it also becomes the version before, which tests/upgrade/ runs beside the next one.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
uv=$PWD/$1
python=$2
rm -rf dist
"$uv" build --quiet --wheel --sdist --out-dir dist --python "$python"
wheel=$(ls "$PWD"/dist/*.whl)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT INT TERM
"$python" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel[demo]"
cd "$place"
venv/bin/consumer --version
venv/bin/python -c 'from importlib.resources import files; assert (files("consumer") / "py.typed").is_file()'
venv/bin/consumer demo --json >demo.json
venv/bin/python - <<'CHECK'
import json

found = json.load(open("demo.json"))
assert found["agree"] is True, found
print(f"demo: {found['applied']:,} applied, every balance right")
CHECK
venv/bin/consumer new orders # its templates are in the wheel
if [ "${KEEP:-}" = yes ]; then # of a release: the next version is tested beside this one
  rm -f "$root"/tests/upgrade/previous/*.whl
  cp "$wheel" "$root/tests/upgrade/previous/"
fi
echo "good: $wheel"
