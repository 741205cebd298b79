"""The teacher, DINOv2: golden numbers of golden_align.py, and what files of weights must be."""
import hashlib
import os

import numpy as np
import pytest
import torch

from data import UserError
import golden_align as golden
import model as simflow
from model import DINOv2, load_teacher, resample_positions
import train


@pytest.fixture(scope='module')
def expected():
    return np.load(os.path.join(golden.FOLDER, 'dinov2.npz'))


@pytest.fixture(scope='module')
def weights():
    return golden.random_state(0, golden.WIDTH, golden.DEPTH)


def save(path, state):
    torch.save(state, path)
    return str(path)


# ----------------------------------------------------------------------------------- timm's numbers

@pytest.mark.parametrize('side', golden.GRIDS)
def test_features_equal_timms(side, weights, expected):
    """Errors are measured in standard deviations of the features. A product of float32 matrices
    (eps = 6e-8) over n terms is off by about eps sqrt(n), in units of its result: 3.3e-6 for the
    longest, n = 3072. Of those 12 follow each other, which makes 1.1e-5; the largest of thousands
    of normal errors is 4 times that, in whatever order a CPU adds."""
    net = DINOv2(golden.WIDTH, golden.DEPTH, golden.WIDTH // 64, side).load(weights)
    with torch.no_grad():
        features = net(golden.pixels(side) / 127.5 - 1)
    mean, std = expected[f'moments{side}']
    assert features.shape == (2, side * side, golden.WIDTH) and features.dtype == torch.float32
    assert np.abs(golden.pick(features).numpy() - expected[f'features{side}']).max() < 5e-5 * std
    assert abs(features.mean() - mean) < 5e-5 * std and abs(features.std() - std) < 5e-5 * std


@pytest.mark.parametrize('side', golden.SIDES)
def test_position_tables_equal_timms(side, expected):
    """Weights come from positions of up to 37, thus off by up to 37 eps; two sums of at most 20
    products, and the weights' normalisation, add as much again: 100 eps of the largest value."""
    table = resample_positions(golden.table(), side)[0]
    rounding = 100 * 6e-8 * golden.table().abs().max().item()
    assert table.shape == (1 + side * side, 2)
    sampled = torch.cat([table[::7], table[-1:]])
    np.testing.assert_allclose(sampled, expected[f'table{side}'], rtol=0, atol=rounding)


def test_names_and_shapes_are_the_releases(expected):
    with torch.device('meta'):
        net = DINOv2(768, 12, 12, side=37)
    state = net.state_dict()
    assert golden.key_hash(state) == expected['keys']
    assert {name: tuple(value.shape) for name, value in state.items()} == golden.layout(768, 12)
    assert {m.eps for m in net.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


# --------------------------------------------------------------------------------- what it computes

def test_tokens_go_row_by_row():
    """A change within one patch changes its own token most."""
    net, image = load_teacher('random', 4), torch.zeros(1, 3, 56, 56)
    for row, column in [(0, 0), (0, 3), (1, 2), (3, 1)]:
        other = image.clone()
        other[:, :, 14 * row:14 * row + 14, 14 * column:14 * column + 14] = 1
        assert (net(other) - net(image)).norm(dim=-1).argmax() == 4 * row + column


def test_any_image_size_gives_the_grid():
    net, image = load_teacher('random', 3), torch.rand(2, 3, 8, 8) * 2 - 1
    large = torch.nn.functional.interpolate(image, (42, 42), mode='bicubic')
    torch.testing.assert_close(net(image), net(large), rtol=1e-4, atol=1e-5)
    assert net(image).shape == (2, 9, 64)


def test_random_teacher_tells_images_and_positions_apart():
    net = load_teacher('random', 16)
    image = torch.from_numpy(golden.images(3, 8, 32)).permute(0, 3, 1, 2) / 127.5 - 1
    features = net(image)
    assert features.std(0).mean() > 0.2 * features.std()           # one position, several images
    assert features.std(1).mean() > 0.2 * features.std()           # one image, several positions
    assert net(torch.zeros(1, 3, 32, 32)).std(1).mean() > 0.1      # by the position table alone


def test_random_teacher_is_the_same_everywhere():
    """Sums of its weights, so that no machine, and no state of torch's generator, gives another
    one."""
    torch.manual_seed(1)
    net, again = load_teacher('random', 8), load_teacher('random', 8)
    weights, others = net.state_dict().values(), again.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(weights, others))
    sums = [net.blocks[1].mlp.fc2.weight.double().sum().item(), net.pos_embed.double().sum().item()]
    assert sums == pytest.approx([22.0985, 1.1641], abs=1e-3)
    finer = load_teacher('random', 16)
    assert torch.equal(net.patch_embed.proj.weight, finer.patch_embed.proj.weight)


def test_teacher_is_frozen():
    net = load_teacher('random', 4)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert not net(torch.zeros(1, 3, 28, 28)).requires_grad


def test_features_stay_float32_under_autocast():
    net = load_teacher('random', 4)
    image = torch.from_numpy(golden.images(3, 2, 32)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.autocast('cpu', torch.bfloat16):
        features = net(image)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, net(image), rtol=0, atol=0.1)


# --------------------------------------------------------------------------------- files of weights

@pytest.mark.parametrize('width, depth', [(128, 3), (384, 1)])
def test_sizes_are_read_from_the_file(tmp_path, width, depth):
    state = golden.random_state(2, width, depth)
    net = load_teacher(save(tmp_path / 'vit.pth', state), 8)
    assert len(net.blocks) == depth and net.blocks[0].heads == width // 64
    assert net.norm.weight.shape == (width,)
    state['pos_embed'] = resample_positions(state['pos_embed'], 8)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


STATE = golden.random_state(2, 64, 1)
WRONG = {
    'a key missing': without(STATE, 'blocks.0.ls1.gamma'),
    'no class token': without(STATE, 'cls_token'),
    'registers': STATE | {'register_tokens': torch.zeros(1, 4, 64)},
    'no square': STATE | {'pos_embed': torch.zeros(1, 1 + 7, 64)},
    'a shape': STATE | {'norm.bias': torch.zeros(65)},
    'SwiGLU': without(STATE, 'blocks.0.mlp.fc1.weight')
              | {'blocks.0.mlp.w12.weight': torch.zeros(4, 64)},
    'wrapped': {'model': STATE}, 'a list': list(STATE.values())}


@pytest.mark.parametrize('name', WRONG)
def test_files_that_are_not_dinov2(tmp_path, name):
    path = save(tmp_path / 'wrong.pth', WRONG[name])
    with pytest.raises(UserError, match='wrong.pth.*--repa'):
        load_teacher(path, 8)


def test_damaged_and_absent_files(tmp_path):
    path = tmp_path / 'dino.pth'
    save(path, STATE)
    content = path.read_bytes()
    for part in (b'', b'not weights', content[:1000], content[:-1000]):
        path.write_bytes(part)
        with pytest.raises(UserError, match='dino.pth'):
            load_teacher(str(path), 8)
    with pytest.raises(UserError, match='absent.pth'):
        load_teacher(str(tmp_path / 'absent.pth'), 8)


def test_release_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    """From a file:// address, with the digest of what lies there."""
    source = tmp_path / 'dinov2_vitb14_pretrain.pth'
    save(source, STATE)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(simflow, 'DINOV2_URL', source.as_uri())
    with pytest.raises(UserError, match='--repa'):                # not the release, by its digest
        load_teacher('dinov2', 8)
    monkeypatch.setattr(simflow, 'DINOV2_DIGEST', f'sha256:{digest}')
    net = load_teacher('dinov2', 8)
    source.unlink()
    assert torch.equal(load_teacher('dinov2', 8).pos_embed, net.pos_embed)


def test_release_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(simflow, 'DINOV2_URL', 'http://127.0.0.1:9/dinov2_vitb14_pretrain.pth')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(UserError) as error:
        load_teacher('dinov2', 8)
    assert str(tmp_path) in str(error.value) and 'by hand' in str(error.value)


def test_another_teacher_is_another_run(tmp_path):
    path = save(tmp_path / 'vit.pth', STATE)
    options = ['--model', 'repa', '--image_size', '16', '--batch_size', '4', '--workers', '0',
               '--device', 'cpu', '--sample_interval', '0', '--out', str(tmp_path / 'out')]
    train.main([*options, '--repa', path, '--steps', '1'])
    with pytest.raises(UserError, match='--repa vit.pth'):
        train.main([*options, '--steps', '2'])
