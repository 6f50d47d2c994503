"""Distilling on tiny models: rows and masks, the divergence, stages, resuming, the end product."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from outdraft import LLM, EngineConfig, SamplingParams
from outdraft.cli.distill import app
from outdraft.engine.engine import Completion
from outdraft.errors import PairingError, TrainingError
from outdraft.train import distill as distill_run
from outdraft.train.distill import distill
from outdraft.train.distill_settings import DistillSettings, check_pair
from outdraft.train.losses import generalised_jsd
from outdraft.train.select import complete
from outdraft.train.traces import (
    Batch,
    Trace,
    Writer,
    batch_of_step,
    parse_row,
    read_conversations,
)
from outdraft.train.trainer import Progress, TrainingStopped
from tests import tiny

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}[{{ tool['function']['name'] }}]{% endfor %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}|"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def quiet(state: Progress) -> None:
    pass


def model(path: Path, seed: int) -> Path:
    tiny.tiny_target(path, seed=seed)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def asked(number: int, *, answer: bool = True) -> dict[str, object]:
    messages = [{"role": "user", "content": f"{number}+{number % 7}"}]
    if answer:
        messages.append({"role": "assistant", "content": str(number + number % 7)})
    return {"messages": messages}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("models") / "student", 0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("models") / "teacher", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(asked(n)) + "\n" for n in range(60)))
    return path


@pytest.fixture
def settings(student: Path, data: Path) -> DistillSettings:
    return DistillSettings(
        student=str(student), data=(str(data),), steps=6, batch=4, n_heldout=6, new_tokens=6
    )


def test_only_what_the_assistant_says_is_marked(student: Path) -> None:
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "sum"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    row = parse_row(json.dumps({"messages": turns, "tools": TOOLS}))
    writer = Writer.load(student)
    trace = writer.trace(row)
    said = writer.tokenizer.decode([t for t, own in zip(trace.ids, trace.mask, strict=True) if own])
    assert said == 'ho|{"name": "add", "arguments": {"a": 1}}|'
    assert trace.ids[: trace.n_given] == writer.prompt(row)
    given = writer.tokenizer.decode(list(trace.ids[: trace.n_given]))
    assert given.endswith("[add]<user>hi|<assistant>ho|<user>sum|<assistant>")


def test_a_template_that_contradicts_itself_is_refused(student: Path, tmp_path: Path) -> None:
    path = model(tmp_path / "odd", 0)
    (path / "chat_template.jinja").write_text("{{ messages | length }}" + TEMPLATE)
    rows = [parse_row(json.dumps(asked(1)))]
    two = parse_row(json.dumps({"messages": [*asked(1)["messages"], *asked(2)["messages"]]}))  # type: ignore[misc]
    traces, bad = distill_run.traces_of([*rows, two], Writer.load(path), 100)
    assert not traces
    assert len(bad) == 2
    assert "does not go on from its own prompt" in bad[0]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"text": "a"}', "no messages"),
        ('{"messages": []}', "not a list of turns"),
        ('{"messages": [{"role": "user"}]}', "no text and no calls"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}', "tools"),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", '
            '"arguments": "{"}}]}]}',
            "arguments of a call are not JSON",
        ),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, row: str, why: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = "".join(json.dumps(asked(n)) + "\n" for n in range(20))
    path.write_text(good + row + "\n")
    rows, bad = read_conversations([path])
    assert len(rows) == 20
    assert bad[0].startswith(f"{path}:21: ")
    assert why in bad[0]
    path.write_text((row + "\n") * 3)
    with pytest.raises(TrainingError, match=r"3 of 3 rows"):
        read_conversations([path])


def test_sharegpt_rows() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    row = parse_row(json.dumps({"conversations": turns}))
    assert [m["role"] for m in row.messages] == ["user", "assistant"]
    assert row.question().messages == row.messages[:1]


def test_every_text_comes_once_an_epoch() -> None:
    traces = [Trace((*tuple(range(3 + n % 11)), n), (True,) * (4 + n % 11)) for n in range(150)]
    seen = [int(t) for step in range(37) for t in _last(batch_of_step(traces, step, 4, 5))]
    assert len(set(seen)) == 148
    again = [int(t) for t in _last(batch_of_step(traces, 36, 4, 5))]
    assert again == seen[-4:]


def _last(batch: Batch) -> torch.Tensor:
    return batch.ids_BS[torch.arange(len(batch.ids_BS)), batch.mask_BS.sum(dim=1) - 1]


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_divergence_is_that_of_its_definition(beta: float) -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    p = torch.softmax(2 * torch.randn(5, 7, generator=generator, dtype=torch.float64), dim=-1)
    q = torch.softmax(scores, dim=-1)
    total = 0.0
    for row_p, row_q in zip(p.tolist(), q.tolist(), strict=True):
        for a, b in zip(row_p, row_q, strict=True):
            m = beta * a + (1 - beta) * b
            if beta == 0:
                total += a * math.log(a / b)
            elif beta == 1:
                total += b * math.log(b / a)
            else:
                jsd = beta * a * math.log(a / m) + (1 - beta) * b * math.log(b / m)
                total += jsd / (beta * (1 - beta))
    found = generalised_jsd(scores, p, lambda x: x, beta)
    assert float(found) == pytest.approx(total / 5, rel=1e-6)
    equal = generalised_jsd(scores, q, lambda x: x, beta)
    assert abs(float(equal)) < 1e-6


def test_a_student_learns_from_data_alone(settings: DistillSettings, tmp_path: Path) -> None:
    report = distill(tmp_path / "out", settings, quiet)
    assert report["heldout_nats"]["after"] < report["heldout_nats"]["before"]
    assert report["steps"] == {"traces": 6}
    assert (tmp_path / "out" / "plot.png").exists()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with LLM(str(tmp_path / "out"), EngineConfig(device="cpu")) as llm:
        prompt = llm.render_chat([{"role": "user", "content": "1+1"}])
        assert llm.generate(prompt, SamplingParams(max_tokens=3)).tokens


def test_its_own_answers_under_a_teacher(
    settings: DistillSettings, teacher: Path, tmp_path: Path
) -> None:
    asked_only = tmp_path / "questions.jsonl"
    asked_only.write_text("".join(json.dumps(asked(n, answer=False)) + "\n" for n in range(60)))
    with_teacher = replace(settings, teacher=str(teacher), data=(str(asked_only),), rounds=2)
    phases: list[str] = []
    report = distill(tmp_path / "out", with_teacher, lambda state: phases.append(state.phase))
    assert report["steps"] == {"traces": 6, "own answers 1": 6, "own answers 2": 6}
    assert {"held-out traces", "training traces", "own answers 2"} <= set(phases)
    with pytest.raises(TrainingError, match="no answer, and there is no teacher"):
        distill(tmp_path / "none", replace(with_teacher, teacher=None), quiet)


def test_stopped_and_resumed_is_the_same(
    settings: DistillSettings, teacher: Path, tmp_path: Path
) -> None:
    settings = replace(settings, teacher=str(teacher), rounds=1)
    distill(tmp_path / "whole", settings, quiet)
    count = 0

    def stop_sometimes(state: Progress) -> None:
        nonlocal count
        count += 1
        if count % 5 == 0:
            raise TrainingStopped

    for _ in range(20):
        try:
            distill(tmp_path / "parts", settings, stop_sometimes)
            break
        except TrainingStopped:
            assert not (tmp_path / "parts").exists()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_other_vocabulary_or_template_is_refused(student: Path, tmp_path: Path) -> None:
    other = model(tmp_path / "other", 0)
    (other / "chat_template.jinja").write_text(TEMPLATE.replace("[{{", "({{"))
    with pytest.raises(PairingError, match="chat templates differ from character"):
        check_pair(other, student)
    (other / "chat_template.jinja").write_text(TEMPLATE)
    check_pair(other, student)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"a"', '"aa"'))
    with pytest.raises(PairingError, match="vocabularies differ: token"):
        check_pair(other, student)


def test_a_run_with_other_settings_is_not_gone_on_with(
    settings: DistillSettings, tmp_path: Path
) -> None:
    def stop(state: Progress) -> None:
        raise TrainingStopped

    with pytest.raises(TrainingStopped):
        distill(tmp_path / "out", settings, stop)
    with pytest.raises(TrainingError, match="other settings or data"):
        distill(tmp_path / "out", replace(settings, seed=1), quiet)


def test_what_learns_nothing_is_not_written(settings: DistillSettings, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="learned nothing"):
        distill(tmp_path / "out", replace(settings, lr=1.0, steps=3), quiet)
    assert not (tmp_path / "out").exists()


def test_a_failed_request_is_no_measurement() -> None:
    class Failing:
        def generate_all(self, prompts: object, params: object) -> list[Completion]:
            return [Completion([1], [2]), Completion([1], error="planted")]

    with pytest.raises(TrainingError, match="the engine failed: planted"):
        complete(Failing(), [(1,)], SamplingParams())  # type: ignore[arg-type]


def test_settings_are_checked(student: Path) -> None:
    base = {"student": str(student), "data": ("a",)}
    for name, value in {"beta": 1.5, "rounds": -1, "batch": 0, "traces": "mine"}.items():
        with pytest.raises(TrainingError, match=name):
            DistillSettings(**base, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="no teacher"):
        DistillSettings(**base, traces="teacher")  # type: ignore[arg-type]


def test_command_line(student: Path, data: Path, tmp_path: Path) -> None:
    options = ["--student", str(student), "--data", str(data), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*options, "--steps", "4", "--n-heldout", "6"])
    assert result.exit_code == 0, result.output
    assert "nats a token on held-out answers" in result.stderr
