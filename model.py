"""SimFlow = VAE + flow, trained as one; its configuration, processes, checkpoints, and siblings.

    mu = LayerNorm(Encoder(image))         x = mu + sigma * noise          (SimFlow section 4.1)
    loss = rec(Decoder(x), image) + nll(Flow(x))                           (SimFlow Eq. 4)

Nothing is detached: the flow's gradient reaches the encoder through x.
"""
import atexit
import contextlib
import copy
import dataclasses
from dataclasses import dataclass
import datetime
import math
import os
import re
import sys
import time
import typing
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
import torch
from torch import nn
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (LOADING, UserError, check_numbers, fetch, option, refuse_damaged, require,
                  whole)
from flow import GUIDANCE, Flow, Layer, SiT, TARFlow, TARVPFlow, VPFlow, shift
from vae import LearnedVAE, Pixels, VAE


class SimFlow(nn.Module):
    """Codec (a VAE in all but the pixel presets) and prior (a flow in all but one). classes:
    their number, 0 for data without labels; this number as an index means "no class"."""

    def __init__(self, config, classes):
        super().__init__()
        c = config
        self.vae = build_codec(c)
        self.flow = PRIORS[c.prior](c.latent_dim, c.tokens, c.width, c.heads, c.layers, classes)
        self.noise, self.guidance, self.denoise = NOISE[c.noise], c.guidance, c.denoise
        self.image_size = c.image_size
        if c.freeze == 'encoder':
            self.vae.encoder.requires_grad_(False)
        elif c.freeze == 'vae':
            self.vae.requires_grad_(False)

    def latents(self, image, noise):
        """image (B, 3, H, W) in [-1, 1], noise (B, T, D) -> x = mu + sigma * noise, mu, both
        (B, T, D); sigma, a number or (B, T, D)"""
        mu, sigma = self.vae.encode(image)
        return self.noise.add(mu, sigma, noise), mu, sigma

    def kl(self, nll, sigma):
        """nll (B,), sigma a number or (B, T, D) -> (B,) KL(q(x | image) || p(x)), nats per
        dimension, from one draw of x; for dequantised pixels, bits per dimension times log 2"""
        return nll - self.noise.entropy - log_sigma(sigma, nll)

    def forward(self, image, y, noise):
        """image (B, 3, H, W) in [-1, 1], y (B,), noise (B, T, D) -> recon (B, 3, H, W), nll (B,),
        entropy (B,) of a learned sigma, mu (B, T, D)

        nll is in nats per latent dimension, without the constant 0.5 log(2 pi). With a constant
        sigma the entropy of q(x | image) is constant, too, and left out (SimFlow A.3): 0.
        """
        x, mu, sigma = self.latents(image, noise)
        nll = self.flow.nll(x, y)
        return self.vae.decode(x), nll, learned_entropy(sigma, nll), mu

    @torch.no_grad()
    def generate(self, y, noise, cfg=0.0, gamma=0.0, guidance='', tol=0.0, denoise=None):
        """y (B,), noise (B, T, D) -> images (B, 3, H, W) in [-1, 1], NaN where not finite

        cfg: w of the guidance. guidance: a row of GUIDANCE, default the preset's. gamma: weight of
        SimFlow's score step (Eq. 6). 0 turns cfg or gamma off. tol: of parallel decoding; 0 goes
        token by token. denoise: end with TARFlow's denoising step; None: as the preset does.
        """
        x = self.flow.sample(noise, y, cfg, GUIDANCE[guidance or self.guidance], tol)
        null = torch.full_like(y, self.flow.null_class)
        steps = []
        if gamma:
            steps += [(gamma, y), (-gamma, null)]
        denoise = self.denoise if denoise is None else denoise
        if denoise:
            steps.append((self.vae.sigma ** 2, y))
        if steps:
            x = self.flow.score_step(x, steps)
        image = self.decode(x)
        # Infinities become NaN too: clamp would hide them, but keeps NaN.
        return torch.where(image.isfinite(), image, math.nan).clamp(-1, 1)

    def decode(self, x):
        """(B, T, D) -> (B, 3, H, W), as many images at once as fit; all parts about as large, since
        a compiled decoder compiles for every size"""
        parts = math.ceil(len(x) * self.image_size ** 2 / DECODE_PIXELS)
        return torch.cat([self.vae.decode(part) for part in x.chunk(parts)])


# Decoded at once: 64 images of 256 x 256 pixels, whose feature maps take about 10 GB.
DECODE_PIXELS = 64 * 256 ** 2


def log_sigma(sigma, like):
    """sigma, a number or (B, T, D) -> (B,) its mean logarithm; device and dtype like (B,)"""
    sigma = torch.as_tensor(sigma).to(like)
    return sigma.log().mean((1, 2)) if sigma.dim() else sigma.log().expand_as(like)


def learned_entropy(sigma, like):
    """-> (B,) the entropy of q(x | image) where sigma (B, T, D) is learned, without its constant,
    to be subtracted from the loss; where sigma is a number, 0"""
    return log_sigma(sigma, like) if torch.is_tensor(sigma) else torch.zeros_like(like)


# ------------------------------------------------------------------------------------ configuration

@dataclass
class Config:
    """Everything that makes a run. Fields are train.py's options; a preset changes defaults."""
    model: str = option('nano', 'preset: a row of PRESETS')
    data: str = option('imagenet/train', 'shapes, cifar10, fashion_mnist, or a folder, zip or npz')
    out: str = option('out', 'output directory; an unfinished run found there is resumed')
    image_size: int = option(256, 'pixels per side')
    holdout: float = option(0.0, 'share of the images to measure on, and not to train on')
    flip: bool | None = option(None, 'random mirror images; default: where the data allows')
    workers: int = option(8, 'data loading processes per training process')

    codec: str = option('vae', 'image <-> latents: vae, learned (variance), or pixels')
    sigma: float = option(0.5, "standard deviation of the noise on the latents, SimFlow's constant")
    noise: str = option('additive', 'how the noise is added: additive, linear or slerp (both '
                                    'also _random), or uniform')
    latent_norm: bool = option(True, "LayerNorm of each token's mu")
    latent_dim: int = option(64, 'channels of a token, D')
    vae_width: int = option(128, "channels of the VAE's first level")
    vae_mults: tuple[int, ...] = option((1, 1, 2, 2, 4), 'multipliers of --vae_width, a number '
                                                         'per level')
    vae_patch: int = option(1, 'pixels per side folded into one before the first level')
    prior: str = option('flow', 'what models the latents: flow, vp (no scales), tarflow, '
                                'tarflow_vp, or sit (diffusion)')
    width: int = option(1152, "width of the flow's transformers, C")
    heads: int = option(16, 'attention heads')
    layers: tuple[int, ...] = option((2, 2, 2, 2, 2, 46), 'layers of each block, image -> noise')
    guidance: str = option('starflow', 'how --cfg guides: a row of GUIDANCE in flow.py')
    denoise: bool = option(False, "end sampling by TARFlow's denoising step (Tweedie)")

    init: str = option('', 'checkpoint to start from: its codec, and its flow if of the same shape')
    freeze: str = option('', 'what keeps the weights of --init: encoder, or vae (both halves)')
    unit_std: bool = option(False, 'divide the latents of --init by their std, measured at the '
                                   'start')

    rate: float = option(1.0, 'weight of the rate: nll less the entropy of a learned variance')
    l1: float = option(1.0, 'weight of the absolute pixel error')
    l2: float = option(0.0, 'weight of the squared pixel error')
    lpips: float = option(1.0, 'weight of the perceptual loss; 0 is off')
    lpips_vgg: str = option('', "torchvision's VGG16 weights; default: download once")
    lpips_heads: str = option('', "LPIPS v0.1's linear heads; default: download once")
    align: str = option('', 'alignment: forward (REPA-E), reverse or reverse_through (R-REPA)')
    repa: str = option('dinov2', 'the teacher: dinov2 (downloaded once), random, or a file of '
                      "DINOv2's weights")
    repa_weight: float = option(1.0, 'weight of the alignment')
    repa_block: tuple[int, ...] = option((3,), 'blocks that are aligned, from 1 on, image -> noise')
    repa_layer: int = option(1, 'the layer of these blocks whose output is aligned, from 1 on')
    repa_width: int = option(2048, 'width of the MLP between flow and teacher')
    gan: float = option(0.1, 'weight of the adversarial loss; 0 is off')
    gan_start: int = option(0, 'first step with the adversarial loss')
    gan_adaptive: bool = option(False, "scale --gan by the ratio of last-layer gradient norms, "
                                       "VQGAN's")
    gan_lr: float = option(1e-4, 'learning rate of the discriminator')
    gan_beta1: float = option(0.9, "first beta of the discriminator's Adam; 0.5 in VQGAN")
    gan_beta2: float = option(0.999, "second beta of the discriminator's Adam; 0.9 in VQGAN")
    gan_width: int = option(64, "channels of the discriminator's first layer")
    gan_layers: int = option(3, "the discriminator's stride-2 layers")

    batch_size: int = option(256, 'images per step, over all processes')
    epochs: int = option(160, 'passes over the data, unless --steps is positive')
    steps: int = option(0, 'optimisation steps; 0: as many as the epochs take')
    stop_at: int = option(0, 'stop (and save) at this step, schedule unchanged; 0: run to the end')
    optimizer: str = option('adamw', 'adamw, or muon: for hidden matrices, the rest by AdamW')
    lr: float = option(1e-4, 'learning rate')
    lr_end: float = option(1e-6, 'learning rate at the end')
    warmup: int = option(0, 'steps of linear warm-up')
    constant: float = option(0.5, 'share of the run at constant learning rate, before the cosine')
    beta2: float = option(0.999, "Adam's second beta")
    weight_decay: float = option(0.0, 'weight decay of AdamW')
    clip: float = option(1.0, 'largest gradient norm')
    ema: float = option(0.9999, 'decay of the weight average')
    class_drop: float = option(0.1, 'probability of training without the class')
    seed: int = option(0, 'random seed')

    device: str = option('', 'cuda, mps, cpu; default: the best there is')
    dtype: str = option('', 'float32 or bfloat16 (autocast); default: bfloat16 on GPUs and CPUs '
                            'that have it')
    compile: bool | None = option(None, 'torch.compile; default: on CUDA GPUs')
    grad_accum: int = option(1, 'micro-batches per step')
    grad_ckpt: bool = option(False, 'recompute activations in backward: slower, less memory')
    log_interval: int = option(100, 'steps between log lines')
    save_interval: int = option(2500, 'steps between checkpoints; 0: only at the end')
    keep_interval: int = option(0, 'steps between checkpoints to keep, as ckpt_STEP.pt; 0: none')
    sample_interval: int = option(5000, 'steps between pictures; 0: never')
    dry_run: bool = option(False, 'print the plan and exit')

    @property
    def factor(self):
        """f, image pixels per side for one token"""
        return self.vae_patch * 2 ** (len(self.vae_mults) - 1)

    @property
    def tokens(self):
        return (self.image_size // self.factor) ** 2

    def check(self):
        """Raise UserError for what cannot be built or trained."""
        for name, table in TABLES.items():
            require(getattr(self, name) in table, f'--{name} {getattr(self, name)} must be one of: '
                    f'{", ".join(row or "(nothing)" for row in table)}')
        values, several = vars(self), 'must be positive integers, such as 2,2,6'
        require(min(self.layers, default=1) > 0, f'--layers {several}')
        require(min(self.vae_mults, default=0) > 0, f'--vae_mults {several}')
        require(min(self.repa_block, default=0) > 0, f'--repa_block {several}')
        for name in POSITIVE:
            require(values[name] > 0, f'--{name} must be positive, not {values[name]}')
        for name in SHARES:
            require(0 <= values[name] <= 1, f'--{name} must be between 0 and 1, not {values[name]}')
        check_numbers(self)
        require(self.image_size % self.factor == 0, f'--image_size {self.image_size} must be a '
                f'multiple of the down-sampling factor {self.factor}')
        require(self.width % self.heads == 0,
                f'--width {self.width} must be a multiple of --heads {self.heads}')
        require(all(self.vae_width * m % 4 == 0 for m in self.vae_mults),
                f'--vae_width {self.vae_width} times each of --vae_mults must be a multiple of 4')
        require(self.image_size >= 3 * 2 ** self.gan_layers or not self.gan,
                f'--image_size {self.image_size} is too small for --gan_layers {self.gan_layers}')
        require(self.image_size >= 16 or not self.lpips,
                f'--image_size {self.image_size} is too small for --lpips, which needs 16')
        require(self.gan_width % 4 == 0, f'--gan_width {self.gan_width} must be a multiple of 4')
        for name in ('beta2', 'gan_beta1', 'gan_beta2', 'holdout'):
            require(values[name] < 1, f'--{name} must be less than 1')
        require(self.l1 + self.l2 > 0 or self.codec == 'pixels',
                'one of --l1 and --l2 must be positive: nothing else teaches the decoder')
        require(self.epochs + self.steps > 0, 'one of --steps and --epochs must be positive')
        # WORLD_SIZE without RANK counts in the plan only: no process would know its share.
        planned = self.dry_run or 'RANK' in os.environ
        world = processes() if planned else 1
        require(self.batch_size % (world * self.grad_accum) == 0, f'--batch_size {self.batch_size} '
                f'must be a multiple of {world} processes times --grad_accum {self.grad_accum}')
        self.check_system()

    def check_system(self):
        """The same, for what only some presets use."""
        pixels, learned, sit = self.codec == 'pixels', self.codec == 'learned', self.prior == 'sit'
        require(not pixels or len(self.vae_mults) == 1,
                '--codec pixels cuts patches of --vae_patch once: --vae_mults 1')
        require(not pixels or self.latent_dim / self.vae_patch ** 2 in (1, 3),
                f'--latent_dim {self.latent_dim} must be --vae_patch^2 times 3, or 1 for grey')
        require(self.layers or not (sit or pixels or self.freeze == 'vae'),
                '--layers must name some: nothing else would be trained')
        require(not self.denoise or self.noise == 'additive' and not learned,
                '--denoise is for --noise additive of a constant --sigma')
        require(not (pixels and (self.gan or self.lpips or self.freeze)),
                '--codec pixels has nothing to learn: set --gan and --lpips to 0, and leave '
                '--freeze away')
        require(not learned or self.noise == 'additive',
                f'--noise {self.noise} needs a constant variance, not --codec learned')
        require(self.noise not in ('linear', 'slerp') or self.sigma <= 1,
                f'--noise {self.noise} needs a --sigma of at most 1, not {self.sigma}')
        require(not self.unit_std or learned and self.freeze,
                '--unit_std is for --codec learned with --freeze')
        stage_one = 'vae_learned' if learned else 'vae'
        require(not self.freeze or self.init, f'--freeze {self.freeze} needs --init, the '
                f'checkpoint of a VAE; make one by python train.py --model {stage_one}')
        require(not (self.freeze == 'vae' and (self.gan or self.lpips)),
                '--freeze vae leaves --gan and --lpips nobody to teach: set both to 0')
        require(not sit or self.width % 4 == 0,
                f'--prior sit needs a --width that is a multiple of 4, not {self.width}')
        require(not (sit and (self.align or self.denoise)),
                '--align and --denoise need a flow, not --prior sit')
        if self.align:
            for block in self.repa_block:
                require(block <= len(self.layers) and self.repa_layer <= self.layers[block - 1],
                        f'--repa_block {block} --repa_layer {self.repa_layer}: no such layer in '
                        f'--layers {",".join(map(str, self.layers))}')


def processes():
    """-> their number, as torchrun or the user says; 1 if nobody does"""
    text = os.environ.get('WORLD_SIZE', '1')
    require(text.isdecimal() and int(text), f"WORLD_SIZE must be a positive number, not '{text}'")
    return int(text)


POSITIVE = ('image_size latent_dim vae_width vae_patch width heads gan_width gan_layers batch_size '
            'grad_accum lr clip log_interval repa_layer repa_width').split()
SHARES = 'class_drop constant ema beta2 gan_beta1 gan_beta2 holdout'.split()
# A row is what differs from Config's defaults, which are XXL's (SimFlow Tables 8 and 9).
# nano is for a CPU. Patches of 4 pixels make its VAE small, and it learns 64 tokens of 16 channels
# more easily than 16 of 64. Without a perceptual loss the pixel error needs more weight; even more
# makes better reconstructions, but latents that the flow learns more slowly. An adversarial loss
# made results worse at this size: see RESULTS.md.
NANO = dict(data='shapes', image_size=32, latent_dim=16, vae_width=64, vae_mults=(1,), vae_patch=4,
            width=128, heads=2, layers=(1, 2), l1=8.0, l2=50.0, lpips=0.0, gan=0.0, gan_width=32,
            gan_layers=2, batch_size=32, steps=1000, optimizer='muon', lr=6e-3, lr_end=6e-5,
            warmup=15, beta2=0.99, ema=0.999, workers=1, log_interval=25, save_interval=250,
            sample_interval=200, holdout=0.01)
STAGE_ONE = dict(epochs=80, constant=1.0)
# In bfloat16, rounding would move mu by as much as the sigma that such an encoder may learn.
LEARNED = NANO | dict(codec='learned', sigma=0.0, latent_norm=False, dtype='float32')
# Blocks of equal depth, every one guided, a denoising step at the end. The large presets (TAR) are
# as published: no weight average, no clipping, one epoch of warm-up.
PIXEL_FLOW = dict(codec='pixels', prior='tarflow', vae_mults=(1,), l1=0.0, l2=0.0, lpips=0.0,
                  gan=0.0, guidance='tarflow', denoise=True, beta2=0.95, weight_decay=1e-4)
TARFLOW = NANO | PIXEL_FLOW | dict(latent_dim=48, sigma=0.05, layers=(2, 2, 2, 2))
TAR = PIXEL_FLOW | dict(layers=8 * (8,), width=768, heads=12, constant=0.0, ema=0.0, clip=1e9)
PRESETS = {
    'nano': NANO,
    # Eight minutes on an H200, by its rate in RESULTS.md, which shows what 2,550 steps make.
    'cifar': NANO | dict(data='cifar10', width=512, heads=8, layers=(2, 2, 2, 2, 2, 8), l1=0.0,
                         l2=100.0, vae_width=128, vae_mults=(1, 2), vae_patch=2, batch_size=256,
                         steps=12000, lr=8e-4, lr_end=8e-6, warmup=300, ema=0.9995,
                         workers=8, log_interval=100, save_interval=1000, sample_interval=1000),
    # The paper compares sizes after its stage I; XXL alone goes through both (Tables 1 and 5).
    'S': STAGE_ONE | dict(width=384, heads=6, layers=(2, 2, 2, 2, 2, 2)),
    'B': STAGE_ONE | dict(width=768, heads=12, layers=(2, 2, 2, 2, 2, 2)),
    'L': STAGE_ONE | dict(width=1024, heads=16, layers=(2, 2, 2, 2, 2, 14)),
    'XL': STAGE_ONE | dict(width=1152, heads=16, layers=(2, 2, 2, 2, 2, 18)),
    'XXL': dict(width=1152, heads=16, layers=(2, 2, 2, 2, 2, 46)),
    'XXL_repa': dict(align='forward'),
    # What the papers compare with, at nano's size. Noise (SimFlow Table 6):
    'no_noise': NANO | dict(sigma=0.0, dtype='float32'),           # collapses
    'linear': NANO | dict(noise='linear'),
    'slerp': NANO | dict(noise='slerp'),
    'linear_random': NANO | dict(noise='linear_random'),
    'slerp_random': NANO | dict(noise='slerp_random'),
    # What is learned, and what is trained (Table 10); those that freeze something need --init:
    'no_norm': NANO | dict(latent_norm=False),
    'learned': LEARNED,
    'learned_noise': LEARNED | dict(sigma=0.5, dtype=''),
    'vae': NANO | dict(layers=()),                                 # a VAE alone: stage one
    # LDM's weight of the KL: 1e-6 of a sum over latents, beside a sum over pixels
    'vae_learned': LEARNED | dict(layers=(), rate=1e-7),
    'frozen': NANO | dict(freeze='vae'),
    'frozen_learned': LEARNED | dict(freeze='vae'),
    'starflow': LEARNED | dict(sigma=0.3, freeze='encoder', unit_std=True, dtype=''),
    # Flows of pixels (TARFlow); for bits per dimension of grey and of RGB images; as published:
    'tarflow': TARFLOW,
    'tarflow_vp': TARFLOW | dict(prior='tarflow_vp'),
    'tarflow_bits': TARFLOW | dict(latent_dim=16, noise='uniform', sigma=1 / 255, denoise=False,
                                   dtype='float32'),
    'cifar_bits': TARFLOW | dict(data='cifar10', vae_patch=2, latent_dim=12, noise='uniform',
                                 sigma=1 / 255, denoise=False, dtype='float32'),
    'tarflow64': TAR | dict(image_size=64, vae_patch=2, latent_dim=12, sigma=0.05, epochs=200,
                            warmup=5000),
    'tarflow128': TAR | dict(image_size=128, vae_patch=4, latent_dim=48, sigma=0.15, width=1024,
                             heads=16, batch_size=768, epochs=320, warmup=1700),
    'tarflow_afhq': TAR | dict(vae_patch=8, latent_dim=192, sigma=0.07, epochs=4000, warmup=57),
    # A teacher for the flow's features (REPA-E; Flowing Backwards), here a random network:
    'repa': NANO | dict(align='forward', repa='random', repa_block=(2,), repa_width=256),
    'r_repa': NANO | dict(align='reverse', repa='random', repa_weight=0.1, repa_block=(2,),
                          repa_layer=2, repa_width=256),
    # A diffusion model for the flow (Table 7):
    'sit': NANO | dict(prior='sit'),
}


# ----------------------------------------------------------------------------------------- siblings

CODECS = {'vae': VAE, 'learned': LearnedVAE, 'pixels': Pixels}
PRIORS = {'flow': Flow, 'vp': VPFlow, 'tarflow': TARFlow, 'tarflow_vp': TARVPFlow, 'sit': SiT}


def build_codec(c):
    """Config -> image <-> latents, a row of CODECS"""
    if c.codec == 'pixels':
        return Pixels(c.vae_patch, c.latent_dim, c.sigma)
    return CODECS[c.codec](c.vae_width, c.vae_mults, c.vae_patch, c.latent_dim, c.sigma,
                           c.latent_norm)


# Kinds of noise: mu, sigma, eps ~ N(0, I) -> x (SimFlow's Table 6). The paper does not say what its
# t is: here sigma, or random as in l-DeTok (Yang et al. 2025, arXiv:2507.15856), which it cites.

def additive(mu, sigma, eps):
    return mu + sigma * eps


def linear(mu, sigma, eps):
    return (1 - sigma) * mu + sigma * eps


def slerp(mu, sigma, eps):
    return (1 - sigma ** 2) ** 0.5 * mu + sigma * eps


def linear_random(mu, sigma, eps):
    return linear(mu, random_t(eps), eps)


def slerp_random(mu, sigma, eps):
    # Here t multiplies the noise; in Table 6 it multiplies mu.
    return slerp(mu, random_t(eps), eps)


def random_t(eps):
    """(B, T, D) -> (B, 1, 1), uniform on (0, 1), without further random numbers: a function of the
    mean of eps, which says next to nothing of any single value."""
    root = math.sqrt(eps[0].numel())
    return torch.special.ndtr(root * eps.mean((1, 2), keepdim=True))


def uniform(mu, sigma, eps):
    """Uniform on mu +- sigma: dequantisation if sigma = 1 / 255, as levels are 2 / 255 apart"""
    return mu + sigma * torch.erf(eps / math.sqrt(2))


class Noise(NamedTuple):
    """add: a function above.  entropy: of x given mu, nats per dimension, leaving out log sigma and
    0.5 log(2 pi), which are the same for all"""
    add: typing.Callable
    entropy: float = 0.5


NOISE = {'additive': Noise(additive), 'linear': Noise(linear), 'slerp': Noise(slerp),
         'uniform': Noise(uniform, math.log(2) - 0.5 * math.log(2 * math.pi)),
         # Of no one strength, so that there is no rate:
         'linear_random': Noise(linear_random, math.nan),
         'slerp_random': Noise(slerp_random, math.nan)}


class Aligned(SimFlow):
    """SimFlow with the flow's features aligned to a teacher's: `forward` also returns hidden states
    of some blocks, each mapped by its own MLP into the teacher's space, `teacher_width` wide.
    """

    def __init__(self, config, classes, teacher_width):
        super().__init__(config, classes)
        c = config
        self.align, self.aligned, self.layer = ALIGN[c.align], c.repa_block, c.repa_layer
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Linear(c.width, c.repa_width), nn.SiLU(),
                          nn.Linear(c.repa_width, c.repa_width), nn.SiLU(),
                          nn.Linear(c.repa_width, teacher_width)) for _ in c.repa_block)

    def forward(self, image, y, noise):
        """As SimFlow's, and then (blocks, B, T, teacher_width), to be aligned with the teacher's
        patches"""
        (x, mu, sigma), inputs = self.latents(image, noise), []
        z, logdet = self.flow(x, y, inputs)
        nll = -self.flow.log_prob(z, logdet) / x[0].numel()
        inputs, projected = self.align(self.flow, inputs, z, y, min(self.aligned)), []
        for number, projector in zip(self.aligned, self.projectors):
            hidden = features(self.flow.blocks[number - 1], inputs[number - 1], y, self.layer)
            projected.append(projector(hidden))
        entropy = learned_entropy(sigma, nll)
        return self.vae.decode(x), nll, entropy, mu, torch.stack(projected)


def features(block, x, y, layers):
    """x (B, T, D), y (B,) -> (B, T, C) after the first `layers` layers of the block, in grid order.
    These layers run a second time for that, which costs little as long as they are few."""
    t = block.transformer
    modulations = t.condition(y)
    h = t.enter(block.reorder(x), t.pos, modulations[-1])
    for layer, modulation in zip(t.layers[:layers], modulations):
        h = layer(h, modulation)
    return block.reorder(h)


def alignment(projected, wanted):
    """(blocks, B, T, F), (B, T, F) -> minus their mean cosine, in float32: squares of bf16 are too
    coarse"""
    return -F.cosine_similarity(projected.float(), wanted.float(), dim=-1).mean()


def generative_pass(flow, inputs, z, y, first):
    """The way back from z to the inputs of the block `first` (counted from 1) and all deeper ones,
    teacher-forced so that all tokens go at once: block t inverts with the mean and log_scale that
    it computes from its input in the forward pass, detached (sg),

        z_(t-1) = mean_t(sg x_(t-1)) + exp(log_scale_t(sg x_(t-1))) z_t,    starting from sg(z).

    Each z_(t-1) equals x_(t-1), but depends on the weights of its block and of the deeper ones.
    """
    again, z = list(inputs), z.detach()
    for i in reversed(range(first - 1, len(flow.blocks))):
        b, x = flow.blocks[i], inputs[i].detach()
        out = b.transformer(b.reorder(x), b.transformer.condition(y))
        mean, log_scale = b.split(shift(out))
        again[i] = z = b.reorder(mean + torch.exp(log_scale) * b.reorder(z))
    return again


def forward_pass(flow, inputs, z, y, first):
    return inputs


def detached_pass(flow, inputs, z, y, first):
    return [x.detach() for x in inputs]


# The inputs of all blocks from the first aligned one on, (B, T, D) each. Their values are the same;
# the weights that get gradients, besides those before the features in the block itself, are
#     forward           the encoder's and those of the blocks before (REPA-E, Leng et al. 2025,
#                       arXiv:2504.10483)
#     reverse           none: the inputs are detached (R-REPA, Chen et al. 2025, as printed)
#     reverse_through   all of this and the deeper blocks, through the generative pass
ALIGN = {'': None, 'forward': forward_pass, 'reverse': detached_pass,
         'reverse_through': generative_pass}
TABLES = {'codec': CODECS, 'noise': NOISE, 'prior': PRIORS, 'guidance': GUIDANCE, 'align': ALIGN,
          'freeze': ('', 'encoder', 'vae'), 'optimizer': ('adamw', 'muon'),
          'dtype': ('', 'float32', 'bfloat16')}


# --------------------------------------------------------------------- processes and random numbers

@dataclass
class Process:
    """Where a process works: its device, dtype of matrix products, and rank among `world`."""
    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int = 0
    world: int = 1
    patient: object = None                                         # group that waits for hours

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix('torch.')

    def autocast(self):
        """bfloat16 matrix products, if that is the dtype; parameters and sums stay float32."""
        if self.dtype == torch.float32:                            # on a Mac, torch 2.9's warns
            return contextlib.nullcontext()                        # even where it is turned off
        return torch.autocast(self.device.type, self.dtype)

    def distribute(self, module):
        """-> the module, its gradients averaged over the processes, its weights those of rank 0"""
        if self.world == 1:
            return module
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    def sum(self, values):
        """In place, over the processes."""
        if self.world > 1:
            # By gloo they may wait for hours, as when one GPU is slower than the others.
            on_cpu = values.device.type == 'cpu'
            dist.all_reduce(values, group=self.patient if on_cpu else None)

    def mean(self, values):
        """In place, over the processes."""
        if self.world > 1:
            self.sum(values)
            values /= self.world

    def gather(self, value):
        """-> on process 0 a list of all processes' values, on each other one a list of its own"""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.gather_object(value, values if self.rank == 0 else None)
        return values if self.rank == 0 else [value]

    def max(self, number):
        """Largest of the processes' integers. By gloo, so no process waits for its GPU."""
        if self.world == 1:
            return number
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def on_rank_0(self, work, *args):
        """Result of work(*args) on process 0, or the UserError or OSError it raised, on all."""
        result = [None]
        if self.rank == 0:
            try:
                result[0] = work(*args)
            except (UserError, OSError) as e:
                result[0] = e
        if self.world > 1:
            dist.broadcast_object_list(result, group=self.patient)
        if isinstance(result[0], (UserError, OSError)):
            raise result[0]
        return result[0]

    def rank_0_first(self, work, *args):
        """Run work(*args) on process 0, then on the others, which find what it downloaded. Each
        gets its own result; a UserError or OSError on process 0 is raised on all."""
        own = []

        def keep():                                                # not to be sent to the others
            own.append(work(*args))

        self.on_rank_0(keep)
        return own[0] if own else work(*args)

    def print(self, text):
        if self.rank == 0:
            with contextlib.suppress(OSError):                     # nobody may be reading any more
                tqdm.write(text)                                   # above a progress bar, if any
                sys.stdout.flush()                                 # a log file shall not lag behind


def find_process(device='', dtype='', compile=None, training=False):
    """-> Process on the device asked for, or the best one here; in the dtype asked for, or the
    faster one. Rank and GPU come from torchrun's environment. UserError for a device that can't be
    used, or a dtype other than float32 and bfloat16."""
    check_launch()
    kind, *index = device.split(':')
    if index and int(os.environ.get('LOCAL_WORLD_SIZE', 1)) > 1:
        raise UserError(f'--device {device} is one device for several processes; give --device '
                        f'{kind}')
    if not device:
        device = ('cuda' if torch.cuda.is_available() else
                  'mps' if torch.backends.mps.is_available() else 'cpu')
    if device == 'cuda':                                           # set_device wants an index
        device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()                       # not on meta, say
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device} can't be used here: {str(e).splitlines()[0]}")
    cuda = device.type == 'cuda'
    if cuda:
        torch.backends.cudnn.allow_tf32 = False                    # float32 means float32
        torch.cuda.set_device(device)
        # Work on the default stream can't be captured as a CUDA graph, nor what depends on it.
        torch.cuda.set_stream(torch.cuda.Stream(device))
    if not dtype:
        dtype = 'bfloat16' if gains_by_bfloat16(device, training) else 'float32'
    require(dtype in TABLES['dtype'], f'--dtype {dtype} must be float32 or bfloat16')
    if device.type == 'cpu':
        # In bfloat16, torch's fused attention takes three to four times as long as plain products
        # for nano's 64 tokens, somewhat longer for 256, and only for 1,024 less.
        torch.backends.cuda.enable_flash_sdp(dtype != 'bfloat16')
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    process = Process(device, getattr(torch, dtype), cuda if compile is None else compile)
    if 'RANK' in os.environ:
        meet(process)
    return process


def sampling_dtype(asked, config):
    """--dtype and a checkpoint's Config -> the dtype to ask for; '' is the default"""
    return asked or ('float32' if config.dtype == 'float32' else '')


CPU_INFO = '/proc/cpuinfo'                                         # on Linux


def gains_by_bfloat16(device, training):
    """Is bfloat16 faster than float32? Old GPUs and most CPUs only emulate it, many times slower.
    CPUs that have it gain in training, but not in sampling, a token at a time."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != 'cpu' or not training or not os.path.exists(CPU_INFO):
        return False
    with open(CPU_INFO) as file:
        return 'avx512_bf16' in file.read()


def meet(process):
    """Join the processes that torchrun has started."""
    nccl = process.device.type == 'cuda' and dist.is_nccl_available()          # Windows has none
    dist.init_process_group('cpu:gloo,cuda:nccl' if nccl else 'gloo')
    atexit.register(leave_processes)
    process.rank, process.world = dist.get_rank(), dist.get_world_size()
    if process.world > 1 and process.device.type == 'mps':
        raise UserError("several processes can't work on a Mac's GPU: start one, by python, or "
                        'give --device cpu')
    # While process 0 downloads, or lists a cold disk, the others wait: by default half an hour.
    process.patient = dist.new_group(backend='gloo', timeout=datetime.timedelta(hours=12))


def check_launch():
    """UserError if this is one of several processes and does not know which."""
    names = 'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'
    missing = [name for name in names if name not in os.environ]
    if 'RANK' in os.environ and missing:
        raise UserError(f'RANK is set, but not {", ".join(missing)}: start by torchrun, which sets '
                        'them all, or unset RANK')
    tasks = os.environ.get('SLURM_STEP_NUM_TASKS') or '1'
    if 'RANK' not in os.environ and tasks != '1':
        raise UserError(f'SLURM_STEP_NUM_TASKS is {tasks}: srun has started as many, which would '
                        'not know of each other; let it start one torchrun per node')


def leave_processes():
    """End the process group. A gloo thread may still need the interpreter to release a tensor; if
    the interpreter is gone by then, torch aborts the process, although all its work is done. The
    sleep gives the thread its turn."""
    dist.destroy_process_group()
    time.sleep(0.1)


TRAIN, SAMPLE, RECON, DIFFUSION = range(4)                         # random streams, never to meet


def mix_seed(*integers):
    """-> an integer of 63 bits. Of up to four integers, zeros at the end change nothing: (1, 0) and
    (1,) give one seed."""
    return int(np.random.SeedSequence(integers).generate_state(1, np.uint64)[0] >> 1)


def generator(device, stream, seed, index=0):
    """Random numbers that depend on these integers alone; index: of a step, or of an image."""
    return torch.Generator(device).manual_seed(mix_seed(stream, seed, index))


# --------------------------------------------------------------------------- checkpoints and images

def load_checkpoint(path, option='--ckpt', mmap=False):
    """-> the dictionary that train.py saved, on the CPU. UserError if it is not one; option: what
    named it. With mmap, its tensors stay in the file until they are used."""
    require(os.path.exists(path), f'there is no checkpoint {path}; train one with `python '
            f'train.py`, or name one with {option}')
    with refuse_damaged(path, 'is not a checkpoint of train.py, or is damaged', 'use another',
                        LOADING):
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
        if 'blocks.0.pos_embed' in state:
            state = from_tarflow(state, path)
        state['class_names'], state['step'], state['ema']          # KeyError if one is missing
        known = dataclasses.asdict(Config())
        # The weights of our first SiT have the same names, but times, positions and GELU differ.
        older = state['config'].get('prior') == 'sit' and 'unit_std' not in state['config']
        for part in [name for name in ('model', 'ema') if name in state]:
            state[part] = {new_name(name): value for name, value in state[part].items()}
            if state['config'].get('codec') == 'learned':          # older ones lack it
                state[part].setdefault('vae.std', torch.ones(()))
        block = state['config'].get('repa_block')
        if isinstance(block, int):                                 # once there was but one
            state['config']['repa_block'] = (block,)
        newer = [f'--{name}' for name in state['config'] if name not in known]
        state['config'] = known | state['config']                  # which may lack an option
        newer += [f'--{name} {state["config"][name]}' for name, table in TABLES.items()
                  if state['config'][name] not in table]
    require(not older, f'{path} is a diffusion model of an earlier version, which this one reads '
            'wrongly; use that version, or train it anew')
    require(not newer, f'{path} has options that this version does not know: {", ".join(newer)}; '
            'use the version that trained it')
    return state


def new_name(name):
    """A weight's present name. In older checkpoints a block was itself the transformer, and at most
    one block was aligned."""
    name = re.sub(r'^projector\.', 'projectors.0.', name)
    return re.sub(r'^(flow\.blocks\.\d+\.)(?!transformer\.)', r'\1transformer.', name)


def from_tarflow(weights, path):
    """State dictionary of ml-tarflow's Model -> the checkpoint that train.py would have saved. The
    std of the noise is not among the weights; it ends the file's name, as in ..._8_8_0.07.pth.
    Classes are named by their numbers."""
    tokens, width = weights['blocks.0.pos_embed'].shape
    names = [name.split('.', 2)[1:] for name in weights if name.startswith('blocks.')]
    blocks = 1 + max(int(i) for i, _ in names)
    dim = weights['blocks.0.proj_in.weight'].shape[1]
    channels = 3 if dim % 3 == 0 else 1
    patch = math.isqrt(dim // channels)
    layers = 1 + max(int(name.split('.')[3]) for name in weights if '.attn_blocks.' in name)
    vp = len(weights['blocks.0.proj_out.weight']) == dim
    classes = len(weights.get('blocks.0.class_embed', ()))
    sigma = re.search(r'_(0\.\d+)\.\w+$', os.path.basename(path))
    config = TAR | dict(prior='tarflow_vp' if vp else 'tarflow', latent_dim=dim, vae_patch=patch,
                        image_size=patch * math.isqrt(tokens), width=width, heads=width // 64,
                        layers=blocks * (layers,),
                        sigma=float(sigma[1]) if sigma else 0.0, denoise=bool(sigma))
    ema = {'flow.variance': weights['var']} if vp else {}
    for i, name in names:                                          # such as '3', 'proj_in.bias'
        value = weights[f'blocks.{i}.{name}']
        if name == 'pos_embed' and int(i) % 2:                     # theirs is in grid order
            value = value.flip(0)
        elif name == 'class_embed':
            value = value.squeeze(1)
        elif name.startswith('proj_out'):                          # log_scale, if any, came first
            log_scale, mean = (torch.zeros_like(value), value) if vp else value.chunk(2)
            value = torch.cat([mean, log_scale])
        for theirs, ours in TARFLOW_NAMES.items():
            name = name.replace(theirs, ours)
        if not name.endswith('attn_mask'):
            ema[f'flow.blocks.{i}.transformer.{name}'] = value
    if not classes:
        empty = torch.zeros(0, width)
        ema |= {f'flow.blocks.{i}.transformer.classes.weight': empty for i in range(blocks)}
    return {'ema': ema, 'config': config, 'step': 0,
            'class_names': [str(i) for i in range(classes)]}


TARFLOW_NAMES = {'pos_embed': 'pos', 'class_embed': 'classes.weight', 'attn_blocks': 'layers',
                 'attention.norm': 'norm1', 'mlp.norm': 'norm2', 'attention.': 'attn.',
                 'mlp.main': 'mlp'}


def load_model(path):
    """-> SimFlow with a checkpoint's EMA weights, its Config, class names. May raise UserError."""
    state = load_checkpoint(path, mmap=True)                       # only the average is read
    config = Config(**state['config'])
    model = SimFlow(config, len(state['class_names'])).eval().requires_grad_(False)
    try:
        model.load_state_dict(without_projector(state['ema']))
    except RuntimeError as e:
        raise UserError(f'{path} holds other weights than its own options say '
                        f'({str(e).splitlines()[-1].strip()}); use the version that trained it')
    return model, config, state['class_names']


def without_projector(weights):
    """-> the weights, less the projectors', which only training needs"""
    return {name: value for name, value in weights.items() if not name.startswith('projectors.')}


def export(path, out):
    """Write what sampling, evaluation and --init need of a checkpoint: a quarter of it. UserError
    if that would replace something."""
    require(not os.path.exists(out) and not out.endswith('/'),
            f'--export {out} is there already, or a folder; name a new file')
    state = load_checkpoint(path, mmap=True)
    kept = {name: state[name] for name in ('config', 'class_names', 'step')}
    kept['ema'] = without_projector(state['ema'])
    try:
        with whole(out) as temporary:
            torch.save(kept, temporary)
    except RuntimeError as e:                                      # torch's, on a full disk
        raise UserError(f'--export {out} could not be written ({str(e).splitlines()[0]}); make '
                        'room, or name another place')
    print(f'{out}: averaged weights of step {state["step"]:,}, from {path}')


def with_weights_in(dtype, model):
    """-> the model, or a copy with the weights of its matrix products and convolutions in dtype.
    Autocast would cast them for every token anew. The flow's heads stay in float32."""
    if dtype == torch.float32:
        return model
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.endswith('proj_out'):
            module.to(dtype)
    return model


def ready_to_sample(model, process):
    """-> the model on the process's device, weights in its dtype; compiled, if the process says so.
    UserError if it can't be."""
    model = with_weights_in(process.dtype, model.to(process.device))
    if process.compile and can_compile(process, asked=True):
        for module in model.flow.modules():
            if isinstance(module, Layer):
                module.compile(dynamic=True)                       # lengths and batches change
        if isinstance(model.vae, VAE):
            model.vae.decoder.compile()
    return model


def can_compile(process, asked):
    """Does torch.compile work here? It needs a C compiler, and on GPUs Triton. If not, a UserError
    if it was asked for, else a line that says so."""
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=process.device))
        return True
    except Exception as e:                                         # of many kinds and packages
        lines = [line for line in str(e).splitlines() if line.strip()]
        text = f'torch.compile does not work here ({lines[0] if lines else type(e).__name__})'
        if asked:
            raise UserError(f'{text}; leave --compile away')
        process.print(f'{text}; going on without it, more slowly')
        return False


TOL = 1e-3                                                         # of --decode jacobi


def tolerance(decode, tol):
    """Options of the same names -> tol of SimFlow.generate. UserError for what makes no sense."""
    require(decode in ('sequential', 'jacobi'), f'--decode {decode} must be sequential or jacobi')
    require(tol > 0, f'--tol must be positive, not {tol}; exact is --decode sequential')
    require(tol == TOL or decode == 'jacobi',
            f'--tol {tol} is for --decode jacobi; the sequential one is exact')
    return tol if decode == 'jacobi' else 0.0


def check_sampling(config, gamma, guidance='', tol=0.0, denoise=None):
    """UserError for what a checkpoint with this configuration can't do."""
    require(not denoise or config.noise == 'additive' and config.codec != 'learned',
            '--denoise 1 is for checkpoints of --noise additive and a constant --sigma')
    require(guidance in ('', *GUIDANCE),
            f'--guidance {guidance} must be one of: {", ".join(GUIDANCE)}')
    options = {'--gamma': gamma, '--decode jacobi': tol, '--guidance': guidance,
               '--denoise 1': denoise}
    asked = [name for name, value in options.items() if value]
    require(not asked or config.prior != 'sit', f'{" and ".join(asked)}: needs a flow, but the '
            'checkpoint is a diffusion model (--prior sit)')


def note_on_guidance(config, class_names, cfg, gamma, guidance):
    """-> a sentence if guidance is asked for where it changes nothing, else ''"""
    if guidance and not cfg:
        return f'--guidance {guidance} changes nothing while --cfg is 0'
    needs_classes = not GUIDANCE[guidance or config.guidance].tau or gamma
    if class_names or not (cfg or gamma) or not needs_classes:
        return ''
    if config.prior == 'sit':
        return 'the checkpoint knows no classes: --cfg changes nothing, and costs time'
    return ('the checkpoint knows no classes: --gamma changes nothing, --cfg only with --guidance '
            'tarflow_tau, and both cost time')


def sample_images(model, labels, seed, process, batch_size, cfg=0.0, gamma=0.0, order=None, **how):
    """Yield this process's share of the images, at most batch_size at once: positions (b,) in
    `order`, images (b, H, W, 3) uint8. All processes must call it, and consume it to the end; they
    yield equally often, and the last time b may be 0.

    Image i has class labels[i] and noise from (seed, i), so it depends neither on batch_size nor on
    the processes. order: of the i, by default 0, 1, 2, ...  how: see SimFlow.generate. Says how
    many images were not finite: they are black.
    """
    n, broken = len(labels), torch.zeros((), dtype=torch.long)
    order = np.arange(n) if order is None else order
    for start in range(0, n, batch_size * process.world):
        end = min(n, start + batch_size * process.world)
        positions = np.arange(start + process.rank, end, process.world)
        images = np.zeros((0, model.image_size, model.image_size, 3), np.uint8)
        if len(positions):
            index = order[positions]
            sources = [generator('cpu', SAMPLE, seed, int(i)) for i in index]
            noise = torch.stack([torch.randn(model.flow.shape, generator=g) for g in sources])
            with process.autocast():
                y = labels[index].to(process.device)
                x = model.generate(y, noise.to(process.device), cfg, gamma, **how)
            broken += x.isnan().flatten(1).any(1).sum().cpu()
            images = to_uint8(x)
        yield positions, images
    process.sum(broken)
    if broken:
        process.print(f'{broken} of {n} images are not finite, and black: --cfg or --gamma is too '
                      'large, or the checkpoint is broken')


def gather_images(batches, process):
    """What `sample_images` yields -> batch by batch the images of all processes in their order, on
    process 0; on the others their own"""
    for batch in batches:
        shares = process.gather(batch)
        positions = np.concatenate([positions for positions, _ in shares])
        images = np.concatenate([images for _, images in shares])
        yield images[np.argsort(positions)]


def progress(batches, n, text, process):
    """The same batches, (positions, images), with a bar that counts the images of all processes"""
    quiet = True if process.rank else None                         # None: where there's no terminal
    with tqdm(total=n, desc=text, unit='img', disable=quiet) as bar:
        for positions, images in batches:
            yield positions, images
            bar.update(min(len(positions) * process.world, n - bar.n))


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 by rounding; what is not finite is black"""
    levels = ((images.nan_to_num(-1, -1, -1).clamp(-1, 1) + 1) * 127.5).round()
    return levels.byte().permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(images):
    """(B, 3, H, W) uint8 -> float32 in [-1, 1]"""
    return images.float() / 127.5 - 1


def psnr(a, b):
    """(B, 3, H, W) on [0, 1] -> (B,) dB"""
    error = (a - b).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def grid(images, columns):
    """(N, H, W, 3) uint8 -> PIL image, row by row"""
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * columns, h, w, 3), 255, np.uint8)
    canvas[:n] = images
    canvas = canvas.reshape(rows, columns, h, w, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(canvas.reshape(rows * h, columns * w, 3))


COLOURS = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9'   # Okabe and Ito's


def plot(series, x_label, y_label):
    """Curves, name -> list of (x, y) -> PIL image. Drawn at twice the size, for smooth lines."""
    points = np.concatenate([np.array(curve) for curve in series.values()])
    low, high = points.min(0), points.max(0)
    high = np.where(high > low, high, low + 1)
    left, bottom, right, top = 160, 840, 1380, 80
    origin = np.array([left, bottom])
    scale = (right - left, top - bottom) / (high - low)
    image = Image.new('RGB', (1440, 960), 'white')
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(28)
    for value in np.linspace(low, high, 6):
        x, y = origin + (value - low) * scale
        draw.line([x, bottom, x, top], '#dddddd', 2)
        draw.line([left, y, right, y], '#dddddd', 2)
        draw.text((x, bottom + 12), f'{value[0]:.4g}', 'black', font, anchor='ma')
        draw.text((left - 12, y), f'{value[1]:.3g}', 'black', font, anchor='rm')
    draw.text(((left + right) / 2, 930), x_label, 'black', font, anchor='ms')
    draw.text((left, 48), y_label, 'black', font, anchor='ls')
    for i, (name, curve) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        pixels = origin + (np.array(curve) - low) * scale
        draw.line(pixels.ravel().tolist(), colour, 5, joint='curve')
        draw.circle(pixels[-1].tolist(), 8, colour)                # one point would be no line
        draw.text((right, top + 12 + 36 * i), name, colour, font, anchor='ra')
    return image.reduce(2)


# -------------------------------------------------------------------------------------- the teacher

class DINOv2(nn.Module):
    """The vision transformer of DINOv2 (Oquab et al. 2023, arXiv:2304.07193), patch 14, without
    registers: the frozen network whose features REPA and REPA-E align with.

    image (B, 3, H, W) in [-1, 1] -> (B, side * side, width) float32: the patch tokens after the
    last norm, row by row. side: tokens per side, for any image size.
    """
    PATCH = 14

    def __init__(self, width, depth, heads, side):
        super().__init__()
        self.side, self.width = side, width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))      # of DINOv2's training: not used
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv2d(3, width, self.PATCH, self.PATCH)})
        self.blocks = nn.ModuleList(TeacherBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])       # ImageNet's
        self.register_buffer('mean', mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer('std', std.view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def load(self, state):
        """State dictionary of a release -> self, with the position table at this side. KeyError,
        RuntimeError if it is not one."""
        table = resample_positions(state['pos_embed'], self.side)
        self.load_state_dict({**state, 'pos_embed': table})
        return self

    def forward(self, image):
        # As REPA does: first normalised, then resized without antialiasing.
        h = ((image + 1) / 2 - self.mean) / self.std
        h = F.interpolate(h, (self.PATCH * self.side, self.PATCH * self.side), mode='bicubic')
        h = self.patch_embed.proj(h).flatten(2).transpose(1, 2)    # (B, side * side, width)
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], dim=1) + self.pos_embed
        for block in self.blocks:
            h = block(h)
        return self.norm(h)[:, 1:].float()


class TeacherBlock(nn.Module):
    """Pre-norm transformer block with LayerScale (Touvron et al. 2021, arXiv:2103.17239):
    h (B, N, C) -> (B, N, C). Its parameters have the names of DINOv2's release."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = [nn.LayerNorm(width, eps=1e-6) for _ in range(2)]
        self.attn = nn.ModuleDict({'qkv': nn.Linear(width, 3 * width),
                                   'proj': nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({'fc1': nn.Linear(width, 4 * width),
                                  'fc2': nn.Linear(4 * width, width)})
        self.ls1, self.ls2 = [nn.ParameterDict({'gamma': torch.ones(width)}) for _ in range(2)]

    def forward(self, h):
        qkv = self.attn.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                       # 3 x (B, heads, N, c)
        r = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + self.ls1.gamma * self.attn.proj(r)
        r = self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(h))))
        return h + self.ls2.gamma * r


def resample_positions(table, side):
    """(1, 1 + n * n, C), the class token's row first -> (1, 1 + side * side, C) float32, by the
    rule of timm's resample_abs_pos_embed, which REPA uses. (Meta's own has no antialiasing.)"""
    return torch.cat([table[:, :1].float(), resample_grid(table[:, 1:].float(), side)], dim=1)


def resample_grid(table, side):
    """(1, n * n, C) -> (1, side * side, C)"""
    n = math.isqrt(table.shape[1])
    if n == side:
        return table
    h = table.transpose(1, 2).unflatten(2, (n, n))                 # (1, C, n, n)
    h = F.interpolate(h, (side, side), mode='bicubic', antialias=True)
    return h.flatten(2).transpose(1, 2)


DINOV2_URL = 'https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth'
DINOV2_DIGEST = 'sha256:0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73'


def load_teacher(path, side):
    """-> a network whose answer is side x side tokens: 'random', 'dinov2' (ViT-B/14, downloaded
    once), or a file of Meta's for ViT-S, B or L. UserError if it can't be had."""
    if path == 'random':
        return random_teacher(side)
    if path == 'dinov2':
        path = fetch(DINOV2_URL, DINOV2_DIGEST, 'put it there by hand, name a copy with --repa, or '
                     "train without: --align ''")
    with refuse_damaged(path, 'is not the weights of DINOv2 ViT-S/14, B/14 or L/14 without '
                        'registers', "name a good copy with --repa, or 'dinov2' to download one",
                        LOADING):
        state = torch.load(path, map_location='cpu', weights_only=True)
        width = state['cls_token'].shape[-1]
        depth = len({name.split('.')[1] for name in state if name.startswith('blocks.')})
        return DINOv2(width, depth, width // 64, side).load(state)


def random_teacher(side):
    """Small DINOv2 with random weights: a control, and a teacher without a download. Its features
    tell images and positions apart, but know nothing of objects.

    From numpy's RandomState, so that it is the same network everywhere.
    """
    rng, state = np.random.RandomState(0), {}
    for name, value in sorted(DINOv2(64, 2, 1, side=37).state_dict().items()):
        draw = rng.standard_normal(value.shape)
        if name.endswith('weight') and value.dim() > 1:
            draw = draw / math.sqrt(value[0].numel())
        elif name != 'pos_embed':                                  # scales near 1, the rest near 0
            draw = 0.2 * draw + name.endswith(('weight', 'gamma'))
        state[name] = torch.from_numpy(draw).float()
    return DINOv2(64, 2, 1, side).load(state)
