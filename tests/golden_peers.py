"""Golden numbers for test_peers.py, from TARFlow's and SiT's released code.

    python tests/golden_peers.py ML_TARFLOW SIT          rewrites tests/golden/peers.npz

ML_TARFLOW and SIT: checkouts of apple/ml-tarflow and willisma/SiT; the latter needs timm. The
numbers in the repository were made with commits 313120e and 947f95b, torch 2.14.1 and timm 1.0.31,
on a CPU. No released weights are involved: they are random, drawn by numpy, thus the same anywhere.
Tests import this file, too, and then it needs numpy and torch alone.
"""
import sys

import numpy as np
import torch

from golden_evaluate import FOLDER

CLASSES, IMAGE, PATCH, WIDTH = 3, 16, 4, 128
TOKENS, DIM = (IMAGE // PATCH) ** 2, 3 * PATCH ** 2


def tarflow_layout(classes, vp):
    """Names and shapes of ml-tarflow's weights: two blocks of two layers"""
    c, shapes = WIDTH, {}
    out = DIM if vp else 2 * DIM
    for i in range(2):
        block = {'proj_in.weight': (c, DIM), 'proj_in.bias': (c,), 'pos_embed': (TOKENS, c),
                 'proj_out.weight': (out, c), 'proj_out.bias': (out,),
                 'attn_mask': (TOKENS, TOKENS)}
        if classes:
            block['class_embed'] = (classes, 1, c)
        for j in range(2):
            own = f'attn_blocks.{j}.'
            for part in ('attention', 'mlp'):
                block |= {f'{own}{part}.norm.weight': (c,), f'{own}{part}.norm.bias': (c,)}
            linears = {'attention.qkv': (3 * c, c), 'attention.proj': (c, c),
                       'mlp.main.0': (4 * c, c), 'mlp.main.2': (c, 4 * c)}
            for name, shape in linears.items():
                block |= {f'{own}{name}.weight': shape, f'{own}{name}.bias': shape[:1]}
        shapes |= {f'blocks.{i}.{name}': shape for name, shape in block.items()}
    return shapes | {'var': (TOKENS, DIM)}


def sit_layout():
    """Names and shapes of SiT's: two layers of width 32 on 4 x 4 tokens of 4 channels"""
    c = 32
    shapes = {'x_embedder.proj': (c, 4, 1, 1), 't_embedder.mlp.0': (c, 256),
              't_embedder.mlp.2': (c, c), 'final_layer.linear': (4, c),
              'final_layer.adaLN_modulation.1': (2 * c, c)}
    for i in range(2):
        block = {'attn.qkv': (3 * c, c), 'attn.proj': (c, c), 'mlp.fc1': (4 * c, c),
                 'mlp.fc2': (c, 4 * c), 'adaLN_modulation.1': (6 * c, c)}
        shapes |= {f'blocks.{i}.{name}': shape for name, shape in block.items()}
    both = {f'{name}.weight': shape for name, shape in shapes.items()}
    both |= {f'{name}.bias': shape[:1] for name, shape in shapes.items()}
    return both | {'y_embedder.embedding_table.weight': (CLASSES + 1, c)}


def random_state(layout, seed):
    """State dict of that layout in which everything matters: no bias is 0, no scale is 1."""
    rng, state = np.random.RandomState(seed), {}
    for name, shape in sorted(layout.items()):
        draw = rng.standard_normal(shape)
        if name.endswith('attn_mask'):
            draw = np.tril(np.ones(shape))
        elif name == 'var':
            draw = np.exp(0.3 * draw)
        elif 'norm' in name and name.endswith('weight'):
            draw = 1 + 0.3 * draw
        elif name.endswith('weight') and len(shape) > 1:
            draw = draw / np.sqrt(np.prod(shape[1:])) * (0.05 if 'proj_out' in name else 1)
        else:
            draw = 0.05 * draw                                     # LayerNorm's eps shows
        state[name] = torch.from_numpy(draw).float()
    return state


def inputs():
    """-> images (4, 3, 16, 16), noise (4, T, D), classes (4,), SiT's x (4, 4, 4, 4) and times"""
    rng = np.random.RandomState(7)
    draws = [torch.from_numpy(rng.standard_normal(shape)).float()
             for shape in ((4, 3, IMAGE, IMAGE), (4, TOKENS, DIM), (4, 4, 4, 4))]
    image, noise, x = draws
    return image, noise, torch.tensor([0, 1, 2, 1]), x, torch.tensor([0.0, 0.3, 0.7, 1.0])


def tarflow_numbers(path):
    sys.path.insert(0, path)
    from transformer_flow import Model
    image, noise, y, _, _ = inputs()
    numbers = {}
    for kind, classes, vp in (('tarflow', CLASSES, False), ('unlabelled', 0, False),
                              ('vp', CLASSES, True)):
        model = Model(3, IMAGE, PATCH, WIDTH, 2, 2, nvp=not vp, num_classes=classes)
        state = random_state(tarflow_layout(classes, vp), seed=1)
        if not vp:
            state['var'] = torch.ones(TOKENS, DIM)                 # as it stays in training
        model.load_state_dict(state)
        label = y if classes else None
        z, _, logdet = model(image, label)
        numbers |= {f'{kind}_z': z, f'{kind}_logdet': logdet}
        rules = {'plain': {}, 'flat': dict(guidance=1.5),
                 'annealed': dict(guidance=1.5, annealed_guidance=True)}
        if not classes:
            rules = {'temperature': dict(guidance=1.5, annealed_guidance=True, attn_temp=1.5)}
        for rule, options in rules.items():
            numbers[f'{kind}_{rule}'] = model.reverse(noise.clone(), label, **options)
        if classes:
            numbers[f'{kind}_null_z'] = model(image, torch.full_like(y, -1))[0]
    return numbers


def sit_numbers(path):
    sys.path.insert(0, path)
    from models import SiT
    _, _, y, x, t = inputs()
    model = SiT(input_size=4, patch_size=1, in_channels=4, hidden_size=32, depth=2, num_heads=2,
                num_classes=CLASSES, learn_sigma=False).eval()
    table = model.pos_embed[0].clone()
    model.load_state_dict(random_state(sit_layout(), seed=2), strict=False)
    null = torch.where(y == 1, CLASSES, y)
    return {'sit_pos': table, 'sit': model(x, t, y), 'sit_null': model(x, t, null)}


if __name__ == '__main__':
    with torch.no_grad():
        made = tarflow_numbers(sys.argv[1]) | sit_numbers(sys.argv[2])
    arrays = {name: value.numpy() if name == 'sit_pos' else value[:2].numpy()
              for name, value in made.items()}
    np.savez_compressed(f'{FOLDER}/peers.npz', **arrays)
