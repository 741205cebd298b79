"""Golden numbers for test_evaluate.py and for LPIPS, from the packages that published numbers come
from.

    python tests/golden_evaluate.py          rewrites tests/golden/*.npz

Needs packages that the project itself does without, hence the fixtures: torchvision,
torch-fidelity, pytorch-fid and lpips. Those in the repository were made with torch 2.14.1,
torchvision 0.29.1, torch-fidelity 0.4.0, pytorch-fid 0.3.0 and lpips 0.1.4, on a CPU. No released
weights are involved: they are random, drawn by numpy, thus the same anywhere; the fixtures hold
what the packages answer. Tests import this file, too, and then it needs numpy and torch alone.
"""
import contextlib
import hashlib
import os
import sys
import tempfile
from unittest import mock

import numpy as np
import torch

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'golden')
SIZES = (28, 32, 64, 256, 299, 500)                    # that the resize rule is checked for
VGG16 = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256),
         14: (256, 256), 17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512),
         26: (512, 512), 28: (512, 512)}


def images(seed, n, size):
    """(n, size, size, 3) uint8: noise at several scales, of varying strength, so that images
    differ."""
    rng, out = np.random.RandomState(seed), np.full((n, size, size, 3), 128.0)
    for cells in (1, 2, 4, 8, 16):
        index = np.arange(size) * cells // size
        noise = rng.standard_normal((n, cells, cells, 3))[:, index][:, :, index]
        out += noise * rng.uniform(5, 50, (n, 1, 1, 3))
    return out.clip(0, 255).astype(np.uint8)


def two_sets():
    """20 images and 20 of half the contrast: each set covers a part of the other."""
    return images(1, 20, 32), images(2, 20, 32) // 2 + 64


def random_vgg(seed):
    """State dict with the convolutions of torchvision's VGG16: He's initialisation, small biases"""
    rng, state = np.random.RandomState(seed), {}
    for i, (cin, cout) in VGG16.items():
        weight = rng.standard_normal((cout, cin, 3, 3)) * np.sqrt(2 / (9 * cin))
        state[f'features.{i}.weight'] = torch.from_numpy(weight).float()
        state[f'features.{i}.bias'] = torch.from_numpy(rng.uniform(-0.1, 0.1, cout)).float()
    return state


def random_heads(seed):
    """State dict with the keys and shapes of lpips/weights/v0.1/vgg.pth; positive, as those are"""
    rng = np.random.RandomState(seed)
    return {f'lin{i}.model.1.weight': torch.from_numpy(rng.uniform(0, 0.5, (1, c, 1, 1))).float()
            for i, c in enumerate((64, 128, 256, 512, 512))}


def key_hash(state):
    """sha256 of the names and shapes in a state dict"""
    rows = [f'{name} {tuple(v.shape)}' for name, v in state.items()
            if 'num_batches_tracked' not in name]
    return hashlib.sha256('\n'.join(sorted(rows)).encode()).hexdigest()


def bits(tensor):
    """sha256 of an array's bytes"""
    return hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest()


def golden_inception(state):
    """What torch-fidelity says of two_sets; every 32nd feature of the first three images."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity import interpolate_compat_tensorflow
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'weights.pth')
        torch.save(state, path)
        net = FeatureExtractorInceptionV3('golden', ['2048', 'logits_unbiased'], path)
    spatial = []
    net.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, args, out: spatial.append(out[:, :7].permute(0, 2, 3, 1).flatten(1)))
    (pool, logits), (ref, _) = [net(torch.from_numpy(pixels).permute(0, 3, 1, 2))
                                for pixels in two_sets()]
    statistics = [fid_features_to_statistics(f.double()) for f in (pool, ref)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)
    score = isc_features_to_metric(logits)
    prc = prc_features_to_metric(pool, ref, prc_neighborhood=3, prc_batch_size=10000,
                                 save_cpu_ram=False, verbose=False)
    resize, resized = interpolate_compat_tensorflow.interpolate_bilinear_2d_like_tensorflow1x, []
    for size in SIZES:
        pixels = torch.from_numpy(images(3, 1, size)).permute(0, 3, 1, 2).float()
        resized.append(bits(resize(pixels, (299, 299), align_corners=False)))
    return dict(pool=pool[:3, ::32], logits=logits[:3, ::32], spatial=spatial[0][:3, ::32],
                fid=fid['frechet_inception_distance'],
                score=(score['inception_score_mean'], score['inception_score_std']),
                precision=prc['precision'], recall=prc['recall'], resized=resized)


def golden_keys(state):
    """Names and shapes of the network that pytorch-fid loads the released weights into,
    strictly."""
    from pytorch_fid import inception
    with mock.patch.object(inception, 'load_state_dict_from_url', lambda *args, **kwargs: state):
        released = inception.fid_inception_v3().state_dict()
    count = sum('num_batches_tracked' not in name for name in released)
    return dict(keys=key_hash(released), count=count)


def golden_lpips():
    """Distances of three pairs of images, by lpips with random weights."""
    import lpips
    with contextlib.redirect_stdout(sys.stderr):
        net = lpips.LPIPS(net='vgg', pretrained=False, pnet_rand=True)
    vgg, trunk = random_vgg(0), {}
    for name in net.net.state_dict():                  # sliceN.I.weight, I as in features.I
        trunk[name] = vgg['features.' + name.split('.', 1)[1]]
    net.net.load_state_dict(trunk)
    missing, unexpected = net.load_state_dict(random_heads(0), strict=False)
    missing = [name for name in missing if name.startswith('lin') and 'lins' not in name]
    assert not unexpected and not missing
    a, b = [torch.from_numpy(images(seed, 3, 48)).permute(0, 3, 1, 2) / 127.5 - 1
            for seed in (4, 5)]
    with torch.no_grad():
        return dict(distance=net(a, b).flatten())


def main():
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from evaluate import random_inception
    state = random_inception().state_dict()
    np.savez_compressed(f'{FOLDER}/inception.npz', **golden_inception(state), **golden_keys(state))
    np.savez_compressed(f'{FOLDER}/lpips.npz', **golden_lpips())


if __name__ == '__main__':
    main()
