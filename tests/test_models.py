"""The networks against figures and formulations that do not come from them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.resnet import IdentityConv, OptionA, build, count_parameters
from models.variants import Network, he2015, msra

PARAMETERS = {
    he2015: {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962},
    msra: {20: 272_292},
}


@pytest.mark.parametrize(
    ("function", "depth", "count"),
    [(function, depth, count) for function, counts in PARAMETERS.items() for depth, count in counts.items()],
)
def test_published_parameter_counts(function, depth, count):
    assert count_parameters(build(function(depth).network, num_classes=10)) == count


@pytest.mark.parametrize("size", [8, 7])
def test_option_a_is_a_strided_convolution_with_a_fixed_selection(size):
    selection = nn.Conv2d(16, 32, kernel_size=1, stride=2, bias=False)
    with torch.no_grad():
        selection.weight.zero_()
        for channel in range(16):
            selection.weight[channel + 8, channel] = 1
    x = torch.randn(2, 16, size, size)
    torch.testing.assert_close(OptionA(16, 32)(x), selection(x))


def test_option_a_keeps_channels_last():
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    assert OptionA(16, 32)(x).is_contiguous(memory_format=torch.channels_last)


def test_identity_conv_starts_as_the_identity_and_trains():
    conv = IdentityConv(16, 32)
    x = torch.randn(2, 16, 8, 8)
    out = conv(x)
    torch.testing.assert_close(out[:, :16], x[:, :, ::2, ::2])
    assert not out[:, 16:].any()
    module = build(msra(20).network, num_classes=10)
    convs = [layer for layer in module.modules() if isinstance(layer, IdentityConv)]
    assert [tuple(c.weight.shape) for c in convs] == [(32, 16, 1, 1), (64, 32, 1, 1)]
    assert all(torch.equal(c.weight.sum(), torch.tensor(float(c.in_channels))) for c in convs)


def test_he_initialisation_keeps_the_variance_of_the_paper():
    module = build(he2015(20).network, num_classes=10)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels >= 16:
            fan_in = layer.in_channels * 9
            assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)


@pytest.mark.parametrize("depth", [19, 2, -4, 21])
def test_build_refuses_a_depth_that_is_not_6n_plus_2(depth):
    with pytest.raises(ValueError, match=r"6n\+2"):
        build(Network(depth=depth), num_classes=10)
