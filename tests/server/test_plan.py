"""Combinations that mean nothing are refused with the reason, before any data are loaded; all others run."""

import pytest
import tiny

from fedmm.errors import ConfigError
from server.plan import check, plan

REFUSED = [
    ({"objective__name": "infiltration"}, r"model\.projector.*fedcmi|model\.projector"),
    ({"objective__name": "auxiliary"}, r"model\.unimodal_heads"),
    ({"model__fusion": "late"}, r"model\.unimodal_heads"),
    (
        {"model__fusion": "late", "model__unimodal_heads": True, "model__projector__depth": 2},
        r"model\.projector=null",
    ),
    ({"objective__name": "infiltration", "model__projector__depth": 2}, r"model\.unimodal_heads"),
    ({"model__norm": "batch", "scenario__modalities__missing": 0.2}, r"norm: group"),
    ({"selection__name": "cmsfed", "data__modalities": ["m1"]}, "at least 2 modalities"),
    ({"objective__name": "infiltratoin"}, "infiltration"),
    ({"strategy__name": "fedavgg"}, "fedavg"),
    ({"selection__name": "cmsfed", "selection__teta": 1.0}, "theta"),
    ({"selection__name": "cmsfed", "selection__theta": "high"}, r"selection\.theta"),
]


@pytest.mark.parametrize(("changes", "match"), REFUSED, ids=str)
def test_refused(changes, match):
    with pytest.raises(ConfigError, match=match) as caught:
        check(tiny.config("fedavg", **changes))
    assert caught.value.exit_code == 2


def test_one_modality_of_a_data_set_is_noticed_when_it_is_loaded():
    config = tiny.config("fedcmi", data__name="holed:load", data__params__fill="zero", data__modalities=["m2"])
    with pytest.raises(ConfigError, match="at least 2 modalities"):
        plan(config)


@pytest.mark.parametrize("selection", ["uniform", "divfl", "cmsfed", "power_of_choice"])
@pytest.mark.parametrize("objective", ["joint", "prox", "auxiliary", "infiltration", "prototypes"])
def test_every_objective_runs_with_every_selector(tmp_path, objective, selection):
    config = tiny.config(
        "fedavg",
        objective__name=objective,
        selection__name=selection,
        model__projector__depth=1,
        model__unimodal_heads=True,
        model__fusion={"uniform": "concat", "divfl": "sum", "cmsfed": "gated", "power_of_choice": "film"}[selection],
        scenario__modalities__multimodal=0.5,
        scenario__modalities__missing=0.1,
        scenario__modalities__heldout="owned",
    )
    summary = tiny.run(tmp_path, config)
    assert summary["status"] == "completed"
    assert summary["test"]["loss"] < 20
