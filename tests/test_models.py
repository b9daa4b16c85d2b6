"""The networks against figures and formulations that do not come from them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace
from itertools import islice
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from harness.models.build import build, count_flops, count_parameters
from harness.models.networks import AverageShortcut, IdentityConv, OptionA, PreactBlock, SqueezeExcite
from harness.models.variants import NETWORKS, VARIANTS, Network, check_reads, find_variant

PARAMETERS = {  # trainable, for ten classes
    "he2015": {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274},
    "msra": {20: 272_292},
    "preact": {20: 269_722},  # as many batch norms of each width as in he2015
    "xresnet": {20: 273_114, 32: 467_546, 44: 661_978, 56: 856_410},
    "mxresnet": {20: 273_114, 32: 467_546, 44: 661_978, 56: 856_410},
    "se-mxresnet": {20: 275_130, 32: 470_906, 44: 666_682, 56: 862_458},
    "xresnext-16x2d": {29: 332_170, 47: 531_978, 65: 731_786, 83: 931_594},
    "xresnet-bottleneck": {29: 320_906},
    "keras-se-mxresnet": {20: 275_194},  # of the weights that its source stored
    "keras-xresnext-16x2d": {29: 326_170},  # 0.32M in its source
    "keras-xresnet-bottleneck": {29: 315_674},  # 0.31M
    "se-mxresnext-16x2d": {29: 364_426, 47: 585_738, 65: 807_050, 83: 1_028_362},
}


def legal_depths(function, count):
    """The smallest depths that the variant can have."""

    def search():
        for depth in range(3, 100):
            try:
                yield function(depth).network.depth
            except ValueError:
                continue

    return list(islice(search(), count))


EVERY = [(function, depth) for function in VARIANTS.values() for depth in legal_depths(function, 2)]
EVERY_IDS = [f"{function.__name__}-{depth}" for function, depth in EVERY]


@pytest.mark.parametrize(
    ("name", "depth", "count"),
    [(name, depth, count) for name, counts in PARAMETERS.items() for depth, count in counts.items()],
)
def test_published_parameter_counts(name, depth, count):
    with torch.device("meta"):
        assert count_parameters(build(find_variant(name)(depth).network, num_classes=10)) == count


@pytest.mark.parametrize("depth", [18, 50])
def test_imagenet_is_the_network_of_torchvision(depth):
    """Its tensors come in the same order, and with them it gives the same logits."""
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=7).eval()
    ours = build(find_variant("imagenet")(depth).network, 7, image_size=64).eval()
    state = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_imagenet_starts_as_torchvisions():
    network = build(find_variant("imagenet")(18).network, 1000)
    assert count_parameters(network) == 11_689_512  # torchvision's own count
    for weight in (module.weight for module in network.modules() if isinstance(module, nn.Conv2d)):
        fan_out = weight.shape[0] * weight[0, 0].numel()
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_fattorib_has_a_wide_convolution_more_and_a_narrow_one_less():
    with torch.device("meta"):
        late = count_parameters(build(find_variant("fattorib")(20).network, num_classes=10))
    batch_norm = 2 * 64 - 2 * 16
    assert late == 269_722 + 9 * (64 * 64 - 16 * 16) + batch_norm


def test_convnet_parameters_counted_by_hand():
    convs = 3 * 16 * 9 + sum(w * v * 10 + v * v * 9 for w, v in ((16, 32), (32, 64), (64, 128)))
    assert count_parameters(build(find_variant("convnet")(8).network, num_classes=2)) == convs + 128 * 2


def multiply_adds(network, classes, side=32):
    with torch.device("meta"):
        module = build(network, classes, side)
    return count_flops(module, side) // 2


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 40.55), (32, 68.86), (44, 97.17), (56, 125.49), (110, 252.89)]
)
def test_multiply_adds_of_the_paper(depth, millions):
    n = (depth - 2) // 6
    stem = 32 * 32 * 9 * 3 * 16
    first = 2 * n * 32 * 32 * 9 * 16 * 16
    others = 2 * (
        2 * n * 32 * 32 * 9 * 16 * 16 - 32 * 32 * 9 * 16 * 16 // 2
    )  # one convolution from half the width
    flops = multiply_adds(find_variant("he2015")(depth).network, 10)
    assert flops == stem + first + others + 64 * 10
    assert flops / 1e6 == pytest.approx(millions, abs=0.005)
    # the late network does the same work: the convolution that it adds and the one that it lacks cost the same
    assert multiply_adds(find_variant("fattorib")(depth).network, 10) == flops


def test_multiply_adds_grow_with_the_image():
    network = find_variant("miniplaces")(18).network
    small, large = multiply_adds(network, 100, 112), multiply_adds(network, 100, 224)
    affine = 256 * 100
    assert large - affine == 4 * (small - affine)


@pytest.mark.parametrize(("function", "depth"), EVERY, ids=EVERY_IDS)
def test_forward_and_backward(function, depth):
    torch.manual_seed(0)
    module = build(function(depth).network, num_classes=7)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    logits = module(images)
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.tensor([0, 3, 6, 1])).backward()
    # None: not called (zeros would not do: a squeezed width of 1 may be dead from the start)
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    module.eval()
    with torch.inference_mode():
        assert module(images[:, :, :17, :17]).shape == (4, 7)  # odd at every stage


@pytest.mark.parametrize("function", VARIANTS.values(), ids=lambda f: f.__name__)
def test_the_seed_decides_the_weights(function):
    network = function(legal_depths(function, 1)[0]).network

    def weights(seed):
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build(network, num_classes=5).parameters())

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_an_image_smaller_than_the_strides_is_refused():
    for function in (find_variant("he2015"), find_variant("miniplaces")):
        network = function(legal_depths(function, 1)[0]).network
        smallest = NETWORKS[network.architecture].smallest_image
        assert build(network, 3, smallest).eval()(torch.randn(1, 3, smallest, smallest)).shape == (1, 3)
        with pytest.raises(ValueError, match=f"too small for this network: at least {smallest}"):
            build(network, 3, smallest - 1)
    with pytest.raises(ValueError, match="at least 2"):
        build(find_variant("he2015")(20).network, num_classes=1)


XRESNEXT = find_variant("xresnext-16x2d")(11).network
BASES = [find_variant(name)(depth).network for name, depth in (
    ("he2015", 8), ("miniplaces", 18), ("convnet", 8), ("xresnet", 8))]  # fmt: skip
OTHERS = {"batch_norm_eps": 0.1, "head_batch_norm": True, "squeeze_ratio": 4, "cardinality": 8, "group_width": 4,
          "stem_width": 8, "padding": "end", "init": "truncated-he", "activation": "mish"}  # fmt: skip
WORDS = {name: get_args(get_type_hints(Network)[name]) for name in ("block", "shortcut")}
CHANGES = {(name, word) for name, words in WORDS.items() for word in words} | set(OTHERS.items())


def marks(network):
    """What a network is: its layers, its weights, and what it computes."""
    torch.manual_seed(0)
    module = build(network, 10)
    return str(module), [p.sum().item() for p in module.parameters()], module(torch.randn(2, 3, 32, 32)).tolist()


@pytest.mark.parametrize("network", [*BASES, XRESNEXT], ids=lambda n: f"{n.architecture}-{n.depth}")
def test_every_field_changes_the_network_or_is_refused(network):
    assert {name for name, _ in CHANGES} == {f.name for f in fields(Network)} - {"depth", "architecture", "extra"}
    same = [marks(network)]
    if "shortcut" in (NETWORKS[network.architecture].reads or {}):
        same.append(marks(replace(network, shortcut="identity-conv")))  # what any other word made of cifar's
    for name, value in sorted({(n, v) for n, v in CHANGES if v != getattr(network, n)}, key=str):
        changed = replace(network, **{name: value})
        try:
            check_reads(changed, name)
        except ValueError:
            with suppress(ValueError):  # of a depth that bottlenecks cannot have
                assert marks(changed) in same, (name, value)
        else:
            with suppress(ValueError):
                assert marks(changed) != same[0], (name, value)


@pytest.mark.parametrize(
    "network",
    [
        Network(depth=19),
        Network(depth=2),
        Network(depth=20, architecture="convnet"),
        Network(depth=20, architecture="imagenet"),
        Network(depth=21, architecture="xresnet", block="bottleneck", cardinality=16, group_width=2),
    ],
)
def test_build_refuses_an_illegal_depth(network):
    with pytest.raises(ValueError, match=f"depth {network.depth} is n"):
        build(network, num_classes=10)


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


def test_identity_conv_starts_as_the_identity():
    x = torch.randn(2, 16, 8, 8)
    out = IdentityConv(16, 32)(x)
    torch.testing.assert_close(out[:, :16], x[:, :, ::2, ::2])
    assert not out[:, 16:].any()
    # and the initialisation of the whole network leaves it so
    convs = [
        layer for layer in build(find_variant("msra")(20).network, 10).modules() if isinstance(layer, IdentityConv)
    ]
    assert [tuple(conv.weight.shape) for conv in convs] == [(32, 16, 1, 1), (64, 32, 1, 1)]
    for conv in convs:
        torch.testing.assert_close(conv.weight[:, :, 0, 0], torch.eye(conv.out_channels, conv.in_channels))


def test_he_initialisation_by_fan_in():
    for layer in build(find_variant("he2015")(20).network, num_classes=10).modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels >= 16:
            assert layer.weight.std().item() == pytest.approx((2 / (9 * layer.in_channels)) ** 0.5, rel=0.1)


def test_a_stage_of_fattorib_ends_at_the_next_one_s_shape():
    def shapes(network):
        x = torch.zeros(1, 16, 32, 32)
        return [tuple((x := stage(x)).shape[1:]) for stage in build(network, 10).eval().stages]

    assert shapes(find_variant("fattorib")(20).network) == [(32, 16, 16), (64, 8, 8), (64, 8, 8)]
    assert shapes(find_variant("he2015")(20).network) == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    last = build(find_variant("fattorib")(20).network, 10).stages[0][-1]
    assert (last.conv1.stride, last.conv2.stride) == ((1, 1), (2, 2))


def test_the_preact_shortcut_is_clean():
    block = PreactBlock(16, 16, 16, nn.Identity(), eps=1e-5)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 8, 8)  # of both signs: no ReLU after the sum
    torch.testing.assert_close(block(x), x)
    first = build(find_variant("preact")(20).network, 10).stages[0][0]
    assert isinstance(first.activation1, nn.Identity)


def test_batch_statistics_make_training_and_evaluation_the_same():
    module = build(find_variant("convnet")(8).network, num_classes=2)
    images = torch.randn(8, 3, 32, 32)
    trained = module.train()(images)
    torch.testing.assert_close(module.eval()(images), trained)
    assert (module(images[:4]) - trained[:4]).abs().max() > 1e-3  # the batch matters
    assert list(module.buffers()) == []


def test_convnet_weights_are_uniform_within_the_root_of_the_inverse_fan_in():
    module = build(find_variant("convnet")(8).network, num_classes=2)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.bias is None
            bound = torch.tensor(layer.weight[0].numel() ** -0.5)  # in the weights' own precision
            assert 0.8 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_average_shortcut_divides_by_the_pixels_that_exist(stride, size):
    shortcut = AverageShortcut(3, 3, stride).eval()
    nn.init.dirac_(shortcut.conv.weight)
    x = torch.randn(2, 3, size, size)
    expected = torch.stack(
        [
            torch.stack([x[:, :, i : i + 2, j : j + 2].mean((2, 3)) for j in range(0, size, stride)], dim=-1)
            for i in range(0, size, stride)
        ],
        dim=-2,
    )
    torch.testing.assert_close(shortcut(x), expected / (1 + 1e-3) ** 0.5)


def test_squeeze_and_excitation_weighs_channels():
    layer = SqueezeExcite(32, 2)
    x = torch.randn(2, 32, 5, 5)
    for image, out in zip(x, layer(x), strict=True):
        hidden = (layer.squeeze.weight @ image.mean((1, 2))).clamp(min=0)
        weights = 1 / (1 + torch.exp(-(layer.excite.weight @ hidden)))
        torch.testing.assert_close(
            out, torch.stack([w * channel for w, channel in zip(weights, image, strict=True)])
        )


def test_the_ladder_pools_the_mean_and_the_maximum():
    module = build(find_variant("xresnet")(8).network, num_classes=10).eval()
    seen = []
    module.fc.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    module.activation.register_forward_hook(lambda _module, _args, output: seen.append(output))
    module(torch.randn(2, 3, 32, 32))
    maps, pooled = seen
    torch.testing.assert_close(pooled[:, :64], F.adaptive_avg_pool2d(maps, 1).flatten(1))
    torch.testing.assert_close(pooled[:, 64:], F.adaptive_max_pool2d(maps, 1).flatten(1))


def test_only_the_shortcut_s_batch_norm_of_the_ladder_has_keras_defaults():
    network = build(find_variant("xresnet")(20).network, num_classes=10)
    norms = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    for name, norm in norms.items():
        assert (norm.eps, norm.momentum) == ((1e-3, 0.01) if "shortcut" in name else (2e-5, 0.1))
    assert sum("shortcut" in name for name in norms) == 2
