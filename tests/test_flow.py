"""The flow: an exact bijection with an exact log-determinant, causal in both orders, guided as the
algebra says."""
import math

import pytest
import torch

import flow as flow_module
from flow import (GUIDANCE, Block, Flow, Inversion, VPFlow, guide, jacobi_inverse, shift,
                  transposed_weights)
from model import Config, PRESETS, with_weights_in
from sample import Options

B, T, D, CLASSES = 3, 6, 4, 5


def perturbed(module, log_scale=0.2):
    """A new flow is the identity and proves nothing: give the zero-initialised layers some
    weight."""
    torch.manual_seed(1)
    for name, p in module.named_parameters():
        if 'ada' in name:
            p.data.normal_(std=0.3 / math.sqrt(p.shape[-1]))
        if 'proj_out.weight' in name:
            p.data.normal_(std=log_scale / math.sqrt(p.shape[-1]))
    return module


def small_flow(layers=(1, 1, 2), tokens=T, dim=D, classes=CLASSES, width=16):
    torch.manual_seed(0)
    return perturbed(Flow(dim, tokens, width, 2, layers, classes))


def predict(block, x, y):
    """-> mean, log_scale (B, n, D) of the tokens after each of x (B, n, D), in reading order"""
    return block.split(block.transformer(x, block.transformer.condition(y)))


def simflow_step(y):
    return [(0.25, y), (-0.25, torch.full_like(y, CLASSES))]


@pytest.fixture
def x():
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def y():
    return torch.tensor([0, 3, CLASSES])                           # two classes and "no class"


# Table 8 of the paper prints 37M, 141M, 475M, 695M and 1.4B.
@pytest.mark.parametrize('size, count', [('S', 37_035_264), ('B', 141_309_696), ('L', 474_858_240),
                                         ('XL', 695_306_496), ('XXL', 1_364_650_752)])
def test_parameter_counts(size, count):
    c = Config(**PRESETS[size])
    with torch.device('meta'):
        flow = Flow(c.latent_dim, c.tokens, c.width, c.heads, c.layers, classes=1000)
    assert sum(p.numel() for p in flow.parameters()) == count


def test_new_flow_is_the_identity(x, y):
    flow = Flow(D, T, 16, 2, (1, 1), CLASSES)
    z, logdet = flow(x, y)
    assert torch.equal(z, x) and torch.equal(logdet, torch.zeros(B))
    gauss = -torch.distributions.Normal(0, 1).log_prob(x).mean((1, 2)) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(flow.nll(x, y), gauss)


@pytest.mark.parametrize('tokens, dim, width', [(T, D, 16), (64, 16, 64)])
def test_sampling_inverts_the_flow(tokens, dim, width):
    flow = small_flow((2, 2, 2, 4), tokens, dim, width=width)
    x = torch.randn(4, tokens, dim, generator=torch.Generator().manual_seed(3))
    y = torch.arange(4)
    z, logdet = flow(x, y)
    log_scale = predict(flow.blocks[0], x, y)[1]
    assert 0.1 < log_scale.std() < 0.4 and logdet.abs().min() > 0  # not the identity
    assert (flow.sample(z, y) - x).abs().max() <= 1e-4 * x.abs().max()
    assert (flow(flow.sample(x, y), y)[0] - x).abs().max() <= 1e-4 * x.abs().max()


def test_logdet_is_that_of_the_jacobian(x, y):
    flow = small_flow()
    _, logdet = flow(x, y)
    for i in range(B):
        jacobian = torch.autograd.functional.jacobian(
            lambda v: flow(v.view(1, T, D), y[i:i + 1])[0].flatten(), x[i].flatten())
        slow = torch.linalg.slogdet(jacobian.double()).logabsdet.float()
        torch.testing.assert_close(slow, logdet[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('backwards', [False, True])
def test_a_block_is_causal(x, y, backwards):
    """z_t depends on x_t affinely and on tokens read before it; on none read after it."""
    block = perturbed(Block(D, T, 16, 2, 2, CLASSES, backwards))
    jacobian = torch.autograd.functional.jacobian(lambda v: block(v, y[:1])[0], x[:1])
    jacobian = jacobian[0, :, :, 0]                                # (T, D, T, D)
    depends = jacobian.abs().amax((1, 3)) > 0                      # (T, T)
    expected = torch.ones(T, T).tril().bool()
    assert torch.equal(depends, expected.T if backwards else expected)


def test_alternate_blocks_read_backwards():
    assert [block.backwards for block in small_flow((1,) * 6).blocks] == [False, True] * 3


def inverse_slowly(block, z, y, cfg):
    """The definition: token t + 1 from all tokens before it, every one of them read again each
    time; two passes."""
    z = block.reorder(z)
    x = z.clone()
    null = torch.full_like(y, CLASSES)
    for t in range(z.shape[1] - 1):
        mu, log_scale = (p[:, t] for p in predict(block, x[:, :t + 1], y))
        if cfg:
            mu_u, log_scale_u = (p[:, t] for p in predict(block, x[:, :t + 1], null))
            mu, log_scale = guide(mu, mu_u, log_scale, log_scale_u, cfg)
        x[:, t + 1] = mu + log_scale.exp() * z[:, t + 1]
    return block.reorder(x)


@pytest.mark.parametrize('backwards', [False, True])
@pytest.mark.parametrize('cfg', [0.0, 2.0])
def test_cached_decoding_is_the_slow_one(x, y, backwards, cfg):
    block = perturbed(Block(D, T, 16, 2, 2, CLASSES, backwards))
    with torch.no_grad():
        slow = inverse_slowly(block, x, y, cfg)
        torch.testing.assert_close(block.inverse(x, y, cfg), slow, rtol=1e-4, atol=1e-5)
        # with tol 0 nothing is final before its turn
        for window in 1, 3, T:
            fast = jacobi_inverse(block, x, y, cfg, GUIDANCE['starflow'], window, 0.0)
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', GUIDANCE)
@pytest.mark.parametrize('pieces', [4, 3, 2, 1])
def test_decoding_as_on_a_gpu_is_the_same(longer, monkeypatch, name, pieces):
    """There, attention looks at a fixed number of places, some of them empty yet, and one step is
    replayed: it must not depend on anything that the host alone knows."""
    flow, z, y = longer
    T, size = z.shape[1], math.ceil(z.shape[1] / pieces)
    expected = flow.sample(z, y, 2.0, GUIDANCE[name])
    monkeypatch.setattr(Inversion, 'pieces', lambda self: [(min(t + size, T), min(size, T - 1 - t))
                                                           for t in range(0, T - 1, size)])
    sample = flow.sample(z, y, 2.0, GUIDANCE[name])
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def longer():
    """A flow of 64 tokens, not the identity, with noise and classes of 5 images"""
    flow = small_flow((2, 2, 4), 64, 16, width=64)
    return flow, torch.randn(5, 64, 16, generator=torch.Generator().manual_seed(3)), torch.arange(5)


def iterations(flow, call):
    """How often the flow's transformers run in call()"""
    seen = []
    hooks = [block.transformer.register_forward_hook(lambda *_: seen.append(1))
             for block in flow.blocks]
    call()
    for hook in hooks:
        hook.remove()
    return len(seen)


def relative_error(a, b):
    return ((a - b).norm(dim=(1, 2)) / b.norm(dim=(1, 2))).max()


@pytest.mark.parametrize('cfg', [0.0, 2.0])
@pytest.mark.parametrize('tol', [Options.tol, 1e-5])
def test_parallel_decoding_is_as_exact_as_its_tolerance(longer, monkeypatch, cfg, tol):
    monkeypatch.setattr(flow_module, 'JACOBI_IMAGES', 100)
    flow, z, y = longer
    parallel = lambda: flow.sample(z, y, cfg, tol=tol)
    assert relative_error(parallel(), flow.sample(z, y, cfg)) <= 3 * tol
    one_by_one = iterations(flow, lambda: flow.sample(z, y, cfg))
    assert one_by_one == 3 * 63 and iterations(flow, parallel) < 0.6 * one_by_one


def test_parallel_decoding_converges_in_bfloat16(longer, monkeypatch):
    """Where a tolerance below the rounding would be waited for in vain"""
    monkeypatch.setattr(flow_module, 'JACOBI_IMAGES', 100)
    flow, z, y = longer
    flow = with_weights_in(torch.bfloat16, flow)
    parallel = lambda: flow.sample(z, y, tol=Options.tol)
    with torch.autocast('cpu', torch.bfloat16):
        assert relative_error(parallel(), flow.sample(z, y)) <= 0.02
        assert iterations(flow, parallel) < 0.6 * 3 * 63


def test_weights_in_bfloat16_are_autocasts(longer):
    """Cast once, for sampling, they compute what autocast does in training: only rounding differs,
    of 2^-9 in each of some dozens of products in a row, while the products of float32 weights would
    be another function's."""
    flow, z, y = longer
    half = with_weights_in(torch.bfloat16, flow)
    assert half.blocks[0].transformer.layers[0].mlp[0].weight.dtype == torch.bfloat16
    assert half.blocks[0].transformer.proj_out.weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        x = half.sample(z, y)
        assert relative_error(flow(x, y)[0], z) <= 0.02
        torch.testing.assert_close(half(x, y)[0], flow(x, y)[0], rtol=1e-5, atol=1e-5)
    assert relative_error(x, flow.sample(z, y)) > 1e-4             # it was not float32


@pytest.mark.parametrize('few', [0, 4, 100])
def test_parallel_decoding_of_an_image_hardly_depends_on_the_others(longer, monkeypatch, few):
    monkeypatch.setattr(flow_module, 'JACOBI_IMAGES', few)
    flow, z, y = longer
    alone = torch.cat([flow.sample(z[i:i + 1], y[i:i + 1], 2.0, tol=Options.tol) for i in range(5)])
    assert relative_error(flow.sample(z, y, 2.0, tol=Options.tol), alone) <= 6 * Options.tol


def test_transposed_weights_are_the_same_weights(longer):
    layers = longer[0].blocks[0].transformer.layers
    h = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    weight = layers[0].attn.qkv.weight
    before, stride, pointer = layers[0].attn.qkv(h), weight.stride(), weight.data_ptr()
    with pytest.raises(KeyboardInterrupt), transposed_weights(layers, rows=4):
        assert weight.stride() == (1, len(weight))
        torch.testing.assert_close(layers[0].attn.qkv(h), before)
        raise KeyboardInterrupt
    assert weight.stride() == stride and weight.data_ptr() == pointer
    with transposed_weights(layers, rows=3):
        assert weight.stride() == stride


def test_guidance_is_the_product_of_densities():
    """p_c^(1+w) / p_u^w, normalised on a grid, where sigma_c <= sigma_u."""
    grid = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    log_density = lambda mu, sigma: -0.5 * ((grid - mu) / sigma) ** 2 - math.log(sigma)
    cases = [(0.3, -0.5, 0.5, 0.8, 1.0), (-1.0, 2.0, 1.0, 1.0, 3.0), (2, 1, 0.2, 2.0, 0.5)]
    for mu_c, mu_u, sigma_c, sigma_u, w in cases:
        p = torch.softmax((1 + w) * log_density(mu_c, sigma_c) - w * log_density(mu_u, sigma_u), 0)
        mean = (p * grid).sum()
        std = (p * (grid - mean) ** 2).sum().sqrt()
        pair = torch.tensor([mu_c, mu_u, math.log(sigma_c), math.log(sigma_u)]).double()
        mu, log_scale = guide(*pair, w)
        assert abs(mu - mean) < 1e-6 and abs(log_scale.exp() - std) < 1e-6


def test_guidance_off_and_clipped():
    mu_c, mu_u, a_c, a_u = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    mu, log_scale = guide(mu_c, mu_u, a_c, a_u, 0.0)
    assert torch.equal(mu, mu_c) and torch.equal(log_scale, a_c)
    # wider than the unconditional: as if the two were equally wide, so never wider than the
    # conditional
    a_u = a_c - a_u.abs()
    mu, log_scale = guide(mu_c, mu_u, a_c, a_u, 3.0)
    torch.testing.assert_close(mu, mu_c + 3 * (mu_c - mu_u))
    torch.testing.assert_close(log_scale, a_c)


def test_guided_sampling_agrees_with_a_guided_forward_of_the_deep_block(x, y):
    """Teacher-forced: given the guided sample, every guided mu and log_scale at once, then invert
    them."""
    flow = small_flow()
    deep, w = flow.blocks[-1], 2.0
    with torch.no_grad():
        sample = deep.reorder(deep.inverse(x, y, w))
        cond, uncond = predict(deep, sample, y), predict(deep, sample, torch.full_like(y, CLASSES))
        mu, log_scale = (shift(p) for p in guide(cond[0], uncond[0], cond[1], uncond[1], w))
        z = deep.reorder((sample - mu) * torch.exp(-log_scale))
        torch.testing.assert_close(z, x, rtol=1e-4, atol=1e-4)


def test_only_the_deep_block_is_guided(x, y):
    flow = small_flow()
    with torch.no_grad():
        h = flow.blocks[-1].inverse(x, y, 2.0)
        for block in reversed(flow.blocks[:-1]):
            h = block.inverse(h, y)
    assert torch.equal(flow.sample(x, y, 2.0), h)
    assert not torch.allclose(flow.sample(x, y), h)


def test_score_is_the_gradient_of_log_density(x, y):
    flow, h = small_flow(), 3e-3
    score = flow.score(x, y)
    direction = torch.randn(B, T, D, generator=torch.Generator().manual_seed(5))
    log_p = lambda v: -flow.nll(v, y).double() * T * D
    slope = (log_p(x + h * direction) - log_p(x - h * direction)) / (2 * h)
    projection = (score * direction).sum((1, 2)).double()
    torch.testing.assert_close(projection, slope, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('micro_batch', [1, 2, 3])
def test_score_step_in_micro_batches(x, y, monkeypatch, micro_batch):
    flow = small_flow()
    elements = micro_batch * 2 * T * 16 * 4                        # images, terms, T, C, layers
    monkeypatch.setattr(flow_module, 'score_elements', lambda device: elements)
    assert len(flow.score_batches(x, 2)) == math.ceil(B / micro_batch)
    expected = x + 0.25 * (flow.score(x, y) - flow.score(x, torch.full_like(y, CLASSES)))
    torch.testing.assert_close(flow.score_step(x, simflow_step(y)), expected, rtol=1e-5, atol=1e-5)


def test_score_step_moves_nothing_without_a_class(x):
    null = torch.full((B,), CLASSES)
    torch.testing.assert_close(small_flow().score_step(x, simflow_step(null)), x)


def test_data_without_classes(x):
    flow, y = small_flow(classes=0), torch.zeros(B, dtype=torch.long)
    z, _ = flow(x, y)
    # guidance has nothing to say
    torch.testing.assert_close(flow.sample(z, y, cfg=2.0), x, rtol=1e-4, atol=1e-4)


def test_bfloat16_keeps_the_affine_map_in_float32(x, y):
    """Sampling inverts the flow of the same precision, since x, z and logdet never leave
    float32."""
    flow = small_flow()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        z, logdet = flow(x, y)
        assert z.dtype == logdet.dtype == flow.sample(z, y).dtype == torch.float32
        exact = predict(flow.blocks[0], x, y)[0]
    assert exact.dtype == torch.float32


def test_parallel_decoding_waits_for_every_image(monkeypatch):
    """Noise so large that means hardly matter is known at once, the other image's is not."""
    monkeypatch.setattr(flow_module, 'JACOBI_IMAGES', 100)
    torch.manual_seed(0)
    flow, y = perturbed(VPFlow(16, 64, 64, 2, (2, 2), CLASSES)).eval(), torch.tensor([0, 1])
    z = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(3))
    z[0] *= 1e6
    assert relative_error(flow.sample(z, y, tol=1e-4)[1:], flow.sample(z, y)[1:]) < 3e-4


def test_first_weights_of_a_transformer():
    t = Flow(4, 64, 256, 2, (1,), classes=500).blocks[0].transformer
    assert t.pos.std().item() == pytest.approx(0.02, rel=0.1)
    assert t.classes.weight.std().item() == pytest.approx(1, rel=0.1)
