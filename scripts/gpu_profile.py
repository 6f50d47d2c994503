"""Where passes of published shapes spend their time on this GPU: `gpu_profile.py SHAPE:QUANT …`."""

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
    """Medians of where the time of a step goes as the host sees it, nothing synchronised."""
    from outdraft.engine import graphs

    stamps, spent = [], defaultdict(list)

    def noting(call):
        def noted(*arguments, **options):
            stamps.append(time.perf_counter())
            result = call(*arguments, **options)
            stamps.append(time.perf_counter())
            return result

        return noted

    target_pass = rig.runner.target_pass
    own = next(r for r in target_pass.recordings.values() if r.call.token_T.shape[0] == 1)
    program, prepare, run = own.program, graphs.causal_numbers, target_pass.run
    replay, further = program.replay, graphs.further_numbers
    target_pass.ahead.drop()
    graphs.causal_numbers, graphs.further_numbers = noting(prepare), lambda *arguments: None
    program.replay, target_pass.run = noting(replay), noting(run)
    sequence, plan = rig.new_sequence(), StepPlan([Work(SEQUENCE, 1, 0)])
    names = ("before", "-", "prepare", "copy", "launch", "wait", "after")
    for _ in range(30):
        stamps.clear()
        before, start = program.seconds, time.perf_counter()
        rig.runner.execute(plan, {SEQUENCE: sequence})
        times = [start, *stamps, time.perf_counter()]
        for name, x, y in zip(names, times, times[1:], strict=False):
            spent[name].append((y - x) * 1e6)
        spent["graph"].append((program.seconds - before) * 1e6)
    graphs.causal_numbers, target_pass.run = prepare, run
    graphs.further_numbers = further
    del program.replay
    print("  " + ", ".join(f"{name} {median(times):.0f} us" for name, times in spent.items()))


def main(asked):
    for one in asked:
        name, _, quant = one.partition(":")
        rig = Rig.build(find_shape(name), Settings(quant=quant, device=find_device("cuda")))
        decoding = rig.decode(12)
        step_us = decoding.seconds * 1e6
        print(f"{one}: step {step_us:.0f} us, outside {step_us * decoding.python_share:.0f} us")
        for pdl in (True, False):
            variant(rig, pdl)
        kernel_times(rig.ops.programs[-2].replay)
        variant(rig, True)
        sections(rig)
        if one == asked[0]:
            rig.ops.pdl = rig.drafter.model.ops.pdl = False
            rig.drafter.recordings.clear()
            rig.time_draft_step(3, 1)
            kernel_times(next(iter(rig.drafter.recordings.values())).program.replay)
        del rig
        torch.cuda.empty_cache()


with torch.inference_mode():
    main(sys.argv[1:])
