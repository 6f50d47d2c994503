"""The files of gpu_run.sh as one table: `gpu_table.py DIRECTORY` prints Markdown."""

import json
import sys
from pathlib import Path


def row_of(report):
    passes = {int(row["rows"]): row["us"] for row in report["cost_by_rows"]}
    best = max(report["drafting"], key=lambda entry: entry["speedup"])
    return [
        report["shape"],
        report["quant"],
        f"{report['plain_tok_s']:.1f}",
        f"{100 * report['share_of_bandwidth']:.1f}",
        f"{report['bytes_per_token'] / passes[1] / 1e3 / report['read_gb_s'] * 100:.1f}",
        f"{passes[4] / passes[1]:.3f}",
        f"{report['draft_step_us']:.0f}",
        f"{best['speedup']:.2f} (k={best['k']:.0f})",
    ]


def main(directory):
    heads = ["shape", "weights", "tokens/s", "% of read", "% in a pass", "cost(4)/cost(1)",
             "draft step, us", "forecast"]  # fmt: skip
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for path in sorted(directory.glob("shape-*.json")):
        print("| " + " | ".join(row_of(json.loads(path.read_text()))) + " |")
    peer = directory / "peer.json"
    if peer.exists():
        for result in json.loads(peer.read_text())["results"]:
            print("transformers:", json.dumps(result))
    kernels = directory / "kernels.json"
    if kernels.exists():
        rows = [r for r in json.loads(kernels.read_text())["linears"] if r["quant"] == "bf16"]
        ours, theirs = (sum(r[f"{name}us_4"] for r in rows) for name in ("", "cublas_"))
        print(f"all bf16 linears once at 4 rows: {ours:.0f} us, cuBLAS {theirs:.0f} us")


main(Path(sys.argv[1]))
