"""Rendering as Hugging Face does, and foreign templates kept within bounds."""

import json
import os
from pathlib import Path

import pytest

from outdraft.errors import ModelError, PromptError
from outdraft.text import chat
from outdraft.text.chat import ChatTemplate

TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {% if message.role not in ('user', 'assistant') %}
        {{ raise_exception('unknown role ' + message.role) }}
    {% endif %}
<{{ message.role }}>{{ message.content }}
{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
MESSAGES = [{"role": "user", "content": "a < b & 'c'"}, {"role": "assistant", "content": "é"}]


def render(source: str, **options: object) -> str:
    return ChatTemplate(source, {"bos_token": "<bos>"}).render(MESSAGES, **options)  # type: ignore[arg-type]


def write_config(directory: Path, **values: object) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return directory


def test_text_of_a_conversation() -> None:
    expected = "<bos><user>a < b & 'c'\n<assistant>é\n"
    assert render(TEMPLATE, add_generation_prompt=False) == expected
    assert render(TEMPLATE) == expected + "<assistant>"


def test_the_file_wins_over_the_config(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    write_config(tmp_path, bos_token={"content": "<b>"}, eos_token=None, add_bos_token=True)
    assert ChatTemplate.load(tmp_path) is None
    write_config(tmp_path, bos_token={"content": "<b>"}, chat_template="{{ bos_token }}config")
    template = ChatTemplate.load(tmp_path)
    assert template is not None and template.render([]) == "<b>config"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file{{ eos_token }}")
    template = ChatTemplate.load(tmp_path)
    assert template is not None and template.render([]) == "<b>file"


def test_of_several_named_templates_the_default_is_used(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}, 3]
    template = ChatTemplate.load(write_config(tmp_path, chat_template=named))
    assert template is not None and template.render([]) == "d"


def test_what_templates_of_hugging_face_need() -> None:
    assert render("{{ messages[0] | tojson }}") == json.dumps(MESSAGES[0], ensure_ascii=False)
    assert render("{{ {'b': 1} | tojson(indent=2) }}") == '{\n  "b": 1\n}'
    assert render("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}") == "user"
    assert render("{{ strftime_now('%Y') | length }}") == "4"
    assert render("{{ tools is none }}{{ enable_thinking }}", enable_thinking=True) == "TrueTrue"
    assert render("{{ tools[0].name }}", tools=[{"name": "add"}]) == "add"


def test_refusals_carry_the_words_of_the_template() -> None:
    template = ChatTemplate(TEMPLATE, {})
    with pytest.raises(PromptError, match="unknown role tool"):
        template.render([{"role": "tool", "content": ""}])
    with pytest.raises(PromptError, match="refuses these messages"):
        template.render([{"role": "user", "content": "x"}, {"role": 3, "content": "y"}])


def test_unknown_options_are_refused() -> None:
    for option in ("chat_template", "messages_", "bos_token", "raise_exception"):
        with pytest.raises(PromptError, match=option):
            render("x", **{option: "y"})


def test_invalid_templates_are_named() -> None:
    for source in ("{% if %}", "{{ a", "{% endfor %}", "{{ 1 / 0 }" + "}"):
        with pytest.raises((ModelError, PromptError)):
            render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% include 'secret.txt' %}",
        "{% for i in range(999999999) %}x{% endfor %}",
    ],
)
def test_class_3_templates_stay_in_the_sandbox(source: str) -> None:
    before = json.dumps(MESSAGES)
    with pytest.raises(PromptError):
        render(source)
    assert json.dumps(MESSAGES) == before


def test_class_2_nothing_beside_the_template_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "canary.py").write_text("open('canary-ran', 'w')")
    (tmp_path / "chat_template.jinja").write_text("{% import 'canary.py' as c %}{{ c }}")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    with pytest.raises(PromptError):
        template.render([])
    assert "canary-ran" not in os.listdir(tmp_path)


def test_output_and_time_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_OUTPUT_CHARS", 1000)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    with pytest.raises(PromptError, match="more than 1000 characters"):
        render(loop)
    assert len(render("{% for i in range(1000) %}x{% endfor %}")) == 1000
    monkeypatch.setattr(chat, "MAX_OUTPUT_CHARS", 10**12)
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.05)
    with pytest.raises(PromptError, match="took longer"):
        render(loop)
