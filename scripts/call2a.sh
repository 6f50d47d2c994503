set -u
export PYTHONPATH=src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p /tmp/site; python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site whl/llguidance*.whl; export PYTHONPATH=src:/tmp/site; D=/tmp/o; mkdir -p $D
date +%s
for i in 0 1 2 3 4 5; do (timeout 150 python3 scripts/gpu_tune.py compile $i 6 gemma-4-31b:w8 > $D/c$i.log 2>&1) & done
for s in gemma-4-e4b:bf16 gemma-4-26b-a4b:bf16 gemma-4-31b:w4; do timeout 200 python3 -m outdraft bench shape ${s%:*} --quant ${s#*:} --device cuda --tokens 4 > $D/warm-$s.log 2>&1 & done
wait
date +%s
for s in gemma-4-31b:bf16 gemma-4-e4b:bf16 gemma-4-26b-a4b:bf16 gemma-4-31b:w4 gemma-4-31b:w8; do
 timeout 120 python3 -m outdraft bench shape ${s%:*} --quant ${s#*:} --device cuda --accept .85,.75,.65 --tokens 32 --json $OUT/shape-${s/:/-}.json > $D/shape-$s.log 2>&1; tail -2 $D/shape-$s.log; date +%s; done
python3 scripts/gpu_table.py $OUT
for f in $D/warm*; do tail -2 $f; done
