"""Block-wise aggregation against sections 3.6 and 4.6."""

import aggregation
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.aggregation import Update, blockwise_mean

SHAPES = {
    "encoder.m1.net.weight": (2, 3),
    "encoder.m1.net.bias": (2,),
    "encoder.m2.net.weight": (3,),
    "projector.m1.self.0.weight": (2,),
    "projector.m1.infiltration.0.weight": (2,),
    "projector.m2.self.0.weight": (1, 2),
    "fusion.linear.m1.weight": (2, 2),
    "head.joint.weight": (2, 2),
    "head.m1.weight": (1,),
    "head.m2.weight": (),
}


def owns(name, modalities):
    served = [part for part in name.split(".")[:2] if part in ("m1", "m2")]
    return name.startswith("fusion") or not served or served[0] in modalities


def random_round(seed, clients):
    generator = torch.Generator().manual_seed(seed)
    model = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}
    updates = []
    for k in range(clients):
        choice = int(torch.randint(3, (), generator=generator))
        modalities = (("m1",), ("m2",), ("m1", "m2"))[choice]
        trained = {
            n: torch.randn(s, generator=generator, dtype=torch.float64)
            for n, s in SHAPES.items()
            if owns(n, modalities)
        }
        n_k = int(torch.randint(1, 1000, (), generator=generator))
        updates.append(Update(k, n_k, modalities, trained, {}, 0.0, choice == 2))
    return model, updates


def as_numbers(tensors):
    return {n: t.flatten().tolist() for n, t in tensors.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000), clients=st.integers(1, 9))
def test_blockwise_mean(seed, clients):
    model, updates = random_round(seed, clients)
    ours = blockwise_mean(model, updates)
    expected = aggregation.aggregate(as_numbers(model), [(u.samples, as_numbers(u.model)) for u in updates])
    assert set(ours) == set(model)
    for name, values in expected.items():
        assert ours[name].flatten().tolist() == pytest.approx(values, rel=1e-12, abs=1e-12)
        assert ours[name].shape == model[name].shape
