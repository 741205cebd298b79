"""sample.py from a checkpoint to files: labels, layouts, processes, mistakes."""
import os

import numpy as np
from PIL import Image
import pytest
import torch

import sample
from test_train import TINY, python, run, torchrun
import train
from data import UserError
from model import Config, sampling_dtype


@pytest.fixture(scope='module')
def ckpt(tmp_path_factory):
    out = tmp_path_factory.mktemp('run')
    train.main([*TINY, '--steps', '2', '--sample_interval', '0', '--out', str(out)])
    return str(out / 'ckpt.pt')


def npz(ckpt, path, *options):
    sample.main(['--ckpt', ckpt, '--device', 'cpu', '--out', str(path), *options])
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def test_npz_has_adms_layout_and_balanced_labels(ckpt, tmp_path):
    arrays = npz(ckpt, tmp_path / 'a.npz', '--n', '30')
    assert arrays.keys() == {'arr_0', 'arr_1'}
    assert arrays['arr_0'].shape == (30, 16, 16, 3) and arrays['arr_0'].dtype == np.uint8
    assert np.bincount(arrays['arr_1']).tolist() == [3] * 10
    assert arrays['arr_1'].tolist() != [i % 10 for i in range(30)]             # shuffled


def test_two_processes_make_the_same_images(ckpt, tmp_path):
    """Seven images, of batches of two: the last round leaves one process with nothing to do."""
    options = ['--n', '7', '--batch_size', '2', '--cfg', '1', '--gamma', '0.25']
    one = npz(ckpt, tmp_path / 'one.npz', *options)
    result = run(torchrun(2, 'sample.py', '--ckpt', ckpt, '--device', 'cpu',
                          '--out', str(tmp_path / 'two.npz'), *options))
    assert result.returncode == 0, result.stderr[-2000:]
    two = np.load(tmp_path / 'two.npz')
    assert np.array_equal(one['arr_1'], two['arr_1'])
    assert np.abs(one['arr_0'].astype(int) - two['arr_0']).max() <= 1


def test_parallel_decoding_makes_the_same_images(ckpt, tmp_path):
    options = ['--n', '3', '--cfg', '1', '--decode']
    one, two = (npz(ckpt, tmp_path / 'a.npz', *options, how)['arr_0'].astype(int)
                for how in ('sequential', 'jacobi'))
    assert np.abs(one - two).max() <= 1


def test_compiled_networks_make_the_same_images(ckpt, tmp_path, monkeypatch):
    """What torch.compile is given for sampling, traced, and run without generated code."""
    graphs, compile = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, 'compile',
                        lambda self, **how: compile(self, backend=backend, **how))
    options = ['--n', '40', '--cfg', '2', '--gamma', '0.25', '--compile']
    one, two = (npz(ckpt, tmp_path / 'a.npz', *options, asked)['arr_0'].astype(int)
                for asked in '01')
    assert np.abs(one - two).max() <= 1
    assert any('softmax' in graph for graph in graphs)             # attention of one query
    assert any('conv2d' in name for graph in graphs for name in graph)         # the decoder


def test_averaged_weights_alone_are_enough(ckpt, tmp_path, capsys):
    """To sample from, a quarter of the size; but not to resume."""
    small = str(tmp_path / 'run' / 'ckpt.pt')
    sample.main(['--ckpt', ckpt, '--export', small])
    assert os.path.getsize(small) < 0.4 * os.path.getsize(ckpt)
    one, two = (npz(path, tmp_path / 'a.npz', '--n', '3')['arr_0'] for path in (ckpt, small))
    assert np.array_equal(one, two)
    with pytest.raises(UserError, match='is there already'):
        sample.main(['--ckpt', ckpt, '--export', small])
    with pytest.raises(UserError, match='averaged weights alone'):
        train.main([*TINY, '--steps', '1', '--out', str(tmp_path / 'run')])


def test_parallel_decoding_needs_a_flow(tmp_path):
    train.main([*TINY, '--steps', '1', '--sample_interval', '0', '--prior', 'sit',
                '--out', str(tmp_path)])
    with pytest.raises(UserError, match='--decode jacobi'):
        sample.main(['--ckpt', str(tmp_path / 'ckpt.pt'), '--decode', 'jacobi'])


def test_order_of_an_npz_is_only_an_order(ckpt, tmp_path):
    """Image i is what it is elsewhere: here, of a folder, whose names are the i."""
    arrays = npz(ckpt, tmp_path / 'a.npz', '--num_samples', '12', '--batch_size', '5')
    sample.main(['--ckpt', ckpt, '--device', 'cpu', '--num_samples', '12',
                 '--out', f'{tmp_path}/x/'])
    order = np.random.default_rng(0).permutation(12)
    assert arrays['arr_1'].tolist() == [i % 10 for i in order]
    by_number = {path.name: path for path in (tmp_path / 'x').rglob('*.png')}
    for image, i in zip(arrays['arr_0'], order):
        other = np.asarray(Image.open(by_number[f'{i:06d}.png']))
        # batches differ, and so does rounding
        assert np.abs(image.astype(int) - other).max() <= 1
    assert sorted(os.listdir(tmp_path)) == ['a.npz', 'x']


def test_where_samples_cannot_go(ckpt, tmp_path, monkeypatch):
    (tmp_path / 'used').mkdir()
    (tmp_path / 'used' / 'old.png').touch()
    monkeypatch.setattr(sample, 'sample_images',
                        lambda *args, **how: pytest.fail('after an hour of sampling'))
    with pytest.raises(UserError, match='used/ is not empty'):
        sample.main(['--ckpt', ckpt, '--out', f'{tmp_path}/used/'])
    (tmp_path / 'folder.png').mkdir()
    with pytest.raises(UserError, match='is a folder'):
        sample.main(['--ckpt', ckpt, '--out', f'{tmp_path}/folder.png'])
    with pytest.raises(OSError):
        sample.main(['--ckpt', ckpt, '--out', f'{tmp_path}/used/old.png/grid.png'])
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(UserError, match='nothing can be written'):
        sample.main(['--ckpt', ckpt, '--out', f'{tmp_path}/a.npz'])


def test_an_interrupted_npz_leaves_nothing(ckpt, tmp_path, monkeypatch):
    def interrupted(*args, **how):
        yield np.arange(4), np.zeros((4, 16, 16, 3), np.uint8)
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, 'sample_images', interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.main(['--ckpt', ckpt, '--out', f'{tmp_path}/a.npz'])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('asked, trained, dtype', [
    ('', 'float32', 'float32'), ('bfloat16', 'float32', 'bfloat16'), ('', '', ''),
    ('', 'bfloat16', '')])
def test_dtype_of_samples(asked, trained, dtype):
    """float32 was asked for with a reason, such as a small sigma; bfloat16 may suit another
    device."""
    assert sampling_dtype(asked, Config(dtype=trained)) == dtype


def test_guidance_without_classes_is_said(tmp_path, capsys):
    (tmp_path / 'flat').mkdir()
    for i in range(4):
        Image.new('RGB', (16, 16), (60 * i, 0, 0)).save(tmp_path / 'flat' / f'{i}.png')
    train.main([*TINY, '--data', f'{tmp_path}/flat', '--steps', '1', '--sample_interval', '0',
                '--out', str(tmp_path)])
    command = ['--ckpt', f'{tmp_path}/ckpt.pt', '--n', '2', '--cfg', '1']
    for more, said in ([], True), (['--gamma', '1'], True), (['--guidance', 'tarflow_tau'], False):
        sample.main([*command, *more])
        assert ('knows no classes' in capsys.readouterr().out) == said


def test_seeds_and_classes(ckpt, tmp_path):
    a, b = [npz(ckpt, tmp_path / 'a.npz', '--n', '4', '--seed', seed)['arr_0']
            for seed in ('1', '2')]
    assert not np.array_equal(a, b)
    arrays = npz(ckpt, tmp_path / 'a.npz', '--n', '6', '--classes', 'heart', '1')
    assert sorted(arrays['arr_1'].tolist()) == [1, 1, 1, 3, 3, 3]


def test_grid_and_folder(ckpt, tmp_path):
    sample.main(['--ckpt', ckpt, '--n', '20', '--out', str(tmp_path / 'grid.png')])
    # two of each class, zoomed, captions
    assert Image.open(tmp_path / 'grid.png').size == (2 * 64, 10 * (64 + 14))
    sample.main(['--ckpt', ckpt, '--n', '20', '--out', f'{tmp_path}/folder/'])
    assert len(list((tmp_path / 'folder').glob('*/*.png'))) == 20
    assert len(list((tmp_path / 'folder' / 'heart').glob('*.png'))) == 2


def test_grid_lands_beside_the_checkpoint(ckpt):
    sample.main(['--ckpt', ckpt, '--n', '3'])
    assert Image.open(ckpt.replace('ckpt.pt', 'grid.png')).size == (2 * 64, 2 * (64 + 14))


def test_classes_by_name_or_number():
    names = ['cat', 'dog', '0']
    assert sample.choose_classes([], names) == [0, 1, 2] and sample.choose_classes([], []) == [0]
    # a name wins over a number
    assert sample.choose_classes(['dog', '0', '1'], names) == [1, 2, 1]
    for wrong in ('3', 'cow', '-1'):
        with pytest.raises(UserError, match=f'--classes {wrong}'):
            sample.choose_classes([wrong], names)
    numbers = ['0', '3', '7']                                      # of a dataset.json with gaps
    assert sample.choose_classes(['7', '3'], numbers) == [2, 1]
    with pytest.raises(UserError, match='--classes 1'):
        sample.choose_classes(['1'], numbers)


@pytest.mark.parametrize('argv, word', [
    (['--n', '0'], '--num_samples'), (['--seed', '-1'], '--seed'),
    (['--seed', str(2 ** 64)], '--seed'), (['--cfg', '-1'], '--cfg'),
    (['--cfg', '1e39'], '--cfg'),
    (['--out', 'a.jpg'], '--out'), (['--gama', '1'], '--gama'),
    (['--batch_size', '0'], '--batch_size'), (['--decode', 'fast'], '--decode'),
    (['--tol', '0'], '--tol'),
    (['--tol', '0.01'], '--decode jacobi')])
def test_mistakes(ckpt, argv, word):
    with pytest.raises(UserError, match=word):
        sample.main(['--ckpt', ckpt, *argv])


def test_mistakes_end_in_one_sentence(tmp_path):
    result = run(python('sample.py', '--ckpt', str(tmp_path / 'absent.pt')))
    assert result.returncode == 2
    assert result.stderr.startswith('error: ') and result.stderr.count('\n') == 1


def test_help_says_what_off_is(capsys):
    with pytest.raises(SystemExit):
        sample.main(['--help'])
    assert '0 is off' in ' '.join(capsys.readouterr().out.split())
