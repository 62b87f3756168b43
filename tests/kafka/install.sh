#!/bin/sh
# Copies Apache Kafka's jars into a directory, with Maven; installs Java and Maven from the system's packages if it may.
set -eu
target=$1
here=$(dirname "$0")

# Whether there is a Java of at least 17.
has_java() {
    version=$(java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1)
    [ -n "$version" ] && [ "$version" -ge 17 ]
}

if ! has_java || ! command -v mvn >/dev/null 2>&1; then
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "installing Java and Maven from the system's packages"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends default-jre-headless maven >/dev/null
    fi
fi
if ! has_java || ! command -v mvn >/dev/null 2>&1; then
    echo "the tests need Java 17 or newer and Maven: install them (Debian: apt-get install default-jre-headless maven; macOS: brew install openjdk maven)" >&2
    exit 2
fi
mkdir -p "$target"
rm -f "$target"/*.jar
mvn --batch-mode --quiet --file "$here/pom.xml" dependency:copy-dependencies -DoutputDirectory="$(cd "$target" && pwd)"
