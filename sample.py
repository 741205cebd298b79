"""Make images with a trained model: noise -> flow, token by token or several at once -> decoder.

    python sample.py --cfg 2.0 --gamma 0.25                          a labelled grid, out/grid.png
    python sample.py --classes heart 3 --n 64 --out hearts.png
    torchrun --nproc_per_node=8 -- sample.py --n 50000 --out samples.npz

The -- is there because torchrun would take --n for its own.

Image i depends on --seed and i alone: not on --batch_size, nor on the number of processes. With
--decode jacobi that holds to within --tol.
"""
from dataclasses import dataclass
import os

import numpy as np
from PIL import Image, ImageDraw
import torch
from tqdm import tqdm

from data import UserError, cli
from flow import FEW, too_many
from model import (check_sampling, find_place, grid, load_model, option, parse_options,
                   sample_images)


@dataclass
class Options:
    """The options of sample.py, with their defaults."""
    ckpt: str = option('out/ckpt.pt', 'checkpoint of train.py; its EMA weights are used')
    cfg: float = option(0.0, "guidance w in the deep block, STARFlow's; 0 is off (not 1)")
    gamma: float = option(0.0, "SimFlow's score step after that, Eq. 6; the paper's is 0.25, 0 is "
                               'off')
    guidance: str = option('', 'how --cfg guides: a row of GUIDANCE in flow.py, such as tarflow or '
                               "tarflow_tau (needs no labels); default: the checkpoint's")
    n: int = option(80, 'images; the label of image i is class i mod the number of classes')
    classes: list[str] = option((), 'names or indices of the classes to draw; default: all')
    decode: str = option('sequential', 'how the flow is inverted: sequential, token by token, or '
                                       'jacobi, several at once until they no longer change')
    tol: float = option(1e-3, "jacobi's tolerance, relative change of a token: at 0.001 no pixel "
                              'was more than one level of 255 off, in float32')
    seed: int = option(0, 'of the noise')
    batch_size: int = option(80, 'images at once in each process: more is faster, and more memory')
    out: str = option('', "X.png: a grid; X.npz: ADM's layout; X/: a PNG an image; default: "
                          'grid.png beside --ckpt')
    device: str = option('', 'cuda, mps, cpu; default: the best there is')
    dtype: str = option('', 'float32 or bfloat16 (autocast); default: bfloat16 if the GPU has it')

    def check(self):
        """Raise UserError for values that make no sense."""
        for name in ('n', 'batch_size'):
            if getattr(self, name) < 1:
                raise UserError(f'--{name} must be at least 1, not {getattr(self, name)}')
        for name in ('cfg', 'gamma', 'seed'):
            if getattr(self, name) < 0:
                raise UserError(f'--{name} must not be negative, but is {getattr(self, name)}')
        if self.decode not in ('sequential', 'jacobi'):
            raise UserError(f'--decode {self.decode} must be sequential or jacobi')
        if self.tol <= 0:
            raise UserError(f'--tol must be positive, not {self.tol}; exact is --decode sequential')
        if self.tol != Options.tol and self.decode == 'sequential':
            raise UserError(f'--tol {self.tol} is for --decode jacobi; the sequential one is exact')
        if self.out and not self.out.endswith(('.png', '.npz', '/')):
            raise UserError(f'--out {self.out} must end in .png, in .npz or in / (a folder)')


def choose_classes(wanted, class_names):
    """Names or indices -> indices. All classes if none are wanted; UserError for one that is not
    there."""
    chosen = []
    for name in wanted:
        if name in class_names:
            chosen.append(class_names.index(name))
        elif name.isdecimal() and int(name) < len(class_names):
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
    for place, i in enumerate(order):
        image = Image.fromarray(images[i].repeat(zoom, 0).repeat(zoom, 1))
        tile = Image.new('RGB', (image.width, image.height + 14), 'white')
        tile.paste(image, (0, 14))
        if class_names and (place % columns == 0 or labels[i] != labels[order[place - 1]]):
            ImageDraw.Draw(tile).text((2, 1), class_names[labels[i]], 'black')
        tiles.append(np.asarray(tile))
    return grid(np.stack(tiles), columns)


def save_folder(folder, images, labels, class_names):
    """A PNG an image, in a folder a class if there are classes"""
    for i, image in enumerate(images):
        home = os.path.join(folder, *class_names[labels[i]:][:1])
        os.makedirs(home, exist_ok=True)
        Image.fromarray(image).save(os.path.join(home, f'{i:06d}.png'))


def save(path, images, labels, class_names, seed):
    """As the ending of `path` says: see --out. UserError if it can't be written."""
    folder = path if path.endswith('/') else os.path.dirname(path) or '.'
    try:
        os.makedirs(folder, exist_ok=True)
        if path.endswith('.png'):
            labelled_grid(images, labels, class_names).save(path)
        elif path.endswith('.npz'):                                # shuffled: order says nothing
            order = np.random.default_rng(seed).permutation(len(images))
            arrays = [images[order]] + [labels[order]] * bool(class_names)
            np.savez(path, *arrays)
        else:
            save_folder(folder, images, labels, class_names)
    except OSError as e:
        raise UserError(f"--out {path} can't be written: {e.strerror}")


def main(argv):
    options = parse_options(Options, argv, 'Make images with a trained SimFlow.')
    options.check()
    place = find_place(options.device, options.dtype)
    model, config, class_names = load_model(options.ckpt)
    tol = options.tol if options.decode == 'jacobi' else 0.0
    check_sampling(config, options.gamma, options.guidance, tol)
    chosen = torch.tensor(choose_classes(options.classes, class_names))
    labels = chosen[torch.arange(options.n) % len(chosen)]
    batches = sample_images(model.to(place.device), labels, options.seed, place, options.batch_size,
                            options.cfg, options.gamma, guidance=options.guidance, tol=tol)
    if tol and too_many(place.device, min(options.n, options.batch_size), options.cfg):
        place.print(f'--decode jacobi: with more than {FEW} images at once, guided ones counted '
                    'twice, token by token is faster on a CPU, and used where that is so')
    images = []
    with tqdm(total=options.n, unit=' images', disable=place.rank > 0 or None) as bar:
        for batch in batches:
            images += [batch] if place.rank == 0 else []
            bar.update(len(batch))
    if place.rank == 0:
        path = options.out or os.path.join(os.path.dirname(options.ckpt), 'grid.png')
        save(path, np.concatenate(images), labels.numpy(), class_names, options.seed)
        print(f'{path}: {options.n} images, cfg {options.cfg}, gamma {options.gamma} (0 is off)')


if __name__ == '__main__':
    cli(main)
