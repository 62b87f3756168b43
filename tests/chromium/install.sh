#!/bin/sh
# Makes sure that there is a headless Chromium, for the tests of the page; installs Debian's package where it may.
set -eu

# Whether there is one that starts. Ubuntu's package is a stub that only asks for a snap.
has_chromium() {
    command -v chromium >/dev/null 2>&1 && chromium --version >/dev/null 2>&1
}

if has_chromium; then
    exit 0
fi
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing Chromium from the system's packages"
    apt-get update -qq || true # an index that is old may still do; the next line says if not
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null || true
fi
if ! has_chromium; then
    echo "the tests of the page need Chromium as \`chromium\`: install it (Debian: apt-get install chromium), or put a link of that name to your Chrome or Chromium into PATH" >&2
    exit 2
fi
