"""/metrics: names, positions, and that the dashboard asks for nothing that is not there."""

import json
import re

from tests.server.live import ROOT, Live

NAMED = re.compile(r"outdraft_[a-z_]+")


def test_the_dashboard_asks_for_what_there_is(live: Live) -> None:
    asked = {"prompt": "def f(x):\n", "max_tokens": 64, "temperature": 0}
    live.post("/v1/completions", asked)
    live.wait_idle()
    told = set(NAMED.findall(live.get("/metrics").text))
    told.add("outdraft_spec_decode_speedup")  # only once it was measured
    board = json.loads((ROOT / "docs" / "grafana" / "outdraft.json").read_text())
    wanted = {n for p in board["panels"] for t in p["targets"] for n in NAMED.findall(t["expr"])}
    assert wanted <= told, wanted - told


def test_counts_add_up(live: Live) -> None:
    """Accepted drafts and the tokens that the target added are all the tokens there are."""

    def value(name: str) -> float:
        return live.metric(f"outdraft_{name}_total")

    live.wait_idle()
    names = ("generation_tokens", "spec_decode_num_accepted_tokens", "target_passes")
    before = {name: value(name) for name in names}
    asked = {"prompt": "class A:\n", "max_tokens": 50, "temperature": 0, "ignore_eos": True}
    usage = live.post("/v1/completions", asked).json()["usage"]
    live.wait_idle()
    grown = {name: value(name) - before[name] for name in names}
    assert grown["generation_tokens"] == usage["completion_tokens"] == 50
    accepted = usage["completion_tokens_details"]["accepted_prediction_tokens"]
    assert grown["spec_decode_num_accepted_tokens"] == accepted
    # the last block may hold accepted drafts behind the last token that was kept
    assert 50 - accepted <= grown["target_passes"] <= 50
