"""LoRA adapters: the sum, what is refused and how it is named, the cache, drafting beside one."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from outdraft import LLM, EngineConfig, SamplingParams
from outdraft.cli.inspect import app as inspect_app
from outdraft.errors import ModelError, WeightsError
from outdraft.models import gemma4
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.models.registry import load_target, open_weights
from outdraft.ops.stored import StoredWeight, to_floats
from outdraft.weights.adapter import open_adapter
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config
from tests import adapters, tiny

ATTENTION = ("q_proj", "v_proj", "o_proj")
MODULES = {
    "plain": (*ATTENTION, "gate_proj", "down_proj"),
    "e2b": ("q_proj", "k_proj", "up_proj", "per_layer_input_gate", "per_layer_model_projection"),
    "moe": (*ATTENTION, "router.proj", "up_proj"),
    "qwen3_5": ("q_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "up_proj", "lm_head"),
    "qwen3_5_moe": ("in_proj_a", "shared_expert.gate_proj", "k_proj"),
    "ministral3": ("k_proj", "down_proj", "lm_head"),
}
PROMPT = [2, 9, 30, 41, 77, 12, 200]


def logits(model: Path, config: EngineConfig) -> torch.Tensor:
    """Log-probabilities after each token of a text, as the engine serves them."""
    with LLM(str(model), config) as llm:
        params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=20)
        done = llm.generate(PROMPT, params)
        return torch.tensor([[value for _, value in p.top] for p in done.logprobs])


def weights_of(model: Path, adapter: Path | None) -> dict[str, torch.Tensor]:
    """What the reference multiplies by, in the checkpoint's type."""
    config = EngineConfig(
        backend="reference",
        adapter=None if adapter is None else str(adapter),
    )
    return dict(tensors_in(load_target(model, config).model, "", set()))


def tensors_in(value: object, name: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in a model's attributes, by path."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_in(item, f"{name}.{key}", seen)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{name}.{index}", seen)
    elif type(value).__module__.startswith("outdraft"):
        names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
        for key in names:
            yield from tensors_in(getattr(value, key), f"{name}.{key}", seen)


@pytest.mark.parametrize("shape", MODULES)
def test_served_is_what_a_merged_checkpoint_would_be(tmp_path: Path, shape: str) -> None:
    model = tiny.tiny_target(tmp_path / "model", shape)
    adapter = adapters.write_adapter(tmp_path / "adapter", model, MODULES[shape])
    whole = adapters.merge_into(tmp_path / "merged", model, adapter)
    ours, wanted, base = (
        weights_of(model, adapter),
        weights_of(whole, None),
        weights_of(model, None),
    )
    changed = [name for name in wanted if not torch.equal(wanted[name], base[name])]
    assert len(changed) >= 3
    for name, weight in wanted.items():
        assert float((ours[name] - weight).abs().max()) < 1e-6, name
    for quant in ("bf16", "w8", "w4"):
        config = EngineConfig(device="cpu", spec_type="off", quant=quant)  # type: ignore[arg-type]
        with_it = EngineConfig(
            device="cpu",
            spec_type="off",
            quant=quant,
            adapter=str(adapter),  # type: ignore[arg-type]
        )
        a, b = logits(model, with_it), logits(whole, config)
        assert torch.allclose(a, b, atol=0.02), quant
        assert not torch.allclose(logits(model, config), b, atol=0.02)


def test_the_scale_is_pefts(tmp_path: Path) -> None:
    model = tiny.tiny_target(tmp_path / "model")
    kinds: list[dict[str, Any]] = [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
        {"alpha": 0.5, "r": 1},
    ]
    for number, kind in enumerate(kinds):
        adapter = adapters.write_adapter(tmp_path / f"a{number}", model, ATTENTION, **kind)
        whole = adapters.merge_into(tmp_path / f"m{number}", model, adapter)
        ours, wanted = weights_of(model, adapter), weights_of(whole, None)
        assert max(float((ours[k] - w).abs().max()) for k, w in wanted.items()) < 1e-6


def test_any_range_of_rows_is_the_same_sum(tmp_path: Path) -> None:
    """Weights are read and packed a range of rows at a time."""
    model = tiny.tiny_target(tmp_path / "model")
    directory = adapters.write_adapter(tmp_path / "adapter", model, ATTENTION)
    raw = read_config(model)
    config = Gemma4Config.from_hf(raw)
    expected, rules = gemma4.expected_tensors(config), gemma4.ignore_rules(config)
    adapter = open_adapter(directory, expected, rules, gemma4.PREFIXES)
    stored, _, _ = open_weights(
        Checkpoint.open(model), raw, expected, rules, prefixes=gemma4.PREFIXES, dtype=torch.float32
    )
    stored.changed, stored.stored = adapter.merged, True
    assert adapter.pairs
    for name in adapter.pairs:
        weight = stored[name]
        n_rows = weight.shape[0]
        assert isinstance(weight, StoredWeight)
        whole = to_floats(weight.read(0, 0, n_rows), torch.float32)
        for first, count in ((1, 3), (n_rows - 5, 5), (n_rows // 2, 7)):
            part = to_floats(weight.read(0, first, count), torch.float32)
            assert torch.equal(part, whole[first : first + count]), name


@pytest.mark.parametrize("rslora", [False, True])
def test_against_the_library(tmp_path: Path, rslora: bool) -> None:
    """An adapter that PEFT itself saved, and PEFT's own merge of it."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = tiny.tiny_target(tmp_path / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_rslora=rslora,
        rank_pattern={"layers.2.mlp.down_proj": 6}, alpha_pattern={"q_proj": 9},
        init_lora_weights=False,
    )  # fmt: skip
    tuned = peft.get_peft_model(base, config)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / file, tmp_path / "merged" / file)
    ours = weights_of(model, tmp_path / "adapter")
    wanted = weights_of(tmp_path / "merged", None)
    plain = weights_of(model, None)
    assert sum(not torch.equal(plain[name], wanted[name]) for name in wanted) == 8
    assert max(float((ours[k] - w).abs().max()) for k, w in wanted.items()) < 1e-6


def change(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "stacked experts"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"r": 5}, "lora_A.weight is float32 [4, 64], expected [5, 64]"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": None}, "lora_alpha None"),
    ],
)
def test_kinds_that_are_refused(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    model = tiny.tiny_target(tmp_path / "model")
    adapter = adapters.write_adapter(tmp_path / "adapter", model, ATTENTION)
    change(adapter, **fields)
    with pytest.raises(WeightsError) as raised:
        weights_of(model, adapter)
    assert said in raised.value.message and raised.value.hint


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "tensors,said",
    [
        ({A: torch.zeros(4, 65)}, f"{A} is float32 [4, 65], expected [4, 64]"),
        ({A: torch.zeros(4, 64, dtype=torch.int64)}, "is int64 [4, 64]"),
        ({A.replace("lora_A", "lora_B"): torch.zeros(64, 4)}, "expected [128, 4]"),
        ({A: None}, f"{A} is missing"),
        ({A.replace(".1.", ".9."): torch.zeros(4, 64)}, "layers.9.self_attn.q_proj: the model has"),
        ({A.replace("lora_A", "magnitude"): torch.zeros(4)}, "is not a LoRA matrix"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4)}, "embed_tokens"),
        ({"model.layers.1.q_proj.lora_A.weight": torch.zeros(4, 64)}, "is not a LoRA matrix"),
        ({A.replace("self_attn.q_proj", "input_layernorm"): torch.zeros(4, 64)}, "input_layernorm"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor | None], said: str
) -> None:
    model = tiny.tiny_target(tmp_path / "model")
    adapter = adapters.write_adapter(tmp_path / "adapter", model, ATTENTION)
    path = adapter / "adapter_model.safetensors"
    found = load_file(path) | tensors
    save_file({name: t for name, t in found.items() if t is not None}, path)
    with pytest.raises(WeightsError) as raised:
        weights_of(model, adapter)
    assert said in raised.value.message, raised.value.message


def test_what_is_added_to_a_tied_head_is_refused(tmp_path: Path) -> None:
    """The tied head is left out of loading, but not of the model."""
    model = tiny.tiny_target(tmp_path / "model")
    adapter = adapters.write_adapter(tmp_path / "adapter", model, ATTENTION)
    path = adapter / "adapter_model.safetensors"
    more = {f"base_model.model.lm_head.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}
    save_file(load_file(path) | more, path)
    with pytest.raises(WeightsError, match="lm_head"):
        weights_of(model, adapter)


def test_what_is_added_to_a_tower_is_passed_over(tmp_path: Path) -> None:
    model = tiny.tiny_target(tmp_path / "model")
    adapter = adapters.write_adapter(tmp_path / "adapter", model, ATTENTION)
    path = adapter / "adapter_model.safetensors"
    tower = "base_model.model.model.vision_tower.layers.0.q_proj"
    more = {f"{tower}.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}
    before = weights_of(model, adapter)
    save_file(load_file(path) | more, path)
    after = weights_of(model, adapter)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_files_that_are_missing(tmp_path: Path) -> None:
    model = tiny.tiny_target(tmp_path / "model")
    adapter = adapters.write_adapter(tmp_path / "adapter", model, ATTENTION)
    with pytest.raises(ModelError, match="nowhere"):
        weights_of(model, tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="has no adapter_config"):
        weights_of(model, model)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(WeightsError, match="has no adapter_model"):
        weights_of(model, adapter)


def test_the_cache_tells_adapters_apart(tmp_path: Path) -> None:
    model = tiny.tiny_target(tmp_path / "model", dtype="bfloat16")
    one = adapters.write_adapter(tmp_path / "one", model, ATTENTION)
    two = adapters.write_adapter(tmp_path / "two", model, ATTENTION, seed=8)
    cache = str(tmp_path / "cache")
    fresh, kept = {}, {}
    for found, folder in ((fresh, None), (kept, cache), (kept, cache)):
        for name in (None, str(one), str(two)):
            config = EngineConfig(
                device="cpu", spec_type="off", quant="w8", cache_dir=folder, adapter=name
            )
            found[name] = logits(model, config)
    assert len(list((tmp_path / "cache").glob("*.packed"))) == 3
    assert all(torch.equal(fresh[name], kept[name]) for name in fresh)
    assert not torch.equal(fresh[str(one)], fresh[str(two)])


@pytest.mark.parametrize("shape", ["plain", "qwen3_5"])
def test_drafting_beside_an_adapter_changes_no_token(tmp_path: Path, shape: str) -> None:
    hybrid = shape == "qwen3_5"
    model = (tiny.tiny_hybrid if hybrid else tiny.tiny_target)(tmp_path / "model")
    adapter = adapters.write_adapter(tmp_path / "adapter", model, MODULES[shape])
    drafter = None if hybrid else str(tiny.tiny_assistant(tmp_path / "assistant", model))
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    tokens = []
    for config in (
        EngineConfig(device="cpu", adapter=str(adapter), spec_type="off"),
        EngineConfig(device="cpu", adapter=str(adapter), assistant=drafter, draft_n=3),
        EngineConfig(device="cpu", spec_type="off"),
    ):
        with LLM(str(model), config) as llm:
            done = llm.generate(PROMPT, params)
            assert config.spec_type == "off" or done.stats.n_drafted > 0
            tokens.append(done.tokens)
    assert tokens[0] == tokens[1] != tokens[2]


def test_int_checkpoints_take_adapters(tmp_path: Path) -> None:
    plain = tiny.tiny_target(tmp_path / "plain")
    model = tiny.int4_target(tmp_path / "int4", plain)
    adapter = adapters.write_adapter(tmp_path / "adapter", plain, ATTENTION)
    base, ours = weights_of(model, None), weights_of(model, adapter)
    dense, wanted = weights_of(plain, None), weights_of(plain, adapter)
    for name in base:
        added, expected = ours[name] - base[name], wanted[name] - dense[name]
        assert float((added - expected).abs().max()) < 1e-5, name


def test_inspect_says_what_an_adapter_is(tmp_path: Path) -> None:
    model = tiny.tiny_target(tmp_path / "model")
    adapter = adapters.write_adapter(tmp_path / "adapter", model, ATTENTION)
    run = CliRunner().invoke
    done = run(inspect_app, [str(model), "--adapter", str(adapter), "--json"])
    assert done.exit_code == 0, done.output
    assert "LoRA of rank 4 on 12 matrices" in json.loads(done.stdout)["adapter"]
    change(adapter, use_dora=True)
    done = run(inspect_app, [str(model), "--adapter", str(adapter), "--json"])
    assert done.exit_code == 1 and json.loads(done.stdout)["problems"][0]["where"] == "adapter"
