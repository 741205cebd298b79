"""Golden numbers for test_align.py: DINOv2's features as timm computes them, with REPA's
preparation of images.

    python tests/golden_align.py             rewrites tests/golden/dinov2.npz

Needs timm and torchvision, which the project itself does without, hence the fixture. The one in the
repository was made with torch 2.14.1, torchvision 0.29.1 and timm 1.0.31, on a CPU. No released
weights are involved: they are random, drawn by numpy, thus the same anywhere. Tests import this
file, too, and then it needs numpy and torch alone.
"""
import numpy as np
import torch

from golden_evaluate import FOLDER, images, key_hash

# ViT-B/14, of which two blocks will do
WIDTH, DEPTH = 768, 2
# tokens per side: size of the images
GRIDS = {16: 240, 32: 500}
# that the position table is resampled to
SIDES = (8, 16, 32, 37, 40)


def layout(width, depth, cells=37):
    """Names and shapes in Meta's dinov2_vit*14_pretrain.pth"""
    c = width
    shapes = {'cls_token': (1, 1, c), 'pos_embed': (1, 1 + cells * cells, c), 'mask_token': (1, c),
              'patch_embed.proj.weight': (c, 3, 14, 14), 'patch_embed.proj.bias': (c,)}
    block = {'norm1.weight': (c,), 'norm1.bias': (c,), 'attn.qkv.weight': (3 * c, c),
             'attn.qkv.bias': (3 * c,), 'attn.proj.weight': (c, c), 'attn.proj.bias': (c,),
             'ls1.gamma': (c,), 'norm2.weight': (c,), 'norm2.bias': (c,),
             'mlp.fc1.weight': (4 * c, c), 'mlp.fc1.bias': (4 * c,),
             'mlp.fc2.weight': (c, 4 * c), 'mlp.fc2.bias': (c,), 'ls2.gamma': (c,)}
    for i in range(depth):
        shapes |= {f'blocks.{i}.{name}': shape for name, shape in block.items()}
    return shapes | {'norm.weight': (c,), 'norm.bias': (c,)}


def random_state(seed, width, depth):
    """State dict of that layout in which everything matters: no bias is 0, no scale is 1, attention
    chooses, and embeddings are so small that LayerNorm's eps shows."""
    rng, state = np.random.RandomState(seed), {}
    for name, shape in layout(width, depth).items():
        draw = rng.standard_normal(shape)
        if name.endswith('weight') and len(shape) > 1:
            draw *= (2 if 'qkv' in name else 1) / np.sqrt(np.prod(shape[1:]))
        elif name.endswith(('weight', 'gamma')):
            draw = 1 + 0.3 * draw
        else:
            draw *= 0.5
        if name.startswith(('cls', 'pos', 'patch')):
            draw *= 0.01
        state[name] = torch.from_numpy(draw).float()
    return state


def pixels(side):
    """Two images for that grid, (2, 3, size, size) uint8, with noise in every pixel, too."""
    size = GRIDS[side]
    noise = np.random.RandomState(side).randint(0, 256, (2, size, size, 3))
    image = (images(side, 2, size) // 2 + noise // 2).astype(np.uint8)
    return torch.from_numpy(image).permute(0, 3, 1, 2)


def table():
    """(1, 1 + 37 * 37, 2), a position table"""
    return random_state(1, 2, 0)['pos_embed']


def pick(features):
    """(2, side * side, width) -> 384 of them; steps that divide no side, to meet all rows and
    columns"""
    return features[:, ::11 if features.shape[1] == 256 else 43, ::97]


def timm_features(state, depth, side, image):
    """timm's x_norm_patchtokens, at the size and after the preparation of REPA's train.py"""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
    from torchvision.transforms import Normalize
    net = VisionTransformer(img_size=14 * side, patch_size=14, embed_dim=WIDTH, depth=depth,
                            num_heads=WIDTH // 64, init_values=1e-5, num_classes=0)
    net.load_state_dict(checkpoint_filter_fn(dict(state), net))
    x = Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(image / 255.)
    x = torch.nn.functional.interpolate(x, 14 * side, mode='bicubic')
    with torch.no_grad():
        return net.eval().forward_features(x)[:, 1:]


def golden_features():
    state, rows = random_state(0, WIDTH, DEPTH), {}
    for side in GRIDS:
        features = timm_features(state, DEPTH, side, pixels(side))
        rows[f'features{side}'] = pick(features)
        rows[f'moments{side}'] = features.mean(), features.std()
    return rows


def golden_table():
    """Every 7th row of the resampled table, the class token's and the last one."""
    from timm.layers import resample_abs_pos_embed
    resampled = {side: resample_abs_pos_embed(table(), [side, side], num_prefix_tokens=1)
                 for side in SIDES}
    return {f'table{side}': torch.cat([t[0, ::7], t[0, -1:]]) for side, t in resampled.items()}


def golden_keys():
    """Names and shapes of timm's ViT-B/14 of DINOv2, which are Meta's, but for the mask token."""
    import timm
    with torch.device('meta'):
        state = timm.create_model('vit_base_patch14_dinov2').state_dict()
        state['mask_token'] = torch.zeros(1, WIDTH)
    return dict(keys=key_hash(state))


def main():
    np.savez_compressed(f'{FOLDER}/dinov2.npz',
                        **golden_features(), **golden_table(), **golden_keys())


if __name__ == '__main__':
    main()
