set -u
export PYTHONPATH=src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
date +%s
(timeout 200 python3 -m pytest tests/ops/cuda -q --noconftest -p no:cacheprovider -o addopts= > $OUT/tests.log 2>&1; date +%s >> $OUT/tests.log) &
for i in 0 1 2 3 4 5 6 7; do (timeout 150 python3 scripts/gpu_tune.py compile $i 8 gemma-4-31b:w4 > $OUT/compile$i.log 2>&1) & done
for s in gemma-4-e4b:bf16 gemma-4-26b-a4b:bf16 gemma-4-31b:w4 gemma-4-31b:bf16; do timeout 320 python3 scripts/exp1.py $s > $OUT/exp-${s/:/-}.log 2>&1 & done
wait
date +%s
timeout 120 python3 scripts/gpu_tune.py measure $OUT/w4.json gemma-4-31b:w4 > $OUT/tune.log 2>&1
date +%s
tail -5 $OUT/tests.log; cat $OUT/exp-*.log | tail -150; tail -3 $OUT/compile0.log; cat $OUT/tune.log | tail -20
