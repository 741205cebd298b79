"""Numbers from images: FID and its relatives, reconstruction, likelihood, the latent space.

    python evaluate.py out/samples.npz --ref imagenet_val/              samples: a folder, a zip or an npz
    python evaluate.py --ckpt out/ckpt.pt --ref imagenet_val/ --cfg 0 1 2 --gamma 0 0.25   sample first
    python evaluate.py --ckpt out/ckpt.pt --reconstruct imagenet_val/   rFID, PSNR, SSIM, LPIPS, rate, ELBO
    python evaluate.py --ckpt out/ckpt.pt --latents 1                   SimFlow's Figures 3 and 4
    python evaluate.py --ckpt out/ckpt.pt --classify imagenet_val/      accuracy of the flow as a classifier
    torchrun --nproc_per_node=8 evaluate.py ...                         the same numbers, faster

Prints a table, and the same as JSON in the last line. Inception's weights are those of pytorch-fid's release
(91 MB, downloaded once); --features random does without, to try things out, but its numbers are not FID.
"""
from collections import OrderedDict
import contextlib
from dataclasses import dataclass
import itertools
import json
import math
from multiprocessing.pool import ThreadPool
import os
import time
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont
import torch
from torch import nn
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import (Arrays, Unreadable, UserError, cli, crop, fetch, hexdigest, open_data, option,
                  parse_options, refuse_damage, refuse_negative, skip_header, whole)
from model import (RECON, check_sampling, find_place, generator, grid, load_model, note_on_guidance,
                   sample_images, to_uint8)
from vae import load_lpips

WEIGHTS = ('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
           'pt_inception-2015-12-05-6726825d.pth')
DIGEST = 'sha256:6726825d'
SPLITS = 10                                           # of the Inception score, and thus the fewest images
NEIGHBOURS, REFERENCES = 3, 10_000                    # of precision and recall
LEVELS = 0, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2           # of noise on mu: Figure 3
CONVENTIONS = {
    'FID': 'InceptionV3 of 2015-12-05 in float32, TF1 bilinear to 299; unbiased covariance in float64',
    'sFID': 'the first 7 channels of Mixed_6d, at all 17 x 17 positions',
    'IS': f'{SPLITS} splits of the permutation RandomState(2020), logits without bias; std is over splits',
    'precision': f'and recall: pool features, k = {NEIGHBOURS}, at most {REFERENCES:,} reference images',
    'PSNR': 'dB, of uint8 images, at most 100, mean over images',
    'SSIM': "RGB, gaussian 11 x 11, sigma 1.5, population covariance, torchmetrics' reflect padding",
    'LPIPS': 'v0.1, VGG16',
    'rate': 'KL(q(x | image) || p(x)), bits per latent dimension; of dequantised pixels: bits per dimension',
    'centred': 'accuracy of scores less their mean over the n images: fair if classes are equally frequent',
    'ELBO': 'negative, bits per pixel value, lower is better: rate + distortion at --decoder_std'}


@dataclass
class Options:
    """The command line. A word that is not an option's is --samples."""
    samples: str = option('', 'images to measure: a folder, a zip, an npz (arr_0), or statistics in an npz',
                          bare=True)
    ref: str = option('', 'images to compare with: the same, or a data set by name')
    save_ref: str = option('', 'npz to write the statistics of --ref to, for later runs to name as --ref')
    ckpt: str = option('', 'checkpoint of train.py to sample from, to reconstruct with, or to look into')
    reconstruct: str = option('', 'images to encode and decode')
    latents: bool = option(False, 'measure the latent space, of --reconstruct or else of the training data')
    classify: str = option('', 'images of the same classes to tell apart by their likelihood')
    num_samples: int = option(50_000, 'images to sample; of given images, how many to use at most',
                              also=['--n'])
    ref_n: int = option(0, 'reference images to use at most; 0: all')
    cfg: list[float] = option((0.0,), 'guidance weights to sample with, one or more; 0 is off')
    gamma: list[float] = option((0.0,), 'sizes of the score step, one or more; 0 is off')
    guidance: str = option('', "how --cfg guides: a row of GUIDANCE in flow.py; default: the checkpoint's")
    seed: int = option(0, 'random seed')
    features: str = option('inception', 'inception, or random: needs no weights, is not FID')
    weights: str = option('', "Inception's weights; default: in torch.hub's directory, downloaded once")
    lpips_vgg: str = option('', "torchvision's VGG16 weights; default: downloaded once")
    lpips_heads: str = option('', "LPIPS v0.1's linear heads; default: downloaded once")
    decoder_std: float = option(0.1, "of the ELBO's Gaussian decoder, on pixels in [-1, 1]")
    batch_size: int = option(50, 'images at once, per process')
    out: str = option('', 'directory for pictures; default: where --ckpt is')
    device: str = option('', 'cuda, mps, cpu; default: the best there is')
    dtype: str = option('', "the checkpoint's arithmetic: float32, bfloat16; default: as trained")

    def check(self):
        """Raise UserError for what can't be done."""
        refuse_negative(self)
        guided = bool(any(self.cfg) or any(self.gamma) or self.guidance)
        tasks = [bool(self.reconstruct or self.latents), bool(self.classify), guided]
        for fine, sentence in (
                (bool(self.samples) != bool(self.ckpt), 'name either samples to measure, or a --ckpt'),
                (self.ckpt or not any(tasks),
                 '--reconstruct, --latents, --classify, --cfg, --gamma and --guidance need a --ckpt'),
                (sum(tasks) < 2, '--reconstruct or --latents, --classify, and sampling with --cfg, --gamma '
                 'or --guidance are three runs: ask for one at a time'),
                (self.ref or any(tasks[:2]),
                 '--ref is missing, the images to compare with: a folder, a zip, an npz or a data set'),
                (self.features in ('inception', 'random'),
                 f'--features {self.features} must be inception or random'),
                (self.num_samples >= SPLITS,
                 f'--num_samples {self.num_samples} is too few: the numbers need {SPLITS} images or more'),
                (not self.save_ref or self.ref and self.save_ref.endswith('.npz'),
                 f'--save_ref {self.save_ref} must end in .npz, and needs a --ref'),
                (self.ref_n == 0 or self.ref_n >= SPLITS,
                 f'--ref_n {self.ref_n} must be 0, or {SPLITS} or more'),
                (self.batch_size > 0, f'--batch_size must be positive, not {self.batch_size}'),
                (self.decoder_std > 0, f'--decoder_std must be positive, not {self.decoder_std}')):
            if not fine:
                raise UserError(sentence)


# -------------------------------------------------------------------------------------------------- Inception

def conv(cin, cout, kernel, stride=1, padding=0):
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(cin, cout, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(cout, eps=1e-3, momentum=1.0),           # momentum: for random_inception alone
        relu=nn.ReLU(inplace=True)))


AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
MAXIMUM = nn.MaxPool2d(3, stride=1, padding=1)
HALVE = nn.MaxPool2d(3, stride=2)
ROW, COLUMN, ROW7, COLUMN7 = (1, 3), (3, 1), (1, 7), (7, 1)
FORK = (384, ROW), (384, COLUMN)


class Mixed(nn.Module):
    """Branches side by side, outputs concatenated. The last branch reads pool(h), and may be nothing else.

    A branch is a chain of convolutions, (channels, kernel), which keep the size, or (channels, kernel,
    stride), not padded. FORK is two of them side by side. Their names count along the chain.
    """

    def __init__(self, cin, pool, **branches):
        super().__init__()
        self.pool, self.chains = pool, []
        for branch, rows in branches.items():
            c, chain = cin, []
            for i, row in enumerate(rows, 1):
                name = f'{branch}_{i}' if len(rows) > 1 else branch
                pair = dict(zip((name + 'a', name + 'b'), FORK)) if row is FORK else {name: row}
                for name, (cout, kernel, *stride) in pair.items():
                    padding = 'valid' if stride else 'same'
                    self.add_module(name, conv(c, cout, kernel, *stride, padding=padding))
                c = cout
                chain.append([self.get_submodule(name) for name in pair])
            self.chains.append(chain)

    def forward(self, h):
        outs = [h] * (len(self.chains) - 1) + [self.pool(h)]
        for i, chain in enumerate(self.chains):
            for convs in chain:
                outs[i] = torch.cat([conv(outs[i]) for conv in convs], dim=1)
        return torch.cat(outs, dim=1)


A = dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
E = dict(branch1x1=[(320, 1)], branch3x3=[(384, 1), FORK], branch3x3dbl=[(448, 1), (384, 3), FORK],
         branch_pool=[(192, 1)])


def mixed_c(c):
    return Mixed(768, AVERAGE, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, ROW7), (192, COLUMN7)],
                 branch7x7dbl=[(c, 1), (c, COLUMN7), (c, ROW7), (c, COLUMN7), (192, ROW7)],
                 branch_pool=[(192, 1)])


class Inception(nn.ModuleDict):
    """InceptionV3 (Szegedy et al. 2015, arXiv:1512.00567) in the graph of 2015-12-05, which defines FID: 1008
    logits, averages that leave the padding out, a maximum in Mixed_7c. Names are the released weights'."""

    def __init__(self):
        super().__init__({
            'Conv2d_1a_3x3': conv(3, 32, 3, stride=2), 'Conv2d_2a_3x3': conv(32, 32, 3),
            'Conv2d_2b_3x3': conv(32, 64, 3, padding=1), 'pool_1': HALVE,
            'Conv2d_3b_1x1': conv(64, 80, 1), 'Conv2d_4a_3x3': conv(80, 192, 3), 'pool_2': HALVE,
            'Mixed_5b': Mixed(192, AVERAGE, **A, branch_pool=[(32, 1)]),
            'Mixed_5c': Mixed(256, AVERAGE, **A, branch_pool=[(64, 1)]),
            'Mixed_5d': Mixed(288, AVERAGE, **A, branch_pool=[(64, 1)]),
            'Mixed_6a': Mixed(288, HALVE, branch3x3=[(384, 3, 2)],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)], branch_pool=[]),
            'Mixed_6b': mixed_c(128), 'Mixed_6c': mixed_c(160), 'Mixed_6d': mixed_c(160),
            'Mixed_6e': mixed_c(192),
            'Mixed_7a': Mixed(768, HALVE, branch3x3=[(192, 1), (320, 3, 2)],
                              branch7x7x3=[(192, 1), (192, ROW7), (192, COLUMN7), (192, 3, 2)],
                              branch_pool=[]),
            'Mixed_7b': Mixed(1280, AVERAGE, **E), 'Mixed_7c': Mixed(2048, MAXIMUM, **E),
            'fc': nn.Linear(2048, 1008)})

    def forward(self, images):
        """(B, 3, H, W) uint8 -> pool features (B, 2048), logits without bias (B, 1008), spatial (B, 2023)"""
        *layers, (_, fc) = self.items()
        h = (resize(images.to(fc.weight.dtype), 299) - 128) / 128
        for name, layer in layers:
            h = layer(h)
            if name == 'Mixed_6d':
                spatial = h[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7), for sFID
        pool = h.mean((2, 3))                                      # (B, 2048)
        return pool, pool @ fc.weight.T, spatial


def resize(x, size):
    """(B, C, H, W) -> (B, C, size, size) by TensorFlow 1's bilinear rule: pixel i is at i * H / size;
    no half-pixel centres, no filter against aliasing. Along rows first, which decides the last bit."""
    for dim in (3, 2):
        n = x.shape[dim]
        position = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(n / size)
        low = position.long()
        weight = (position - low).view(-1, *[1] * (3 - dim))
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * weight
    return x


def random_inception(seed=0):
    """Inception with random weights: He's initialisation, random BatchNorm scales, running statistics of four
    images of noise at all scales. Drawn by numpy and in float64, it is the same network everywhere. Its
    features tell images apart, but not as FID's do."""
    rng, net = np.random.RandomState(seed), Inception().double()
    for name, value in sorted(net.state_dict().items()):
        if value.dim() > 1:
            scale = math.sqrt(2 / value[0].numel())
            value.copy_(torch.from_numpy(rng.standard_normal(value.shape)) * scale)
        elif name.endswith(('bn.weight', 'bias')):
            value.copy_(torch.from_numpy(rng.uniform(-0.5, 0.5, value.shape)) + name.endswith('weight'))
    noise = [torch.from_numpy(rng.standard_normal((4, 3, size, size))) for size in (2, 4, 8, 16, 32)]
    with torch.no_grad():
        net.train()((128 + 40 * sum(resize(octave, 32) for octave in noise)).clamp(0, 255).byte())
    return net.float().eval().requires_grad_(False)


def load_inception(features, path):
    """-> Inception, what to call its weights. UserError where they can't be had."""
    if features == 'random':
        return random_inception(), 'random'
    if path:                                                       # the user's own file: check, touch nothing
        with reading(path):
            seen = 'sha256:' + hexdigest(path, 'sha256')
        if not seen.startswith(DIGEST):
            raise UserError(f'{path} has {seen[:15]}, and is not the file {WEIGHTS} ({DIGEST})')
    else:
        path = os.path.join(torch.hub.get_dir(), 'checkpoints', os.path.basename(WEIGHTS))
        fetch(WEIGHTS, path, DIGEST, 'put it there by hand, name a copy: --weights, or use --features random')
    net = Inception()
    net.load_state_dict(dict(torch.load(path, map_location='cpu', weights_only=True)))
    return net.eval().requires_grad_(False), DIGEST


# ------------------------------------------------------------------------------------------------- statistics
#
# What remains of a set of images is a dictionary of arrays, as npz files hold them. ADM's names:
#     mu (2048,), sigma (2048, 2048)        mean and covariance of the pool features, float64
#     mu_s (2023,), sigma_s (2023, 2023)    of the spatial features
# and ours: features (up to n, 2048) float32, the pool features for precision and recall; score (2,), the
# Inception score and its std; n; size. The table has - for what a file lacks.

class Statistics:
    """Sums over the n images of all processes, in float64, and the features of those at the positions `keep`,
    without which memory does not grow with n."""

    def __init__(self, net, n, keep, place):
        self.net, self.place, self.keep = net, place, np.isin(np.arange(n), keep)
        self.features, self.sums = [], []                          # what `add` adds to
        self.sizes = np.diff(np.arange(SPLITS + 1) * n // SPLITS)
        self.split = np.empty(n, np.int64)                         # of each image: they come sorted by class
        self.split[np.random.RandomState(2020).permutation(n)] = np.repeat(np.arange(SPLITS), self.sizes)

    @torch.no_grad()
    def add(self, index, images):
        """index (b,) positions among the n, images (b, H, W, 3) uint8"""
        outs = self.net(torch.from_numpy(images).permute(0, 3, 1, 2).to(self.place.device))
        if self.place.device.type == 'mps':                        # which has no float64
            outs = [out.cpu() for out in outs]
        self.features.append(outs[0][torch.from_numpy(self.keep[index])].cpu())
        pool, logits, spatial = [out.double() for out in outs]
        pool, spatial = [F.pad(f, (0, 1), value=1.0) for f in (pool, spatial)]     # f f^T then holds f, too
        log_p = logits.log_softmax(1)
        p_log_p = (log_p.exp() * log_p).sum(1, keepdim=True)
        split = F.one_hot(torch.from_numpy(self.split[index]), SPLITS).to(log_p)   # (b, SPLITS)
        factors = (pool, pool), (spatial, spatial), (split, log_p.exp()), (split, p_log_p)
        self.sums = self.sums or [a.new_zeros(a.shape[1], b.shape[1]) for a, b in factors]
        for total, (a, b) in zip(self.sums, factors):
            total.addmm_(a.T, b)                                   # in place: temporaries fragment memory

    def summary(self, name):
        """Add up the processes -> the dictionary above, without n and size; features only on process 0."""
        features = torch.cat(self.features)
        if self.place.world > 1:
            for total in self.sums:
                dist.all_reduce(total)
            shares = [None] * self.place.world
            dist.gather_object(features, None if self.place.rank else shares)
            features = features if self.place.rank else torch.cat(shares)
        if not all(total.isfinite().all() for total in self.sums):
            raise UserError(f'the features of {name} are not finite; the network, or an image, is damaged')
        pool, spatial, p, p_log_p = [total.cpu().numpy() for total in self.sums]
        (mu, sigma), (mu_s, sigma_s) = gaussian(pool), gaussian(spatial)
        return dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, features=features.numpy(),
                    score=inception_score(p, p_log_p[:, 0], self.sizes))


def gaussian(total):
    """Sum over images of (f, 1) (f, 1)^T -> mean (d,), unbiased covariance (d, d)"""
    n, mean = total[-1, -1], total[-1, :-1] / total[-1, -1]
    return mean, (total[:-1, :-1] - n * np.outer(mean, mean)) / (n - 1)


def inception_score(p, p_log_p, n):
    """Sums over each split's images of p (splits, classes), p log p (splits,), 1 (splits,) -> mean and std
    over splits of exp(mean KL(p || mean p)) (Salimans et al. 2016, arXiv:1606.03498)"""
    mean = p / n[:, None]
    score = np.exp(p_log_p / n - (mean * np.log(np.maximum(mean, 1e-300))).sum(1))
    return np.array([score.mean(), score.std()])


def frechet(mu_a, cov_a, mu_b, cov_b):
    """Frechet distance of two Gaussians (Heusel et al. 2017, arXiv:1706.08500),

        |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A B)^(1/2),

    without a general matrix square root: where A = L L^T, the symmetric L^T B L has the eigenvalues of A B.
    L is Cholesky's, or where A is singular, as with fewer images than features, made of eigenvectors.
    """
    A, B = torch.from_numpy(cov_a).double(), torch.from_numpy(cov_b).double()
    A, B = (A + A.T) / 2, (B + B.T) / 2
    noise = torch.finfo(A.dtype).eps * len(A)                      # rounding's share of the largest
    L, failed = torch.linalg.cholesky_ex(A)
    if failed or L.diagonal().min() ** 2 <= noise * L.diagonal().max() ** 2:
        values, vectors = torch.linalg.eigh(A)
        rank = values > noise * values[-1]
        L = vectors[:, rank] * values[rank].sqrt()
    values = torch.linalg.eigvalsh(L.T @ B @ L)
    root = values[values > noise * values.amax()].sqrt().sum() if len(values) else 0
    return max(0.0, (A.trace() + B.trace() - 2 * root).item() + np.square(mu_a - mu_b).sum().item())


def covered(points, centres):
    """The share of points (N, d) on the manifold of centres (M, d): in the ball of one of them, which reaches
    to its NEIGHBOURS-th nearest other centre (Kynkaanniemi et al. 2019, arXiv:1904.06991)."""
    rows, k = max(1, 2 ** 25 // len(centres)), 1 + NEIGHBOURS      # rows of distances at once; 1: itself
    radii = torch.cat([torch.cdist(part, centres).kthvalue(k).values for part in centres.split(rows)])
    inside = torch.cat([(torch.cdist(part, centres) <= radii).any(1) for part in points.split(rows)])
    return inside.sum().item() / len(inside)


def compare(sample, ref, device):
    """Two dictionaries of statistics -> name -> number, or None where it can't be computed"""
    row = dict.fromkeys(('FID', 'sFID', 'IS', 'IS std', 'precision', 'recall'))
    both = sample.keys() & ref.keys()
    row['FID'] = frechet(sample['mu'], sample['sigma'], ref['mu'], ref['sigma'])
    if 'sigma_s' in both:
        row['sFID'] = frechet(sample['mu_s'], sample['sigma_s'], ref['mu_s'], ref['sigma_s'])
    if 'score' in sample:
        row['IS'], row['IS std'] = sample['score'].tolist()
    if 'features' in both:
        ours, theirs = [torch.from_numpy(s['features']).to(device) for s in (sample, ref)]
        row['precision'], row['recall'] = covered(ours, theirs), covered(theirs, ours)
    return row


def psnr(a, b):
    """(B, 3, H, W) on [0, 1] -> (B,) dB"""
    return -10 * (a - b).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(a, b):
    """(B, 3, H, W) on [0, 1] -> (B,) structural similarity (Wang et al. 2004), the variant in CONVENTIONS"""
    window = torch.exp(-torch.arange(-5.0, 6.0, device=a.device).square() / (2 * 1.5 ** 2))
    window = torch.outer(window, window) / window.sum() ** 2
    moments = F.pad(torch.cat([a, b, a * a, b * b, a * b], dim=1), (5, 5, 5, 5), mode='reflect')
    moments = F.conv2d(moments, window.expand(15, 1, 11, 11), groups=15)
    mu_a, mu_b, aa, bb, ab = moments.chunk(5, dim=1)               # (B, 3, H, W) each
    variances = (aa - mu_a ** 2).clamp(min=0) + (bb - mu_b ** 2).clamp(min=0)
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    luminance = (2 * mu_a * mu_b + c1) / (mu_a ** 2 + mu_b ** 2 + c1)
    return (luminance * (2 * (ab - mu_a * mu_b) + c2) / (variances + c2)).mean((1, 2, 3))


# ------------------------------------------------------------------------------------------- images and files

@contextlib.contextmanager
def reading(path):
    """Whatever is wrong with a file becomes one sentence."""
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f'{path} cannot be read, or is damaged: {e}')


def open_npz(path):
    """-> Data of arr_0 (N, H, W, 3) uint8, as ADM has it"""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with reading(path), zipfile.ZipFile(path) as z, open(path, 'rb') as f:
        info = z.getinfo('arr_0.npy')
        skip_header(f, info.header_offset)
        stored = info.compress_type == zipfile.ZIP_STORED
        version = np.lib.format.read_magic(f) if stored else None
        if version in headers:                                     # stays on disk: it may not fit in memory
            shape, fortran, dtype = headers[version](f)
            images = np.memmap(path, dtype, 'r', f.tell(), shape, 'F' if fortran else 'C')
        else:
            images = np.load(path)['arr_0']
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(f'arr_0 of {path} is {images.dtype} {images.shape}; it must be uint8 (N, H, W, 3)')
    return Arrays(class_names=[], labels=np.zeros(len(images)), images=images)


def subset(n, limit):
    """Positions of at most `limit` of n images, a fixed random choice in order; 0: all. (Data sets come
    sorted by class, or with classes in turn: the first ones, or evenly spaced ones, would not be fair.)"""
    return np.sort(np.random.RandomState(2020).permutation(n)[:limit or n])


def load_image(data, i):
    """-> number and PIL image of i, or of the next one that can be read. UserError: a hundred can't."""
    for j in range(i, i + 100):
        with contextlib.suppress(Unreadable):
            return j % len(data), data.load(j % len(data))
    raise UserError(f'{data.name(i)} and the hundred images after it are unreadable; repair or remove them')


def load_images(data, index, size, batch_size, place):
    """Yield this process's share of data[index]: positions in index (b,), images (b, H, W, 3) uint8, cropped
    to `size` pixels per side. None: as they are; UserError if not all are square and of one size.

    As in training, unreadable images are replaced by others, also in index, unless they are over 1%.
    """
    def read(k):
        wanted = index[k]
        index[k], image = load_image(data, wanted)
        if index[k] != wanted:
            broken.append(data.name(wanted))
        if size:
            return crop(image, size)
        if image.size != (side, side):
            raise UserError(f'{data.name(index[k])} is {image.width} x {image.height}, but samples must be '
                            f'square and of one size; {data.name(index[0])} is {side} wide')
        return np.array(image)

    side, broken = load_image(data, index[0])[1].width, []
    mine = range(place.rank, len(index), place.world)
    chunks = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    with ThreadPool(min(8, os.cpu_count())) as pool:               # a batch ahead; Pillow frees the GIL
        pending = pool.map_async(read, chunks[0])
        for chunk, following in zip(chunks, [*chunks[1:], []]):
            images = pending.get()
            refuse_damage(broken, len(broken), len(mine))
            pending = pool.map_async(read, following)
            yield np.array(chunk), np.stack(images)
    if broken:
        tqdm.write(f'unreadable, and replaced by the images after them: {", ".join(sorted(broken)[:10])}')


def unit(pixels):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 on [0, 1]"""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def load_statistics(path, facts, width):
    """Statistics in a file; {} if there are none, or none that count here. arr_0: None if images are beside.

    facts: what went into them; None: anything. width: of the pool features. UserError if it was another: a
    distance would mean nothing.
    """
    if not path.endswith('.npz'):
        return {}
    with reading(path), zipfile.ZipFile(path):
        with np.load(path) as z:
            have = {name: None if name == 'arr_0' else z[name] for name in z.files}
    if not {'mu', 'sigma'} <= have.keys():
        return {}
    shapes = have['mu'].shape, have['sigma'].shape
    if shapes != ((width,), (width, width)):
        raise UserError(f'{path} has mu {shapes[0]} and sigma {shapes[1]}, but there are {width} features')
    if 'facts' not in have:                                        # ADM's
        return have | {'n': None, 'size': None} if facts['inception'] == DIGEST else {}
    theirs = json.loads(str(have.pop('facts')))
    differs = [f'{name} {theirs.get(name)}, not {value}' for name, value in facts.items()
               if value is not None and theirs.get(name) != value]
    if differs:
        raise UserError(f'{path} holds statistics of {" and ".join(differs)}; make them anew from the images')
    return have | theirs


def save_statistics(path, statistics):
    """As load_statistics reads them: arrays, and what went into them as a text."""
    arrays = {name: value for name, value in statistics.items() if isinstance(value, np.ndarray)}
    facts = {name: value for name, value in statistics.items() if isinstance(value, (str, int))}
    with whole(path) as temporary, open(temporary, 'wb') as f:
        np.savez(f, facts=json.dumps(facts), **arrays)


# --------------------------------------------------------------------------------------------- the evaluation

class Evaluation:
    """What a run's steps share. All processes call the same methods; rows of the table are process 0's."""

    def __init__(self, options):
        self.o, dtype = options, options.dtype
        torch.backends.cudnn.allow_tf32 = False                    # Inception in full float32
        if options.ckpt:
            self.model, self.config, self.class_names = load_model(options.ckpt)
            check_sampling(self.config, any(options.gamma), options.guidance)
            dtype = dtype or self.config.dtype
        self.place, self.reference, self.said = find_place(options.device, dtype), None, set()
        if options.num_samples < self.place.world:
            raise UserError(f'--num_samples must be at least {self.place.world}, one per process')
        if options.ckpt:
            self.model.to(self.place.device)
            self.say(note_on_guidance(self.config, self.class_names, any(options.cfg), any(options.gamma),
                                      options.guidance))
        if not options.latents and not options.classify:
            self.net, self.weights = load_inception(options.features, options.weights)
            self.net.to(self.place.device, memory_format=torch.channels_last)
            self.prefix = '' if self.weights == DIGEST else 'random '      # of names that are not FID's
            grey = torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=self.place.device)
            with torch.no_grad():
                self.features = self.net(grey)[0].shape[1]         # 2048

    def say(self, note):
        """Print it, once."""
        if note and note not in self.said:
            self.place.print(note)
            self.said.add(note)

    @torch.no_grad()
    def rows(self):
        """-> rows of the table, name -> value"""
        o = self.o
        if o.samples:                                              # a bad --ref fails now, not in an hour
            load_statistics(o.ref, {'inception': self.weights}, self.features) or self.open(o.ref, o.ref_n)
            sample = self.statistics(o.samples, None, o.num_samples)
            self.reference = self.statistics(o.ref, sample['size'], o.ref_n)
            return [{'samples': o.samples} | self.compare(sample)]
        if o.latents:
            return self.latent_rows()
        if o.classify:
            return self.classify_rows()
        return self.reconstruct_rows() if o.reconstruct else self.sample_rows()

    def open(self, path, limit):
        """A folder, a zip, an npz, or a data set by name -> Data, positions of those of its images to use"""
        data = open_npz(path) if path.endswith('.npz') else open_data(path)
        for note in data.notes:
            self.say(f'{path}: {note}')
        index, least = subset(len(data), limit), max(SPLITS, self.place.world)
        if len(index) < least:
            raise UserError(f'{path} has {len(data)} images; the numbers need {least} or more')
        return data, index

    def progress(self, batches, total, text):
        """The same batches, with a bar that counts the images of all processes."""
        with tqdm(total=total, desc=text, unit='img', disable=True if self.place.rank else None) as bar:
            for index, images in batches:
                yield index, images
                bar.update(min(len(index) * self.place.world, total - bar.n))

    def measure(self, batches, n, keep, name):
        """(positions, images) of every process -> statistics of the n images"""
        statistics = Statistics(self.net, n, keep, self.place)
        for index, images in self.progress(batches, n, name):
            statistics.add(index, images)
        return statistics.summary(name)

    def statistics(self, path, size, limit):
        """Of the samples in `path` as they are (size None), or of a reference cropped to `size`: in the file,
        or made of its images. Where statistics come with images, as in ADM's files, the images are for
        precision and recall alone."""
        want = {'size': size, 'resize': 'ADM centre crop, TF1 bilinear to 299', 'inception': self.weights}
        given = load_statistics(path, want, self.features)
        if given and given['size'] is None:
            self.say(f'{path} does not say of which images its statistics are: size, number and preparation '
                     'are taken on trust')
        if given and 'arr_0' not in given:
            return given
        data, index = self.open(path, limit)
        if size is None and any(data.name(i).lower().endswith(('.jpg', '.jpeg')) for i in index):
            self.say(f'warning: {path} holds JPEG files; their artefacts change FID: save PNG')
        first = load_image(data, index[0])[1]
        if size and first.size != (size, size):
            self.say(f'{path} has images of {first.width} x {first.height} pixels, compared at {size}')
        batches = load_images(data, index, size, self.o.batch_size, self.place)
        made = self.measure(batches, len(index), subset(len(index), REFERENCES if size else 0), path)
        return made | want | {'size': size or first.width, 'n': len(index)} | given

    def compare(self, sample):
        """Numbers of a row of the table: of the sample's statistics and the reference's"""
        if self.place.rank:                                        # which has no features of the others
            return {}
        device = 'cpu' if self.place.device.type == 'mps' else self.place.device         # lacks kthvalue
        numbers, ref = compare(sample, self.reference, device), self.reference
        return {'n': sample['n'], 'ref n': ref['n']} | {self.prefix + name: v for name, v in numbers.items()}

    def sample(self, cfg, gamma):
        """Yield positions (b,), images (b, H, W, 3) uint8: this process's share, classes in turn."""
        o, start = self.o, 0
        labels = torch.arange(o.num_samples) % max(1, len(self.class_names))
        for images in sample_images(self.model, labels, o.seed, self.place, o.batch_size, cfg, gamma,
                                    guidance=o.guidance):
            mine = np.arange(self.place.rank, len(images), self.place.world)
            if len(mine):
                yield start + mine, images[mine]
            start += len(images)

    def sample_rows(self):
        """Sample with every pair of --gamma and --cfg, compare all with one reference."""
        self.reference = self.statistics(self.o.ref, self.config.image_size, self.o.ref_n)
        n, rows = self.o.num_samples, []
        for gamma, cfg in itertools.product(self.o.gamma, self.o.cfg):
            start = time.time()
            sample = self.measure(self.sample(cfg, gamma), n, np.arange(n), f'cfg {cfg:g} gamma {gamma:g}')
            speed = n / (time.time() - start)
            rows.append({'cfg': cfg, 'gamma': gamma} | self.compare(sample | {'n': n}) | {'images/s': speed})
        return rows

    def finish(self, rows):
        """After the numbers are told: what a full disk may refuse. Pictures, and --save_ref."""
        if self.o.latents:
            self.draw_latents(*self.drawn)
        elif self.reference and len(rows) > 1:
            curves = {}
            for row in rows:
                curve = curves.setdefault(f'gamma {row["gamma"]:g}', [])
                curve.append((row['cfg'], row[self.prefix + 'FID']))
            plot(self.path('fid_cfg.png'), curves, 'cfg', f'{self.prefix}FID-{self.o.num_samples}')
        if self.o.save_ref:
            save_statistics(self.o.save_ref, self.reference)

    def encode(self, data, index):
        """Yield this process's share of data[index]: positions (b,), pixels (b, H, W, 3) uint8, image
        (b, 3, H, W) in [-1, 1], y (b,), x (b, T, D), mu (b, T, D), sigma, noise (b, T, D). y: the data's
        classes where the model knows them by the same names, else "no class"."""
        shape, null = self.model.flow.shape, self.model.flow.null_class
        known = self.class_names == data.class_names
        if self.class_names and not known:
            self.say('these images have no classes, or others than the checkpoint: none is told to the model')
        batches = load_images(data, index, self.config.image_size, self.o.batch_size, self.place)
        for k, pixels in self.progress(batches, len(index), 'encoding'):
            image = (2 * unit(pixels) - 1).to(self.place.device)
            y = torch.from_numpy(data.labels[index[k]] if known else np.full(len(k), null)).to(image.device)
            seeds = [generator('cpu', RECON, self.o.seed, i) for i in index[k].tolist()]
            noise = torch.stack([torch.randn(shape, generator=g) for g in seeds]).to(image.device)
            with self.place.autocast():
                x, mu, sigma = self.model.latents(image, noise)
            yield k, pixels, image, y, x, mu, sigma, noise

    def decode(self, x):
        """(b, T, D) -> (b, 3, H, W)"""
        with self.place.autocast():
            return self.model.vae.decode(x)

    def means(self, batches, n):
        """Dictionaries name -> values (b, ...) of n images in all processes -> name -> float64 means (...)"""
        totals = {}
        for values in batches:
            for name, value in values.items():
                totals[name] = totals.get(name, 0) + value.cpu().double().sum(0)
        for total in totals.values():
            self.place.mean(total)
            total *= self.place.world / n
        return totals

    def reconstruct_rows(self):
        """Encode and decode --reconstruct's images, with the noise of training and without."""
        data, index = self.open(self.o.reconstruct, self.o.num_samples)
        ref = self.statistics(self.o.reconstruct, self.config.image_size, self.o.num_samples)
        lpips = None                                               # --features random: no weights at hand
        if self.o.features == 'inception':
            lpips = load_lpips(self.o.lpips_vgg, self.o.lpips_heads, '--features random')
            lpips.to(self.place.device)
        statistics = {x: Statistics(self.net, len(index), [], self.place) for x in ('mu + sigma eps', 'mu')}
        values, rows = {name: [] for name in statistics}, []
        exact = self.config.prior != 'sit'                         # which has no likelihood
        for k, pixels, image, y, x, mu, sigma, noise in self.encode(data, index):
            clean = self.model.noise.add(mu, sigma, torch.zeros_like(noise))
            with self.place.autocast():
                rate = self.model.rate(self.model.flow.nll(x, y), sigma) / math.log(2)
            for name, latents in zip(statistics, (x, clean)):
                recon = self.decode(latents)
                statistics[name].add(k, to_uint8(recon))
                a, b = unit(to_uint8(recon)), unit(pixels)
                value = {'PSNR': psnr(a, b)}
                if min(a.shape[2:]) > 5:                           # SSIM's window needs as many
                    value['SSIM'] = ssim(a, b)
                if lpips:
                    a, b = [(2 * t - 1).to(image.device) for t in (a, b)]
                    value['LPIPS'] = lpips(a, b).flatten()
                if latents is x and exact:
                    value['rate'] = rate
                if latents is x and exact and self.config.codec != 'pixels':         # which decode exactly
                    bits = distortion(image, recon, self.o.decoder_std)
                    value['ELBO'] = rate * x[0].numel() / image[0].numel() + bits
                values[name].append(value)
        for name, statistic in statistics.items():
            means = self.means(values[name], len(index))
            recons = statistic.summary('reconstructions')
            if self.place.rank == 0:                               # which alone has read a cached reference
                rfid = frechet(recons['mu'], recons['sigma'], ref['mu'], ref['sigma'])
                rows.append({'decoded': name, 'n': len(index), self.prefix + 'rFID': rfid}
                            | {key: mean.item() for key, mean in means.items()})
        return rows

    def classify_rows(self):
        """Tell the classes of --classify's images apart by p(x | class), in two ways. The gradient's scores
        have a part that is the same for all images; `centred` is without."""
        data, index = self.open(self.o.classify, self.o.num_samples)
        if not data.class_names or data.class_names != self.class_names:
            raise UserError(f'--classify {self.o.classify} must have the classes that the checkpoint was '
                            'trained with, by the same names')
        if self.config.prior == 'sit' or not self.config.layers:
            raise UserError(f'--classify needs a flow, and {self.o.ckpt} has none')
        seconds, scores, labels = dict.fromkeys(CLASSIFIERS, 0.0), {name: [] for name in CLASSIFIERS}, []
        for _, _, _, y, x, *_ in self.encode(data, index):
            labels.append(y.cpu())
            for name, classify in CLASSIFIERS.items():
                start = time.perf_counter()
                with self.place.autocast():
                    scores[name].append(classify(self.model.flow, x).cpu())          # waits for the device
                seconds[name] += time.perf_counter() - start
        n, y, rows = len(index), torch.cat(labels), []
        for name in CLASSIFIERS:
            score = torch.cat(scores[name])                        # (this process's share of n, classes)
            centred = score - self.means([{'mean': score}], n)['mean']
            right = torch.stack([score.argmax(1) == y, centred.argmax(1) == y], dim=1)
            accuracy, fair = self.means([{'right': right}], n)['right'].tolist()
            rows.append({'classifier': name, 'n': n, 'accuracy': accuracy, 'centred': fair,
                         'ms per image': 1000 * seconds[name] * self.place.world / n})
        return rows

    def latent_rows(self):
        """Statistics of mu, and process 0's pictures of the latent space. std of mu is over images, at each
        token and channel, then averaged: it falls when the encoder collapses. (Over all elements it is 1 by
        the LayerNorm.) Noise on mu is in units of an image's std."""
        data, index = self.open(self.o.reconstruct or self.config.data, self.o.num_samples)

        def batches():
            for _, pixels, _, _, _, mu, _, noise in self.encode(data, index):
                unit_noise = mu.std((1, 2), keepdim=True) * noise
                recons = [to_uint8(self.decode(mu + level * unit_noise)) for level in LEVELS]
                values = torch.stack([psnr(unit(recon), unit(pixels)) for recon in recons], dim=1)
                yield {'PSNR': values, 'mu': mu, 'square': mu.cpu().double() ** 2} | grid_statistics(mu)

        totals, n = self.means(batches(), len(index)), len(index)
        noisy, var = totals.pop('PSNR').tolist(), totals.pop('square') - totals.pop('mu') ** 2     # (T, D)
        std = (var.clamp(min=0) * n / (n - 1)).sqrt().mean(0)                                      # (D,)
        self.drawn = data, std, noisy
        return [{'n': n, 'std of mu': std.mean().item()} | {name: v.item() for name, v in totals.items()}
                | {f'PSNR at {level}': value for level, value in zip(LEVELS, noisy)}]

    def draw_latents(self, data, std, noisy):
        """Figure 3: PSNR against noise, the way between two images. Also the histogram of channels' std."""
        plot(self.path('latents_noise.png'), {f'sigma {self.config.sigma:g}': list(zip(LEVELS, noisy))},
             'noise on mu, in standard deviations of mu', 'PSNR of decode(mu + noise), dB')
        count, edges = np.histogram(std, bins=10)
        steps = zip(np.repeat(edges, 2), [0, *np.repeat(count, 2), 0])
        plot(self.path('latents_std.png'), {'': list(steps)}, 'std of mu', 'channels')
        some = np.random.default_rng(self.o.seed).permutation(len(data))[:8]     # of any class
        pixels = np.stack([crop(load_image(data, i)[1], self.config.image_size) for i in some])
        with self.place.autocast():
            ends, _ = self.model.vae.encode((2 * unit(pixels) - 1).to(self.place.device))          # (8, T, D)
        way = torch.linspace(0, 1, 9, device=ends.device).view(9, 1, 1)
        rows = []
        for i in range(4):
            between = to_uint8(self.decode(torch.lerp(ends[i], ends[i + 4], way)))
            rows += [pixels[i], *between, pixels[i + 4]]
        grid(np.stack(rows), 11).save(self.path('latents_interpolation.png'))

    def path(self, name):
        """Where a picture goes"""
        folder = self.o.out or os.path.dirname(self.o.ckpt) or '.'
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, name)


def by_gradient(flow, x):
    """Flowing Backwards' training-free classifier (Chen et al. 2025): x (B, T, D) -> scores (B, classes). In
    every block the class embedding is softmax(l) @ E, at l = 0 the mean of all; the answer is the logit that
    log p(x | l) would raise most. One forward, one backward, whatever the number of classes."""
    with torch.enable_grad():
        logits = x.new_zeros(len(x), flow.null_class, requires_grad=True)
        log_p = flow.log_prob(*flow(x, logits.softmax(1)))
        return torch.autograd.grad(log_p.sum(), logits)[0]


def by_likelihood(flow, x):
    """Bayes' rule with equal priors, one forward per class: x (B, T, D) -> scores (B, classes)"""
    return torch.stack([-flow.nll(x, torch.full((len(x),), c, device=x.device))
                        for c in range(flow.null_class)], dim=1)


CLASSIFIERS = {'gradient at softmax(0)': by_gradient, 'largest likelihood': by_likelihood}


def distortion(image, recon, std):
    """Two (b, 3, H, W) -> (b,) bits per pixel value: -log2 p(image | x), where p is Gaussian about recon. For
    each value, as levels are 1 / 127.5 apart,

        -log2 p = ((image - recon)^2 / (2 std^2) + log(std sqrt(2 pi))) / log 2 + log2(127.5).

    With the rate it makes the negative ELBO. That is large where the encoder collapses, the rate small.
    """
    error = (image - recon).square().mean((1, 2, 3)) / (2 * std ** 2)
    return (error + math.log(std * math.sqrt(2 * math.pi))) / math.log(2) + math.log2(127.5)


def grid_statistics(mu):
    """mu (b, T, D) -> name -> (b,): what SimFlow's Figure 4 measures on the grid of h x h tokens. The paper
    has no formulas. Ours, averaged over channels; g is mu - its mean over tokens, p = |FFT2 g|^2 / its sum:

    spectral entropy    -sum p log p / log(T - 1): 1 where all frequencies but 0 are alike, as in white noise
    high frequencies    sum of p over those beyond 1/4 cycle a token
    total variation     mean |g - its neighbour|, to the right and below
    autocorrelation     sum_t g_t g_(t+1) / sum_t g_t^2, tokens row by row, as the flow reads them

    A single token is no grid: {}.
    """
    side = math.isqrt(mu.shape[1])
    if side < 2:
        return {}
    g = (mu - mu.mean(1, keepdim=True)).float().cpu()
    lagged = (g[:, 1:] * g[:, :-1]).sum(1) / g.square().sum(1).clamp(min=1e-12)        # (b, D)
    g = g.unflatten(1, (side, side))                                                   # (b, h, h, D)
    power = torch.fft.fft2(g, dim=(1, 2)).abs().square()
    p = power / power.sum((1, 2), keepdim=True).clamp(min=1e-12)
    f = torch.fft.fftfreq(side)
    variation = g.diff(dim=1).abs().mean((1, 2, 3)) + g.diff(dim=2).abs().mean((1, 2, 3))
    return {'spectral entropy': torch.special.entr(p).sum((1, 2)).mean(1) / math.log(mu.shape[1] - 1),
            'high frequencies': p[:, torch.hypot(f[:, None], f) > 0.25].sum(1).mean(1),
            'total variation': variation / 2, 'autocorrelation': lagged.mean(1)}


# ----------------------------------------------------------------------------------------------------- output

COLOURS = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9'             # Okabe and Ito's


def plot(path, series, x_label, y_label):
    """Write a PNG of curves. series: name -> list of (x, y)."""
    points = np.array([point for curve in series.values() for point in curve], float)
    low, high = points.min(0), points.max(0)
    margin = np.where(high > low, 0.05 * (high - low), 1)
    low, high = low - margin, high + margin
    image = Image.new('RGB', (1440, 960), 'white')                 # halved below, for smooth lines
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(28)
    left, top, right, bottom = box = 160, 80, 1400, 840

    def at(x, y):
        x, y = (np.array([x, y]) - low) / (high - low)
        return left + x * (right - left), bottom - y * (bottom - top)

    for x in ticks(low[0], high[0]):
        draw.line([at(x, low[1]), at(x, high[1])], '#dddddd', 2)
        draw.text(at(x, low[1]), f'{x:.4g}', 'black', font, anchor='ma')
    for y in ticks(low[1], high[1]):
        draw.line([at(low[0], y), at(high[0], y)], '#dddddd', 2)
        draw.text((left - 16, at(low[0], y)[1]), f'{y:.4g}', 'black', font, anchor='rm')
    draw.rectangle(box, outline='black', width=2)
    draw.text(((left + right) / 2, 920), x_label, 'black', font, anchor='ms')
    draw.text((left, 64), y_label, 'black', font, anchor='ls')
    legend = right
    for (name, curve), colour in zip(series.items(), itertools.cycle(COLOURS)):
        curve = [at(*point) for point in curve]
        draw.line(curve, colour, 5, joint='curve')
        for x, y in curve:
            draw.ellipse([x - 8, y - 8, x + 8, y + 8], colour)
        draw.text((legend, 64), name, colour, font, anchor='rs')
        legend -= draw.textlength(name, font) + 40
    image.reduce(2).save(path)


def ticks(low, high):
    """A few round numbers between."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = power / next(m for m in (1, 2, 5, 10) if (high - low) / power * m >= 4)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def table(rows):
    """Rows of name -> value as text; - is what can't be computed. FID is called FID-n."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    titles = [f'{name}-{rows[0]["n"]}' if name.split()[-1] in ('FID', 'rFID') else name for name in names]
    cells = [['-' if v is None else f'{v:.5g}' if isinstance(v, float) else str(v)
              for v in map(row.get, names)] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(titles, *cells)]
    return '\n'.join('  '.join(cell.rjust(w) for cell, w in zip(line, widths)) for line in [titles, *cells])


def report(rows, options, seconds):
    """Print the table, what its numbers mean, and a line of JSON (null: can't be computed, or infinite)."""
    print(table(rows))
    words = {word.replace('rFID', 'FID') for row in rows for name in row for word in name.split()}
    used = {name: text for name, text in CONVENTIONS.items() if name in words}
    if 'FID' in words:
        used['weights'] = DIGEST if options.features == 'inception' else 'RANDOM: these numbers are NOT FID'
    for name, text in used.items():
        print(f'  {name}: {text}')
    few = min([row[name] for row in rows for name in ('n', 'ref n') if row.get(name)], default=2049)
    if 'FID' in words and few < 2049:
        print(f'  WARNING: {few} images are fewer than 2,049: singular covariance, FID far too large')
    rows = [{name: v if not isinstance(v, float) or math.isfinite(v) else None for name, v in row.items()}
            for row in rows]
    facts = {'options': vars(options), 'conventions': used, 'seconds': round(seconds, 1)}
    print(json.dumps({'rows': rows} | facts))


def main(argv):
    options, start = parse_options(Options, argv, 'Images to numbers.'), time.time()
    options.check()
    evaluation = Evaluation(options)
    rows = evaluation.rows()
    if evaluation.place.rank == 0:
        report(rows, options, time.time() - start)
        evaluation.finish(rows)


if __name__ == '__main__':
    cli(main)
