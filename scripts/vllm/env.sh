#!/bin/sh
# Make the Python environment of vLLM for the tests, on a CPU; its pins are its own.
#
#   scripts/vllm/env.sh FOLDER
#
# 2.5 GB. Packages come from the index and the folders that pip is configured for; torch is the build without
# CUDA where one of them has it. A folder that is complete already is left as it is.
set -eu
cd "$(dirname "$0")/../.."
folder=$1
stamp=$folder/.vessa-$(cat scripts/vllm/*.py scripts/vllm/*.sh scripts/vllm/*.t* | cksum | tr -d ' ')
[ ! -e "$stamp" ] || exit 0

uv=.venv/bin/uv
pip="env -u PIP_FIND_LINKS .venv/bin/python -m pip"
set --
for links in ${PIP_FIND_LINKS:-} $($pip config get global.find-links 2>/dev/null || true); do
    set -- "$@" --find-links "$links"
done
if index=$($pip config get global.index-url 2>/dev/null); then
    set -- "$@" --default-index "$index"
fi
echo "vllm: making its environment in $folder (once; 2.5 GB)" >&2
$uv venv --quiet --clear --python .venv/bin/python "$folder"
$uv pip install --quiet --python "$folder/bin/python" "$@" --override scripts/vllm/overrides.txt \
    vllm==0.33.0 setuptools
$uv pip install --quiet --python "$folder/bin/python" --no-deps --no-build-isolation ./scripts/vllm
# PyPI's torchvision is built for CUDA and cannot load its operators beside a torch without. The processors use
# none of them, but torchvision states facts about two when it is imported, and they must exist by then.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo 'import vllm_on_cpu_images' > "$site/vllm_on_cpu_images.pth"
touch "$stamp"
