#!/usr/bin/env bash
# On a machine with one NVIDIA GPU: the kernels' tests on the card, then the published shapes.
# Writes JSON and logs into $OUT (default out/gpu). Needs torch, triton and pytest, nothing compiled.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
export PYTHONPATH=src PYTHONUNBUFFERED=1
python3 -m pytest tests/ops/cuda -q --noconftest -p no:cacheprovider -o addopts= 2>&1 | tee "$OUT/tests.log" | tail -25
python3 scripts/gpu_bench.py "$OUT/shapes.json" \
  ${SHAPES:-gemma-4-e4b gemma-4-26b-a4b gemma-4-31b gemma-4-31b:w8 gemma-4-31b:w4 gemma-4-31b:cublas} 2>&1 | tee "$OUT/shapes.log"
