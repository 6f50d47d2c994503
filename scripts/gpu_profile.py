"""Where passes of published shapes spend their time on this GPU: `gpu_profile.py SHAPE:QUANT …`."""

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


def variant(rig, pdl):
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
        f"  pdl {pdl!s:5}: 1 row {found[0]:.0f} us, 4 rows {found[1]:.0f},"
        f" draft step {draft_s * 1e6:.0f}",
        flush=True,
    )


def sections(rig):
    """Where the host's time of a step goes, each part behind a synchronisation."""
    from outdraft.cache.attend import CausalCall
    from outdraft.cache.memory import Span

    target_pass, spent = rig.runner.target_pass, defaultdict(list)

    def clock(name, call):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        spent[name].append((time.perf_counter() - start) * 1e6)
        torch.cuda.synchronize()
        return result

    spans = [Span(SEQUENCE, 0, 1)]
    for _ in range(30):
        rig.memory.reserve(SEQUENCE, 1)
        call = clock("prepare", lambda: CausalCall.prepare(rig.memory, rig.ops, spans, [2]))
        own = next(r for r in target_pass.recordings.values() if r.call.token_T.shape[0] == 1)
        clock("copy", lambda own=own, call=call: own.call.numbers.copy_(call.numbers))
        clock("graph launch", own.program.graph.replay)
        clock("result", own.best_T.cpu)
    print("  " + ", ".join(f"{name} {median(times):.0f} us" for name, times in spent.items()))


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
        for pdl in (True, False):
            variant(rig, pdl)
        kernel_times(rig.ops.programs[-2].graph.replay)
        variant(rig, True)
        if one == asked[0]:
            sections(rig)
            host_profile(rig)
            rig.ops.pdl = rig.drafter.model.ops.pdl = False
            rig.drafter.recordings.clear()
            rig.time_draft_step(3, 1)
            kernel_times(next(iter(rig.drafter.recordings.values())).program.graph.replay)
        del rig
        torch.cuda.empty_cache()


with torch.inference_mode():
    main(sys.argv[1:])
