#!/usr/bin/env bash
# On a machine with one NVIDIA GPU: the kernels' and the engine's tests on the card, `verify demo`,
# the published shapes, `bench demo`, transformers beside them if it is there, and the kernel table.
# Writes JSON and logs into $OUT (default out/gpu) and prints a table. Nothing compiled is needed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
run() { local name=$1; shift; timeout "${LIMIT:-300}" "$@" > "$OUT/$name.log" 2>&1; echo "== $name: exit $?, $SECONDS s"; }
test_here() { run "$1" python3 -m pytest "$2" -q -p no:cacheprovider -o addopts= "${@:3}"; tail -2 "$OUT/$1.log"; }
test_here tests-ops tests/ops/cuda --noconftest &
test_here tests-engine tests/engine/test_cuda_engine.py &
run verify python3 -m outdraft verify demo --device cuda &
wait # none of these is timed
tail -14 "$OUT/verify.log"
for one in ${SHAPES:-gemma-4-31b:bf16 gemma-4-e4b:bf16 gemma-4-26b-a4b:bf16 qwen3.6-27b:bf16 gemma-4-31b:w4 gemma-4-31b:w8}; do
  LIMIT=100 run "shape-${one/:/-}" python3 -m outdraft bench shape "${one%:*}" --quant "${one#*:}" --device cuda \
    --accept .85,.75,.65 --tokens 40 --json "$OUT/shape-${one/:/-}.json"
done
peer=; python3 -c 'import transformers' 2> /dev/null && peer="--peer transformers"
LIMIT=100 run bench-demo python3 -m outdraft bench demo --device cuda --quant bf16 --prompts 2 --repeat 1 --max-tokens 64 $peer --json "$OUT/bench-demo.json"
tail -45 "$OUT/bench-demo.log"
[ -n "$peer" ] && LIMIT=180 run peer python3 -W ignore scripts/gpu_peer.py "$OUT/peer.json" gemma-4-e4b gemma-4-31b gemma-4-26b-a4b
LIMIT=120 run kernels python3 scripts/gpu_tune.py table "$OUT/kernels.json" gemma-4-31b:bf16 gemma-4-e4b:bf16 gemma-4-26b-a4b:bf16
python3 scripts/gpu_table.py "$OUT" | tee "$OUT/table.md"
