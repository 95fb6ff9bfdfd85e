#!/bin/sh
# Make the Python environment of vLLM for the tests, on a CPU, with pins of its own.
#
#   scripts/vllm/env.sh FOLDER
#
# It takes 2.5 GB. Packages come from the index and the folders of pip's configuration; torch is the build without
# CUDA if one of them has it. A complete folder is not touched.
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
# PyPI's torchvision is built for CUDA and cannot load its operators beside a torch without CUDA. The image
# processors use none of them, but the import of torchvision registers facts about two, which must exist then.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo 'import vllm_on_cpu_images' > "$site/vllm_on_cpu_images.pth"
touch "$stamp"
