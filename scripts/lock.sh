#!/bin/sh
# Resolve requirements.in into requirements.lock, and list the packages that only the tools need.
#
#   scripts/lock.sh [--upgrade]
#
# Locked versions stay where possible; --upgrade takes the newest. The lock must name no index, because every
# machine installs from the index of its own configuration. The last line of the lock lists what
# scripts/install-lock.sh --runtime leaves out of the container images, which are Linux.
set -eu
cd "$(dirname "$0")/.."

compile() {
    .venv/bin/uv pip compile "$@" --quiet --python-version 3.11 --no-annotate --no-emit-index-url \
        --no-emit-package vessa --no-emit-package vessa-server --no-emit-package vessa-trainer
}

names() {
    sed -n 's/^\([a-z0-9][a-z0-9.-]*\).*/\1/p' "$1" | sort -u
}

runtime=$(mktemp) locked=$(mktemp)
base=requirements-runtime.in  # beside the distributions, whose paths it names
trap 'rm -f "$runtime" "$locked" "$base"' EXIT
compile requirements.in --output-file requirements.lock --universal --fork-strategy fewest --generate-hashes \
    --custom-compile-command "make lock" "$@"
sed -n '1,/^# Tools/p' requirements.in > "$base"
compile "$base" --constraint requirements.lock --python-platform x86_64-manylinux_2_28 --no-header > "$runtime"
names requirements.lock > "$locked"
echo "# Only the tools need: $(names "$runtime" | comm -13 - "$locked" | tr '\n' ' ')" | sed 's/ $//' >> requirements.lock
