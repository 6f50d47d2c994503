"""Options that several verbs share, each declared once. What they mean is said in config.py."""

from typing import Annotated

import typer

from outdraft.config import Backend, DType, KvDType, Quant, SpecType

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="demo, a model directory, or a downloaded id.", show_default=False
    ),
]
Assistant = Annotated[
    str | None,
    typer.Option(help="The drafter's directory or id; found by itself if not given."),
]
Spec = Annotated[
    SpecType, typer.Option("--spec-type", help="Which drafter: auto, off or gemma4-assistant.")
]
DraftMax = Annotated[
    int | None,
    typer.Option(
        "--spec-draft-n-max", help="Most tokens drafted at once; 0 switches drafting off."
    ),
]
DraftFixed = Annotated[
    int | None,
    typer.Option(
        "--spec-draft-n", help="Draft this many every time, instead of as many as pay off."
    ),
]
DraftSample = Annotated[
    bool,
    typer.Option(
        "--spec-draft-sample/--no-spec-draft-sample",
        help="At temperature above 0, draw drafts instead of taking the most probable token.",
    ),
]
Kernels = Annotated[
    Backend,
    typer.Option("--backend", help="cpu (compiled), reference (PyTorch), or auto."),
]
Compute = Annotated[
    DType,
    typer.Option("--dtype", help="Type of the reference: auto, bfloat16, float16 or float32."),
]
Bits = Annotated[Quant, typer.Option("--quant", help="Weights of cpu: auto, bf16, w8 or w4.")]
KvType = Annotated[KvDType, typer.Option("--kv-dtype", help="Keys and values of cpu.")]
CtxSize = Annotated[
    int | None, typer.Option(help="Longest sequence in tokens; the model's, at most 8192.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; left to PyTorch if not given.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most probable token.")]
TopK = Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the tokens that make up this probability.")]
MinP = Annotated[float, typer.Option(help="Keep tokens above this share of the best one's.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text. Can be repeated.")]
