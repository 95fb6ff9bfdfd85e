#!/bin/sh
# Install requirements.lock into one Python environment and check every file against its hash.
#
#   scripts/install-lock.sh PYTHON [--runtime]
#
# --runtime    leaves out what only the tools need, as the last line of the lock lists it (container images)
# TORCH_INDEX  (environment) address of a package index with builds of torch and torchvision without CUDA.
#              They are installed from there at the locked versions, without the lock's hashes, which belong to
#              other files. The CUDA libraries of the lock are left out.
#
# The order matters: sam2 builds against an installed torch. sam2, iopath and antlr4 are source distributions and
# build with the installed setuptools, without build isolation, so that nothing unlocked is fetched.
set -eu
cd "$(dirname "$0")/.."
python=$1
tools=""
[ "${2:-}" != --runtime ] || tools=$(sed -n 's/^# Only the tools need: //p' requirements.lock)
part=$(mktemp)
trap 'rm -f "$part"' EXIT

# Print the lock's entries, each with its hashes: only those named in $1, or with ! all but those.
entries() {
    awk -v wanted=" ${1#!} " -v without="${1%"${1#!}"}" '
        /^[a-z0-9]/ { name = $1; sub(/(==|\[).*/, "", name); keep = (index(wanted, " " name " ") > 0) != (without == "!") }
        keep' requirements.lock
}

install() {
    "$python" -m pip install --disable-pip-version-check --no-input --quiet --no-deps --no-build-isolation "$@"
}

entries "setuptools wheel" > "$part"
install --require-hashes -r "$part"

skip="sam2 $tools"
if [ -n "${TORCH_INDEX:-}" ]; then
    install --index-url "$TORCH_INDEX" $(entries "torch torchvision" | sed -n 's/^\(torch[a-z]*==[^ ]*\).*/\1/p')
    skip="$skip torch torchvision triton $(sed -n 's/^\(\(nvidia\|cuda\)-[a-z0-9-]*\)==.*/\1/p' requirements.lock | tr '\n' ' ')"
fi
entries "!$skip" > "$part"
install --require-hashes -r "$part"

entries sam2 > "$part"
SAM2_BUILD_CUDA=0 install --require-hashes -r "$part"
