"""TARFlow and SiT equal their released code: golden numbers of golden_peers.py."""
import os

import numpy as np
import pytest
import torch

import golden_peers as golden
from flow import GUIDANCE, SiT
from model import load_model
import sample

IMAGE, NOISE, CLASS, X, TIME = [value[:2] for value in golden.inputs()]


@pytest.fixture(scope='module')
def expected():
    return np.load(os.path.join(golden.FOLDER, 'peers.npz'))


def released(tmp_path, kind):
    """A checkpoint as ml-tarflow writes it -> SimFlow, Config, class names, path"""
    classes = 0 if kind == 'unlabelled' else golden.CLASSES
    state = golden.random_state(golden.tarflow_layout(classes, kind == 'vp'), seed=1)
    if kind != 'vp':
        state['var'] = torch.ones(golden.TOKENS, golden.DIM)
    path = str(tmp_path / 'afhq_model_4_128_2_2_0.07.pth')
    torch.save(state, path)
    return *load_model(path), path


def agree(ours, theirs, scale=1.0):
    """Products of float32 matrices (eps 6e-8) over up to 512 terms are off by about 6e-8 sqrt(512)
    = 1.4e-6 of their size; 12 of them follow each other in a block, and two blocks do, the second
    reading what the first made: some 3e-5, and the largest of thousands of normal errors is 4 times
    that. Token by token, an error in one goes into all later ones, through gains of about 1: scale
    10."""
    theirs = torch.from_numpy(theirs)
    assert (ours - theirs).abs().max() < 1.4e-4 * scale * theirs.std()


@pytest.mark.parametrize('kind', ['tarflow', 'unlabelled', 'vp'])
@torch.no_grad()
def test_tarflow_forward(kind, tmp_path, expected):
    model, config, names, _ = released(tmp_path, kind)
    assert (config.sigma, config.image_size, config.vae_patch) == (0.07, golden.IMAGE, golden.PATCH)
    assert len(names) == (0 if kind == 'unlabelled' else golden.CLASSES)
    x, _ = model.vae.encode(IMAGE)
    y = CLASS if names else torch.zeros_like(CLASS)
    z, logdet = model.flow(x, y)
    agree(z, expected[f'{kind}_z'])
    theirs = torch.from_numpy(expected[f'{kind}_logdet'])          # a mean over (T, D)
    torch.testing.assert_close(logdet / x[0].numel(), theirs, rtol=1.4e-4, atol=1e-5)
    if names:
        null, _ = model.flow(x, torch.full_like(y, golden.CLASSES))
        agree(null, expected[f'{kind}_null_z'])


@pytest.mark.parametrize('kind, theirs, ours', [
    ('tarflow', 'plain', None), ('tarflow', 'flat', 'tarflow_flat'),
    ('tarflow', 'annealed', 'tarflow'), ('unlabelled', 'temperature', 'tarflow_tau'),
    ('vp', 'plain', None), ('vp', 'flat', 'tarflow_flat'), ('vp', 'annealed', 'tarflow')])
@torch.no_grad()
def test_tarflow_reverse(kind, theirs, ours, tmp_path, expected):
    model, _, names, _ = released(tmp_path, kind)
    y = CLASS if names else torch.zeros_like(CLASS)
    how = (1.5, GUIDANCE[ours]) if ours else ()
    image = model.vae.decode(model.flow.sample(NOISE, y, *how))
    agree(image, expected[f'{kind}_{theirs}'], scale=10)


def test_a_released_tarflow_samples(tmp_path, capsys):
    """sample.py takes the file as it is; --denoise is TARFlow's last step."""
    *_, path = released(tmp_path, 'tarflow')
    images = {}
    for denoise in '01':
        out = str(tmp_path / f'{denoise}.npz')
        sample.main(['--ckpt', path, '--num_samples', '3', '--cfg', '1', '--denoise', denoise,
                     '--out', out, '--device', 'cpu'])
        images[denoise] = np.load(out)['arr_0'].astype(int)
    difference = np.abs(images['0'] - images['1'])
    assert images['0'].shape == (3, 16, 16, 3) and 0 < difference.mean() < 20


@torch.no_grad()
def test_sit(expected):
    net = SiT(4, 16, 32, 2, (1, 1), golden.CLASSES)
    agree(net.pos, expected['sit_pos'])
    theirs = golden.random_state(golden.sit_layout(), seed=2)
    names = {'x_embedder.proj': 'proj_in', 't_embedder.mlp': 'time', 'blocks': 'layers',
             'y_embedder.embedding_table': 'classes', 'final_layer.linear': 'proj_out',
             'final_layer.adaLN_modulation.1': 'ada', 'adaLN_modulation.1': 'ada',
             'mlp.fc1': 'mlp.0', 'mlp.fc2': 'mlp.2'}
    state = {'pos': net.pos}
    for name, value in theirs.items():
        for long, short in names.items():
            name = name.replace(long, short)
        state[name] = value.flatten(1) if value.dim() == 4 else value
    net.load_state_dict(state)
    x = X.flatten(2).transpose(1, 2)                               # (B, T, D)
    for name, y in (('sit', CLASS), ('sit_null', torch.where(CLASS == 1, golden.CLASSES, CLASS))):
        agree(net.velocity(x, TIME, y), expected[name].reshape(2, 4, 16).transpose(0, 2, 1))
