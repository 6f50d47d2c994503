"""Every bad input ends with exit code 2 and a message that names it and says what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import Result

from tests import tiny
from tests.cli.conftest import Invoke


def assert_refused(result: Result, *named: str) -> None:
    """One message with these words, a hint below it, no traceback, nothing on stdout."""
    assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
    message = result.stderr[result.stderr.index("error: ") :]
    for word in named:
        assert word in message, (word, message)
    assert "\n  " in message, "no hint"
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.fixture
def target(pair: Path, tmp_path: Path) -> Path:
    """A copy of the pair to damage."""
    return Path(shutil.copytree(pair, tmp_path / "model"))


def test_not_a_model_directory(outdraft: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("text")
    assert_refused(outdraft("generate", tmp_path, "--prompt", "a"), str(tmp_path), "config.json")
    assert_refused(outdraft("generate", tmp_path / "no", "--prompt", "a"), str(tmp_path / "no"))
    assert_refused(outdraft("generate", file, "--prompt", "a"), str(file))


def test_config_without_weights(outdraft: Invoke, target: Path) -> None:
    (target / "model.safetensors").unlink()
    assert_refused(outdraft("generate", target, "--prompt", "a"), str(target), "no weights")


def test_weights_without_config(outdraft: Invoke, target: Path) -> None:
    (target / "config.json").unlink()
    assert_refused(outdraft("generate", target, "--prompt", "a"), str(target), "config.json")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_weights(outdraft: Invoke, target: Path, keep: int) -> None:
    path = target / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(outdraft("generate", target, "--prompt", "a"), str(path), "download")


@pytest.mark.parametrize("at", [0, 8, 40])
def test_corrupt_header(outdraft: Invoke, target: Path, at: int) -> None:
    path = target / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[at : at + 8] = b"\xff" * 8
    path.write_bytes(bytes(content))
    assert_refused(outdraft("generate", target, "--prompt", "a"), str(path))


def test_a_missing_tensor(outdraft: Invoke, target: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    weights = tiny.target_weights(config)
    del weights["layers.2.mlp.up_proj.weight"]
    tiny.write_model(target, config, weights)
    result = outdraft("generate", target, "--prompt", "a")
    assert_refused(result, "missing", "layers.2.mlp.up_proj.weight")


def test_an_unknown_family(outdraft: Invoke, target: Path) -> None:
    change_config(target, model_type="nobody_knows")
    assert_refused(outdraft("generate", target, "--prompt", "a"), "nobody_knows", "supported")


def test_an_assistant_as_the_model(outdraft: Invoke, target: Path) -> None:
    result = outdraft("generate", target / "assistant", "--prompt", "a")
    assert_refused(result, "assistant", "--assistant")


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"vocab_size": 768}, "vocab_size"),
        ({"hidden_size": 96}, "hidden size"),
        ({"head_dim": 64}, "head_dim of sliding_attention"),
        ({"global_head_dim": 32}, "head_dim of full_attention"),
        ({"sliding_window": 48}, "sliding_window"),
    ],
)
def test_an_assistant_of_another_target(
    outdraft: Invoke, pair: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    other = tiny.tiny_target(tmp_path / "other", **changes)
    assistant = tiny.tiny_assistant(tmp_path / "its", other)
    result = outdraft("generate", pair, "--prompt", "a", "--assistant", assistant)
    assert_refused(result, named)


def test_an_assistant_that_reads_layers_the_target_lacks(
    outdraft: Invoke, pair: Path, tmp_path: Path
) -> None:
    sliding = tiny.tiny_target(tmp_path / "sliding", layer_types=[tiny.S] * 4)
    result = outdraft("generate", sliding, "--prompt", "a", "--assistant", pair / "assistant")
    assert_refused(result, "full_attention")


def test_an_assistant_that_is_not_there(outdraft: Invoke, pair: Path, tmp_path: Path) -> None:
    result = outdraft("generate", pair, "--prompt", "a", "--assistant", tmp_path / "none")
    assert_refused(result, str(tmp_path / "none"))
    plain = outdraft("generate", pair, "--prompt", "a", "--assistant", "x", "--spec-type", "off")
    assert_refused(plain, "assistant", "off")


def test_a_prompt_longer_than_the_context(outdraft: Invoke, pair: Path) -> None:
    result = outdraft("generate", pair, "--prompt", "a" * 40, "--ctx-size", 32)
    assert_refused(result, "41 tokens", "32", "--ctx-size")


@pytest.mark.parametrize(
    "options,named",
    [
        (["--prompt", ""], "empty"),
        (["--prompt-tokens", ""], "empty"),
        (["--prompt-tokens", "2,x"], "2,x"),
        (["--prompt-tokens", "2,512"], "512"),
        (["--prompt-tokens", "-1"], "-1"),
        (["--prompt-file", "/nowhere/prompt"], "/nowhere/prompt"),
        (["--prompt", "a", "--prompt-tokens", "2"], "more than one prompt"),
        ([], "no prompt"),
    ],
)
def test_prompts(outdraft: Invoke, pair: Path, options: list[str], named: str) -> None:
    assert_refused(outdraft("generate", pair, *options), named)


def test_prompts_that_are_not_utf8(outdraft: Invoke, pair: Path, tmp_path: Path) -> None:
    path = tmp_path / "latin1"
    path.write_bytes(b"caf\xe9")
    assert_refused(outdraft("generate", pair, "--prompt-file", path), str(path), "UTF-8")
    assert_refused(outdraft("generate", pair, input=b"caf\xe9"), "UTF-8")


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize(
    "options,named",
    [
        (["--temperature", "-0.1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "inf"], "temperature"),
        (["--top-k", "-1"], "top_k"),
        (["--top-p", "0"], "top_p"),
        (["--top-p", "1.1"], "top_p"),
        (["--min-p", "-0.1"], "min_p"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--seed", "-1"], "seed"),
        (["--stop", ""], "stop string"),
        (["--spec-draft-n-max", "-1"], "draft_n_max"),
        (["--ctx-size", "0"], "ctx_size"),
        (["--threads", "0"], "threads"),
    ],
)
def test_impossible_values(
    outdraft: Invoke, pair: Path, verb: str, options: list[str], named: str
) -> None:
    assert_refused(outdraft(verb, pair, *options, input="a"), named)


@pytest.mark.parametrize("options", [["--temperature", "warm"], ["--dtype", "int3"], ["--nope"]])
def test_what_cannot_be_parsed(outdraft: Invoke, pair: Path, options: list[str]) -> None:
    result = outdraft("generate", pair, "--prompt", "a", *options)
    assert result.exit_code == 2
    assert options[0] in result.stderr and "Traceback" not in result.stderr


def test_chat_without_a_template(outdraft: Invoke, target: Path) -> None:
    (target / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    assert_refused(outdraft("chat", target, input="hello\n"), "chat template", "generate")


def test_a_damaged_tokenizer(outdraft: Invoke, target: Path) -> None:
    (target / "tokenizer.json").write_text("{")
    assert_refused(outdraft("generate", target, "--prompt", "a"), "tokenizer.json")


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_draft_model_of_another_vocabulary(outdraft: Invoke, tmp_path: Path) -> None:
    target, small = tiny.tiny_hybrid(tmp_path / "m"), tiny.tiny_target(tmp_path / "small")
    text = (small / "tokenizer.json").read_text()
    (small / "tokenizer.json").write_text(text.replace("<unused9>", "<other9>"))
    result = outdraft("generate", target, "--prompt", "a", "--assistant", small)
    assert_refused(result, "token 271 is '<unused9>' for the target and '<other9>'")


def test_a_head_that_is_claimed_and_not_whole(outdraft: Invoke, tmp_path: Path) -> None:
    path = tiny.tiny_hybrid(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    for dropped, named in (
        ("mtp.fc", "missing, such as mtp.fc.weight"),
        ("mtp.", "claims 1 MTP layer and no mtp.* tensor is there"),
    ):
        kept = {n: t for n, t in tensors.items() if not n.startswith(dropped)}
        save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
        result = outdraft("generate", path, "--prompt", "a", "--spec-type", "mtp")
        assert_refused(result, named)
