"""From the tensors a checkpoint has to the tensors a model expects: every one accounted for.

Here: names and prefixes, the strict check, conversion to the compute dtype. Not here: what each
family expects and may ignore (models/), and announcing what was ignored (cli/).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from outdraft.errors import WeightsError
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.header import TensorSpec
from outdraft.weights.quantise import SCALE_SUFFIX, dequantise_rows

_MAX_LISTED = 8
_FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGER = (torch.int64, torch.int32, torch.int16, torch.uint8)


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """What a model needs under one name.

    An `optional` tensor may be absent from the file. `dtype` None is the model's compute dtype.
    """

    shape: tuple[int, ...]
    optional: bool = False
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class IgnoreRule:
    """Tensors that may be left out, and why.

    `pattern` is a regular expression for the whole name, either as it stands in the file or
    without the checkpoint's prefix.
    """

    pattern: str
    reason: str


@dataclass(frozen=True, slots=True)
class IgnoredGroup:
    """What one rule left out; `example` is the first name, as it stands in the file."""

    reason: str
    count: int
    n_bytes: int
    example: str


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded. `params_by_dtype` counts elements by the file's dtype, e.g. "bfloat16"."""

    n_tensors: int
    n_params: int
    params_by_dtype: Counter[str]
    ignored: tuple[IgnoredGroup, ...]


@dataclass(slots=True)
class _Plan:
    """Which file tensor becomes which expected one, and what does not fit."""

    checkpoint: Checkpoint
    int8_channel: bool
    sources: dict[str, str] = field(default_factory=dict)  # canonical name -> name in the file
    scales: dict[str, str] = field(default_factory=dict)  # canonical name -> its scale in the file
    missing: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)  # wrong shape or dtype, in words
    unexpected: list[str] = field(default_factory=list)
    ignored: dict[str, list[str]] = field(default_factory=dict)  # reason -> names in the file


def load_tensors(
    checkpoint: Checkpoint,
    expected: Mapping[str, ExpectedTensor],
    ignore: Sequence[IgnoreRule],
    *,
    prefixes: Sequence[str],
    dtype: torch.dtype,
    int8_channel: bool = False,
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """Loads every expected tensor and accounts for every other one.

    Args:
        checkpoint: the files.
        expected: by canonical name, e.g. `layers.0.self_attn.q_proj.weight`.
        ignore: what else the file may hold; an expected name is never ignored.
        prefixes: what may stand before canonical names in the file, in order of preference. The
            first under which any expected name is found holds for all; a name without any prefix
            (`lm_head.weight`) is found too.
        dtype: compute dtype, of the result's floating tensors.
        int8_channel: the config declares int8 weights (`quantise.is_int8_channel`): they are
            dequantised.

    Returns:
        Tensors by canonical name, contiguous on the CPU and independent of the files, and a report.

    Raises:
        WeightsError: one error with all that is missing, unexpected, misshapen or of a wrong dtype.
    """
    plan = _Plan(checkpoint, int8_channel)
    _plan_all(plan, expected, ignore, prefixes)
    _raise_problems(plan)
    tensors: dict[str, torch.Tensor] = {}
    for name, source in plan.sources.items():
        tensor = checkpoint.get(source)
        if name in plan.scales:
            tensors[name] = dequantise_rows(tensor, checkpoint.get(plan.scales[name]), dtype)
        else:
            # a copy: mapped memory is unaligned and fails when the file is replaced
            tensors[name] = tensor.to(expected[name].dtype or dtype, copy=True)
    return tensors, _report(plan)


def find_prefix(
    names: Sequence[str], expected: Mapping[str, object], prefixes: Sequence[str]
) -> str:
    """The first prefix under which `names` hold any expected name, else none ("")."""
    present = set(names)
    for prefix in prefixes:
        if any(prefix + name in present for name in expected):
            return prefix
    return ""


def _plan_all(
    plan: _Plan,
    expected: Mapping[str, ExpectedTensor],
    ignore: Sequence[IgnoreRule],
    prefixes: Sequence[str],
) -> None:
    names = plan.checkpoint.names()
    prefix = find_prefix(names, expected, prefixes)
    for name, wanted in expected.items():
        spellings = (prefix + name, name)
        source = next((found for found in spellings if found in plan.checkpoint), None)
        if source is not None:
            _plan_tensor(plan, name, source, wanted)
        elif not wanted.optional:
            plan.missing.append(prefix + name)
    used = {*plan.sources.values(), *plan.scales.values()}
    _plan_rest(plan, [name for name in names if name not in used], prefix, ignore)


def _plan_tensor(plan: _Plan, name: str, source: str, wanted: ExpectedTensor) -> None:
    """Notes where one expected tensor comes from, and what is wrong with it if anything."""
    plan.sources[name] = source
    spec = plan.checkpoint.spec(source)
    if spec.shape != wanted.shape:
        plan.misfits.append(f"{source} is {list(spec.shape)}, expected {list(wanted.shape)}")
    if wanted.dtype is not None:
        kinds = _FLOATING if wanted.dtype.is_floating_point else _INTEGER
        if spec.dtype not in kinds:
            plan.misfits.append(f"{source} is {_short(spec.dtype)}, not {_short(wanted.dtype)}")
    elif spec.dtype == torch.int8:
        _plan_scale(plan, name, spec)
    elif spec.dtype not in _FLOATING:
        plan.misfits.append(f"{source} is {_short(spec.dtype)}, which is not supported yet")


def _plan_scale(plan: _Plan, name: str, spec: TensorSpec) -> None:
    """Notes the scale that belongs to an int8 weight."""
    source = plan.sources[name]
    scale = source + SCALE_SUFFIX
    if not plan.int8_channel:
        plan.misfits.append(f"{source} is int8, but config.json declares no quantization_config")
    if scale not in plan.checkpoint:
        plan.missing.append(scale)
        return
    plan.scales[name] = scale
    found = plan.checkpoint.spec(scale)
    if len(spec.shape) != 2 or found.shape != (spec.shape[0], 1):
        plan.misfits.append(f"{scale} is {list(found.shape)} for {source} {list(spec.shape)}")
    if found.dtype not in _FLOATING:
        plan.misfits.append(f"{scale} is {_short(found.dtype)}, expected floating point")


def _plan_rest(plan: _Plan, rest: Sequence[str], prefix: str, ignore: Sequence[IgnoreRule]) -> None:
    """Finds a reason for every tensor that the model does not expect."""
    rules = [(re.compile(rule.pattern), rule.reason) for rule in ignore]
    for name in rest:
        spellings = (name, name.removeprefix(prefix))
        for pattern, reason in rules:
            if any(pattern.fullmatch(spelling) for spelling in spellings):
                plan.ignored.setdefault(reason, []).append(name)
                break
        else:
            plan.unexpected.append(name)


def _raise_problems(plan: _Plan) -> None:
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (
            ("missing", plan.missing),
            ("unexpected", plan.unexpected),
            ("wrong", plan.misfits),
        )
        if names
    ]
    if problems:
        raise WeightsError(
            f"the weights in {plan.checkpoint.directory} do not fit the model:\n  "
            + "\n  ".join(problems),
            "config.json and weights may be of different models or versions: download both again",
        )


def _listed(items: Sequence[str]) -> str:
    listed = [item if item.isprintable() else repr(item) for item in items[:_MAX_LISTED]]
    return "; ".join(listed) + ("; …" if len(items) > _MAX_LISTED else "")


def _report(plan: _Plan) -> LoadReport:
    params_by_dtype: Counter[str] = Counter()
    for source in plan.sources.values():
        spec = plan.checkpoint.spec(source)
        params_by_dtype[_short(spec.dtype)] += spec.n_params
    ignored = tuple(
        IgnoredGroup(
            reason=reason,
            count=len(names),
            n_bytes=sum(plan.checkpoint.spec(name).n_bytes for name in names),
            example=names[0],
        )
        for reason, names in plan.ignored.items()
    )
    return LoadReport(len(plan.sources), params_by_dtype.total(), params_by_dtype, ignored)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
