#!/bin/sh
# Make .venv with the locked dependencies and the three distributions, editable.
#
#   scripts/setup.sh STAMP     creates STAMP at the end
#
# PYTHON  (environment) the interpreter; default: the first of 3.11 to 3.13 on PATH
set -eu
cd "$(dirname "$0")/.."
stamp=$1

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if supported "$name"; then
            command -v "$name"
            return
        fi
    done
    echo "setup: needs Python 3.11, 3.12 or 3.13; name one with: make setup PYTHON=/path/to/python3" >&2
    return 1
}

python=$(find_python)
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    scripts/apt-install.sh "$package"
fi

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -m venv .venv
fi
echo "setup: installing requirements.lock into .venv (once; minutes, most of it is torch)" >&2
rm -f .venv/.setup-*
scripts/install-lock.sh .venv/bin/python
.venv/bin/python -m pip install --disable-pip-version-check --no-input --quiet --no-deps --no-build-isolation \
    -e ./shared -e ./services/vessa -e ./trainer
.venv/bin/python -m pip check >&2
touch "$stamp"
