"""The paper's figures at a small scale: trains what they need, as tests/ablation.py does, and
writes their curves as PNGs and their numbers as tables.

    python tests/figures.py fashion_mnist.zip --judge judge.py [--figures 3 4 7 8]

    3   PSNR of decode(mu + noise), for five variances and a learned one (SimFlow's Figure 3a)
    4   how smooth the latents are: end to end, frozen, frozen with a learned variance (Figure 4)
    7   distance against cfg, with gamma 0 and 0.25 (Figure 7)
    8   the first, a middle and the last block aligned with random features (Figure 8)
    classify   accuracy of evaluate.py's classifiers, with and without alignment

DATA and judge.py as in tests/ablation.py, whose runs are taken where they are done. About four
minutes of one core per run, and 20 for figure 7.
"""
import argparse
import json
import os
import subprocess
import sys

import torch

import ablation
import conftest
from data import Parser, cli
from model import load_model, plot

ablation.ROWS |= {
    f'repa_{block}': (f'aligned block {block}', f'--model repa --repa_layer 1 --repa_block {block}',
                      '') for block in (1, 2, 3)}
NOISES = {'sigma_0.1': 'sigma 0.1', 'sigma_0.25': 'sigma 0.25', 'nano': 'sigma 0.5',
          'sigma_0.75': 'sigma 0.75', 'sigma_1': 'sigma 1', 'learned': 'learned'}
FROZEN = {'nano': 'end to end', 'vae': 'VAE alone, sigma 0.5',
          'vae_learned': 'VAE alone, learned variance'}
CLASSIFIED = 'nano', 'tarflow', 'tarflow_repa', 'tarflow_r_repa'
BLOCKS = {'nano': 'none', 'repa_1': 'first', 'repa_2': 'middle', 'repa_3': 'last'}


def evaluate(ckpt, *options):
    """-> the rows that evaluate.py prints of 500 images"""
    command = [sys.executable, os.path.join(conftest.ROOT, 'evaluate.py'), '--ckpt', ckpt,
               '--num_samples', '500', *options]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(text.splitlines()[-1])['rows']


def latents(ckpt, held_out):
    return evaluate(ckpt, '--latents', '1', '--reconstruct', held_out)[0]


def print_table(rows, columns):
    """rows: name -> {column: value}"""
    print('\n'.join(['| | ' + ' | '.join(columns) + ' |', '|---' * (len(columns) + 1) + '|']))
    for name, row in rows.items():
        print(f'| {name} | ' + ' | '.join(f'{row[column]:.4g}' for column in columns) + ' |')


def figure_3(train, held_out, judge, out):
    rows = {name: latents(train(row), held_out) for row, name in NOISES.items()}
    levels = [column for column in rows['sigma 0.5'] if column.startswith('PSNR at')]
    curves = {name: [(float(level.split()[-1]), row[level]) for level in levels]
              for name, row in rows.items()}
    plot(curves, 'noise on mu, in its std', 'PSNR, dB').save(os.path.join(out, 'figure_3.png'))
    print_table(rows, levels)


def figure_4(train, held_out, judge, out):
    rows = {name: latents(train(row), held_out) for row, name in FROZEN.items()}
    print_table(rows, ['spectral entropy', 'high frequencies', 'total variation',
                       'autocorrelation', 'std of mu'])


def figure_7(train, held_out, judge, out):
    model, _, names = load_model(train('nano_long'))
    labels, curves = torch.arange(judge.n) % len(names), {}
    for gamma in (0.0, 0.25):
        curve = curves.setdefault(f'gamma {gamma:g}', [])
        for cfg in (0.0, 1.0, 2.0, 3.0, 4.0):
            features = judge.features(model, labels, cfg, gamma)
            curve.append((cfg, judge.judge.frechet(features, judge.reference)))
    plot(curves, 'cfg', 'distance').save(os.path.join(out, 'figure_7.png'))
    rows = {name: {f'cfg {cfg:g}': value for cfg, value in curve}
            for name, curve in curves.items()}
    print_table(rows, list(rows['gamma 0']))


def figure_8(train, held_out, judge, out):
    rows = {}
    for row, name in BLOCKS.items():
        ckpt = train(row)
        rows[name] = ablation.measure(ckpt, held_out) | judge(ckpt)
    print_table(rows, ['PSNR', 'PSNR mu', 'nll', 'fd 0', 'fd 2', 'acc 2'])


def figure_classify(train, held_out, judge, out):
    rows = {}
    for row in CLASSIFIED:
        numbers = evaluate(train(row), '--classify', held_out)
        rows[ablation.ROWS[row][0]] = {number['classifier'] + suffix: number[column]
                                       for number in numbers
                                       for suffix, column in (('', 'accuracy'),
                                                              (', centred', 'centred'))}
    print_table(rows, list(rows[ablation.ROWS[CLASSIFIED[0]][0]]))


FIGURES = {'3': figure_3, '4': figure_4, '7': figure_7, '8': figure_8,
           'classify': figure_classify}


def main(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data')
    parser.add_argument('--out', default='ablation')
    parser.add_argument('--judge', required=True)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--steps', type=int, default=600)
    parser.add_argument('--figures', nargs='+', choices=FIGURES, default=list(FIGURES))
    args = parser.parse_args(argv)
    os.makedirs(args.out, exist_ok=True)
    train_zip, held_out = ablation.split(args.data, args.out)
    judge = ablation.Judge(args.judge, held_out)

    def train(row):
        return ablation.train(row, args.seed, train_zip, args.out, args.steps)

    for name in args.figures:
        print(f'figure {name}', flush=True)
        FIGURES[name](train, held_out, judge, args.out)


if __name__ == '__main__':
    cli(main)
