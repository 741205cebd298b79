"""Images and labels: from a folder, a zip, two classic downloads, or drawn by this file.

    data = open_data('shapes')                    or 'cifar10', 'fashion_mnist', a folder, a zip
    data.notes                                    sentences about what was left out, [] if nothing
    data.load(i)                                  PIL image, RGB, of its own size
    data.labels[i], data.class_names              int64; list of str, [] for data without classes
    crop(data.load(i), size)                      (size, size, 3) uint8
    for images, labels, replaced in batches(data, ...)

Decoding photographs may take longer than training on them. Crop and pack them once:

    python data.py imagenet/train imagenet256.zip --size 256
"""
import argparse
import collections
import colorsys
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import pathlib
import pickle
import posixpath
import shutil
import signal
import struct
import sys
import tarfile
import threading
import typing
import urllib.request
import uuid
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

CACHE = os.path.join(torch.hub.get_dir(), 'simflow')
# Pillow knows more, but those are films, documents and arrays.
IMAGE_ENDINGS = set('.jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm '
                    '.jp2 .avif .tga'.split())
SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'test', 'testing'}
METHODS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
# Pillow refuses twice as many pixels as this. Its own limit guards servers against uploads; in a training set
# a huge image is a scan or a satellite's, and only what would hardly fit in memory is taken for damage.
Image.MAX_IMAGE_PIXELS = 2 ** 29
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 26     # colour profiles, notes


# ---------------------------------------------------------------------------------------- one image

class Unreadable(Exception):
    """An image that can't be read or decoded."""


def rgb(image):
    """PIL image of any mode -> RGB; what is transparent is composited on white. Integers of more than
    8 bits are taken to be of 16, floats to end at 1, 255 or 65535: the first that none exceeds."""
    if image.mode.startswith(('I', 'F')):                          # Pillow would clip at 255
        values = np.nan_to_num(np.asarray(image, float))
        if image.mode.startswith('I') or values.max() > 255:
            top = 65535
        else:
            top = 255 if values.max() > 1 else 1
        image = Image.fromarray(np.uint8(values.clip(0, top) * (255 / top) + 0.5))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def crop(image, size):
    """PIL image, RGB -> (size, size, 3) uint8: the middle square, scaled as in ADM (Dhariwal & Nichol 2021),
    as published FID statistics are. JPEG's own down-scaling would be faster, but gives other pixels."""
    # Of an image as thin as a thread only the middle is enlarged: the whole would take gigabytes.
    if max(image.size) / min(image.size) * size ** 2 > 2 ** 26:
        middle = [min(side, 4 * min(image.size)) for side in image.size]
        image = ImageOps.fit(image, middle, Image.Resampling.NEAREST)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


# --------------------------------------------------------------------------------- folders and zips

class Data:
    """Images with labels. Picklable, so that it can travel to loading processes.

    class_names: list of str, [] for data without classes.  labels: (N,) int64, all 0 without classes.
    mirror: is a mirror image as right as the original?  load(i): PIL image, RGB; raises Unreadable.
    notes: sentences for the user, about what was left out.
    """
    mirror = True                                                  # digits or text would say False

    def __init__(self, class_names, labels, notes=()):
        self.class_names, self.labels = list(class_names), np.asarray(labels, np.int64)
        self.notes = list(notes)

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """What messages call image i."""
        return f'image {i}'


class Folder:
    """All files below a folder. names: relative, sorted, with / between.  read(i): the bytes of one."""

    def __init__(self, path):
        self.path, self.names, above = os.path.normpath(path), [], {}
        for folder, below, files in os.walk(self.path, onerror=refuse_folder, followlinks=True):
            chain, real = above.get(os.path.dirname(folder), ()), os.path.realpath(folder)
            if real in chain:                                      # a link that leads back
                below.clear()
                continue
            above[folder] = (*chain, real)
            home = os.path.relpath(folder, self.path).replace(os.sep, '/')
            self.names += [posixpath.normpath(f'{home}/{file}') for file in files]
        self.names.sort()

    def read(self, i):
        with open(os.path.join(self.path, self.names[i]), 'rb') as f:
            return f.read()


def refuse_folder(error):
    raise UserError(f'{error.filename} could not be listed ({error.strerror}); make it readable, or '
                    'move it away')


class Zip:
    """The same of a zip. It notes where each file lies and opens the zip anew for each read, which costs
    microseconds; a ZipFile can't be pickled, nor shared by processes, and ImageNet's takes a gigabyte."""

    def __init__(self, path):
        self.path, files = path, {}
        with zipfile.ZipFile(path) as z:
            for info in z.infolist():                              # Windows has \ between, others ./ first
                name = posixpath.normpath(info.filename.replace('\\', '/')).lstrip('/')
                if not info.filename.endswith(('/', '\\')):
                    files[name] = info
        for name, info in files.items():
            if info.flag_bits & 1 or info.compress_type not in METHODS:
                raise UserError(f'{name} in {path} is encrypted, or compressed by another method than '
                                'deflate; unpack the zip, and name the folder')
        self.names = sorted(files)
        infos = [files[name] for name in self.names]
        self.places = np.array([(f.header_offset, f.compress_size, f.compress_type) for f in infos])

    def read(self, i):
        offset, size, method = self.places[i].tolist()
        with open(self.path, 'rb') as f:
            skip_header(f, offset)
            raw = f.read(size)
        return zlib.decompressobj(-15).decompress(raw) if method == zipfile.ZIP_DEFLATED else raw


def skip_header(f, offset):
    """Go to the content of a zip's entry: after the header at offset, the entry's name and extras."""
    f.seek(offset + 26)
    f.seek(sum(struct.unpack('<HH', f.read(4))), os.SEEK_CUR)


class Files(Data):
    """The images of a Folder or a Zip. Folders around everything don't count; below them, the top folders are
    the classes, unless a dataset.json as EDM and StyleGAN have it numbers them. No folders: no classes."""

    def __init__(self, source):
        keep = [i for i, name in enumerate(source.names) if is_image(name) or
                posixpath.basename(name) == 'dataset.json']
        index = [i for i in keep if is_image(source.names[i])]
        if not index:
            raise UserError(f'there are no images in {source.path}; give a folder or a zip of class folders')
        ends = [posixpath.dirname(source.names[i]) for i in (keep[0], keep[-1])]
        root = posixpath.join(posixpath.commonpath(ends), '')     # of all, as names are sorted
        names = [source.names[i][len(root):] for i in index]
        tables = [i for i in keep if source.names[i] == root + 'dataset.json']
        kinds = (table_kinds(names, source.path, source.read(tables[0])) if tables else
                 folder_kinds(names, source.path))
        class_names = sorted(set(kinds), key=number_or_name)
        number = {name: i for i, name in enumerate(class_names)}
        super().__init__([] if class_names == [''] else class_names, [number[kind] for kind in kinds],
                         notes_on(set(source.names) - {source.names[i] for i in keep}, root, kinds))
        self.source, self.index = source, np.array(index)

    def name(self, i):
        return self.source.names[self.index[i]]

    def load(self, i):
        try:
            image = Image.open(io.BytesIO(self.source.read(self.index[i])))
            image.load()
            return rgb(ImageOps.exif_transpose(image))
        except Exception as e:                                     # damage makes Pillow raise nearly anything
            raise Unreadable(f'{self.name(i)}: {e}')


def folder_kinds(names, path):
    """-> the class of each name: its first folder, or '' where no name has one"""
    kinds = [name.split('/')[0] if '/' in name else '' for name in names]
    classes = set(kinds)
    if '' in classes and len(classes) > 1:
        raise UserError(f'{path} has images beside its class folders, such as {names[kinds.index("")]}; '
                        'move them into a class folder, or all images into one for data without classes')
    if len(classes) > 1 and {name.lower() for name in classes} <= SPLITS:
        raise UserError(f'{path} holds {", ".join(sorted(classes))}: splits, not classes; name the one '
                        f'to use, such as {os.path.join(path, max(classes & {"train"} or classes))}')
    return kinds


def table_kinds(names, path, text):
    """-> the class of each name: its number in dataset.json, or '' where that has none"""
    try:
        pairs = json.loads(text)['labels']
        if pairs is None:
            return [''] * len(names)
        number = {name: int(label) for name, label in pairs}
        if min(number.values()) < 0:
            raise ValueError
        return [str(number[name]) for name in names]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'dataset.json in {path} must say {{"labels": [["name", class number], ...]}} for '
                        'all images there, or {"labels": null} for data without classes')


def is_image(name):
    return posixpath.splitext(name)[1].lower() in IMAGE_ENDINGS and not is_hidden(name)


def is_hidden(name):
    """By its name: hidden files, what Macs add to zips, and the thumbnails of some servers"""
    return '/.' in '/' + name or name.startswith('__MACOSX/') or '/@eaDir/' in '/' + name


def number_or_name(name):
    """Sort key for classes: numbers as numbers, 2 before 10, then names"""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def notes_on(others, root, kinds):
    """Names of files that are no images, the folder around everything, the class of each image ->
    sentences about what was left out"""
    others = sorted(name for name in others if not is_hidden(name))
    endings = collections.Counter(posixpath.splitext(name)[1] or 'without an ending' for name in others)
    below = [name[len(root):] for name in others if name.startswith(root)]
    empty = {name.split('/')[0] for name in below if '/' in name} - set(kinds)
    notes = []
    if others:
        counts = ', '.join(f'{n} {ending}' for ending, n in endings.most_common(9))
        notes.append(f'files ignored, as their names are not those of images: {counts}')
    if empty and set(kinds) != {''}:
        notes.append(f'folders ignored, as they hold no images: {", ".join(sorted(empty)[:10])}')
    return notes


def open_data(name):
    """-> Data. name: one of BUILT_IN, or a folder or a zip of images. UserError for what is neither."""
    if name in BUILT_IN:
        data = BUILT_IN[name]()
        if os.path.exists(name):
            data.notes.append(f'{name} is the data set of this name; the {name} that lies here is ./{name}')
        return data
    if not os.path.exists(name):
        raise UserError(f'there is no {name}; give a folder or a zip of images, or {" or ".join(BUILT_IN)}')
    try:
        return Files(Folder(name) if os.path.isdir(name) else Zip(name))
    except zipfile.BadZipFile:
        raise UserError(f'{name} is neither a folder nor an intact zip; give one that has images in it')
    except OSError as e:
        raise UserError(f'{name} could not be read ({e.strerror}); give a folder or a zip that can')


# ------------------------------------------------------------------------------------------ batches

def batches(data, image_size, batch_size, seed, flip, start, steps, rank=0, world=1, workers=0, pin=False):
    """Yield images (b, 3, H, W) uint8, labels (b,) int64 and the number of images replaced, for the steps
    from `start` to `steps` - 1. b = batch_size / world, a whole number. Each epoch is one permutation; they
    follow each other without a gap, so a batch may span several. UserError if over 1% can't be read."""
    dataset = Steps(data, image_size, batch_size, seed, flip, rank, world)
    names, count, seen = [], 0, 0
    try:
        for images, labels, broken in load(dataset, range(start, steps), workers, pin):
            names, count = (names + broken)[:3], count + len(broken)
            seen += len(labels) + len(broken)
            if count > 5:                                          # a few in the first batches prove nothing
                refuse_damage(names, count, seen)
            images = torch.from_numpy(images)
            images = images.pin_memory() if pin else images        # copied to a GPU in the background
            yield images.permute(0, 3, 1, 2), torch.from_numpy(labels), len(broken)
    except Unreadable:
        raise UserError('a hundred images on end are unreadable; is the disk with them still there?')


def load(dataset, order, workers, pin=False):
    """Iterate over dataset[i] for i in `order`, made by so many processes a little ahead (0: by this one).

    What they make must be no tensors: torch passes those through shared memory, of which Docker
    gives 64 MB, and waits for ever when that is full. All else goes through a pipe. Processes are
    forked where that is usual, as those of forkserver (Python 3.14) outlive a killed parent. With
    `pin` a thread empties the pipe, so that who feeds a GPU need not wait for that.
    """
    fork = 'fork' if workers and sys.platform == 'linux' else None
    loader = DataLoader(dataset, batch_size=None, sampler=order, num_workers=workers, pin_memory=pin,
                        collate_fn=as_it_is, worker_init_fn=leave_group, multiprocessing_context=fork)
    if not hasattr(signal, 'pthread_sigmask'):                     # Windows
        return iter(loader)
    # A Ctrl-C that comes now waits until all have started: it is for this process, not for them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def as_it_is(item):
    return item


def leave_group(worker):
    """A terminal's Ctrl-C and a scheduler's signals reach all processes; the main one alone is to
    answer, and then needs its loading processes to the end of the step. They obey its SIGTERM."""
    for name in ('SIGINT', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(os, 'setsid'):
        os.setsid()
    if hasattr(signal, 'sigwaitinfo'):                             # neither Windows nor Macs
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=obey_parent, daemon=True).start()


def obey_parent():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


class Steps(Dataset):
    """Step by step, this rank's share of the global batch: images (b, H, W, 3) uint8, labels (b,) int64, and
    the names of unreadable images that were replaced. Depends on nothing but the arguments."""

    def __init__(self, data, image_size, batch_size, seed, flip, rank, world):
        self.data, self.image_size, self.seed, self.flip = data, image_size, seed, flip
        self.batch_size, b = batch_size, batch_size // world
        self.slots = range(rank * b, (rank + 1) * b)

    def __getitem__(self, step):
        mirror = np.random.default_rng((self.seed, 1, step)).random(self.batch_size) < 0.5 * self.flip
        pixels, labels, broken = [], [], []
        for slot in self.slots:
            i, image = self.find(step, slot, broken)
            pixels.append(image[:, ::-1] if mirror[slot] else image)
            labels.append(self.data.labels[i])
        return np.stack(pixels), np.array(labels), broken

    def find(self, step, slot, broken):
        """-> index, pixels (H, W, 3). Unreadable images are noted in `broken` and replaced by random ones."""
        n = len(self.data)
        epoch, place = divmod(step * self.batch_size + slot, n)
        i = permutation(self.seed, epoch, n)[place]
        for attempt in range(100):
            with contextlib.suppress(Unreadable):
                return i, crop(self.data.load(i), self.image_size)
            broken.append(self.data.name(i))
            i = np.random.default_rng((self.seed, 2, step, slot, attempt)).integers(n)
        raise Unreadable


@functools.lru_cache(maxsize=2)                                    # a step may lie in two epochs
def permutation(seed, epoch, n):
    return np.random.default_rng((seed, 0, epoch)).permutation(n)


def refuse_damage(names, count, seen):
    """UserError if more than 1% of the images seen are unreadable. names: of some, count: of how many"""
    if count > 0.01 * seen:
        raise UserError(f'{count} of {seen} images are unreadable, such as {", ".join(names[:3])}; '
                        'repair or remove them')


# ------------------------------------------------------------------------------------------ packing

def pack(data, path, size, workers):
    """Write `data`, cropped, to a zip of PNGs called class/number.png -> names of the unreadable, left out.
    What can't be finished leaves nothing behind."""
    broken, pngs = [], load(Pngs(data, size), range(len(data)), workers)
    with whole(path) as temporary, zipfile.ZipFile(temporary, 'w') as z:
        for i, png in tqdm(pngs, 'packing', len(data), unit=' images', disable=None):
            if png is None:
                broken.append(data.name(i))
                continue
            folder = data.class_names[data.labels[i]] + '/' if data.class_names else ''
            z.writestr(zipfile.ZipInfo(f'{folder}{i:08d}.png'), png)
    return broken


class Pngs(Dataset):
    """(i, image i cropped to `size` as the bytes of a PNG), or (i, None) if it is unreadable"""

    def __init__(self, data, size):
        self.data, self.size = data, size

    def __getitem__(self, i):
        png = io.BytesIO()
        try:
            image = Image.fromarray(crop(self.data.load(i), self.size))
        except Unreadable:
            return i, None
        image.save(png, 'png', compress_level=1)               # hardly larger than default, much faster
        return i, png.getvalue()


def main(argv):
    parser = Parser(description='Crop and resize a data set once, for all runs, and pack it to a zip.')
    parser.add_argument('src', help=f'folder or zip of images, or {", ".join(BUILT_IN)}')
    parser.add_argument('dst', help='zip to write')
    parser.add_argument('--size', type=int, default=256, help='pixels per side (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=os.cpu_count(),
                        help='processes (default: %(default)s)')
    args = parser.parse_args(argv)
    if args.size < 1 or args.workers < 0:
        raise UserError('--size must be positive and --workers must not be negative')
    if os.path.exists(args.dst):
        raise UserError(f'{args.dst} exists already; remove it, or give another name')
    data = open_data(args.src)
    print(*data.notes, sep='\n', end='\n' * bool(data.notes))
    broken = pack(data, args.dst, args.size, args.workers)
    print(f'{args.dst}: {len(data) - len(broken)} images in {len(data.class_names)} classes')
    if broken:
        print('unreadable and left out:', *broken, sep='\n  ')


# ------------------------------------------------------------------------------------ built-in data

class Arrays(Data):
    """All images in memory: (N, H, W) or (N, H, W, 3) uint8."""

    def __init__(self, class_names, labels, images):
        super().__init__(class_names, labels)
        self.images = images

    def load(self, i):
        return Image.fromarray(self.images[i]).convert('RGB')


# Server, and digest of each file there. The test images are left where they are: nothing here needs them.
CIFAR10 = 'https://www.cs.toronto.edu/~kriz', {
    'cifar-10-binary.tar.gz': 'md5:c32a1d4ab5d03f1284b67883e8d87530'}
FASHION_MNIST = 'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com', {
    'train-images-idx3-ubyte.gz': 'md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d',
    'train-labels-idx1-ubyte.gz': 'md5:25c81989df183df01b3e8a0aad5dffbe'}


def download(server, digests):
    """-> paths of the files"""
    return [fetch(f'{server}/{file}', os.path.join(CACHE, file), digest) for file, digest in digests.items()]


def cifar10():
    """The 50,000 training images of CIFAR-10 (Krizhevsky 2009), 32 pixels per side."""
    archive, = download(*CIFAR10)
    with tarfile.open(archive) as tar:
        files = {posixpath.basename(m.name): tar.extractfile(m).read() for m in tar if m.isfile()}
    rows = b''.join(files[f'data_batch_{i}.bin'] for i in range(1, 6))
    rows = np.frombuffer(rows, np.uint8).reshape(-1, 3073)
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)     # label, then one plane per colour
    return Arrays(files['batches.meta.txt'].decode().split(), rows[:, 0], np.ascontiguousarray(images))


def fashion_mnist():
    """The 60,000 training images of Fashion-MNIST (Xiao et al. 2017), grey. Padded from 28 to 32 pixels a
    side with more of their black background, as is customary: sides halve evenly, and pixels stay sharp."""
    images, labels = [np.frombuffer(gzip.decompress(pathlib.Path(path).read_bytes()), np.uint8)
                      for path in download(*FASHION_MNIST)]
    images = np.pad(images[16:].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    names = 't-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot'
    return Arrays(names.split(), labels[8:], images)


def angles(n=90):
    return np.arange(n) * 2 * np.pi / n


def curve(radius, n=90):
    """A radius, or n of them, clockwise from the top -> (n, 2) points, x to the right and y down"""
    angle = angles(n)
    return np.stack([np.sin(angle), -np.cos(angle)], 1) * np.reshape(radius, (-1, 1))


def heart(t):
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], 1) / 18


def corners(*points):
    return np.array(points).reshape(-1, 2)


# The outline of each, within the unit circle, and then the hole if it has one.
SHAPES = {
    'circle': [curve(0.85)],
    'cross': [corners(-.3, -.9, .3, -.9, .3, -.3, .9, -.3, .9, .3, .3, .3,
                      .3, .9, -.3, .9, -.3, .3, -.9, .3, -.9, -.3, -.3, -.3)],
    'flower': [curve(0.74 + 0.26 * np.cos(5 * angles())), curve(0.24)],
    'heart': [heart(angles())],
    'house': [corners(0, -1, .95, -.1, .7, -.1, .7, .85, -.7, .85, -.7, -.1, -.95, -.1),
              corners(-.2, .9, -.2, .2, .2, .2, .2, .9)],
    'moon': [curve(0.95), curve(0.75) + (0.45, -0.15)],
    'ring': [curve(0.92), curve(0.48)],
    'square': [corners(-.75, -.75, .75, -.75, .75, .75, -.75, .75)],
    'star': [curve(np.tile([1, 0.42], 5), 10)],
    'triangle': [curve(1, 3) + (0, 0.2)],
}


def colour(hue, saturation, value):
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def gradient(top, bottom, size):
    """PIL image, from one colour at the top to another at the bottom"""
    pair = Image.fromarray(np.array([[top], [bottom]], np.uint8))
    return pair.resize((size, size), Image.Resampling.BILINEAR, box=(0, 0.5, 1, 1.5))


class Shapes(Data):
    """Ten shapes in many colours, drawn when asked for: image i depends on i alone, and is of class i % 10.

    Their edges are jagged, at 128 pixels per side: for 64 or less, the box filter of `crop` makes them smooth.
    """

    def __init__(self):
        super().__init__(SHAPES, np.arange(100_000) % len(SHAPES))

    def load(self, i):
        rng, size = np.random.default_rng(i), 128
        angle, radius, side = rng.uniform(-0.35, 0.35), rng.uniform(34, 46), rng.choice((-1, 1))
        turn = radius * np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
        centre = size / 2 + rng.uniform(-1, 1, 2) * (58 - radius)
        mask = Image.new('L', (size, size))
        for points, fill in zip(SHAPES[self.class_names[self.labels[i]]], (255, 0)):
            ImageDraw.Draw(mask).polygon((points * (side, 1) @ turn + centre).ravel().tolist(), fill)
        shadow = mask.reduce(8).point(lambda v: v * 0.35).resize(mask.size, Image.Resampling.BILINEAR)
        hue = rng.random()
        back = hue + rng.uniform(0.3, 0.7)                         # not the shape's own
        image = gradient(colour(back, 0.1, 1), colour(back + 0.06, 0.3, 0.95), size)
        image.paste(colour(back, 0.6, 0.4), (0, 7), shadow)        # straight down, so that mirroring is right
        image.paste(gradient(colour(hue - 0.03, 0.65, 1), colour(hue + 0.03, 0.85, 0.85), size), mask=mask)
        return image


BUILT_IN = {'shapes': Shapes, 'cifar10': cifar10, 'fashion_mnist': fashion_mnist}


# ------------------------------------------------------------------------- what every program needs

class UserError(Exception):
    """One sentence: what was wrong, and what to do."""


def cli(main):
    """Run main(arguments) as a program: mistakes, files that can't be read or written, and Ctrl-C end in one
    sentence, not in a traceback."""
    sys.stdout, sys.stderr = [stream or open(os.devnull, 'w') for stream in (sys.stdout, sys.stderr)]
    for stream in (sys.stdout, sys.stderr):                        # names may have letters that the
        if isinstance(stream, io.TextIOWrapper):                   # terminal lacks
            stream.reconfigure(errors='backslashreplace')
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        return
    except UserError as e:
        sentence, code = f'error: {e}', 2
    except KeyboardInterrupt:
        sentence, code = '\ninterrupted; the same command resumes from what is saved', 130
    except BrokenPipeError:                                        # the reader left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        what = f'{e.filename}: {e.strerror}' if e.filename else e.strerror or e
        sentence, code = f'error: {what}; name one that can be read, or written, and has room', 2
    except RuntimeError as e:
        if 'DataLoader worker (pid' not in str(e):
            raise
        sentence, code = 'error: a data loading process died, maybe out of memory; try fewer --workers', 2
    print(sentence, file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the page of usage."""

    def error(self, message):
        raise UserError(f'{message}; --help lists the options')


def option(default, help, **how):
    """A dataclass's field that is an option. how: also=['--n'], other names; bare=True, the
    value may stand alone on the command line."""
    return dataclasses.field(default=default, metadata={'help': help} | how)


def parse_options(cls, argv, description, presets={}):
    """Command line -> an instance of dataclass `cls`. Each field is an option, --name value;
    `presets` is a table of rows of defaults, chosen by the option --model. Raises UserError for
    whatever it does not understand."""
    parser = Parser(description=description, allow_abbrev=False)
    for f in dataclasses.fields(cls):
        many = typing.get_origin(f.type) is list
        kind = typing.get_args(f.type)[0] if many else f.type
        default = '' if f.default in ('', None, ()) else ' (default: %(default)s)'
        names = ['--' + f.name, *f.metadata.get('also', [])]
        parser.add_argument(*names, default=f.default, help=f.metadata['help'] + default,
                            metavar='', type=PARSERS.get(kind, kind), nargs='+' if many else None,
                            choices=presets if f.name == 'model' and presets else None)
        if 'bare' in f.metadata:
            parser.add_argument(f.name, nargs='?', default=argparse.SUPPRESS, help='as --' + f.name)
    if presets:
        chosen = parser.parse_known_args([a for a in argv if a not in ('-h', '--help')])[0]
        parser.set_defaults(**presets[chosen.model])
        if any(a.split('=')[0] == '--epochs' for a in argv):       # asked for: a preset's steps
            parser.set_defaults(steps=0)                           # must not win
    return cls(**vars(parser.parse_intermixed_args(argv)))


def parse_zero_or_one(text):
    if text not in ('0', '1'):
        raise argparse.ArgumentTypeError(f"'{text}' must be 0 or 1")
    return text == '1'


def parse_ints(text):
    try:
        return tuple(int(part) for part in text.split(',') if text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' must be integers with commas between, such as 2,2,6")


def parse_int(text):
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' must be an integer")
    if abs(number) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f'{text} is too large; the largest is {2 ** 63 - 1}')
    return number


def parse_number(text):
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"'{text}' must be a finite number")
    return number


PARSERS = {bool: parse_zero_or_one, bool | None: parse_zero_or_one, tuple[int, ...]: parse_ints,
           int: parse_int, float: parse_number}


def refuse_negative(options):
    """UserError if a number among the options, or in a list of numbers, is negative."""
    for name, value in vars(options).items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and number < 0:
                raise UserError(f'--{name} must not be negative, but is {number}')


# What torch.load, or a look inside, raises on files that are not what they should be.
DAMAGED = (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, struct.error,
           pickle.UnpicklingError)


@contextlib.contextmanager
def whole(path):
    """-> name of a temporary file to write, which then becomes `path`; a failure leaves neither."""
    temporary = f'{path}.{uuid.uuid4().hex}.tmp'
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def fetch(url, path, digest, hint='try again, or download it by hand to that place'):
    """Download `url` to `path`, unless it is there -> path. digest: 'md5:...' or 'sha256:...' or their start.
    UserError if it can't be had whole. Several processes may do this at once: each writes its own file, and
    the last rename wins."""
    kind, expected = digest.split(':')
    if path.startswith('~'):
        raise UserError(f'there is no home directory to download {url} to; set HOME or TORCH_HOME')
    try:
        if os.path.isfile(path) and hexdigest(path, kind).startswith(expected):
            return path
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with whole(path) as temporary:
            download_to(temporary, url, os.path.basename(path))
            came = hexdigest(temporary, kind)
            if not came.startswith(expected):
                raise ValueError(f'its {kind} is {came[:16]}, not {expected[:16]}')
        return path
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise UserError(f'{url} could not be downloaded to {path} ({e}); {hint}')


def download_to(path, url, name):
    with urllib.request.urlopen(url, timeout=60) as response, open(path, 'wb') as f:
        total = int(response.headers.get('Content-Length', 0)) or None
        with tqdm.wrapattr(response, 'read', total, desc=name, disable=None) as body:
            shutil.copyfileobj(body, f)


def hexdigest(path, kind):
    """Of a file. kind: md5 or sha256"""
    return hashlib.new(kind, pathlib.Path(path).read_bytes()).hexdigest()


if __name__ == '__main__':
    cli(main)
