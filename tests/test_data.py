"""data.py: every image Pillow opens, every layout, the order of batches, downloads, packing."""
import functools
import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
from PIL import Image, PngImagePlugin
import pytest
import torch

import data
from data import (BatchDataset, Part, UserError, batches, crop, fetch, hold_out, open_data,
                  pack)

ROOT = os.path.dirname(os.path.abspath(data.__file__))


# ----------------------------------------------------------------------------------- tiny data sets

def png(colour, size=(8, 8)):
    file = io.BytesIO()
    Image.new('RGB', size, colour).save(file, 'png')
    return file.getvalue()


def files(names):
    """Relative name -> bytes of a small image, each of its own colour."""
    return {name: png((20 * i, 255 - 20 * i, 7)) for i, name in enumerate(names)}


SIX = files(['bird/1.png', 'bird/2.png', 'cat/1.png', 'cat/more/2.png', 'dog/1.png', 'dog/2.png'])


def write_folder(path, contents):
    for name, raw in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(raw)
    return str(path)


def write_zip(path, contents, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', method) as z:
        for name, raw in contents.items():
            z.writestr(name, raw)
    return str(path)


def colours(d):
    return [d.load(i).getpixel((0, 0)) for i in range(len(d))]


@pytest.fixture
def six(tmp_path):
    return open_data(write_folder(tmp_path / 'six', SIX))


@pytest.fixture
def damaged(tmp_path):
    """200 images, the second of which has a header and nothing else."""
    contents = {f'{i:03d}.png': png((i, 0, 0)) for i in range(200)}
    contents['001.png'] = contents['001.png'][:50]
    return open_data(write_folder(tmp_path / 'damaged', contents))


# ---------------------------------------------------------------------------------------- one image

def load_one(tmp_path, name, save):
    """What `load` makes of the only image in a folder; save(path) writes it."""
    folder = tmp_path / 'one'
    folder.mkdir()
    save(folder / name)
    return np.asarray(open_data(str(folder)).load(0)).astype(int)


@pytest.mark.parametrize('mode, name, slack', [
    ('L', 'x.png', 0), ('LA', 'x.png', 0), ('P', 'x.png', 0), ('RGB', 'x.PNG', 0),
    ('RGBA', 'x.png', 0), ('RGB', 'x.bmp', 0), ('L', 'x.gif', 0), ('RGB', 'x.webp', 32),
    ('RGB', 'x.JPEG', 16), ('L', 'x.jpg', 16),
    ('CMYK', 'x.jpg', 16), ('CMYK', 'x.tif', 4), ('YCbCr', 'x.tif', 4), ('RGB', 'x.ppm', 0)])
def test_mode_becomes_rgb(tmp_path, mode, name, slack):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    image = grey.convert('P') if mode == 'P' else grey.convert('RGB').convert(mode)
    # Compressed, as Pillow 12.3, the last one for Python 3.10, can't read what it writes as YCbCr.
    more = {'compression': 'tiff_lzw'} if name.endswith('tif') else {}
    pixels = load_one(tmp_path, name, functools.partial(image.save, **more))
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels - np.asarray(grey)[..., None].astype(int)).max() <= slack


def test_bits_become_black_and_white(tmp_path):
    pixels = load_one(tmp_path, 'x.png', Image.fromarray(np.eye(5) > 0).save)
    assert (pixels == 255 * np.eye(5)[..., None]).all()


@pytest.mark.parametrize('name', ['x.png', 'x.tif', 'x.pgm'])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    values = np.array([[0, 257 * 100, 257 * 200, 65535]], np.uint16)
    pixels = load_one(tmp_path, name, Image.fromarray(values).save)
    assert pixels[0, :, 1].tolist() == [0, 100, 200, 255]


@pytest.mark.parametrize('mode, clear', [('RGBA', (9, 9, 9, 0)), ('LA', (9, 0))])
def test_transparent_becomes_white(tmp_path, mode, clear):
    assert (load_one(tmp_path, 'x.png', Image.new(mode, (3, 3), clear).save) == 255).all()


def test_half_transparent_is_mixed_with_white(tmp_path):
    pixels = load_one(tmp_path, 'x.png', Image.new('RGBA', (3, 3), (0, 0, 0, 128)).save)
    assert np.abs(pixels - 127).max() <= 1


@pytest.mark.parametrize('name', ['x.png', 'x.gif'])
def test_transparent_palette_entry_becomes_white(tmp_path, name):
    image = Image.new('P', (4, 4), 1)
    image.putpalette([0, 0, 0, 250, 0, 0])
    image.putpixel((0, 0), 0)
    pixels = load_one(tmp_path, name, lambda path: image.save(path, transparency=0))
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[3, 3].tolist() == [250, 0, 0]


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new('RGB', (6, 4), 'black')
    image.paste('white', (0, 0, 2, 4))                             # white at the left
    exif = Image.Exif()
    exif[0x0112] = 6                                               # to be shown turned clockwise
    pixels = load_one(tmp_path, 'x.png', lambda path: image.save(path, exif=exif))
    assert pixels.shape == (6, 4, 3) and (pixels[:2] == 255).all() and (pixels[2:] == 0).all()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new('RGB', (4, 4), c) for c in ('red', 'blue', 'lime')]
    save = functools.partial(frames[0].save, save_all=True, append_images=frames[1:])
    pixels = load_one(tmp_path, 'x.gif', save)
    assert pixels[0, 0].tolist() == [255, 0, 0]


def test_huge_image_is_no_bomb(tmp_path):
    Image.new('1', (20_000, 10_000)).save(tmp_path / 'x.png', compress_level=1)
    assert Image.open(tmp_path / 'x.png').size == (20_000, 10_000)


@pytest.mark.parametrize('values, expected', [
    (np.float32([[0, 0.5, 1]]), [0, 128, 255]), (np.float32([[0, 100, 255]]), [0, 100, 255]),
    (np.float32([[0, 257 * 100, 65535]]), [0, 100, 255]),
    (np.int32([[0, 257 * 100, 65535]]), [0, 100, 255]),
    (np.float32([[0, np.nan, 1]]), [0, 0, 255])])
def test_floats_and_long_integers_are_scaled(tmp_path, values, expected):
    assert load_one(tmp_path, 'x.tif', Image.fromarray(values).save)[0, :, 1].tolist() == expected


def test_large_profiles_and_texts_in_a_png(tmp_path):
    profile = np.random.default_rng(0).bytes(3_000_000)
    text = PngImagePlugin.PngInfo()
    text.add_text('note', 'x' * 3_000_000, zip=True)
    save = functools.partial(Image.new('RGB', (2, 2)).save, icc_profile=profile, pnginfo=text)
    assert load_one(tmp_path, 'x.png', save).shape == (2, 2, 3)


# --------------------------------------------------------------------------------------------- crop

def box(x):
    return (x > -0.5) & (x <= 0.5)


def cubic(x):
    """Keys 1981, with a = -0.5"""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x ** 2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, (x < 2) * far)


def slow_resize(pixels, h, w, kernel):
    """(h0, w0) -> (h, w): sums over all pixels, the kernel as wide as what becomes one pixel"""
    def weights(n, m):
        stretch = max(1, n / m)
        centres = (np.arange(m)[:, None] + 0.5) * n / m
        matrix = kernel((np.arange(n) + 0.5 - centres) / stretch).astype(float)
        return matrix / matrix.sum(1, keepdims=True)

    return weights(pixels.shape[0], h) @ pixels @ weights(pixels.shape[1], w).T


def slow_crop(pixels, size):
    """One channel (h, w) -> (size, size)"""
    while min(pixels.shape) >= 2 * size:
        pixels = slow_resize(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box)
    sides = [round(n * size / min(pixels.shape)) for n in pixels.shape]
    pixels = slow_resize(pixels, *sides, cubic)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top:top + size, left:left + size]


@pytest.mark.parametrize('w, h, size', [
    (32, 32, 32), (64, 64, 32), (100, 64, 16), (40, 90, 32), (33, 47, 8), (20, 28, 32)])
def test_crop_is_the_reference(w, h, size):
    # The middle greys: Pillow clips to bytes between its two passes, whose order is its own affair.
    pixels = np.random.default_rng(0).integers(64, 192, (h, w), dtype=np.uint8)
    error = crop(Image.fromarray(pixels).convert('RGB'), size)[..., 0]
    error = error - slow_crop(pixels.astype(float), size)
    assert np.abs(error).max() <= 2                                # it rounds there as well


@pytest.mark.parametrize('w, h', [
    (1, 1), (1, 5), (7, 2), (31, 500), (1, 2_000_000), (3_000_000, 2)])
def test_crop_has_the_size_asked_for(w, h):
    pixels = crop(Image.new('RGB', (w, h), (1, 2, 3)), 16)
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8 and (pixels == (1, 2, 3)).all()


# ------------------------------------------------------------------------------------------ layouts

LAYOUTS = {
    'folder': lambda path, contents: write_folder(path / 'data', contents),
    'zip': lambda path, contents: write_zip(path / 'data.zip', contents),
    'deflated zip': lambda path, contents: write_zip(
        path / 'data.zip', contents, zipfile.ZIP_DEFLATED),
    'wrapped zip': lambda path, contents: write_zip(
        path / 'data.zip', {f'a/b/{name}': raw for name, raw in contents.items()}),
    'unsorted zip': lambda path, contents: write_zip(
        path / 'data.zip', dict(reversed(contents.items()))),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_agree(tmp_path, six, layout):
    d = open_data(LAYOUTS[layout](tmp_path, SIX))
    assert d.class_names == ['bird', 'cat', 'dog'] and d.mirror
    assert d.labels.tolist() == [0, 0, 1, 1, 2, 2] and d.labels.dtype == np.int64
    assert colours(d) == colours(six) and d.name(3).endswith('cat/more/2.png')


def test_other_files_are_ignored(tmp_path, six):
    hidden = ['.DS_Store', 'cat/.DS_Store', '__MACOSX/cat/._1.png', 'cat/._1.png', '.cache/1.png',
              'cat/@eaDir/1.png']
    junk = [*hidden, 'README.txt', 'x/list.csv', 'cow/1.heic', 'cow/2.heic', 'dog/LICENSE', 'a.h5',
            'b.mpg', 'c.eps']
    for d in (open_data(write_folder(tmp_path / 'junk', SIX | dict.fromkeys(junk, b'?'))),
              open_data(write_zip(tmp_path / 'junk.zip', SIX | dict.fromkeys(junk, b'?')))):
        assert d.class_names == six.class_names and colours(d) == colours(six)
        ignored = d.notes[0]
        assert ignored.startswith('files ignored')
        assert '2 .heic' in ignored and '1 without an ending' in ignored
        assert d.notes[1] == 'folders ignored, as they hold no images: cow, x' and six.notes == []


def test_folders_of_numbered_images_are_not_ignored(tmp_path):
    """Where dataset.json names the classes, folders do not."""
    table = {'labels': [['00000/1.png', 3], ['00001/2.png', 5]]}
    contents = files(['00000/1.png', '00001/2.png']) | {
        'dataset.json': json.dumps(table).encode(), '00000/notes.txt': b'?', 'x/list.csv': b'?'}
    d = open_data(write_folder(tmp_path / 'numbered', contents))
    assert d.class_names == ['3', '5'] and d.notes[1].endswith('no images: x')


def test_what_lies_beside_the_only_class_is_said(tmp_path):
    contents = files(['cat/1.png', 'cat/2.png']) | {'dog/1.heic': b'?'}
    d = open_data(write_folder(tmp_path / 'x', contents))
    assert len(d) == 2
    assert d.notes == ['files ignored, as their names are not those of images: 1 .heic']


def test_names_of_windows_and_others(tmp_path, six):
    odd = ['bird\\1.png', './bird/2.png', '/cat/1.png', 'cat\\more\\2.png', './dog//1.png',
           'dog/2.png']
    with zipfile.ZipFile(tmp_path / 'odd.zip', 'w') as z:
        for name, raw in zip(odd, SIX.values()):
            z.writestr(zipfile.ZipInfo(name), raw)
        z.writestr('more\\', b'')                                # a folder, as Windows may write it
    d = open_data(str(tmp_path / 'odd.zip'))
    assert d.class_names == six.class_names and d.labels.tolist() == six.labels.tolist()
    assert colours(d) == colours(six) and d.notes == []


@pytest.mark.parametrize('splits', [['train', 'val'], ['Train', 'test', 'validation']])
def test_splits_are_no_classes(tmp_path, splits):
    contents = files([f'{split}/{kind}/1.png' for split in splits for kind in ('cat', 'dog')])
    folder = write_folder(tmp_path / 'splits', contents)
    for path in folder, write_zip(tmp_path / 'splits.zip', contents):
        message = 'splits, not classes; name the one to use, such as .*splits'
        with pytest.raises(UserError, match=message):
            open_data(path)
    assert open_data(str(tmp_path / 'splits' / splits[0])).class_names == ['cat', 'dog']


def test_links_that_lead_back_are_not_followed(tmp_path, six):
    folder = tmp_path / 'six'
    (folder / 'cat' / 'self').symlink_to(folder / 'cat')
    (folder / 'dog' / 'up').symlink_to('..')
    # this one is a class like any other
    (folder / 'fish').symlink_to(folder / 'bird')
    d = open_data(f'{folder}/')
    assert d.class_names == ['bird', 'cat', 'dog', 'fish'] and len(d) == 8


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    path, scandir = write_folder(tmp_path / 'six', SIX), os.scandir

    def refuse(folder):                                            # root may list anything
        if str(folder).endswith('dog'):
            raise PermissionError(13, 'Permission denied', folder)
        return scandir(folder)
    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(UserError, match='six/dog could not be listed .Permission denied'):
        open_data(path)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_classes_that_are_numbers_are_in_their_order(tmp_path, layout):
    d = open_data(LAYOUTS[layout](tmp_path, files([f'{i}/1.png' for i in (0, 1, 2, 10, 11)])))
    assert d.class_names == ['0', '1', '2', '10', '11'] and d.labels.tolist() == [0, 1, 3, 4, 2]


@pytest.mark.parametrize('method', [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 'encrypted'])
def test_zips_that_cannot_be_read_are_refused_at_once(tmp_path, method):
    stored = zipfile.ZIP_STORED if method == 'encrypted' else method
    path = write_zip(tmp_path / 'x.zip', SIX, stored)
    if method == 'encrypted':                                      # its flag, in all headers
        raw = (tmp_path / 'x.zip').read_bytes()
        raw = raw.replace(b'PK\1\2\x14\3\x14\0\0', b'PK\1\2\x14\3\x14\0\1')
        (tmp_path / 'x.zip').write_bytes(raw)
    with pytest.raises(UserError, match='bird/1.png in .*x.zip is encrypted, or compressed'):
        open_data(path)


def test_a_folder_that_is_called_like_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 'shapes', SIX)
    assert './shapes' in open_data('shapes').notes[0] and len(open_data('shapes')) == 100_000
    assert len(open_data('./shapes')) == 6


@pytest.mark.parametrize('layout', LAYOUTS)
def test_flat_data_has_no_classes(tmp_path, layout):
    d = open_data(LAYOUTS[layout](tmp_path, files(['1.png', '2.png', '3.png'])))
    assert d.class_names == [] and d.labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize('layout', LAYOUTS)
def test_dataset_json(tmp_path, layout):
    names = ['00000/img0.png', '00000/img1.png', '00001/img2.png']
    labels = {'labels': [[name, label] for name, label in zip(names, (6, 0, 2))]}
    contents = files(names) | {'dataset.json': json.dumps(labels).encode()}
    d = open_data(LAYOUTS[layout](tmp_path, contents))
    assert d.labels.tolist() == [2, 0, 1] and d.class_names == ['0', '2', '6']


def test_dataset_json_without_labels(tmp_path):
    contents = files(['a/1.png', 'b/2.png']) | {'dataset.json': b'{"labels": null}'}
    d = open_data(write_folder(tmp_path, contents))
    assert d.class_names == [] and d.labels.tolist() == [0, 0]


@pytest.mark.parametrize('text', ['{', '{}', '[]', '{"labels": [["a/1.png", 0]]}',
                                  '{"labels": [["a/1.png", 0], ["b/2.png", -1]]}'])
def test_dataset_json_that_makes_no_sense(tmp_path, text):
    path = write_folder(tmp_path, files(['a/1.png', 'b/2.png']) | {'dataset.json': text.encode()})
    with pytest.raises(UserError, match='dataset.json in .* must say'):
        open_data(path)


def test_what_is_no_data_is_told_in_a_sentence(tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.zip').write_text('no zip')
    write_zip(tmp_path / 'cut.zip', SIX)
    os.truncate(tmp_path / 'cut.zip', 700)
    write_zip(tmp_path / 'none.zip', {'README.txt': b'?'})
    write_folder(tmp_path / 'mixed', files(['1.png', 'cat/2.png']))
    for name, words in {'empty': 'no images in', 'missing': 'there is no',
                        'text.zip': 'cannot be read', 'cut.zip': 'cannot be read',
                        'none.zip': 'no images in', 'mixed': 'beside its class'}.items():
        with pytest.raises(UserError, match=words) as e:
            open_data(str(tmp_path / name))
        assert name in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('layout', ['folder', 'deflated zip'])
def test_data_can_be_pickled(tmp_path, layout):
    d = open_data(LAYOUTS[layout](tmp_path, SIX))
    assert colours(pickle.loads(pickle.dumps(d))) == colours(d)


# ---------------------------------------------------------------------------------------------- npz

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize('save, kind', [(np.savez, np.memmap), (np.savez_compressed, np.ndarray)])
def test_npz_of_images_and_labels(tmp_path, save, kind):
    path = str(tmp_path / 'x.npz')
    save(path, PIXELS, np.array([7, 2, 10, 2, 7, 10]))
    d = open_data(path)
    assert type(d.images) is kind and d.notes == []               # large ones stay on disk
    assert d.class_names == ['2', '7', '10'] and d.labels.tolist() == [1, 0, 2, 0, 1, 2]
    assert all((np.asarray(d.load(i)) == PIXELS[i]).all() for i in range(6))
    assert same(feed(d, 0, 3), feed(d, 0, 3, workers=2))
    pack(d, str(tmp_path / 'x.zip'), 8, workers=0)
    packed = open_data(str(tmp_path / 'x.zip'))
    assert packed.class_names == d.class_names and sorted(colours(packed)) == sorted(colours(d))


def test_npz_by_columns(tmp_path):
    np.savez(tmp_path / 'x.npz', np.asfortranarray(PIXELS))
    d = open_data(str(tmp_path / 'x.npz'))
    assert all((np.asarray(d.load(i)) == PIXELS[i]).all() for i in range(6))


@pytest.mark.parametrize('more, notes', [([], 0), ([np.zeros(5, int)], 1), ([np.zeros(6)], 1)])
def test_npz_without_labels_has_no_classes(tmp_path, more, notes):
    np.savez(tmp_path / 'x.npz', PIXELS, *more)
    d = open_data(str(tmp_path / 'x.npz'))
    assert d.class_names == [] and d.labels.tolist() == [0] * 6 and len(d.notes) == notes


@pytest.mark.parametrize('save, words', [
    (lambda path: np.savez(path, PIXELS[..., :1]), r'uint8 \(6, 8, 8, 1\); it must be uint8'),
    (lambda path: np.savez(path, PIXELS / 255), 'is float64'),
    (lambda path: np.savez(path, np.zeros((32, 32, 3), np.uint8)), 'a single image'),
    (lambda path: np.savez(path, images=PIXELS), r'holds no images \(arr_0\)'),
    (lambda path: path.write_text('hello'), 'cannot be read, or is damaged')])
def test_npz_of_something_else_is_refused(tmp_path, save, words):
    save(tmp_path / 'x.npz')
    with pytest.raises(UserError, match=words) as e:
        open_data(str(tmp_path / 'x.npz'))
    assert 'x.npz' in str(e.value)


# ------------------------------------------------------------------------------------------ batches

def feed(d, start, steps, batch_size=4, seed=0, flip=True, **options):
    return list(batches(d, 8, batch_size, seed, flip, start, steps, **options))


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and x[2] == y[2] for x, y in zip(a, b))


@pytest.fixture(scope='module')
def shapes():
    return open_data('shapes')


def test_batch_format(shapes):
    (images, labels, replaced), = feed(shapes, 0, 1)
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (4,) and labels.dtype == torch.int64 and replaced == 0


def test_batches_depend_on_the_seed_alone(shapes):
    assert same(feed(shapes, 0, 3), feed(shapes, 0, 3))
    assert not same(feed(shapes, 0, 3), feed(shapes, 0, 3, seed=1))


def test_resumed_batches_are_the_tail(damaged):
    whole = feed(damaged, 0, 60)
    assert same(whole[45:], feed(damaged, 45, 60)) and sum(replaced for *_, replaced in whole) > 0


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_change_nothing_and_need_no_shared_memory(damaged, monkeypatch, workers):
    """Docker gives 64 MB of it; when they are full, torch waits for ever."""
    def refuse(*args):
        raise AssertionError('a tensor was to be shared')
    monkeypatch.setattr(torch.UntypedStorage, '_share_fd_cpu_', refuse)
    monkeypatch.setattr(torch.UntypedStorage, '_share_filename_cpu_', refuse)
    assert same(feed(damaged, 0, 60), feed(damaged, 0, 60, workers=workers))


def test_pinned_batches_keep_their_layout(shapes, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self: pinned.append(self.shape) or self)
    assert same(feed(shapes, 0, 2, pin=True), feed(shapes, 0, 2)) and pinned == [(4, 8, 8, 3)] * 2


def test_two_ranks_make_one_batch(damaged):
    whole = feed(damaged, 0, 60)
    halves = [feed(damaged, 0, 60, rank=r, world=2) for r in (0, 1)]
    for (images, labels, replaced), *ranks in zip(whole, *halves, strict=True):
        assert torch.equal(images, torch.cat([r[0] for r in ranks]))
        assert torch.equal(labels, torch.cat([r[1] for r in ranks]))
        assert replaced == sum(r[2] for r in ranks)


@pytest.mark.parametrize('batch_size', [4, 5, 15])
def test_every_epoch_shows_every_image_once(six, batch_size):
    steps = -(-18 // batch_size)
    shown = feed(six, 0, steps, batch_size)
    reds = torch.cat([images[:, 0, 0, 0] for images, *_ in shown]).tolist()
    epochs = [reds[i:i + 6] for i in (0, 6, 12)]
    assert all(sorted(epoch) == [0, 20, 40, 60, 80, 100] for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_labels_stay_with_their_images(six):
    for images, labels, _ in feed(six, 0, 6):
        assert torch.equal(images[:, 0, 0, 0].long() // 40, labels)


def test_flip_mirrors_half_of_the_images(shapes):
    plain, flipped = (torch.cat([step[0] for step in feed(shapes, 0, 16, flip=flip)])
                      for flip in (False, True))
    mirrored = (flipped == plain.flip(3)).flatten(1).all(1)
    assert ((flipped == plain).flatten(1).all(1) | mirrored).all() and 16 < mirrored.sum() < 48


def test_unreadable_images_are_replaced_and_counted(damaged):
    seen = feed(damaged, 0, 100, batch_size=4)                     # two epochs
    reds = torch.cat([images[:, 0, 0, 0] for images, *_ in seen])
    assert sum(replaced for *_, replaced in seen) == 2 and (reds != 1).all() and len(reds) == 400


def test_too_many_unreadable_images_stop_the_run(tmp_path):
    contents = {f'{i:02d}.png': png('red')[:50 if i % 10 == 0 else None] for i in range(50)}
    d = open_data(write_folder(tmp_path / 'bad', contents))
    with pytest.raises(UserError, match='of [0-9]* images are unreadable, such as .*0.png'):
        feed(d, 0, 100)


def test_nothing_but_unreadable_images(tmp_path):
    d = open_data(write_folder(tmp_path / 'bad', {'1.png': png('red')[:50]}))
    with pytest.raises(UserError, match='a hundred images') as e:
        feed(d, 0, 100, workers=1)
    assert '\n' not in str(e.value)


def test_a_refusal_that_is_still_at_hand_does_not_keep_the_program_from_ending(tmp_path):
    """The exception holds the loader, and the loader its worker, until the very end."""
    bad = write_folder(tmp_path / 'bad', {'1.png': png('red')[:50]})
    done = subprocess.run([sys.executable, '-c', f"""
import data
try:
    list(data.batches(data.open_data({str(bad)!r}), 8, 4, 0, False, 0, 100, workers=1))
except data.UserError as e:
    kept = e
    print('refused')
"""], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == 'refused\n'


def test_flips_differ_from_step_to_step(shapes):
    plain, flipped = (torch.cat([step[0] for step in feed(shapes, 0, 16, flip=flip)])
                      for flip in (False, True))
    mirrored = (flipped == plain.flip(3)).flatten(1).all(1)
    assert len({tuple(row) for row in mirrored.view(16, 4).tolist()}) > 4


def test_replacements_are_random_and_bring_their_labels(tmp_path):
    """Of 40 images every other is whole; class i % 4 // 2."""
    contents = {f'{i % 4 // 2}/{i:02d}.png': png((i, 0, 0))[:None if i % 2 else 50]
                for i in range(1, 41)}
    d = open_data(write_folder(tmp_path / 'half', contents))
    images, labels, broken = BatchDataset(d, 8, 40, 0, False, 0, 1)[0]
    reds = images[:, 0, 0, 0]
    assert len(broken) > 20 and (reds % 2 == 1).all() and (reds % 4 // 2 == labels).all()
    assert np.bincount(reds).max() < 8                             # not one for all


def test_a_part_is_a_share_rounded_up_that_flips_as_the_whole(shapes):
    letters = Part(shapes, np.arange(30))
    letters.mirror = False
    parts = hold_out(letters, 0.05)
    assert [len(part) for part in parts] == [28, 2] and not any(part.mirror for part in parts)


def test_a_hundredth_of_the_images_may_be_unreadable():
    data.refuse_damage(['a'], 6, 600)
    with pytest.raises(UserError, match='7 of 600'):
        data.refuse_damage(['a'], 7, 600)


# ---------------------------------------------------------------------------------------- downloads

@pytest.fixture
def server(tmp_path, monkeypatch):
    """-> folder that is served, its address"""
    # would ask a name server, for seconds
    monkeypatch.setattr(socket, 'getfqdn', lambda host: host)
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder = tmp_path / 'served'
    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as s:
        threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
        yield folder, f'http://127.0.0.1:{s.server_port}'
        s.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """-> folder that downloads come to; it is not there yet"""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    return tmp_path / 'hub' / 'checkpoints'


def md5(raw):
    return 'md5:' + hashlib.md5(raw).hexdigest()


def test_fetch_downloads_once(server, cache):
    folder, address = server
    (folder / 'x').write_bytes(b'weights')
    sha256 = 'sha256:' + hashlib.sha256(b'weights').hexdigest()[:8]
    path = fetch(f'{address}/x', sha256)
    assert path == str(cache / 'x') and (cache / 'x').read_bytes() == b'weights'
    (folder / 'x').unlink()
    fetch(f'{address}/x', sha256)                                  # a good file needs no server
    assert os.listdir(cache) == ['x']


def test_no_home_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: '~/.cache/torch/hub')
    with pytest.raises(UserError, match='no home directory .*HOME'):
        fetch('http://127.0.0.1:1/x', md5(b'weights'))
    assert not os.path.exists('~')


def test_fetch_replaces_a_truncated_file(server, cache):
    folder, address = server
    (folder / 'x').write_bytes(b'weights')
    cache.mkdir(parents=True)
    (cache / 'y').write_bytes(b'wei')
    fetch(f'{address}/x', md5(b'weights'), name='y')
    assert (cache / 'y').read_bytes() == b'weights'


@pytest.mark.parametrize('url', ['/corrupt', '/missing', 'http://127.0.0.1:1/x', 'nonsense'])
def test_fetch_fails_in_a_sentence_and_leaves_nothing(server, cache, url):
    folder, address = server
    (folder / 'corrupt').write_bytes(b'weigths')
    url = address + url if url.startswith('/') else url
    with pytest.raises(UserError) as e:
        fetch(url, md5(b'weights'), 'give it with --weights', name='x')
    said = str(e.value)
    assert all(part in said for part in (url, str(cache / 'x'), '--weights')) and '\n' not in said
    assert os.listdir(cache) == []


def serve(monkeypatch, server, table, contents):
    """Let the data set of `table` be these files on the local server."""
    folder, address = server
    write_folder(folder, contents)
    files = {f'{address}/{name}': md5(raw) for name, raw in contents.items()}
    monkeypatch.setattr(data, table, files)


def test_cifar10(monkeypatch, server, cache):
    rows = np.random.default_rng(0).integers(0, 256, (5, 2, 3073), dtype=np.uint8)
    rows[..., 0] = np.arange(10).reshape(5, 2)
    members = {f'data_batch_{i + 1}.bin': rows[i].tobytes() for i in range(5)}
    names = '\n'.join('abcdefghij').encode() + b'\n\n'
    members |= {'test_batch.bin': b'?', 'batches.meta.txt': names}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode='w:gz') as tar:
        for name, raw in members.items():
            info = tarfile.TarInfo(f'cifar-10-batches-bin/{name}')
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    serve(monkeypatch, server, 'CIFAR10', {'cifar-10-binary.tar.gz': archive.getvalue()})
    d = open_data('cifar10')
    assert d.class_names == list('abcdefghij') and d.labels.tolist() == list(range(10)) and d.mirror
    planes = rows[1, 0, 1:].reshape(3, 32, 32)                     # image 2
    assert (np.asarray(d.load(2)) == planes.transpose(1, 2, 0)).all()


def test_fashion_mnist(monkeypatch, server, cache):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    serve(monkeypatch, server, 'FASHION_MNIST', {
        'train-images-idx3-ubyte.gz': gzip.compress(bytes(16) + pixels.tobytes()),
        'train-labels-idx1-ubyte.gz': gzip.compress(bytes(8) + bytes([9, 0, 3]))})
    d = open_data('fashion_mnist')
    names = [d.class_names[label] for label in d.labels]
    assert names == ['ankle-boot', 't-shirt', 'dress'] and d.mirror
    image = np.asarray(d.load(1))
    inside = image[2:30, 2:30]
    assert (inside == pixels[1, ..., None]).all() and inside.sum() == image.sum()
    assert crop(d.load(1), 32).tolist() == image.tolist()


# ------------------------------------------------------------------------------------------- shapes

def test_shapes_depend_on_the_index_alone(shapes):
    again = open_data('shapes')
    assert all(shapes.load(i).tobytes() == again.load(i).tobytes() for i in (0, 7, 99_999))
    assert len({crop(shapes.load(i), 32).tobytes() for i in range(200)}) == 200


def test_shapes_are_balanced(shapes):
    assert len(shapes) == 100_000 and len(shapes.class_names) == 10
    assert shapes.class_names == sorted(shapes.class_names)
    assert np.bincount(shapes.labels).tolist() == [10_000] * 10


def test_shapes_stay_inside_the_picture(shapes):
    """The background changes from top to bottom only, so at the border every row is of one
    colour."""
    for i in range(50):
        pixels = np.asarray(shapes.load(i)).astype(int)
        assert np.ptp(pixels[:, [0, 1, -2, -1]], axis=1).max() == 0
        assert np.ptp(pixels[:2], axis=1).max() == 0


# ------------------------------------------------------------------------------------------ packing

def test_packed_is_cropped(tmp_path, damaged):
    path = str(tmp_path / 'packed.zip')
    assert pack(damaged, path, 6, workers=0) == ['001.png']
    packed = open_data(path)
    kept = [i for i in range(200) if i != 1]
    assert len(packed) == 199 and all((np.asarray(packed.load(j)) == crop(damaged.load(i), 6)).all()
                                      for j, i in enumerate(kept))


@pytest.mark.parametrize('end', [KeyboardInterrupt, OSError(28, 'No space left on device')])
def test_a_pack_that_fails_leaves_nothing(tmp_path, monkeypatch, six, end):
    (tmp_path / 'out').mkdir()

    def fail(self, *args):
        raise end
    monkeypatch.setattr(zipfile.ZipFile, 'writestr', fail)
    with pytest.raises(type(end) if isinstance(end, OSError) else end):
        pack(six, str(tmp_path / 'out' / 'x.zip'), 8, workers=0)
    assert os.listdir(tmp_path / 'out') == []


def test_packed_numbers_stay_the_same(tmp_path):
    labels = {'labels': [[f'{i}.png', i] for i in range(12) if i != 5]}           # 5 does not occur
    contents = files([name for name, _ in labels['labels']])
    contents['dataset.json'] = json.dumps(labels).encode()
    d, path = open_data(write_zip(tmp_path / 'x.zip', contents)), str(tmp_path / 'packed.zip')
    pack(d, path, 8, workers=0)
    packed = open_data(path)
    assert packed.class_names == d.class_names == [str(i) for i in range(12) if i != 5]
    by_colour = lambda d: dict(zip(colours(d), d.labels.tolist()))
    assert by_colour(packed) == by_colour(d)


def test_packed_keeps_classes(tmp_path, six):
    path = str(tmp_path / 'packed.zip')
    pack(six, path, 8, workers=2)
    packed = open_data(path)
    assert packed.class_names == six.class_names and packed.labels.tolist() == six.labels.tolist()
    assert colours(packed) == colours(six)
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None
        assert {info.compress_type for info in z.infolist()} == {zipfile.ZIP_STORED}


# ------------------------------------------------------------------------------------ command lines

def run(*args, **env):
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True,
                          timeout=60, env=os.environ | env)


def test_nothing_to_pack_and_names_that_are_no_text(tmp_path):
    """Windows' old names of folders, and files whose endings Pillow does not know."""
    packed = str(tmp_path / 'x.zip')
    named = open_data(write_folder(tmp_path / 'a', {'c/1.png': png('red'), 'x/1.png': png('red')}))
    named.class_names[0] = 'caf\udce9'                             # Mac's disks refuse such names
    assert data.pack(named, packed, 8, 0) == []
    assert zipfile.ZipFile(packed).namelist() == ['caf\\udce9/00000000.png', 'x/00000001.png']
    unreadable = open_data(write_folder(tmp_path / 'b', {'1.png': b'', '2.png': b''}))
    with pytest.raises(UserError, match='none of the 2 images can be read, such as 1.png'):
        data.pack(unreadable, str(tmp_path / 'y.zip'), 8, 0)
    assert not (tmp_path / 'y.zip').exists()
    with pytest.raises(UserError, match='no images .*: 2 .heic'):
        open_data(write_folder(tmp_path / 'c', {'1.heic': b'', '2.heic': b''}))


def test_command_packs(tmp_path, damaged):
    done = run('data.py', damaged.source.path, str(tmp_path / 'x.zip'),
               '--size', '8', '--workers', '1')
    assert done.returncode == 0 and '199 images' in done.stdout and '001.png' in done.stdout
    assert len(open_data(str(tmp_path / 'x.zip'))) == 199


@pytest.mark.parametrize('args, words', [
    ('nowhere x.zip', 'there is no nowhere'), ('shapes x.zip --size 0', '--size'),
    ('shapes', 'dst'),
    ('shapes x.zip --sise 8', '--sise'), ('shapes full.zip', 'exists already'),
    ('shapes full.zip/x.zip', 'full.zip: ')])
def test_mistakes_end_in_a_sentence(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'full.zip').touch()
    monkeypatch.setattr(sys, 'argv', ['data.py', *args.split()])
    with pytest.raises(SystemExit) as e:
        data.cli(data.main)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and not out
    assert err.startswith('error: ') and words in err and err.count('\n') == 1


def test_closed_pipe_is_quiet():
    program = 'import data; data.cli(lambda argv: print(list(range(10 ** 6))))'
    command = f'"{sys.executable}" -c "{program}" | true'
    done = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True)
    assert done.stderr == b''


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupt_is_quiet(tmp_path, number):
    """As a terminal and a scheduler do it: the signal goes to the program and to its workers."""
    command = [sys.executable, 'data.py', 'shapes', str(tmp_path / 'x.zip'),
               '--size', '64', '--workers', '2']
    # Whoever starts tests in the background may have them ignore Ctrl-C, and all that they start.
    program = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not any(path.stat().st_size for path in tmp_path.glob('x.zip.*.tmp')):
        assert program.poll() is None
        time.sleep(0.05)
    os.killpg(program.pid, number)
    _, err = program.communicate(timeout=900)
    assert program.returncode == 130, err
    assert err.endswith('interrupted; what was saved before is untouched\n'), err
    assert 'Traceback' not in err, err
    assert os.listdir(tmp_path) == []


def test_killed_worker_stops_nothing_but_next(shapes):
    """torch's own handler would raise anywhere, and the steps since the last save would be lost."""
    next(data.prefetch(BatchDataset(shapes, 8, 4, 0, False, 0, 1), range(2), workers=1))
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


def test_killed_worker_is_told_in_a_sentence():
    done = run('-c', '''
import os, signal, data
class Deadly(data.Data):
    def load(self, i):
        os.kill(os.getpid(), signal.SIGKILL)
data.cli(lambda argv: list(data.batches(Deadly([], [0] * 9), 8, 4, 0, False, 0, 5, workers=1)))
''')
    # Before our sentence torch may log what it likes.
    assert done.returncode == 2 and 'fewer --workers' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize('shortage', [
    lambda argv: np.empty(2 ** 55, 'd'), lambda argv: torch.empty(2 ** 55, dtype=torch.double),
    lambda argv: throw(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. '
                                              'GPU 0 has a total capacity of 79.2 GiB.'))])
def test_too_little_memory_is_told_in_a_sentence(shortage, capsys):
    """The first two ask for 2^58 bytes, which no machine can address."""
    with pytest.raises(SystemExit) as e:
        data.cli(shortage)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1
    assert 'llocate' in err and '--grad_accum' in err and 'capacity' not in err


@pytest.mark.parametrize('text, words', [
    ('CUDA error: out of memory\nSearch for it\nCompile with it', 'not enough memory'),
    ('cuDNN error: CUDNN_STATUS_ALLOC_FAILED', 'not enough memory'),
    ('[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1', 'another process')])
def test_what_the_machine_says_becomes_a_sentence(text, words):
    sentence = data.circumstance(RuntimeError(text))
    assert words in sentence and '\n' not in sentence


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match='a defect'):
        data.cli(lambda argv: throw(RuntimeError('a defect')))


@pytest.mark.parametrize('error, code, words', [
    ('data.UserError("wrong")', 2, 'error: wrong'), ('ValueError("defect")', 1, 'Traceback')])
def test_one_of_several_processes_ends_at_once(error, code, words):
    """Without the parting that is registered, in which a GPU's process would wait for the rest."""
    program = f"""
import atexit, data
atexit.register(print, 'parting')
def fail(argv):
    print('begun')
    raise {error}
data.cli(fail)
"""
    alone, several = run('-c', program), run('-c', program, RANK='0')
    for done in alone, several:
        assert done.returncode == code and words in done.stderr
    assert 'parting' in alone.stdout and several.stdout == 'begun\n'


def throw(error):
    raise error


def alive(pid):
    try:
        os.kill(pid, 0)
        return open(f'/proc/{pid}/stat').read().split()[2] != 'Z'
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'),
                    reason='a Mac cannot tell who sent a signal')
def test_loading_processes_obey_nobody_but_their_parent(shapes):
    """A scheduler signals every process of a job, and the step in which that happens must still get
    its images."""
    order = data.prefetch(data.BatchDataset(shapes, 8, 4, 0, False, 0, 1), range(8), workers=1)
    first, worker = next(order), multiprocessing.active_children()[0]
    for name in ('TERM', 'HUP', 'USR1', 'USR2', 'INT'):
        subprocess.run(['kill', f'-{name}', str(worker.pid)], check=True)
    assert len(list(order)) == 7 and len(first[1]) == 4
    worker.join()
    assert worker.exitcode == 0
    dataset = data.BatchDataset(shapes, 8, 4, 0, False, 0, 1)
    order = data.prefetch(dataset, range(10 ** 9), workers=1)
    worker = multiprocessing.active_children()[0]
    next(order)
    worker.terminate()                                             # by its parent
    worker.join()
    assert worker.exitcode == 0


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='looks into /proc')
def test_loading_processes_end_with_a_killed_parent():
    program = subprocess.Popen([sys.executable, '-c', '''
import multiprocessing, os
import data
if __name__ == '__main__':
    multiprocessing.set_start_method('forkserver')                 # Python 3.14's default
    feed = data.batches(data.open_data('shapes'), 8, 4, 0, False, 0, 10 ** 9, workers=1)
    next(feed)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    for _ in feed:
        pass
'''], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(program.stdout.readline())
    assert alive(worker)
    program.kill()
    program.wait()
    while alive(worker):                                           # it looks every few seconds
        time.sleep(0.1)


def test_a_file_that_cannot_be_written_is_one_sentence(monkeypatch, capsys):
    def full(argv):
        raise OSError(28, 'No space left on device', 'out/x.png')
    with pytest.raises(SystemExit) as e:
        data.cli(full)
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith('error: out/x.png: No space left on device; ')


def test_closed_and_narrow_terminals(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), 'ascii', write_through=True)
    monkeypatch.setattr(sys, 'stdout', narrow)
    monkeypatch.setattr(sys, 'stderr', None)                       # closed
    data.cli(lambda argv: print('größe', file=sys.stdout)
             or print('x', file=sys.stderr, flush=True))
    assert narrow.buffer.getvalue() == b'gr\\xf6\\xdfe\n'
