"""How fast, compared with what the machine can do and with a plain TARFlow
(tests/tarflow_plain.py): ratios, measured in one run, of calls that take turns. Seconds are the
shortest of all turns, since other processes only ever add to them; with one thread on a CPU they
are seconds of this process, which others disturb less.

    # on a CPU: all sections, many minutes
    python tests/bench.py
    # whole presets: training, sampling; minutes, most of them compiling
    python tests/bench.py --device cuda --sizes S XXL
    # under a minute: does it work, at small sizes
    python tests/bench.py --quick 1
    # a step of nano on a CPU that trains in bfloat16
    python tests/bench.py --sections step --dtype bfloat16
    # what parallel decoding does for your model
    python tests/bench.py --sections jacobi --ckpt out/ckpt.pt

Prints one table per section and, in the last line, all numbers as JSON. On a GPU matrix products
are in bfloat16.
"""
import argparse
import dataclasses
import functools
import itertools
import json
import os
import platform
import time
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import conftest  # noqa: F401, puts the project on the path
from data import Parser, cli
import flow as flow_module
import tarflow_plain
from flow import Flow, Guidance, guide
from model import (PRESETS, Config, SimFlow, find_process, load_model, ready_to_sample, to_uint8,
                   with_weights_in)
from sample import Options
from train import Trainer, train_flops as whole_flops
from vae import LPIPS, VAE

CLASSES = 1000


class Machine:
    """Where to measure, how long, and how"""

    def __init__(self, device, threads, quick, dtype=''):
        torch.set_num_threads(threads)
        self.quick, cuda = quick, device.startswith('cuda')
        self.clock = time.process_time if threads == 1 and device == 'cpu' else time.perf_counter
        self.process = find_process(device, dtype, compile=False)
        self.device = self.process.device
        self.turns = 2 if quick else 3                                 # least, of each comparison
        self.seconds = 1.0 if quick else 3.0 if cuda else 20.0
        name = torch.cuda.get_device_name() if cuda else cpu_name()
        self.facts = {'device': f'{device}: {name}', 'threads': threads, 'torch': torch.__version__,
                      'dtype': self.process.dtype_name, 'quick': quick}

    def time(self, call):
        """-> seconds"""
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        start = self.clock()
        with self.process.autocast():
            call()
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        return self.clock() - start

    def times(self, calls):
        """{name: call} -> {name: shortest seconds}. They take turns, after one that does not
        count; what that took is `first`."""
        self.first = sum(map(self.time, calls.values()))
        best, start, turn = dict.fromkeys(calls, np.inf), time.perf_counter(), 0
        while turn < self.turns or time.perf_counter() - start < self.seconds:
            best = {name: min(best[name], self.time(call)) for name, call in calls.items()}
            turn += 1
        return best

    def randn(self, *shape):
        g = torch.Generator().manual_seed(len(shape))
        return torch.randn(*shape, generator=g).to(self.device)

    def labels(self, batch, classes=CLASSES):
        return torch.arange(batch, device=self.device) % max(1, classes)

    def flow(self, width, layers, tokens=256, dim=64, std=0.3):
        """With weights that are not zero, since a new flow is the identity"""
        torch.manual_seed(0)
        flow = Flow(dim, tokens, width, max(1, width // 64), layers, CLASSES)
        return wake(flow, std).to(self.device)


def wake(flow, std=0.3):
    """In place: random weights for the layers that a new flow has at zero"""
    for name, p in flow.named_parameters():
        if ('ada' in name or 'proj_out' in name) and p.dim() > 1:
            p.data.normal_(std=std / p.shape[-1] ** 0.5)
    return flow


def cpu_name():
    try:
        with open('/proc/cpuinfo') as f:
            return next(line for line in f if line.startswith('model name')).split(':')[1].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peer_of(flow):
    """The plain TARFlow with the weights of a Flow"""
    tokens, dim = flow.shape
    first = flow.blocks[0].transformer
    width, heads = first.pos.shape[1], first.layers[0].attn.heads
    peer = tarflow_plain.TARFlow(dim, tokens, width, heads, blocks=0, layers=0,
                                 classes=flow.null_class)
    for block in flow.blocks:
        layers = len(block.transformer.layers)
        peer.blocks.append(tarflow_plain.Block(dim, tokens, width, heads, layers,
                                               flow.null_class, block.backwards))
    peer.load_state_dict(tarflow_plain.plain_names(flow.state_dict()))
    return peer.to(first.pos.device)


def show(title, rows):
    """A Markdown table of dictionaries with the same keys -> them"""
    def cell(value):
        return f'{value:.3g}' if isinstance(value, float) and abs(value) < 1e4 else str(value)
    lines = [' | '.join(rows[0]), ' | '.join('---' for _ in rows[0])]
    lines += [' | '.join(map(cell, row.values())) for row in rows]
    print(f'\n{title}\n\n' + '\n'.join(f'| {line} |' for line in lines), flush=True)
    return rows


# ----------------------------------------------------------------------------------------- training

def nll_step(flow, x, y):
    """Forward and backward of the flow's loss"""
    def step():
        flow.zero_grad()
        z, logdet = flow(x, y)
        ((0.5 * z.square().sum() - logdet.sum()) / x.numel()).backward()
    return step


def train_flops(flow, batch):
    """Of forward and backward, from shapes: all Linear layers, and the half of attention that is
    not masked"""
    tokens, dim = flow.shape
    first = flow.blocks[0].transformer
    layers = [len(block.transformer.layers) for block in flow.blocks]
    width, heads = first.pos.shape[1], first.layers[0].attn.heads
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        meta = Flow(dim, tokens, width, heads, layers, flow.null_class)
        x = torch.empty(batch, tokens, dim, requires_grad=True)
        z, logdet = meta(x, torch.empty(batch, dtype=torch.long))
        (z.sum() + logdet.sum()).backward()
    counts = counter.get_flop_counts()['Global']
    linear = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return linear + sum(layers) * 3 * 4 * batch * tokens * (tokens + 1) // 2 * width


def gemms(machine, rows, width):
    """-> call, FLOPs: the matrix products of one layer's Linear layers, forward and backward, and
    nothing else"""
    dtype, work = machine.process.dtype, []
    for n, k in ((3, 1), (1, 1), (4, 1), (1, 4)):
        sides = (rows, k * width), (n * width, k * width), (rows, n * width)
        work.append([machine.randn(*side).to(dtype) for side in sides])

    def call():
        for x, weight, grad in work:
            x @ weight.t()
            grad @ weight
            grad.t() @ x
    return call, 3 * 2 * rows * 12 * width ** 2


def section_train(machine, args):
    rows, batch, tokens = [], 2 if machine.quick else 8, 64 if machine.quick else 256
    for size in ('S',) if machine.quick else ('S', 'B'):
        c = Config(**PRESETS[size])
        flow = machine.flow(c.width, c.layers, tokens)
        x, y = machine.randn(batch, tokens, 64), machine.labels(batch)
        call, gemm_flops = gemms(machine, batch * tokens, c.width)
        t = machine.times({'gemm': call, 'ours': nll_step(flow, x, y),
                           'peer': nll_step(peer_of(flow), x, y)})
        rate, flops = gemm_flops / t['gemm'], train_flops(flow, batch)
        parameters = sum(p.numel() for p in flow.parameters())
        rows.append({'size': size, 'parameters': f'{parameters:,}', 'batch': batch,
                     'T': tokens, 'GEMM, GFLOP/s': rate / 1e9, 'ours, s': t['ours'],
                     'share of GEMM': flops / t['ours'] / rate, 'plain, s': t['peer'],
                     'its share': flops / t['peer'] / rate, 'times as fast': t['peer'] / t['ours']})
    return show('Training the flow, forward and backward', rows)


# ----------------------------------------------------------------------------------------- sampling

def sampling_size(machine):
    """-> flow of preset S, noise and classes of 8 images"""
    layers, tokens, batch = ((2, 2), 64, 8) if machine.quick else ((2,) * 6, 256, 8)
    flow = machine.flow(384, layers, tokens)
    return flow, machine.randn(batch, tokens, 64), machine.labels(batch)


def section_sample(machine, args):
    flow, z, y = sampling_size(machine)
    peer, rows = peer_of(flow), []
    cases = (0.0, 'nothing', False), (2.0, 'the deep block', False), (2.0, 'every block', True)
    for cfg, where, every_block in cases:
        guidance = Guidance(guide, every_block)
        t = machine.times({'ours': lambda: flow.sample(z, y, cfg, guidance),
                           'peer': lambda: peer.sample(z, y, cfg, every_block)})
        rows.append({'guided': where, 'cfg': cfg, 'batch': len(z), 'T': z.shape[1],
                     'ours, s': t['ours'], 'plain, s': t['peer'],
                     'ours, ms per token': 1e3 * t['ours'] / z.shape[1],
                     'times as fast': t['peer'] / t['ours']})
    return show('Sampling, token by token. TARFlow guides every block, SimFlow the deep one', rows)


def section_score(machine, args):
    flow, z, y = sampling_size(machine)
    steps = [(0.25, y), (-0.25, torch.full_like(y, flow.null_class))]
    t = machine.times({'sample': lambda: flow.sample(z, y, 2.0),
                       'score': lambda: flow.score_step(z, steps)})
    return show('The score step after guided sampling', [
        {'sampling, s': t['sample'], 'score step, s': t['score'],
         'its share': t['score'] / sum(t.values())}])


def brief_flow(machine):
    """A small flow, trained for seconds on smooth random fields, as one without training would
    converge at once"""
    torch.manual_seed(0)
    flow = Flow(16, 64, 64, 2, (1, 1, 2), 10).to(machine.device)
    opt = torch.optim.AdamW(flow.parameters(), 2e-3)
    basis = torch.randn(10, 6, 64, 16, device=machine.device).cumsum(2) / 8
    for _ in range(150):
        y = torch.randint(10, (16,), device=machine.device)
        weights = torch.randn(16, 6, device=machine.device)
        noise = torch.randn(16, 64, 16, device=machine.device)
        x = torch.einsum('bk,bktd->btd', weights, basis[y]) + 0.3 * noise
        opt.zero_grad()
        flow.nll(x, y).mean().backward()
        opt.step()
    return flow.requires_grad_(False)


def launch(step, device):
    """In place of flow.capture: without a graph"""
    step()
    return step


def counted(flow, call):
    """-> how often call() evaluates each block of the flow, the one that is sampled first first"""
    seen = []
    hooks = [block.transformer.register_forward_hook(lambda module, *_: seen.append(module))
             for block in flow.blocks]
    # A graph's replay would call no hooks.
    with mock.patch.object(flow_module, 'capture', launch):
        call()
    for hook in hooks:
        hook.remove()
    return [sum(module is block.transformer for module in seen) for block in reversed(flow.blocks)]


def parallel(flow, z, y, cfg, tol):
    """flow.sample in parallel, even where it would rather go token by token"""
    with mock.patch.object(flow_module, 'JACOBI_IMAGES', np.inf):
        return flow.sample(z, y, cfg, tol=tol)


def jacobi_cases(machine):
    """-> (images at once, cfg) pairs. The plain TARFlow takes too long on a GPU for all of them."""
    if machine.quick:
        return [(1, 0.0), (16, 0.0)]
    if machine.device.type == 'cuda':
        return [(1, 2.0), (64, 2.0)]
    return list(itertools.product((1, 16, 64), (0.0, 2.0)))


def section_jacobi(machine, args):
    models = [(path, load_model(path)[0].to(machine.device)) for path in args.ckpt]
    models = models or [('(trained briefly)', None)]
    rows = []
    for path, model in models:
        flow = model.flow if model else brief_flow(machine)
        peer = peer_of(flow)
        flow = with_weights_in(machine.process.dtype, flow)        # the peer has autocast
        for batch, cfg in jacobi_cases(machine):
            z, y = machine.randn(batch, *flow.shape), machine.labels(batch, flow.null_class)
            calls = {'one by one': lambda: flow.sample(z, y, cfg),
                     'peer': lambda: peer.sample(z, y, cfg),
                     'jacobi': lambda: flow.sample(z, y, cfg, tol=args.tol),
                     'forced': lambda: parallel(flow, z, y, cfg, args.tol)}
            if cfg:                                                # else the same as the peer's
                calls['TARFlow'] = lambda: peer.sample(z, y, cfg, every_block=True)
            t = machine.times(calls)
            row = {'checkpoint': path, 'batch': batch, 'cfg': cfg,
                   'one by one, s': t['one by one'], 'jacobi, s': t['jacobi'],
                   'speed-up': t['one by one'] / t['jacobi'],
                   'vs. plain': t['peer'] / t['jacobi'],
                   'vs. plain, every block': t.get('TARFlow', t['peer']) / t['jacobi'],
                   'forced, s': t['forced'],
                   'iterations': ' + '.join(map(str, counted(flow, calls['forced'])))}
            rows.append(row | decoding_error(machine, flow, model, z, y, cfg, args.tol))
    return show(f'Parallel decoding, tol {args.tol}. Forced: even where it takes longer than token '
                f'by token; its iterations of each block, of {z.shape[1] - 1} tokens, and its '
                'errors', rows)


def decoding_error(machine, flow, model, z, y, cfg, tol):
    """Of parallel decoding against token by token: in latents the largest of an image, relative; in
    levels of uint8 the largest and the mean"""
    with machine.process.autocast():
        a, b = flow.sample(z, y, cfg), parallel(flow, z, y, cfg, tol)
        relative = (a - b).norm(dim=(1, 2)) / a.norm(dim=(1, 2))
        row = {'latents': relative.max().item(), 'levels, max': '-', 'mean': '-'}
        if model:
            with torch.no_grad():
                a, b = (to_uint8(model.vae.decode(v)).astype(int) for v in (a, b))
            row |= {'levels, max': int(abs(a - b).max()), 'mean': float(abs(a - b).mean())}
    return row


# -------------------------------------------------------------------------- the VAE, the whole step

def conv_calls(vae, image, noise):
    """-> a call of every convolution of the VAE, forward and backward, on inputs it has seen"""
    seen = []

    def see(module, inputs, out):
        seen.append((module, inputs[0].detach(), out.detach()))

    hooks = [module.register_forward_hook(see) for module in vae.modules()
             if isinstance(module, nn.Conv2d)]
    vae_step(vae, image, noise)()
    for hook in hooks:
        hook.remove()

    def call():
        for module, x, out in seen:
            module(x.requires_grad_()).backward(out)
            x.grad = module.weight.grad = None
    return call


def vae_step(vae, image, noise):
    """Forward and backward of encoder and decoder"""
    def step():
        vae.zero_grad()
        mu, sigma = vae.encode(image)
        (vae.decode(mu + sigma * noise) - image).square().mean().backward()
    return step


def section_vae(machine, args):
    rows = []
    sizes = [('nano', 32, 8)] if machine.quick else [('nano', 32, 32), ('S', 256, 1)]
    for name, size, batch in sizes:
        c = Config(**PRESETS[name])
        vae = VAE(c.vae_width, c.vae_mults, c.vae_patch, c.latent_dim, c.sigma, c.latent_norm)
        vae = vae.to(machine.device, memory_format=torch.channels_last)
        image = machine.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
        noise = machine.randn(batch, (size // c.factor) ** 2, c.latent_dim)
        with FlopCounterMode(display=False) as counter:
            vae_step(vae, image, noise)()
        rows_gemm = 256 if machine.quick else 2048
        gemm, gemm_flops = gemms(machine, rows_gemm, 384)
        t = machine.times({'vae': vae_step(vae, image, noise),
                           'layers': conv_calls(vae, image, noise), 'gemm': gemm})
        rate = counter.get_total_flops() / t['vae']
        rows.append({'VAE': name, 'batch': batch, 'pixels per side': size, 's': t['vae'],
                     'GFLOP/s': rate / 1e9,
                     'share of its convolutions alone': t['layers'] / t['vae'],
                     'share of GEMM': rate * t['gemm'] / gemm_flops})
    return show('The VAE, forward and backward', rows)


def section_step(machine, args):
    c = Config(**PRESETS['nano'])
    trainer = Trainer(c, 10, machine.process)
    batch = 8 if machine.quick else c.batch_size
    trainer.config.batch_size = batch
    image = torch.randint(256, (batch, 3, c.image_size, c.image_size), dtype=torch.uint8)
    y, noise = machine.labels(batch, 10), machine.randn(batch, c.tokens, c.latent_dim)
    as_float = machine.randn(batch, 3, c.image_size, c.image_size)
    as_float = as_float.to(memory_format=torch.channels_last)
    flow, x = trainer.model.flow, noise.clone().requires_grad_()

    def update():
        for p in trainer.model.parameters():
            p.grad = torch.zeros_like(p)
        trainer.update({'loss': torch.zeros((), device=machine.device)}, 1e-9)

    t = machine.times({'step': lambda: trainer.train_step(image, y, 1e-4),
                       'VAE': vae_step(trainer.model.vae, as_float, noise),
                       'flow': lambda: flow.nll(x, y).mean().backward(), 'optimizer + EMA': update})
    parts = {name: t[name] / t['step'] for name in ('VAE', 'flow', 'optimizer + EMA')}
    return show("nano's training step", [{'batch': batch, 'images/s': batch / t['step'], **parts,
                                          'rest': 1 - sum(parts.values())}])


# ------------------------------------------------------------------------- whole presets, for a GPU

# What to measure of each size: images per step; images at once that are sampled.
SIZES = {'nano': (8, (8,)), 'cifar': (256, (256,)), 'S': (16, (256,)), 'L': (16, (256,)),
         'XXL': (16, (1, 256))}


def preset_of(size, batch):
    return Config(**PRESETS[size] | dict(model=size, batch_size=batch))


def section_machine(machine, args):
    """The ceilings: one large matrix product, one large copy"""
    n = 512 if machine.quick else 8192
    a, b = (machine.randn(n, n).to(machine.process.dtype) for _ in range(2))
    out = torch.empty_like(a)
    t = machine.times({'gemm': lambda: torch.mm(a, b, out=out), 'copy': lambda: out.copy_(a)})
    return show('What the machine can do', [{'GEMM of': n, 'TFLOP/s': 2 * n ** 3 / t['gemm'] / 1e12,
                                             'copy, TB/s': 2 * out.nbytes / t['copy'] / 1e12}])


def section_train_sizes(machine, args):
    """A whole training step with all its networks (random VGG16): compiled on a GPU, launched
    operation by operation and as one CUDA graph"""
    rows, cuda = [], machine.device.type == 'cuda'
    process = dataclasses.replace(machine.process, compile=cuda)
    for size in args.sizes:
        c = preset_of(size, args.images or SIZES[size][0])
        first = time.perf_counter()
        trainer = Trainer(c, CLASSES, process, LPIPS() if c.lpips else None)
        built = time.perf_counter()
        image = torch.randint(256, (c.batch_size, 3, c.image_size, c.image_size), dtype=torch.uint8)
        step = functools.partial(trainer.train_step, image, torch.arange(c.batch_size), 1e-5)
        machine.time(step)
        compiled = time.perf_counter()
        row = {'size': size, 'images': c.batch_size, 'to build, s': built - first,
               'first step, s': compiled - built}
        for name, graphs in {'launched': False, 'as a graph': True}.items():
            if graphs and not cuda:
                continue
            trainer.warm_steps = 2 if graphs else -np.inf
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds = machine.times({name: step})[name]
            row[f'{name}, images/s'] = c.batch_size / seconds
            row |= {'MFU': whole_flops(c, CLASSES) * c.batch_size / seconds / args.peak,
                    'peak, GB': torch.cuda.max_memory_reserved() / 1e9 if cuda else 0.0,
                    'loss': trainer.row()['loss']}
        rows.append(row)
        del trainer, step
        if cuda:
            torch.cuda.empty_cache()
    return show('Training, VAE, flow, LPIPS and GAN as in the presets. MFU: of VAE and flow', rows)


def section_sample_sizes(machine, args):
    """Guided sampling with the score step, seconds of its parts; on a GPU also compiled"""
    rows, cuda = [], machine.device.type == 'cuda'
    for size, compile in itertools.product(args.sizes, (False, True) if cuda else (False,)):
        c = preset_of(size, 1)
        with machine.device:
            model = SimFlow(c, CLASSES).requires_grad_(False).eval()
        wake(model.flow)
        process = dataclasses.replace(machine.process, compile=compile)
        torch.compiler.reset()                                     # few graphs of a function fit
        model = ready_to_sample(model, process)
        for batch in SIZES[size][1]:
            z, y = machine.randn(batch, *model.flow.shape), machine.labels(batch)
            steps = [(0.25, y), (-0.25, torch.full_like(y, CLASSES))]
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            calls = {'flow': lambda: model.flow.sample(z, y, 2.0),
                     'score': lambda: model.flow.score_step(z, steps),
                     'decode': lambda: model.decode(z)}
            t = machine.times(calls)
            row = {'size': size, 'compiled': compile, 'images': batch, 'flow, s': t['flow'],
                   'score step, s': t['score'], 'decode, s': t['decode'],
                   'ms per image': 1e3 * sum(t.values()) / batch, 'at first, s': machine.first}
            if cuda:
                row['peak, GB'] = torch.cuda.max_memory_reserved() / 1e9
            rows.append(row)
        model = None                                               # its memory is needed
    return show('Sampling, cfg 2 in the deep block, gamma 0.25', rows)


# ------------------------------------------------------------------------------------------ scaling

def exponent(sizes, seconds):
    """Slope of log seconds over log size, by least squares"""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def section_scale(machine, args):
    base = {'T': 256, 'width': 192, 'depth': 2, 'batch': 8}
    grid = {'T': (64, 128, 256, 512, 1024), 'width': (64, 128, 256, 512), 'depth': (1, 2, 4, 8),
            'batch': (1, 4, 16, 64)}
    if machine.quick:
        base = {'T': 64, 'width': 64, 'depth': 2, 'batch': 4}
        grid = {'T': (32, 64), 'width': (64, 128), 'depth': (1, 2), 'batch': (2, 4)}
    machine.seconds, rows = 0.0, []
    for what, sizes in grid.items():
        seconds = {'training': [], 'one by one': [], 'parallel': []}
        for size in sizes:
            s = base | {what: size}
            flow = machine.flow(s['width'], (s['depth'],) * 2, s['T'], dim=16, std=0.1)
            z, y = machine.randn(s['batch'], s['T'], 16), machine.labels(s['batch'])
            t = machine.times({'training': nll_step(flow, z, y),
                               'one by one': lambda: flow.sample(z, y),
                               'parallel': lambda: parallel(flow, z, y, 0.0, args.tol)})
            for name in seconds:
                seconds[name].append(t[name])
        rows.append({'time against': f'{what} = {", ".join(map(str, sizes))}',
                     **{name: exponent(sizes, values) for name, values in seconds.items()}})
    return show('Exponents: time grows as that power, others as in ' + str(base), rows)


ON_A_GPU = ['machine', 'train_sizes', 'sample_sizes', 'jacobi']
SECTIONS = {name[8:]: section for name, section in list(globals().items())
            if name.startswith('section_')}


def main(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', type=int, default=0)
    parser.add_argument('--sections', nargs='+', choices=SECTIONS,
                        help='default: all; on a GPU ' + ', '.join(ON_A_GPU))
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='', help="sample.py's; train.py may have another")
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--tol', type=float, default=Options.tol, help='of parallel decoding')
    parser.add_argument('--sizes', nargs='+', choices=SIZES,
                        help='for train_sizes, sample_sizes; default: nano, or S and XXL')
    parser.add_argument('--images', type=int, help="in a step of train_sizes; default: the size's")
    parser.add_argument('--peak', type=float, default=989e12,
                        help="FLOP/s that are MFU 1; default: an H100's")
    parser.add_argument('--ckpt', nargs='+', default=[],
                        help='trained models for the section jacobi')
    args = parser.parse_args(argv)
    cuda = args.device.startswith('cuda')
    args.sections = args.sections or (ON_A_GPU if cuda else SECTIONS)
    args.sizes = args.sizes or (['S', 'XXL'] if cuda else ['nano'])
    machine = Machine(args.device, args.threads, bool(args.quick), args.dtype)
    print(', '.join(f'{name}: {fact}' for name, fact in machine.facts.items()))
    results = {}
    for name in args.sections:
        least, start = machine.seconds, time.perf_counter()
        results[name] = SECTIONS[name](machine, args)
        machine.seconds = least
        results[name + ', s'] = round(time.perf_counter() - start, 1)
    print('\n' + json.dumps(machine.facts | results))


if __name__ == '__main__':
    cli(main)
