"""What a run of `bench kernels` says about our kernels beside the others', size by size.

Reads a report of kernels.py and adds no measurement.
"""

from typing import Any

OURS, W4, W8 = "outdraft", "linear w4", "linear w8"
VERIFY_ROWS = 4
"""Rows of a pass that verifies three drafts."""
PREFILL_ROWS = 512

Row = dict[str, Any]


def summarise(report: dict[str, Any]) -> list[Row]:
    """An entry for each size, with None where the run does not have what it takes.

    `share_of_read`: of our w4 at one row. `w4_cost`, `w8_cost`: of four rows in calls of one.
    `verify` and `prefill`: our w4 and w8 (prefill only) beside the fastest peer, with its label and
    our time over its; at four rows only 4-bit peers that are row-invariant count, at 512 all.
    """
    sizes = dict.fromkeys((row["n"], row["k"]) for row in report["rows"])
    return [_size(report, n, k) for n, k in sizes]


def _size(report: dict[str, Any], n: int, k: int) -> Row:
    rows = {
        (row["backend"], row["kernel"], row["rows"]): row
        for row in report["rows"]
        if (row["n"], row["k"]) == (n, k)
    }
    one, four = rows.get((OURS, W4, 1)), rows.get((OURS, W4, VERIFY_ROWS))
    eight = rows.get((OURS, W8, VERIFY_ROWS))
    peers = [row for row in rows.values() if row["backend"] != OURS]
    equal = [row for row in peers if _is_like_ours(report, row)]
    return {
        "n": n,
        "k": k,
        "share_of_read": one and one["share_of_read"],
        "w4_cost": four and four["cost"],
        "w8_cost": eight and eight["cost"],
        "verify": {"w4": _beside(four, equal)},
        "prefill": {
            name: _beside(rows.get((OURS, kernel, PREFILL_ROWS)), peers)
            for name, kernel in (("w4", W4), ("w8", W8))
        },
    }


def _is_like_ours(report: dict[str, Any], row: Row) -> bool:
    """Whether a row is of 4 bits and gives a row the bits that it has alone."""
    name = label(row)
    return report["bits"][name] == 4 and bool(report["row_invariant"][name])


def _beside(own: Row | None, peers: list[Row]) -> Row | None:
    """Our time over that of the fastest peer with as many rows."""
    found = [row for row in peers if own and row["rows"] == own["rows"]]
    if own is None or not found:
        return None
    best = min(found, key=lambda row: float(row["us"]))
    return {"peer": label(best), "peer_us": best["us"], "ratio": own["us"] / best["us"]}


def label(row: Row) -> str:
    """Backend and kernel."""
    return f"{row['backend']} {row['kernel']}"
