"""A network that uses `view` has the map of the same network with `flatten` or `reshape`, in any memory layout."""

import pytest
import torch
import torchvision
from lrp_nets import images, seeded
from test_lrp_network import adds_up
from torch import nn

from labn.lrp import Config, relevance


class LeNet(nn.Module):
    def __init__(self, arrange):
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.Linear(8 * 4 * 4, 3)
        self.arrange = arrange

    def forward(self, x):
        return self.head(self.arrange(self.pool(torch.relu(self.conv(x)))))


def shuffled(x, how):
    b, c, h, w = x.shape
    x = getattr(x, how)(b, 2, c // 2, h, w).transpose(1, 2).contiguous()
    return getattr(x, how)(b, c, h, w).flatten(1)


WAYS = {
    "flattened": (lambda x: x.view(x.size(0), -1), lambda x: x.flatten(1)),
    "size by keyword": (lambda x: x.view(size=(x.size(0), -1)), lambda x: x.flatten(1)),
    "transposed": (
        lambda x: x.transpose(2, 3).contiguous().view(x.size(0), -1),
        lambda x: x.transpose(2, 3).reshape(x.size(0), -1),
    ),
    "channels last": (
        lambda x: x.permute(0, 2, 3, 1).contiguous().view(len(x), -1),
        lambda x: x.permute(0, 2, 3, 1).reshape(len(x), -1),
    ),
    "channel shuffle": (lambda x: shuffled(x, "view"), lambda x: shuffled(x, "reshape")),
    "view_as": (lambda x: x.view_as(torch.empty(len(x), 128)), lambda x: x.flatten(1)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", [Config(), Config(residual="block"), Config(rule="epsilon", first_layer="epsilon")])
def test_view_hands_relevance_on_by_position(way, config):
    viewed, reference = (seeded(LeNet(arrange), 3) for arrange in WAYS[way])
    result, expected = (
        relevance(net, images(2, 8), torch.tensor([0, 2]), config, report=True) for net in (viewed, reference)
    )
    assert torch.allclose(result.relevance, expected.relevance, atol=1e-14, rtol=1e-12)
    assert adds_up(result) < 1e-9


def test_torchvisions_channel_shuffle_hands_relevance_on_by_position():
    torch.manual_seed(0)
    net = torchvision.models.shufflenet_v2_x0_5(num_classes=4).double().eval()
    result = relevance(net, images(2, 64), torch.tensor([0, 3]), report=True)
    assert (result.arrived > 0.1 * result.initial).all()
    assert adds_up(result) < 1e-9


def test_view_as_another_dtype_is_refused_by_name():
    class Bits(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3].contiguous().view(torch.float64) + 0.0

    with pytest.raises(NotImplementedError, match=r"no rule for the model itself .*view"):
        relevance(Bits(), images(), torch.tensor([0, 1]))
