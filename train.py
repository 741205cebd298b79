"""Train SimFlow: one forward, everything learns together.

    python train.py                                     2 to 6 minutes on two cores, built-in data
    python train.py --model S --data imagenet/train --grad_accum 8 --out out/S        one GPU
    torchrun --nproc_per_node=8 train.py --model XXL --grad_ckpt 1 --out out/XXL

Writes to --out: ckpt.pt, log.csv, log.png, samples_*.png (EMA weights, a row for each of up to ten
classes) and recon_*.png (originals above reconstructions). The same command resumes where the run
stopped.
"""
import copy
import csv
import dataclasses
import datetime
import math
import os
import shlex
import shutil
import signal
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import (BUILT_IN, UserError, batches, cli, held_out, hold_out, open_data, parse_options,
                  require, show, whole)
from flow import Layer, SiT, VPFlow
from model import (DIFFUSION, PRESETS, RECON, TRAIN, Aligned, Config, SimFlow, alignment,
                   can_compile, find_process, from_uint8, gather_images, generator, grid,
                   load_checkpoint, load_teacher, mix_seed, plot, processes, psnr,
                   resample_grid, sample_images, to_uint8, with_weights_in)
from vae import VAE, Discriminator, adaptive_weight, hinge, load_lpips

try:
    import fcntl
except ImportError:                                                # Windows has no such locks
    fcntl = None

# These define the codec: --init needs a checkpoint with the same values.
CODEC_OPTIONS = 'codec latent_dim latent_norm vae_width vae_mults vae_patch'.split()
# These define the run: a checkpoint is resumed only with the same values.
FIXED_OPTIONS = CODEC_OPTIONS + (
    'image_size sigma noise prior width heads layers freeze align repa repa_block repa_layer '
    'repa_width gan_width gan_layers batch_size seed optimizer holdout').split()
# Dense bf16 FLOP/s, for the column mfu of the log.
PEAK = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12, 'L40S': 362e12, '4090': 165e12}
# Share of that peak which --dry_run assumes, counting VAE and flow alone. Compiled steps at 256
# pixels reached 0.28 (S) and 0.32 (XXL) with 32 images on an H200, and 0.23 and 0.24, by GPU time,
# with 16 on an H100; loading, logging and pictures take the rest.
SHARE = 0.2
HOPELESS = 4                                                       # steps in a row, all skipped


# ---------------------------------------------------------------------------------------- schedules

def learning_rate(config, step, steps):
    """Warm-up (none in the paper), constant (stage I), cosine to lr_end (stage II): Table 9."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    start = config.constant * steps
    progress = max(0.0, (step - start) / max(1.0, steps - start))
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress))
    return warm * (config.lr_end + (config.lr - config.lr_end) * cosine)


def ema_decay(config, step):
    """Warmed up, which the paper does not mention: a young average must not remember the first
    weights."""
    return min(config.ema, (1 + step) / (10 + step))


def draw_noise(config, classes, step, y, process):
    """The random numbers of a step -> noise (b, T, D), y (b,) with some classes dropped, for this
    process's b images. Diffusion models draw more from torch's global generator, seeded here.

    Each process draws for the global batch and keeps its slice, so the split changes nothing.
    """
    torch.manual_seed(mix_seed(DIFFUSION, config.seed, step, process.rank))
    g = generator(process.device, TRAIN, config.seed, step)
    B, b = config.batch_size, len(y)
    mine = slice(process.rank * b, (process.rank + 1) * b)
    shape = B, config.tokens, config.latent_dim
    noise = torch.randn(shape, generator=g, device=process.device)[mine]
    drop = torch.rand(B, generator=g, device=process.device)[mine] < config.class_drop
    return noise, torch.where(drop, classes, y)


# -------------------------------------------------------------------------------------- the trainer

class Trainer:
    """Networks, optimizers and running averages: one step, and all that a bit-exact resume needs.
    lpips, teacher: the frozen networks, if not those that the configuration names."""
    saved = 0                                                      # step of the last checkpoint
    lost = 0                                                       # steps since a finite one

    def __init__(self, config, classes, process, lpips=None, teacher=None):
        self.config, self.classes, self.process, self.step = config, classes, process, 0
        self.names = ['loss', 'l1', 'l2', 'nll', 'entropy', 'mu_std', 'grad_norm', 'replaced']
        if config.align:
            teacher = teacher or process.rank_0_first(
                load_teacher, config.repa, math.isqrt(config.tokens))
            self.teacher = teacher.to(process.device)
            self.names.append('align')
        torch.manual_seed(config.seed)                             # one start on every process
        with process.device:                                       # XXL takes long on a CPU
            if config.align:
                self.model = Aligned(config, classes, self.teacher.width)
            else:
                self.model = SimFlow(config, classes)
        self.model.to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.opts = build_optimizers(self.model, config, process.dtype)
        for module in self.model.modules():
            if hasattr(module, 'grad_ckpt'):
                module.grad_ckpt = config.grad_ckpt
        self.ddp = process.distribute(self.model)
        self.ddps = [self.ddp]
        if config.lpips:
            lpips = lpips or process.rank_0_first(
                load_lpips, config.lpips_vgg, config.lpips_heads)
            self.lpips = lpips.to(process.device, memory_format=torch.channels_last)
            self.names.append('lpips')
        if config.gan:
            with process.device:
                self.disc = Discriminator(config.gan_width, config.gan_layers)
            self.disc.to(memory_format=torch.channels_last)
            self.disc_opt = adamw(self.disc.parameters(), config.gan_lr,
                                  (config.gan_beta1, config.gan_beta2))
            self.disc_ddp = process.distribute(self.disc)
            self.ddps.append(self.disc_ddp)
            self.names += ['gan', 'd_weight', 'd_loss', 'logits_real', 'logits_fake', 'd_grad_norm']
        if process.compile:
            self.compile()
        self.adversarial, self.graph, self.warm_steps = False, None, 0
        self.reset()

    def reset(self):
        """A new row of the log begins: the sums over its steps, and which of them were skipped."""
        self.count, self.totals = 0, torch.zeros(len(self.names), device=self.process.device)
        self.skipped, self.broken_step = self.totals[0].long(), self.totals[0].long()
        self.broken = self.totals.bool()                           # terms, at the first one skipped

    def compile(self):
        """Compile in place, so that names in checkpoints stay clean, and part by part, so that all
        layers of the flow share one graph, compiled once."""
        # Part by part, DDP can also send some gradients while others are computed. Dynamo's
        # splitter, which cuts one big graph for that, fails on checkpointing in older torch.
        torch._dynamo.config.optimize_ddp = False
        parts = [m for m in self.model.flow.modules() if isinstance(m, Layer)]
        if isinstance(self.model.vae, VAE):                        # cutting patches is no work
            parts += [self.model.vae.encoder, self.model.vae.decoder]
        if self.config.lpips:
            parts.append(self.lpips)
        if self.config.gan:
            parts.append(self.disc)
        for part in parts:
            part.compile(fullgraph=True, dynamic=False)

    def train_step(self, image, y, lr, replaced=0):
        """One optimisation step on this process's images (b, 3, H, W) uint8, `replaced` of them
        stand-ins for unreadable ones, and classes (b,)."""
        c, process = self.config, self.process
        image = image.to(process.device, non_blocking=True, memory_format=torch.channels_last)
        y = y.to(process.device, non_blocking=True)
        noise, y = draw_noise(c, self.classes, self.step, y, process)
        if self.adversarial != (c.gan > 0 and self.step >= c.gan_start):
            self.adversarial = not self.adversarial
            self.graph, self.warm_steps = None, 0                  # a step now computes more
        if self.can_replay() and not self.graph:
            self.capture(image, y, noise)
        if self.graph:
            terms = self.graph.replay(image, y, noise)
        else:
            terms = self.gradients(image, y, noise)
        # `update` averages over processes, which makes this the sum.
        terms['replaced'] = torch.full_like(terms['loss'], replaced * process.world)
        self.update(terms, lr)

    def gradients(self, image, y, noise):
        """Gradients of a step, image (b, 3, H, W) uint8, y (b,), noise (b, T, D) -> terms."""
        self.drop_gradients()
        micro = len(y) // self.config.grad_accum
        values = []
        for i in range(0, len(y), micro):
            part = slice(i, i + micro)
            for ddp in self.ddps:                                  # DDP syncs after the last only
                ddp.require_backward_grad_sync = i + micro == len(y)
            values.append(self.backward(from_uint8(image[part]), y[part], noise[part]))
        return {name: torch.stack([v[name] for v in values]).mean() for name in values[0]}

    def drop_gradients(self):
        for opt in self.optimizers():
            opt.zero_grad(set_to_none=True)

    def optimizers(self):
        opts = list(self.opts.values())
        return opts + [self.disc_opt] if self.adversarial else opts

    def can_replay(self):
        """Can a step be one CUDA graph? Not before its parts are compiled, not in several
        processes, not where the prior keeps sums of its own or draws random numbers. (Nor where a
        Python number, such as sigma, changes by step: a graph would keep its first value.)"""
        process = self.process
        return (process.compile and process.device.type == 'cuda' and process.world == 1
                and not isinstance(self.model.flow, (VPFlow, SiT)) and self.warm_steps >= 2)

    def capture(self, image, y, noise):
        """Make `graph`, if that is possible."""
        self.release()
        try:
            self.graph = StepGraph(self.gradients, image, y, noise)
        except RuntimeError as e:
            self.warm_steps = -math.inf                            # do not try again
            self.process.print('no CUDA graph, so operations are launched one by one: '
                               f'{str(e).splitlines()[0]}')

    def release(self):
        """Give back the graph's memory, and that of gradients, which only the next step needs."""
        self.graph = None
        self.drop_gradients()
        if self.process.device.type == 'cuda':
            torch.cuda.empty_cache()

    def backward(self, image, y, noise):
        """Gradients of one micro-batch, image (b, 3, H, W) in [-1, 1], y (b,), noise (b, T, D), and
        its terms by name.

        L1, LPIPS and GAN are functions of `pixels`, the reconstruction cut off from the networks
        that made it. Their gradients there are added up, and one backward pass takes the sum on
        through decoder, latents and encoder, together with the flow's loss.
        """
        c, terms = self.config, {}
        with self.process.autocast():
            recon, nll, entropy, mu, *projected = self.ddp(image, y, noise)
            pixels = recon.detach().requires_grad_(True)
            error = pixels - image
            terms['l1'], terms['l2'] = error.abs().mean(), error.square().mean()
            rec = c.l1 * terms['l1'] + c.l2 * terms['l2']
            if c.lpips:
                terms['lpips'] = self.lpips(pixels, image).mean()
                rec = rec + c.lpips * terms['lpips']
            if c.align:
                terms['align'] = alignment(*projected, self.teacher(image))
        terms['nll'], terms['entropy'] = nll.mean(), entropy.mean()
        terms['mu_std'] = variance(mu.detach()).sqrt()
        flow_loss = c.rate * (terms['nll'] - terms['entropy'])
        if c.align:
            flow_loss = flow_loss + c.repa_weight * terms['align']
        terms['loss'] = rec + flow_loss
        grad, = torch.autograd.grad(rec, pixels)                   # (B, 3, H, W)
        if self.adversarial:
            weight, grad_gan = self.adversary(image, recon, pixels, grad, terms)
            grad = grad + weight * grad_gan
            terms['loss'] = terms['loss'] + weight * terms['gan']
        roots, grads = [], []
        if recon.requires_grad:                                    # else pixels, or --freeze vae
            roots.append(recon)
            grads.append(grad / c.grad_accum)
        if flow_loss.requires_grad:                                # else no flow, frozen encoder
            roots.append(flow_loss / c.grad_accum)
            grads.append(None)                                     # it is a scalar
        torch.autograd.backward(roots, grads)
        return {name: value.detach() for name, value in terms.items()}

    def adversary(self, image, recon, pixels, grad_rec, terms):
        """Compute the discriminator's gradients -> the generator's weight and d gan / d recon.
        pixels is recon as a leaf, grad_rec = d rec / d recon; all are (b, 3, H, W) but the weight.
        """
        c = self.config
        self.disc.requires_grad_(False)                            # no gradients of its weights
        with self.process.autocast():
            terms['gan'] = -self.disc(pixels).float().mean()
        grad_gan, = torch.autograd.grad(terms['gan'], pixels)
        self.disc.requires_grad_(True)
        weight = torch.full_like(terms['gan'], c.gan)
        if c.gan_adaptive:
            last = self.model.vae.conv_out.weight
            rec_at_last, = torch.autograd.grad(recon, last, grad_rec, retain_graph=True)
            gan_at_last, = torch.autograd.grad(recon, last, grad_gan, retain_graph=True)
            weight *= adaptive_weight(rec_at_last, gan_at_last)
        with self.process.autocast():                              # one forward: DDP allows no two
            logits = self.disc_ddp(torch.cat([image, pixels.detach()])).float()
        real, fake = logits.chunk(2)
        terms['d_loss'] = hinge(real, fake)
        (terms['d_loss'] / c.grad_accum).backward()
        terms |= {'d_weight': weight, 'logits_real': real.mean(), 'logits_fake': fake.mean()}
        return weight, grad_gan

    @torch.no_grad()
    def update(self, terms, lr):
        """Clip, step, average. If a term is not finite on some process, all of them skip the step:
        weights and optimizers stay as they are. The host never waits for a GPU."""
        c = self.config
        terms['grad_norm'] = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        if self.adversarial:
            terms['d_grad_norm'] = nn.utils.clip_grad_norm_(self.disc.parameters(), c.clip)
        zero = torch.zeros_like(terms['loss'])                     # of what is not on yet
        values = torch.stack([terms.get(name, zero) for name in self.names]).float()
        self.process.mean(values)                                  # bad for one is bad for all
        broken = ~torch.isfinite(values)
        skip = broken.any()
        is_first = skip & (self.skipped == 0)
        self.broken = torch.where(is_first, broken, self.broken)
        self.broken_step = torch.where(is_first, self.step, self.broken_step)
        for opt in self.opts.values():
            for group in opt.param_groups:
                group['lr'] = lr
        for opt in self.optimizers():
            opt.found_inf = skip.float()                           # fused kernels skip if it is 1,
            if self.process.device.type != 'mps' or not skip:      # but a Mac's does not look
                opt.step()
        # No gate here: in a skipped step the average may well move closer to the weights.
        ema, now = list(self.ema.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(ema, now, 1 - ema_decay(c, self.step))
        if isinstance(self.model.flow, VPFlow):
            self.model.flow.track(self.process.mean, skip)
        for average, value in zip(self.ema.buffers(), self.model.buffers()):
            average.copy_(value)                                   # running means already
        self.totals = torch.where(skip, self.totals, self.totals + values)
        self.skipped = self.skipped + skip
        self.lost = torch.where(skip, self.lost + 1, 0)
        self.step, self.count = self.step + 1, self.count + 1
        self.warm_steps += 1

    def row(self):
        """Terms since the last row, averaged over the steps that were not skipped; `replaced` and
        `skipped` are counts. Prints what was skipped; SystemExit if all steps of the last rows were
        skipped, HOPELESS or more of them. Waits for the device."""
        skipped = self.skipped.item()
        good, replaced = self.count - skipped, self.totals[self.names.index('replaced')].item()
        lost = 0 if good else self.lost.item()
        if skipped:
            names = ' and '.join(n for n, bad in zip(self.names, self.broken.tolist()) if bad)
            said = f'{names} infinite or NaN at step {self.broken_step.item()}'
            if lost >= HOPELESS:
                sys.exit(1 if self.process.rank else
                         f'error: {said}, and none of the last {lost} steps was finite; run the '
                         'same command with a lower --lr, which resumes ckpt.pt if there is one, '
                         'or give another --out')
            self.process.print(f'{said}: skipped {skipped} of {self.count} steps')
        row = dict(zip(self.names, (self.totals / good).tolist()))
        row |= {'replaced': round(replaced), 'skipped': skipped}
        self.reset()
        return row

    def start_from(self, state):
        """Take a checkpoint's averaged weights: those of its codec and, if kind and shape agree, of
        its prior -> a sentence that says what was taken. Positions of another resolution are
        resampled. UserError if the codecs differ, or no weights fit."""
        was, taken = state['config'], []
        options = CODEC_OPTIONS
        if was['codec'] == 'pixels':                               # where the rest means nothing
            options = ['codec', 'latent_dim', 'vae_patch']
        differs = [f'--{k} {show(was[k])}' for k in options if was[k] != getattr(self.config, k)]
        require(not differs, f'--init {self.config.init} was trained with {", ".join(differs)}; '
                'use that, too, or another checkpoint')
        parts = ['vae']
        if all(was[k] == getattr(self.config, k) for k in ('prior', 'heads', 'layers')):
            parts.append('flow')
        for part in parts:
            own = getattr(self.model, part).state_dict()
            new = {name: state['ema'].get(f'{part}.{name}') for name in own}
            for name, table in new.items():
                # A square grid, if rotated by 180 degrees in blocks that read backwards.
                if name.split('.')[-1] in ('pos', 'variance') and table is not None:
                    new[name] = resample_grid(table[None], math.isqrt(len(own[name])))[0]
            if own and all(v is not None and v.shape == own[k].shape for k, v in new.items()):
                for model in (self.model, self.ema):
                    getattr(model, part).load_state_dict(new)
                taken.append(part)
        if not taken or 'vae' not in taken and self.model.vae.state_dict():
            raise UserError(f'--init {self.config.init} has no weights that fit; use the --width, '
                            '--heads and --layers that it was trained with, or another checkpoint')
        return f'starting from {self.config.init}: {" and ".join(taken)}'

    @torch.no_grad()
    def measure_std(self, image):
        """Divide latents by their std over a batch (b, 3, H, W) uint8 from now on. STARFlow and LDM
        do so; of a frozen encoder once is enough."""
        added, moments = self.model.vae.sigma, []                  # the noise is not divided
        with self.process.autocast(), torch.compiler.set_stance('force_eager'):
            for part in image.chunk(self.config.grad_accum):
                mu, sigma = self.model.vae.encode(from_uint8(part.to(self.process.device)))
                second = (mu.square() + sigma.square() - added ** 2).mean()
                moments.append(torch.stack([mu.mean(), second]))
        moments = torch.stack(moments).mean(0)
        self.process.mean(moments)
        std = (moments[1] - moments[0].square()).sqrt()
        for model in (self.model, self.ema):
            model.vae.std.copy_(std)
        self.process.print(f'latents of std {std.item():.4g} are divided by it')

    def parts(self):
        """-> name -> what has a state_dict"""
        parts = {'model': self.model, 'ema': self.ema} | self.opts
        if self.config.gan:
            parts |= {'disc': self.disc, 'disc_opt': self.disc_opt}
        return parts

    def state(self):
        """Tensors and plain containers only."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        return state | {'step': self.step, 'totals': self.totals, 'count': self.count,
                        'skipped': self.skipped, 'broken': self.broken,
                        'broken_step': self.broken_step}

    def load(self, state):
        """Restore what `state` returned; learning rates or --lpips may have changed since."""
        for name, part in self.parts().items():
            saved = state[name]
            if isinstance(part, torch.optim.Optimizer):            # as configured, not as saved
                now = part.state_dict()['param_groups']
                saved['param_groups'] = [new | {'params': old['params']}
                                         for old, new in zip(saved['param_groups'], now)]
            part.load_state_dict(saved)
        self.step = state['step']
        if len(state['totals']) == len(self.names):                # else the averages start anew
            self.count = state['count']
            for name in ('totals', 'skipped', 'broken', 'broken_step'):      # older ones lack three
                setattr(self, name, state.get(name, getattr(self, name)).to(self.process.device))


def variance(mu):
    """(b, T, D) -> variance over images, its mean over (T, D); 0 for a single image"""
    return mu.var(0).mean() if len(mu) > 1 else mu.new_zeros(())


class StepGraph:
    """A step's gradients as one CUDA graph, since a small model's operations take longer to launch,
    one by one, than to compute. Gradients and terms stay where the graph puts them."""

    def __init__(self, gradients, image, y, noise):
        self.inputs = image.clone(), y.clone(), noise.clone()
        self.graph = torch.cuda.CUDAGraph()
        # Captured on the stream of the steps before, to which autograd ties the sums of gradients.
        # Threads that load data go on meanwhile.
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream(),
                              capture_error_mode='thread_local'):
            self.terms = gradients(*self.inputs)

    def replay(self, image, y, noise):
        for own, new in zip(self.inputs, (image, y, noise)):
            own.copy_(new)
        self.graph.replay()
        return dict(self.terms)


def build_optimizers(model, config, dtype):
    """-> the name in checkpoints -> optimizer. While its `found_inf` is 1, a step must leave
    weights and state alone, the first step too."""
    hidden = hidden_weights(model) if config.optimizer == 'muon' else []
    own = {id(weight) for weight, _ in hidden}
    others = [p for p in model.parameters() if id(p) not in own]
    opts = {'opt': adamw(others, config.lr, (0.9, config.beta2), config.weight_decay)}
    if hidden:
        opts['muon'] = Muon(hidden, config.lr, dtype)
    return opts


def adamw(weights, lr, betas, weight_decay=0.0):
    trained = [w for w in weights if w.requires_grad]
    return torch.optim.AdamW(trained, lr, betas, weight_decay=weight_decay, fused=True)


def hidden_weights(model):
    """-> pairs (weight, number of matrices stacked in it) of what Muon trains: matrices of the
    flow's layers, and convolutions with at least 16 channels both in and out."""
    pairs = []
    for module in model.modules():
        if isinstance(module, Layer):
            pairs += [(module.attn.qkv.weight, 3), (module.attn.proj.weight, 1),
                      (module.mlp[0].weight, 1), (module.mlp[2].weight, 1)]
        elif isinstance(module, nn.Conv2d) and min(module.weight.shape[:2]) >= 16:
            pairs.append((module.weight, 1))
    return [(weight, parts) for weight, parts in pairs if weight.requires_grad]


class Muon(torch.optim.Optimizer):
    """Momentum, its matrices orthogonalised, so that a step moves all directions equally far
    (Jordan et al. 2024, kellerjordan.github.io/posts/muon). No weight decay.

    weights: pairs of `hidden_weights`; a convolution is the matrix (out, in * k * k).  dtype: of
    the products.  A step is about as long as AdamW's, so that learning rates fit (Liu et al. 2025,
    arXiv:2502.16982).  found_inf: a tensor; 1 skips the step, as torch's fused optimizers do.
    """
    MOMENTUM = 0.9                                                 # 0.95 there: see RESULTS.md

    def __init__(self, weights, lr, dtype):
        groups = {}                                                # of one shape: one product each
        for weight, parts in weights:
            group = groups.setdefault((weight.shape, parts), {'params': [], 'parts': parts})
            group['params'].append(weight)
        super().__init__(list(groups.values()), {'lr': lr})
        self.dtype, self.found_inf = dtype, torch.zeros((), device=weights[0][0].device)

    @torch.no_grad()
    def step(self):
        skip = self.found_inf > 0
        for group in self.param_groups:
            weights, parts = group['params'], group['parts']
            grad = torch.stack([w.grad for w in weights])          # (n, parts * rows, ...)
            grad = grad.flatten(2).unflatten(1, (parts, -1)).flatten(0, 1)
            state = self.state[weights[0]]                         # of the whole group
            if not state:
                state['momentum'] = torch.zeros_like(grad)         # (n * parts, rows, columns)
            old = state['momentum']
            new = old.lerp(grad, 1 - self.MOMENTUM)
            state['momentum'] = torch.where(skip, old, new)
            step = orthogonalize(grad.lerp(new, self.MOMENTUM), self.dtype)      # Nesterov's
            step = step * (0.2 * math.sqrt(max(grad.shape[1:])))
            step = torch.where(skip, 0, step).reshape(len(weights), *weights[0].shape)
            torch._foreach_add_(weights, list(step), alpha=-group['lr'])


def orthogonalize(matrices, dtype):
    """(n, rows, columns) -> the same, float32, all singular values between about 0.7 and 1.2: five
    steps of Newton and Schulz by the quintic of Jordan et al."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices                          # the smaller products
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.mT if tall else x).float()


# ----------------------------------------------------------------------------------- files and logs

def save(trainer, data):
    """Process 0 writes the checkpoint, and the others wait; UserError on all if it can't, or if
    weights that seem broken would replace better ones."""
    if trainer.saved and trainer.lost >= HOPELESS:
        raise UserError(f'none of the last {trainer.lost.item()} steps was finite, so '
                        f'{trainer.config.out}/ckpt.pt stays that of step {trainer.saved}; run the '
                        'same command with a lower --lr, or give another --out')
    trainer.process.on_rank_0(write_checkpoint, trainer, data)
    trainer.saved = trainer.step


def write_checkpoint(trainer, data):
    """Atomic: a kill at any moment leaves the old checkpoint or the new one, never half of either.
    UserError if it can't be written, as on a full disk."""
    path = target = os.path.join(trainer.config.out, 'ckpt.pt')
    state = trainer.state() | {'config': dataclasses.asdict(trainer.config),
                               'dtype': trainer.process.dtype_name,
                               'class_names': data.class_names, 'images': len(data)}
    try:
        with whole(path, path + '.tmp') as temporary, open(temporary, 'wb') as f:
            torch.save(state, f)
        if is_due(trainer.config.keep_interval, trainer.step):
            target = os.path.join(trainer.config.out, f'ckpt_{trainer.step:07d}.pt')
            with whole(target) as kept:
                link_or_copy(path, kept)
    except (OSError, RuntimeError) as e:                           # the latter is torch's
        raise UserError(f'{target} could not be written at step {trainer.step} '
                        f'({str(e).splitlines()[0]}); once it can be, the same command resumes '
                        'from the last checkpoint, if there is one')


def link_or_copy(path, copy):
    """A second name for the same file takes no time and no room; not all file systems know it."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)


def resume(trainer, data):
    """Go on from --out/ckpt.pt if there is one; UserError if it is of another run, or if not all
    processes find the same."""
    path = os.path.join(trainer.config.out, 'ckpt.pt')
    # Mapped, the file would stay open, as optimizers on a CPU keep the tensors that they are given.
    mapped = trainer.process.device.type != 'cpu'
    saved = load_checkpoint(path, mmap=mapped) if os.path.exists(path) else None
    step = saved['step'] if saved else 0
    if trainer.process.max(step) != -trainer.process.max(-step):   # all notice, so none hangs
        raise UserError(f'{path} is not there on some machine, or older than on another; --out '
                        'must be one folder that all of them see')
    if not saved:
        return
    require('model' in saved, f'{path} holds averaged weights alone (sample.py --export), which '
            'cannot be resumed; start from it by --init, with another --out')
    was, now = saved['config'], dataclasses.asdict(trainer.config)
    for options in (was, now):                                     # a teacher's file may move
        options['repa'] = os.path.basename(options['repa'])
    differs, changed = differences(saved, now, trainer.process, data)
    require(not differs, f'{path} was trained with {", ".join(differs)}; use those settings to '
            'resume it, or another --out for a new run')
    try:
        trainer.load(saved)
        trainer.saved = trainer.step
    except (KeyError, ValueError, RuntimeError) as e:
        raise UserError(f'{path} does not hold what its options say ({str(e).splitlines()[0]}); '
                        'use the version that trained it, or another --out')
    trainer.process.print(f'resuming {path} at step {trainer.step}' + ''.join(changed))
    trainer.config.init = was['init']


def differences(saved, now, process, data):
    """-> how a checkpoint differs from options `now` and these data: in settings that define the
    run, and in others"""
    was, differs, changed = saved['config'], [], []
    for k in now:
        old, new = [show(value) if value not in ('', ()) else "''" for value in (was[k], now[k])]
        if old == new:
            continue
        if k in FIXED_OPTIONS and (now['align'] or not k.startswith('repa')):
            differs.append(f'--{k} {old} (now {new})')
        elif k not in ('init', 'dtype'):
            changed.append(f', --{k} {old} -> {new}')
    if saved['class_names'] != data.class_names:
        differs.append(f'{len(saved["class_names"])} classes (now {len(data.class_names)}, or '
                       'other names)')
    if ('disc' in saved) != bool(now['gan']):
        differs.append(f'--gan {was["gan"]} (now {now["gan"]})')
    # Older checkpoints don't say theirs; they were made when a CPU's default was float32.
    dtype = process.dtype_name
    default = 'float32' if process.device.type == 'cpu' else dtype
    before = saved.get('dtype') or was['dtype'] or default
    if before != dtype:
        changed.append(f', --dtype {before} -> {dtype}')
    if now['init'] and os.path.abspath(now['init']) != os.path.abspath(was['init']):
        changed.append(', not from --init, which is for a new --out')
    if saved.get('images', len(data)) != len(data):
        changed.append(f', {saved["images"]} -> {len(data)} images, in a new order')
    return differs, changed


class Log:
    """log.csv: a row every log_interval steps. As long as this process has it open, no other run
    can have it: UserError."""

    def __init__(self, path):
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        self.file = open(path, 'a+', newline='', errors='replace')
        try:
            if fcntl:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f'another run is writing to {os.path.dirname(path)}; wait for it, end '
                            'it, or give this one another --out')
        except OSError:                                            # a file system without locks
            pass

    def start(self, columns, step):
        """Keep the rows up to `step`. What can't be read, as after a power cut, is dropped."""
        self.file.seek(0)
        *lines, _ = self.file.read().replace('\0', '').split('\n')          # whole lines only
        table = [line.strip().split(',') for line in lines] or [[]]
        rows = [dict(zip(table[0], row)) for row in table[1:] if len(row) == len(table[0])]
        self.rows = [row for row in rows if row.get('step', '').isdecimal()
                     and int(row['step']) <= step]
        if self.rows:                                              # terms that are off keep theirs
            columns = columns + [name for name in self.rows[0] if name not in columns]
        self.file.truncate(0)
        self.writer = csv.DictWriter(self.file, columns, extrasaction='ignore')
        self.writer.writeheader()
        self.writer.writerows(self.rows)
        self.file.flush()

    def write(self, row):
        row = {k: f'{v:.6g}' if isinstance(v, float) else str(v) for k, v in row.items()}
        self.rows.append(row)
        self.writer.writerow(row)
        self.file.flush()

    def draw(self, path):
        """The curves of PANELS as a PNG, without the first rows, which would flatten the rest."""
        panels = []
        for names in PANELS:
            curves = {}
            for name in names.split():
                points = [(number(row['step']), number(row[name])) for row in self.rows
                          if row.get(name)]
                points = [p for p in points[len(points) // 10:] if math.isfinite(p[1])]
                if any(value for _, value in points):              # not of terms that are off
                    curves[name] = points
            if curves:
                panels.append(np.asarray(plot(curves, 'step', '')))
        if panels:
            grid(np.stack(panels), 2).save(path)


def number(text):
    try:
        return float(text)
    except ValueError:                                             # the file was damaged
        return math.nan


# Of log.png: terms of one size share one.
PANELS = ('l1 l2 lpips', 'nll val_nll', 'mu_std val_mu_std', 'val_psnr', 'grad_norm', 'd_loss gan')


CFG = 2.0                                                          # of guided pictures
HELD_OUT = 512                                                     # images, or one micro-batch


@torch.no_grad()
def validate(trainer, held):
    """Held-out images under the averaged weights -> their nll in nats per latent dimension, less
    0.5 log(2 pi), the PSNR of decode(mu + sigma * noise) in dB, and the std of mu over images."""
    c, process, model = trainer.config, trainer.process, trainer.ema
    trainer.release()                                              # memory is needed here
    size = c.batch_size // c.grad_accum
    steps = max(1, min(len(held), HELD_OUT) // size)
    torch.manual_seed(mix_seed(DIFFUSION, c.seed, 0, process.rank, 1))        # not as in training
    g = generator(process.device, RECON, c.seed)
    values = []
    # Of a few images one that is unreadable may be more than 1%.
    for image, y, _ in batches(held, c.image_size, size, c.seed, False, 0, steps, process.rank,
                               process.world, limit=1.0):
        image, y = from_uint8(image.to(process.device)), y.to(process.device)
        noise = torch.randn(size, *model.flow.shape, generator=g, device=process.device)
        with process.autocast():
            recon, nll, _, mu = model(image, y, noise.chunk(process.world)[process.rank])[:4]
        quality = psnr((recon.clamp(-1, 1) + 1) / 2, (image + 1) / 2)
        values.append(torch.stack([nll.mean(), quality.mean(), variance(mu)]))
    values = torch.stack(values).mean(0)
    process.mean(values)
    nll, quality, var = values.tolist()
    return {'val_nll': nll, 'val_psnr': quality, 'val_mu_std': math.sqrt(var)}


def save_pictures(trainer, data, log):
    """samples_*.png: EMA weights, noise that never changes, a row for each of up to ten classes; at
    the right the same, guided. recon_*.png: originals above the raw model's reconstructions of
    them, noise and all. log.png. Every process draws its share of the samples."""
    config, process, step = trainer.config, trainer.process, trainer.step
    trainer.release()                                              # memory is needed here
    rows = min(10, trainer.classes) or 4
    labels = (torch.arange(rows) * trainer.classes // rows).repeat_interleave(8)
    # Without activations to keep, 8 times as many images fit as in a step.
    micro = config.batch_size // process.world // config.grad_accum
    share = min(math.ceil(len(labels) / process.world), 8 * micro)
    ema = with_weights_in(process.dtype, trainer.ema)
    halves = []
    for cfg in (0.0, CFG) if trainer.classes else (0.0,):
        drawn = sample_images(ema, labels, config.seed, process, share, cfg)
        halves.append(np.concatenate(list(gather_images(drawn, process))))
    if process.rank:
        return
    log.draw(os.path.join(config.out, 'log.png'))
    halves = np.stack([grid(half, 8) for half in halves])
    grid(halves, 2).save(os.path.join(config.out, f'samples_{step:07d}.png'))
    pixels, *_ = next(batches(data, config.image_size, 16, config.seed, flip=False, start=0,
                              steps=1))
    noise = torch.randn(16, *trainer.model.flow.shape,
                        generator=generator('cpu', RECON, config.seed))
    # 16 images are another size than a step's, and not worth compiling for.
    with torch.no_grad(), process.autocast(), torch.compiler.set_stance('force_eager'):
        image = from_uint8(pixels.to(process.device))
        x, *_ = trainer.model.latents(image, noise.to(process.device))
        recon = to_uint8(trainer.model.vae.decode(x))
    pair = np.concatenate([pixels.permute(0, 2, 3, 1).numpy(), recon])
    grid(pair, 16).save(os.path.join(config.out, f'recon_{step:07d}.png'))


# --------------------------------------------------------------------------------------------- plan

def total_steps(config, images):
    return config.steps or math.ceil(config.epochs * images / config.batch_size)


def train_flops(config, classes):
    """Floating point operations of VAE and flow for one image, forward and backward; perceptual and
    adversarial networks not counted. Runs on the meta device, which computes shapes only."""
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        model, side = SimFlow(config, classes), config.image_size
        recon, nll, *_ = model(torch.empty(1, 3, side, side), torch.empty(1, dtype=torch.long),
                               torch.empty(1, *model.flow.shape))
        (recon.sum() + nll.sum()).backward()
    return counter.get_total_flops()


def print_plan(config):
    """What would be trained, from sizes alone: takes no memory, downloads nothing. UserError for
    data that are not there."""
    known = {'cifar10': (50_000, 10), 'fashion_mnist': (60_000, 10)}     # opening would download
    if config.data in known or config.data == Config.data and not os.path.exists(config.data):
        images, classes = known.get(config.data, (1_281_167, 1000))
    else:
        data = open_data(config.data)
        images, classes = len(data), len(data.class_names)
    images -= held_out(images, config.holdout)
    with torch.device('meta'):
        model = SimFlow(config, classes)
        parts = {'flow': model.flow, 'VAE': model.vae, 'encoder': model.vae.encoder}
        if config.gan:
            parts['discriminator'] = Discriminator(config.gan_width, config.gan_layers)
    world, steps = processes(), total_steps(config, images)
    rows = {f'{name} parameters': f'{sum(p.numel() for p in part.parameters()):,}'
            for name, part in parts.items()}
    flops = train_flops(config, classes)
    gpu_hours = flops * steps * config.batch_size / (SHARE * PEAK['H100']) / 3600
    rows |= {'tokens': f'{config.tokens} of {config.latent_dim} channels',
             'data': f'{images:,} images, {classes} classes',
             'batch': f'{config.batch_size} = {world} processes x {config.grad_accum} '
                      f'micro-batches x {config.batch_size // world // config.grad_accum} images',
             'steps': f'{steps:,} = {steps * config.batch_size / images:.1f} epochs',
             'FLOPs per image': f'{flops:.3g} (forward and backward)',
             'hours on H100s': f'{gpu_hours / world:,.1f}, on {world} of them at {SHARE:.0%} of '
                               'their peak; see RESULTS.md',
             'memory': 'python tests/memory.py with the same options tells it'}
    print('\n'.join(f'{name:26}{value}' for name, value in rows.items()))


# ----------------------------------------------------------------------------------------- the loop

class Interrupt:
    """Ctrl-C, SIGTERM, a closed terminal (SIGHUP) and the warnings of schedulers (SIGUSR1, SIGUSR2)
    end the run after the step they come in, with a checkpoint; a second signal ends it at once.
    torchrun hands on the first three, the others if told to, and waits 30 s (RESULTS.md, Recipes).
    """
    NAMES = 'SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'    # Windows lacks the last three

    def __init__(self):
        self.signal, self.time = 0, 0.0
        for number in [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]:
            # Under nohup, a closed terminal is no reason to end.
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        # The same signal within a second may be the scheduler's again, passed on by torchrun.
        again = number == self.signal and time.monotonic() < self.time + 1
        if self.signal and not (again and number != signal.SIGINT):
            os._exit(128 + number)                                 # waits for nobody
        self.signal, self.time = number, time.monotonic()


class Meter:
    """Where the time goes: images per second, share spent waiting for data, FLOP utilisation; and
    how much of the GPU's memory was needed."""

    def __init__(self, config, classes, process):
        self.cuda = process.device.type == 'cuda'
        known = self.cuda and process.dtype == torch.bfloat16
        name = torch.cuda.get_device_name() if known else ''
        peak = max([flops for gpu, flops in PEAK.items() if gpu in name], default=0)
        self.peak = 0.0                                            # images/s at an MFU of 1
        if peak:
            self.peak = peak * process.world / train_flops(config, classes)
        self.batch_size = config.batch_size
        self.reset()

    def reset(self):
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def row(self):
        """Since the last reset; the peak of memory since the start. Empty where not known."""
        seconds = time.perf_counter() - self.start
        rate = self.steps * self.batch_size / seconds
        row = {'images_per_s': rate, 'data_wait': self.waited / seconds, 'mfu': '', 'peak_gb': ''}
        if self.peak:
            row['mfu'] = rate / self.peak
        if self.cuda:
            row['peak_gb'] = torch.cuda.max_memory_allocated() / 1e9
        self.reset()
        return row


TIMING = ['images_per_s', 'data_wait', 'mfu', 'peak_gb']
VALIDATION = ['val_nll', 'val_psnr', 'val_mu_std']


def open_log(path, rank):
    return Log(path) if rank == 0 else None


def write_row(trainer, log, meter, lr, steps, held):
    """Averages since the last row, and what images `held` out say, if any, to the log and to the
    terminal."""
    row = {'step': trainer.step} | trainer.row() | {'lr': lr} | meter.row()
    measured = validate(trainer, held) if held else {}
    row |= measured
    if log:
        log.write(row)
    names = [*trainer.names, *measured, 'images_per_s', 'data_wait', 'peak_gb']
    shown = [f'{name} {row[name]:.4g}' for name in names if row[name]]
    left = (steps - trainer.step) * trainer.config.batch_size / row['images_per_s']
    if 0 < left < 1e9:
        shown.append(f'left {datetime.timedelta(seconds=round(left))}')
    trainer.process.print('  '.join([f'step {trainer.step}/{steps}', *shown]))


def is_due(interval, step):
    """0: never"""
    return interval > 0 and step % interval == 0


def save_if_due(trainer, data, last):
    """last: the run ends here. Else weights that may be broken, as a step was just skipped, don't
    replace better ones."""
    c, step = trainer.config, trainer.step
    due = is_due(c.save_interval, step) or is_due(c.keep_interval, step)
    if last or due and not (trainer.saved and trainer.lost):
        save(trainer, data)


def train(config, data, process):
    """Train to the end, to --stop_at or to a signal -> the signal's number, or 0. UserError if
    --out holds another run, SystemExit if no step is finite any more."""
    data, held = hold_out(data, config.holdout)
    check_held_out(held, config)
    steps = total_steps(config, len(data))
    last = min(steps, config.stop_at or steps)
    trainer = Trainer(config, len(data.class_names), process)
    if config.init and not os.path.exists(os.path.join(config.out, 'ckpt.pt')):
        initialise(trainer, data)
    # Much can go wrong up to here, so nothing has been written to --out yet.
    log = process.rank_0_first(open_log, os.path.join(config.out, 'log.csv'), process.rank)
    resume(trainer, data)
    if trainer.step >= last:
        process.print(f'step {trainer.step} of {last} is done: there is nothing to train')
    if log:
        columns = ['step', *trainer.names, 'skipped', 'lr', *TIMING]
        log.start(columns + (VALIDATION if len(held) else []), trainer.step)
    meter, interrupt = Meter(config, trainer.classes, process), Interrupt()
    feed, stopped = training_batches(trainer, data, last), 0
    # None: no bar where there is no terminal
    with tqdm(total=steps, initial=trainer.step, disable=True if process.rank else None) as bar:
        while trainer.step < last and not stopped:
            lr = learning_rate(config, trainer.step, steps)
            image, y, replaced = next_batch(trainer, data, meter, feed)
            trainer.train_step(image, y, lr, replaced)
            bar.update()
            stopped = process.max(interrupt.signal)
            done, ends = trainer.step == steps, trainer.step == last
            draws = is_due(config.sample_interval, trainer.step)
            # A kill may follow a signal, so the save does not wait for validation or pictures.
            validates = len(held) > 0 and (done or (draws and not stopped))
            if validates or done or is_due(config.log_interval, trainer.step):
                write_row(trainer, log, meter, lr, steps, held if validates else None)
            save_if_due(trainer, data, last=stopped or ends)
            if draws or ends and config.sample_interval:
                save_pictures(trainer, data, log)
                meter.reset()                                      # this, and validation, took time
    return stopped


def check_out(config):
    """UserError if --out lies in the folder --data, where its pictures would be taken for data."""
    if config.data in BUILT_IN:
        return
    data, out = [os.path.join(os.path.realpath(path), '') for path in (config.data, config.out)]
    require(not (os.path.isdir(data) and out.startswith(data)), f'--out {config.out} lies in '
            f'--data {config.data}, where its pictures would be taken for data; name another place')


def check_held_out(held, config):
    """UserError now, not at the first measurement, if no image can be read."""
    try:
        if len(held):
            next(batches(held, config.image_size, 1, config.seed, False, 0, 1, limit=1.0))
    except UserError as e:
        raise UserError(f'of those that --holdout keeps, {e}')


def next_batch(trainer, data, meter, feed):
    """The feed's next batch. If that fails in any process, all of them save the steps so far, and
    end."""
    batch, error, start = None, None, time.perf_counter()
    try:
        batch = next(feed)
    except (UserError, RuntimeError, OSError) as e:                # the second of a killed loader
        error = e
    meter.waited += time.perf_counter() - start
    meter.steps += 1
    if trainer.process.max(int(error is not None)):
        if trainer.step > trainer.saved:
            save(trainer, data)
        raise error or UserError("another process can't go on; it says why")
    return batch


def training_batches(trainer, data, last):
    c, process = trainer.config, trainer.process
    flip = data.mirror if c.flip is None else c.flip
    return batches(data, c.image_size, c.batch_size, c.seed, flip, trainer.step, last,
                   process.rank, process.world, c.workers, process.device.type == 'cuda')


def initialise(trainer, data):
    """Start from the weights in --init and, with --unit_std, measure the latents' std."""
    c, process = trainer.config, trainer.process
    process.print(trainer.start_from(load_checkpoint(c.init, '--init', mmap=True)))
    if c.unit_std and trainer.model.vae.std == 1:                  # else --init had it done
        image, *_ = next(batches(data, c.image_size, c.batch_size, c.seed, flip=False, start=0,
                                 steps=1, rank=process.rank, world=process.world))
        trainer.measure_std(image)


def main(argv):
    config = parse_options(Config, argv, 'Train SimFlow.', PRESETS)
    config.check()
    if config.dry_run:
        return print_plan(config)
    process = find_process(config.device, config.dtype, config.compile, training=True)
    if process.compile:
        process.compile = can_compile(process, asked=config.compile)
    check_out(config)
    data = process.rank_0_first(open_data, config.data)
    for note in data.notes:
        process.print(note)
    process.print(f'{len(data):,} images, {len(data.class_names)} classes; '
                f'{process.world} x {process.device.type}, {process.dtype_name}'
                f'{", compiled" if process.compile else ""}')
    stopped = train(config, data, process)
    ckpt = os.path.join(config.out, 'ckpt.pt')
    if stopped:
        process.print(f'stopped by {signal.Signals(stopped).name}; the same command resumes from '
                    f'{ckpt}')
        sys.exit(128 + stopped)                                    # for schedulers: not done yet
    process.print(f'make images with: python sample.py --ckpt {shlex.quote(ckpt)}')


if __name__ == '__main__':
    cli(main)
