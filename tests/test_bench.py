"""The peer that the benchmark measures against computes the same, from the same parameters."""
import pytest
import torch

from flow import Flow, Guidance, guide
from tarflow_plain import TARFlow, plain_names
from test_flow import perturbed

B, T, D, CLASSES = 3, 16, 4, 5


@pytest.fixture
def pair():
    torch.manual_seed(0)
    ours = perturbed(Flow(D, T, 16, 2, (2, 2, 2), CLASSES))
    peer = TARFlow(D, T, 16, 2, blocks=3, layers=2, classes=CLASSES)
    # strict: the same names and shapes
    peer.load_state_dict(plain_names(ours.state_dict()))
    return ours, peer


@pytest.fixture
def x():
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def y():
    return torch.tensor([0, 3, CLASSES])


def test_the_peer_has_our_parameters(pair):
    ours, peer = (sum(p.numel() for p in flow.parameters()) for flow in pair)
    assert ours == peer


def test_the_peer_is_the_same_function(pair, x, y):
    (z, logdet), (z_peer, logdet_peer) = (flow(x, y) for flow in pair)
    torch.testing.assert_close(z_peer, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logdet_peer, logdet, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('cfg, every_block', [(0.0, False), (2.0, False), (2.0, True)])
def test_the_peer_draws_the_same_samples(pair, x, y, cfg, every_block):
    flow, plain = pair
    ours = flow.sample(x, y, cfg, Guidance(guide, every_block))
    peer = plain.sample(x, y, cfg, every_block)
    torch.testing.assert_close(peer, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, x, atol=0.1)
