"""temporary"""
from dataclasses import dataclass
from torch import Tensor
import torch
from outdraft.sampling.sampler import sample
@dataclass
class Verdict:
    n_accepted: int
    token: int
def verify_greedy(d: Tensor, t: Tensor) -> Verdict:
    n = 0
    while n < len(d) and int(d[n]) == int(t[n]): n += 1
    return Verdict(n, int(t[n]))
def verify_sampled(d, q, p, acc, fin) -> Verdict:
    for i in range(len(d)):
        di=int(d[i])
        qd = 1.0 if q is None else float(q[i,di])
        if acc[i]*qd < float(p[i,di]): continue
        r = p[i].double().clone()
        if q is None: r[di]=0
        else: r = (r-q[i].double()).clamp(min=0)
        return Verdict(i, sample(r/r.sum(), fin[i]))
    return Verdict(len(d), sample(p[len(d)], fin[len(d)]))
