#!/bin/sh
# Test on the supported Pythons that this machine has beside that of .venv: the core, and commands that need no PostgreSQL.
# Each has the locked dependencies in .cache/pythonX.Y. Then test sessions on the minor version of SQLAlchemy that .venv has not.
set -eu
cd "$(dirname "$0")/.."

# Print the path of a Python of version $1 that can make environments. A shim of pyenv may find it only when it is asked for.
interpreter() {
    root=$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")
    for each in "python$1" "/usr/local/bin/python$1" "/usr/bin/python$1" "$root/versions/$1".*"/bin/python$1"; do
        "$each" -c 'import sys, ensurepip, venv; print(sys.executable)' 2>/dev/null && return
    done
}

installed=$(cat requirements/dev.lock pyproject.toml | cksum)
own=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
for version in 3.11 3.12 3.13; do
    if [ "$version" = "$own" ]; then
        continue
    fi
    python=$(interpreter "$version") || {
        echo "Python $version: not here, or without venv: skipped"
        continue
    }
    place=.cache/python$version
    if [ "$installed" != "$(cat "$place/.complete" 2>/dev/null)" ]; then
        echo "Python $version: installing what is locked"
        "$python" -m venv --clear "$place"
        "$place/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/dev.lock
        "$place/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
        echo "$installed" >"$place/.complete"
    fi
    echo "Python $version: $python"
    # Few examples, and without what only takes long: another Python changes what is called, not which states there are.
    CORE_EXAMPLES=20 "$place/bin/python" -m pytest -q -p no:cacheprovider "$@" -m unit \
        --ignore tests/core/test_model.py \
        --ignore tests/project/test_type_checkers.py \
        --deselect tests/core/test_ordering.py::TestLaneAgainstItsModel
    "$place/bin/python" -m pytest -q -p no:cacheprovider "$@" \
        tests/cli/test_help.py \
        tests/cli/test_pythons.py \
        tests/cli/test_interrupts.py::test_ctrl_c_at_any_moment_is_one_line \
        tests/cli/test_cli.py::test_a_bad_import_string_is_one_line \
        tests/cli/test_cli.py::test_a_bad_setting_is_one_line_that_names_it
done

place=.cache/sqlalchemy
installed=$(cat requirements/sqlalchemy.lock .venv/pyvenv.cfg | cksum)
if [ "$installed" != "$(cat "$place/.complete" 2>/dev/null)" ]; then
    rm -rf "$place"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --target "$place" \
        --requirement requirements/sqlalchemy.lock
    echo "$installed" >"$place/.complete"
fi
export PYTHONPATH="$place"
.venv/bin/python -c 'import sqlalchemy; print("SQLAlchemy", sqlalchemy.__version__, "of", sqlalchemy.__file__)'
.venv/bin/python -m pytest -q -p no:cacheprovider "$@" tests/ext
