"""
CPU kernels of outdraft. Use outdraft.ops.cpu, which checks what it passes.
"""

import numpy as np
from numpy.typing import NDArray

def available_isas() -> list[str]: ...
def current_isa() -> str: ...
def set_isa(name: str) -> None: ...
def isa_report() -> str: ...
def set_threads(n_threads: int) -> None: ...
def threads() -> int: ...
def disturb_threads(kind: int) -> None: ...

class Program:
    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def resize(self, n: int, of: int) -> None: ...
    def replay(self) -> None: ...

class Matrix:
    def __init__(self, data: int, stride: int, dtype: int) -> None: ...

class Weight:
    def __init__(
        self,
        format: int,
        n: int,
        k: int,
        group: int,
        n_blocks: int,
        data: int,
        scales: int,
        zeros: int,
    ) -> None: ...
    @property
    def data_bytes(self) -> int: ...

class KvPages:
    def __init__(
        self,
        k: int,
        v: int,
        k_scales: int,
        v_scales: int,
        dtype: int,
        n_kv_heads: int,
        head_dim: int,
    ) -> None: ...

def packed_layout() -> str: ...
def pack_floats(weight: Weight, rows: Matrix, first: int, n: int, candidates: int) -> None: ...
def pack_w8(weight: Weight, rows: int, stride: int, scales: int, first: int, n: int) -> None: ...
def pack_w4(
    weight: Weight, rows: int, stride: int, scales: int, zeros: int, first: int, n: int
) -> None: ...
def zeros(bytes: int) -> NDArray[np.uint8]: ...
def prepared_bytes(weight: Weight, rows: int) -> int: ...
def linear(
    program: Program | None, weight: Weight, x: Matrix, prepared: int, y: Matrix, rows: int
) -> None: ...
def pair_groups_size(pairs: int, n_experts: int) -> int: ...
def group_pairs(
    program: Program | None, ids: int, groups: int, pairs: int, n_experts: int
) -> None: ...
def expert_linear(
    program: Program | None,
    weight: Weight,
    x: Matrix,
    prepared: int,
    y: Matrix,
    groups: int,
    rows: int,
    pairs: int,
) -> None: ...
def attention(
    program: Program | None,
    q: Matrix,
    out: Matrix,
    kv: KvPages,
    table: int,
    table_stride: int,
    first_page: int,
    sequence: int,
    lo: int,
    hi: int,
    rows: int,
    n_heads: int,
    scale: float,
) -> None: ...
def norm(
    program: Program | None,
    x: Matrix,
    residual: Matrix,
    out: Matrix,
    next_out: Matrix,
    weight: int,
    next_weight: int,
    eps: float,
    scale: float,
    plain: bool,
    rows: int,
    k: int,
) -> None: ...
def head_norm(
    program: Program | None,
    x: Matrix,
    out: Matrix,
    pages: int,
    page_scales: int,
    page: int,
    slot: int,
    weight: int,
    cos: int,
    sin: int,
    position: int,
    eps: float,
    page_dtype: int,
    rows: int,
    n_heads: int,
    dim: int,
) -> None: ...
def gated(
    program: Program | None,
    gate: Matrix,
    up: Matrix,
    out: Matrix,
    activation: int,
    rows: int,
    k: int,
) -> None: ...
def embed(
    program: Program | None, weight: Weight, token: int, out: Matrix, scale: float, rows: int
) -> None: ...
def copy_rows(
    program: Program | None, x: Matrix, row: int, out: Matrix, rows: int, k: int
) -> None: ...
def softcap(program: Program | None, x: Matrix, cap: float, rows: int, n: int) -> None: ...
def argmax(
    program: Program | None,
    x: Matrix,
    ids: int,
    chosen: int,
    block: int,
    out: int,
    probability: int,
    rows: int,
    n: int,
) -> None: ...
def scatter_blocks(
    program: Program | None,
    x: Matrix,
    ids: int,
    chosen: int,
    block: int,
    count: int,
    out: Matrix,
    rows: int,
    n: int,
) -> None: ...
def top(
    program: Program | None,
    x: Matrix,
    ids: int,
    weights: int,
    per_expert: int,
    count: int,
    rows: int,
    n: int,
) -> None: ...
def combine(
    program: Program | None, x: Matrix, weights: int, out: Matrix, count: int, rows: int, k: int
) -> None: ...
def read_all(data: int, bytes: int) -> None: ...
def short_conv(
    program: Program | None,
    x: Matrix,
    out: Matrix,
    weight: int,
    bias: int,
    state: int,
    sequence: int,
    read: int,
    write: int,
    rows: int,
    channels: int,
    width: int,
) -> None: ...
def delta_rule(
    program: Program | None,
    qkv: Matrix,
    a: Matrix,
    b: Matrix,
    out: Matrix,
    decay: int,
    bias: int,
    state: int,
    sequence: int,
    read: int,
    write: int,
    rows: int,
    n_k_heads: int,
    n_v_heads: int,
    k_dim: int,
    v_dim: int,
) -> None: ...
def gated_norm(
    program: Program | None,
    x: Matrix,
    gate: Matrix,
    out: Matrix,
    weight: int,
    eps: float,
    rows: int,
    n_heads: int,
    dim: int,
) -> None: ...
def scan(
    program: Program | None,
    x: Matrix,
    dt: Matrix,
    out: Matrix,
    decay: int,
    bias: int,
    skip: int,
    least_step: float,
    most_step: float,
    state: int,
    sequence: int,
    read: int,
    write: int,
    rows: int,
    n_heads: int,
    n_groups: int,
    n_state: int,
    dim: int,
) -> None: ...
def group_norm(
    program: Program | None,
    x: Matrix,
    gate: Matrix,
    out: Matrix,
    weight: int,
    eps: float,
    rows: int,
    n_groups: int,
    dim: int,
) -> None: ...
def sigmoid_top(
    program: Program | None,
    x: Matrix,
    bias: int,
    ids: int,
    weights: int,
    scale: float,
    normalise: bool,
    count: int,
    n_groups: int,
    top_groups: int,
    rows: int,
    n: int,
) -> None: ...
