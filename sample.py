"""Make images with a trained model: noise -> flow, token by token or several at once -> decoder.

    python sample.py --cfg 2.0 --gamma 0.25                          a labelled grid, out/grid.png
    python sample.py --classes heart star --num_samples 64 --out hearts_and_stars.png
    torchrun --nproc_per_node=8 sample.py --num_samples 50000 --out samples.npz

Image i depends on --seed and i alone: not on --batch_size, nor on the number of processes. With
--decode jacobi that holds to within --tol.
"""
from dataclasses import dataclass
import os
import zipfile

import numpy as np
from PIL import Image, ImageDraw
import torch

from data import UserError, check_numbers, cli, option, parse_options, require, whole
from flow import JACOBI_IMAGES, jacobi_is_slower
from model import (TOL, check_sampling, export, find_process, gather_images, grid, load_model,
                   note_on_guidance, progress, ready_to_sample, sample_images, sampling_dtype,
                   tolerance)


@dataclass
class Options:
    """The options of sample.py, with their defaults."""
    ckpt: str = option('out/ckpt.pt', 'checkpoint of train.py; its EMA weights are used')
    cfg: float = option(0.0, 'guidance weight w (see --guidance); 0 is off (not 1)')
    gamma: float = option(0.0, "size of SimFlow's score step (Eq. 6); 0.25 in the paper, 0 is off")
    guidance: str = option('', 'how --cfg guides: a row of GUIDANCE in flow.py, such as tarflow or '
                               "tarflow_tau (needs no labels); default: the checkpoint's")
    # torchrun takes --n for one of its own options.
    num_samples: int = option(80, 'images; image i is of class i mod the number of classes',
                              also=['--n'])
    classes: list[str] = option((), 'classes to draw: names, or, unless all names are numbers, '
                                    'numbers from 0 on; default: all')
    decode: str = option('sequential', 'how the flow is inverted: sequential, token by token, or '
                                       'jacobi, several at once until they no longer change')
    tol: float = option(TOL, "jacobi's tolerance, relative change of a token: at 0.001 no pixel "
                              'was more than one level of 255 off, in float32')
    seed: int = option(0, 'random seed of the noise')
    batch_size: int = option(80, 'images at once in each process: more is faster, and more memory')
    denoise: bool | None = option(None, "end by TARFlow's denoising step; default: the preset's")
    export: str = option('', 'file to write the EMA weights alone to, instead of making images')
    out: str = option('', "X.png: a grid; X.npz: ADM's layout; X/: a new folder of PNGs, on a "
                          'disk that all processes share; default: grid.png beside --ckpt')
    device: str = option('', 'cuda, mps, cpu; default: the best there is')
    dtype: str = option('', 'float32 or bfloat16 (autocast); default: float32 if --dtype was that '
                            'in training, else bfloat16 if the GPU has it')
    compile: bool = option(False, 'torch.compile, which takes a minute: worth it on a GPU for ten '
                                  'thousand images or more per process')

    def check(self):
        """Raise UserError for values that make no sense."""
        for name in ('num_samples', 'batch_size'):
            value = getattr(self, name)
            require(value >= 1, f'--{name} must be at least 1, not {value}')
        check_numbers(self)
        tolerance(self.decode, self.tol)
        require(not self.out or self.out.endswith(('.png', '.npz', '/')),
                f'--out {self.out} must end in .png, in .npz or in / (a folder)')


def choose_classes(wanted, class_names):
    """Names or numbers -> numbers. All classes if none are wanted; UserError for one that is not
    there. A name wins; where all names are numbers, as in dataset.json, a number is a name."""
    chosen, numbered = [], all(name.isdecimal() for name in class_names)
    for name in wanted:
        if name in class_names:
            chosen.append(class_names.index(name))
        elif name.isdecimal() and int(name) < len(class_names) and not numbered:
            chosen.append(int(name))
        else:
            some = ', '.join(class_names[:10]) + ', ...' * (len(class_names) > 10)
            known = f'{len(class_names)} classes, {some}' if class_names else 'no classes'
            raise UserError(f'--classes {name}: the model has {known}')
    return chosen or list(range(len(class_names))) or [0]


def labelled_grid(images, labels, class_names):
    """images (N, H, W, 3) uint8, labels (N,) -> PIL image: sorted by class, whose name stands above
    its first image and at every new row."""
    order = np.argsort(labels, kind='stable')
    counts = np.unique(labels, return_counts=True)[1]
    balanced = len(set(counts)) == 1 and 1 < counts[0] <= 16       # then a row is a class
    columns = counts[0] if balanced else int(np.ceil(len(images) ** 0.5))
    zoom = max(1, 64 // images.shape[1])
    tiles = []
    for position, i in enumerate(order):
        image = Image.fromarray(images[i].repeat(zoom, 0).repeat(zoom, 1))
        tile = Image.new('RGB', (image.width, image.height + 14), 'white')
        tile.paste(image, (0, 14))
        if class_names and (position % columns == 0 or labels[i] != labels[order[position - 1]]):
            ImageDraw.Draw(tile).text((2, 1), class_names[labels[i]], 'black')
        tiles.append(np.asarray(tile))
    return grid(np.stack(tiles), columns)


def check_out(path):
    """Make the folder that `path` is, or lies in. UserError if files are in it that would later be
    taken for samples of this run, or if nothing can be written there."""
    folder = path if path.endswith('/') else os.path.dirname(path) or '.'
    os.makedirs(folder, exist_ok=True)
    if path.endswith('/'):
        require(not os.listdir(path), f'--out {path} is not empty; name a new folder, or empty it')
    else:
        require(not os.path.isdir(path), f'--out {path} is a folder; name a file, or {path}/')
    require(os.access(folder, os.W_OK),
            f'--out {path}: nothing can be written to {folder}; name another place')


def save_grid(path, batches, labels, class_names):
    """batches: of images (b, H, W, 3) uint8 -> one picture"""
    picture = labelled_grid(np.concatenate(list(batches)), labels, class_names)
    with whole(path) as temporary:
        picture.save(temporary, 'png')


def save_npz(path, batches, labels, class_names):
    """ADM's layout: arr_0 (N, H, W, 3) uint8, arr_1 (N,) labels if there are classes. Written as
    the batches come, since 50,000 images of 256 pixels are 10 GB."""
    first = next(batches)
    header = {'descr': '|u1', 'fortran_order': False, 'shape': (len(labels), *first.shape[1:])}
    with whole(path, path + '.tmp') as temporary, zipfile.ZipFile(temporary, 'w') as z:
        with z.open('arr_0.npy', 'w', force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, header)
            f.write(first.tobytes())
            for batch in batches:
                f.write(batch.tobytes())
        if class_names:
            with z.open('arr_1.npy', 'w') as f:
                np.lib.format.write_array(f, labels)


def save_folder(folder, batches, labels, class_names):
    """A PNG per image as it comes, in a folder per class if there are classes. batches: positions
    (b,) among all, images (b, H, W, 3); every process writes its own."""
    for positions, images in batches:
        for i, image in zip(positions, images):
            home = os.path.join(folder, class_names[labels[i]] if class_names else '')
            os.makedirs(home, exist_ok=True)
            Image.fromarray(image).save(os.path.join(home, f'{i:06d}.png'))


def save(path, batches, labels, class_names, process):
    """Write what `sample_images` yields to an npz, a picture or a folder. labels (N,): of all."""
    if path.endswith('/'):
        return save_folder(path, batches, labels, class_names)
    batches = gather_images(batches, process)
    if process.rank:
        for _ in batches:                                          # makes this process's share
            pass
    elif path.endswith('.npz'):
        save_npz(path, batches, labels, class_names)
    else:
        save_grid(path, batches, labels, class_names)


def main(argv):
    options = parse_options(Options, argv, 'Make images with a trained SimFlow.')
    options.check()
    if options.export:
        process = find_process(options.device)
        return process.on_rank_0(export, options.ckpt, options.export)
    model, config, class_names = load_model(options.ckpt)
    process = find_process(options.device, sampling_dtype(options.dtype, config), options.compile)
    tol = tolerance(options.decode, options.tol)
    check_sampling(config, options.gamma, options.guidance, tol, options.denoise)
    chosen = torch.tensor(choose_classes(options.classes, class_names))
    path = options.out or os.path.join(os.path.dirname(options.ckpt), 'grid.png')
    process.on_rank_0(check_out, path)
    note = note_on_guidance(config, class_names, options.cfg, options.gamma, options.guidance)
    if note:
        process.print(note)
    n = options.num_samples
    if tol and jacobi_is_slower(process.device, min(n, options.batch_size), options.cfg):
        process.print(f'--decode jacobi: with more than {JACOBI_IMAGES} images at once '
                      '(guided ones count twice) a CPU is faster token by token, and does that '
                      'instead')
    # An npz is shuffled, so that any part of it is a fair sample of all classes.
    order = np.arange(n)
    if path.endswith('.npz'):
        order = np.random.default_rng(options.seed).permutation(n)
    labels = chosen[torch.arange(n) % len(chosen)]
    model = ready_to_sample(model, process)
    batches = sample_images(model, labels, options.seed, process, options.batch_size,
                            options.cfg, options.gamma, order, guidance=options.guidance, tol=tol,
                            denoise=options.denoise)
    save(path, progress(batches, n, '', process), labels.numpy()[order], class_names, process)
    process.print(f'{path}: {n} images, cfg {options.cfg}, gamma {options.gamma} (0 is off)')


if __name__ == '__main__':
    cli(main)
