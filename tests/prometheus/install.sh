#!/bin/sh
# Unpacks Prometheus and promtool from Debian's package into a directory; without them, what they check is skipped, and says so.
set -eu

directory=$1
if [ ! -x "$directory/usr/bin/promtool" ] && command -v apt-get >/dev/null 2>&1 && command -v dpkg >/dev/null 2>&1; then
    echo "unpacking Prometheus from the system's packages"
    mkdir -p "$directory"
    (cd "$directory" && apt-get download -qq prometheus && dpkg -x prometheus_*.deb . && rm -f prometheus_*.deb) || true
fi
if [ ! -x "$directory/usr/bin/promtool" ]; then
    echo "no promtool: the alerts are checked by name only (Debian: apt-get install prometheus)" >&2
fi
