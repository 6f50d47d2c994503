"""A recipe: a small model that turns a question and a set of tools into one valid call.

`data OUT` writes questions, tools and calls, and a model to begin from; `shrink BIG OUT` a model of
half the layers; `score MODEL FILE…` asks a served model. docs/distilling.md has the whole recipe.

Here: the programmatic data, its held-out parts (`seen`: new questions to known tools, `unseen`:
tools whose objects and names are in no training row), and the score. All is made from a seed.
"""

import argparse
import json
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

N_TRAIN, N_HELDOUT = 8000, 300

TEMPLATE = """{{ bos_token }}{% if tools %}<|turn>system
{% for tool in tools %}{% set f = tool['function'] %}<|tool>{{ f['name'] }}: \
{{ f['description'] }}(\
{% for key, value in f['parameters']['properties'].items() %}{{ key }}:\
{% if value['enum'] %}{{ value['enum'] | join('|') }}{% else %}{{ value['type'] }}{% endif %}\
{% if key not in f['parameters']['required'] %}?{% endif %}\
{% if not loop.last %},{% endif %}{% endfor %})<tool|>
{% endfor %}<turn|>
{% endif %}{% for message in messages %}\
<|turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ message['content'] | default('', true) | trim }}\
{% for call in message['tool_calls'] or [] %}<|tool_call>call:\
{{ call['function']['name'] }}{{ '{' }}\
{% for key, value in call['function']['arguments'].items() %}{{ key }}:\
{% if value is string %}<|"|>{{ value }}<|"|>{% else %}{{ value | tojson }}{% endif %}\
{% if not loop.last %},{% endif %}{% endfor %}{{ '}' }}<tool_call|>{% endfor %}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""


def _words(text: str) -> list[str]:
    return text.split()


FIRST = _words("""
Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jon Kira Leo Mia Noah Olga Paul Rosa Sam Tara
""")
LAST = _words("""
Lovelace Meyer Novak Ortiz Park Quinn Rossi Silva Turner Ueda Vogel Weber Young Zhang
""")
CITIES = _words("""
Paris London Berlin Rome Madrid Oslo Lisbon Vienna Prague Dublin Athens Boston Denver Tokyo
Osaka Delhi Cairo Lima Quito Seoul Zurich Geneva Milan Naples Porto Krakow
""")
WORDS = _words("""
budget launch garden winter summer training review market coffee travel kitchen piano update
safety contract design holiday server network library history science music river mountain
""")


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter: its schema, values, and how a question says one."""

    schema: dict[str, Any]
    value: Callable[[random.Random], Any]
    phrases: tuple[str, ...]


def _text(draw: Callable[[random.Random], str], *phrases: str) -> Slot:
    # A bound: a text that never ends is the one way in which a forced call can fail.
    return Slot({"type": "string", "maxLength": 48}, draw, phrases)


def _whole(low: int, high: int, *phrases: str) -> Slot:
    return Slot({"type": "integer"}, lambda r: r.randint(low, high), phrases)


def _enum(values: str, *phrases: str) -> Slot:
    words = values.split()
    return Slot({"type": "string", "enum": words}, lambda r: r.choice(words), phrases)


def _person(r: random.Random) -> str:
    return f"{r.choice(FIRST)} {r.choice(LAST)}"


def _date(r: random.Random) -> str:
    return f"2026-{r.randint(1, 12):02}-{r.randint(1, 28):02}"


def _number(r: random.Random) -> str:
    return f"{r.choice('ABCDEFGH')}-{r.randint(100, 9999)}"


def _title(r: random.Random) -> str:
    return " ".join(r.sample(WORDS, r.randint(1, 3)))


SLOTS = {
    "city": _text(lambda r: r.choice(CITIES), "in {}", "for the city {}"),
    "origin": _text(lambda r: r.choice(CITIES), "from {}", "leaving {}"),
    "destination": _text(lambda r: r.choice(CITIES), "to {}", "going to {}"),
    "date": _text(
        lambda r: f"2026-{r.randint(1, 12):02}-{r.randint(1, 28):02}", "on {}", "dated {}"
    ),
    "time": _text(lambda r: f"{r.randint(0, 23):02}:{r.choice((0, 15, 30, 45)):02}", "at {}"),
    "people": _whole(1, 12, "for {} people", "for a group of {}"),
    "minutes": _whole(5, 180, "for {} minutes", "lasting {} minutes"),
    "limit": _whole(1, 50, "at most {}", "no more than {}"),
    "amount": Slot(
        {"type": "number"}, lambda r: r.randint(100, 99999) / 100, ("of {}", "worth {}")
    ),
    "unit": _enum("celsius fahrenheit", "in {}", "with {} degrees"),
    "currency": _enum("EUR USD GBP JPY CHF", "in {}", "using {}"),
    "priority": _enum("low normal high", "with {} priority", "as {} priority"),
    "language": _enum("French German Spanish Italian Polish", "in {}", "written in {}"),
    "person": _text(_person, "for {}", "with {}", "named {}"),
    "email": _text(
        lambda r: f"{r.choice(FIRST).lower()}{r.randint(1, 99)}@{r.choice(WORDS)}.org",
        "to {}",
        "with the address {}",
    ),
    "number": _text(
        lambda r: f"{r.choice('ABCDEFGH')}-{r.randint(100, 9999)}", "number {}", "with id {}"
    ),
    "title": _text(_title, 'called "{}"', 'with the title "{}"'),
    "query": _text(_title, 'about "{}"', 'matching "{}"'),
}

VERBS = {
    "get": ("Get", "Show me", "Tell me", "What is", "I want to see", "Give me"),
    "find": ("Find", "Search for", "Look for", "I am looking for", "Can you find"),
    "create": ("Create", "Add", "Make", "Set up", "I need", "Please create"),
    "delete": ("Delete", "Remove", "Get rid of", "Please delete"),
    "update": ("Update", "Change", "Modify", "Please update"),
    "send": ("Send", "Please send", "Can you send"),
    "book": ("Book", "Reserve", "I would like to book", "Please book"),
    "cancel": ("Cancel", "Call off", "Please cancel"),
    "list": ("List", "Show all", "Give me a list of", "What are"),
}

# Object: (its verbs, required parameters, optional ones).
SEEN = {
    "weather": ("get", "city", "date unit"),
    "flight": ("find book cancel", "origin destination", "date people"),
    "hotel": ("find book", "city", "date people limit"),
    "table": ("book cancel", "person", "time people"),
    "reminder": ("create delete list", "title", "date time"),
    "meeting": ("create update cancel", "title", "date time minutes person"),
    "invoice": ("get create send", "number", "amount currency email"),
    "payment": ("create cancel get", "amount", "currency person"),
    "email": ("send find", "email", "title query"),
    "note": ("create find delete", "title", "query priority"),
    "ticket": ("create update list", "title", "priority person number"),
    "order": ("get cancel update", "number", "date amount"),
    "train": ("find book", "origin destination", "time people"),
    "song": ("find get", "query", "language limit"),
    "recipe": ("find create", "query", "minutes limit"),
    "article": ("find list get", "query", "language date limit"),
    "contact": ("create find delete update", "person", "email city"),
    "event": ("create find list", "city", "date title"),
    "package": ("get send", "number", "city person"),
    "alarm": ("create delete", "time", "title"),
    "report": ("create send get", "title", "date email"),
    "account": ("create delete get", "email", "person language"),
    "room": ("book find", "city", "date minutes people"),
    "translation": ("get", "query language", "priority"),
    "exchange rate": ("get", "currency", "date amount"),
    "task": ("create update delete list", "title", "priority date"),
    "museum": ("find list", "city", "limit language"),
    "course": ("find book", "query", "city language"),
}
UNSEEN = {
    "taxi": ("book cancel", "origin destination", "time people"),
    "film": ("find list", "query", "language date limit"),
    "loan": ("create get", "amount", "currency person"),
    "appointment": ("create cancel", "person", "date time"),
    "parcel": ("get send", "number", "city"),
    "concert": ("find book", "city", "date people"),
    "message": ("send delete", "person", "title priority"),
    "pollution": ("get", "city", "date"),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A tool: verb, object and parameters."""

    verb: str
    thing: str
    required: tuple[str, ...]
    optional: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.verb}_{self.thing.replace(' ', '_')}"

    def schema(self) -> dict[str, Any]:
        """As OpenAI's API takes it."""
        names = (*self.required, *self.optional)
        parameters = {
            "type": "object",
            "properties": {name: SLOTS[name].schema for name in names},
            "required": list(self.required),
            "additionalProperties": False,
        }
        words = {"get": "look up", "list": "list all"}.get(self.verb, self.verb)
        function = {
            "name": self.name,
            "description": f"{words} {self.thing}",
            "parameters": parameters,
            "strict": True,
        }
        return {"type": "function", "function": function}

    def question(self, r: random.Random) -> tuple[str, dict[str, Any]]:
        """A question, and the arguments that it asks for in the schema's order."""
        used = [*self.required, *(name for name in self.optional if r.random() < 0.5)]
        arguments = {name: SLOTS[name].value(r) for name in used}
        said = [r.choice(SLOTS[name].phrases).format(arguments[name]) for name in used]
        r.shuffle(said)
        thing = {"list": f"{self.thing}s"}.get(
            self.verb, f"{r.choice(('a', 'the', 'my'))} {self.thing}"
        )
        text = f"{r.choice(VERBS[self.verb])} {thing} {' '.join(said)}"
        return text + r.choice((".", "", ", please.", "?")), arguments


def kinds(table: dict[str, tuple[str, str, str]]) -> list[Kind]:
    """The tools of a table."""
    return [
        Kind(verb, thing, tuple(required.split()), tuple(optional.split()))
        for thing, (verbs, required, optional) in table.items()
        for verb in verbs.split()
    ]


def rows(table: dict[str, tuple[str, str, str]], n: int, seed: int) -> list[dict[str, Any]]:
    """Conversations of one question and one call, with two to four tools on offer."""
    r = random.Random(seed)
    tools = kinds(table)
    made = []
    for _ in range(n):
        wanted = r.choice(tools)
        offered = [wanted, *r.sample([t for t in tools if t != wanted], r.randint(1, 3))]
        r.shuffle(offered)
        text, arguments = wanted.question(r)
        call = {"type": "function", "function": {"name": wanted.name, "arguments": arguments}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        made.append(
            {
                "messages": [{"role": "user", "content": text}, answer],
                "tools": [tool.schema() for tool in offered],
            }
        )
    return made


def write_data(out: Path) -> None:
    """The three sets, and the built-in model with a template that knows tools."""
    from outdraft.weights.find import resolve_model

    out.mkdir(parents=True, exist_ok=True)
    train = rows(SEEN, N_TRAIN, 1)
    asked = {json.dumps(row["messages"][0]) for row in train}
    seen = [r for r in rows(SEEN, 2 * N_HELDOUT, 2) if json.dumps(r["messages"][0]) not in asked]
    sets = {"train": train, "seen": seen[:N_HELDOUT], "unseen": rows(UNSEEN, N_HELDOUT, 3)}
    for name, made in sets.items():
        text = "".join(json.dumps(row) + "\n" for row in made)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(made)} questions")
    start = out / "start"
    if not start.exists():
        shutil.copytree(resolve_model("demo"), start)
        (start / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def shrink(source: Path, out: Path, layers: Sequence[int]) -> None:
    """A model of some of the layers of another; the last of them must see everything."""
    from outdraft.train.distill import student_weights
    from outdraft.weights.config import read_config
    from outdraft.weights.save import save_checkpoint

    _, weights = student_weights(source)
    kept: dict[str, Any] = {}
    for name, weight in weights.items():
        head, _, rest = name.partition("layers.")
        number, _, inner = rest.partition(".")
        if not rest:
            kept[f"model.{name}"] = weight
        elif int(number) in layers:
            kept[f"model.{head}layers.{list(layers).index(int(number))}.{inner}"] = weight
    config = read_config(source)
    config.pop("quantization_config", None)
    config |= {
        "dtype": "bfloat16",
        "num_hidden_layers": len(layers),
        "layer_types": [config["layer_types"][i] for i in layers],
    }
    files = (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    )
    save_checkpoint(
        out,
        {name: weight.bfloat16().contiguous() for name, weight in kept.items()},
        config,
        extra_files=[source / name for name in files],
    )


def score(model: Path, paths: Sequence[Path]) -> dict[str, Any]:
    """Exact calls and valid calls of a served model, as the data of each file asks."""
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "outdraft", "serve", str(model), "--port", str(port)]
    server = subprocess.Popen([*command, "--spec-type", "ngram"], stderr=subprocess.DEVNULL)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        _wait(port)
        name = client.models.list().data[0].id
        result: dict[str, Any] = {}
        for path in paths:
            data = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for choice in ("auto", "required"):
                with ThreadPoolExecutor(8) as pool:
                    marks = list(pool.map(lambda row: _mark(client, name, row, choice), data))  # noqa: B023
                shares = {key: sum(m[key] for m in marks) / len(marks) for key in marks[0]}
                result[f"{path.stem}, tool_choice {choice}"] = shares | {"n": len(marks)}
        return result
    finally:
        server.terminate()
        server.wait()


def _wait(port: int) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").close()
            return
        except OSError:  # not listening yet, or still loading
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def _mark(client: Any, model: str, row: dict[str, Any], choice: str) -> dict[str, bool]:
    """Whether the answer is one call, valid by its schema, and the one that was asked for."""
    import jsonschema_rs

    answer = client.chat.completions.create(
        model=model,
        messages=row["messages"][:1],
        tools=row["tools"],
        tool_choice=choice,
        temperature=0,
        max_tokens=200,
    )
    calls = answer.choices[0].message.tool_calls or []
    none = {"one call": False, "valid": False, "right name": False, "exact": False}
    if len(calls) != 1:
        return none
    called = calls[0].function
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in row["tools"]}
    wanted = row["messages"][1]["tool_calls"][0]["function"]
    arguments = json.loads(called.arguments)
    known = called.name in schemas
    return {
        "one call": True,
        "valid": known and jsonschema_rs.is_valid(schemas[called.name], arguments),
        "right name": called.name == wanted["name"],
        "exact": called.name == wanted["name"] and arguments == wanted["arguments"],
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("data").add_argument("out", type=Path)
    shrunk = verbs.add_parser("shrink")
    shrunk.add_argument("source", type=Path)
    shrunk.add_argument("out", type=Path)
    shrunk.add_argument("--layers", default="0,3,4,7")
    scored = verbs.add_parser("score")
    scored.add_argument("model", type=Path)
    scored.add_argument("data", type=Path, nargs="+")
    scored.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.verb == "data":
        write_data(given.out)
    elif given.verb == "shrink":
        shrink(given.source, given.out, [int(part) for part in given.layers.split(",")])
    else:
        result = score(given.model, given.data)
        for name, shares in result.items():
            figures = "  ".join(f"{k} {v:.1%}" for k, v in shares.items() if k != "n")
            print(f"{name} ({shares['n']}): {figures}")
        if given.json:
            given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
