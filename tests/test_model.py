"""Configuration, the joint model, its losses, and what checkpoints and options say when they are
wrong."""
import dataclasses
import math
import os

import numpy as np
import pytest
import torch

from conftest import ROOT
from data import UserError, parse_options
import model as model_module
from model import (PRESETS, SAMPLE, Config, SimFlow, find_process, from_uint8, generator,
                   gather_images, load_checkpoint, load_model, sample_images, to_uint8)
import vae
from vae import LPIPS, Discriminator, adaptive_weight, hinge, load_lpips

TINY = Config(**PRESETS['nano'] | dict(image_size=16, vae_width=8, latent_dim=4, width=16,
                                       layers=(1, 1, 2)))


def tiny_model(classes=3, config=TINY):
    torch.manual_seed(0)
    model = SimFlow(config, classes)
    # nothing zero, as zeros stop gradients
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def parse(*argv):
    return parse_options(Config, argv, '', PRESETS)


# ------------------------------------------------------------------------------------ configuration

def test_presets_change_defaults_and_flags_win():
    assert parse().model == 'nano' and parse('--width', '64').width == 64
    assert parse('--model', 'S').width == 384 and parse('--width=96', '--model', 'S').width == 96
    assert parse('--layers', '1,2,3').layers == (1, 2, 3) and parse('--flip', '0').flip is False


def test_paper_recipe():
    """Table 9, and section 4 of its appendix."""
    c = parse('--model', 'XXL')
    assert (c.batch_size, c.epochs, c.steps, c.constant) == (256, 160, 0, 0.5)
    assert (c.lr, c.lr_end, c.warmup, c.clip) == (1e-4, 1e-6, 0, 1.0)
    assert (c.ema, c.class_drop, c.beta2, c.sigma) == (0.9999, 0.1, 0.999, 0.5)
    assert (c.latent_dim, c.tokens, c.lpips, c.gan) == (64, 256, 1.0, 0.1)
    assert parse('--model', 'XXL', '--image_size', '512').tokens == 1024


def test_asking_for_epochs_replaces_a_presets_steps():
    assert parse().steps > 0
    assert (parse('--epochs', '3').epochs, parse('--epochs', '3').steps) == (3, 0)
    assert parse('--epochs', '3', '--steps', '7').steps == 7


@pytest.mark.parametrize('argv, word', [
    (['--leyers', '2'], '--leyers'), (['--layers', '2,x'], '--layers'), (['--lr', 'nan'], '--lr'),
    (['--steps', '1.5'], '--steps'), (['--compile', 'yes'], '--compile'),
    (['--model', 'M'], '--model'), (['--gan', '-1'], '--gan'),
    (['--image_size', '30'], '--image_size'), (['--heads', '3'], '--heads'),
    (['--class_drop', '2'], '--class_drop'), (['--l1', '0', '--l2', '0'], '--l1'),
    (['--batch_size', '0'], '--batch_size'), (['--layers', '2,0'], '--layers'),
    (['--vae_width', '6'], '--vae_width'), (['--gan_width', '6'], '--gan_width'),
    (['--gan', '0.1', '--image_size', '16', '--gan_layers', '3'], '--gan_layers'),
    (['--lpips', '1', '--image_size', '8'], '--lpips'),
    (['--holdout', '1'], '--holdout'), (['--epochs', '0', '--steps', '0'], '--steps'),
    (['--batch_size', '6', '--grad_accum', '4'], '--batch_size')])
def test_mistakes_name_the_option(argv, word):
    with pytest.raises(UserError, match=word):
        parse(*argv).check()


def test_unknown_device_and_dtype():
    for process, word in [(('tpu', ''), '--device'), (('cpu', 'float3'), '--dtype')]:
        with pytest.raises(UserError, match=word):
            find_process(*process)


def test_random_streams_do_not_meet():
    draw = lambda *key: torch.randn(4, generator=generator('cpu', *key)).tolist()
    keys = [(stream, seed, index) for stream in range(2) for seed in range(2) for index in range(2)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    assert draw(0, 1, 2) == draw(0, 1, 2)


# ---------------------------------------------------------------------------------- the joint model

def test_everything_learns_together():
    """Each loss alone reaches the encoder: nothing is detached. Together they reach every
    parameter."""
    model = tiny_model()
    image, y, noise = torch.randn(4, 3, 16, 16), torch.arange(4), torch.randn(4, *model.flow.shape)
    for loss in (lambda recon, nll: recon.square().mean(), lambda recon, nll: nll.mean()):
        model.zero_grad()
        recon, nll, *_ = model(image, y, noise)
        loss(recon, nll).backward()
        assert all(p.grad.abs().sum() > 0 for p in model.vae.encoder.parameters())
    model.zero_grad()
    recon, nll, *_ = model(image, y, noise)
    (recon.square().mean() + nll.mean()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_latents_are_the_mean_plus_constant_noise():
    model = tiny_model()
    image, noise = torch.randn(2, 3, 16, 16), torch.randn(2, *model.flow.shape)
    x, mu, sigma = model.latents(image, noise)
    assert sigma == 0.5
    torch.testing.assert_close(x - mu, 0.5 * noise)
    torch.testing.assert_close(mu, model.vae.encode(image)[0])
    y = torch.zeros(2).long()
    torch.testing.assert_close(model(image, y, noise)[1], model.flow.nll(x, y))


def test_generate_goes_through_the_parts():
    model = tiny_model()
    y, noise = torch.tensor([0, 2]), torch.randn(2, *model.flow.shape)
    x = model.flow.sample(noise, y, 1.5)
    x = model.flow.score_step(x, [(0.25, y), (-0.25, torch.full_like(y, model.flow.null_class))])
    images = model.generate(y, noise, cfg=1.5, gamma=0.25)
    torch.testing.assert_close(images, model.vae.decode(x).clamp(-1, 1))
    assert images.abs().max() <= 1


@pytest.mark.parametrize('cfg, gamma', [(0.0, 0.0), (2.0, 0.25)])
def test_samples_do_not_depend_on_the_batch_size(cfg, gamma):
    model, process = tiny_model().eval(), find_process('cpu')
    labels = torch.arange(16) % 3
    runs = []
    for size in (1, 5, 16):
        batches = sample_images(model, labels, 7, process, size, cfg, gamma)
        runs.append(np.concatenate(list(gather_images(batches, process))))
    for images in runs[1:]:
        difference = np.abs(images.astype(int) - runs[0])
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    assert runs[0].std() > 0


def test_the_decoder_sees_the_noise():
    model = tiny_model()
    image, noise = torch.randn(2, 3, 16, 16), torch.randn(2, *model.flow.shape)
    recon, *_ = model(image, torch.zeros(2).long(), noise)
    torch.testing.assert_close(recon, model.vae.decode(model.latents(image, noise)[0]))


def test_samples_have_a_random_stream_of_their_own(monkeypatch):
    used = []

    def note(device, stream, *key):
        used.append(stream)
        return generator(device, stream, *key)

    monkeypatch.setattr(model_module, 'generator', note)
    list(sample_images(tiny_model().eval(), torch.zeros(2).long(), 7, find_process('cpu'), 2))
    assert used == [SAMPLE] * 2


def test_bytes_come_back_and_are_rounded():
    levels = torch.arange(256).byte().view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert np.array_equal(to_uint8(from_uint8(levels)), levels.permute(0, 2, 3, 1))
    assert to_uint8(torch.full((1, 3, 1, 1), 0.999)).tolist() == [[[[255] * 3]]]


# ------------------------------------------------------------------------------------------- losses

def test_discriminator_treats_images_one_by_one():
    """With BatchNorm, two processes of B/2 would not be one of B."""
    disc, images = Discriminator(8, 2), torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(disc(images), torch.cat([disc(image[None]) for image in images]))
    assert disc(images).shape == (4, 1, 2, 2)


def test_patchgan_of_the_paper():
    with torch.device('meta'):
        convolutions = [m for m in Discriminator(64, 3) if isinstance(m, torch.nn.Conv2d)]
    sizes = [(c.out_channels, c.stride[0]) for c in convolutions]
    assert sizes == [(64, 2), (128, 2), (256, 2), (512, 1), (1, 1)]


def test_hinge():
    loss = hinge(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0]))
    assert loss.item() == pytest.approx(0.5 * (0.25 + 0.5))


def test_adaptive_weight_balances_the_pulls_and_is_capped():
    rec, gan = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    assert adaptive_weight(rec, gan).item() == pytest.approx(10, rel=1e-3)
    cap = adaptive_weight(rec * 1e9, gan * 0).item()
    assert adaptive_weight(rec * 1e6, gan * 0).item() == cap < 1e5


def test_lpips_equals_the_lpips_package():
    """Random weights; golden_evaluate.py tells how the expected values were made. Float32 sums of
    up to 4608 terms are off by about 6e-8 sqrt(4608) = 4e-6; 13 layers in a row make 1.5e-5, and
    squares double that."""
    golden = pytest.importorskip('golden_evaluate')
    net = LPIPS().load(golden.random_vgg(0), golden.random_heads(0))
    a, b = [torch.from_numpy(golden.images(seed, 3, 48)).permute(0, 3, 1, 2) / 127.5 - 1
            for seed in (4, 5)]
    expected = np.load(os.path.join(ROOT, 'tests', 'golden', 'lpips.npz'))['distance']
    torch.testing.assert_close(net(a, b), torch.from_numpy(expected), rtol=5e-5, atol=0)
    torch.testing.assert_close(net(a, a), torch.zeros(3))
    assert not any(p.requires_grad for p in net.parameters())


def test_lpips_weights_from_files(tmp_path, monkeypatch):
    golden = pytest.importorskip('golden_evaluate')
    vgg, heads = tmp_path / 'vgg.pth', tmp_path / 'heads.pth'
    torch.save(golden.random_vgg(0), vgg)
    torch.save(golden.random_heads(0), heads)
    net = load_lpips(str(vgg), str(heads))
    assert torch.equal(net.features[0].weight, golden.random_vgg(0)['features.0.weight'])
    with pytest.raises(UserError, match='--lpips 0'):
        load_lpips(str(heads), str(vgg))                           # the wrong way round
    heads.write_bytes(heads.read_bytes()[:1000])
    with pytest.raises(UserError, match='heads.pth'):
        load_lpips(str(vgg), str(heads))


def test_lpips_weights_that_cannot_be_had(tmp_path, monkeypatch):
    """One sentence says where to put the file and how to do without."""
    monkeypatch.setattr(vae, 'VGG16_URL', 'http://127.0.0.1:9/vgg16-397923af.pth')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(UserError) as error:
        load_lpips()
    assert str(tmp_path) in str(error.value) and '--lpips 0' in str(error.value)


# -------------------------------------------------------------------------------------- checkpoints

def test_checkpoints_of_other_versions_are_refused_in_a_sentence(tmp_path):
    path, model = tmp_path / 'ckpt.pt', tiny_model()
    state = {'config': dataclasses.asdict(TINY), 'class_names': list('abc'), 'step': 1,
             'ema': model.state_dict()}
    torch.save(state, path)
    assert load_model(str(path))[2] == ['a', 'b', 'c']
    torch.save(state | {'config': state['config'] | {'rotary': True, 'heds': 2}}, path)
    with pytest.raises(UserError, match='does not know: --rotary, --heds; use the version'):
        load_model(str(path))
    torch.save(state | {'config': state['config'] | {'prior': 'mamba'}}, path)
    with pytest.raises(UserError, match='does not know: --prior mamba'):
        load_model(str(path))
    for ema in ({'vae.conv_out.bias': torch.zeros(7)}, {'new.weight': torch.zeros(1)}):
        torch.save(state | {'ema': state['ema'] | ema}, path)
        message = 'other weights than its own options say .*; use the version'
        with pytest.raises(UserError, match=message) as e:
            load_model(str(path))
        assert '\n' not in str(e.value)


def test_checkpoints_that_are_none(tmp_path):
    with pytest.raises(UserError, match='train.py'):
        load_checkpoint(str(tmp_path / 'absent.pt'))
    path = tmp_path / 'ckpt.pt'
    for content in (b'', b'not a checkpoint', b'PK\3\4 half'):
        path.write_bytes(content)
        with pytest.raises(UserError, match='ckpt.pt'):
            load_checkpoint(str(path))
    torch.save({'model': {}}, path)
    with pytest.raises(UserError, match='ckpt.pt'):
        load_checkpoint(str(path))


def test_infinite_images_are_none():
    """Clamped, an infinity would pass for white or black."""
    config = parse_options(Config, ['--image_size', '8', '--width', '16'], '', PRESETS)
    model = SimFlow(config, 3)
    noise, y = torch.randn(2, *model.flow.shape), torch.arange(2)
    image = torch.zeros(2, 3, 8, 8)
    image[1, 0, 0, :2] = torch.tensor([math.inf, -math.inf])
    model.decode = lambda x: image
    assert model.generate(y, noise).isnan().sum((1, 2, 3)).tolist() == [0, 2]


def test_a_diffusion_model_is_not_sent_to_what_needs_a_flow():
    config = dataclasses.replace(Config(**PRESETS['sit']), model='sit')
    note = model_module.note_on_guidance(config, [], 2.0, 0.0, '')
    assert 'knows no classes' in note and 'tarflow_tau' not in note
