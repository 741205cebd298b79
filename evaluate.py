"""Numbers from images: FID and its relatives, reconstruction, likelihood, the latent space.

    python evaluate.py out/samples.npz --ref imagenet_val/             samples: folder, zip or npz
    python evaluate.py --ckpt out/ckpt.pt --ref imagenet_val/ --cfg 0 1 2 --gamma 0 0.25
    python evaluate.py --ckpt out/ckpt.pt --reconstruct imagenet_val/  rFID, PSNR, SSIM, LPIPS, ELBO
    python evaluate.py --ckpt out/ckpt.pt --latents 1                  SimFlow's Figures 3 and 4
    python evaluate.py --ckpt out/ckpt.pt --classify imagenet_val/     the flow as a classifier
    torchrun --nproc_per_node=8 evaluate.py ...                        the same numbers, faster

Prints a table, and the same as JSON in the last line. Inception's weights are those of
pytorch-fid's release (91 MB, downloaded once); --features random does without, to try things out,
but its numbers are not FID.
"""
from collections import OrderedDict, namedtuple
import contextlib
from dataclasses import dataclass
import json
import math
from multiprocessing.pool import ThreadPool
import os
import time
import zipfile

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F
from tqdm import tqdm

from data import (Unreadable, UserError, check_numbers, cli, crop, fetch, hexdigest, open_data,
                  option, parse_options, refuse_damage, refuse_damaged, require, whole)
from model import (RECON, TOL, check_sampling, find_process, from_uint8, generator, grid,
                   load_model, note_on_guidance, plot, progress, psnr, sample_images,
                   sampling_dtype, to_uint8, tolerance, with_weights_in)
from vae import load_lpips

SPLITS = 10                                # of the Inception score, and thus the fewest images


@dataclass
class Options:
    """The command line. An argument without an option name is --samples."""
    samples: str = option('', 'images to measure: a folder, a zip, an npz (arr_0), or statistics '
                          'in an npz', bare=True)
    ref: str = option('', 'images to compare with: the same, or a data set by name')
    save_ref: str = option('', 'npz for the statistics of --ref, for later runs to name as --ref')
    ckpt: str = option('', 'checkpoint of train.py: to sample from, or to look into')
    reconstruct: str = option('', 'images to encode and decode')
    latents: bool = option(False, 'statistics of the latents of --reconstruct or the training data')
    classify: str = option('', 'images of the same classes to tell apart by their likelihood')
    num_samples: int = option(50_000, 'images to sample; of given images, how many to use at most',
                              also=['--n'])
    ref_n: int = option(0, 'reference images to use at most; 0: all')
    cfg: list[float] = option((0.0,), 'guidance weights to sample with, one or more; 0 is off')
    gamma: list[float] = option((0.0,), 'sizes of the score step, one or more; 0 is off')
    guidance: str = option('', "rule of --cfg, a row of GUIDANCE in flow.py; default: checkpoint's")
    decode: str = option('sequential', 'how the flow is inverted: sequential, or jacobi')
    tol: float = option(TOL, "jacobi's tolerance, relative change of a token")
    seed: int = option(0, 'random seed')
    features: str = option('inception', 'inception, or random: needs no weights, is not FID')
    weights: str = option('', "Inception's weights; default: downloaded once to torch.hub")
    lpips_vgg: str = option('', "torchvision's VGG16 weights; default: downloaded once")
    lpips_heads: str = option('', "LPIPS v0.1's linear heads; default: downloaded once")
    decoder_std: float = option(0.1, "std of the ELBO's Gaussian decoder, pixels in [-1, 1]")
    batch_size: int = option(50, 'images at once, per process')
    out: str = option('', 'directory for pictures; default: where --ckpt is')
    device: str = option('', 'cuda, mps, cpu; default: the best there is')
    dtype: str = option('', 'float32 or bfloat16; default: float32 if --dtype was that in '
                       'training, else bfloat16 if the GPU has it')

    def check(self):
        """Raise UserError for what can't be done."""
        check_numbers(self)
        tolerance(self.decode, self.tol)
        encodes = bool(self.reconstruct or self.latents or self.classify)
        guided = bool(any(self.cfg) or any(self.gamma) or self.guidance
                      or self.decode == 'jacobi')
        tasks = bool(self.reconstruct or self.latents) + bool(self.classify) + guided
        require(bool(self.samples) != bool(self.ckpt),
                'name either samples to measure, or a --ckpt')
        require(self.ckpt or not tasks, '--reconstruct, --latents, --classify, --cfg, --gamma, '
                '--guidance and --decode jacobi need a --ckpt')
        require(tasks < 2, '--reconstruct or --latents, --classify, and sampling with --cfg, '
                '--gamma, --guidance or --decode are three runs: ask for one at a time')
        require(self.ref or encodes, '--ref is missing, the images to compare with: a folder, a '
                'zip, an npz or a data set')
        require(self.features in FEATURES,
                f'--features {self.features} must be {" or ".join(FEATURES)}')
        require(self.num_samples >= SPLITS, f'--num_samples {self.num_samples} is too few: the '
                f'numbers need {SPLITS} images or more')
        require(not self.save_ref or self.save_ref.endswith('.npz') and self.ref and not encodes,
                f'--save_ref {self.save_ref} must end in .npz, and needs a --ref')
        inputs = [os.path.realpath(name) for name in (self.samples, self.ref)]
        require(not self.save_ref or os.path.realpath(self.save_ref) not in inputs,
                f'--save_ref {self.save_ref} would replace what is measured; name another file')
        require(not self.ref or not encodes, '--ref is what samples are compared with; '
                '--reconstruct, --latents and --classify name their own images')
        require(self.ref_n == 0 or self.ref_n >= SPLITS,
                f'--ref_n {self.ref_n} must be 0, or {SPLITS} or more')
        require(self.batch_size > 0, f'--batch_size must be positive, not {self.batch_size}')
        require(self.decoder_std > 0, f'--decoder_std must be positive, not {self.decoder_std}')

    def path(self, picture):
        """Where a picture goes"""
        return os.path.join(self.out or os.path.dirname(self.ckpt) or '.', picture)


# -------------------------------------------------------------------------------------- Inception

AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
MAXIMUM = nn.MaxPool2d(3, stride=1, padding=1)
HALVE = nn.MaxPool2d(3, stride=2)


def conv(cin, cout, kernel, stride=1, padding=0):
    """Convolution, BatchNorm, ReLU. The momentum is for random_inception."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(cin, cout, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(cout, eps=1e-3, momentum=1.0),
        relu=nn.ReLU(inplace=True)))


class Mixed(nn.Module):
    """Branches side by side, their outputs concatenated: (B, cin, H, W) -> (B, c, h, w).

    A branch is a chain of convolutions (name, channels, kernel), padded to keep the size, or (name,
    channels, kernel, stride), not padded. The last branch reads pool(h) instead of h.
    """

    def __init__(self, cin, pool, *branches):
        super().__init__()
        self.pool, self.branches = pool, branches
        for branch in branches:
            c = cin
            for name, channels, kernel, *stride in branch:
                padding = 'valid' if stride else 'same'
                self.add_module(name, conv(c, channels, kernel, *stride, padding=padding))
                c = channels

    def forward(self, h):
        outs, done = [], {}
        for branch in self.branches:
            out = self.pool(h) if branch is self.branches[-1] else h
            for name, *_ in branch:
                if name not in done:                               # branches may begin alike
                    done[name] = self.get_submodule(name)(out)
                out = done[name]
            outs.append(out)
        return torch.cat(outs, dim=1)


def mixed_35(cin, pooled):
    """A block on the grid of 35 x 35"""
    return Mixed(
        cin, AVERAGE,
        [('branch1x1', 64, 1)],
        [('branch5x5_1', 48, 1), ('branch5x5_2', 64, 5)],
        [('branch3x3dbl_1', 64, 1), ('branch3x3dbl_2', 96, 3), ('branch3x3dbl_3', 96, 3)],
        [('branch_pool', pooled, 1)])


def mixed_17(c):
    """A block on the grid of 17 x 17: kernels of 7 x 7, as rows and columns in turn"""
    row, column = (1, 7), (7, 1)
    return Mixed(
        768, AVERAGE,
        [('branch1x1', 192, 1)],
        [('branch7x7_1', c, 1), ('branch7x7_2', c, row), ('branch7x7_3', 192, column)],
        [('branch7x7dbl_1', c, 1), ('branch7x7dbl_2', c, column), ('branch7x7dbl_3', c, row),
         ('branch7x7dbl_4', c, column), ('branch7x7dbl_5', 192, row)],
        [('branch_pool', 192, 1)])


def mixed_8(cin, pool):
    """A block on the grid of 8 x 8: kernels of 3 x 3, as a row and a column side by side"""
    row, column = (1, 3), (3, 1)
    single = ('branch3x3_1', 384, 1)
    double = ('branch3x3dbl_1', 448, 1), ('branch3x3dbl_2', 384, 3)
    return Mixed(
        cin, pool,
        [('branch1x1', 320, 1)],
        [single, ('branch3x3_2a', 384, row)],
        [single, ('branch3x3_2b', 384, column)],
        [*double, ('branch3x3dbl_3a', 384, row)],
        [*double, ('branch3x3dbl_3b', 384, column)],
        [('branch_pool', 192, 1)])


class Inception(nn.ModuleDict):
    """InceptionV3 (Szegedy et al. 2015, arXiv:1512.00567) in the graph of 2015-12-05, which defines
    FID: 1008 logits, averages that leave the padding out, a maximum in Mixed_7c. Names are the
    released weights'."""

    def __init__(self):
        super().__init__({
            'Conv2d_1a_3x3': conv(3, 32, 3, stride=2),
            'Conv2d_2a_3x3': conv(32, 32, 3),
            'Conv2d_2b_3x3': conv(32, 64, 3, padding=1),
            'pool_1': HALVE,
            'Conv2d_3b_1x1': conv(64, 80, 1),
            'Conv2d_4a_3x3': conv(80, 192, 3),
            'pool_2': HALVE,
            'Mixed_5b': mixed_35(192, pooled=32),
            'Mixed_5c': mixed_35(256, pooled=64),
            'Mixed_5d': mixed_35(288, pooled=64),
            'Mixed_6a': Mixed(
                288, HALVE,
                [('branch3x3', 384, 3, 2)],
                [('branch3x3dbl_1', 64, 1), ('branch3x3dbl_2', 96, 3),
                 ('branch3x3dbl_3', 96, 3, 2)],
                []),
            'Mixed_6b': mixed_17(128),
            'Mixed_6c': mixed_17(160),
            'Mixed_6d': mixed_17(160),
            'Mixed_6e': mixed_17(192),
            'Mixed_7a': Mixed(
                768, HALVE,
                [('branch3x3_1', 192, 1), ('branch3x3_2', 320, 3, 2)],
                [('branch7x7x3_1', 192, 1), ('branch7x7x3_2', 192, (1, 7)),
                 ('branch7x7x3_3', 192, (7, 1)), ('branch7x7x3_4', 192, 3, 2)],
                []),
            'Mixed_7b': mixed_8(1280, AVERAGE),
            'Mixed_7c': mixed_8(2048, MAXIMUM),
            'fc': nn.Linear(2048, 1008)})

    def forward(self, images):
        """(B, 3, H, W) uint8 -> pool features (B, 2048), logits without bias (B, 1008), spatial
        features (B, 2023)"""
        *layers, (_, fc) = self.items()
        h = (resize(images.to(fc.weight.dtype), 299) - 128) / 128
        for name, layer in layers:
            h = layer(h)
            if name == 'Mixed_6d':
                spatial = h[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7), for sFID
        pool = h.mean((2, 3))                                      # (B, 2048)
        return pool, pool @ fc.weight.T, spatial


def resize(x, size):
    """(B, C, H, W) -> (B, C, size, size) by TensorFlow 1's bilinear rule: pixel i is at
    i * H / size; no half-pixel centres, no filter against aliasing. Along rows first, which decides
    the last bit."""
    for dim in (3, 2):
        n = x.shape[dim]
        position = torch.arange(size, dtype=torch.float32, device=x.device)
        position = position * torch.tensor(n / size)
        low = position.long()
        high = (low + 1).clamp(max=n - 1)
        weight = position - low                                    # (size,)
        if dim == 2:
            weight = weight[:, None]
        a, b = x.index_select(dim, low), x.index_select(dim, high)
        x = a + (b - a) * weight
    return x


def random_inception():
    """Inception with random weights: He's initialisation, random BatchNorm scales, running
    statistics of four images of noise at all scales. Drawn by numpy and in float64, it is the same
    network everywhere. Its features tell images apart, but not as FID's do."""
    rng, net = np.random.RandomState(0), Inception().double()
    for name, value in sorted(net.state_dict().items()):
        if value.dim() > 1:
            scale = math.sqrt(2 / value[0].numel())
            value.copy_(torch.from_numpy(rng.standard_normal(value.shape)) * scale)
        elif name.endswith(('bn.weight', 'bias')):
            centre = 1 if name.endswith('weight') else 0
            value.copy_(torch.from_numpy(rng.uniform(-0.5, 0.5, value.shape)) + centre)
    noise = 0
    for size in (2, 4, 8, 16, 32):
        octave = torch.from_numpy(rng.standard_normal((4, 3, size, size)))
        noise = noise + resize(octave, 32)
    images = (128 + 40 * noise).clamp(0, 255).byte()
    with torch.no_grad():
        net.train()(images)
    return net.float().eval().requires_grad_(False)


# ------------------------------------------------------------------------------- feature networks

# A network whose features are compared: images (B, 3, H, W) uint8 -> features (B, width), logits
# (B, K) or None, spatial features (B, S) or None; without the last two, no Inception score or sFID.
# weights: what files of statistics call the network. prefix: of the names of its numbers; '' for
# Inception, whose are FID and its relatives.
Features = namedtuple('Features', 'network width weights prefix')
INCEPTION_URL = ('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
                 'pt_inception-2015-12-05-6726825d.pth')
INCEPTION_DIGEST = 'sha256:6726825d'


def load_inception(options):
    """-> Features with the released weights. UserError where they can't be had."""
    path = options.weights
    if path:                                                       # the user's own file
        with refuse_damaged(path):
            digest = 'sha256:' + hexdigest(path, 'sha256')
        if not digest.startswith(INCEPTION_DIGEST):
            raise UserError(f'{path} has {digest[:15]}, and is not the file {INCEPTION_URL} '
                            f'({INCEPTION_DIGEST})')
    else:
        path = fetch(INCEPTION_URL, INCEPTION_DIGEST, 'put it there by hand, name a copy: '
                     '--weights, or use --features random')
    net = Inception()
    # A plain dict may lack num_batches_tracked, as this file does: it has no version metadata.
    net.load_state_dict(dict(torch.load(path, map_location='cpu', weights_only=True)))
    return Features(net.eval().requires_grad_(False), 2048, INCEPTION_DIGEST, prefix='')


def load_random(options):
    return Features(random_inception(), 2048, 'random', prefix='random ')


# Another network to compare features of is another row.
FEATURES = {'inception': load_inception, 'random': load_random}


def load_features(options, process):
    """-> Features, on the process's device"""
    features = process.rank_0_first(FEATURES[options.features], options)
    features.network.to(process.device, memory_format=torch.channels_last)
    return features


# ------------------------------------------------------------------------------------- statistics
#
# What remains of a set of images is a dictionary of arrays, as npz files hold them. ADM's names:
#     mu (2048,), sigma (2048, 2048)        mean and covariance of the pool features, float64
#     mu_s (2023,), sigma_s (2023, 2023)    of the spatial features
# and ours: features (up to n, 2048) float32, the pool features for precision and recall; score
# (2,), the Inception score and its std; n; size, pixels per side; resize and inception, how the
# features were made. The table has - for what a file lacks.

class Statistics:
    """Sums over the n images of all processes, in float64, and the features of those at the
    positions `kept`; but for these, memory does not grow with n."""

    def __init__(self, network, n, kept, process):
        self.network, self.process = network, process
        self.kept = np.isin(np.arange(n), kept)
        self.features, self.sums = [], {}                          # what `add` adds to
        # The Inception score's splits are random, as images may come sorted by class.
        self.sizes = np.diff(np.arange(SPLITS + 1) * n // SPLITS)
        self.split = np.empty(n, np.int64)                         # of each image
        order = np.random.RandomState(2020).permutation(n)
        self.split[order] = np.repeat(np.arange(SPLITS), self.sizes)

    @torch.no_grad()
    def add(self, positions, images):
        """positions (b,) among the n, images (b, H, W, 3) uint8"""
        images = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.process.device)
        # A Mac's GPU has no float64.
        device = 'cpu' if images.device.type == 'mps' else images.device
        # Copies to a GPU wait for all earlier work. So these come first, and nothing waits after
        # them: the GPU works on this batch while the next one is read.
        kept = torch.from_numpy(np.flatnonzero(self.kept[positions])).to(device)
        split = F.one_hot(torch.from_numpy(self.split[positions]), SPLITS).double().to(device)
        outs = [out if out is None else out.to(device) for out in self.network(images)]
        pool, logits, spatial = outs
        self.features.append(pool.index_select(0, kept))
        # With a 1 appended to f, the sum of f f^T also holds the sum of f, and n.
        pool = F.pad(pool.double(), (0, 1), value=1.0)
        self.add_product('pool', pool, pool)
        if spatial is not None:
            spatial = F.pad(spatial.double(), (0, 1), value=1.0)
            self.add_product('spatial', spatial, spatial)
        if logits is not None:
            log_p = logits.double().log_softmax(1)
            p_log_p = (log_p.exp() * log_p).sum(1, keepdim=True)   # (b, 1)
            self.add_product('p', split, log_p.exp())
            self.add_product('p log p', split, p_log_p)

    def add_product(self, name, a, b):
        """a (b, m), b (b, n): add a^T b to a sum (m, n), in place: temporaries fragment memory"""
        if name not in self.sums:
            self.sums[name] = a.new_zeros(a.shape[1], b.shape[1])
        self.sums[name].addmm_(a.T, b)

    def summary(self, name):
        """Add up the processes -> the dictionary above, without n, size and what follows; features
        of all only on process 0. UserError if a feature of `name` is not finite."""
        process = self.process
        for total in self.sums.values():
            process.sum(total)
        features = torch.cat(process.gather(torch.cat(self.features).cpu()))
        if not all(total.isfinite().all() for total in self.sums.values()):
            raise UserError(f'the features of {name} are not finite; the network, or an image, is '
                            'damaged')
        sums = {key: total.cpu().numpy() for key, total in self.sums.items()}
        result = {'features': features.numpy()}
        result['mu'], result['sigma'] = gaussian(sums['pool'])
        if 'spatial' in sums:
            result['mu_s'], result['sigma_s'] = gaussian(sums['spatial'])
        if 'p' in sums:
            result['score'] = inception_score(sums['p'], sums['p log p'][:, 0], self.sizes)
        return result


def gaussian(total):
    """Sum over images of (f, 1) (f, 1)^T -> mean (d,), unbiased covariance (d, d)"""
    n, second = total[-1, -1], total[:-1, :-1]
    mean = total[-1, :-1] / n
    return mean, (second - n * np.outer(mean, mean)) / (n - 1)


def inception_score(p, p_log_p, n):
    """Sums over each split's images of p (splits, classes), p log p (splits,), 1 (splits,) -> mean
    and std over splits of exp(mean KL(p || mean p)) (Salimans et al. 2016, arXiv:1606.03498)"""
    mean = p / n[:, None]
    cross = (mean * np.log(np.maximum(mean, 1e-300))).sum(1)
    score = np.exp(p_log_p / n - cross)
    return np.array([score.mean(), score.std()])


# ---------------------------------------------------------------------------------------- numbers

def frechet(mu_a, cov_a, mu_b, cov_b):
    """Frechet distance of two Gaussians (Heusel et al. 2017, arXiv:1706.08500),

        |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A B)^(1/2),        A, B: the covariances

    without a general matrix square root: where A = L L^T, the symmetric L^T B L has the eigenvalues
    of A B. L is made of A's eigenvectors, as A may be singular.
    """
    a, b = torch.from_numpy(cov_a).double(), torch.from_numpy(cov_b).double()
    noise = torch.finfo(a.dtype).eps * len(a)                      # rounding's share of the largest
    values, vectors = torch.linalg.eigh(a)
    positive = values > noise * values[-1]
    root = vectors[:, positive] * values[positive].sqrt()
    values = torch.linalg.eigvalsh(root.T @ b @ root)
    trace = values[values > noise * values[-1:]].sqrt().sum()      # of (A B)^(1/2)
    spread = (a.trace() + b.trace() - 2 * trace).item()
    return max(0.0, spread + np.square(mu_a - mu_b).sum().item())


# Precision and recall: neighbours, and the most reference images that are used.
NEIGHBOURS, MOST_REFERENCES = 3, 10_000


def share_on_manifold(points, centres):
    """The share of points (N, d) on the manifold of centres (M, d): in the ball of one of them,
    which reaches to its NEIGHBOURS-th nearest other centre (Kynkaanniemi et al. 2019,
    arXiv:1904.06991)."""
    rows = max(1, 2 ** 25 // len(centres))                         # of distances at once
    radii = []
    for part in centres.split(rows):                               # each is its own nearest
        radii.append(torch.cdist(part, centres).kthvalue(1 + NEIGHBOURS).values)
    radii, inside = torch.cat(radii), 0                            # (M,)
    for part in points.split(rows):
        inside += (torch.cdist(part, centres) <= radii).any(1).sum().item()
    return inside / len(points)


def compare(sample, ref, features, process):
    """Two dictionaries of statistics -> name -> number, or None where it can't be computed; {} but
    on process 0, which has the features of all"""
    if process.rank:
        return {}
    numbers = dict.fromkeys(('FID', 'sFID', 'IS', 'IS std', 'precision', 'recall'))
    numbers['FID'] = frechet(sample['mu'], sample['sigma'], ref['mu'], ref['sigma'])
    if 'sigma_s' in sample and 'sigma_s' in ref:
        numbers['sFID'] = frechet(sample['mu_s'], sample['sigma_s'], ref['mu_s'], ref['sigma_s'])
    if 'score' in sample:
        numbers['IS'], numbers['IS std'] = sample['score'].tolist()
    if 'features' in sample and 'features' in ref:
        device = 'cpu' if process.device.type == 'mps' else process.device     # lacks kthvalue
        ours = torch.from_numpy(sample['features']).to(device)
        theirs = torch.from_numpy(ref['features']).to(device)
        numbers['precision'] = share_on_manifold(ours, theirs)
        numbers['recall'] = share_on_manifold(theirs, ours)
    row = {'n': sample['n'], 'ref n': ref['n']}
    for name, number in numbers.items():
        row[features.prefix + name] = number
    return row


def zero_to_one(pixels):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 on [0, 1]"""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def ssim(a, b):
    """(B, 3, H, W) on [0, 1] -> (B,) structural similarity (Wang et al. 2004), the variant in
    CONVENTIONS"""
    position = torch.arange(-5.0, 6.0, device=a.device)
    window = torch.exp(-position.square() / (2 * 1.5 ** 2))
    window = torch.outer(window, window) / window.sum() ** 2       # (11, 11)
    moments = torch.cat([a, b, a * a, b * b, a * b], dim=1)        # (B, 15, H, W)
    moments = F.pad(moments, (5, 5, 5, 5), mode='reflect')
    moments = F.conv2d(moments, window.expand(15, 1, 11, 11), groups=15)
    mu_a, mu_b, aa, bb, ab = moments.chunk(5, dim=1)               # (B, 3, H, W) each
    variances = (aa - mu_a ** 2).clamp(min=0) + (bb - mu_b ** 2).clamp(min=0)
    covariance = ab - mu_a * mu_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    luminance = (2 * mu_a * mu_b + c1) / (mu_a ** 2 + mu_b ** 2 + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean((1, 2, 3))


def distortion(image, recon, std):
    """Two (b, 3, H, W) -> (b,) bits per pixel value: -log2 p(image | x), where p is Gaussian about
    recon. For each value, as levels are 1 / 127.5 apart,

        -log2 p = ((image - recon)^2 / (2 std^2) + log(std sqrt(2 pi))) / log 2 + log2(127.5).

    With the rate it makes the negative ELBO. Where the encoder collapses, this part is large and
    the rate small.
    """
    error = (image - recon).square().mean((1, 2, 3)) / (2 * std ** 2)
    nats = error + math.log(std * math.sqrt(2 * math.pi))
    return nats / math.log(2) + math.log2(127.5)


def grid_statistics(mu):
    """mu (b, T, D) -> name -> (b,): what SimFlow's Figure 4 measures on the grid of h x h tokens.
    The paper has no formulas. Ours, averaged over channels; g is mu less its mean over tokens,
    p = |FFT2 g|^2 / its sum:

    spectral entropy    -sum p log p / log(T - 1): 1 where all frequencies but 0 are alike, as in
                        white noise
    high frequencies    sum of p over those beyond 1/4 cycle per token
    total variation     mean |g - its neighbour|, to the right and below
    autocorrelation     sum_t g_t g_(t+1) / sum_t g_t^2, tokens row by row, as the flow reads them

    A single token is no grid: {}.
    """
    tokens = mu.shape[1]
    side = math.isqrt(tokens)
    if side < 2:
        return {}
    g = (mu - mu.mean(1, keepdim=True)).float().cpu()
    lagged = (g[:, 1:] * g[:, :-1]).sum(1)                                         # (b, D)
    lagged = lagged / g.square().sum(1).clamp(min=1e-12)
    g = g.unflatten(1, (side, side))                                               # (b, h, h, D)
    power = torch.fft.fft2(g, dim=(1, 2)).abs().square()
    p = power / power.sum((1, 2), keepdim=True).clamp(min=1e-12)
    entropy = torch.special.entr(p).sum((1, 2)).mean(1)
    frequency = torch.fft.fftfreq(side)
    high = torch.hypot(frequency[:, None], frequency) > 0.25                       # (h, h)
    down = g.diff(dim=1).abs().mean((1, 2, 3))
    across = g.diff(dim=2).abs().mean((1, 2, 3))
    return {'spectral entropy': entropy / math.log(tokens - 1),
            'high frequencies': p[:, high].sum(1).mean(1),
            'total variation': (down + across) / 2,
            'autocorrelation': lagged.mean(1)}


class Means:
    """Means over the n images of all processes, in float64"""

    def __init__(self, n, process):
        self.n, self.process, self.sums = n, process, {}

    def add(self, values):
        """name -> (b, ...)"""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.cpu().double().sum(0)

    def result(self):
        """-> name -> (...). To be called once, by all processes"""
        for total in self.sums.values():
            self.process.sum(total)
            total /= self.n
        return self.sums


# ------------------------------------------------------------------------------- images and files
#
# What is at a path: images of `data` at the places `index`, to be cropped to `size` pixels per side
# (None: as they are), statistics `given`, or both, as in ADM's files.
Source = namedtuple('Source', 'path data index size given')


def open_source(path, limit, size, features, process):
    """A folder, a zip, an npz, or a data set by name -> Source, of at most `limit` images, 0: all.
    UserError if it is none, or holds statistics of another size or other features."""
    arrays, has_images = {}, True
    if path.endswith('.npz'):
        with refuse_damaged(path), zipfile.ZipFile(path), np.load(path) as npz:
            arrays = {name: npz[name] for name in npz.files if name not in ('arr_0', 'arr_1')}
            has_images = 'arr_0' in npz.files or not arrays
    given = given_statistics(path, arrays, size, features)
    if given and given['size'] is None:
        process.print(f'{path} does not say of which images its statistics are: size, number and '
                      'preparation are taken on trust')
    if given and not has_images:
        return Source(path, None, None, size, given)
    data, index = open_images(path, limit, process)
    return Source(path, data, index, size, given)


def open_images(path, limit, process):
    """-> Data, which of its images to use, at most `limit`; 0: all"""
    data = open_data(path)
    for note in data.notes:
        process.print(f'{path}: {note}')
    index, least = subset(len(data), limit), max(SPLITS, process.world)
    require(len(index) >= least,
            f'{len(index)} images of {path} are too few; the numbers need {least} or more')
    process.print(f'{path}: {len(index):,} of {len(data):,} images')
    return data, index


def subset(n, limit):
    """Positions of at most `limit` of n images, a fixed random choice in order; 0: all. (Data sets
    come sorted by class, or with classes in turn: the first ones, or evenly spaced ones, would not
    be fair.)"""
    return np.sort(np.random.RandomState(2020).permutation(n)[:limit or n])


def given_statistics(path, arrays, size, features):
    """Statistics of images of `size` pixels per side (None: of any) among the arrays of an npz; {}
    if there are none, or none for these features. UserError if size, preparation or network differ:
    a distance would mean nothing."""
    if 'mu' not in arrays or 'sigma' not in arrays:
        return {}
    given = dict(arrays)
    mu, sigma, width = given['mu'].shape, given['sigma'].shape, features.width
    if mu != (width,) or sigma != (width, width):
        raise UserError(f'{path} has mu {mu} and sigma {sigma}, but there are {width} features')
    if 'facts' not in given:                                       # ADM's, of Inception's features
        return given | {'n': None, 'size': None} if features.weights == INCEPTION_DIGEST else {}
    theirs, differs = json.loads(str(given.pop('facts'))), []
    for name, value in facts_of(size, features).items():
        if value is not None and theirs.get(name) != value:
            differs.append(f'{name} {theirs.get(name)}, not {value}')
    require(not differs, f'{path} holds statistics of {" and ".join(differs)}; make them anew from '
            'the images')
    return given | theirs


def facts_of(size, features):
    """What a file says of its statistics, so that they are not compared with others"""
    return {'size': size, 'resize': 'ADM centre crop, TF1 bilinear to 299',
            'inception': features.weights}


def save_statistics(path, statistics):
    """As given_statistics reads them: arrays, and the rest as a text."""
    arrays, facts = {}, {}
    for name, value in statistics.items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif value is not None:
            facts[name] = value
    if 'size' in facts:                                            # else ADM's, which have none
        arrays['facts'] = np.array(json.dumps(facts))
    with whole(path) as temporary, open(temporary, 'wb') as f:
        np.savez(f, **arrays)


def load_image(data, i):
    """-> number and PIL image of i, or of the next one that can be read. UserError: a hundred
    can't."""
    for j in range(i, i + 100):
        with contextlib.suppress(Unreadable):
            return j % len(data), data.load(j % len(data))
    raise UserError(f'{data.name(i)} and the 99 images after it are unreadable; repair or remove '
                    'them')


def load_pixels(data, i, size):
    """-> number and pixels (H, W, 3) uint8 of image i, or of one after it. size: as in Source"""
    i, image = load_image(data, i)
    return i, crop(image, size) if size else np.array(image)


def load_batches(data, index, size, options, process):
    """Yield this process's share of data[index]: positions in index (b,), images (b, H, W, 3)
    uint8, cropped to `size` pixels per side. None: as they are; UserError if not all are square and
    of one size. As in training, unreadable images are replaced by others, also in index, unless
    they are over 1%."""
    first = data.name(index[0])
    side, broken = size or load_image(data, index[0])[1].width, []
    mine = np.arange(process.rank, len(index), process.world)
    with ThreadPool(min(8, os.cpu_count())) as pool:               # Pillow frees the GIL
        for start in range(0, len(mine), options.batch_size):
            positions = mine[start:start + options.batch_size]
            wanted = index[positions]
            loaded = pool.starmap(load_pixels, [(data, i, size) for i in wanted])
            index[positions] = [i for i, _ in loaded]
            broken += [data.name(i) for i in wanted[wanted != index[positions]]]
            refuse_damage(broken, len(broken), len(index))
            images = [pixels for _, pixels in loaded]
            refuse_other_sizes(data, index[positions], images, side, first)
            yield positions, np.stack(images)
    count = torch.tensor(len(broken))
    process.sum(count)
    refuse_damage(broken, count.item(), len(index))
    if broken:
        names = ', '.join(sorted(broken)[:10])
        tqdm.write(f'unreadable, and replaced by the images after them: {names}')


def refuse_other_sizes(data, numbers, images, side, first):
    for i, image in zip(numbers, images):
        height, width, _ = image.shape
        if height != side or width != side:
            raise UserError(f'{data.name(i)} is {width} x {height}, but images must be square and '
                            f'of one size; {first} is {side} wide')


def measure(batches, n, kept, name, features, process):
    """Batches (positions, images) of every process -> statistics of the n images"""
    statistics = Statistics(features.network, n, kept, process)
    for positions, images in progress(batches, n, name, process):
        if len(positions):
            statistics.add(positions, images)
    return statistics.summary(name)


def source_statistics(source, options, features, process):
    """Statistics that the file holds, or else of its images, with the features of all samples or of
    some reference images. If it holds both, as ADM's do, FID uses the statistics; precision and
    recall use the images."""
    path, data, index, size, given = source
    if data is None:
        return given
    first, n = load_image(data, index[0])[1], len(index)
    if size and first.size != (size, size):
        process.print(f'{path} has images of {first.width} x {first.height} pixels, compared at '
                      f'{size}')
    batches = load_batches(data, index, size, options, process)
    kept = subset(n, MOST_REFERENCES if size else 0)
    made = measure(batches, n, kept, path, features, process)
    return made | facts_of(size or first.width, features) | {'n': n} | given


# ------------------------------------------------------ the tasks: samples, given or a checkpoint's
#
# All processes call the same task. It returns rows of the table, name -> value, which count on
# process 0, and what to write once the numbers are printed: path -> picture, or statistics.

Trained = namedtuple('Trained', 'model config class_names')        # what --ckpt holds


def compare_given(options, process):
    """Compare the images or statistics in --samples with --ref."""
    features = load_features(options, process)
    samples = open_source(options.samples, options.num_samples, None, features, process)
    if samples.data is None:
        size = samples.given['size']
    else:
        size = load_image(samples.data, samples.index[0])[1].width
        names = [samples.data.name(i).lower() for i in samples.index]
        if any(name.endswith(('.jpg', '.jpeg')) for name in names):
            process.print(f'warning: {samples.path} holds JPEG files; their artefacts change FID: '
                          'save PNG')
    # Opened before the samples are measured: a bad --ref fails now, not in an hour.
    reference = open_source(options.ref, options.ref_n, size, features, process)
    sample = source_statistics(samples, options, features, process)
    ref = source_statistics(reference, options, features, process)
    row = {'samples': options.samples} | compare(sample, ref, features, process)
    return [row], reference_file(options, ref)


def reference_file(options, ref):
    return {options.save_ref: ref} if options.save_ref else {}


def compare_generated(options, process, trained):
    """Sample with every pair of --gamma and --cfg, compare all with --ref."""
    note = note_on_guidance(trained.config, trained.class_names, any(options.cfg),
                            any(options.gamma), options.guidance)
    if note:
        process.print(note)
    trained = trained._replace(model=with_weights_in(process.dtype, trained.model))
    features, n = load_features(options, process), options.num_samples
    reference = open_source(options.ref, options.ref_n, trained.config.image_size, features,
                            process)
    ref = source_statistics(reference, options, features, process)
    fid, rows, curves = f'{features.prefix}FID', [], {}
    for gamma in options.gamma:
        curve = curves.setdefault(f'gamma {gamma:g}', [])
        for cfg in options.cfg:
            start, name = time.time(), f'cfg {cfg:g} gamma {gamma:g}'
            batches = generate(options, process, trained, cfg, gamma)
            sample = measure(batches, n, np.arange(n), name, features, process)
            sample['n'], speed = n, n / (time.time() - start)
            row = {'cfg': cfg, 'gamma': gamma} | compare(sample, ref, features, process)
            rows.append(row | {'images/s': speed})
            curve.append((cfg, row.get(fid)))
    files = reference_file(options, ref)
    if process.rank == 0 and len(options.cfg) > 1:
        files[options.path('fid_cfg.png')] = plot(curves, 'cfg', f'{fid}-{n}')
    return rows, files


def generate(options, process, trained, cfg, gamma):
    """This process's share as `sample_images` yields it, classes in turn"""
    labels = torch.arange(options.num_samples) % max(1, len(trained.class_names))
    return sample_images(trained.model, labels, options.seed, process, options.batch_size, cfg,
                         gamma, guidance=options.guidance,
                         tol=tolerance(options.decode, options.tol))


# -------------------------------------------------------- the tasks: what a checkpoint has learned

Encoded = namedtuple('Encoded', 'positions pixels image y x mu sigma noise')


def encode(options, process, trained, data, index):
    """Yield this process's share of data[index] as Encoded: positions in index (b,), pixels
    (b, H, W, 3) uint8, image (b, 3, H, W) in [-1, 1], y (b,), x = mu with noise, mu, sigma and
    noise (b, T, D). y: the data's classes where the model knows them by the same names, else "no
    class"."""
    model, device = trained.model, process.device
    known = trained.class_names == data.class_names
    if trained.class_names and not known:
        process.print('these images have no classes, or others than the checkpoint: none is told '
                      'to the model')
    batches = load_batches(data, index, trained.config.image_size, options, process)
    for positions, pixels in progress(batches, len(index), 'encoding', process):
        numbers = index[positions]
        noise = []
        for i in numbers.tolist():
            g = generator('cpu', RECON, options.seed, i)
            noise.append(torch.randn(model.flow.shape, generator=g))
        noise = torch.stack(noise).to(device)                      # (b, T, D)
        y = data.labels[numbers] if known else np.full(len(numbers), model.flow.null_class)
        y = torch.from_numpy(y).to(device)
        image = from_uint8(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device))
        with process.autocast():
            x, mu, sigma = model.latents(image, noise)
        yield Encoded(positions, pixels, image, y, x, mu, sigma, noise)


def decode(x, process, trained):
    """(b, T, D) -> (b, 3, H, W)"""
    with process.autocast():
        return trained.model.vae.decode(x)


def reconstruct(options, process, trained):
    """Encode and decode --reconstruct's images, with the noise of training and without."""
    features = load_features(options, process)
    data, index = open_images(options.reconstruct, options.num_samples, process)
    originals = Source(options.reconstruct, data, index, trained.config.image_size, given={})
    ref = source_statistics(originals, options, features, process)
    lpips, n = None, len(index)
    if not features.prefix:                                        # others do without downloads
        lpips = process.rank_0_first(load_lpips, options.lpips_vgg, options.lpips_heads,
                                     '--features random')
        lpips.to(process.device)
    means, statistics = {}, {}
    noisy, clean = 'mu + sigma eps', 'mu'                          # what is decoded
    for name in (noisy, clean):
        means[name] = Means(n, process)
        statistics[name] = Statistics(features.network, n, [], process)
    for batch in encode(options, process, trained, data, index):
        no_noise = torch.zeros_like(batch.noise)
        x_clean = trained.model.noise.add(batch.mu, batch.sigma, no_noise)
        for name, x in ((noisy, batch.x), (clean, x_clean)):
            recon = decode(x, process, trained)
            statistics[name].add(batch.positions, to_uint8(recon))
            means[name].add(similarity(recon, batch, lpips))
            if name == noisy:
                means[name].add(likelihood(recon, batch, options, process, trained))
    rows = []
    for name in (noisy, clean):
        recons, numbers = statistics[name].summary('reconstructions'), means[name].result()
        rfid = frechet(recons['mu'], recons['sigma'], ref['mu'], ref['sigma'])
        row = {'decoded': name, 'n': n, features.prefix + 'rFID': rfid}
        row.update({key: mean.item() for key, mean in numbers.items()})
        rows.append(row)
    return rows, {}


def similarity(recon, batch, lpips):
    """Reconstructions (b, 3, H, W), the batch they are of, LPIPS or None -> name -> (b,)"""
    a, b = zero_to_one(to_uint8(recon)), zero_to_one(batch.pixels)
    values = {'PSNR': psnr(a, b)}
    if min(a.shape[2:]) > 5:                                       # SSIM pads by 5
        values['SSIM'] = ssim(a, b)
    if lpips:
        a = (2 * a - 1).to(recon.device)
        b = (2 * b - 1).to(recon.device)
        values['LPIPS'] = lpips(a, b)
    return values


def likelihood(recon, batch, options, process, trained):
    """Reconstructions (b, 3, H, W), the batch they are of -> name -> (b,), in bits. Diffusion has
    no likelihood; pixels are decoded exactly, and have a rate alone."""
    model, config = trained.model, trained.config
    if config.prior == 'sit':
        return {}
    with process.autocast():
        nll = model.flow.nll(batch.x, batch.y)
        rate = model.kl(nll, batch.sigma) / math.log(2)            # per latent dimension
    if config.codec == 'pixels':
        return {'rate': rate}
    per_value = rate * batch.x[0].numel() / batch.image[0].numel()
    return {'rate': rate,
            'ELBO': per_value + distortion(batch.image, recon, options.decoder_std)}


NOISE_LEVELS = 0, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2                  # on mu: Figure 3


def explore_latents(options, process, trained):
    """Statistics of mu, and pictures of the latent space. std of mu is over images, at each token
    and channel, then averaged: it falls when the encoder collapses. (Over all elements it is 1 by
    the LayerNorm.) Noise on mu is in units of an image's std."""
    path = options.reconstruct or trained.config.data
    data, index = open_images(path, options.num_samples, process)
    n = len(index)
    means = Means(n, process)
    for batch in encode(options, process, trained, data, index):
        mu, original = batch.mu, zero_to_one(batch.pixels)
        means.add({'mu': mu, 'square': mu.cpu().double() ** 2})
        means.add(grid_statistics(mu))
        unit_noise = mu.std((1, 2), keepdim=True) * batch.noise
        for level in NOISE_LEVELS:
            recon = to_uint8(decode(mu + level * unit_noise, process, trained))
            means.add({f'PSNR at {level}': psnr(zero_to_one(recon), original)})
    numbers = means.result()
    var = numbers.pop('square') - numbers.pop('mu') ** 2           # (T, D)
    std = (var.clamp(min=0) * n / (n - 1)).sqrt().mean(0)          # (D,)
    require(std.isfinite().all(),
            f'the latents of {options.ckpt} are not finite: it is broken; use another')
    row = {'n': n, 'std of mu': std.mean().item()}
    row.update({name: number.item() for name, number in numbers.items()})
    if process.rank:
        return [row], {}
    noisy = [(level, row[f'PSNR at {level}']) for level in NOISE_LEVELS]
    count, edges = np.histogram(std, bins=10)
    outline = np.repeat(edges, 2), [0, *np.repeat(count, 2), 0]
    return [row], {
        options.path('latents_noise.png'): plot(
            {f'sigma {trained.config.sigma:g}': noisy},
            'noise on mu, in standard deviations of mu', 'PSNR of decode(mu + noise), dB'),
        options.path('latents_std.png'): plot({'': np.stack(outline, 1)}, 'std of mu', 'channels'),
        options.path('latents_interpolation.png'): interpolate(options, process, trained, data)}


def interpolate(options, process, trained, data):
    """-> PIL image: four pairs of images, of any class, and the way between them (Figure 3)"""
    some = np.random.default_rng(options.seed).permutation(len(data))[:8]
    size = trained.config.image_size
    pixels = np.stack([load_pixels(data, i, size)[1] for i in some])           # (8, H, W, 3)
    image = from_uint8(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(process.device))
    with process.autocast():
        ends, _ = trained.model.vae.encode(image)                              # (8, T, D)
    way = torch.linspace(0, 1, 9, device=ends.device).view(9, 1, 1)
    tiles = []
    for i in range(4):
        x = torch.lerp(ends[i], ends[i + 4], way)                              # (9, T, D)
        between = to_uint8(decode(x, process, trained))
        tiles += [pixels[i], *between, pixels[i + 4]]
    return grid(np.stack(tiles), columns=11)


def by_gradient(flow, x):
    """Flowing Backwards' training-free classifier (Chen et al. 2025): x (B, T, D) -> scores
    (B, classes). In every block the class embedding is softmax(l) @ E, at l = 0 the mean of all;
    the answer is the logit whose growth would raise log p(x | l) most. One forward, one backward,
    whatever the number of classes. TARFlow is trained with that mean in place of "no class"."""
    classes = flow.null_class
    mean = F.pad(x.new_full((len(x), classes), 1 / classes), (0, 1))        # none of "no class"
    grad = gradient_in_weights(flow, x, mean)
    # From weights on to logits: the derivative of softmax at 0.
    return (grad - grad.mean(1, keepdim=True)) / classes


def by_null_gradient(flow, x):
    """The same at "no class" itself, with which our flow is trained, towards each class's embedding
    (our variant)."""
    no_class = F.pad(x.new_zeros(len(x), flow.null_class), (0, 1), value=1.0)
    return gradient_in_weights(flow, x, no_class)


@torch.enable_grad()
def gradient_in_weights(flow, x, weights):
    """x (B, T, D), weights (B, classes + 1) of the embeddings -> (B, classes), the gradient of
    log p(x) in those of the classes"""
    weights.requires_grad_()
    log_p = flow.log_prob(*flow(x, weights))
    return torch.autograd.grad(log_p.sum(), weights)[0][:, :-1]


def by_likelihood(flow, x):
    """Bayes' rule with equal priors, one forward per class: x (B, T, D) -> scores (B, classes)"""
    scores = []
    for c in range(flow.null_class):
        y = torch.full((len(x),), c, device=x.device)
        scores.append(-flow.nll(x, y))
    return torch.stack(scores, dim=1)


CLASSIFIERS = {'gradient at softmax(0)': by_gradient, 'gradient at no class': by_null_gradient,
               'largest likelihood': by_likelihood}


def classify(options, process, trained):
    """Classify the images of --classify by p(x | class), in three ways. A class's gradient has an
    offset that all images share; `centred` is the accuracy once each class's mean is taken off."""
    path = options.classify
    data, index = open_images(path, options.num_samples, process)
    require(data.class_names and data.class_names == trained.class_names,
            f"--classify {path} must have the checkpoint's classes, by the same names")
    require(trained.config.prior != 'sit' and trained.config.layers,
            f'--classify needs a flow, and {options.ckpt} has none')
    n, labels, rows = len(index), [], []
    scores = {name: [] for name in CLASSIFIERS}
    seconds = {name: 0.0 for name in CLASSIFIERS}
    for batch in encode(options, process, trained, data, index):
        labels.append(batch.y.cpu())
        for name, score in CLASSIFIERS.items():
            start = time.perf_counter()
            with process.autocast():                               # .cpu() waits for the device
                scores[name].append(score(trained.model.flow, batch.x).cpu())
            seconds[name] += time.perf_counter() - start
    labels = torch.cat(labels)                                     # of this process's share
    for name in CLASSIFIERS:
        score = torch.cat(scores[name])                            # (share of n, classes)
        centred = score - mean_of(score, n, process)
        accuracy = mean_of(score.argmax(1) == labels, n, process).item()
        fair = mean_of(centred.argmax(1) == labels, n, process).item()
        rows.append({'classifier': name, 'n': n, 'accuracy': accuracy, 'centred': fair,
                     'ms per image': 1000 * seconds[name] * process.world / n})
    return rows, {}


def mean_of(values, n, process):
    """(share of n, ...) -> (...), over all processes"""
    means = Means(n, process)
    means.add({'': values})
    return means.result()['']


# ----------------------------------------------------------------------------------------- output

def cell(value):
    """- is what can't be computed."""
    if value is None:
        return '-'
    return f'{value:.5g}' if isinstance(value, float) else str(value)


def table(rows):
    """Rows of name -> value as text. FID is called FID-n."""
    lines, names, n = [''] * (1 + len(rows)), [], rows[0]['n'] or '?'
    for row in rows:
        names += [name for name in row if name not in names]
    for name in names:
        is_fid = name.split()[-1] in ('FID', 'rFID')
        column = [f'{name}-{n}' if is_fid else name]
        column += [cell(row.get(name)) for row in rows]
        width = max(len(text) for text in column)
        for i, text in enumerate(column):
            lines[i] += '  ' + text.rjust(width)
    return '\n'.join(line[2:] for line in lines)


CONVENTIONS = {
    'FID': 'InceptionV3 of 2015-12-05 in float32, TF1 bilinear to 299; unbiased covariance in '
           'float64',
    'sFID': 'the first 7 channels of Mixed_6d, at all 17 x 17 positions',
    'IS': f'{SPLITS} splits of the permutation RandomState(2020), logits without bias; std is over '
          'splits',
    'precision': f'and recall: pool features, k = {NEIGHBOURS}, at most {MOST_REFERENCES:,} '
                 'reference images',
    'PSNR': 'dB, of uint8 images, at most 100, mean over images',
    'SSIM': "RGB, gaussian 11 x 11, sigma 1.5, population covariance, torchmetrics' reflect "
            'padding',
    'LPIPS': 'v0.1, VGG16',
    'std of mu': 'over the images, at each token and channel, then averaged',
    'rate': 'KL(q(x | image) || p(x)), bits per latent dimension; of dequantised pixels: bits per '
            'dimension',
    'centred': 'accuracy of scores less their mean over the n images: fair if classes are equally '
               'frequent',
    'ELBO': 'negative, bits per pixel value, lower is better: rate + distortion at --decoder_std'}


def report(rows, options, seconds):
    """Print the table, what its numbers mean, and a line of JSON (null: can't be computed, or
    infinite)."""
    print(table(rows))
    names = {name.replace('rFID', 'FID').split(' at ')[0] for row in rows for name in row}
    used = {name: text for name, text in CONVENTIONS.items()
            if name in names or f'random {name}' in names}
    words = ' '.join(names).split()
    if 'FID' in names:
        used['weights'] = INCEPTION_DIGEST
    elif 'FID' in words:
        used['weights'] = f'{options.features.upper()}: these numbers are NOT FID'
    for name, text in used.items():
        print(f'  {name}: {text}')
    counts = [row[name] for row in rows for name in ('n', 'ref n') if row.get(name)]
    if 'FID' in words and min(counts, default=2049) < 2049:
        print(f'  WARNING: {min(counts)} images are fewer than 2,049: singular covariance, FID far '
              'too large')
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[name] = None
    print(json.dumps({'rows': rows, 'options': vars(options), 'conventions': used,
                      'seconds': round(seconds, 1)}))


def save(path, content):
    """A picture, or statistics"""
    if isinstance(content, dict):
        save_statistics(path, content)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        content.save(path)


def main(argv):
    options, start = parse_options(Options, argv, 'Images to numbers.'), time.time()
    options.check()
    dtype = options.dtype
    if options.ckpt:
        trained = Trained(*load_model(options.ckpt))
        check_sampling(trained.config, any(options.gamma), options.guidance,
                       tolerance(options.decode, options.tol))
        dtype = sampling_dtype(dtype, trained.config)
    process = find_process(options.device, dtype)
    require(options.num_samples >= process.world,
            f'--num_samples must be at least {process.world}, one per process')
    if options.ckpt:
        trained.model.to(process.device)
    with torch.no_grad():
        if options.samples:
            rows, files = compare_given(options, process)
        elif options.latents:
            rows, files = explore_latents(options, process, trained)
        elif options.classify:
            rows, files = classify(options, process, trained)
        elif options.reconstruct:
            rows, files = reconstruct(options, process, trained)
        else:
            rows, files = compare_generated(options, process, trained)
    if process.rank == 0:
        report(rows, options, time.time() - start)
        # Last, as a full disk may refuse them.
        for path, content in files.items():
            save(path, content)


if __name__ == '__main__':
    cli(main)
