"""Made-up LoRA adapters in PEFT's layout, and what they come to by PEFT's formula."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_adapter(
    path: Path,
    model: Path,
    modules: Sequence[str],
    *,
    r: int = 4,
    alpha: float = 12.0,
    seed: int = 5,
    **changes: Any,
) -> Path:
    """An adapter of the model's linear layers whose names end like one of `modules`."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somebody/base",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": list(modules),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    } | changes
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(tuple(modules)) and weight.ndim == 2:
            rank = next((v for k, v in config["rank_pattern"].items() if module.endswith(k)), r)
            n, k = weight.shape
            a = torch.randn(rank, k, generator=generator) * k**-0.5
            b = torch.randn(n, rank, generator=generator) * 0.2
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def merged(adapter: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors with the adapter added, computed in fp64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    pairs = load_file(adapter / "adapter_model.safetensors")
    out = dict(tensors)
    for name in pairs:
        if ".lora_A." not in name:
            continue
        a, b = pairs[name].double(), pairs[name.replace("lora_A", "lora_B")].double()
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = next(
            (v for k, v in config["alpha_pattern"].items() if module.endswith(k)),
            config["lora_alpha"],
        )
        scale = alpha / (math.sqrt(len(a)) if config["use_rslora"] else len(a))
        base = tensors[f"{module}.weight"]
        out[f"{module}.weight"] = (base.double() + scale * (b @ a)).to(base.dtype)
    return out


def merge_into(path: Path, model: Path, adapter: Path) -> Path:
    """A copy of the model with the adapter merged into it."""
    path.mkdir(parents=True)
    for file in model.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = merged(adapter, load_file(model / "model.safetensors"))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
