import sys, time, torch
from statistics import median
from outdraft.bench.shape import Rig, Settings, SEQUENCE, clock
from outdraft.bench.shapes import find_shape
from outdraft.device import find_device
from outdraft.engine.plan import StepPlan, Work
from outdraft.engine import graphs, runner as R
import outdraft.ops.cuda.graph as G
with torch.inference_mode():
    name, _, quant = sys.argv[1].partition(":")
    rig = Rig.build(find_shape(name), Settings(quant=quant, device=find_device("cuda")))
    plan = StepPlan([Work(SEQUENCE, 1, 0)])
    def go(n, label):
        seq = rig.new_sequence(); ahead = rig.runner.target_pass.ahead
        for _ in range(4): rig.runner.execute(plan, {SEQUENCE: seq})
        torch.cuda.synchronize()
        b, u, d = rig._replayed(), ahead.n_used, ahead.n_dropped
        steps = [clock(rig.runner.execute, plan, {SEQUENCE: seq}) * 1e6 for _ in range(n)]
        a = rig._replayed(); ahead.drop()
        print(f"{sys.argv[1]} {label}: mean {sum(steps)/n:.0f} median {median(steps):.0f} used {ahead.n_used-u} dropped {ahead.n_dropped-d} graph {(a[0]-b[0])/(a[1]-b[1])*1e6:.0f} n {a[1]-b[1]} len {rig.memory.lengths[SEQUENCE]}")
        print("   ", " ".join(f"{s:.0f}" for s in steps[:24]), flush=True)
    go(24, "ahead"); go(24, "ahead")
    further = graphs.further_numbers
    graphs.further_numbers = lambda *a: None
    go(24, "plain")
    graphs.further_numbers = further
    go(24, "ahead")
    from outdraft.engine.ahead import Ahead
    import outdraft.engine.ahead as A
    T = []
    def launch(self, call, program, numbers, turn, best_T):
        key = turn, best_T.shape[0], numbers.shape[0]
        t0 = time.perf_counter()
        back_T, sent = self._host[key]
        back_T.copy_(best_T, non_blocking=True)
        ready = torch.cuda.Event(); ready.record()
        t1 = time.perf_counter()
        sent.copy_(numbers); call.numbers.copy_(sent, non_blocking=True)
        torch.clamp(best_T, min=0, out=call.token_T)
        t2 = time.perf_counter()
        ev = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        t = [time.perf_counter()]
        for g in program.graphs: g.replay(); t.append(time.perf_counter())
        t3 = t[-1]
        ready.synchronize()
        t4 = time.perf_counter()
        best = back_T.clone(); self.flight = A._Flight(turn, numbers, best)
        T.append([(b - a) * 1e6 for a, b in zip([t0, t1, t2, *t[1:]], [t1, t2, *t[1:], t4])])
        return best
    old = Ahead.launch
    Ahead.launch = launch
    seq = rig.new_sequence()
    for _ in range(24): rig.runner.execute(plan, {SEQUENCE: seq})
    Ahead.launch = old
    print("launch parts: copy back, fill, graphs..., wait:", [round(median(c)) for c in zip(*T[4:])])
    rig.runner.target_pass.ahead.drop()
    import cProfile, pstats
    graphs.further_numbers = lambda *a: None
    seq = rig.new_sequence()
    pr = cProfile.Profile(); pr.enable()
    for _ in range(40): rig.runner.execute(plan, {SEQUENCE: seq})
    pr.disable(); pstats.Stats(pr).sort_stats("tottime").print_stats(16)
    graphs.further_numbers = further
    for segs in ((), (60,), (10, 30, 60, 100, 140)):
        G.SEGMENTS = segs
        rig.runner.target_pass.recordings.clear()
        go(24, f"ahead segments {segs}")
        graphs.further_numbers = lambda *a: None
        go(24, f"plain segments {segs}")
        graphs.further_numbers = further
        print(rig.runner.faults)
