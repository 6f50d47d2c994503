import fcntl, sys, time, torch, os
from dataclasses import replace
from statistics import median

sys.argv0 = sys.argv[:]
one = sys.argv[1]
sys.path.insert(0, "scripts")
sys.path.insert(0, "src")
import outdraft.ops.cuda.ops as O, outdraft.ops.cuda.fused as F
from outdraft.ops.cuda.cuts import cut_of

AHEAD = [0]


def cut(n, k, bits):
    return replace(cut_of(n, k, bits), ahead=AHEAD[0])


O.cut_of = F.cut_of = cut
argv, sys.argv = sys.argv, ["x"]
import gpu_profile as P
from outdraft.bench.shape import Rig, Settings
from outdraft.bench.shapes import find_shape
from outdraft.device import find_device
from outdraft.bench.cuda_synthetic import read_seconds_a_byte


def variant(rig, ahead, pdl=True):
    AHEAD[0] = ahead
    for ops in (rig.ops, rig.drafter.model.ops):
        ops.pdl = pdl
    rig.runner.target_pass.recordings.clear()
    rig.drafter.recordings.clear()
    found = []
    for n in (1, 4):
        rig.run(list(range(2, 2 + n)))
        found.append(P.graph_us(rig.ops.programs[-1], 20))
    draft_s = rig.time_draft_step(3, 7)
    return f"{one} ahead {ahead} pdl {pdl}: 1 row {found[0]:.0f} us, 4 rows {found[1]:.0f}, draft step {draft_s * 1e6:.0f}"


with torch.inference_mode():
    lock = open("/tmp/lock", "w")
    big = one == "gemma-4-31b:bf16"
    if big:
        time.sleep(20)
        fcntl.flock(lock, fcntl.LOCK_EX)
    name, _, quant = one.partition(":")
    t0 = time.time()
    rig = Rig.build(find_shape(name), Settings(quant=quant, device=find_device("cuda")))
    dec = rig.decode(3)
    aheads = (0, 256, 1024) if not big else (0, 256)
    for a in aheads:
        variant(rig, a)
    t1 = time.time()
    if not big:
        fcntl.flock(lock, fcntl.LOCK_EX)
    print(
        f"== {one}: warmed in {t1 - t0:.0f} s; read {1 / read_seconds_a_byte(rig.memory.device) / 1e9:.0f} GB/s",
        flush=True,
    )
    for a in (*aheads, 0):
        print(variant(rig, a), flush=True)
    goes = type(rig.runner)._goes_on
    for name_, way in (
        ("ahead", goes),
        ("plain", lambda *a: False),
        ("ahead", goes),
        ("plain", lambda *a: False),
    ):
        type(rig.runner)._goes_on = way
        rig.runner.target_pass.ahead.drop()
        seq = rig.new_sequence()
        from outdraft.engine.plan import StepPlan, Work
        from outdraft.bench.shape import SEQUENCE, clock

        plan = StepPlan([Work(SEQUENCE, 1, 0)])
        steps = [clock(rig.runner.execute, plan, {SEQUENCE: seq}) for _ in range(20)]
        print(
            f"step {name_}: {median(steps) * 1e6:.0f} us mean {sum(steps[2:]) / 18 * 1e6:.0f}",
            "dropped",
            rig.runner.target_pass.ahead.n_dropped,
            flush=True,
        )
    P.sections(rig)
    kstep = StepPlan([Work(SEQUENCE, 1, 3)])
    steps = [clock(rig.runner.execute, kstep, {SEQUENCE: seq}) for _ in range(12)]
    print(
        f"step of 3 drafts: {median(steps) * 1e6:.0f} us", "faults", rig.runner.faults, flush=True
    )
    rig.run([2])
    variant(rig, 0, False)
    P.kernel_times(rig.ops.programs[-2].replay, most=22)
    print(one, "done", time.time() - t1, flush=True)
