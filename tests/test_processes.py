"""The same numbers however they are computed: by one process or two, in micro-batches, recomputed,
compiled."""
import copy
import json
import os

import numpy as np
from PIL import Image
import pytest
import torch

from conftest import ROOT
from data import parse_options
from model import PRESETS, Config, find_process, from_uint8
from test_data import png, write_folder
from test_train import TINY, python, read_log, run, same, torchrun
import train
from vae import LPIPS, hinge
from worker import gradients, make


def small(*extra):
    return [*TINY, '--gan_adaptive', '0', '--vae_mults', '1', *extra]


SIBLINGS = {'learned': ['--codec', 'learned'], 'vp': ['--prior', 'vp'],
            'aligned': '--align forward --repa random --repa_block 2 --repa_width 16'.split()}
JOBS = {'plain': ['gradients', small()], 'accum': ['gradients', small('--grad_accum', '2')],
        'skip': ['skip', TINY + ['--prior', 'vp']]}
JOBS |= {name: ['gradients', small(*extra)] for name, extra in SIBLINGS.items()}


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    """What two processes make of the jobs: name, rank -> answer"""
    folder = tmp_path_factory.mktemp('jobs')
    (folder / 'jobs.json').write_text(json.dumps(JOBS))
    result = run(torchrun(2, os.path.join(ROOT, 'tests', 'worker.py'), str(folder)))
    assert result.returncode == 0, result.stderr
    return lambda name, rank=0: torch.load(folder / f'{name}.{rank}', weights_only=True)


@pytest.fixture(scope='module')
def plain():
    return gradients(small())


def assert_same_gradients(a, b):
    """To rounding, in every parameter. One that cancels is held against its fellows, of the same
    part of the network: float32 has eps 6e-8, the longest sums (over a batch's pixels) have about
    1e4 terms, and come through some 20 layers that add their own; all of the terms rounded the same
    way would be 6e-4, a random walk 6e-6. Between them: 1e-4."""
    assert a.keys() == b.keys()
    part = lambda name: name.split('.')[:2]
    for name, grad in a.items():
        scale = max(g.abs().max() for fellow, g in a.items() if part(fellow) == part(name))
        assert (grad - b[name]).abs().max() < 1e-4 * scale, name


@pytest.mark.parametrize('extra', [['--grad_accum', '2'], ['--grad_ckpt', '1']])
def test_same_gradients_however_they_are_computed(plain, extra):
    """VAE, flow and discriminator; fixed adversarial weight. With an adaptive one each part would
    take its own ratio of gradient norms."""
    assert_same_gradients(plain, gradients(small(*extra)))
    # on the discriminator's last bias, real and fake images pull equally hard in opposite
    # directions
    assert [name for name, grad in plain.items() if grad.abs().max() == 0] == ['disc.8.bias']


def test_gradients_in_bfloat16_are_near(plain):
    """Some 20 layers round to 2^-9 of their values, forward and backward: a random walk of 40 such
    steps is 1e-2 of a gradient's length. The discriminator's nearly cancels, real against fake."""
    fused = torch.backends.cuda.flash_sdp_enabled()
    try:
        half = gradients(small(), find_process('cpu', 'bfloat16'))
        assert not torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(fused)
    for part, most in ('model.vae', 0.04), ('model.flow', 0.04), ('disc', 0.2):
        pairs = [(grad, half[name]) for name, grad in plain.items() if name.startswith(part)]
        off = sum((a - b).square().sum() for a, b in pairs).sqrt()
        assert 0 < off < most * sum(a.square().sum() for a, _ in pairs).sqrt(), part


@pytest.mark.parametrize('job', ['plain', 'accum'])
def test_two_processes_have_the_gradients_of_one(plain, two_processes, job):
    assert_same_gradients(plain, two_processes(job))


@pytest.mark.parametrize('job', SIBLINGS)
def test_siblings_have_the_same_gradients_in_two_processes(two_processes, job):
    assert_same_gradients(gradients(JOBS[job][1]), two_processes(job))


def test_whole_graphs_have_the_same_gradients(monkeypatch, plain):
    """What Trainer.compile hands over has no graph breaks, and is differentiated right: all of
    torch.compile but the generated code, which takes a minute to build for all parts."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile',
                        lambda self, **how: compile(self, backend='aot_eager', **how))
    assert_same_gradients(plain, gradients(small('--compile', '1')))


def test_compiled_code_has_the_same_gradients(tmp_path, monkeypatch):
    """Generated code, of a flow of pixels: its codec cuts patches, where there is nothing to
    compile (an error for PyTorch). Not taken from a cache, which may hold another processor's."""
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    options = ['--model', 'tarflow', '--image_size', '8', '--layers', '1', '--width', '16',
               '--batch_size', '4']
    assert_same_gradients(gradients(options), gradients([*options, '--compile', '1']))
    assert any(tmp_path.rglob('*.cpp'))


@pytest.mark.parametrize('extra', [
    [], ['--prior', 'vp', '--align', 'reverse', '--repa', 'random', '--gan', '0']])
def test_two_processes_train_and_sample(tmp_path, extra):
    """The whole script under torchrun: the log and the samples are those of one process."""
    options = [*TINY, '--gan_adaptive', '0', '--steps', '3', '--log_interval', '1',
               '--sample_interval', '3', *extra]
    train.main([*options, '--out', str(tmp_path / 'one')])
    result = run(torchrun(2, 'train.py', *options, '--out', str(tmp_path / 'two')))
    assert result.returncode == 0, result.stderr
    for a, b in zip(read_log(tmp_path / 'one'), read_log(tmp_path / 'two'), strict=True):
        # that one is of a process's own images: fewer, so less spread
        shared = [name for name in a if name != 'mu_std']
        expected = pytest.approx([float(a[name]) for name in shared], rel=2e-3, abs=1e-4)
        assert [float(b[name]) for name in shared] == expected
    assert sorted(os.listdir(tmp_path / 'one')) == sorted(os.listdir(tmp_path / 'two'))
    one, two = [torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)['ema']
                for name in ('one', 'two')]
    config = parse_options(Config, options, '', PRESETS)
    start = train.Trainer(config, 10, find_process('cpu')).ema.state_dict()
    # Weights of 0.3 are rounded to 2e-8, and three steps move them by 5e-4: so rounding is 4e-5 of
    # the way. A few, whose gradients cancel, may go anywhere. Without an exchange of gradients the
    # two would be a large part of the way apart.
    if 'flow.variance' in one:                                     # moves much further
        torch.testing.assert_close(two['flow.variance'], one.pop('flow.variance'), rtol=1e-4,
                                   atol=0)
    for part in {name.split('.')[0] for name in one}:              # vae, flow, projectors
        assert way(one, two, part) < 1e-2 * way(one, start, part), part


def way(a, b, part):
    """Distance of two dictionaries of weights, of those of a that are in `part`"""
    return sum((a[n] - b[n]).square().sum() for n in a if n.split('.')[0] == part).sqrt()


def test_a_step_that_is_not_finite_in_one_process_is_left_out_in_all(two_processes):
    """Weights, optimizers, discriminator, averages and the sums for the log, in each of two
    processes."""
    for rank in range(2):
        skipped, left_out = two_processes('skip', rank)
        counters = ('count', 'skipped', 'broken_step')
        assert [skipped.pop(name) for name in counters] == [4, 1, 2]
        assert skipped.pop('broken').any()
        assert [left_out.pop(name) for name in counters] == [3, 0, 0]
        assert not left_out.pop('broken').any()
        assert same(skipped, left_out)
        assert all(value.isfinite().all() for value in skipped['model'].values())


def test_gradients_are_those_of_the_printed_loss():
    """Differentiated at once: rec + nll - gan * logits of the reconstruction; the hinge."""
    fast = gradients(small())
    trainer, image, y = make(small(), find_process('cpu'))
    c, model, disc, image = trainer.config, trainer.model, trainer.disc, from_uint8(image)
    noise, y = train.draw_noise(c, 10, 0, y, trainer.process)
    recon, nll, *_ = model(image, y, noise)
    loss = c.l1 * (recon - image).abs().mean() + c.l2 * (recon - image).square().mean()
    (loss + nll.mean() - c.gan * disc(recon).mean()).backward()
    disc.zero_grad()
    hinge(disc(image), disc(recon.detach())).backward()
    assert_same_gradients(fast, {f'{part}.{name}': p.grad for part in ('model', 'disc')
                                 for name, p in getattr(trainer, part).named_parameters()})


def test_the_adaptive_weight_is_the_ratio_at_the_last_layer():
    trainer, image, y = make([*TINY, '--gan_adaptive', '1', '--grad_accum', '1'],
                             find_process('cpu'))
    c, model, image = trainer.config, trainer.model, from_uint8(image)
    noise, y = train.draw_noise(c, 10, 0, y, trainer.process)
    trainer.adversarial = True
    weight = trainer.backward(image, y, noise)['d_weight']
    recon, *_ = model(image, y, noise)
    rec = c.l1 * (recon - image).abs().mean() + c.l2 * (recon - image).square().mean()
    pulls = [torch.autograd.grad(loss, model.vae.conv_out.weight, retain_graph=True)[0].norm()
             for loss in (rec, trainer.disc(recon).mean())]
    assert weight.item() == pytest.approx((c.gan * pulls[0] / (pulls[1] + 1e-4)).item(), rel=1e-3)


def test_lpips_reaches_the_decoder():
    """It is differentiable in its first argument only."""
    lpips = LPIPS()
    for head in lpips.heads:
        head.data.fill_(1)
    argv = '--gan 0 --l1 0 --l2 0 --rate 0 --lpips 1'.split()
    config = parse_options(Config, TINY + argv, '', PRESETS)
    trainer = train.Trainer(config, 10, find_process('cpu'), lpips)
    trainer.backward(torch.rand(8, 3, 16, 16), torch.zeros(8).long(), torch.zeros(8, 16, 4))
    assert trainer.model.vae.conv_out.weight.grad.abs().sum() > 0


def test_processes_share_what_is_sampled(tmp_path):
    """Five images by two processes, one at a time, are one process's: the folder that each of them
    writes to, and the numbers of evaluate.py, of which each measures its own."""
    out = str(tmp_path)
    train.main([*TINY, '--steps', '2', '--sample_interval', '0', '--out', out])
    options = ['--ckpt', f'{out}/ckpt.pt', '--device', 'cpu', '--batch_size', '1']
    draw = ['sample.py', *options, '--num_samples', '5', '--out']
    measure = ['evaluate.py', *options, '--ref', 'shapes', '--ref_n', '20', '--features', 'random',
               '--num_samples', '11', '--cfg', '1']
    images, rows = [], []
    for launch in python, lambda *command: torchrun(2, *command):
        folder = tmp_path / str(len(rows))
        assert run(launch(*draw, f'{folder}/')).returncode == 0
        files = sorted(folder.rglob('*.png'))
        names = [str(file.relative_to(folder)) for file in files]
        images.append(np.stack([np.asarray(Image.open(file)) for file in files]).astype(int))
        rows.append(json.loads(run(launch(*measure)).stdout.splitlines()[-1])['rows'][0])
        rows[-1].pop('images/s')
    assert len(names) == 5 and abs(images[0] - images[1]).max() <= 1         # of rounding
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)


def test_gradients_are_clipped():
    trainer, image, y = make(small('--clip', '1e-3'), find_process('cpu'))
    trainer.train_step(image, y, lr=0.0)
    for net, name in (trainer.model, 'grad_norm'), (trainer.disc, 'd_grad_norm'):
        norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
        assert norm < 1.01e-3 < trainer.totals[trainer.names.index(name)]


def test_a_rate_of_zero_moves_nothing():
    trainer, image, y = make(small('--optimizer', 'muon', '--vae_width', '20'), find_process('cpu'))
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train_step(image, y, lr=0.0)
    assert 'muon' in trainer.opts and same(before, trainer.model.state_dict())


def test_data_that_fail_in_one_process_cost_no_steps(tmp_path):
    """One says what was wrong, the other that it is not alone, and process 0 saves first."""
    write_folder(tmp_path / 'data', {f'c{i % 2}/{i}.png': b'no image' if i % 24 < 2 else png('red')
                                     for i in range(120)})
    result = run(torchrun(2, 'train.py', *TINY, '--data', f'{tmp_path}/data', '--steps', '50',
                          '--sample_interval', '0', '--seed', '1', '--out', f'{tmp_path}/out'))
    assert 'images are unreadable' in result.stderr and 'RuntimeError' not in result.stderr
    assert torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['step'] > 0
