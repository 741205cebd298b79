"""The siblings of SimFlow: what each has of its own, by properties; then every preset, trained for
two steps."""
import dataclasses
import math

import pytest
import torch

from data import UserError, batches, open_data
from flow import GUIDANCE, Flow, SiT, VPFlow, extrapolate
from model import (NOISE, PRESETS, Aligned, Config, SimFlow, alignment, features, find_process,
                   from_uint8, generative_pass, load_model)
import sample
from test_flow import B, CLASSES, D, T, perturbed, predict, small_flow
from test_train import read_log, same
import train
from vae import Pixels

NANO_SIZED = [name for name, row in PRESETS.items() if 'data' in row]
TINY = dict(image_size=16, vae_width=8, latent_dim=4, width=16, batch_size=8, workers=0,
            device='cpu', repa_width=16, data='shapes')
X = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2))
Y = torch.tensor([0, 3, CLASSES])


def config(preset, **more):
    """The preset, as small as it can be"""
    row = PRESETS[preset] | TINY | dict(repa_layer=1)
    if row.get('codec') == 'pixels':
        row['latent_dim'] = PRESETS[preset]['latent_dim']
    row['layers'] = (1,) * len(row['layers'])
    return Config(**row | dict(model=preset) | more)


def options(preset, **more):
    """The same as a command line"""
    default = dataclasses.asdict(Config(**PRESETS[preset] | dict(model=preset)))
    now = dataclasses.asdict(config(preset, **more))

    def text(value):
        if isinstance(value, tuple):
            return ','.join(map(str, value))
        return str(int(value) if isinstance(value, bool) else value)

    return ['--model', preset] + [f'--{name}={text(value)}' for name, value in now.items()
                                  if name != 'model' and value != default[name]]


# ------------------------------------------------------------------------------- noise and variance

def test_kinds_of_noise():
    """All but the last are Gaussian about a multiple of mu; slerp keeps variance 1; uniform fills
    mu +- sigma."""
    g = torch.Generator().manual_seed(0)
    mu, eps = torch.randn(2, 100_000, generator=g)
    for name, factor in ('additive', 1), ('linear', 0.7), ('slerp', math.sqrt(1 - 0.09)):
        x = NOISE[name].add(mu, 0.3, eps)
        torch.testing.assert_close(x, factor * mu + 0.3 * eps)
        assert torch.equal(NOISE[name].add(mu, 0.0, eps), mu)
    assert NOISE['slerp'].add(mu, 0.3, eps).var() == pytest.approx(1, abs=0.02)
    u = (NOISE['uniform'].add(mu, 0.3, eps) - mu) / 0.3
    assert -1 <= u.min() < -0.999 and 0.999 < u.max() <= 1
    assert u.abs().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize('name, rest', [
    ('linear_random', lambda t: 1 - t), ('slerp_random', lambda t: (1 - t ** 2) ** 0.5)])
def test_noise_of_random_strength(name, rest):
    """One t per image, uniform, and told apart from the noise only by its mean."""
    g = torch.Generator().manual_seed(0)
    mu, eps = torch.randn(2, 4000, 16, 4, generator=g)
    t = (NOISE[name].add(torch.zeros_like(mu), 0.5, eps) / eps)[:, 0, 0]
    torch.testing.assert_close(NOISE[name].add(mu, 0.5, eps),
                               rest(t).view(-1, 1, 1) * mu + t.view(-1, 1, 1) * eps)
    # The largest gap between 4000 draws and a uniform law is about 0.5 / sqrt(4000) = 0.008.
    gap = (t.sort().values - torch.arange(4000) / 4000).abs().max()
    assert gap < 0.03 and 0 <= t.min() and t.max() <= 1
    assert abs(torch.corrcoef(torch.stack([t, eps[:, 3, 2].abs()]))[0, 1]) < 0.06
    assert NOISE[name].entropy != NOISE[name].entropy              # no number: there is no rate


@pytest.mark.parametrize('noise, entropy', [
    ('additive', 0.5 * math.log(2 * math.pi * math.e) + math.log(0.3)),
    ('uniform', math.log(0.6))])
def test_rate_is_a_divergence(noise, entropy):
    """nll, with its constant, less the entropy of the noise."""
    model = SimFlow(config('nano', noise=noise, sigma=0.3), 3)
    nll = torch.tensor([0.2, -1.0])
    torch.testing.assert_close(model.kl(nll, 0.3), nll + 0.5 * math.log(2 * math.pi) - entropy)


@pytest.mark.parametrize('floor', [0.0, 0.5])
def test_rate_of_the_standard_vae_is_its_kl(floor):
    """With no blocks the flow is N(0, I), and the divergence is the textbook's."""
    model = SimFlow(config('learned', layers=(), sigma=floor), 3)
    with torch.no_grad():
        model.vae.encoder[-1].bias.normal_(generator=torch.Generator().manual_seed(0))
        image = torch.randn(2, 3, 16, 16).repeat(2000, 1, 1, 1)
        x, mu, sigma = model.latents(image, torch.randn(4000, 16, 4))
        rate = model.kl(model.flow.nll(x, torch.zeros(4000).long()), sigma).view(2000, 2).mean(0)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mu, sigma), normal(0, 1))
    torch.testing.assert_close(rate, kl[:2].mean((1, 2)), rtol=0.02, atol=0.01)
    assert sigma.shape == mu.shape and sigma.min() >= floor and sigma.std() > 0.1


def test_entropy_is_in_the_loss_only_if_it_is_learned():
    image, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 16, 4)
    for preset, learned in ('nano', False), ('no_noise', False), ('learned', True):
        model = SimFlow(config(preset), 3)
        _, _, entropy, _ = model(image, torch.zeros(2).long(), noise)
        _, _, sigma = model.latents(image, noise)
        assert entropy.requires_grad == learned
        expected = sigma.log().mean((1, 2)) if learned else torch.zeros(2)
        torch.testing.assert_close(entropy, expected)


def test_layer_norm_can_go():
    images = torch.randn(2, 3, 16, 16)
    with_norm, without = [SimFlow(config(preset), 3).vae.encode(images)[0]
                          for preset in ('nano', 'no_norm')]
    assert with_norm.mean(-1).abs().max() < 1e-5 < 1e-3 < without.mean(-1).abs().max()


# ---------------------------------------------------------------------------------- what is trained

@pytest.mark.parametrize('preset, stage_one, still, moving', [
    ('frozen', 'vae', ['encoder', 'decoder'], []),
    ('frozen_learned', 'vae_learned', ['encoder', 'decoder'], []),
    ('starflow', 'vae_learned', ['encoder'], ['decoder'])])
def test_frozen_parts_are_those_of_stage_one(tmp_path, preset, stage_one, still, moving):
    train.main([*options(stage_one, steps=2, sample_interval=0), '--out', str(tmp_path / 'one')])
    first = [*options(preset, steps=4, sample_interval=0),
             '--init', str(tmp_path / 'one' / 'ckpt.pt')]
    train.main([*first, '--out', str(tmp_path / 'two')])
    train.main([*first, '--out', str(tmp_path / 'cut'), '--stop_at', '2'])
    # of no more use once begun
    (tmp_path / 'one' / 'ckpt.pt').rename(tmp_path / 'elsewhere.pt')
    train.main([*first, '--out', str(tmp_path / 'cut')])
    paths = 'elsewhere.pt', 'two/ckpt.pt', 'cut/ckpt.pt'
    one, two, cut = [torch.load(tmp_path / path, weights_only=True) for path in paths]
    for name, value in two['model'].items():
        part = name.split('.')[1]
        assert torch.equal(value, cut['model'][name])              # and it resumes bit for bit
        if part in still:
            assert torch.equal(value, one['ema'][name])
        if part in moving and name.endswith('weight'):
            assert not torch.equal(value, one['ema'][name])
    assert two['model']['flow.blocks.0.transformer.proj_out.weight'].abs().sum() > 0


def broken_vae(tmp_path):
    """-> a checkpoint whose VAE lacks a weight"""
    state = torch.load(tmp_path / 'one' / 'ckpt.pt', weights_only=True)
    del state['ema']['vae.conv_out.weight']
    torch.save(state, tmp_path / 'broken.pt')
    return str(tmp_path / 'broken.pt')


def test_init_takes_a_whole_model_or_refuses(tmp_path, capsys):
    # moves far in a few steps
    big = dict(lr=0.1, lr_end=0.1, warmup=0, sample_interval=0)
    train.main([*options('nano', steps=3, **big), '--out', str(tmp_path / 'one')])
    start = ['--init', str(tmp_path / 'one' / 'ckpt.pt'), '--out', str(tmp_path / 'two')]
    train.main([*options('nano', steps=1, lr=1e-12, lr_end=0.0, sample_interval=0), *start])
    assert 'one/ckpt.pt: vae and flow' in capsys.readouterr().out
    one, two = [load_model(tmp_path / name / 'ckpt.pt')[0] for name in ('one', 'two')]
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b)
    for preset, more, word in [('nano', dict(vae_width=16), '--vae_width 8'),
                               ('no_norm', {}, '--latent_norm 1'),
                               ('tarflow', {}, '--codec vae')]:
        with pytest.raises(UserError, match=word):
            train.main([*options(preset, steps=1, **more), *start[:3], str(tmp_path / 'three')])
    train.main([*options('vae', steps=1, sample_interval=0), *start[:3], str(tmp_path / 'four')])
    # a VAE alone has no prior to take
    assert 'ckpt.pt: vae\n' in capsys.readouterr().out
    # other heads, or fewer layers, are another function of the same weights
    for more in dict(heads=8), dict(layers=(1,)):
        train.main([*options('nano', steps=1, sample_interval=0, **more), *start[:3],
                    str(tmp_path / f'{more}')])
        assert 'ckpt.pt: vae\n' in capsys.readouterr().out
    with pytest.raises(UserError, match='no weights that fit'):
        train.main([*options('nano', gan=0.0), '--init', broken_vae(tmp_path), '--out',
                    str(tmp_path / 'six')])
    with pytest.raises(UserError, match='--init'):
        train.main(options('frozen'))
    (tmp_path / 'bad.pt').write_bytes(b'\0\0\0\0')
    with pytest.raises(UserError, match='bad.pt'):
        train.main([*options('nano'), '--init', str(tmp_path / 'bad.pt'),
                    '--out', str(tmp_path / 'five')])


def test_positions_of_another_resolution_are_resampled(tmp_path, capsys):
    """From 4 x 4 tokens to 8 x 8: the flow is taken, its positions vary as before."""
    big = dict(lr=0.1, lr_end=0.1, warmup=0, sample_interval=0)
    train.main([*options('nano', steps=3, **big), '--out', str(tmp_path / 'one')])
    train.main([*options('nano', steps=1, lr=1e-12, lr_end=0.0, sample_interval=0, image_size=32),
                '--init', str(tmp_path / 'one' / 'ckpt.pt'), '--out', str(tmp_path / 'two')])
    assert 'one/ckpt.pt: vae and flow' in capsys.readouterr().out
    one, two = [load_model(tmp_path / name / 'ckpt.pt')[0] for name in ('one', 'two')]
    for small, large in zip(one.flow.blocks, two.flow.blocks):
        small, large = small.transformer, large.transformer
        torch.testing.assert_close(small.proj_in.weight, large.proj_in.weight)
        table = large.pos.unflatten(0, (8, 8)).unflatten(1, (4, 2)).unflatten(0, (4, 2))
        # Means over 2 x 2 are about the old value: bicubic weights make no new extremes inside.
        means = table.mean((1, 3)).flatten(0, 1)
        assert torch.corrcoef(torch.stack([means.flatten(), small.pos.flatten()]))[0, 1] > 0.95


def test_latents_are_divided_by_their_std(tmp_path, capsys):
    """STARFlow: measured of the frozen encoder, kept in the checkpoint, undone by the decoder."""
    train.main([*options('vae_learned', steps=2, sample_interval=0),
                '--out', str(tmp_path / 'one')])
    first = options('starflow', steps=2, sample_interval=0, sigma=0.0, lr=1e-12, lr_end=0.0)
    train.main([*first, '--init', str(tmp_path / 'one' / 'ckpt.pt'),
                '--out', str(tmp_path / 'two')])
    one, two = [load_model(tmp_path / name / 'ckpt.pt')[0] for name in ('one', 'two')]
    assert one.vae.std == 1 and two.vae.std != 1
    g = torch.Generator().manual_seed(0)
    image, noise = torch.rand(8, 3, 16, 16, generator=g) * 2 - 1, torch.zeros(8, *one.flow.shape)
    a, _, sigma_a = one.latents(image, noise)
    b, _, sigma_b = two.latents(image, noise)
    torch.testing.assert_close(a, b * two.vae.std)
    torch.testing.assert_close(sigma_a, sigma_b * two.vae.std)
    torch.testing.assert_close(one.vae.decode(a), two.vae.decode(b), rtol=1e-4, atol=1e-5)
    pixels, *_ = next(batches(open_data('shapes'), 16, 8, 0, True, 0, 1))
    mu, sigma = two.vae.encode(from_uint8(pixels))
    assert (mu.var() + sigma.square().mean()).sqrt() == pytest.approx(1, rel=0.01)
    train.main([*first, '--init', str(tmp_path / 'two' / 'ckpt.pt'),
                '--out', str(tmp_path / 'three')])
    assert load_model(tmp_path / 'three' / 'ckpt.pt')[0].vae.std == two.vae.std    # not again
    state = torch.load(tmp_path / 'one' / 'ckpt.pt', weights_only=True)
    for part in ('model', 'ema'):
        del state[part]['vae.std']                                 # as before there was one
    torch.save(state, tmp_path / 'old.pt')
    assert load_model(tmp_path / 'old.pt')[0].vae.std == 1


def test_the_std_of_latents_divides_all_but_the_added_noise():
    codec, image = SimFlow(config('learned_noise'), 3).vae, torch.randn(2, 3, 16, 16)
    before = codec.encode(image)[1] ** 2 - 0.5 ** 2
    codec.std.fill_(4.0)
    torch.testing.assert_close((codec.encode(image)[1] ** 2 - 0.5 ** 2) * 16, before)


def test_the_std_of_latents_is_measured_without_the_added_noise():
    trainer = train.Trainer(config('learned_noise'), 3, find_process('cpu'))
    image = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    mu, sigma = trainer.model.vae.encode(from_uint8(image))
    expected = (mu.var(correction=0) + (sigma ** 2 - 0.5 ** 2).mean()).sqrt()
    trainer.measure_std(image)
    assert trainer.ema.vae.std.item() == pytest.approx(expected.item(), rel=1e-4)


# ------------------------------------------------------------------------------------------- pixels

@pytest.mark.parametrize('channels', [1, 3])
def test_patches_are_a_bijection(channels):
    codec = Pixels(patch=4, latent_dim=16 * channels, sigma=0.05)
    image = torch.randn(2, channels, 8, 8).expand(-1, 3, -1, -1)
    x, sigma = codec.encode(image)
    assert x.shape == (2, 4, 16 * channels) and sigma == 0.05
    torch.testing.assert_close(codec.decode(x), image)
    # row 0, column 1: the second token
    token = image[0, :channels, :4, 4:]
    torch.testing.assert_close(x[0, 1].sort().values, token.flatten().sort().values)


def test_denoising_is_tweedies():
    """For a flow that is the identity p = N(0, I), and the mean of clean data given x is
    x (1 - sigma^2)."""
    model = SimFlow(config('tarflow', sigma=0.5), 3)
    noise, y = 0.3 * torch.randn(2, 16, 48), torch.zeros(2).long()
    clean = model.vae.decode(0.75 * noise).clamp(-1, 1)
    torch.testing.assert_close(model.generate(y, noise), clean)


def test_denoising_knows_the_class(monkeypatch):
    model, asked = SimFlow(config('tarflow'), 3), []
    monkeypatch.setattr(model.flow, 'score_step', lambda x, steps: asked.extend(steps) or x)
    model.generate(torch.tensor([1, 2]), torch.randn(2, 16, 48))
    (weight, y), = asked
    assert weight == 0.05 ** 2 and y.tolist() == [1, 2]


def test_guidance_is_the_presets_unless_another_is_asked_for(monkeypatch, tmp_path):
    train.main([*options('tarflow', steps=1, sample_interval=0), '--out', str(tmp_path)])
    asked = []
    monkeypatch.setattr(Flow, 'sample',
                        lambda self, z, y, cfg, guidance, tol: asked.append(guidance) or z)
    for argv in ([], ['--guidance', 'tarflow_tau']):
        sample.main(['--ckpt', str(tmp_path / 'ckpt.pt'), '--n', '1', '--cfg', '1', *argv])
    assert asked == [GUIDANCE['tarflow'], GUIDANCE['tarflow_tau']]
    with pytest.raises(UserError, match='--guidance'):
        sample.main(['--ckpt', str(tmp_path / 'ckpt.pt'), '--guidance', 'tarflo'])


def guided_slowly(flow, z, y, cfg, guidance):
    """The definition: every block, two passes per token, everything read again each time."""
    for block in reversed(flow.blocks):
        z, w = block.reorder(z), cfg if guidance.every_block or block is flow.blocks[-1] else 0.0
        x = z.clone()
        for t in range(T - 1):
            weight = w * (t + 1) / (T - 1) if guidance.anneal else w
            cond = [p[:, t] for p in predict_at(block, x[:, :t + 1], y, 1.0)]
            null = y if guidance.tau else torch.full_like(y, CLASSES)
            uncond = [p[:, t] for p in predict_at(block, x[:, :t + 1], null, guidance.tau or 1.0)]
            mu, log_scale = guidance.rule(cond[0], uncond[0], cond[1], uncond[1], weight)
            x[:, t + 1] = mu + log_scale.exp() * z[:, t + 1]
        z = block.reorder(x)
    return z


def predict_at(block, x, y, tau):
    """Queries that are divided by tau are attention at that temperature."""
    layers = block.transformer.layers
    bias, weight = [[getattr(layer.attn.qkv, kind)[:16] for layer in layers]
                    for kind in ('bias', 'weight')]
    for p in bias + weight:
        p.data /= tau
    out = predict(block, x, y)
    for p in bias + weight:
        p.data *= tau
    return out


@pytest.mark.parametrize('name', GUIDANCE)
def test_every_kind_of_guidance_is_its_definition(name):
    flow, y = small_flow(), torch.tensor([0, 3, 1])
    with torch.no_grad():
        slow = guided_slowly(flow, X, y, 1.5, GUIDANCE[name])
        sample = flow.sample(X, y, 1.5, GUIDANCE[name])
        torch.testing.assert_close(sample, slow, rtol=1e-3, atol=1e-4)
        assert (slow - flow.sample(X, y)).abs().max() > 1e-2       # it does guide


def test_temperature_guides_without_labels_and_one_is_none():
    flow, none = small_flow(classes=0), torch.zeros(B, dtype=torch.long)
    plain, guided = [flow.sample(X, none, cfg, GUIDANCE['tarflow_tau']) for cfg in (0.0, 2.0)]
    assert (guided - plain).abs().max() > 1e-2
    one = GUIDANCE['tarflow_tau']._replace(tau=1.0)
    torch.testing.assert_close(flow.sample(X, none, 2.0, one), plain, rtol=1e-4, atol=1e-4)


def test_extrapolation():
    mu, log_scale = extrapolate(*torch.tensor([1.0, 0.5, -0.2, -0.1]), 2.0)
    assert mu == 2.0 and log_scale == pytest.approx(-0.4)


def test_volume_preserving():
    torch.manual_seed(0)
    flow = perturbed(VPFlow(D, T, 16, 2, (1, 1), CLASSES)).eval()
    z, logdet = flow(X, Y)
    assert torch.equal(logdet, torch.zeros(B)) and not torch.allclose(z, X)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: flow(v.view(1, T, D), Y[:1])[0].flatten(), X[0].flatten())
    assert torch.linalg.det(jacobian).item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(flow.sample(z, Y), X, rtol=1e-4, atol=1e-4)   # variance is still 1
    x = 3 * torch.randn(500, T, D, generator=torch.Generator().manual_seed(3))
    y = torch.zeros(500).long()
    flow(x, y)
    assert torch.equal(flow.variance, torch.ones(T, D))                      # not while evaluating
    flow.train()
    square = flow(x, y)[0].square().mean(0)
    flow(2 * x, y)                                                           # a second micro-batch
    both, start = torch.stack(flow.squares).mean(0), flow.variance.clone()
    flow.track(lambda values: None, torch.tensor(1.0))                       # of a step that failed
    assert torch.equal(flow.variance, start)
    flow.squares += [both]
    flow.track(lambda values: None, torch.tensor(0.0))
    torch.testing.assert_close(flow.variance, 0.9 * start + 0.1 * both)      # once a step
    for _ in range(80):
        flow(x, y)
        flow.track(lambda values: None, torch.tensor(0.0))
    torch.testing.assert_close(flow.variance, square, rtol=0.01, atol=0.01)
    z = flow(x, y)[0] / flow.variance.sqrt()
    torch.testing.assert_close(flow.sample(z, y), x, rtol=1e-3, atol=1e-3)


def test_bits_a_dimension_of_a_new_flow_are_a_gaussians():
    """Levels are 1 / 127.5 apart, and a uniform variable fills the gap: the density of z, in bits,
    plus log2(127.5)."""
    model, y = SimFlow(config('tarflow_bits'), 3), torch.zeros(4).long()
    levels = torch.randint(256, (4, 1, 16, 16)).expand(-1, 3, -1, -1)
    x, mu, sigma = model.latents(levels / 127.5 - 1, torch.randn(4, 16, 16))
    bits = model.kl(model.flow.nll(x, y), sigma) / math.log(2)
    log_p = torch.distributions.Normal(0, 1).log_prob(x).mean((1, 2))
    torch.testing.assert_close(bits, -log_p / math.log(2) + math.log2(127.5))
    back = ((model.vae.decode(x) + 1) * 127.5).round().long()                # no two levels meet
    assert torch.equal(back, levels)


def test_squares_of_micro_batches_are_averaged():
    flow = VPFlow(D, T, 16, 2, (1, 1), CLASSES)
    one, two = [flow(scale * X, Y)[0].square().mean(0) for scale in (1, 2)]
    flow.track(lambda values: None, torch.tensor(0.0))
    torch.testing.assert_close(flow.variance, 0.9 + 0.1 * (one + two) / 2)


def test_squares_are_kept_in_training_alone():
    flow = VPFlow(D, T, 16, 2, (1, 1), CLASSES).eval()
    flow.score(X, Y)
    assert not flow.squares
    flow.train()(X, Y)
    assert len(flow.squares) == 1


# ---------------------------------------------------------------------------------------- alignment

@pytest.mark.parametrize('block', [1, 2])
def test_features_are_in_the_order_of_the_grid(block):
    """A token's own features move when it does: those at its place, whichever way the block
    reads."""
    flow = small_flow()
    before = features(flow.blocks[block - 1], X, Y, 1)
    moved = X.clone()
    moved[:, 2] += 1
    changed = (features(flow.blocks[block - 1], moved, Y, 1) - before).abs().amax((0, 2)) > 1e-6
    reads_left_to_right = block == 1
    assert changed.tolist() == [(t >= 2 if reads_left_to_right else t <= 2) for t in range(T)]


def reached(model, loss):
    """Names of the parts that get a gradient: encoder, or block.depth of the flow"""
    model.zero_grad()
    loss.backward()
    names = [name for name, p in model.named_parameters()
             if p.grad is not None and p.grad.abs().sum() > 0]
    return {'encoder' if 'encoder' in name else 'blocks.' + name.split('.')[2] for name in names
            if 'encoder' in name or name.startswith('flow.blocks')}


@pytest.mark.parametrize('align, parts', [
    ('forward', {'encoder', 'blocks.0', 'blocks.1'}), ('reverse', {'blocks.1'}),
    ('reverse_through', {'blocks.1', 'blocks.2'})])
def test_which_parameters_alignment_teaches(align, parts):
    torch.manual_seed(0)
    model = Aligned(config('repa', align=align, repa_block=(2,), layers=(1, 1, 1)), 3, 8)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    image, y, noise = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]), torch.randn(4, 16, 4)
    *_, projected = model(image, y, noise)
    assert projected.shape == (1, 4, 16, 8)
    assert reached(model, alignment(projected, torch.randn(4, 16, 8))) == parts
    # nothing else has changed
    plain = SimFlow.forward(model, image, y, noise)
    for a, b in zip(model(image, y, noise), plain):
        torch.testing.assert_close(a, b)


def test_several_blocks_are_aligned_each_by_itself():
    model = Aligned(config('repa', repa_block=(3, 1), layers=(1, 1, 1)), 3, 8)
    batch = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]), torch.randn(4, 16, 4)
    *_, both = model(*batch)
    for i, block in enumerate((3, 1)):
        alone = Aligned(config('repa', repa_block=(block,), layers=(1, 1, 1)), 3, 8)
        weights = {name: value for name, value in model.state_dict().items()
                   if not name.startswith('projectors')}
        weights |= {f'projectors.0.{name}': value
                    for name, value in model.projectors[i].state_dict().items()}
        alone.load_state_dict(weights)
        torch.testing.assert_close(alone(*batch)[-1], both[i:i + 1])


def test_checkpoints_from_when_one_block_was_aligned_resume(tmp_path):
    argv = options('repa', out=str(tmp_path), sample_interval=0)
    train.main([*argv, '--steps', '2', '--stop_at', '1'])
    path = tmp_path / 'ckpt.pt'
    state = torch.load(path, weights_only=True)
    state['config']['repa_block'] = 2
    for part in ('model', 'ema'):
        state[part] = {name.replace('projectors.0.', 'projector.'): value
                       for name, value in state[part].items()}
    assert 'projector.0.weight' in state['model']
    torch.save(state, path)
    train.main([*argv, '--steps', '2'])
    assert load_model(path)[1].repa_block == (2,)


@pytest.mark.parametrize('block', [1, 2, 3])
def test_generative_pass_comes_back_to_the_input(block):
    flow = small_flow()
    inputs = []
    z, _ = flow(X, Y, inputs)
    again = generative_pass(flow, inputs, z, Y, block)
    for i in range(block - 1, 3):
        torch.testing.assert_close(again[i], inputs[i], rtol=1e-4, atol=1e-4)


def test_alignment_is_minus_the_cosine():
    a, b = torch.randn(2, 2, 5, 8)
    cosine = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
    torch.testing.assert_close(alignment(a, b), -cosine.mean())
    assert alignment(a, 3 * a) == pytest.approx(-1)
    assert alignment(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_weights_of_classes_are_classes():
    flow = small_flow()
    one_hot = torch.eye(CLASSES + 1)[[0, 3]]
    for a, b in zip(flow(X[:2], one_hot), flow(X[:2], Y[:2])):
        torch.testing.assert_close(a, b)


def test_features_are_those_after_so_many_layers():
    block, seen = small_flow((3, 3)).blocks[0], []
    block.transformer.layers[1].register_forward_hook(lambda *args: seen.append(args[2]))
    block(X, Y)
    torch.testing.assert_close(features(block, X, Y, 2), seen[0])


# ---------------------------------------------------------------------------------------- diffusion

GRID = torch.randn(B, 9, D, generator=torch.Generator().manual_seed(0))      # of 3 x 3 tokens


def test_sit_sees_all_tokens_and_starts_at_zero():
    torch.manual_seed(0)
    sit = SiT(D, 9, 16, 2, (1, 1), CLASSES)
    assert sit.velocity(GRID, torch.rand(B), Y).abs().max() == 0
    perturbed(sit)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: sit.velocity(v, torch.rand(1), Y[:1]), GRID[:1])
    assert (jacobian[0, :, :, 0].abs().amax((1, 3)) > 0).all()
    one, other = sit.velocity(GRID, torch.zeros(B), Y), sit.velocity(GRID, torch.ones(B), Y)
    assert (one - other).abs().max() > 1e-5                        # it can tell the time


def test_sit_trains_on_velocities():
    sit = SiT(D, 9, 16, 2, (1,), CLASSES)
    x = torch.randn(20_000, 9, D, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    # at first of E (noise - x)^2
    error = sit.nll(2 * x, torch.zeros(len(x)).long()).mean().item()
    assert error == pytest.approx(5, rel=0.02)


def test_sit_integrates_the_flow_of_a_gaussian(monkeypatch):
    """Data N(0, s^2) have velocity x_t (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2); the map from
    noise to data is s z. The error of Heun's rule falls with the square of the steps."""
    s, sit = 0.5, SiT(D, 9, 16, 2, (1,), CLASSES)
    monkeypatch.setattr(sit, 'velocity', lambda x, t, y: x * ((t - (1 - t) * s ** 2) / (
        (1 - t) ** 2 * s ** 2 + t ** 2))[0])

    def error(steps):
        return (sit.sample(GRID, Y, steps=steps) / s - GRID).norm() / GRID.norm()

    assert error(100) < 1e-4
    assert error(20) / error(40) == pytest.approx(4, rel=0.2)


def test_sit_is_guided_on_velocities(monkeypatch):
    sit = SiT(D, 9, 16, 2, (1,), CLASSES)

    def velocity(x, t, y):
        return torch.where(y == CLASSES, 1.0, 3.0).view(-1, 1, 1).expand_as(x)

    monkeypatch.setattr(sit, 'velocity', velocity)
    y = torch.zeros(B).long()
    torch.testing.assert_close(sit.sample(GRID, y), GRID - 3)
    torch.testing.assert_close(sit.sample(GRID, y, cfg=2.0), GRID - (3 + 2 * 2))


def test_diffusion_models_of_before_are_refused(tmp_path):
    """Their weights would fit, and mean something else."""
    train.main([*options('sit', steps=1, sample_interval=0), '--out', str(tmp_path)])
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    del state['config']['unit_std']
    torch.save(state, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='earlier version'):
        load_model(tmp_path / 'ckpt.pt')


def test_gelu_is_exact_but_in_sit():
    flow, sit = Flow(D, 9, 16, 2, (1,), CLASSES), SiT(D, 9, 16, 2, (1,), CLASSES)
    assert flow.blocks[0].transformer.layers[0].mlp[1].approximate == 'none'
    assert sit.layers[0].mlp[1].approximate == 'tanh'


# -------------------------------------------------------------------------------------- all presets

@pytest.mark.parametrize('preset', NANO_SIZED)
def test_presets_train_sample_and_resume(tmp_path, preset):
    """Four steps are two and two, bit for bit, and images come out."""
    more = dict(steps=4, sample_interval=4, log_interval=1, save_interval=2)
    if PRESETS[preset].get('freeze'):
        stage_one = 'vae_learned' if PRESETS[preset].get('codec') == 'learned' else 'vae'
        train.main([*options(stage_one, steps=1, sample_interval=0),
                    '--out', str(tmp_path / 'one')])
        more['init'] = str(tmp_path / 'one' / 'ckpt.pt')
    train.main([*options(preset, **more), '--out', str(tmp_path / 'once')])
    train.main([*options(preset, **more), '--out', str(tmp_path / 'twice'), '--stop_at', '2'])
    train.main([*options(preset, **more), '--out', str(tmp_path / 'twice')])
    once, twice = [torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)
                   for name in ('once', 'twice')]
    assert all(same(once[name], twice[name]) for name in ('model', 'ema', 'opt'))
    for name in once['ema'].keys() & {'flow.variance'}:
        assert torch.equal(once['ema'][name], once['model'][name])
        assert not (once['ema'][name] == 1).all()
    assert once['opt']['param_groups'][0]['weight_decay'] == PRESETS[preset].get('weight_decay', 0)
    row = read_log(tmp_path / 'once')[-1]
    c, value = config(preset), lambda name: float(row.get(name) or 0)
    rate = c.rate * (value('nll') - value('entropy'))
    loss = c.l1 * value('l1') + c.l2 * value('l2') + rate + c.repa_weight * value('align')
    assert value('loss') == pytest.approx(loss, rel=1e-4, abs=1e-5)
    model, _, names = load_model(tmp_path / 'once' / 'ckpt.pt')
    images = model.generate(torch.arange(2), torch.randn(2, *model.flow.shape), cfg=1.0)
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all() and images.std() > 0


@pytest.mark.parametrize('argv, word', [
    (['--codec', 'vea'], '--codec vea'), (['--prior', 'gan'], '--prior gan'),
    (['--noise', 'pink'], '--noise pink'), (['--model', 'frozen'], '--init'),
    (['--model', 'tarflow', '--latent_dim', '16', '--vae_patch', '2'], '--latent_dim 16'),
    (['--noise', 'slerp', '--sigma', '1.5'], '--sigma'),
    (['--model', 'repa', '--repa_block', '1,4'], '--repa_block 4'),
    (['--model', 'sit', '--align', 'forward'], '--prior sit'),
    (['--model', 'tarflow', '--vae_mults', '1,1'], '--vae_mults'),
    (['--model', 'sit', '--width', '18'], '--width'),
    (['--unit_std', '1'], '--unit_std'),
    (['--model', 'tarflow', '--layers='], '--layers'),
    (['--model', 'slerp', '--denoise', '1'], '--denoise'),
    (['--freeze', 'vae', '--init', 'x', '--lpips', '1'], '--lpips'),
    (['--align', 'backward'], r'\(nothing\), forward'),
    (['--model', 'learned', '--noise', 'slerp'], '--noise slerp')])
def test_systems_that_make_no_sense(argv, word):
    with pytest.raises(UserError, match=word):
        train.main(argv)
