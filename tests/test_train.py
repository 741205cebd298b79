"""Training as its users meet it: bit-exact resume, one process equals two, interruptions, numbers
that are none."""
import contextlib
import csv
import dataclasses
import functools
import itertools
import os
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
from PIL import Image
import pytest
import torch

from conftest import ROOT
from data import Part, UserError, batches, cli, hold_out, open_data, parse_options
from memory import predict_memory
from model import (PRESETS, RECON, Config, Process, SimFlow, find_process, from_uint8, generator,
                   load_model, sample_images)
from test_data import png, write_folder
import train
from vae import LPIPS, Discriminator

TINY = ('--image_size 16 --vae_width 8 --latent_dim 4 --width 16 --layers 1,1,2 --gan_width 8 '
        '--batch_size 8 --workers 0 --device cpu --dtype float32 --gan 0.1 --holdout 0').split()


def python(*args):
    return [sys.executable, *args]


def torchrun(processes, *args):
    return python('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}',
                  '--', *args)


def run(command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


def read_log(out):
    """Rows without the columns that tell the time."""
    with open(out / 'log.csv', newline='') as f:
        return [{name: value for name, value in row.items() if name not in train.TIMING}
                for row in csv.DictReader(f)]


def same(a, b):
    """Equal bit for bit, all the way down."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ------------------------------------------------------------------------------------------- resume

@pytest.mark.parametrize('extra', [
    ['--gan_adaptive', '0'], ['--gan_start', '3', '--grad_accum', '2'],
    ['--optimizer', 'muon', '--vae_width', '20', '--dtype', 'bfloat16']])
def test_resume_is_bit_exact(tmp_path, monkeypatch, capsys, extra):
    """20 + 20 steps are 40, whatever is cut: the log's averages too, of which one spans the cut and
    a skipped step."""
    spoil(monkeypatch, lambda step: step == 18)
    options = TINY + ['--steps', '40', '--log_interval', '8', '--sample_interval', '0'] + extra
    train.main([*options, '--out', str(tmp_path / 'once')])
    train.main([*options, '--out', str(tmp_path / 'twice'), '--stop_at', '20'])
    assert torch.load(tmp_path / 'twice' / 'ckpt.pt', weights_only=True)['step'] == 20
    train.main([*options, '--out', str(tmp_path / 'twice')])
    once, twice = [torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)
                   for name in ('once', 'twice')]
    for state in (once, twice):
        del state['config']['out']
    parts = {'disc', 'disc_opt', 'ema', 'opt', 'model', 'config', 'class_names', 'step'}
    assert parts <= once.keys()
    assert same(once, twice)
    assert read_log(tmp_path / 'once') == read_log(tmp_path / 'twice')
    assert [row['step'] for row in read_log(tmp_path / 'once')] == ['8', '16', '24', '32', '40']
    assert [row['skipped'] for row in read_log(tmp_path / 'twice')] == ['0', '0', '1', '0', '0']
    said = [line for line in capsys.readouterr().out.splitlines()
            if 'infinite or NaN at step 18: skipped 1 of 8 st' in line]
    assert len(said) == 2 and said[0] == said[1] and 'nll' in said[0]


def test_resume_refuses_a_new_kind_of_run_from_an_old_checkpoint(tmp_path):
    """A checkpoint from before an option existed is of that option's default."""
    options = TINY + ['--steps', '2', '--sample_interval', '0', '--out', str(tmp_path)]
    train.main(options)
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    for name in ('codec', 'noise', 'prior', 'align'):
        del state['config'][name]
    torch.save(state, tmp_path / 'ckpt.pt')
    changes = ('noise', 'slerp'), ('codec', 'learned'), ('prior', 'vp'), ('align', 'forward')
    for name, value in changes:
        more = ['--repa', 'random'] if name == 'align' else []
        with pytest.raises(UserError, match=f'--{name}'):
            train.main([*options, f'--{name}', value, *more])
    train.main([*options, '--repa_block', '2'])                    # of no matter without --align


def log_of(path, columns, step):
    log = train.Log(path)
    log.start(columns, step)
    return log


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / 'log.csv'
    log = log_of(path, ['step', 'loss'], 0)
    for step in (10, 20, 30):
        log.write({'step': step, 'loss': step / 2})
    log = log_of(path, ['step', 'loss', 'new'], 20)
    log.write({'step': 30, 'loss': 99.0, 'new': 1})
    assert path.read_text().split() == ['step,loss,new', '10,5,', '20,10,', '30,99,1']
    log_of(path, ['step', 'loss'], 30).write({'step': 40, 'loss': 1.0})          # a term less
    assert path.read_text().split()[-2:] == ['30,99,1', '40,1,'] and ',new' in path.read_text()


@pytest.mark.parametrize('damage, kept', [
    (b'step,loss\n10,5\n20,1\0\0\0\n\0\0\0\0', ['10,5', '20,1']),
    (b'step,loss\n10,5\n20,10\n20,1', ['10,5', '20,10']),
    (b'step,loss\n10\n,\n\n10,5,9\n20,10\n', ['20,10']),
    (b'name,age\nAda,36\n', []), (b'\xff\xfe\0"\n"', []),
    (b'\0' * 99, [])])
def test_a_damaged_log_stops_nobody(tmp_path, damage, kept):
    path = tmp_path / 'log.csv'
    path.write_bytes(damage)
    log_of(path, ['step', 'loss'], 20)
    assert path.read_text().split() == ['step,loss', *kept]


def test_two_runs_cannot_share_a_folder(tmp_path):
    """The lock is the process's: it goes with it, however it ends."""
    def refused():
        process = multiprocessing.get_context('fork').Process(
            target=lambda: sys.exit(refuses(tmp_path / 'log.csv')))
        process.start()
        process.join()
        return process.exitcode

    log = train.Log(tmp_path / 'log.csv')
    assert refused() == 1
    log.file.close()
    assert refused() == 0


def refuses(path):
    try:
        train.Log(path)
    except UserError as e:
        return int('another run' in str(e))
    return 0


def test_resume_refuses_another_run(tmp_path):
    tmp_path = tmp_path / '100% of it'
    options = TINY + ['--steps', '2', '--sample_interval', '0', '--out', str(tmp_path)]
    train.main(options)
    changes = [(['--width', '32'], '--width 16'), (['--seed', '1'], '--seed 0'),
               (['--gan', '0'], '--gan 0.1'), (['--gan', '0', '--seed', '1'], 'seed.*gan')]
    for change, word in changes:
        with pytest.raises(UserError, match=word):
            train.main(options + change)
    before = (tmp_path / 'ckpt.pt').read_bytes()
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    del state['opt']
    torch.save(state, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match="does not hold what its options say .*'opt'"):
        train.main(options)
    (tmp_path / 'ckpt.pt').write_bytes(before)
    # finished: nothing to do, nothing lost
    train.main(options)
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


class SquaredError(torch.nn.Module):
    """Stands in for LPIPS, whose weights are a download."""

    def forward(self, a, b):
        return (a - b).square().mean((1, 2, 3))


def test_resume_takes_what_may_change_from_the_command_line(tmp_path, monkeypatch):
    """Learning rates are not the checkpoint's; a term may come and go, even between two rows of the
    log."""
    monkeypatch.setattr(train, 'load_lpips', lambda vgg, heads: SquaredError())
    options = TINY + ['--log_interval', '2', '--sample_interval', '0', '--out', str(tmp_path),
                      '--steps']
    train.main([*options, '3', '--lpips', '1'])
    train.main([*options, '4', '--lpips', '0', '--gan_lr', '0.25', '--beta2', '0.5'])
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert state['step'] == 4 and [row['step'] for row in read_log(tmp_path)] == ['2', '3', '4']
    assert state['disc_opt']['param_groups'][0]['lr'] == 0.25
    assert state['opt']['param_groups'][0]['betas'] == (0.9, 0.5)


@pytest.mark.parametrize('error', [
    OSError(28, 'No space left on device'), RuntimeError('unexpected pos 64 vs 0')])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch, error):
    options = TINY + ['--sample_interval', '0', '--out', str(tmp_path), '--steps']
    train.main([*options, '1'])
    before = (tmp_path / 'ckpt.pt').read_bytes()

    def half(state, file):
        file.write(b'half')
        raise error
    monkeypatch.setattr(torch, 'save', half)
    message = f'ckpt.pt could not be written at step 2 .*{error.args[-1]}'
    with pytest.raises(UserError, match=message):
        train.main([*options, '2'])
    assert (tmp_path / 'ckpt.pt').read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'log.csv']


def test_a_folder_that_was_removed_is_made_again(tmp_path, monkeypatch):
    out, step = tmp_path / 'out', train.Trainer.train_step

    def step_and_remove(*args):
        step(*args)
        shutil.rmtree(out, ignore_errors=True)

    monkeypatch.setattr(train.Trainer, 'train_step', step_and_remove)
    train.main([*TINY, '--sample_interval', '0', '--steps', '2', '--out', str(out)])
    assert os.listdir(out) == ['ckpt.pt']


def test_checkpoints_that_are_kept(tmp_path):
    options = TINY + ['--steps', '5', '--keep_interval', '2', '--save_interval', '3',
                      '--sample_interval', '0', '--out', str(tmp_path)]
    train.main(options)
    kept = sorted(path.name for path in tmp_path.glob('ckpt*'))
    assert kept == ['ckpt.pt', 'ckpt_0000002.pt', 'ckpt_0000004.pt']
    steps = [torch.load(tmp_path / name, weights_only=True)['step'] for name in kept]
    assert steps == [5, 2, 4]


def test_another_dtype_is_announced(tmp_path, capsys):
    options = TINY + ['--sample_interval', '0', '--out', str(tmp_path)]
    train.main([*options, '--steps', '1'])
    train.main([*options, '--steps', '2', '--dtype', 'bfloat16'])
    assert 'at step 1, --steps 1 -> 2, --dtype float32 -> bfloat16\n' in capsys.readouterr().out
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    del state['dtype'], state['config']['dtype']                   # older ones; then by default
    torch.save(state, tmp_path / 'ckpt.pt')
    train.main([*options, '--steps', '3', '--dtype', 'bfloat16'])
    assert 'at step 2, --steps 2 -> 3, --dtype float32 -> bfloat16\n' in capsys.readouterr().out


def test_other_data_are_announced(tmp_path, capsys):
    options = TINY + ['--sample_interval', '0', '--out', str(tmp_path / 'out'), '--steps']
    for n in (24, 28):
        for i in range(n):
            (tmp_path / 'images').mkdir(exist_ok=True)
            Image.new('RGB', (16, 16), (9 * i, 0, 0)).save(tmp_path / 'images' / f'{i}.png')
        train.main([*options, str(n), '--data', str(tmp_path / 'images')])
    assert '24 -> 28 images' in capsys.readouterr().out


def test_kill_9_never_costs_the_checkpoint(tmp_path):
    options = TINY + ['--steps', '100000', '--save_interval', '1', '--sample_interval', '0',
                      '--log_interval', '5']
    for _ in range(2):
        process = subprocess.Popen(python('train.py', *options, '--out', str(tmp_path)), cwd=ROOT,
                                   stdout=subprocess.DEVNULL)
        done = train_until(tmp_path, lambda step, start: step > start + 3)
        process.kill()
        process.wait()
        step = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['step']
        assert step >= done
    steps = [int(row['step']) for row in read_log(tmp_path)]
    assert steps == sorted(set(steps))


def train_until(out, reached):
    """Wait for a checkpoint whose step satisfies reached(step, step at the first look) -> that
    step"""
    start, path = None, out / 'ckpt.pt'
    old = path.stat().st_mtime_ns if path.exists() else 0
    for _ in range(9000):
        time.sleep(0.1)
        if path.exists() and path.stat().st_mtime_ns > old:
            step = torch.load(path, weights_only=True)['step']
            start = step if start is None else start
            if reached(step, start):
                return step
    raise AssertionError('no progress')


@pytest.fixture
def handlers():
    """The test may change how signals are handled, and finds them as in a terminal, even under
    nohup."""
    numbers = [getattr(signal, name) for name in train.Interrupt.NAMES]
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield numbers
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def test_every_signal_asks_for_an_end_and_a_second_one_does_not_wait(handlers, monkeypatch):
    codes = []
    monkeypatch.setattr(os, '_exit', codes.append)
    for number in handlers:
        interrupt = train.Interrupt()
        signal.raise_signal(number)
        assert interrupt.signal == number and not codes
        # torchrun's echo of a scheduler's
        if number != signal.SIGINT:
            signal.raise_signal(number)
            assert not codes
            interrupt.time -= 2
        signal.raise_signal(number)
        assert codes.pop() == 128 + number
        signal.raise_signal(signal.SIGINT)                         # another one never waits
        assert codes.pop() == 128 + signal.SIGINT


def test_nohup_is_respected(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt = train.Interrupt()
    signal.raise_signal(signal.SIGHUP)
    assert not interrupt.signal


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_end(tmp_path, number, code):
    """Sent to the whole process group, loading processes and all, as a terminal or a scheduler
    does."""
    options = TINY + ['--steps', '100000', '--save_interval', '1', '--sample_interval', '0',
                      '--workers', '1']
    process = subprocess.Popen(python('train.py', *options, '--out', str(tmp_path)), cwd=ROOT,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    done = train_until(tmp_path, lambda step, start: step > start)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=900)
    assert process.returncode == code and 'command resumes from' in out and 'Traceback' not in err
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['step'] >= done


# ---------------------------------------------------------------------------- numbers that are none

def spoil(monkeypatch, bad):
    """Let the noise of each step that `bad` says be NaN."""
    def spoiled(config, classes, step, y, process, draw=train.draw_noise):
        noise, y = draw(config, classes, step, y, process)
        return noise * (float('nan') if bad(step) else 1), y
    monkeypatch.setattr(train, 'draw_noise', spoiled)


def test_a_run_ends_when_a_whole_interval_was_skipped(tmp_path, monkeypatch, capsys):
    """One bad step at 1, and from 6 on nothing else; a row every 4 steps. What is due to be saved
    after a bad step may be broken, and replaces nothing better."""
    spoil(monkeypatch, lambda step: step == 1 or step >= 6)
    with pytest.raises(SystemExit, match='nll.* at step 8, and none of the last 6 steps') as e:
        train.main([*TINY, '--steps', '99', '--save_interval', '4', '--sample_interval', '0',
                    '--log_interval', '4', '--out', str(tmp_path)])
    assert 'lower --lr' in str(e.value.code)
    said = capsys.readouterr().out
    assert 'at step 1: skipped 1 of 4 steps' in said and 'at step 6: skipped 2 of 4 steps' in said
    assert [row['skipped'] for row in read_log(tmp_path)] == ['1', '2']
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert state['step'] == 4 and all(value.isfinite().all() for value in state['model'].values())


def test_a_broken_run_replaces_no_checkpoint(tmp_path, monkeypatch):
    """Not at its end, either: four bad steps in a row are too many, and three prove nothing."""
    spoil(monkeypatch, lambda step: step >= 4)
    command = [*TINY, '--steps', '99', '--sample_interval', '0', '--log_interval', '99',
               '--out', str(tmp_path)]
    for stop in ('4', '7'):
        train.main([*command, '--stop_at', stop])
    with pytest.raises(UserError, match='none of the last 4 steps .* stays that of step 7'):
        train.main([*command, '--stop_at', '11'])
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['step'] == 7
    train.main([*command[:-1], f'{tmp_path}/new', '--stop_at', '9'])       # there is no better one
    assert torch.load(tmp_path / 'new' / 'ckpt.pt', weights_only=True)['step'] == 9


def test_pictures_never_become_data(tmp_path, monkeypatch):
    data = write_folder(tmp_path / 'data', {'1.png': png('red')})
    with pytest.raises(UserError, match='lies in --data'):
        train.main([*TINY, '--data', data, '--out', f'{data}/out'])
    train.check_out(Config(data=data, out=f'{data}_out'))
    monkeypatch.chdir(tmp_path)
    os.mkdir('shapes')
    train.check_out(Config(data='shapes', out='shapes'))           # the data are built in


def test_a_few_skipped_steps_end_no_run(tmp_path, monkeypatch):
    """With a row for each step, two bad ones in a row are two rows without numbers."""
    spoil(monkeypatch, lambda step: step in (1, 2))
    train.main([*TINY, '--steps', '4', '--save_interval', '0', '--sample_interval', '0',
                '--log_interval', '1', '--out', str(tmp_path)])
    rows = read_log(tmp_path)
    assert [row['skipped'] for row in rows] == ['0', '1', '1', '0']
    assert [row['loss'] == 'nan' for row in rows] == [False, True, True, False]


def test_data_that_fail_cost_no_steps(tmp_path, monkeypatch):
    def failing(*args):
        yield from itertools.islice(feed(*args), 3)
        raise UserError('a hundred images in a row are unreadable')
    feed = train.training_batches
    monkeypatch.setattr(train, 'training_batches', failing)
    with pytest.raises(UserError, match='a hundred'):
        train.main([*TINY, '--steps', '9', '--sample_interval', '0', '--out', str(tmp_path)])
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['step'] == 3
    before = (tmp_path / 'ckpt.pt').read_bytes()                   # without a step there is no save
    monkeypatch.setattr(train, 'training_batches', lambda *args: failing_at_once())
    with pytest.raises(UserError, match='a hundred'):
        train.main([*TINY, '--steps', '9', '--lr', '9', '--out', str(tmp_path)])
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


def failing_at_once():
    raise UserError('a hundred images in a row are unreadable')
    yield


# ---------------------------------------------------------------------------------------- schedules

def test_learning_rate():
    """Stage I constant, stage II cosine (Table 9)."""
    c = Config()
    rates = [train.learning_rate(c, step, 1000) for step in range(1000)]
    assert rates[:501] == [1e-4] * 501
    assert all(a > b for a, b in zip(rates[500:], rates[501:]))
    assert rates[750] == pytest.approx((1e-4 + 1e-6) / 2, rel=1e-3)
    assert rates[-1] == pytest.approx(1e-6, rel=1e-2)


def test_ema_is_warmed_up_and_is_the_recursion(tmp_path):
    options = [*TINY, '--steps', '3', '--ema', '0.3', '--sample_interval', '0',
               '--out', str(tmp_path), '--stop_at']
    train.main([*options, '1', '--save_interval', '1'])
    path, name = tmp_path / 'ckpt.pt', 'vae.conv_out.bias'
    ema = torch.load(path, weights_only=True)['ema'][name]
    for step in (1, 2):
        train.main([*options, str(step + 1)])
        state = torch.load(path, weights_only=True)
        decay = min(0.3, (1 + step) / (10 + step))
        ema = decay * ema + (1 - decay) * state['model'][name]
        torch.testing.assert_close(state['ema'][name], ema)


def test_warm_up():
    rates = [train.learning_rate(Config(warmup=4), step, 1000) for step in range(6)]
    assert rates == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4, 1e-4])


def test_the_adversary_starts_at_its_step(tmp_path):
    train.main([*TINY, '--gan_start', '2', '--steps', '4', '--log_interval', '1',
                '--sample_interval', '0', '--out', str(tmp_path)])
    assert [float(row['d_loss']) > 0 for row in read_log(tmp_path)] == [False, False, True, True]


def test_as_many_classes_are_dropped_as_asked():
    argv = '--batch_size 4000 --class_drop 0.2 --image_size 8 --device cpu'.split()
    config, y = parse_options(Config, argv, '', PRESETS), torch.arange(4000) % 10
    _, kept = train.draw_noise(config, 10, 0, y, find_process('cpu'))
    assert 0.17 < (kept == 10).float().mean() < 0.23
    assert torch.equal(kept[kept < 10], y[kept < 10])


def test_every_step_has_random_numbers_of_its_own():
    config, draws = parse_options(Config, TINY, '', PRESETS), []
    for seed, step in (0, 0), (0, 1), (1, 0), (0, 0):
        noise, _ = train.draw_noise(dataclasses.replace(config, seed=seed), 10, step,
                                    torch.zeros(8).long(), find_process('cpu'))
        draws.append((noise.sum().item(), torch.rand(()).item()))  # the latter is diffusion's
    assert draws[0] == draws[3] and all(len(set(column)) == 3 for column in zip(*draws))


# --------------------------------------------------------------------------------------------- Muon

def slow_muon(weight, grads, parts, lr):
    """By the definition, in float64, one matrix after the other: weight after these gradients."""
    weight = weight.double().clone()
    for part in range(parts):
        rows = len(weight) // parts
        own = weight[part * rows:(part + 1) * rows]
        momentum = 0
        for grad in grads:
            g = grad[part * rows:(part + 1) * rows].double().flatten(1)
            momentum = 0.9 * momentum + 0.1 * g
            x = 0.1 * g + 0.9 * momentum
            x = x / x.norm()
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x - 4.775 * a @ x + 2.0315 * a @ a @ x
            own -= lr * 0.2 * max(x.shape) ** 0.5 * x.view_as(own)
    return weight


def test_muon_is_its_definition():
    """Against float64. 15 products of float32, each with a relative error of about 1e-6 for sums of
    some ten numbers, amplified at most 3.4445 times in each of 5 steps where a singular value is
    small: 1e-6 * 3.4445^5 = 5e-4 of a step."""
    model = SimFlow(parse_options(Config, TINY + ['--vae_width', '20'], '', PRESETS), 10)
    pairs = train.hidden_weights(model)
    assert {parts for _, parts in pairs} == {1, 3} and {w.dim() for w, _ in pairs} == {2, 4}
    before = [weight.detach().clone() for weight, _ in pairs]
    muon = train.Muon(pairs, 0.1, torch.float32)
    g = torch.Generator().manual_seed(0)
    grads = [[torch.randn(w.shape, generator=g) for w, _ in pairs] for _ in range(3)]
    for step in grads:
        for (weight, _), grad in zip(pairs, step):
            weight.grad = grad
        muon.step()
        muon.found_inf = torch.ones(())                            # is to be as if it never was
        for weight, _ in pairs:
            weight.grad = torch.full_like(weight, float('nan'))
        muon.step()
        muon.found_inf = torch.zeros(())
    for i, (weight, parts) in enumerate(pairs):
        slow = slow_muon(before[i], [step[i] for step in grads], parts, 0.1)
        length = (slow - before[i]).abs().max()
        assert (weight - slow).abs().max() < 1e-3 * length


def test_what_muon_trains():
    """Neither adaLN, heads, embeddings, norms, biases, the flow's first layers, nor convolutions to
    or from few channels."""
    argv = ['--vae_width', '16', '--latent_dim', '15']
    model = SimFlow(parse_options(Config, argv, '', PRESETS), 10)
    own = {id(weight) for weight, _ in train.hidden_weights(model)}
    names = {name for name, p in model.named_parameters() if id(p) in own}
    flow = {name for name in names if name.startswith('flow.')}
    assert len(flow) == 4 * sum(PRESETS['nano']['layers'])
    assert all('.attn.' in name or '.mlp.' in name for name in flow)
    vae = {name for name, p in model.vae.named_parameters() if p.dim() == 4}
    assert {f'vae.{name}' for name in vae} - names == {
        name for name, p in model.named_parameters() if p.dim() == 4 and 15 in p.shape[:2]}
    assert not any(name.endswith('bias') for name in names)


# ---------------------------------------------------------------------------------- held-out images

def test_held_out_images_are_never_trained_on_and_always_the_same():
    data = open_data('shapes')
    train_part, held = hold_out(data, 0.02)
    assert len(train_part) + len(held) == len(data) and len(held) == 0.02 * len(data)
    assert not set(train_part.index) & set(held.index)
    assert (hold_out(data, 0.02)[1].index == held.index).all()
    assert set(held.labels) == set(data.labels)
    i = held.index[3]
    assert held.load(3).tobytes() == data.load(i).tobytes() and held.labels[3] == data.labels[i]
    nothing = hold_out(data, 0)
    assert [len(part) for part in nothing] == [len(data), 0]
    assert len(hold_out(Part(data, np.arange(1)), 0.5)[0]) == 1    # something is left to train on


def test_an_unreadable_image_held_out_stops_nobody(tmp_path):
    """One of two: 1% of all, but half of them."""
    (tmp_path / 'images').mkdir()
    for i in range(200):
        Image.new('RGB', (16, 16), (i, 0, 0)).save(tmp_path / 'images' / f'{i:03d}.png')
    data = open_data(str(tmp_path / 'images'))
    broken = hold_out(data, 0.005)[1].name(0)
    (tmp_path / 'images' / broken).write_bytes(b'no image')
    options = TINY + ['--steps', '2', '--sample_interval', '1', '--data', str(tmp_path / 'images')]
    train.main([*options, '--holdout', '0.01', '--out', str(tmp_path / 'out')])
    assert all(row['val_nll'] for row in read_log(tmp_path / 'out'))
    # but all that are held out, at once, not at the first measurement
    with pytest.raises(UserError, match=broken):
        train.main([*options, '--holdout', '0.005', '--out', str(tmp_path / 'two')])
    assert not (tmp_path / 'two').exists()


def test_what_held_out_images_say(tmp_path):
    """nll, PSNR and std of mu are those of the model that was saved, and log.png is drawn."""
    options = TINY + ['--steps', '6', '--log_interval', '4', '--sample_interval', '3',
                      '--holdout', '0.0005', '--out', str(tmp_path)]
    train.main(options)
    rows = read_log(tmp_path)
    assert [row['step'] for row in rows] == ['3', '4', '6']
    assert [row['val_nll'] != '' for row in rows] == [True, False, True]
    model, config, _ = load_model(tmp_path / 'ckpt.pt')
    held = hold_out(open_data('shapes'), 0.0005)[1]
    assert len(held) == 50
    noise = generator('cpu', RECON, 0)
    nll, psnr, variance = [], [], []
    for image, y, _ in batches(held, 16, 8, 0, flip=False, start=0, steps=6):
        image = from_uint8(image)
        recon, n, _, mu = model(image, y, torch.randn(8, *model.flow.shape, generator=noise))
        nll.append(n)
        mse = (recon.clamp(-1, 1) - image).square().mean((1, 2, 3))
        psnr.append(10 * torch.log10(4 / mse))
        variance.append(mu.var(0).mean())
    row = rows[-1]
    assert float(row['val_nll']) == pytest.approx(torch.cat(nll).mean().item(), rel=1e-4)
    assert float(row['val_psnr']) == pytest.approx(torch.cat(psnr).mean().item(), rel=1e-4)
    assert float(row['val_mu_std']) == pytest.approx(
        torch.stack(variance).mean().sqrt().item(), rel=1e-4)
    assert Image.open(tmp_path / 'log.png').size == (1440, 1440)      # six panels, by two


def test_no_image_that_is_held_out_is_trained_on(tmp_path, monkeypatch):
    parts, feed = [], train.training_batches
    monkeypatch.setattr(train, 'training_batches', lambda trainer, data, last:
                        parts.append(data) or feed(trainer, data, last))
    train.main([*TINY, '--holdout', '0.001', '--steps', '1', '--sample_interval', '0',
                '--out', str(tmp_path)])
    held = hold_out(open_data('shapes'), 0.001)[1]
    assert len(parts[0]) == 99_900 and not set(parts[0].index) & set(held.index)


def test_another_holdout_is_another_run(tmp_path):
    """Else images that were trained on would be measured on."""
    options = TINY + ['--steps', '1', '--sample_interval', '0', '--out', str(tmp_path)]
    train.main(options)
    with pytest.raises(UserError, match='--holdout 0.0'):
        train.main([*options, '--holdout', '0.1'])


def test_flip_wins_over_what_the_data_allow(monkeypatch):
    monkeypatch.setattr(train, 'batches', lambda *args: args[4])

    def asked(flip, mirror):
        trainer = SimpleNamespace(config=Config(flip=flip), step=0, process=find_process('cpu'))
        return train.training_batches(trainer, SimpleNamespace(mirror=mirror), 1)
    cases = (None, True), (None, False), (False, True), (True, False)
    assert [asked(*case) for case in cases] == [True, False, False, True]


# -------------------------------------------------------------------------------- files and options

def test_what_a_run_leaves(tmp_path):
    train.main([*TINY, '--steps', '4', '--log_interval', '2', '--sample_interval', '2',
                '--out', str(tmp_path)])
    pictures = [f'{kind}_{step:07d}.png' for kind in ('recon', 'samples') for step in (2, 4)]
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'log.csv', 'log.png', *pictures]
    # one row per class, guided ones at the right
    assert Image.open(tmp_path / 'samples_0000004.png').size == (2 * 8 * 16, 10 * 16)
    originals = np.asarray(Image.open(tmp_path / 'recon_0000004.png'))[:16]
    assert originals.shape == (16, 16 * 16, 3) and originals.std() > 10
    row = read_log(tmp_path)[-1]
    nano = PRESETS['nano']
    loss = float(row['nll']) + nano['l1'] * float(row['l1']) + nano['l2'] * float(row['l2'])
    loss += float(row['d_weight']) * float(row['gan'])
    # the weight times the term is averaged as a product
    assert float(row['loss']) == pytest.approx(loss, rel=0.05)
    model, config, class_names = load_model(tmp_path / 'ckpt.pt')
    assert config.sigma == 0.5 and len(class_names) == 10
    names = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['model'].keys()
    assert not any(word in name for name in names for word in ('module.', '_orig_mod.'))


def test_unlabelled_data(tmp_path):
    folder = tmp_path / 'flat'
    folder.mkdir()
    for i in range(10):
        Image.fromarray(np.full((20, 20, 3), 25 * i, np.uint8)).save(folder / f'{i}.png')
    train.main([*TINY, '--data', str(folder), '--steps', '2', '--sample_interval', '2',
                '--out', str(tmp_path / 'out')])
    assert load_model(tmp_path / 'out' / 'ckpt.pt')[2] == []


@pytest.mark.parametrize('size', ['nano', 'starflow', 'XXL_repa'])
def test_dry_run(size, capsys):
    """Of the large sizes three layers, which tell as much."""
    fewer = [] if 'data' in PRESETS[size] else ['--layers', '1,1,1']
    train.main(['--model', size, '--dry_run', '1', '--init', 'later.pt', *fewer])
    plan = capsys.readouterr().out
    for word in ('flow parameters', 'VAE parameters', 'tokens', 'batch', 'steps',
                 'FLOPs per image', 'hours on H100s'):
        assert word in plan
    assert 'data' in PRESETS[size] or '1000 classes' in plan and '800,730 = 160.0 epochs' in plan


@functools.cache
def predicted(*extra):
    options = ['--lpips', '1', '--gan', '0.1', '--dtype', 'float32', '--layers', '1,2',
               '--optimizer', 'adamw', *extra]
    config = parse_options(Config, options, '', PRESETS)
    return config, predict_memory(config, 10)


@pytest.mark.parametrize('extra', [
    (), ('--grad_ckpt', '1'), ('--grad_accum', '2'), ('--gan', '0', '--lpips', '0'),
    ('--optimizer', 'muon')])
def test_predicted_memory_is_that_of_a_real_step(extra):
    """Fake tensors, whose sizes their own mode keeps, against what the profiler sees the allocator
    hand out."""
    config, parts = predicted(*extra)
    trainer = train.Trainer(config, 10, Process(torch.device('cpu'), torch.float32, False), LPIPS())
    batch = torch.zeros(32, 3, 32, 32, dtype=torch.uint8), torch.zeros(32, dtype=torch.long)
    trainer.train_step(*batch, lr=0.0)                             # makes Adam's state
    for opt in trainer.optimizers():
        opt.zero_grad()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        trainer.train_step(*batch, lr=0.0)
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events()
              if e.name() == '[memory]']
    peak = np.cumsum([size for _, size in sorted(events, key=lambda e: e[0])]).max()
    assert parts['gradients'] + parts['activations'] == pytest.approx(peak, rel=0.1)


def test_predicted_memory_by_use():
    (config, parts), (_, ckpt) = predicted(), predicted('--grad_ckpt', '1')
    _, double = predicted('--batch_size', '64')
    model, disc = SimFlow(config, 10), Discriminator(config.gan_width, config.gan_layers)
    numbers = [sum(p.numel() for p in module.parameters()) for module in (model, disc, LPIPS())]
    assert parts['parameters'] == 4 * sum(numbers)
    states = 4 * (3 * numbers[0] + 2 * numbers[1])
    assert parts['average and Adam'] == pytest.approx(states, rel=0.01)
    assert ckpt['activations'] < 0.8 * parts['activations']
    assert double['activations'] == pytest.approx(2 * parts['activations'], rel=0.25)
    several = predict_memory(dataclasses.replace(config, batch_size=64), 10, world=2)
    assert several['gradients'] == 4 * sum(numbers[:2])            # in buckets that are never freed
    assert several['activations'] == pytest.approx(parts['activations'], rel=0.05)
    half = predict_memory(dataclasses.replace(config, dtype='bfloat16'), 10)
    assert 0.4 < half['activations'] / parts['activations'] < 1


@pytest.mark.parametrize('argv, word', [
    (['--batch_size', '7', '--grad_accum', '2'], '--batch_size'),
    (['--data', 'nowhere'], 'nowhere'), (['--model', 'S'], 'imagenet/train'),
    (['--stpes', '3'], '--stpes'), (['--device', 'cuda:7'], '--device')])
def test_mistakes_end_in_one_sentence(argv, word, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['train.py', *argv])
    with pytest.raises(SystemExit) as e:
        cli(train.main)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and word in err
    assert err.startswith('error: ') and err.count('\n') == 1 and not out


def trained(count):
    """-> a trainer after some steps of a small model with a GAN from step 4 on"""
    options = ['--gan', '0.1', '--gan_start', '4', '--layers', '1,1', '--batch_size', '4']
    config = parse_options(Config, options, '', PRESETS)
    trainer = train.Trainer(config, 10, Process(torch.device('cpu'), torch.float32, False))
    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        image = torch.randint(256, (4, 3, 32, 32), generator=g, dtype=torch.uint8)
        trainer.train_step(image, torch.randint(10, (4,), generator=g), 1e-3)
    return trainer


def steps(count):
    """-> its weights, and its log row"""
    trainer = trained(count)
    return trainer.model.state_dict(), trainer.row()


def test_betas_of_the_discriminator():
    config = parse_options(Config, TINY + ['--gan_beta1', '0.5', '--gan_beta2', '0.9'], '', PRESETS)
    trainer = train.Trainer(config, 10, find_process('cpu'))
    assert trainer.disc_opt.param_groups[0]['betas'] == (0.5, 0.9)


def test_pictures_are_of_the_average_a_class_per_row(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train, 'sample_images', lambda model, labels, *rest:
                        drawn.append((model, labels)) or sample_images(model, labels, *rest))
    train.main([*TINY, '--steps', '2', '--sample_interval', '2', '--out', str(tmp_path)])
    model, labels = drawn[0]
    ema = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['ema']
    assert all(torch.equal(value, ema[name]) for name, value in model.state_dict().items())
    assert labels.view(10, 8).T.tolist() == 8 * [list(range(10))]


def test_steps_leave_no_graph_behind():
    """It would grow with every step."""
    trainer = trained(2)
    kept = [*trainer.ema.parameters(), trainer.totals, trainer.skipped]
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in kept)


def test_a_replayed_step_is_a_step(monkeypatch):
    """As a CUDA graph does, replay reads its own copies of the inputs and writes terms where they
    were, without Python's help: the rest of the step must not keep or change what lies there. The
    GAN's start needs another graph."""
    plain = steps(8)
    captured = []

    class Graph:
        def __init__(self):
            captured.append(self)

    init = train.StepGraph.__init__

    def init_and_rerun(self, gradients, image, y, noise):
        def replay():
            for name, value in gradients(*self.inputs).items():
                self.terms[name].copy_(value)
        init(self, gradients, image, y, noise)
        # whoever asks before a copy gets nonsense
        for own in self.inputs:
            own.zero_()
        self.graph.replay = replay

    monkeypatch.setattr(train.StepGraph, '__init__', init_and_rerun)
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Graph)
    monkeypatch.setattr(torch.cuda, 'graph', lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: None)
    monkeypatch.setattr(train.Trainer, 'can_replay', lambda self: self.warm_steps >= 2)
    replayed = steps(8)
    assert len(captured) == 2
    assert all(torch.equal(a, replayed[0][name]) for name, a in plain[0].items())
    assert plain[1] == replayed[1]


def test_a_step_that_cannot_be_captured_is_launched(monkeypatch, capsys):
    plain = steps(3)
    monkeypatch.setattr(train.Trainer, 'can_replay', lambda self: self.warm_steps >= 1)
    launched = steps(3)                                            # there is no CUDA here
    assert 'no CUDA graph' in capsys.readouterr().out
    assert all(torch.equal(a, launched[0][name]) for name, a in plain[0].items())
