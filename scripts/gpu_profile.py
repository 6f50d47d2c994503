"""Where a pass of a published shape spends its time on this GPU: `gpu_profile.py SHAPE QUANT`."""

import cProfile
import io
import pstats
import sys
import time
from collections import defaultdict
from statistics import median

import torch

from outdraft.bench.shape import SEQUENCE, Rig, Settings
from outdraft.bench.shapes import find_shape
from outdraft.device import find_device
from outdraft.engine.plan import StepPlan, Work


def kernel_times(replay, n=3):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(n):
            replay()
        torch.cuda.synchronize()
    spent = defaultdict(lambda: [0.0, 0])
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = spent[event.name[:60]]
            entry[0] += event.device_time / n
            entry[1] += 1 / n
    for name, (us, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:22]:
        print(f"{us:9.1f} us {count:7.1f} x {us / count:7.2f}  {name}")
    print(f"{sum(us for us, _ in spent.values()):9.1f} us in all")


def main(name, quant):
    rig = Rig.build(find_shape(name), Settings(quant=quant, device=find_device("cuda")))
    decoding = rig.decode(30)
    print(
        f"{name} {quant}: step {decoding.seconds * 1e6:.0f} us, outside {decoding.python_share:.3f}"
    )
    program = rig.ops.programs[0]
    for pdl in (True, False):
        if not pdl:
            rig.ops.pdl = False
            rig.runner.target_pass.recordings.clear()
            rig.run([2])
            program = rig.ops.programs[-1]
        graphs, calls = [], []
        for _ in range(20):
            torch.cuda.synchronize()
            before, start = program.seconds, time.perf_counter()
            program.replay()
            calls.append(time.perf_counter() - start)
            graphs.append(program.seconds - before)
        print(
            f"pdl {pdl}: graph {median(graphs) * 1e6:.0f} us, launching {median(calls) * 1e6:.0f}"
        )
        kernel_times(program.graph.replay)
    sequence = rig.new_sequence()
    plan, profile = StepPlan([Work(SEQUENCE, 1, 0)]), cProfile.Profile()
    profile.enable()
    for _ in range(50):
        rig.runner.execute(plan, {SEQUENCE: sequence})
    profile.disable()
    out = io.StringIO()
    pstats.Stats(profile, stream=out).sort_stats("tottime").print_stats(18)
    print("\n".join(line for line in out.getvalue().splitlines()[7:] if line))
    draft_s = rig.time_draft_step(3, 5)
    print(f"draft step {draft_s * 1e6:.0f} us")
    kernel_times(next(iter(rig.drafter.recordings.values())).program.graph.replay)


with torch.inference_mode():
    main(*sys.argv[1:])
