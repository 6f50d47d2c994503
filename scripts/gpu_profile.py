"""Where passes of published shapes spend their time on this GPU: `gpu_profile.py SHAPE:QUANT …`."""

import cProfile
import io
import pstats
import sys
import time
from collections import defaultdict
from dataclasses import replace
from statistics import median

import torch

from outdraft.bench.shape import SEQUENCE, Rig, Settings
from outdraft.bench.shapes import find_shape
from outdraft.device import find_device
from outdraft.engine.plan import StepPlan, Work
from outdraft.ops.cuda import ops as cuda_ops
from outdraft.ops.cuda.cuts import cut_of


def kernel_times(replay, n=3, most=14):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(n):
            replay()
        torch.cuda.synchronize()
    spent = defaultdict(lambda: [0.0, 0])
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = spent[event.name[:50]]
            entry[0] += event.device_time / n
            entry[1] += 1 / n
    for name, (us, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:most]:
        print(f"  {us:9.1f} us {count:7.1f} x {us / count:7.2f}  {name}")
    print(f"  {sum(us for us, _ in spent.values()):9.1f} us in all", flush=True)


def graph_us(program, n=12):
    times = []
    for _ in range(n):
        torch.cuda.synchronize()
        before = program.seconds
        program.replay()
        times.append((program.seconds - before) * 1e6)
    return median(times)


def variant(rig, pdl, ahead):
    cuda_ops.cut_of = lambda n, k, bits: replace(cut_of(n, k, bits), ahead=ahead)
    for ops in (rig.ops, rig.drafter.model.ops):
        ops.pdl = pdl
    rig.runner.target_pass.recordings.clear()
    rig.drafter.recordings.clear()
    found = []
    for n in (1, 4):
        rig.run(list(range(2, 2 + n)))
        found.append(graph_us(rig.ops.programs[-1]))
    draft_s = rig.time_draft_step(3, 5)
    print(
        f"  pdl {pdl!s:5} ahead {ahead}: 1 row {found[0]:.0f} us, 4 rows {found[1]:.0f},"
        f" draft step {draft_s * 1e6:.0f}",
        flush=True,
    )


def host_profile(rig):
    sequence = rig.new_sequence()
    plan, profile = StepPlan([Work(SEQUENCE, 1, 0)]), cProfile.Profile()
    start = time.perf_counter()
    for _ in range(20):
        rig.runner.execute(plan, {SEQUENCE: sequence})
    print(f"  step {(time.perf_counter() - start) / 20 * 1e6:.0f} us")
    profile.enable()
    for _ in range(50):
        rig.runner.execute(plan, {SEQUENCE: sequence})
    profile.disable()
    out = io.StringIO()
    pstats.Stats(profile, stream=out).sort_stats("tottime").print_stats(14)
    print("\n".join(line for line in out.getvalue().splitlines()[7:] if line), flush=True)


def main(asked):
    for one in asked:
        name, _, quant = one.partition(":")
        rig = Rig.build(find_shape(name), Settings(quant=quant, device=find_device("cuda")))
        decoding = rig.decode(12)
        step_us = decoding.seconds * 1e6
        print(f"{one}: step {step_us:.0f} us, outside {step_us * decoding.python_share:.0f} us")
        for pdl, ahead in ((True, 0), (True, 2), (True, 4), (True, 8), (False, 0)):
            variant(rig, pdl, ahead)
        rig.run([2])
        kernel_times(rig.ops.programs[-1].graph.replay)
        variant(rig, True, 4)
        if one == asked[0]:
            host_profile(rig)
            rig.ops.pdl = rig.drafter.model.ops.pdl = False
            rig.drafter.recordings.clear()
            rig.time_draft_step(3, 1)
            kernel_times(next(iter(rig.drafter.recordings.values())).program.graph.replay)
        del rig
        torch.cuda.empty_cache()


with torch.inference_mode():
    main(sys.argv[1:])
