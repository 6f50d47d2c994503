"""`outdraft bench`: plain decoding against drafting. The measuring is that of bench/."""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outdraft.cli import options
from outdraft.cli.console import counting, remark, remarks, results, save
from outdraft.errors import OutdraftError
from outdraft.request import SamplingParams

if TYPE_CHECKING:
    from outdraft.bench.prompts import Prompt
    from outdraft.bench.run import Arm, Peer, Run
    from outdraft.engine.engine import LLM


class PeerName(StrEnum):
    """Engines to compare with; an enumeration because an option that repeats takes no literals."""

    TRANSFORMERS = "transformers"
    LLAMA_CPP = "llama.cpp"


Peers = Annotated[
    list[PeerName] | None,
    typer.Option(help="Also run another engine on the same weights; may be repeated."),
]
LlamaServer = Annotated[
    Path | None, typer.Option(help="llama.cpp's llama-server, where it is not found.")
]

app = typer.Typer(add_completion=False)


@app.command()
def bench(
    ctx: typer.Context,
    model: options.Model,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write a report here, and a chart beside it.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 5,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each prompt.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens written after each prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="Of the sampled half.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of prompts and of sampling.")] = 0,
    prompt_dir: Annotated[
        Path | None, typer.Option(help="Cut prompts from the Python texts (*.txt, *.py) in here.")
    ] = None,
    peer: Peers = None,
    llama_server: LlamaServer = None,
    assistant: options.Assistant = None,
    adapter: options.Adapter = None,
    spec_draft_n_max: options.DraftMax = None,
    spec_draft_sample: options.DraftSample = True,
    device: options.Card = "auto",
    backend: options.Kernels = "auto",
    dtype: options.Compute = "auto",
    quant: options.Bits = "auto",
    kv_dtype: options.KvType = "bf16",
    threads: options.Threads = None,
    cache: options.Cache = True,
    cache_dir: options.CacheDir = None,
    cache_max_gb: options.CacheMax = options.CACHE_MAX_GB,
) -> None:
    """Measure plain decoding against drafting, by kind of prompt.

    Greedy and sampled, interleaved on one engine, on held-out code, JSON, prose and repetition.
    Two words are no model: `bench kernels` times single kernels, `bench shape` a published shape.
    """
    greedy = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=seed)
    sampled = replace(greedy, temperature=temperature)
    if sampled.greedy:
        raise OutdraftError("temperature is 0", "greedy is measured anyway; give one above 0")
    from outdraft.cli.streaming import load

    llm = load(model, options.engine_config(ctx.params, max_sequences=1))
    chosen = find_prompts(llm, prompt_dir, prompts, seed)
    with ExitStack() as stack:
        peers = start_peers(llm, dict.fromkeys(peer or ()), llama_server, stack)
        report = compare(llm, chosen, greedy, sampled, repeat, peers)
    report["settings"] = {"model": model, "repeats": repeat, **settings_of(llm, sampled)}
    show(report)
    if json_file is not None:
        from outdraft.bench.chart import draw

        save(report, json_file, draw)


def settings_of(llm: "LLM", sampled: SamplingParams) -> dict[str, Any]:
    """What the measurement depends on, for the report."""
    return {
        "computes": llm.describe(),
        "drafter": llm.pairing.reason,
        "draft_n_max": llm.pairing.n_draft_max,
        "sample_drafts": llm.config.sample_drafts,
        "max_tokens": sampled.max_tokens,
        "temperature": sampled.temperature,
        "seed": sampled.seed,
    }


def find_prompts(llm: "LLM", directory: Path | None, n: int, seed: int) -> "list[Prompt]":
    """The prompts to use.

    Raises:
        OutdraftError: the directory has no texts that prompts can be cut from.
    """
    from outdraft.bench.prompts import CANDIDATES, HELDOUT, choose_prompts, read_sources

    chosen = choose_prompts(read_sources(directory or HELDOUT), n, llm.encode, seed=seed)
    if not chosen:
        raise OutdraftError(
            f"the texts in {directory} are too short for a prompt", "give longer Python files"
        )
    for kind in CANDIDATES:
        found = sum(prompt.kind == kind for prompt in chosen)
        if found < n:
            remark(f"prompts: only {found} of kind {kind} instead of {n}")
    return chosen


def compare(
    llm: "LLM",
    prompts: "Sequence[Prompt]",
    greedy: SamplingParams,
    sampled: SamplingParams,
    repeats: int,
    peers: "Sequence[Peer]" = (),
) -> dict[str, Any]:
    """Measure everything; the report without its settings."""
    from outdraft.bench.machine import describe_machine, describe_version
    from outdraft.bench.report import compare_peer, headline, summarise
    from outdraft.bench.run import own_arms

    arms = own_arms(llm, llm.pairing.n_draft_max)
    theirs = [arm for peer in peers for arm in peer.arms]
    greedy_runs = measure("greedy", [*arms, *theirs], prompts, greedy, repeats)
    sampled_runs = measure("sampled", arms, prompts, sampled, repeats)
    in_greedy, in_sampled = summarise(greedy_runs), summarise(sampled_runs)
    del in_sampled["identical"]  # equal in distribution, not token by token
    report = {
        **headline(in_greedy),
        "kinds": in_greedy["kinds"],
        "overall": in_greedy["overall"],
        "sampled": in_sampled,
        "prompts": [
            {"kind": p.kind, "source": p.source, "line": p.line, "n_tokens": len(p.tokens)}
            for p in prompts
        ],
        "machine": describe_machine(),
        **describe_version(),
    }
    if peers:
        report["peers"] = {
            peer.about["name"]: peer.about
            | compare_peer(greedy_runs, peer.arms[0].name, [arm.name for arm in peer.arms[1:]])
            for peer in peers
        }
    return report


def start_peers(
    llm: "LLM", names: Collection[PeerName], llama_server: Path | None, stack: ExitStack
) -> "list[Peer]":
    """The engines to compare with; what they hold is released with the stack.

    Raises:
        OutdraftError: there is no drafter, or a peer cannot be used.
    """
    from outdraft.models.gemma4_config import Gemma4Config

    if llm.pairing.drafter is None or llm.pairing.path is None:
        raise OutdraftError(
            f"there is nothing to compare: {llm.pairing.reason}",
            "give the drafter with --assistant, and a --spec-draft-n-max above 0",
        )
    peers: list[Peer] = []
    if names and not isinstance(llm.target.config, Gemma4Config):
        raise OutdraftError(
            "--peer compares Gemma 4 with its assistant only", "leave it out for other models"
        )
    for name in names:
        with remarks().status(f"starting {name}"):
            if name is PeerName.TRANSFORMERS:
                from outdraft.bench.peers import transformers

                path, k = llm.pairing.path, llm.pairing.n_draft_max
                peers.append(transformers.build_peer(llm.target, path, k))
            else:
                from outdraft.bench.peers import llama_cpp

                peers.append(stack.enter_context(llama_cpp.build_peer(llm, llama_server)))
    return peers


def measure(
    label: str,
    arms: "Sequence[Arm]",
    prompts: "Sequence[Prompt]",
    params: SamplingParams,
    repeats: int,
) -> "list[Run]":
    """All runs of one mode, behind a progress bar that shows the newest rate."""
    from outdraft.bench.run import measure_all, warm_up

    runs = []
    with counting(label) as progress:
        total = len(arms) * len(prompts) * repeats
        task = progress.add_task(label, total=total, newest="warming up")
        warm_up(arms, prompts[0], params)
        for run in measure_all(arms, prompts, params, repeats):
            runs.append(run)
            newest = f"{run.kind}, {run.arm}: {run.result.decode_tok_s:.1f} tokens/s"
            progress.update(task, advance=1, newest=newest)
    return runs


def show(report: dict[str, Any]) -> None:
    """The report as tables on stdout."""
    settings, machine, sampled = report["settings"], report["machine"], report["sampled"]
    console = results()
    console.print(f"\n{settings['model']} on {machine['cpu']}, threads: {machine['threads']}")
    console.print(f"{settings['computes']}, up to {settings['draft_n_max']} drafts a step")
    console.print(table("greedy", report["kinds"] | {"all": report["overall"]}))
    title = f"temperature {settings['temperature']}"
    console.print(table(title, sampled["kinds"] | {"all": sampled["overall"]}))
    for peer in report.get("peers", {}).values():
        console.print(peer_table(peer))
    costs = report["overall"]
    console.print(
        f"In passes of plain decoding, a draft step costs {costs['draft_step_cost']:.2f} "
        f"and a verifying pass {costs['verify_cost']:.2f}."
    )
    identical = "identical to" if report["identical"] else "DIFFERENT from"
    console.print(f"Greedy tokens with drafting are {identical} those without.")


def table(mode: str, kinds: dict[str, dict[str, Any]]) -> Any:
    """A rich table of our two arms, one row a kind."""
    made = new_table(
        f"{mode}: tokens per second, speed-up (quartiles over prompts);\n"
        "auto: with chosen lengths; share of draft/verify/rest; accepted by position",
        ["plain", "draft", "speed-up", "auto", "t/pass", "time %", "accepted %"],
    )
    for kind, figures in kinds.items():
        spread, time = figures["speedup_spread"], figures["time_share"]
        made.add_row(
            kind,
            f"{figures['plain_tok_s']:.0f}",
            f"{figures['draft_tok_s']:.0f}",
            f"{figures['speedup']:.2f} ({spread['q1']:.2f}–{spread['q3']:.2f})",
            f"{figures['auto_speedup']:.2f}",
            f"{figures['tokens_per_pass']:.2f}",
            "/".join(f"{100 * time[part]:.0f}" for part in ("draft", "verify", "rest")),
            " ".join(f"{100 * share:.0f}" for share in figures["acceptance"]),
        )
    return made


def peer_table(peer: dict[str, Any]) -> Any:
    """A rich table of a peer's figures, and ours over its: its best mode may be its plain one."""
    kinds = peer["kinds"] | {"all": peer["overall"]}
    made = new_table(
        f"{peer['name']} {peer['version']}, greedy: tokens per second (medians),\n"
        f"{peer['assisted']} answers equal to its plain ones, our speed over its;\n"
        f"its best over all prompts: {peer['best']}",
        ["plain", "assisted", "equal", "ours plain", "drafting", "/ its best"],
    )
    for kind, figures in kinds.items():
        made.add_row(
            kind,
            f"{figures['plain_median_tok_s']:.1f}",
            f"{figures['assisted_median_tok_s']:.1f}",
            figures["assisted_equals_its_plain"],
            f"{figures['ours_over_its_plain']:.2f}",
            f"{figures['ours_drafting_over_its_assisted']:.2f}",
            f"{figures['ours_drafting_over_its_best']:.2f}",
        )
    return made


def new_table(title: str, columns: list[str]) -> Any:
    """A table with the kind of prompt in its first column, at most 80 characters wide."""
    from rich.table import Table

    made = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
    )
    made.add_column("", no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    return made
