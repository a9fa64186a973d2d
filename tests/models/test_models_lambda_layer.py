import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from labn.models.lambda_networks.layer import LambdaLayer
from labn.models.lambda_networks.linear_map import content_lambdas
from labn.models.lambda_networks.position import FORMULATIONS, choose, fast_length, position_path, reachable_keys, spans


def dense_window(window: Tensor, height: int, width: int) -> Tensor:
    """E[k,u,m-n] as (dk, du, N, N), written out offset by offset."""
    dk, du, r, _ = window.shape
    dense = window.new_zeros(dk, du, height * width, height * width)
    for n in range(height * width):
        for m in range(height * width):
            i, j = m // width - n // width + r // 2, m % width - n % width + r // 2
            if 0 <= i < r and 0 <= j < r:
                dense[:, :, n, m] = window[:, :, i, j]
    return dense


def dense_layer(layer: LambdaLayer, x: Tensor) -> Tensor:
    """Y[h,v,n] = sum_m (sum_{k,u} Q[h,k,n] (K[u,k,m] + E[k,u,m-n])) V[u,v,m] + sum_k Q[h,k,n] b_k."""
    query, key, value = (t.flatten(3) for t in layer.project(x))
    window = dense_window(layer.position_weight, *x.shape[-2:])
    kernel = key.transpose(1, 2)[:, :, :, None] + window
    scores = torch.einsum("bhkn,bkunm->bhunm", query, kernel)
    result = torch.einsum("bhunm,buvm->bhvn", scores, value)
    if layer.position_bias is not None:
        result = result + torch.einsum("bhkn,k->bhn", query, layer.position_bias)[:, :, None]
    return layer.pool(result.reshape(x.shape))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("formulation", ["auto", *FORMULATIONS])
@pytest.mark.parametrize(
    ("size", "r", "heads", "dim_u", "bias", "stride"),
    [
        ((9, 8), 5, 4, 1, True, 1),
        ((3, 5), 7, 1, 2, True, 2),
        ((1, 16), 3, 2, 3, False, 1),
        ((2, 2), 9, 4, 1, False, 2),
        ((8, 9), 1, 2, 1, True, 1),
    ],
)
def test_layer_and_all_its_gradients_equal_the_dense_form(formulation, size, r, heads, dim_u, bias, stride):
    torch.manual_seed(0)
    layer = LambdaLayer(8, 3, dim_u, heads, r, stride, bias, formulation).double()
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    found, wanted = layer(x), dense_layer(layer, x)
    close(found, wanted)
    inputs = [x, *layer.parameters()]
    direction = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(found, inputs, direction), torch.autograd.grad(wanted, inputs, direction)):
        close(a, b)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    r=st.sampled_from([1, 3, 5, 11, 23]),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    dims=st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_formulations_agree_for_any_shape(sizes, r, batch, heads, dims, seed):
    generator = torch.Generator().manual_seed(seed)
    dk, du, dv = dims
    shapes = (batch, heads, dk, *sizes), (dk, du, r, r), (batch, du, dv, *sizes)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    wanted = position_path(*inputs, formulation="conv2d")
    direction = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(wanted, inputs, direction)
    for name in ("convolution", "query_first"):
        found = position_path(*inputs, formulation=name)
        close(found, wanted)
        for a, b in zip(torch.autograd.grad(found, inputs, direction), gradients):
            close(a, b)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_first_and_second_derivatives_by_finite_differences(formulation):
    torch.manual_seed(0)
    shapes = (2, 2, 2, 3, 2), (2, 1, 3, 3), (2, 1, 2, 3, 2)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    torch.autograd.gradcheck(FORMULATIONS[formulation], inputs)
    torch.autograd.gradgradcheck(FORMULATIONS[formulation], inputs)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_a_gradient_of_one_input_alone_can_be_computed(formulation):
    torch.manual_seed(0)
    query, window, value = torch.randn(1, 2, 3, 4, 4), torch.randn(3, 1, 5, 5), torch.randn(1, 1, 2, 4, 4)
    value.requires_grad_()
    (found,) = torch.autograd.grad(FORMULATIONS[formulation](query, window, value).sum(), value)
    (wanted,) = torch.autograd.grad(FORMULATIONS["conv2d"](query, window, value).sum(), value)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_papers_layers_run_in_the_formulation_measured_for_them():
    def chosen(batch, channels, size):
        return choose((batch, 4, 16, size, size), (16, 1, 23, 23), (batch, 1, channels // 4, size, size))

    assert chosen(16, 512, 14) == chosen(16, 256, 14) == chosen(32, 512, 7) == "query_first"
    assert chosen(16, 256, 28) == chosen(8, 64, 56) == chosen(2, 8, 128) == chosen(1, 256, 14) == "convolution"


def test_tiles_cover_every_query_once_and_reach_exactly_their_keys():
    for size in (1, 7, 14, 15, 29):
        tiles = list(spans(size, 3))
        assert [n for t in tiles for n in range(t.start, t.stop)] == list(range(size))
        assert all(t.first == max(0, t.start - 3) and t.last == min(size, t.stop + 3) for t in tiles)
        assert max(t.stop - t.start for t in tiles) <= 14
    assert reachable_keys(7, 23) == 7
    assert reachable_keys(28, 7) == 17


def test_fft_lengths_are_fast_and_sufficient():
    assert [fast_length(n) for n in (1, 11, 13, 68, 71, 121)] == [1, 12, 14, 70, 72, 125]


def test_content_path_is_the_layer_without_positions_and_equivariant_under_permutation():
    torch.manual_seed(0)
    layer = LambdaLayer(8, 4, 2, 2, 3).double().eval()
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    content = layer.content(x)
    permutation = torch.randperm(20)
    permuted = layer.content(x.flatten(2)[..., permutation].view_as(x))
    close(permuted, content.flatten(2)[..., permutation].view_as(x))
    with torch.no_grad():
        layer.position_weight.zero_()
        layer.position_bias.zero_()
    close(layer(x), content)


def test_position_path_moves_with_its_values_away_from_borders():
    torch.manual_seed(0)
    query = torch.randn(1, 2, 3, 1, 1, dtype=torch.float64).expand(1, 2, 3, 13, 13)
    window = torch.randn(3, 1, 3, 3, dtype=torch.float64)
    value = torch.zeros(1, 1, 2, 13, 13, dtype=torch.float64)
    value[..., 4:8, 4:8] = torch.randn(1, 1, 2, 4, 4, dtype=torch.float64)
    for formulation in FORMULATIONS:
        result = position_path(query, window, value, formulation)
        moved = position_path(query, window, value.roll((2, 3), (-2, -1)), formulation)
        close(moved, result.roll((2, 3), (-2, -1)))
        assert result.abs().max() > 0.1


def test_content_lambda_ignores_a_shift_of_the_key_logits_and_averages_constant_values():
    torch.manual_seed(0)
    layer = LambdaLayer(4, 3, 1, 2, 3).double().eval()
    with torch.no_grad():
        layer.to_qkv.weight[:, 0] = 0
        layer.to_qkv.weight[6:9, 0] = torch.tensor([5.0, -2.0, 30.0]).view(3, 1, 1)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    shifted = x.clone()
    shifted[:, 0] += 1.7
    close(layer.content(shifted), layer.content(x))
    _, key, _ = layer.project(x)
    close(key.sum((-2, -1)), torch.ones(1, 1, 3, dtype=torch.float64))
    value = torch.tensor([0.3, -2.0], dtype=torch.float64).view(1, 1, 2, 1, 1).expand(1, 1, 2, 3, 3)
    close(content_lambdas(key, value), torch.tensor([0.3, -2.0], dtype=torch.float64).expand(1, 3, 2))


@pytest.mark.parametrize("formulation", ["auto", *FORMULATIONS])
def test_bfloat16_autocast_and_channels_last(formulation):
    torch.manual_seed(0)
    layer = LambdaLayer(32, heads=2, r=7, formulation=formulation)
    x = torch.randn(2, 32, 9, 9)
    exact = layer(x)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), exact, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer(x)
    rough.sum().backward()
    assert rough.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_a_forward_pass_leaves_no_tensor_on_the_module():
    layer = LambdaLayer(8, heads=2, r=3)
    before = set(vars(layer)), len(pickle.dumps(layer))
    layer(torch.randn(2, 8, 5, 5, requires_grad=True)).sum().backward()
    layer.zero_grad()
    assert (set(vars(layer)), len(pickle.dumps(layer))) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 10}, "channels is 10"),
        ({"channels": 8, "r": 4}, "r is 4"),
        ({"channels": 8, "stride": 3}, "stride is 3"),
        ({"channels": 8, "formulation": "fast"}, "formulation is 'fast'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LambdaLayer(**arguments)
