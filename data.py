"""Images and labels: from a folder, a zip, two classic downloads, or drawn by this file.

    data = open_data('shapes')                    or 'cifar10', 'fashion_mnist', a folder, a zip
    data.load(i)                                  PIL image, RGB, of its own size
    data.labels[i], data.class_names              int64; list of str, [] for data without classes
    crop(data.load(i), size)                      (size, size, 3) uint8
    for images, labels, replaced in batches(data, ...)

Decoding photographs may take longer than training on them. Crop and pack them once:

    python data.py imagenet/train imagenet256.zip --size 256
"""
import argparse
import colorsys
import contextlib
import functools
import gzip
import hashlib
import http.client
import io
import json
from multiprocessing.pool import ThreadPool
import os
import pathlib
import posixpath
import shutil
import signal
import struct
import sys
import tarfile
import urllib.request
import uuid
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageOps
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

CACHE = os.path.join(torch.hub.get_dir(), 'simflow')
IMAGE_ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
# Pillow refuses twice as many pixels as this. Its own limit guards servers against uploads; in a training set
# a huge image is a scan or a satellite's, and only what would hardly fit in memory is taken for damage.
Image.MAX_IMAGE_PIXELS = 2 ** 29


# ----------------------------------------------------------------------------------- command lines, downloads

class UserError(Exception):
    """One sentence: what was wrong, and what to do."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the page of usage."""

    def error(self, message):
        raise UserError(f'{message}; --help lists the options')


def cli(main):
    """Run main(arguments) as a program: mistakes and Ctrl-C end in one sentence, not in a traceback."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        return
    except UserError as e:
        sentence, code = f'error: {e}', 2
    except KeyboardInterrupt:
        sentence, code = '\ninterrupted; the same command goes on from what is saved', 130
    except BrokenPipeError:                                        # the reader left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RuntimeError as e:
        if 'DataLoader worker (pid' not in str(e):
            raise
        sentence, code = 'error: a data loading process died, maybe out of memory; try fewer --workers', 2
    print(sentence, file=sys.stderr)
    sys.exit(code)


def hexdigest(path, kind):
    """Of a file. kind: md5 or sha256"""
    return hashlib.new(kind, pathlib.Path(path).read_bytes()).hexdigest()


def fetch(url, path, digest, hint='try again, or download it by hand to that place'):
    """Download `url` to `path`, unless it is there -> path. digest: 'md5:...' or 'sha256:...' or their start.
    UserError if it can't be had whole. Several processes may do this at once: each writes its own file, and
    the last rename wins."""
    kind, expected = digest.split(':')
    temporary = f'{path}.{uuid.uuid4().hex}.tmp'
    try:
        if os.path.isfile(path) and hexdigest(path, kind).startswith(expected):
            return path
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as response, open(temporary, 'wb') as f:
            total = int(response.headers.get('Content-Length', 0)) or None
            with tqdm.wrapattr(response, 'read', total, desc=os.path.basename(path), disable=None) as body:
                shutil.copyfileobj(body, f)
        came = hexdigest(temporary, kind)
        if not came.startswith(expected):
            raise ValueError(f'its {kind} is {came[:16]}, not {expected[:16]}')
        os.replace(temporary, path)
        return path
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise UserError(f'{url} could not be downloaded to {path} ({e}); {hint}')
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


# -------------------------------------------------------------------------------------------------- one image

class Unreadable(Exception):
    """An image that can't be read or decoded."""


def rgb(image):
    """PIL image of any mode -> RGB: 16 bits scaled to 8, what is transparent composited on white."""
    if image.mode.startswith('I'):                                 # Pillow would clip at 255
        image = Image.fromarray(np.uint8(np.asarray(image).clip(0, 65535) / 257 + 0.5))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def crop(image, size):
    """PIL image, RGB -> (size, size, 3) uint8: the middle square, scaled as in ADM (Dhariwal & Nichol 2021),
    as published FID statistics are. JPEG's own down-scaling would be faster, but gives other pixels."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


# ------------------------------------------------------------------------------------------- folders and zips

class Data:
    """Images with labels. Picklable, so that it can travel to loading processes.

    class_names: list of str, [] for data without classes.  labels: (N,) int64, all 0 without classes.
    mirror: is a mirror image as right as the original?  load(i): PIL image, RGB; raises Unreadable.
    """
    mirror = True                                                  # digits or text would say False
    notes = ()

    def __init__(self, class_names, labels):
        self.class_names, self.labels = list(class_names), np.asarray(labels, np.int64)

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """What messages call image i."""
        return f'image {i}'


class Folder:
    """All files below a folder. names: relative, sorted, with / between.  read(i, limit): the first bytes."""

    def __init__(self, path):
        self.path, start = path, len(os.path.join(path, ''))
        self.names = sorted(os.path.join(folder, file)[start:].replace(os.sep, '/')
                            for folder, _, files in os.walk(path, followlinks=True) for file in files)

    def read(self, i, limit=None):
        with open(os.path.join(self.path, self.names[i]), 'rb') as f:
            return f.read(limit)


def skip_header(f, offset):
    """Go to the content of a zip's entry: after the header at offset, the entry's name and extras."""
    f.seek(offset + 26)
    f.seek(sum(struct.unpack('<HH', f.read(4))), os.SEEK_CUR)


class Zip:
    """The same of a zip. It notes where each file lies and opens the zip anew for each read, which costs
    microseconds; a ZipFile can't be pickled, nor shared by processes, and ImageNet's takes a gigabyte."""

    def __init__(self, path):
        self.path = path
        with zipfile.ZipFile(path) as z:
            infos = sorted((f for f in z.infolist() if not f.is_dir()), key=lambda f: f.filename)
        self.names = [f.filename for f in infos]
        self.places = np.array([(f.header_offset, f.compress_size, f.compress_type) for f in infos])

    def read(self, i, limit=None):
        offset, size, method = self.places[i].tolist()
        with open(self.path, 'rb') as f:
            skip_header(f, offset)
            raw = f.read(size if limit is None else min(size, limit))
        return zlib.decompressobj(-15).decompress(raw) if method == zipfile.ZIP_DEFLATED else raw


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
        super().__init__(*(table_classes(names, source.path, source.read(tables[0])) if tables else
                           folder_classes(names, source.path)))
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

    def has_header(self, i):
        """Does Pillow know this file? Decodes nothing, and reads it all only if its start is not enough."""
        for limit in (1 << 16, None):
            with contextlib.suppress(Exception):
                Image.open(io.BytesIO(self.source.read(self.index[i], limit)))
                return True
        return False


def is_image(name):
    """By its name. Hidden files are not, nor what Macs add to zips."""
    hidden = '/.' in '/' + name or name.startswith('__MACOSX/')
    return not hidden and posixpath.splitext(name)[1].lower() in IMAGE_ENDINGS


def folder_classes(names, path):
    """-> class names, the class number of each name"""
    folders = [name.split('/')[0] if '/' in name else '' for name in names]
    class_names, labels = np.unique(folders, return_inverse=True)
    if class_names.tolist() == ['']:
        return [], labels
    if class_names[0] == '':
        raise UserError(f'{path} has images beside its class folders, such as {names[folders.index("")]}; '
                        'move them into a class folder, or all images into one for data without classes')
    return class_names.tolist(), labels


def table_classes(names, path, text):
    """-> class names, the class number of each name"""
    try:
        pairs = json.loads(text)['labels']
        if pairs is None:
            return [], [0] * len(names)
        number = {name: int(label) for name, label in pairs}
        labels = [number[name] for name in names]
        if min(labels) < 0:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f'dataset.json in {path} must say {{"labels": [["name", class number], ...]}} for '
                        'all images there, or {"labels": null} for data without classes')
    return [str(i) for i in range(max(labels) + 1)], labels


# ------------------------------------------------------------------------------------ CIFAR-10, Fashion-MNIST

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
    """The 50,000 training images of CIFAR-10 (Krizhevsky 2009), 32 pixels a side."""
    archive, = download(*CIFAR10)
    with tarfile.open(archive) as tar:
        files = {posixpath.basename(m.name): tar.extractfile(m).read() for m in tar if m.isfile()}
    rows = b''.join(files[f'data_batch_{i}.bin'] for i in range(1, 6))
    rows = np.frombuffer(rows, np.uint8).reshape(-1, 3073)
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)     # label, then a plane a colour
    return Arrays(files['batches.meta.txt'].decode().split(), rows[:, 0], np.ascontiguousarray(images))


def fashion_mnist():
    """The 60,000 training images of Fashion-MNIST (Xiao et al. 2017), grey. Padded from 28 to 32 pixels a
    side with more of their black background, as is customary: sides halve evenly, and pixels stay sharp."""
    images, labels = [np.frombuffer(gzip.decompress(pathlib.Path(path).read_bytes()), np.uint8)
                      for path in download(*FASHION_MNIST)]
    images = np.pad(images[16:].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    names = 't-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot'
    return Arrays(names.split(), labels[8:], images)


# ----------------------------------------------------------------------------------------------------- shapes

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

    Their edges are jagged, at 128 pixels a side: for 64 or less, the box filter of `crop` makes them smooth.
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


# ------------------------------------------------------------------------------------------ opening, checking

BUILT_IN = {'shapes': Shapes, 'cifar10': cifar10, 'fashion_mnist': fashion_mnist}


def open_data(name):
    """-> Data. name: one of BUILT_IN, or a folder or a zip of images. UserError for what is neither."""
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if not os.path.exists(name):
        raise UserError(f'there is no {name}; give a folder or a zip of images, or {" or ".join(BUILT_IN)}')
    try:
        return Files(Folder(name) if os.path.isdir(name) else Zip(name))
    except zipfile.BadZipFile:
        raise UserError(f'{name} is neither a folder nor an intact zip; give one that has images in it')
    except OSError as e:
        raise UserError(f'{name} could not be read ({e.strerror}); give a folder or a zip that can')


def refuse_damage(names, count, seen):
    """UserError if more than 1% of the images seen are unreadable. names: of some, count: of how many"""
    if count > 0.01 * seen:
        raise UserError(f'{count} of {seen} images are unreadable, such as {", ".join(names[:3])}; '
                        'repair or remove them')


def check(data):
    """Look at the header of every file -> names of the unreadable; UserError if they are more than 1%."""
    if not isinstance(data, Files):
        return []
    with ThreadPool(16) as pool:                                   # a slow disk answers many at once
        good = pool.imap(data.has_header, range(len(data)), chunksize=64)
        bar = tqdm(good, 'checking', len(data), unit=' images', leave=False, delay=1, disable=None)
        names = [data.name(i) for i, fine in enumerate(bar) if not fine]
    refuse_damage(names, len(names), len(data))
    return names


# ---------------------------------------------------------------------------------------------------- batches

@functools.lru_cache(maxsize=2)                                    # a step may lie in two epochs
def permutation(seed, epoch, n):
    return np.random.default_rng((seed, 0, epoch)).permutation(n)


class Steps(Dataset):
    """Step by step, this rank's share of the global batch: images (b, 3, H, W) uint8, labels (b,) int64, and
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
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)    # channels last in memory
        return images, torch.tensor(np.array(labels)), broken

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


def leave_group(worker):
    """Ctrl-C and a scheduler's SIGTERM reach all processes of a group; the main one alone is to answer. It
    ends its workers by SIGTERM itself, so they must not ignore that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, 'setsid'):
        os.setsid()


def load(dataset, order, workers, pin=False):
    """Iterate over dataset[i] for i in `order`, made by so many processes a little ahead (0: by this one)."""
    return DataLoader(dataset, batch_size=None, sampler=order, num_workers=workers, pin_memory=pin,
                      worker_init_fn=leave_group)


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
            yield images, labels, len(broken)
    except Unreadable:
        raise UserError('a hundred images on end are unreadable; is the disk with them still there?')


# ---------------------------------------------------------------------------------------------------- packing

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


def recover(path):
    """An unfinished zip of ours -> ZipInfo of each complete entry. What follows the last of them is cut off.
    The zip's directory is not written yet, but its entries stand in a row: header, name, extras, data."""
    infos, end = [], 0
    with open(path, 'a+b') as f:
        f.seek(0)
        while len(header := f.read(30)) == 30 and header.startswith(b'PK\3\4'):
            crc, size, _, name_length, extra_length = struct.unpack('<14x3L2H', header)
            info = zipfile.ZipInfo(f.read(name_length).decode())
            info.header_offset, info.CRC, info.compress_size, info.file_size = end, crc, size, size
            info.external_attr = 0o600 << 16                       # as writestr does: readable once unpacked
            f.seek(extra_length, os.SEEK_CUR)
            if size == 0 or zlib.crc32(f.read(size)) != crc:       # its header is completed after its data
                break
            infos.append(info)
            end = f.tell()
        f.truncate(end)
    return infos


def pack(data, path, size, workers):
    """Write `data`, cropped, to a zip of PNGs called class/number.png -> names of the unreadable, left out.
    If interrupted, it leaves a file *.partial, from which the next call goes on."""
    def entry(i):
        return posixpath.join(*data.class_names[data.labels[i]:][:1], f'{i:08d}.png')

    partial, broken = f'{path}.{size}.partial', []
    done = recover(partial)
    names = {info.filename for info in done}
    todo = [i for i in range(len(data)) if entry(i) not in names]
    with zipfile.ZipFile(partial, 'a') as z:
        z.infolist().extend(done)                                  # the directory is written from this list
        for i, png in tqdm(load(Pngs(data, size), todo, workers), 'packing', len(data), initial=len(done),
                           unit=' images', disable=None):
            if png is None:
                broken.append(data.name(i))
            else:
                z.writestr(zipfile.ZipInfo(entry(i)), png)
    os.replace(partial, path)
    return broken


def main(argv):
    parser = Parser(description='Crop and resize a data set once, for all runs, and pack it to a zip.')
    parser.add_argument('src', help=f'folder or zip of images, or {", ".join(BUILT_IN)}')
    parser.add_argument('dst', help='zip to write; after an interruption, the same command goes on')
    parser.add_argument('--size', type=int, default=256, help='pixels a side (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=os.cpu_count(),
                        help='processes (default: %(default)s)')
    args = parser.parse_args(argv)
    if args.size < 1 or args.workers < 0:
        raise UserError('--size must be positive and --workers must not be negative')
    if os.path.exists(args.dst):
        raise UserError(f'{args.dst} exists already; remove it, or give another name')
    data = open_data(args.src)
    try:
        broken = pack(data, args.dst, args.size, args.workers)
    except OSError as e:
        raise UserError(f'{args.dst} could not be written ({e.strerror}); is its folder there, and space?')
    print(f'{args.dst}: {len(data) - len(broken)} images in {len(data.class_names)} classes')
    if broken:
        print('unreadable and left out:', *broken, sep='\n  ')


if __name__ == '__main__':
    cli(main)
