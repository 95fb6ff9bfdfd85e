#!/usr/bin/env bash
# Check and use a bare GPU machine in ten minutes: tests, speed, Stage 1 of nano, one student.
#
#   scripts/gpu.sh --out DIR [--wheels DIR] [--data DIR] [--base DIR] [--labels DIR] [--minutes M] [--dry-run]
#
# The machine needs Python 3.12 with torch, transformers and timm. Everything else travels as wheels:
#   pip download --dest wheels --no-deps sam2==1.1.0 ...   (on a machine with an index)
# --data: data folders below it; those of Stage 1 that are there are used, acdc is the student's
# --base: weights of the preset base (vessa-server weights build); its speed is skipped without
# --labels: labels that vessa-trainer labels made before; the student is skipped without
# --minutes: of Stage 1 and of the student, each
# --dry-run: the same commands on the CPU with tiny sizes, to try them before any GPU is at hand
# Results: OUT/summary.txt and one log a step. Files over 15 MiB are split, so that they can be copied back.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
out="" wheels="" data="" base="" labels="" minutes=3 dry=""
while [ $# -gt 0 ]; do
    case $1 in
        --out | --wheels | --data | --base | --labels | --minutes)
            [ $# -ge 2 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift 2 ;;
        --dry-run) dry=1; shift ;;
        *) echo "gpu.sh: unknown option $1; see the head of this file" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] || { echo "gpu.sh: name the folder of the results: --out DIR" >&2; exit 2; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
device=cuda
[ -z "$dry" ] || device=cpu
python=${PYTHON:-python3}
: > "$out/summary.txt"
failed=0

step() { # step NAME COMMAND...: run with a log; a failure is reported and the other steps go on
    local name=$1 started=$SECONDS state=ok
    shift
    "$@" > "$out/$name.log" 2>&1
    case $? in
        0) ;;
        124) state="stopped when its time was up" ;;
        *) state="failed"; failed=1 ;;
    esac
    echo "$name: $state, $((SECONDS - started)) s; $(tail -n 1 "$out/$name.log" | cut -c1-400)" | tee -a "$out/summary.txt"
}
skip() { echo "$1: skipped, $2" | tee -a "$out/summary.txt"; }

export PYTHONPATH=$root/shared:$root/services/vessa:$root/trainer
if [ -n "$wheels" ]; then
    step wheels "$python" -m pip install --quiet --no-index --no-deps --target "$out/site" "$wheels"/*.whl
    export PYTHONPATH=$PYTHONPATH:$out/site
fi
step machine "$python" -c "
import platform, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no CUDA device'
assert '$device' == 'cpu' or torch.cuda.is_available(), name
print(platform.python_version(), 'torch', torch.__version__, name)"
cd "$root"
if [ -n "$dry" ]; then
    step tests "$python" -m pytest -q -m gpu -p no:cacheprovider --collect-only tests/trainer/semi_supervised
    images=4
else
    step tests "$python" -m pytest -q -m gpu -p no:cacheprovider tests
    images=24
fi
step speed-nano "$python" benchmarks/annotator.py --device "$device" --images "$images"
if [ -n "$base" ]; then
    step speed-base "$python" benchmarks/annotator.py --weights "$base" --device "$device" --images "$images"
else
    skip speed-base "no --base"
fi

folders=()
for name in sunnybrook sunnybrook_myo hc18 dsb2018; do
    [ -n "$data" ] && [ -d "$data/$name" ] && folders+=(--data "$data/$name")
done
sizes=(--minutes "$minutes" --batch 32 --studies 60 --validate-every 200 --validation 64)
[ -z "$dry" ] || sizes=(--steps 2 --batch 2 --studies 2 --validate-every 2 --validation 4)
step stage1 "$python" -m vessa_server pretrain --start nano "${folders[@]}" --out "$out/stage1" \
    --device "$device" --bf16 --log-every 1 "${sizes[@]}" --json
mkdir -p "$out/back"
[ ! -d "$out/stage1/weights" ] || cp -r "$out/stage1/weights" "$out/stage1/metrics.jsonl" "$out/back/"

if [ -n "$labels" ] && [ -n "$data" ]; then
    lengths=(steps=30000)
    [ -z "$dry" ] || lengths=(steps=2 student.pretrained=false student.size=64 student.crop=64 batch_labeled=2
        batch_unlabeled=2 eval_every=2 checkpoint_every=2)
    settings=()
    for one in "device=$device" "annotator.labels=$labels" "${lengths[@]}"; do settings+=(--set "$one"); done
    # At SIGTERM the run saves its state, and --resume continues it.
    step student timeout "$((minutes * 60))" "$python" -m vessa_trainer fit --config full --data "$data/acdc" \
        --method vessa --out "$out/student" "${settings[@]}" --json
    cp "$out"/student/*.json* "$out/back/" 2>/dev/null
else
    skip student "it needs --data and --labels"
fi
find "$out/back" -type f -size +15M | while read -r file; do
    split --bytes 15M --numeric-suffixes "$file" "$file.part" && rm "$file"
done
exit $failed
