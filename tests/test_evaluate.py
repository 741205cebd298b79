"""evaluate.py: one property per test. Golden numbers are made by golden_evaluate.py."""
import dataclasses
import json
import math
import os
import shutil
import sys
import zipfile

import numpy as np
from PIL import Image
import pytest
import scipy.linalg
import torch
from torch import nn
import torch.multiprocessing as mp
import torch.nn.functional as F

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(TESTS), TESTS]

import evaluate
import flow
import golden_evaluate as golden
from data import UserError
from flow import Flow
from model import PRESETS, Config, Process, SimFlow, leave_processes

HERE = Process(torch.device('cpu'), torch.float32, False)


class Tiny(nn.Module):
    """Stands in for Inception: a few random projections of an 8 x 8 version of the image."""

    def __init__(self):
        super().__init__()
        rng = np.random.RandomState(0)
        self.maps = [torch.from_numpy(rng.standard_normal((192, d)) / 14).float()
                     for d in (24, 10, 20)]

    def forward(self, images):
        h = F.adaptive_avg_pool2d(images.float() / 64 - 2, 8).flatten(1)
        return tuple(h @ weight for weight in self.maps)


class PoolOnly(Tiny):
    """A network without logits and spatial features"""

    def forward(self, images):
        return super().forward(images)[0], None, None


def tiny_features(options):
    return evaluate.Features(Tiny(), 24, evaluate.INCEPTION_DIGEST, prefix='')


def tiny_random(options):
    return evaluate.Features(Tiny(), 24, 'random', prefix='random ')


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Inception replaced."""
    monkeypatch.setitem(evaluate.FEATURES, 'inception', tiny_features)
    monkeypatch.setitem(evaluate.FEATURES, 'random', tiny_random)
    return tmp_path


def run(capsys, *argv):
    """-> the JSON line of a run"""
    evaluate.main([str(a) for a in argv])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def save_npz(path, pixels):
    np.savez(path, pixels)
    return path


def save_folder(path, pixels, suffix='png'):
    path.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(path / f'{i:04d}.{suffix}')
    return path


def summarise(net, pixels, batch=7):
    statistics = evaluate.Statistics(net, len(pixels), np.arange(len(pixels)), HERE)
    for start in range(0, len(pixels), batch):
        index = np.arange(start, min(start + batch, len(pixels)))
        statistics.add(index, pixels[index])
    return statistics.summary('test')


# ---------------------------------------------------------------------------------------- Inception

@pytest.fixture(scope='module')
def inception():
    return evaluate.random_inception()


@pytest.fixture(scope='module')
def expected():
    return np.load(os.path.join(golden.FOLDER, 'inception.npz'))


def test_inception_has_the_names_and_shapes_of_the_released_weights(inception, expected):
    state = {name: v for name, v in inception.state_dict().items()
             if 'num_batches_tracked' not in name}
    assert len(state) == expected['count']
    assert golden.key_hash(state) == expected['keys']
    evaluate.Inception().load_state_dict(dict(state))              # as the released file


def test_features_equal_torch_fidelitys(inception, expected):
    """In units of the largest feature. Float32 has eps = 6e-8, and a sum of n products is off by
    about eps sqrt(n) of its scale: 2.4e-6 for the n = 1,300 to 3,500 here. The longest way through
    the network has some 40 of them in a row: 1.5e-5; of thousands of normal errors the largest is 4
    times that."""
    images = torch.from_numpy(golden.two_sets()[0][:3]).permute(0, 3, 1, 2).contiguous()
    for name, features in zip(('pool', 'logits', 'spatial'), inception(images)):
        error = np.abs(features[:, ::32].numpy() - expected[name]).max()
        assert error < 6e-5 * np.abs(expected[name]).max(), name


def test_metrics_equal_torch_fidelitys(inception, expected):
    # Features are off by 1.5e-5 (above), and distances are squares of them: 3e-5. Scores are
    # exponentials of logits, sums of 2048 features.
    net = inception.to(memory_format=torch.channels_last)          # as the program has it
    sample, ref = [summarise(net, pixels) | {'n': 20} for pixels in golden.two_sets()]
    row = evaluate.compare(sample, ref, tiny_features(None), HERE)
    assert row['FID'] == pytest.approx(expected['fid'], rel=3e-5)
    assert (row['IS'], row['IS std']) == pytest.approx(expected['score'], rel=1e-4)
    for name in ('precision', 'recall'):
        assert row[name] == pytest.approx(expected[name].item())


def test_resize_equals_tensorflow_1_to_the_bit(expected):
    for size, bits in zip(golden.SIZES, expected['resized']):
        pixels = torch.from_numpy(golden.images(3, 1, size)).permute(0, 3, 1, 2).float()
        assert golden.bits(evaluate.resize(pixels, 299)) == bits, size


def test_missing_weights_name_the_address_and_the_place(tmp_path, monkeypatch):
    url = 'file:///nowhere/' + os.path.basename(evaluate.INCEPTION_URL)
    monkeypatch.setattr(evaluate, 'INCEPTION_URL', url)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(UserError) as e:
        evaluate.load_inception(evaluate.Options())
    for part in ('file:///nowhere/', str(tmp_path), '--weights'):
        assert part in str(e.value)


def test_other_weights_are_refused_and_left_alone(tmp_path):
    path = tmp_path / 'w.pth'
    path.write_bytes(b'mine')
    with pytest.raises(UserError, match='is not the file'):
        evaluate.load_inception(evaluate.Options(weights=str(path)))
    assert path.read_bytes() == b'mine'


# --------------------------------------------------------------------------------------- statistics

def spd(rng, d, rank):
    a = rng.standard_normal((d, rank))
    return a @ a.T / rank


def by_sqrtm(mu_a, A, mu_b, B):
    root = scipy.linalg.sqrtm(A @ B)
    return np.square(mu_a - mu_b).sum() + np.trace(A + B) - 2 * np.trace(root).real


def by_mpmath(A, B):
    """tr A + tr B - 2 tr (A B)^(1/2) with 60 digits; eigenvalues below 1e-30 are zeros."""
    mp_ = pytest.importorskip('mpmath')
    with mp_.workdps(60):
        A, B = mp_.matrix(A.tolist()), mp_.matrix(B.tolist())
        values, vectors = mp_.eigsy(A)
        root = vectors * mp_.diag([mp_.sqrt(v) if v > 1e-30 else 0 for v in values]) * vectors.T
        values = mp_.eigsy(root * B * root, eigvals_only=True)
        trace = sum(A[i, i] + B[i, i] for i in range(A.rows))
        return float(trace - 2 * sum(mp_.sqrt(v) for v in values if v > 1e-30))


def test_frechet_equals_sqrtm_where_that_works():
    rng = np.random.RandomState(0)
    for d in (1, 5, 64):
        args = rng.randn(d), spd(rng, d, 3 * d), rng.randn(d), spd(rng, d, 4 * d)
        assert evaluate.frechet(*args) == pytest.approx(by_sqrtm(*args), rel=1e-6)


@pytest.mark.parametrize('ranks', [(2, 3), (3, 2), (2, 8), (8, 2), (1, 1)])
def test_frechet_of_singular_covariances(ranks):
    rng, zero = np.random.RandomState(1), np.zeros(8)
    # Integers over a power of two: exactly singular in float64, too.
    A, B = [(lambda a: a @ a.T / 16)(rng.randint(-4, 5, (8, rank)).astype(float)) for rank in ranks]
    assert evaluate.frechet(zero, A, zero, B) == pytest.approx(by_mpmath(A, B), rel=1e-6)


def test_frechet_of_fewer_images_than_features():
    """Then the trace of the root is the nuclear norm of the product of the centred features."""
    rng, d = np.random.RandomState(3), 200
    for n, m in ((20, 30), (20, 500), (500, 20)):
        x, y = rng.randn(n, d), rng.randn(m, d) * 2
        a, b = [(f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (x, y)]
        nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
        expected = np.square(x.mean(0) - y.mean(0)).sum()
        expected += (a ** 2).sum() + (b ** 2).sum() - 2 * nuclear
        ours = evaluate.frechet(x.mean(0), np.cov(x, rowvar=False),
                                y.mean(0), np.cov(y, rowvar=False))
        assert ours == pytest.approx(expected, rel=1e-10)


def test_frechet_is_symmetric_and_zero_to_itself():
    rng, d = np.random.RandomState(2), 40
    for rank in (100, 12):                             # more and fewer images than features
        a, b = (rng.randn(d), spd(rng, d, rank)), (rng.randn(d), spd(rng, d, rank))
        assert evaluate.frechet(*a, *b) == pytest.approx(evaluate.frechet(*b, *a), rel=1e-9)
        assert evaluate.frechet(*a, *a) < 1e-6
    assert evaluate.frechet(np.zeros(3), np.zeros((3, 3)), np.ones(3), np.zeros((3, 3))) == 3


def test_streamed_statistics_equal_those_of_all_features_at_once():
    pixels = golden.images(0, 53, 16)
    summary = summarise(Tiny(), pixels)
    outs = Tiny()(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    pool, _, spatial = [f.double().numpy() for f in outs]
    for f, mu, sigma in ((pool, 'mu', 'sigma'), (spatial, 'mu_s', 'sigma_s')):
        np.testing.assert_allclose(summary[mu], f.mean(0), atol=1e-6)
        np.testing.assert_allclose(summary[sigma], np.cov(f, rowvar=False), atol=1e-6)


def test_inception_score_by_its_definition():
    """Against p of all images at once; sorted by class, which the permutation must undo."""
    pixels = golden.images(0, 55, 8)
    pixels = pixels[pixels.mean((1, 2, 3)).argsort()]
    p = Tiny()(torch.from_numpy(pixels).permute(0, 3, 1, 2))[1].double().softmax(1).numpy()
    p, scores = p[np.random.RandomState(2020).permutation(55)], []
    for i in range(10):
        part = p[i * 55 // 10:(i + 1) * 55 // 10]
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    expected = np.mean(scores), np.std(scores)
    assert summarise(Tiny(), pixels)['score'] == pytest.approx(expected, rel=1e-6)


def test_inception_score_of_distinct_and_of_equal_predictions():
    n, each_once, one_per_split = np.array([4, 4]), np.ones((2, 4)), np.eye(2) * 4
    assert evaluate.inception_score(each_once, np.zeros(2), n) == pytest.approx((4, 0))
    assert evaluate.inception_score(one_per_split, np.zeros(2), n) == pytest.approx((1, 0))


def test_share_on_manifold_by_hand():
    centres = torch.tensor([[0.0], [1], [2], [3]])     # radii, to the third other one: 3, 2, 2, 3
    for x, inside in ((-3, True), (-3.5, False), (4, True), (6, True), (6.5, False)):
        assert evaluate.share_on_manifold(torch.tensor([[float(x)]]), centres) == inside
    assert evaluate.share_on_manifold(torch.tensor([[0.5], [9.0]]), centres) == 0.5


def test_share_on_manifold_by_its_definition():
    points, centres = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).split(25)
    whole = evaluate.share_on_manifold(points, centres)
    radii = (centres[:, None] - centres).norm(dim=-1).sort(1).values[:, 3]
    assert whole == ((points[:, None] - centres).norm(dim=-1) <= radii).any(1).double().mean()


def test_psnr_and_ssim_equal_torchmetrics():
    metrics = pytest.importorskip('torchmetrics.functional.image')
    a, b = [evaluate.zero_to_one(golden.images(seed, 3, 32)) for seed in (0, 1)]
    b = 0.7 * a + 0.3 * b
    expected = metrics.structural_similarity_index_measure(b, a, data_range=1.0, reduction='none')
    torch.testing.assert_close(evaluate.ssim(a, b), expected, rtol=0, atol=1e-5)
    expected = metrics.peak_signal_noise_ratio(b, a, data_range=1.0, dim=(1, 2, 3),
                                               reduction='none')
    torch.testing.assert_close(evaluate.psnr(a, b), expected)
    torch.testing.assert_close(evaluate.psnr(a, a), torch.full([3], 100.0))


def test_sfid_is_the_distance_of_the_spatial_features():
    a, b = [summarise(Tiny(), golden.images(seed, 53, 16)) | {'n': 53} for seed in (0, 1)]
    row = evaluate.compare(a, b, tiny_features(None), HERE)
    expected = by_sqrtm(a['mu_s'], a['sigma_s'], b['mu_s'], b['sigma_s'])
    assert row['sFID'] == pytest.approx(expected, rel=1e-6)


# ----------------------------------------------------------------------------- files and references

def test_folder_zip_and_npz_give_the_same_numbers(tiny, capsys):
    pixels, ref = golden.images(0, 20, 16), save_npz(tiny / 'ref.npz', golden.images(1, 30, 16))
    folder = save_folder(tiny / 'folder', pixels)
    shutil.make_archive(tiny / 'archive', 'zip', folder)
    np.savez_compressed(tiny / 'packed.npz', pixels)
    save_npz(tiny / 'plain.npz', pixels), save_npz(tiny / 'columns.npz', np.asfortranarray(pixels))
    for version in (2, 3):                                         # of numpy's format
        path = tiny / f'version{version}.npz'
        with zipfile.ZipFile(path, 'w') as z, z.open('arr_0.npy', 'w') as f:
            np.lib.format.write_array(f, pixels, (version, 0))
    names = 'archive.zip', 'packed.npz', 'plain.npz', 'columns.npz', 'version2.npz', 'version3.npz'
    sources = [folder, *(tiny / name for name in names)]
    rows = [run(capsys, source, '--ref', ref)['rows'][0] for source in sources]
    for row in rows:
        assert row | {'samples': ''} == pytest.approx(rows[0] | {'samples': ''})
    assert (rows[0]['n'], rows[0]['ref n']) == (20, 30)


def test_statistics_are_references_and_samples_too(tiny, capsys):
    samples = save_npz(tiny / 's.npz', golden.images(0, 20, 16))
    ref, ours = save_npz(tiny / 'r.npz', golden.images(1, 30, 16)), tiny / 'ours.npz'
    row, = run(capsys, samples, '--ref', ref, '--save_ref', ours)['rows']
    assert run(capsys, samples, '--ref', ours)['rows'] == [row]
    both, = run(capsys, ours, '--ref', ours)['rows']
    assert both['FID'] < 1e-6 and both['precision'] == 1
    with np.load(ours) as z:
        adm = {name: z[name] for name in ('mu', 'sigma', 'mu_s', 'sigma_s')}
    np.savez(tiny / 'adm.npz', **adm)
    evaluate.main([str(samples), '--ref', str(tiny / 'adm.npz')])
    out = capsys.readouterr().out
    assert 'adm.npz does not say of which images' in out
    alone, = json.loads(out.splitlines()[-1])['rows']
    assert alone == row | {'ref n': None, 'precision': None, 'recall': None}
    assert run(capsys, tiny / 'adm.npz', '--ref', tiny / 'adm.npz')['rows'][0]['FID'] < 1e-6
    np.savez(tiny / 'batch.npz', arr_0=golden.images(1, 30, 16), **adm | {'mu': adm['mu'] + 1})
    beside, = run(capsys, samples, '--ref', tiny / 'batch.npz')['rows']
    assert beside['FID'] != row['FID'] and beside['precision'] == row['precision']
    for name in ('adm', 'batch'):                                  # saved, they are what they were
        again, given = tiny / 'again.npz', tiny / f'{name}.npz'
        rows = run(capsys, samples, '--ref', given, '--save_ref', again)['rows']
        assert run(capsys, samples, '--ref', again)['rows'][0]['FID'] == rows[0]['FID']
        evaluate.main([str(again), '--ref', str(given)])
        assert 'FID-? ' in capsys.readouterr().out
    np.savez(tiny / 'adm.npz', mu=np.zeros(8), sigma=np.eye(8))
    with pytest.raises(UserError, match='there are 24 features'):
        run(capsys, samples, '--ref', tiny / 'adm.npz')


def test_a_full_disk_costs_no_numbers(tiny, capsys, monkeypatch):
    def full(*args, **arrays):
        raise OSError(28, 'No space left on device')
    samples = save_npz(tiny / 's.npz', golden.images(0, 20, 16))
    monkeypatch.setattr(np, 'savez', full)
    with pytest.raises(OSError):
        run(capsys, samples, '--ref', samples, '--save_ref', tiny / 'full.npz')
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['rows'][0]['FID'] < 1e-6
    assert os.listdir(tiny) == ['s.npz']


def test_two_sizes_are_said(tiny, capsys):
    samples = save_npz(tiny / 's.npz', golden.images(0, 20, 16))
    ref = save_npz(tiny / 'r.npz', golden.images(0, 20, 32))
    evaluate.main([str(samples), '--ref', str(ref)])
    assert 'r.npz has images of 32 x 32 pixels, compared at 16' in capsys.readouterr().out


def test_statistics_of_another_size_are_refused(tiny, capsys):
    samples = save_npz(tiny / 's.npz', golden.images(0, 20, 16))
    ours = tiny / 'ours.npz'
    run(capsys, samples, '--ref', samples, '--save_ref', ours)
    with pytest.raises(UserError, match='size 16, not 32'):
        run(capsys, save_npz(tiny / 'l.npz', golden.images(0, 20, 32)), '--ref', ours)


def truncated(path):
    save_npz(path, IMAGES)
    path.write_bytes(path.read_bytes()[:2000])


def broken(path):
    (save_folder(path, IMAGES) / '0011.png').write_bytes(b'PNG?')


def dangling(path):
    (save_folder(path, IMAGES) / 'link.png').symlink_to('nowhere')


IMAGES = golden.images(0, 20, 8)
BAD = {                                                # name: file, how it is written, message
    'grey': ('x.npz', lambda path: save_npz(path, IMAGES[..., :1]),
             r'must be uint8 \(N, H, W, 3\)'),
    'float': ('x.npz', lambda path: save_npz(path, IMAGES / 255),
              r'float64.*must be uint8 \(N, H, W, 3\)'),
    'sizes': ('x', lambda path: save_folder(path, [*IMAGES, *golden.images(0, 9, 9)]),
              'of one size'),
    'oblong': ('x.npz', lambda path: save_npz(path, IMAGES[:, :4]), 'square'),
    'few': ('x.npz', lambda path: save_npz(path, IMAGES[:9]), '^9 images of .* numbers need 10'),
    'empty': ('x', lambda path: save_folder(path, []), 'no images'),
    'name': ('x.npz', lambda path: np.savez(path, images=IMAGES), 'holds no images .arr_0'),
    'missing': ('x.npz', lambda path: None, 'cannot be read'),
    'text': ('x.npz', lambda path: path.write_text('hello'), 'cannot be read'),
    'truncated': ('x.npz', truncated, 'cannot be read'),
    'npy': ('x.npz', lambda path: np.save(open(path, 'wb'), IMAGES), 'cannot be read'),
    'broken': ('x', broken, '1 of 20 images are unreadable, such as 0011'),
    'dangling': ('x', dangling, '1 of 21 images are unreadable, such as link')}


@pytest.mark.parametrize('case', BAD)
def test_bad_samples_are_one_sentence(case, tiny, capsys):
    name, write, message = BAD[case]
    write(tiny / name)
    with pytest.raises(UserError, match=message):
        run(capsys, tiny / name, '--ref', save_npz(tiny / 'ref.npz', IMAGES))


def test_random_features_never_pass_for_fid(tiny, capsys):
    samples = save_npz(tiny / 's.npz', IMAGES)
    evaluate.main([str(samples), '--ref', str(samples), '--features', 'random', '--save_ref',
                   str(tiny / 'random.npz')])
    out = capsys.readouterr().out
    assert 'random FID-20' in out and 'NOT FID' in out and '"FID": 0' not in out
    np.savez(tiny / 'adm.npz', mu=np.zeros(24), sigma=np.eye(24))
    with pytest.raises(UserError, match='arr_0'):      # ADM's statistics are Inception's
        run(capsys, samples, '--ref', tiny / 'adm.npz', '--features', 'random')
    with pytest.raises(UserError, match='inception random, not sha256'):
        run(capsys, samples, '--ref', tiny / 'random.npz')


def test_features_that_are_not_finite_are_an_error(tiny, capsys, monkeypatch):
    nan = Tiny()
    nan.maps[0][0, 0] = float('nan')
    monkeypatch.setitem(evaluate.FEATURES, 'inception',
                        lambda options: tiny_features(options)._replace(network=nan))
    samples = save_npz(tiny / 's.npz', golden.images(0, 20, 8))
    with pytest.raises(UserError, match='not finite'):
        run(capsys, samples, '--ref', samples)


def test_a_network_may_lack_logits_and_spatial_features(tiny, capsys, monkeypatch):
    def load(options):
        return evaluate.Features(PoolOnly(), 24, 'pool only', prefix='pool ')
    monkeypatch.setitem(evaluate.FEATURES, 'pool', load)
    samples = save_npz(tiny / 's.npz', IMAGES)
    ref = save_npz(tiny / 'r.npz', golden.images(1, 20, 8))
    argv = [samples, '--ref', ref, '--save_ref', tiny / 'ours.npz']
    expected, = run(capsys, *argv)['rows']
    argv = [samples, '--ref', ref, '--save_ref', tiny / 'pool.npz', '--features', 'pool']
    row, = run(capsys, *argv)['rows']
    for name in ('FID', 'precision', 'recall'):
        assert row[f'pool {name}'] == expected[name]
    assert row['pool sFID'] is None and row['pool IS'] is None
    with pytest.raises(UserError, match='inception pool only, not sha256'):
        run(capsys, samples, '--ref', tiny / 'pool.npz')


def test_jpeg_samples_are_a_warning(tiny, capsys):
    ref = save_npz(tiny / 'ref.npz', golden.images(1, 20, 8))
    evaluate.main([str(save_folder(tiny / 'x', golden.images(0, 20, 8), 'jpg')), '--ref', str(ref)])
    assert 'JPEG' in capsys.readouterr().out


@pytest.mark.parametrize('argv, message', [
    ([], 'name either samples'), (['a.npz'], '--ref is missing'),
    (['a.npz', '--ref', 'b', '--cfg', '1'], 'need a --ckpt'),
    (['a.npz', '--ref', 'b', '--features', 'vgg'], 'must be inception or random'),
    (['a.npz', '--ref', 'b', '--n', '5'], 'too few'), (['a.npz', '--reff', 'b'], '--reff'),
    (['--ckpt', 'c', '--ref', 'b', '--cfg', '0', '-1'], '--cfg must not be negative'),
    (['a.npz', '--ref', 'b', '--seed', '-1'], '--seed must not be negative'),
    (['a.npz', '--ref', 'b', '--seed', str(2 ** 64)], 'seed.*too large'),
    (['a.npz', '--ref', 'b', '--save_ref', 'x.zip'], '--save_ref'),
    (['a.npz', '--ref', 'b.npz', '--save_ref', './b.npz'], 'would replace'),
    (['--ckpt', 'c', '--reconstruct', 'a', '--ref', 'b', '--save_ref', 'x.npz'], '--save_ref')])
def test_bad_options_are_one_sentence(argv, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(argv)


def test_samples_may_stand_anywhere(tiny, capsys):
    samples = str(save_npz(tiny / 's.npz', golden.images(0, 20, 8)))
    for argv in ([samples, '--ref', samples], ['--ref', samples, samples],
                 ['--ref', samples, '--samples', samples],
                 ['--ref', samples, '--batch_size', '7', samples, '--seed', '3']):
        assert run(capsys, *argv)['rows'][0]['samples'] == samples


def test_a_few_unreadable_images_are_replaced_and_named(tiny, capsys):
    pixels = golden.images(0, 200, 8)
    ref, folder = save_npz(tiny / 'ref.npz', pixels), save_folder(tiny / 'x', pixels)
    (folder / '0000.png').write_bytes(b'PNG?')
    (folder / '0150.png').write_bytes(b'')
    (folder / 'notes.txt').touch()
    evaluate.main([str(folder), '--ref', str(ref)])
    out = capsys.readouterr().out
    assert out.count('files ignored') == 1
    assert 'unreadable, and replaced by the images after them: 0000.png, 0150.png' in out
    row = json.loads(out.splitlines()[-1])['rows'][0]
    pixels[0], pixels[150] = pixels[1], pixels[151]
    expected = run(capsys, save_npz(tiny / 'replaced.npz', pixels), '--ref', ref)['rows'][0]
    assert row['n'] == 200 and row['FID'] == pytest.approx(expected['FID'], rel=1e-9)


def test_a_subset_is_a_random_choice_in_order():
    some = evaluate.subset(1000, 100)
    assert len(set(some)) == 100 and (np.diff(some) > 0).all() and 400 < some.mean() < 600
    assert evaluate.subset(5, 0).tolist() == evaluate.subset(5, 9).tolist() == [0, 1, 2, 3, 4]


def test_features_of_at_most_so_many_references_are_kept(tiny, monkeypatch):
    monkeypatch.setattr(evaluate, 'MOST_REFERENCES', 12)
    path, features = save_npz(tiny / 'r.npz', golden.images(0, 30, 16)), tiny_features(None)
    for size, kept in (16, 12), (None, 30):                        # of references, of samples
        source = evaluate.open_source(str(path), 0, size, features, HERE)
        made = evaluate.source_statistics(source, evaluate.Options(), features, HERE)
        assert len(made['features']) == kept and made['n'] == 30


# ---------------------------------------------------------------------------------------- processes

def share_work(rank, world, folder):
    """One process of `world`: compare two folders, process 0 writes the numbers down."""
    if world > 1:
        torch.distributed.init_process_group('gloo', f'file://{folder}/rendezvous{world}',
                                             rank=rank, world_size=world)
    process = dataclasses.replace(HERE, rank=rank, world=world)
    evaluate.find_process = lambda device, dtype: process
    evaluate.FEATURES['inception'] = tiny_features
    evaluate.load_lpips = Distance
    tables = []
    evaluate.report = lambda rows, *args: tables.extend(rows)
    os.chdir(folder)
    model = '--ckpt ckpt.pt'
    for argv in ('s.npz --ref r.npz', 's.npz --ref r', f'{model} --ref r.npz --n 11 --cfg 1',
                 f'{model} --reconstruct r.npz',
                 f'{model} --reconstruct r.npz --latents 1'):
        evaluate.main(f'{argv} --batch_size 4'.split())
    if rank == 0:
        json.dump(tables, open(f'rows{world}.json', 'w'))
    if world > 1:
        leave_processes()                                          # as the programs do


def test_any_number_of_processes_gives_the_same_numbers(tmp_path):
    save_npz(tmp_path / 's.npz', golden.images(0, 31, 16))
    save_npz(tmp_path / 'r.npz', golden.images(1, 23, 16))
    # One of 110 is replaced, even if it is one of a process's 37.
    (save_folder(tmp_path / 'r', golden.images(2, 110, 16)) / '0050.png').write_bytes(b'PNG?')
    save_checkpoint(tmp_path / 'ckpt.pt')
    worlds = [mp.spawn(share_work, (world, str(tmp_path)), world, join=False) for world in (1, 3)]
    for world in worlds:
        while not world.join():
            pass
    one, three = [json.load(open(tmp_path / f'rows{world}.json')) for world in (1, 3)]
    for a, b in zip(one, three, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {'images/s', 'samples', 'decoded'}:
            assert a[name] == pytest.approx(b[name], rel=1e-6), name


# -------------------------------------------------------------------------------------- checkpoints

class Distance(nn.Module):
    """Stands in for LPIPS."""

    def __init__(self, *paths):
        super().__init__()

    def forward(self, a, b):
        return (a - b).abs().mean((1, 2, 3))


def save_checkpoint(path, **more):
    """An untrained model of 16 x 16 images, of which nothing is zero."""
    small = dict(image_size=16, latent_dim=8, vae_width=16, vae_mults=(1,), width=16, heads=1,
                 layers=(1, 1))
    config = Config(**PRESETS['nano'] | small | more)
    torch.manual_seed(0)
    model = SimFlow(config, 3)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    torch.save({'config': dataclasses.asdict(config), 'class_names': ['a', 'b', 'c'], 'step': 1,
                'ema': model.state_dict(), 'model': model.state_dict()}, path)
    return path


@pytest.mark.parametrize('trained, asked, expected', [
    ('float32', '', 'float32'), ('bfloat16', '', ''), ('', '', ''),
    ('float32', 'bfloat16', 'bfloat16')])
def test_float32_is_the_default_if_the_run_asked_for_it(tmp_path, monkeypatch, trained, asked,
                                                        expected):
    def find(device, dtype):
        raise UserError(f'dtype is {dtype!r}')

    monkeypatch.setattr(evaluate, 'find_process', find)
    ckpt = str(save_checkpoint(tmp_path / 'ckpt.pt', dtype=trained))
    with pytest.raises(UserError, match=f"dtype is '{expected}'"):
        evaluate.main(['--ckpt', ckpt, '--reconstruct', 'shapes', '--dtype', asked])


def checkpoint_and_images(folder, image_size=16):
    """-> their paths"""
    images = golden.images(1, 20, image_size)
    return (save_checkpoint(folder / 'ckpt.pt', image_size=image_size),
            save_npz(folder / 'images.npz', images))


def test_guidance_makes_a_table_and_a_curve(tiny, capsys):
    ckpt, ref = checkpoint_and_images(tiny)
    rows = run(capsys, '--ckpt', ckpt, '--ref', ref, '--n', 12, '--cfg', 0, 2,
               '--gamma', 0, 0.5)['rows']
    assert [(row['cfg'], row['gamma']) for row in rows] == [(0, 0), (2, 0), (0, 0.5), (2, 0.5)]
    assert len({row['FID'] for row in rows}) == 4
    assert Image.open(tiny / 'fid_cfg.png').size == (720, 480)


def test_samples_decoded_in_parallel_are_as_good(tiny, capsys, monkeypatch):
    """Hardly other images, so hardly another distance: guided ones at once, so a CPU must be
    asked for few."""
    ckpt, ref = checkpoint_and_images(tiny)
    argv = ['--ckpt', ckpt, '--ref', ref, '--n', 10, '--batch_size', 2, '--cfg', 1]
    decoded, inverse = [], flow.jacobi_inverse
    monkeypatch.setattr(flow, 'jacobi_inverse',
                        lambda block, *args: decoded.append(block) or inverse(block, *args))
    a, b = [run(capsys, *argv, '--decode', how)['rows'][0] for how in ('sequential', 'jacobi')]
    assert a['FID'] == pytest.approx(b['FID'], rel=0.01)
    assert len(decoded) == 5 * 2                                   # batches of two, two blocks


def test_batch_size_changes_nothing(tiny, capsys):
    ckpt, ref = checkpoint_and_images(tiny)
    argv = ['--ckpt', ckpt, '--ref', ref, '--n', 13, '--batch_size']
    a, b = [run(capsys, *argv, size)['rows'][0] for size in (3, 13)]
    for name in ('FID', 'IS'):
        assert a[name] == pytest.approx(b[name], rel=1e-6)


def test_reconstruct_reports_both_readings(tiny, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, 'load_lpips', Distance)
    ckpt, data = checkpoint_and_images(tiny)
    noisy, clean = run(capsys, '--ckpt', ckpt, '--reconstruct', data)['rows']
    assert (noisy['decoded'], clean['decoded']) == ('mu + sigma eps', 'mu')
    assert noisy['PSNR'] != clean['PSNR'] and noisy['rFID'] != clean['rFID'] and noisy['LPIPS'] > 0
    assert noisy['rate'] > 0 and noisy['ELBO'] > 0 and 'rate' not in clean


def test_the_clean_reading_decodes_the_mean(tiny, capsys, monkeypatch):
    ckpt, data = checkpoint_and_images(tiny)
    decoded, decode = [], evaluate.decode
    monkeypatch.setattr(evaluate, 'decode', lambda x, *rest: decoded.append(x) or decode(x, *rest))
    run(capsys, '--ckpt', ckpt, '--reconstruct', data, '--features', 'random')
    image = 2 * evaluate.zero_to_one(np.load(data)['arr_0']) - 1
    torch.testing.assert_close(decoded[1], evaluate.load_model(ckpt)[0].vae.encode(image)[0])


def test_reconstructions_are_compared_with_their_originals(tiny, capsys, monkeypatch):
    """Also where the file has statistics of other images."""
    monkeypatch.setattr(evaluate, 'load_lpips', Distance)
    ckpt, data = checkpoint_and_images(tiny)
    plain = run(capsys, '--ckpt', ckpt, '--reconstruct', data)['rows']
    np.savez(tiny / 'both.npz', arr_0=np.load(data)['arr_0'], mu=np.ones(24), sigma=np.eye(24))
    assert run(capsys, '--ckpt', ckpt, '--reconstruct', tiny / 'both.npz')['rows'] == plain


def test_tiny_images_lack_what_cannot_be_computed(tiny, capsys):
    """4 pixels are too few for SSIM's window; one token is no grid."""
    ckpt, data = checkpoint_and_images(tiny, image_size=4)
    rows = run(capsys, '--ckpt', ckpt, '--reconstruct', data, '--features', 'random')['rows']
    assert all('PSNR' in row and 'SSIM' not in row for row in rows)
    said = run(capsys, '--ckpt', ckpt, '--latents', 1, '--reconstruct', data)
    assert 'std of mu' in said['rows'][0] and 'spectral entropy' not in said['rows'][0]
    assert said['conventions'].keys() == {'PSNR', 'std of mu'}
    rows = run(capsys, '--ckpt', ckpt, '--ref', data, '--n', 10, '--cfg', 1,
               '--guidance', 'tarflow')['rows']
    assert rows[0]['FID'] > 0


def test_classes_that_do_not_match_are_said(tiny, capsys):
    ckpt, data = checkpoint_and_images(tiny)
    evaluate.main(['--ckpt', str(ckpt), '--latents', '1', '--reconstruct', str(data)])
    assert 'no classes, or others than the checkpoint' in capsys.readouterr().out


def test_images_that_are_not_finite_are_counted(tiny, capsys, monkeypatch):
    ckpt, data = checkpoint_and_images(tiny)
    generate = SimFlow.generate

    def spoiled(self, y, *args, **how):
        images = generate(self, y, *args, **how)
        images[y == 1, 0, 0, 0] = float('nan')
        return images
    monkeypatch.setattr(SimFlow, 'generate', spoiled)
    evaluate.main(['--ckpt', str(ckpt), '--ref', str(data), '--n', '12', '--batch_size', '5'])
    assert '4 of 12 images are not finite' in capsys.readouterr().out


def test_rate_is_infinite_without_noise(tiny, capsys):
    ckpt = save_checkpoint(tiny / 'ckpt.pt', sigma=0.0)
    data = save_npz(tiny / 'data.npz', golden.images(1, 20, 16))
    evaluate.main(['--ckpt', str(ckpt), '--reconstruct', str(data), '--features', 'random'])
    out = capsys.readouterr().out.splitlines()
    assert any(' inf ' in line for line in out) and json.loads(out[-1])['rows'][0]['rate'] is None


def test_distortion_by_its_definition():
    image, recon = torch.rand(2, 20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    bits = evaluate.distortion(image, recon, 0.2).mean().item()
    log_p = torch.distributions.Normal(recon, 0.2).log_prob(image).mean().item()
    assert bits == pytest.approx(-log_p / np.log(2) + np.log2(127.5), rel=1e-5)


def test_classifiers_find_the_class_that_made_the_image(tiny):
    """A flow whose classes are Gaussians far apart: Bayes' rule has no doubts, nor has the
    gradient."""
    flow = Flow(4, 6, 16, 2, (1, 1), classes=2)
    transformer = flow.blocks[0].transformer
    transformer.classes.weight.data.zero_()[:2, :2] = torch.tensor([[-5.0, 5.0], [5.0, -5.0]])
    # SiLU(a) - SiLU(-a) = a: the head's channel 0 is shifted by -5 or 5, and thus every mean.
    transformer.ada.weight.data[0, :2] = torch.tensor([1.0, -1.0])
    transformer.proj_out.weight.data.zero_()[:4, 0] = 0.8
    y = torch.tensor([0, 1]).repeat(10)
    x = flow.sample(torch.randn(20, 6, 4, generator=torch.Generator().manual_seed(0)), y)
    for classify in evaluate.CLASSIFIERS.values():
        assert torch.equal(classify(flow, x).argmax(1), y)


def test_classify_reports_all(tiny, capsys):
    ckpt, unnamed = checkpoint_and_images(tiny)
    for name in 'abc':
        (tiny / 'images' / name).mkdir(parents=True)
        for i, pixels in enumerate(golden.images(ord(name), 10, 16)):
            Image.fromarray(pixels).save(tiny / 'images' / name / f'{i}.png')
    rows = run(capsys, '--ckpt', ckpt, '--classify', tiny / 'images')['rows']
    assert [row['classifier'] for row in rows] == list(evaluate.CLASSIFIERS)
    assert all(0 <= row[name] <= 1 for row in rows for name in ('accuracy', 'centred'))
    assert all(row['ms per image'] > 0 and row['n'] == 30 for row in rows)
    with pytest.raises(UserError, match='--classify'):
        run(capsys, '--ckpt', ckpt, '--classify', unnamed)


def test_latents_draws_and_measures(tiny, capsys):
    ckpt, data = checkpoint_and_images(tiny)
    row, = run(capsys, '--ckpt', ckpt, '--latents', 1, '--reconstruct', data)['rows']
    assert row['PSNR at 0'] != row['PSNR at 2']
    assert 0 < row['spectral entropy'] <= 1 and row['std of mu'] > 0
    sizes = {'noise': (720, 480), 'std': (720, 480), 'interpolation': (11 * 16, 4 * 16)}
    for name, size in sizes.items():
        assert Image.open(tiny / f'latents_{name}.png').size == size


def test_grid_statistics_of_known_grids():
    i = torch.arange(8.0)
    ramp, checker = i[:, None].expand(8, 8), (i[:, None] + i) % 2 * 2 - 1
    wave = torch.cos(2 * torch.pi * i / 8)[:, None].expand(8, 8)
    grids = torch.stack([ramp, checker, wave]).reshape(3, 64, 1)
    stats = evaluate.grid_statistics(grids)
    assert stats['total variation'][:2].tolist() == pytest.approx([0.5, 2])       # down 1, across 0
    assert stats['high frequencies'].tolist()[1:] == pytest.approx([1, 0], abs=1e-6)
    # A cosine is two frequencies of the 63; a checkerboard is one.
    expected = [0, np.log(2) / np.log(63)]
    assert stats['spectral entropy'].tolist()[1:] == pytest.approx(expected, abs=1e-5)
    assert stats['autocorrelation'][1] < 0 < 0.9 < stats['autocorrelation'][0]
    g = torch.Generator().manual_seed(0)
    noise = evaluate.grid_statistics(torch.randn(4, 256, 16, generator=g))
    assert (noise['spectral entropy'] > 0.9).all() and (noise['autocorrelation'].abs() < 0.05).all()


def test_rate_and_elbo_by_their_definitions(tiny):
    trained = evaluate.Trained(*evaluate.load_model(save_checkpoint(tiny / 'ckpt.pt')))
    flow, image, y = trained.model.flow, torch.rand(2, 3, 16, 16), torch.zeros(2).long()
    x = torch.randn(2, *flow.shape)
    batch = evaluate.Encoded(None, None, image, y, x, None, 0.5, None)
    values = evaluate.likelihood(image + 0.1, batch, evaluate.Options(), HERE, trained)
    bits = (flow.nll(x, y) - 0.5 - math.log(0.5)) / math.log(2)    # the entropy's log 2 pi cancels
    torch.testing.assert_close(values['rate'], bits)
    share = x[0].numel() / image[0].numel()
    expected = share * bits + evaluate.distortion(image, image + 0.1, 0.1)
    torch.testing.assert_close(values['ELBO'], expected)


def test_std_of_mu_is_over_images(tiny, capsys):
    ckpt, data = checkpoint_and_images(tiny)
    row, = run(capsys, '--ckpt', ckpt, '--latents', 1, '--reconstruct', data)['rows']
    images = torch.from_numpy(np.load(data)['arr_0']).permute(0, 3, 1, 2) / 127.5 - 1
    std = evaluate.load_model(ckpt)[0].vae.encode(images)[0].std(0).mean().item()
    assert row['std of mu'] == pytest.approx(std, rel=1e-4)


def test_images_of_other_classes_have_no_class(tiny):
    ckpt, data = checkpoint_and_images(tiny)
    trained, data = evaluate.Trained(*evaluate.load_model(ckpt)), evaluate.open_data(str(data))
    batch = next(evaluate.encode(evaluate.Options(), HERE, trained, data, np.arange(10)))
    assert batch.y.tolist() == [3] * 10
    trained = trained._replace(class_names=[])
    assert next(evaluate.encode(evaluate.Options(), HERE, trained, data,
                                np.arange(10))).y.tolist() == [0] * 10


def test_centred_scores_have_lost_what_all_images_share(tiny, capsys, monkeypatch):
    ckpt, _ = checkpoint_and_images(tiny)
    for name in 'abc':
        (tiny / 'images' / name).mkdir(parents=True)
        for i in range(4):
            Image.new('RGB', (16, 16)).save(tiny / 'images' / name / f'{i}.png')
    biased = F.one_hot(torch.arange(3).repeat_interleave(4)) + torch.tensor([5.0, 0, 0])
    monkeypatch.setattr(evaluate, 'CLASSIFIERS', {'biased': lambda flow, x: biased})
    row, = run(capsys, '--ckpt', ckpt, '--classify', tiny / 'images')['rows']
    assert row['accuracy'] == pytest.approx(1 / 3) and row['centred'] == 1


def test_an_image_has_noise_of_its_own(tiny):
    ckpt, data = checkpoint_and_images(tiny)
    trained, data = evaluate.Trained(*evaluate.load_model(ckpt)), evaluate.open_data(str(data))
    a, b = [next(evaluate.encode(evaluate.Options(), HERE, trained, data, np.array(index))).noise
            for index in ([0, 1, 2], [2, 5, 1])]
    assert torch.equal(a[2], b[0]) and torch.equal(a[1], b[2]) and not torch.equal(a[0], a[1])
