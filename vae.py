"""The VAE: LDM's convolutional autoencoder (Rombach et al. 2022, arXiv:2112.10752) as MAR uses it
(Li et al. 2024, arXiv:2406.11838), and SimFlow's one trick - a constant variance.

A codec answers with a mean and a noise level, and decodes:

    encode(image)   (B, 3, H, W) in [-1, 1] -> mu (B, T, D), sigma (a number, or (B, T, D) when it
                    is learned)
    decode(x)       (B, T, D) -> (B, 3, H, W)

The method never asks which codec it is. Below the VAE stand its siblings: LearnedVAE, whose encoder
predicts the variance, and Pixels, which only cuts patches.
"""
import math

import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import LOADING, fetch, refuse_damaged


class VAE(nn.Module):
    """SimFlow's codec. The encoder predicts no variance: sigma is a constant, so q(x | image) has
    constant entropy, a floor under the noise that no amount of training can remove (SimFlow
    sections 4.1 and A.3).

    width, mults: channels of the first level and multipliers of all.  patch: pixels per side that
    are folded into one before the first level (1 in the paper; more makes it fast on a CPU).  The
    down-sampling factor is f = patch * 2^(levels - 1).  latent_dim: D.  T = (image_size / f)^2
    tokens, row by row; images are square.  layer_norm: normalise each token's mu.
    """
    outputs = 1                                                    # of the encoder, times D

    def __init__(self, width, mults, patch, latent_dim, sigma, layer_norm=True):
        super().__init__()
        self.sigma = sigma
        self.encoder = encoder(width, mults, patch, self.outputs * latent_dim)
        self.norm = (nn.LayerNorm(latent_dim, elementwise_affine=False) if layer_norm
                     else nn.Identity())
        self.decoder = decoder(width, mults, latent_dim)
        # The last layer, where the adaptive weight of the adversarial loss compares gradients.
        self.conv_out = nn.Conv2d(width * mults[0], 3 * patch ** 2, 3, padding=1)
        self.unpatch = nn.PixelShuffle(patch)

    def encode(self, image):
        """(B, 3, H, W) in [-1, 1] -> mu (B, T, D), each token of mean 0 and variance 1 with
        layer_norm; sigma"""
        return self.norm(to_tokens(self.encoder(image))), self.sigma

    def decode(self, x):
        """(B, T, D) -> (B, 3, H, W), about [-1, 1]. RuntimeError if T is not a square."""
        return self.unpatch(self.conv_out(self.decoder(to_grid(x)))).float()


def encoder(width, mults, patch, out_dim):
    """(B, 3, H, W) -> (B, out_dim, H/f, W/f): two ResBlocks per level; the lowest level attends
    after each of them."""
    c = width
    layers = [nn.PixelUnshuffle(patch), nn.Conv2d(3 * patch ** 2, c, 3, padding=1)]
    for i, mult in enumerate(mults):
        lowest = i == len(mults) - 1
        for _ in range(2):
            layers.append(ResBlock(c, width * mult))
            c = width * mult
            if lowest:
                layers.append(SelfAttention(c))
        if not lowest:
            layers.append(Downsample(c))
    layers += middle(c)
    layers += [norm(c), nn.SiLU(), nn.Conv2d(c, out_dim, 3, padding=1)]
    return Stack(*layers)


def decoder(width, mults, in_dim):
    """(B, in_dim, H/f, W/f) -> (B, width * mults[0], H/patch, W/patch): three ResBlocks per level,
    attention in the middle only."""
    c = width * mults[-1]
    layers = [nn.Conv2d(in_dim, c, 3, padding=1)]
    layers += middle(c)
    for i in reversed(range(len(mults))):
        for _ in range(3):
            layers.append(ResBlock(c, width * mults[i]))
            c = width * mults[i]
        if i > 0:
            layers.append(Upsample(c))
    layers += [norm(c), nn.SiLU()]
    return Stack(*layers)


class Stack(nn.Sequential):
    """Modules in a row, recomputed in backward one by one when `grad_ckpt` is set."""
    grad_ckpt = False

    def forward(self, h):
        for module in self:
            if self.grad_ckpt:
                h = checkpoint(module, h, use_reentrant=False, preserve_rng_state=False)
            else:
                h = module(h)
        return h


def middle(c):
    return [ResBlock(c, c), SelfAttention(c), ResBlock(c, c)]


class ResBlock(nn.Module):
    """(B, cin, h, w) -> (B, cout, h, w). Starts as its skip connection and a constant, which
    LDM's does not: the nano preset then learns to reconstruct faster."""

    def __init__(self, cin, cout):
        super().__init__()
        self.norm1 = norm(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = norm(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h):
        r = self.conv1(F.silu(self.norm1(h)))
        r = self.conv2(F.silu(self.norm2(r)))
        return self.skip(h) + r


class SelfAttention(nn.Module):
    """One head over all positions of the grid. Starts as the identity and a constant."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.proj = nn.Conv2d(c, c, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, h):
        qkv = self.qkv(self.norm(h)).flatten(2).transpose(1, 2)    # (B, hw, 3c)
        q, k, v = qkv[:, None].chunk(3, dim=-1)                    # 3 x (B, 1 head, hw, c)
        r = F.scaled_dot_product_attention(q, k, v)[:, 0]          # (B, hw, c)
        return h + self.proj(r.transpose(1, 2).reshape(h.shape))


class Downsample(nn.Conv2d):
    """Stride-2 convolution, padded at the right and the bottom only (LDM)."""

    def __init__(self, c):
        super().__init__(c, c, 3, stride=2)

    def forward(self, h):
        return super().forward(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """(B, c, h, w) -> (B, c, 2h, 2w): every pixel four times, then a convolution"""

    def __init__(self, c):
        super().__init__(c, c, 3, padding=1)

    def forward(self, h):
        if not torch.compiler.is_compiling():
            return super().forward(F.interpolate(h, scale_factor=2.0, mode='nearest'))
        # Compiled, the gradient of that would be a scatter; the gradient of expand is a sum.
        h = h.permute(0, 2, 3, 1)[:, :, None, :, None]             # (B, h, 1, w, 1, c)
        h = h.expand(-1, -1, 2, -1, 2, -1)
        h = h.flatten(3, 4).flatten(1, 2)                          # (B, 2h, 2w, c)
        return super().forward(h.permute(0, 3, 1, 2))


def norm(channels):
    """GroupNorm of 32 groups, or of fewer, so that each holds a multiple of 4 channels: a group of
    one would erase the mean colour of its channel."""
    return GroupNorm(math.gcd(32, channels // 4), channels, eps=1e-6)


class GroupNorm(nn.GroupNorm):
    """torch's, (B, C, h, w) -> the same, written so that it compiles well."""

    def forward(self, h):
        if not torch.compiler.is_compiling():
            return super().forward(h.float())                      # as autocast has it on GPUs
        # Compiled, torch's own loses channels_last, and every convolution has to copy its output.
        # Statistics per channel first, then per group, read the memory in order.
        x = h.permute(0, 2, 3, 1).float()                          # (B, h, w, C)
        var, mean = torch.var_mean(x, dim=(1, 2), correction=0)    # (B, C)
        groups = self.num_groups, -1
        var = var.unflatten(1, groups)                             # (B, G, C/G)
        mean = mean.unflatten(1, groups)
        center = mean.mean(2, keepdim=True)                        # (B, G, 1): the group's mean
        var = (var + (mean - center).square()).mean(2, keepdim=True)
        scale = torch.rsqrt(var + self.eps) * self.weight.unflatten(0, groups)
        shift = self.bias.unflatten(0, groups) - center * scale    # (B, G, C/G)
        scale = scale.flatten(1)[:, None, None]                    # (B, 1, 1, C)
        shift = shift.flatten(1)[:, None, None]
        return (x * scale + shift).permute(0, 3, 1, 2)


def to_tokens(h):
    """(B, D, h, w) -> (B, h w, D) float32, row by row"""
    return h.flatten(2).transpose(1, 2).float()


def to_grid(x):
    """(B, T, D) -> (B, D, h, w), h = w. RuntimeError if T is not a square."""
    side = int(x.shape[1] ** 0.5)
    return x.transpose(1, 2).unflatten(2, (side, side))


# -------------------------------------------------------------- the networks that teach the decoder

class Discriminator(Stack):
    """PatchGAN (Isola et al. 2017, arXiv:1611.07004): (B, 3, H, W) -> patch logits (B, 1, h, w)

    GroupNorm where the original has BatchNorm, whose statistics would tie the images of a batch
    together: two processes of B/2 would then not equal one of B. A Stack, as torch 2.13 does not
    compile nn.Sequential's own forward.
    """

    def __init__(self, width, layers):
        c = width
        stack = [nn.Conv2d(3, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            cin, c = c, min(2 * c, 8 * width)
            stride = 2 if i < layers else 1
            stack.append(nn.Conv2d(cin, c, 4, stride, padding=1))
            stack.append(GroupNorm(math.gcd(16, c // 4), c))
            stack.append(nn.LeakyReLU(0.2))
        stack.append(nn.Conv2d(c, 1, 4, padding=1))
        super().__init__(*stack)
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)


def hinge(logits_real, logits_fake):
    """The discriminator's loss (Lim & Ye 2017, arXiv:1705.02894), from logits of any shape; the
    generator's is -logits_fake.mean()."""
    real = F.relu(1 - logits_real).mean()
    fake = F.relu(1 + logits_fake).mean()
    return 0.5 * (real + fake)


def adaptive_weight(grad_rec, grad_gan):
    """VQGAN's weight (Esser et al. 2021, arXiv:2012.09841, Eq. 7): both losses pull at the
    decoder's last layer equally hard. Their gradients there, of one shape -> a scalar.

    The cap matters when the discriminator's gradient vanishes. Each process and each micro-batch
    takes the ratio over its own images, so 1 x B and 2 x B/2 agree roughly, not to rounding.
    """
    ratio = grad_rec.norm() / (grad_gan.norm() + 1e-4)
    return ratio.clamp(max=1e4).detach()


class LPIPS(nn.Module):
    """Perceptual distance (Zhang et al. 2018, arXiv:1801.03924), version 0.1 on VGG16's features.

    image, original (B, 3, H, W) in [-1, 1] -> (B,): squared differences of channel-normalised
    features, weighted channel by channel (the heads), averaged over positions, summed over five
    depths.
    """
    DEPTHS = (2, 64), (2, 128), (3, 256), (3, 512), (3, 512)       # VGG16's convolutions, channels

    def __init__(self):
        super().__init__()
        layers, cin, self.ends = [], 3, []                         # ends: of the five depths
        for convolutions, c in self.DEPTHS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(cin, c, 3, padding=1), nn.ReLU()]
                cin = c
            self.ends.append(len(layers))
        self.features = nn.Sequential(*layers)                     # as torchvision numbers them
        self.heads = nn.ParameterList(torch.zeros(1, c, 1, 1) for _, c in self.DEPTHS)
        mean = torch.tensor([-0.030, -0.088, -0.188])              # of ImageNet's images
        std = torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer('shift', mean.view(1, 3, 1, 1))
        self.register_buffer('scale', std.view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def load(self, vgg, heads):
        """State dictionaries of torchvision's vgg16 and of the lpips package's v0.1/vgg.pth ->
        self. KeyError, RuntimeError if they are not."""
        names = self.features.state_dict()
        self.features.load_state_dict({name: vgg[f'features.{name}'] for name in names})
        for i, head in enumerate(self.heads):
            head.copy_(heads[f'lin{i}.model.1.weight'])
        return self

    def directions(self, image):
        """(B, 3, H, W) -> five feature maps (B, c, h, w), of norm 1 at every position"""
        h, maps = (image - self.shift) / self.scale, []
        for i, layer in enumerate(self.features, start=1):
            h = layer(h)
            if i in self.ends:
                f = h.float()                                      # squares of bf16 are too coarse
                maps.append(f / (f.norm(dim=1, keepdim=True) + 1e-10))
        return maps

    def forward(self, image, original):
        """Differentiable in the image only: training wants no more, and it halves the memory."""
        with torch.no_grad():
            theirs = self.directions(original)
        total = 0
        for head, a, b in zip(self.heads, self.directions(image), theirs):
            distance = (head * (a - b).square()).sum(1)            # (B, h, w)
            total = total + distance.mean((1, 2))
        return total


# ----------------------------------------------------------------------------------------- siblings

class LearnedVAE(VAE):
    """The standard VAE (Kingma & Welling 2013, arXiv:1312.6114): the encoder also predicts
    log sigma^2. Latents are divided by `std`, 1 unless it was measured, then STARFlow's noise of
    std `sigma` is added. Both noises together are Gaussian: their variances add."""
    outputs = 2

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer('std', torch.ones(()))

    def encode(self, image):
        """(B, 3, H, W) in [-1, 1] -> mu, sigma (B, T, D)"""
        mu, log_var = to_tokens(self.encoder(image)).chunk(2, dim=-1)
        variance = log_var.clamp(-30, 20).exp() / self.std ** 2 + self.sigma ** 2
        return self.norm(mu) / self.std, variance.sqrt()

    def decode(self, x):
        """(B, T, D) -> (B, 3, H, W), about [-1, 1]"""
        return super().decode(x * self.std)


class Pixels(nn.Module):
    """TARFlow's codec, which learns nothing: a token is a patch of pixels, channel by channel.
    latent_dim / patch^2 is 3, or 1 for grey images: the mean of the three channels."""

    def __init__(self, patch, latent_dim, sigma):
        super().__init__()
        self.sigma, self.channels = sigma, latent_dim // patch ** 2
        self.encoder, self.decoder = nn.PixelUnshuffle(patch), nn.PixelShuffle(patch)

    def encode(self, image):
        """(B, 3, H, W) in [-1, 1] -> mu (B, T, D) in [-1, 1], sigma"""
        image = image if self.channels == 3 else image.mean(1, keepdim=True)
        return to_tokens(self.encoder(image)), self.sigma

    def decode(self, x):
        """(B, T, D) -> (B, 3, H, W)"""
        return self.decoder(to_grid(x)).float().expand(-1, 3, -1, -1)


# ---------------------------------------------------------------------------------------- machinery

VGG16_URL = 'https://download.pytorch.org/models/vgg16-397923af.pth'
HEADS_URL = ('https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/'
             'vgg.pth')


def load_lpips(vgg_path='', heads_path='', without='--lpips 0 --l2 400'):
    """-> LPIPS with its released weights, from files or downloaded once. May raise UserError, which
    names the options that turn LPIPS off, `without`."""
    advice = f'put it there by hand, name a copy with --{{}}, or do without LPIPS: {without}'
    vgg_path = vgg_path or fetch(VGG16_URL, 'sha256:397923af', advice.format('lpips_vgg'))
    heads_path = heads_path or fetch(HEADS_URL, 'md5:d507d7349b931f0638a25a48a722f98a',
                                     advice.format('lpips_heads'), 'lpips_v0.1_vgg.pth')
    with refuse_damaged(f'{vgg_path} and {heads_path}', 'are not the weights of VGG16 and of LPIPS',
                        'name good copies with --lpips_vgg and --lpips_heads, or do without: '
                        f'{without}', LOADING):
        return LPIPS().load(*(torch.load(path, map_location='cpu', weights_only=True)
                              for path in (vgg_path, heads_path)))
