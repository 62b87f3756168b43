#!/bin/sh
# Brings PgBouncer from the system's packages where it may; without it, its one test is skipped, and says so.
set -eu

has_pgbouncer() {
    command -v pgbouncer >/dev/null 2>&1 || [ -x /usr/sbin/pgbouncer ]
}

if ! has_pgbouncer && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing PgBouncer from the system's packages"
    apt-get update -qq || true # an index that is old may still do
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends pgbouncer >/dev/null || true
fi
if ! has_pgbouncer; then
    echo "no PgBouncer: its test is skipped (Debian: apt-get install pgbouncer)" >&2
fi
