#!/usr/bin/env bash
# Run the main task on synthetic knees: data, annotator, both trainings, one table, one report.
#   bash examples/demo.sh [FOLDER]      FOLDER defaults to runs/demo; a second call resumes in it
# VESSA_DEMO_PORT: port of the annotator; VESSA_DEMO_STEPS: training steps in place of the configuration's.
set -euo pipefail
folder=${1:-runs/demo}
port=${VESSA_DEMO_PORT:-8799}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
# The demo's annotator has a key and a bank folder of its own, so that it does not touch yours.
VESSA_API_KEY=$(python -c 'import secrets; print(secrets.token_urlsafe(32))')
export VESSA_API_KEY VESSA_STORE="folder:$folder/banks" VESSA_PORT=$port XDG_CONFIG_HOME="$folder/config"

# Not phantoms of vessa-server: Stage 1 learned from those, and would flatter the annotator.
[ -f "$folder/knees/meta.json" ] || python "$(dirname "$0")/knees.py" "$folder/knees"

echo "starting the annotator (log: $folder/annotator.log)" >&2
vessa-server serve >"$folder/annotator.log" 2>&1 &
annotator=$!
trap 'kill $annotator 2>/dev/null; wait $annotator 2>/dev/null || true' EXIT
for _ in $(seq 120); do
  kill -0 $annotator 2>/dev/null || { tail -n 5 "$folder/annotator.log" >&2; exit 1; }
  vessa banks --url "http://127.0.0.1:$port" >/dev/null 2>&1 && break
  sleep 0.5
done

vessa-trainer compare --config "$(dirname "$0")/../trainer/configs/demo.yaml" \
  --data "$folder/knees" --seeds 1 --url "http://127.0.0.1:$port" \
  --out "$folder/compare" --set "cache.url=folder:$folder/labels" \
  ${VESSA_DEMO_STEPS:+--set "steps=$VESSA_DEMO_STEPS"} --json
