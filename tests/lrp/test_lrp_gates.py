"""Gates count as constants: they scale the values and receive no relevance."""

import pytest
import torch
import torchvision
from lrp_nets import Block, images, seeded
from torch import nn

from labn.lrp import Config, relevance
from labn.models.attention_branch import AttentionBranchNetwork


class Excited(nn.Module):
    """A residual block with squeeze-excitation; `frozen` replaces the gate by given constants."""

    def __init__(self, frozen=None):
        super().__init__()
        self.block = Block(3, 4)
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.head = nn.Linear(4, 3)
        self.frozen = frozen

    def gate(self, h):
        return torch.sigmoid(self.excite(torch.relu(self.squeeze(h.mean((2, 3), keepdim=True)))))

    def forward(self, x):
        h = self.block(x)
        scaled = h * (self.gate(h) if self.frozen is None else self.frozen)
        return self.head(torch.relu(scaled + h).mean((2, 3)))


@pytest.mark.parametrize("residual", ["ratio", "block", "symmetric"])
def test_gate_counts_as_a_constant_with_its_value_on_the_image(residual):
    net = seeded(Excited(), 1)
    x, target = images(1, 8), torch.tensor([1])
    frozen = Excited(net.gate(net.block(x)).detach())
    frozen.load_state_dict(net.state_dict())
    config = Config(residual=residual)
    got, expected = (relevance(n.double().eval(), x, target, config).relevance for n in (net, frozen))
    assert torch.allclose(got, expected, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["mul", "residual"])
@pytest.mark.parametrize("config", [Config(), Config(residual="block")])
def test_attention_branch_network_sends_no_relevance_to_the_branch(gate, config):
    """Relevance of the perception branch's logits reaches the pixels through the gated features."""
    torch.manual_seed(0)
    backbone = torchvision.models.resnet18(num_classes=3)
    net = AttentionBranchNetwork(backbone, num_classes=3, split=4, theta=0.3, gate=gate).double().eval()
    x = images(2, 64)
    result = relevance(net, x, torch.tensor([0, 2]), config, init="one", report=True)
    assert torch.allclose(result.logits, net(x).logits)
    scale = torch.stack([entry.arriving.abs() + entry.leaks.abs() for entry in result.entries]).amax(0)
    assert ((result.arrived + result.leaked - result.initial).abs() / scale).max() < 1e-8
    assert result.relevance.abs().sum((1, 2, 3)).min() > 0
    assert not any("attention_branch" in entry.name for entry in result.entries)
