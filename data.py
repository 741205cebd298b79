"""Images and labels: from files, from two classic downloads, or drawn by this file.

    data = open_data('photos/')           a folder, zip or npz, 'shapes', 'cifar10', 'fashion_mnist'
    data.load(i)                          PIL image i, RGB, of its own size
    data.labels[i], data.class_names      int64; list of str, [] for data without classes
    data.notes                            sentences about what was left out
    crop(data.load(i), size)              (size, size, 3) uint8
    for images, labels, replaced in batches(data, ...)

Decoding photographs may take longer than training on them. Crop and pack them once:

    python data.py imagenet/train imagenet256.zip --size 256
"""
import argparse
from collections import Counter
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
import pickle
import posixpath
import shutil
import signal
import struct
import sys
import tarfile
import threading
import tokenize
import traceback
import typing
import urllib.request
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# Pillow knows more, but those are films, documents and arrays.
IMAGE_ENDINGS = set('.jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm '
                    '.jp2 .avif .tga'.split())
SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'test', 'testing'}
# Pillow refuses images of more than twice as many pixels. Its own limit guards servers against
# uploads; a training set may well hold large scans.
Image.MAX_IMAGE_PIXELS = 2 ** 29
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 26


# --------------------------------------------------------------------------------------- one image

class Unreadable(Exception):
    """An image that can't be read or decoded."""


def rgb(image):
    """PIL image of any mode -> RGB, what is transparent composited on white"""
    # Pillow would clip these modes at 255. We assume that integers have 16 bits, and that floats
    # range to 1, 255 or 65535, the first of these that no value exceeds.
    if image.mode.startswith(('I', 'F')):
        values = np.nan_to_num(np.asarray(image, float))
        top = 65535
        if image.mode == 'F' and values.max() <= 255:
            top = 255 if values.max() > 1 else 1
        image = Image.fromarray(np.uint8(values.clip(0, top) * (255 / top) + 0.5))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def crop(image, size):
    """PIL image, RGB -> (size, size, 3) uint8: the middle, scaled as in ADM (Dhariwal & Nichol
    2021), as for published FIDs. JPEG's own scaling is faster, but gives other pixels."""
    # Enlarging an image as thin as a thread would take gigabytes, so we cut out its middle first.
    if max(image.size) / min(image.size) * size ** 2 > 2 ** 26:
        middle = [min(side, 4 * min(image.size)) for side in image.size]
        image = ImageOps.fit(image, middle, Image.Resampling.NEAREST)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


# ----------------------------------------------------------------------------------- folder and zip

class Data:
    """N images with labels. Subclasses add load(i) -> PIL image, RGB, which may raise Unreadable.

    class_names: list of str, [] for data without classes.  labels: (N,) int64, then all 0.
    notes: sentences for the user.  mirror: may images be flipped? Letters would say False.
    """
    mirror = True

    def __init__(self, class_names, labels):
        self.class_names, self.notes = list(class_names), []
        self.labels = np.asarray(labels, np.int64)

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """What messages call image i."""
        return f'image {i}'


class Folder:
    """Files below a folder. names: relative, sorted, with / between.  read(i): the bytes of one."""

    def __init__(self, path):
        self.path = os.path.normpath(path)
        start = len(os.path.join(self.path, ''))
        names = [file[start:].replace(os.sep, '/') for file in walk(self.path)]
        self.names = sorted(name for name in names if not is_hidden(name))

    def read(self, i):
        with open(os.path.join(self.path, self.names[i]), 'rb') as f:
            return f.read()


def walk(folder, above=()):
    """Yield the paths of all files below. above: the real paths of the folders around this one"""
    real = os.path.realpath(folder)
    # A link may lead back to a folder that we are in.
    if real in above:
        return
    try:
        for entry in os.scandir(folder):
            # We ask the disk only where links lead: asking about a million files takes long.
            is_folder = os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()
            if is_folder:
                yield from walk(entry.path, (*above, real))
            else:
                yield entry.path
    except OSError as e:
        raise UserError(f'{e.filename} could not be listed ({e.strerror}); make it readable, or '
                        'move it away')


def is_hidden(name):
    """Hidden files, what Macs add to zips, and the thumbnails of some servers."""
    return '/.' in '/' + name or name.startswith('__MACOSX/') or '/@eaDir/' in '/' + name


class Zip:
    """The same for a zip. We note where each file lies and open the zip for every read, which takes
    microseconds. A ZipFile can't be shared by processes, and ImageNet's would take a gigabyte."""

    def __init__(self, path):
        self.path, infos = path, {}
        with zipfile.ZipFile(path) as z:
            for info in z.infolist():
                # Windows has \ between folders, and others begin with / or ./
                name = posixpath.normpath(info.filename.replace('\\', '/')).lstrip('/')
                if info.filename.endswith(('/', '\\')) or is_hidden(name):
                    continue
                known = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                if not known or info.flag_bits & 1:
                    raise UserError(f'{name} in {path} is encrypted, or compressed otherwise than '
                                    'by deflate; unpack it, and name the folder')
                infos[name] = info
        self.names = sorted(infos)
        infos = [infos[name] for name in self.names]
        self.places = np.array([(i.header_offset, i.compress_size, i.compress_type) for i in infos])

    def read(self, i):
        offset, size, method = self.places[i].tolist()
        with open(self.path, 'rb') as f:
            skip_header(f, offset)
            raw = f.read(size)
        return zlib.decompress(raw, wbits=-15) if method == zipfile.ZIP_DEFLATED else raw


def skip_header(f, offset):
    """Go to the content of a zip's entry, after the header at offset, its name and its extras."""
    f.seek(offset + 26)
    f.seek(sum(struct.unpack('<HH', f.read(4))), os.SEEK_CUR)


class Files(Data):
    """The images of a Folder or a Zip. Folders that hold all images are skipped; those below them
    are the classes, unless a dataset.json, as StyleGAN and EDM have it, gives class numbers."""

    def __init__(self, source):
        index, tables, others = [], [], []
        for i, name in enumerate(source.names):
            if posixpath.splitext(name)[1].lower() in IMAGE_ENDINGS:
                index.append(i)
            elif posixpath.basename(name) == 'dataset.json':
                tables.append(i)
            else:
                others.append(name)
        if not index:
            ignored = ''.join(f' ({note})' for note in notes_on(others, '', []))
            raise UserError(f'there are no images in {source.path}{ignored}; give a folder or a '
                            'zip of class folders')
        # Names are sorted: the folders that the first and the last image share are around all.
        ends = [*tables, index[0], index[-1]]
        root = posixpath.commonpath([posixpath.dirname(source.names[i]) for i in ends])
        root = posixpath.join(root, '')
        names = [source.names[i].removeprefix(root) for i in index]
        table = root + 'dataset.json'
        if table in source.names:
            text = source.read(source.names.index(table))
            classes = classes_in_table(names, source.path, text)
        else:
            classes = classes_in_folders(names, source.path)
        class_names = sorted(set(classes))
        # Numbers as numbers, 2 before 10, then names
        class_names.sort(key=lambda name: int(name) if name.isdecimal() else math.inf)
        labels = {name: label for label, name in enumerate(class_names)}
        super().__init__(class_names, [labels[name] for name in classes])
        if class_names == ['']:
            self.class_names = []
        self.notes = notes_on(others, root, names)
        self.source, self.index = source, np.array(index)

    def name(self, i):
        return self.source.names[self.index[i]]

    def load(self, i):
        try:
            image = Image.open(io.BytesIO(self.source.read(self.index[i])))
            image.load()
            return rgb(ImageOps.exif_transpose(image))
        # Damage makes Pillow raise nearly anything.
        except Exception as e:
            raise Unreadable(f'{self.name(i)}: {e}')


def classes_in_folders(names, path):
    """-> the class of each image: its first folder, or '' where no image has one"""
    classes = [name.split('/')[0] if '/' in name else '' for name in names]
    found = set(classes)
    if '' in found and len(found) > 1:
        beside = names[classes.index('')]
        raise UserError(f'{path} has images beside its class folders, such as {beside}; move them '
                        'into a class folder, or all images into one for data without classes')
    if len(found) > 1 and {name.lower() for name in found} <= SPLITS:
        one = os.path.join(path, 'train' if 'train' in found else max(found))
        raise UserError(f'{path} holds {", ".join(sorted(found))}: splits, not classes; name the '
                        f'one to use, such as {one}')
    return classes


def classes_in_table(names, path, text):
    """-> the class of each image: its number in dataset.json, or '' where that has none"""
    try:
        pairs = json.loads(text)['labels']
        if pairs is None:
            return [''] * len(names)
        number = {name: int(label) for name, label in pairs}
        if min(number.values()) < 0:
            raise ValueError
        return [str(number[name]) for name in names]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'dataset.json in {path} must say {{"labels": [["name", class number], '
                        '...]} for all images there, or {"labels": null} for data without classes')


def notes_on(others, root, images):
    """Names of files that are no images, root of the images, their names below it -> sentences on
    what was left out"""
    notes, endings = [], [posixpath.splitext(name)[1] or 'without an ending' for name in others]
    if others:
        counts = ', '.join(f'{n} {ending}' for ending, n in Counter(endings).most_common(9))
        notes.append(f'files ignored, as their names are not those of images: {counts}')
    below = [name.removeprefix(root) for name in others if name.startswith(root)]
    full = {name.split('/')[0] for name in images if '/' in name}
    empty = {name.split('/')[0] for name in below if '/' in name} - full
    if empty and full:
        names = ', '.join(sorted(empty)[:10])
        notes.append(f'folders ignored, as they hold no images: {names}')
    return notes


# ------------------------------------------------------------------------------- arrays, open_data

class Arrays(Data):
    """Images in an array: (N, H, W) or (N, H, W, 3) uint8."""

    def __init__(self, class_names, labels, images):
        super().__init__(class_names, labels)
        self.images = images

    def load(self, i):
        return Image.fromarray(self.images[i]).convert('RGB')


def open_npz(path):
    """-> Data of arr_0, (N, H, W, 3) or (N, H, W) uint8, and, if there, labels arr_1 (N,), as ADM
    and sample.py write them. The images stay on disk unless they are compressed: they may not fit
    in memory. (On a Mac and on Windows every worker copies them; avoid that by --workers 0.)"""
    with zipfile.ZipFile(path) as z, np.load(path) as arrays, open(path, 'rb') as f:
        if 'arr_0.npy' not in z.namelist():
            raise UserError(f'{path} holds no images (arr_0); name one that does')
        info = z.getinfo('arr_0.npy')
        skip_header(f, info.header_offset)
        stored = info.compress_type == zipfile.ZIP_STORED
        if stored and np.lib.format.read_magic(f) == (1, 0):
            shape, columns, dtype = np.lib.format.read_array_header_1_0(f)
            images = np.memmap(path, dtype, 'r', f.tell(), shape, 'F' if columns else 'C')
        else:
            images = arrays['arr_0']
        numbers = arrays['arr_1'] if 'arr_1' in arrays else None
    grey, colour = images.ndim == 3, images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not (grey or colour) or not images.size:
        raise UserError(f'arr_0 of {path} is {images.dtype} {images.shape}; it must be uint8 '
                        '(N, H, W, 3), or (N, H, W) if grey')
    require(not grey or images.shape[2] != 3,
            f'arr_0 of {path} has shape {images.shape}; a single image needs another dimension, '
            'of 1, before these')
    data = Arrays([], np.zeros(len(images)), images)
    if numbers is None:
        return data
    if numbers.shape == data.labels.shape and numbers.dtype.kind in 'iu':
        names, data.labels = np.unique(numbers, return_inverse=True)
        data.class_names = [str(name) for name in names]
    else:
        data.notes.append('arr_1 is ignored, as it is not one integer per image')
    return data


@contextlib.contextmanager
def refuse_damaged(path, what='cannot be read, or is damaged', do='give one that is intact',
                   besides=()):
    """Whatever is wrong with a file becomes one sentence. besides: what it may raise but DAMAGED"""
    try:
        yield
    except (*DAMAGED, *besides) as e:
        why, *_ = f'{type(e).__name__}: {e}'.splitlines()
        raise UserError(f'{path} {what} ({why}); {do}')


class Part(Data):
    """Some images of other data, by their index there."""

    def __init__(self, data, index):
        super().__init__(data.class_names, data.labels[index])
        self.data, self.index = data, index
        self.notes, self.mirror = data.notes, data.mirror

    def name(self, i):
        return self.data.name(self.index[i])

    def load(self, i):
        return self.data.load(self.index[i])


def held_out(n, share):
    """-> how many of n images: a share, but never all"""
    return min(math.ceil(share * n), n - 1)


def hold_out(data, share):
    """-> two parts, the second with a share of the images, the same ones every time"""
    order = np.random.default_rng(0).permutation(len(data))
    n = held_out(len(data), share)
    return Part(data, np.sort(order[n:])), Part(data, np.sort(order[:n]))


def open_data(name):
    """-> Data. name: one of BUILT_IN, or a folder, zip or npz of images; UserError for others."""
    if name in BUILT_IN:
        data = BUILT_IN[name]()
        if os.path.exists(name):
            data.notes.append(f'{name} is the data set of this name; the {name} that lies here is '
                              f'./{name}')
        return data
    if not os.path.exists(name):
        raise UserError(f'there is no {name}; give a folder, a zip or an npz of images, or '
                        f'{" or ".join(BUILT_IN)}')
    with refuse_damaged(name):
        if os.path.isdir(name):
            return Files(Folder(name))
        return open_npz(name) if name.endswith('.npz') else Files(Zip(name))


# ----------------------------------------------------------------------------------------- batches

def batches(data, image_size, batch_size, seed, flip, start, steps, rank=0, world=1, workers=0,
            pin=False, limit=0.01):
    """Yield images (b, 3, H, W) uint8, labels (b,) int64 and the number of images replaced, for the
    steps from `start` to `steps` - 1. b = batch_size / world, a whole number. Each epoch is one
    permutation, and a batch may span several. UserError if more than `limit`, a share, can't be
    read."""
    dataset = BatchDataset(data, image_size, batch_size, seed, flip, rank, world)
    broken, seen = [], 0
    try:
        for images, labels, replaced in prefetch(dataset, range(start, steps), workers, pin):
            broken += replaced
            seen += len(labels) + len(replaced)
            # A few in the first batches prove little.
            if len(broken) > 5:
                refuse_damage(broken, len(broken), seen, limit)
            images = torch.from_numpy(images)
            # From pinned memory they travel to a GPU in the background.
            images = images.pin_memory() if pin else images
            yield images.permute(0, 3, 1, 2), torch.from_numpy(labels), len(replaced)
    except Unreadable as e:                                        # after a worker's traceback
        last = str(e).splitlines()[-1].removeprefix('data.Unreadable: ')
        raise UserError(f'a hundred images in a row are unreadable, the last one {last}; is the '
                        'disk with them still there?')


def refuse_damage(names, count, seen, limit=0.01):
    """UserError if more than `limit` of the images seen, a share, are unreadable. names: of some,
    count: of how many"""
    if count > limit * seen:
        some = ', '.join(list(dict.fromkeys(names))[:3])
        raise UserError(f'{count} of {seen} images are unreadable, such as {some}; repair or '
                        'remove them, or allow them to be read')


class BatchDataset(Dataset):
    """Item `step` is a rank's share of that batch: images (b, H, W, 3) uint8, labels (b,) int64 and
    the names of unreadable images that were replaced. It depends on these arguments alone."""

    def __init__(self, data, image_size, batch_size, seed, flip, rank, world):
        self.data, self.image_size, self.batch_size = data, image_size, batch_size
        self.seed, self.flip, b = seed, flip, batch_size // world
        self.slots = range(rank * b, (rank + 1) * b)

    def __getitem__(self, step):
        mirror = np.random.default_rng((self.seed, 1, step)).random(self.batch_size) < 0.5
        images, labels, broken = [], [], []
        for slot in self.slots:
            i, image = self.find(step, slot, broken)
            images.append(image[:, ::-1] if self.flip and mirror[slot] else image)
            labels.append(self.data.labels[i])
        return np.stack(images), np.array(labels), broken

    def find(self, step, slot, broken):
        """-> index and pixels (H, W, 3) of one image of a batch. The name of an unreadable one goes
        to `broken`, and a random one takes its place."""
        n = len(self.data)
        epoch, position = divmod(step * self.batch_size + slot, n)
        i = permutation(self.seed, epoch, n)[position]
        for attempt in range(100):
            try:
                return i, crop(self.data.load(i), self.image_size)
            except Unreadable:
                broken.append(self.data.name(i))
            i = np.random.default_rng((self.seed, 2, step, slot, attempt)).integers(n)
        raise Unreadable(broken[-1])


# Two, as a batch may lie in two epochs.
@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    return np.random.default_rng((seed, 0, epoch)).permutation(n)


def prefetch(dataset, indices, workers, pin=False):
    """-> iterator over dataset[i], tuples that `workers` processes make a little ahead (0: this).
    pin: a thread collects them, so that the GPU's process need not wait for the pipe.

    The tuples hold arrays, not tensors: torch passes tensors through shared memory. Docker allows
    64 MB of it, and a full one blocks torch for ever. All else goes through a pipe.
    """
    # Processes of forkserver, Python 3.14's default, would outlive a parent that is killed.
    fork = 'fork' if workers and sys.platform == 'linux' else None
    # tuple() leaves the items as they are; torch's own collate_fn would make tensors of arrays.
    loader = DataLoader(dataset, batch_size=None, sampler=indices, num_workers=workers,
                        collate_fn=tuple, pin_memory=pin, worker_init_fn=leave_group,
                        multiprocessing_context=fork)
    # Windows has no such masks.
    if not hasattr(signal, 'pthread_sigmask'):
        return iter(loader)
    # These are for this process alone, so they have to wait until the new ones ignore them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        made = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # If a worker is killed, torch would raise anywhere. Without its handler, next(made) does.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return made


def leave_group(worker):
    """Let a loading process obey its parent's SIGTERM only. A terminal's Ctrl-C and a scheduler's
    signals reach all processes, but the parent needs its images to the end of the step."""
    for name in ('SIGINT', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(os, 'setsid'):
        os.setsid()
    # Neither Windows nor a Mac can tell who sent a signal.
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=obey_parent, daemon=True).start()
    elif hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def obey_parent():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


# ----------------------------------------------------------------------------------------- packing

def pack(data, path, size, workers):
    """Write `data`, cropped, to a zip of PNGs called class/number.png -> names of the unreadable
    images, which are left out. A failure leaves nothing behind."""
    broken, pngs = [], prefetch(PngDataset(data, size), range(len(data)), workers)
    with whole(path) as temporary, zipfile.ZipFile(temporary, 'w') as z:
        for i, png in tqdm(pngs, 'packing', len(data), unit=' images', disable=None):
            if png is None:
                broken.append(data.name(i))
                continue
            folder = data.class_names[data.labels[i]] if data.class_names else ''
            folder = folder.encode('utf-8', 'backslashreplace').decode()     # old Windows' names
            z.writestr(zipfile.ZipInfo(posixpath.join(folder, f'{i:08d}.png')), png)
        require(len(broken) < len(data), f'none of the {len(data)} images can be read, such as '
                f'{data.name(0)}')
    return broken


class PngDataset(Dataset):
    """(i, image i, cropped, as the bytes of a PNG), or (i, None) if it is unreadable"""

    def __init__(self, data, size):
        self.data, self.size = data, size

    def __getitem__(self, i):
        png = io.BytesIO()
        try:
            image = Image.fromarray(crop(self.data.load(i), self.size))
        except Unreadable:
            return i, None
        # Hardly larger than at the default level, and much faster.
        image.save(png, 'png', compress_level=1)
        return i, png.getvalue()


def main(argv):
    parser = Parser(description='Crop and resize a data set once, for all runs, and pack it to a '
                    'zip.', formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('src', help=f'folder, zip or npz of images, or {", ".join(BUILT_IN)}')
    parser.add_argument('dst', help='zip to write')
    parser.add_argument('--size', type=int, default=256, help='pixels per side')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes')
    args = parser.parse_args(argv)
    require(args.size > 0 and args.workers >= 0,
            '--size must be positive and --workers must not be negative')
    require(args.dst.endswith('.zip'), f'{args.dst} must end in .zip')
    require(not os.path.exists(args.dst),
            f'{args.dst} exists already; remove it, or give another name')
    data = open_data(args.src)
    for note in data.notes:
        print(note)
    broken = pack(data, args.dst, args.size, args.workers)
    print(f'{args.dst}: {len(data) - len(broken)} images in {len(data.class_names)} classes')
    if broken:
        print('unreadable and left out:', *broken, sep='\n  ')


# ----------------------------------------------------------------------------------- built-in data

# Address and digest of each file. We leave the test images where they are.
CIFAR10 = {
    'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz':
        'md5:c32a1d4ab5d03f1284b67883e8d87530'}
FASHION_MNIST = {
    'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-images-idx3-ubyte.gz':
        'md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d',
    'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-labels-idx1-ubyte.gz':
        'md5:25c81989df183df01b3e8a0aad5dffbe'}


def cifar10():
    """The 50,000 training images of CIFAR-10 (Krizhevsky 2009), 32 pixels per side."""
    archive, = [fetch(url, digest) for url, digest in CIFAR10.items()]
    with tarfile.open(archive) as tar:
        files = {posixpath.basename(m.name): tar.extractfile(m).read() for m in tar if m.isfile()}
    rows = b''.join(files[f'data_batch_{i}.bin'] for i in range(1, 6))
    # A row is a label and a plane per colour.
    rows = np.frombuffer(rows, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    names = files['batches.meta.txt'].decode().split()
    return Arrays(names, rows[:, 0], np.ascontiguousarray(images))


def fashion_mnist():
    """The 60,000 training images of Fashion-MNIST (Xiao et al. 2017), grey, padded from 28 to 32
    pixels per side with their black background, as is customary: then sides halve evenly."""
    paths = [fetch(url, digest) for url, digest in FASHION_MNIST.items()]
    images, labels = [np.frombuffer(gzip.open(path).read(), np.uint8) for path in paths]
    images = np.pad(images[16:].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    names = 't-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot'
    return Arrays(names.split(), labels[8:], images)


def curve(radius, n=90):
    """A radius, or n of them, clockwise from the top -> (n, 2) points, x to the right and y down"""
    angle = np.arange(n) * 2 * np.pi / n
    return np.stack([np.sin(angle), -np.cos(angle)], 1) * np.reshape(radius, (-1, 1))


def polygon(text):
    """'x,y x,y ...', as in SVG -> (n, 2)"""
    return np.array([point.split(',') for point in text.split()], float)


ANGLES = np.arange(90) * 2 * np.pi / 90
HEART_X = 16 * np.sin(ANGLES) ** 3
HEART_Y = (5 * np.cos(2 * ANGLES) - 13 * np.cos(ANGLES) + 2 * np.cos(3 * ANGLES)
           + np.cos(4 * ANGLES))
# The outline of each, within the unit circle, and the hole if it has one.
SHAPES = {
    'circle': [curve(0.85)],
    'cross': [polygon('-.3,-.9 .3,-.9 .3,-.3 .9,-.3 .9,.3 .3,.3 '
                      '.3,.9 -.3,.9 -.3,.3 -.9,.3 -.9,-.3 -.3,-.3')],
    'flower': [curve(0.74 + 0.26 * np.cos(5 * ANGLES)), curve(0.24)],
    'heart': [np.stack([HEART_X, HEART_Y], 1) / 18],
    'house': [polygon('0,-1 .95,-.1 .7,-.1 .7,.85 -.7,.85 -.7,-.1 -.95,-.1'),
              polygon('-.2,.9 -.2,.2 .2,.2 .2,.9')],
    'moon': [curve(0.95), curve(0.75) + (0.45, -0.15)],
    'ring': [curve(0.92), curve(0.48)],
    'square': [polygon('-.75,-.75 .75,-.75 .75,.75 -.75,.75')],
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
    """Ten shapes in many colours, drawn when asked for: image i depends on i alone, its class is
    i % 10. Edges are jagged at 128 pixels per side, and smooth once `crop` has halved them."""

    def __init__(self):
        super().__init__(SHAPES, np.arange(100_000) % len(SHAPES))

    def load(self, i):
        rng, size = np.random.default_rng(i), 128
        angle, radius, side = rng.uniform(-0.35, 0.35), rng.uniform(34, 46), rng.choice((-1, 1))
        sin, cos = np.sin(angle), np.cos(angle)
        turn = radius * np.array([(cos, sin), (-sin, cos)])
        centre = size / 2 + rng.uniform(-1, 1, 2) * (58 - radius)
        mask = Image.new('L', (size, size))
        # The outline is filled with white, then the hole with black.
        for points, fill in zip(SHAPES[self.class_names[self.labels[i]]], (255, 0)):
            points = points * (side, 1) @ turn + centre
            ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill)
        shadow = mask.reduce(8).point([0.35 * grey for grey in range(256)])
        shadow = shadow.resize(mask.size, Image.Resampling.BILINEAR)
        hue = rng.random()
        # Never the hue of the shape.
        back = hue + rng.uniform(0.3, 0.7)
        image = gradient(colour(back, 0.1, 1), colour(back + 0.06, 0.3, 0.95), size)
        # The shadow falls straight down, as flipped images are training images, too.
        image.paste(colour(back, 0.6, 0.4), (0, 7), shadow)
        front = gradient(colour(hue - 0.03, 0.65, 1), colour(hue + 0.03, 0.85, 0.85), size)
        image.paste(front, mask=mask)
        return image


# For data of your own, write a subclass of Data and add it here.
BUILT_IN = {'shapes': Shapes, 'cifar10': cifar10, 'fashion_mnist': fashion_mnist}


# ------------------------------------------------------------------------ what every program needs

# What reading raises if a file is not what it should be; and what torch.load, or a look at what it
# has loaded, may raise besides.
DAMAGED = (OSError, ValueError, EOFError, LookupError, ArithmeticError, NotImplementedError,
           struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error)
LOADING = (RuntimeError, TypeError, AttributeError, pickle.UnpicklingError)


class UserError(Exception):
    """One sentence: what was wrong, and what to do."""


def require(fine, sentence):
    """UserError with that sentence unless fine"""
    if not fine:
        raise UserError(sentence)


def cli(main):
    """Run main(arguments) as a program: mistakes, files that can't be read or written, and Ctrl-C
    end in one sentence, not in a traceback."""
    for name in ('stdout', 'stderr'):
        # A closed one is None. An open one may lack letters that are in the names of files.
        stream = getattr(sys, name) or open(os.devnull, 'w')
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
        setattr(sys, name, stream)
    several = 'RANK' in os.environ
    if not several:
        # It then ends as by Ctrl-C. (torchrun's processes should end at once.)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code, sentence = attempt(main)
    except Exception:
        if not several:
            raise
        code, sentence = 1, traceback.format_exc()
    # The terminal may be closed. In one piece, as other processes write, too.
    with contextlib.suppress(OSError):
        sys.stderr.write(f'{sentence}\n' if sentence else '')
        sys.stderr.flush()
    try:
        sys.stdout.flush()
    except OSError:
        # At the interpreter's end that would fail once more, and change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code and several:
        # A normal exit takes leave of the other processes. On GPUs that waits for them, and they
        # may wait for this one.
        os._exit(code)
    if code:
        sys.exit(code)


def attempt(main):
    """Run main(arguments) -> exit code, and the sentence that says why if it is not 0"""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        return 0, ''
    except UserError as e:
        return 2, f'error: {e}'
    except KeyboardInterrupt:
        return 130, '\ninterrupted; what was saved before is untouched'
    except BrokenPipeError:                                        # as in `... | head`
        return 1, ''
    except (OSError, MemoryError, RuntimeError) as e:
        sentence = circumstance(e)
        if sentence:
            return 2, f'error: {sentence}'
        if not isinstance(e, OSError):
            raise
        what = f'{e.filename}: {e.strerror}' if e.filename else e.strerror or e
        return 2, f'error: {what}; name one that can be read, or written, and has room'


def circumstance(error):
    """-> a sentence for an error that comes of the machine, not of the program; else ''"""
    text = (str(error) or type(error).__name__).splitlines()[0]
    if 'DataLoader worker (pid' in text:
        return 'a data loading process died, maybe out of memory; try fewer --workers'
    full = 'out of memory', "can't allocate memory", 'Cannot allocate memory', 'ALLOC_FAILED'
    if isinstance(error, MemoryError) or any(words in text for words in full):
        said = '. '.join(text.split('. ')[:2])                     # the rest is on allocators
        return (f'not enough memory ({said}); train.py needs less with more --grad_accum or '
                '--grad_ckpt 1, sample.py and evaluate.py with a smaller --batch_size')
    if 'by peer' in text:                                          # of a connection: closed, reset
        return 'another process has ended; what it printed says why'
    return ''


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the page of usage."""

    def error(self, message):
        raise UserError(f'{message}; --help lists the options')


def option(default, help, also=(), bare=False):
    """A dataclass's field that is an option. also: other names.  bare: its name may be left out."""
    return dataclasses.field(default=default, metadata=dict(help=help, also=also, bare=bare))


def parse_options(cls, argv, description, presets={}):
    """Command line -> an instance of dataclass `cls`. Each field is an option, --name value;
    `presets` is a table of rows of defaults, chosen by --model. UserError for all else."""
    parser = Parser(description=description, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        add_option(parser, field, presets if field.name == 'model' else None)
    if presets:
        chosen, _ = parser.parse_known_args([a for a in argv if a not in ('-h', '--help')])
        parser.set_defaults(**{name: show(value) for name, value in presets[chosen.model].items()})
        # Who asks for epochs does not want the steps of a preset.
        if any(a.split('=')[0] == '--epochs' for a in argv):
            parser.set_defaults(steps=0)
    return cls(**vars(parser.parse_intermixed_args(argv)))


def add_option(parser, field, presets):
    many = typing.get_origin(field.type) is list
    kind = typing.get_args(field.type)[0] if many else field.type
    # argparse reads a default as if it were typed, but not one for several values.
    default, shown = show(field.default), '%(default)s'            # which a preset may change
    if many:
        default, shown = field.default, show(field.default)
    note = '' if field.default in ('', None, ()) else f' (default: {shown})'
    parser.add_argument('--' + field.name, *field.metadata['also'], default=default,
                        type=functools.partial(parse_value, kind), nargs='+' if many else None,
                        choices=presets or None, metavar=METAVAR.get(kind, ''),
                        help=field.metadata['help'] + note)
    if field.metadata['bare']:
        parser.add_argument(field.name, nargs='?', default=argparse.SUPPRESS,
                            help='as --' + field.name)


def show(value):
    """As it is typed on the command line."""
    if isinstance(value, tuple):
        return ','.join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else value


# What the text of an option must be, for the type of its field.
KINDS = {bool: '0 or 1', bool | None: '0 or 1', int: 'an integer', float: 'a finite number',
         tuple[int, ...]: 'integers with commas between, such as 2,2,6'}
# The same in short, for --help.
METAVAR = {bool: '0|1', bool | None: '0|1', tuple[int, ...]: 'N,N'}


def parse_value(kind, text):
    try:
        if kind in (bool, bool | None):
            return {'0': False, '1': True}[text]
        if kind == tuple[int, ...]:
            return tuple(int(part) for part in text.split(',') if text)
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"'{text}' must be {KINDS[kind]}")
    if kind is int and abs(value) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f'{text} is too large; the largest is {2 ** 63 - 1}')
    return value


def check_numbers(options):
    """UserError if a number among the options, or in a list of them, is negative or too large."""
    for name, value in vars(options).items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)):
                require(number >= 0, f'--{name} must not be negative, but is {number}')
                require(number < 1e38, f'--{name} {number} is too large')          # for a float32


@contextlib.contextmanager
def whole(path, temporary=''):
    """-> name of a temporary file to write, which then becomes `path`; a failure leaves `path` as
    it was. temporary: a fixed name, where kills must not pile up files."""
    temporary = temporary or f'{path}.{os.urandom(8).hex()}.tmp'
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    try:
        yield temporary
        with open(temporary, 'rb+') as f:                          # so that a power cut leaves no
            os.fsync(f.fileno())                                   # half of it, either
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def fetch(url, digest, hint='try again, download it by hand to that place, or set TORCH_HOME to '
          'another', name=''):
    """Download `url`, unless it is there -> path, in torch.hub's cache. digest: 'md5:...' or
    'sha256:...' or their start. name: of the file. UserError if it can't be had whole. Several
    processes may do this at once: each writes its own file, and the last rename wins."""
    path = os.path.join(torch.hub.get_dir(), 'checkpoints', name or os.path.basename(url))
    kind, expected = digest.split(':')
    if path.startswith('~'):
        raise UserError(f'there is no home directory to download {url} to; set HOME or TORCH_HOME')
    try:
        if os.path.isfile(path) and hexdigest(path, kind).startswith(expected):
            return path
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
    digest = hashlib.new(kind)
    with open(path, 'rb') as f:
        while part := f.read(2 ** 20):
            digest.update(part)
    return digest.hexdigest()


if __name__ == '__main__':
    cli(main)
