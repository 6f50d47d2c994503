"""From the tensors a checkpoint has to the tensors a model expects: every one accounted for.

Here: names and prefixes, the strict check, reading one tensor when it is asked for. Not here: what
each family expects and may ignore (models/), packed int4 (int4.py), announcing what was ignored
(cli/).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from outdraft.errors import WeightsError
from outdraft.ops.stored import Form, Int8Rows, Rows, StoredWeight
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.header import TensorSpec
from outdraft.weights.int4 import Int4Scheme, Int4Source, find_int4
from outdraft.weights.quantise import SCALE_SUFFIX

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
    int4: Int4Scheme | None = None
    sources: dict[str, str] = field(default_factory=dict)  # canonical name -> name in the file
    scales: dict[str, str] = field(default_factory=dict)  # canonical name -> its scale in the file
    packed: dict[str, Int4Source] = field(default_factory=dict)  # by canonical name
    missing: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)  # wrong shape or dtype, in words
    unexpected: list[str] = field(default_factory=list)
    ignored: dict[str, list[str]] = field(default_factory=dict)  # reason -> names in the file

    def __contains__(self, name: str) -> bool:
        return name in self.sources or name in self.packed


class Weights(Mapping[str, torch.Tensor | StoredWeight]):
    """The tensors of a checkpoint by canonical name; each is read when it is asked for.

    With `stored`, matrices come as `StoredWeight`, to be read in ranges of rows. The rest
    is put on `device`.
    """

    def __init__(
        self,
        plan: _Plan,
        expected: Mapping[str, ExpectedTensor],
        dtype: torch.dtype,
        stored: bool,
    ) -> None:
        self._plan = plan
        self._expected = expected
        self.checkpoint = plan.checkpoint
        self.dtype = dtype
        self.stored = stored
        self.device: torch.device | None = None
        self.changed: Callable[[str, StoredWeight], StoredWeight] | None = None
        """By canonical name, what stands for a matrix (an adapter's sum)."""

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._expected if name in self._plan)

    def __len__(self) -> int:
        return len(self._plan.sources) + len(self._plan.packed)

    def __getitem__(self, name: str) -> torch.Tensor | StoredWeight:
        """The tensor `name`, contiguous and independent of the files.

        Raises:
            WeightsError: the file has changed or gone since it was opened.
        """
        wanted = self._expected[name]
        if len(wanted.shape) >= 2 and wanted.dtype is None:
            weight = self._stored(name, wanted.shape)
            if self.changed is not None:
                weight = self.changed(name, weight)
            return weight if self.stored else weight.floats()
        tensor = self._plan.checkpoint.get(self._plan.sources[name])
        return tensor.to(device=self.device, dtype=wanted.dtype or self.dtype)

    @property
    def n_params(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(self._expected[name].shape) for name in self)

    @property
    def n_bytes(self) -> int:
        """Size of all tensors in the files."""
        plan = self._plan
        names = [*plan.sources.values(), *plan.scales.values()]
        names += [name for four in plan.packed.values() for name in four.names]
        return sum(self.checkpoint.spec(name).n_bytes for name in names)

    def matrices(self) -> Iterator[torch.Tensor]:
        """A random tensor for each shape of a matrix, one at a time."""
        generator = torch.Generator().manual_seed(0)
        shapes = {spec.shape for spec in self._expected.values() if len(spec.shape) == 2}
        for shape in sorted(shapes):
            yield torch.randn(shape, generator=generator).to(self.dtype)

    def _stored(self, name: str, shape: tuple[int, ...]) -> StoredWeight:
        plan = self._plan
        if name in plan.packed:
            four = plan.packed[name]
            return StoredWeight(
                name, shape, self.dtype, "int4", four.read, four.group, four.zero_points
            )
        checkpoint, source = plan.checkpoint, plan.sources[name]
        scale = plan.scales.get(name)

        def read(block: int, first: int, count: int) -> Rows:
            if len(shape) == 3:
                first += block * shape[1]
                rows = checkpoint.flat_rows(source, first, count)
            else:
                rows = checkpoint.rows(source, first, count)
            if scale is None:
                return rows.to(self.dtype)
            return Int8Rows(rows, checkpoint.rows(scale, first, count)[:, 0].float())

        form: Form = "float" if scale is None else "int8"
        return StoredWeight(name, shape, self.dtype, form, read)


def open_tensors(
    checkpoint: Checkpoint,
    expected: Mapping[str, ExpectedTensor],
    ignore: Sequence[IgnoreRule],
    *,
    prefixes: Sequence[str],
    dtype: torch.dtype,
    int8_channel: bool = False,
    int4: Int4Scheme | None = None,
    stored: bool = False,
) -> tuple[Weights, LoadReport]:
    """Finds every expected tensor and accounts for every other one; reads none of them.

    Args:
        checkpoint: the files.
        expected: by canonical name, e.g. `layers.0.self_attn.q_proj.weight`.
        ignore: what else the file may hold; an expected name is never ignored.
        prefixes: what may stand before canonical names in the file, in order of preference. The
            first under which any expected name is found holds for all; a name without any prefix
            (`lm_head.weight`) is found too.
        dtype: compute dtype, of the result's floating tensors.
        int8_channel: the config declares int8 weights (`quantise.is_int8_channel`).
        int4: what the config declares of packed int4 weights.
        stored: give matrices as `StoredWeight`; else quantised ones are dequantised.

    Returns:
        Tensors by canonical name and a report.

    Raises:
        WeightsError: one error with all that is missing, unexpected, misshapen or of a wrong dtype.
    """
    plan = _Plan(checkpoint, int8_channel, int4)
    _plan_all(plan, expected, ignore, prefixes)
    _raise_problems(plan)
    return Weights(plan, expected, dtype, stored), _report(plan)


def load_tensors(
    checkpoint: Checkpoint,
    expected: Mapping[str, ExpectedTensor],
    ignore: Sequence[IgnoreRule],
    *,
    prefixes: Sequence[str],
    dtype: torch.dtype,
    int8_channel: bool = False,
    int4: Int4Scheme | None = None,
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """All tensors of `open_tensors` at once, dequantised."""
    weights, report = open_tensors(
        checkpoint,
        expected,
        ignore,
        prefixes=prefixes,
        dtype=dtype,
        int8_channel=int8_channel,
        int4=int4,
    )
    tensors = {}
    for name in weights:
        tensor = weights[name]
        assert isinstance(tensor, torch.Tensor)
        tensors[name] = tensor
    return tensors, report


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
            continue
        four = _find_packed(plan, spellings, wanted)
        if four is not None:
            plan.packed[name] = four
        elif not wanted.optional:
            plan.missing.append(prefix + name)
    used = {*plan.sources.values(), *plan.scales.values()}
    for four in plan.packed.values():
        used.update(four.names)
    _plan_rest(plan, [name for name in names if name not in used], prefix, ignore)


def _find_packed(
    plan: _Plan, spellings: Sequence[str], wanted: ExpectedTensor
) -> Int4Source | None:
    """The packed int4 tensors that stand for one weight; what is wrong with them is noted."""
    if plan.int4 is None or len(wanted.shape) != 2:
        return None
    n, k = wanted.shape
    for spelling in spellings:
        found = find_int4(plan.checkpoint, spelling, (n, k), plan.int4)
        if found is not None:
            plan.misfits += found.problems
            return found
    return None


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
    for four in plan.packed.values():
        params_by_dtype["int4"] += four.n_params
    ignored = tuple(
        IgnoredGroup(
            reason=reason,
            count=len(names),
            n_bytes=sum(plan.checkpoint.spec(name).n_bytes for name in names),
            example=names[0],
        )
        for reason, names in plan.ignored.items()
    )
    return LoadReport(
        len(plan.sources) + len(plan.packed), params_by_dtype.total(), params_by_dtype, ignored
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
