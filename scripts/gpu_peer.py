"""transformers at a published shape on this GPU, made-up bf16 weights: plain and assisted.

`gpu_peer.py OUT.json SHAPE …`. With made-up weights nothing is accepted, so of assisted decoding
the time of a round (draft k, verify k + 1) is reported and the rate that an acceptance would give.
"""

import json
import sys
import time
from itertools import accumulate
from operator import mul
from statistics import median

import torch
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)

from outdraft.models import gemma4_config

CONTEXT, TOKENS, K = 1024, 24, 3
ACCEPT = (0.85, 0.75, 0.65)
RAW: dict = {}


def note_configs():
    """The raw configs that bench/shapes.py reads, in order."""
    seen = []
    plain = gemma4_config.AssistantConfig.from_hf.__func__
    text = gemma4_config.Gemma4Config.from_hf.__func__

    def of_text(cls, raw, *rest):
        seen.append(raw)
        return text(cls, raw, *rest)

    def of_assistant(cls, raw, *rest):
        before = len(seen)
        made = plain(cls, raw, *rest)
        del seen[before:]
        seen.append(raw)
        return made

    gemma4_config.Gemma4Config.from_hf = classmethod(of_text)
    gemma4_config.AssistantConfig.from_hf = classmethod(of_assistant)
    from outdraft.bench import shapes

    own = gemma4_config.AssistantConfig
    paired = [shape for shape in shapes.SHAPES.values() if isinstance(shape.drafter, own)]
    for shape, raw in zip(paired, zip(seen[::2], seen[1::2], strict=True), strict=True):
        RAW[shape.name] = raw


def build(family, config):
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = family(config).eval()
    torch.set_default_dtype(torch.float32)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, weight.shape[-1] ** -0.5)
        elif "norm" in name:
            weight.data.fill_(1.0)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.do_sample = None, 0, False
    return model


class Clock:
    def __init__(self):
        self.times = []

    def put(self, _tokens):
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def end(self):
        pass


def seconds_a_step(model, assistant):
    ids = torch.randint(5, 1000, (1, CONTEXT), device="cuda")
    found = []
    for _ in range(2):
        clock = Clock()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS,
                       assistant_model=assistant, streamer=clock)  # fmt: skip
        gaps = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
        found.append(median(gaps))
    return min(found)


def measure(name):
    raw, own = RAW[name]
    skip = ("model_type",)
    text = Gemma4TextConfig(**{k: v for k, v in raw.items() if k not in skip})
    text._attn_implementation = "sdpa"
    model = build(Gemma4ForCausalLM, text)
    plain_s = seconds_a_step(model, None)
    found = {"shape": name, "plain_tok_s": 1 / plain_s}
    try:
        own["text_config"]["vocab_size_per_layer_input"] = 0
        config = Gemma4AssistantConfig(**{k: v for k, v in own.items() if k not in skip})
        drafter = build(Gemma4AssistantForCausalLM, config)
        drafter.generation_config.num_assistant_tokens = K
        drafter.generation_config.num_assistant_tokens_schedule = "constant"
        drafter.generation_config.assistant_confidence_threshold = 0.0
        round_s = seconds_a_step(model, drafter)
        tokens = 1 + sum(accumulate(ACCEPT, mul))
        found |= {"round_s": round_s, "drafts": K, "acceptance": ACCEPT}
        found |= {"forecast_tok_s": tokens / round_s, "speedup": tokens / round_s * plain_s}
    except Exception as error:
        found["assisted_error"] = repr(error)[:400]
    return found


def main(path, names):
    import transformers

    from outdraft.bench.peers.transformers import repair

    repair()
    report = {"transformers": transformers.__version__, "device": torch.cuda.get_device_name(),
              "context": CONTEXT, "results": []}  # fmt: skip
    for name in names:
        try:
            report["results"].append(measure(name))
        except Exception as error:
            report["results"].append({"shape": name, "error": repr(error)[:400]})
        print(json.dumps(report["results"][-1]), flush=True)
        torch.cuda.empty_cache()
        with open(path, "w") as file:
            json.dump(report, file, indent=1)


note_configs()
with torch.inference_mode():
    main(sys.argv[1], sys.argv[2:])
