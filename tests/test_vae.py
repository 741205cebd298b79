"""The VAE: the size of the paper's, a constant variance, tokens in the order of the grid."""
import pytest
import torch
import torch.nn.functional as F

from vae import LPIPS, VAE, Discriminator, Downsample, GroupNorm, ResBlock, SelfAttention

SMALL = dict(width=16, mults=(1, 2), patch=2, latent_dim=8, sigma=0.5)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts():
    """MAR's VAE with 64 channels, no variance half and no 1x1 quantisation convolutions."""
    with torch.device('meta'):
        vae = VAE(width=128, mults=(1, 1, 2, 2, 4), patch=1, latent_dim=64, sigma=0.5)
    assert count(vae.encoder) == 28_413_248
    assert count(vae.decoder) + count(vae.conv_out) == 38_410_115


@pytest.mark.parametrize('patch, mults, factor', [
    (1, (1, 2), 2), (4, (1, 2), 8), (2, (1, 1, 2), 8)])
def test_shapes(patch, mults, factor):
    vae = VAE(**SMALL | dict(patch=patch, mults=mults))
    mu, sigma = vae.encode(torch.randn(2, 3, 32, 32))
    assert mu.shape == (2, (32 // factor) ** 2, 8) and sigma == 0.5
    assert vae.decode(mu).shape == (2, 3, 32, 32)


def test_every_token_is_normalised():
    # of a new encoder's tokens, some hardly vary
    torch.manual_seed(0)
    mu, _ = VAE(**SMALL).encode(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(mu.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(mu.var(-1, unbiased=False), torch.ones(2, 16), atol=1e-3, rtol=0)


def test_tokens_are_the_grid_row_by_row():
    vae = VAE(**SMALL)
    images = torch.randn(1, 3, 8, 16)                              # a grid of 2 x 4
    mu, _ = vae.encode(images)
    h = vae.encoder(images)
    for row in range(2):
        for column in range(4):
            expected = F.layer_norm(h[:, :, row, column], (8,))
            torch.testing.assert_close(mu[:, 4 * row + column], expected)


def test_decode_puts_token_t_where_encode_took_it_from():
    vae = VAE(**SMALL)
    seen = []
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(1, 16, 8)
    vae.decode(x)
    torch.testing.assert_close(seen[0].flatten(2).transpose(1, 2), x)


def test_downsampling_pads_right_and_bottom():
    down = Downsample(1)
    h = torch.randn(1, 1, 4, 4)
    rows = torch.cat([h, torch.zeros(1, 1, 1, 4)], 2)
    padded = torch.cat([rows, torch.zeros(1, 1, 5, 1)], 3)
    windows = [padded[0, 0, 2 * i:2 * i + 3, 2 * j:2 * j + 3] for i in range(2) for j in range(2)]
    sums = [(window * down.weight[0, 0]).sum() + down.bias[0] for window in windows]
    slow = torch.stack(sums).view(1, 1, 2, 2)
    torch.testing.assert_close(down(h), slow)


def test_the_discriminator_starts_as_pix2pixs_does():
    weights = [m.weight.detach() for m in Discriminator(64, 3) if isinstance(m, torch.nn.Conv2d)]
    assert len(weights) == 5
    assert all(w.std().item() == pytest.approx(0.02, rel=0.1) for w in weights)


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    vae, images = VAE(**SMALL), torch.randn(2, 3, 16, 16)
    grads = []
    for on in (False, True):
        for module in vae.modules():
            module.grad_ckpt = on
        vae.zero_grad()
        vae.decode(vae.encode(images)[0]).square().mean().backward()
        grads.append([p.grad.clone() for p in vae.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_residual_block_by_its_definition():
    block, h = ResBlock(8, 16), 1e-3 * torch.randn(2, 8, 4, 4)     # as small as eps is
    torch.nn.init.normal_(block.conv2.weight)

    def swish(n, h):
        return F.silu(F.group_norm(h, n.num_groups, n.weight, n.bias, eps=1e-6))

    r = block.conv2(swish(block.norm2, block.conv1(swish(block.norm1, h))))
    torch.testing.assert_close(block(h), block.skip(h) + r)


def test_attention_of_the_vae_by_its_definition():
    attention, h = SelfAttention(8), torch.randn(2, 8, 3, 3)
    torch.nn.init.normal_(attention.proj.weight)
    q, k, v = attention.qkv(attention.norm(h)).flatten(2).chunk(3, dim=1)      # (2, 8, 9)
    weights = (q.mT @ k / 8 ** 0.5).softmax(-1)                    # (2, 9 queries, 9 keys)
    r = attention.proj((v @ weights.mT).view_as(h))
    torch.testing.assert_close(attention(h), h + r)


def test_slope_of_the_discriminator():
    slopes = [m.negative_slope for m in Discriminator(8, 3) if isinstance(m, torch.nn.LeakyReLU)]
    assert slopes == [0.2] * 4


def test_latents_and_features_stay_float32_under_autocast():
    image, net = torch.rand(2, 3, 16, 16), VAE(**SMALL | dict(layer_norm=False))
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        mu, _ = net.encode(image)
        tensors = [mu, net.decode(mu), *LPIPS().directions(image)]
    assert all(t.dtype == torch.float32 for t in tensors)


def test_compiled_group_norm_has_statistics_in_float32(monkeypatch):
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    norm, h = GroupNorm(2, 8), (30 + torch.randn(2, 8, 16, 16)).bfloat16()
    expected = F.group_norm(h.float(), 2, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(h).float(), expected, rtol=0, atol=0.02)
