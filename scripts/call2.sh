set -u
export PYTHONPATH=src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
[ -d src/outdraft/models_data ] || cp -r ../src/outdraft/models_data src/outdraft/; ls src/outdraft/models_data; mkdir -p /tmp/site; python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site whl/llguidance*.whl 2>&1 | tail -1; export PYTHONPATH=src:/tmp/site
D=/tmp/o; mkdir -p $D
date +%s
(timeout 200 python3 -m pytest tests/ops/cuda -q --noconftest -p no:cacheprovider -o addopts= > $D/tests.log 2>&1) &
(timeout 250 python3 -m pytest tests/engine/test_cuda_engine.py -q -p no:cacheprovider -o addopts= > $D/tests2.log 2>&1) &
(timeout 250 python3 -m outdraft verify demo --device cuda > $D/verify.log 2>&1) &
for i in 0 1 2 3 4 5; do (timeout 150 python3 scripts/gpu_tune.py compile $i 6 gemma-4-31b:bf16 > $D/c$i.log 2>&1) & done
for s in gemma-4-e4b:bf16 gemma-4-26b-a4b:bf16 gemma-4-31b:w4; do timeout 200 python3 -m outdraft bench shape ${s%:*} --quant ${s#*:} --device cuda --tokens 4 > $D/warm-$s.log 2>&1 & done
wait
date +%s
for s in gemma-4-31b:bf16 gemma-4-e4b:bf16 gemma-4-26b-a4b:bf16 gemma-4-31b:w4 gemma-4-31b:w8; do
 timeout 120 python3 -m outdraft bench shape ${s%:*} --quant ${s#*:} --device cuda --accept .85,.75,.65 --tokens 32 --json $D/shape-${s/:/-}.json > $D/shape-$s.log 2>&1; tail -3 $D/shape-$s.log; done
date +%s
timeout 60 python3 scripts/exp2.py gemma-4-e4b:bf16 2>&1 | grep "mean\|parts" | head -6
timeout 100 python3 -m outdraft bench demo --device cuda --quant bf16 --prompts 2 --repeat 1 --max-tokens 64 --json $D/bench-demo.json > $D/bench-demo.log 2>&1; tail -25 $D/bench-demo.log
date +%s
for f in $D/tests.log $D/tests2.log; do tail -n 3 $f; done; tail -14 $D/verify.log
python3 scripts/gpu_table.py $D | tee $D/table.md
(cd $D; tar czf $OUT/all.tgz *.log *.json table.md)
