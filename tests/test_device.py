"""Which device a program takes. torch.cuda's functions are replaced by ones that are as strict as
the real ones."""
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from data import UserError
import evaluate
import model
from model import PRESETS, Config, Process, find_process
import train
from vae import LPIPS, VAE, Discriminator


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs, as far as find_process can see. -> what it did to them"""
    seen, zeros = types.SimpleNamespace(current=0, bf16=True), torch.zeros

    def set_device(device):
        seen.current = torch.cuda._utils._get_device_index(device)     # the check of the real one

    def set_stream(stream):
        # of the GPU that was chosen, not before
        assert stream.index == seen.current

    def on_gpu(*size, device=None, **more):
        device = torch.device(device)
        if device.type == 'cuda' and (device.index or 0) > 1:
            raise RuntimeError('CUDA error: invalid device ordinal\n'
                               'CUDA kernel errors might be ...')
        return zeros(*size, device='cpu' if device.type == 'cuda' else device, **more)

    def is_bf16_supported(including_emulation=True):                   # torch 2.9's and 2.13's
        return seen.bf16

    for name, function in dict(is_available=lambda: True, set_device=set_device,
                               is_bf16_supported=is_bf16_supported, set_stream=set_stream,
                               Stream=torch.device).items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch, 'zeros', on_gpu)
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    return seen


@pytest.mark.parametrize('asked, index', [('', 0), ('cuda', 0), ('cuda:0', 0), ('cuda:1', 1)])
def test_one_process_takes_the_gpu_asked_for(two_gpus, asked, index):
    process = find_process(asked)
    assert process.device == torch.device('cuda', index) and two_gpus.current == index
    assert process.dtype == torch.bfloat16 and process.compile


def test_torchruns_processes_take_one_gpu_each(two_gpus, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert find_process().device.index == find_process('cuda').device.index == two_gpus.current == 1


def test_one_gpu_is_not_for_several_processes(two_gpus, monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    message = 'cuda:1 is one device for several processes; give --device cuda'
    with pytest.raises(UserError, match=message):
        find_process('cuda:1')


@pytest.mark.parametrize('asked', ['cuda:2', 'cuda:x', 'gpu', 'cuda:-1'])
def test_a_device_that_is_not_there_is_one_sentence(two_gpus, asked):
    with pytest.raises(UserError, match=f"--device {asked} can't be used here: ") as e:
        find_process(asked)
    assert '\n' not in str(e.value)


def test_launchers_that_say_half_are_refused(monkeypatch):
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(UserError, match='RANK is set, but not LOCAL_RANK, WORLD_SIZE, .*torchrun'):
        find_process('cpu')
    monkeypatch.delenv('RANK')
    monkeypatch.setenv('WORLD_SIZE', '3')                              # alone it means nothing,
    Config(batch_size=8, lpips=0.0).check()
    with pytest.raises(UserError, match='--batch_size 8'):             # but a plan for so many
        Config(batch_size=8, lpips=0.0, dry_run=True).check()
    monkeypatch.setenv('WORLD_SIZE', 'three')
    with pytest.raises(UserError, match="WORLD_SIZE must be a positive number, not 'three'"):
        Config(batch_size=8, lpips=0.0, dry_run=True).check()
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '8')
    with pytest.raises(UserError, match='torchrun'):
        find_process('cpu')


def test_a_closed_terminal_ends_no_run(monkeypatch):
    def closed(text):
        raise BrokenPipeError
    monkeypatch.setattr(tqdm, 'write', closed)
    Process(torch.device('cpu'), torch.float32, False).print('a sentence')


def test_old_gpus_compute_in_float32(two_gpus):
    two_gpus.bf16 = False
    assert find_process().dtype == torch.float32
    assert find_process(dtype='bfloat16').dtype == torch.bfloat16


class NoFloat64(TorchDispatchMode):
    """A Mac's GPU has no float64, and no complex numbers of it: an error there is one here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            assert not torch.is_tensor(t) or t.dtype not in (torch.float64, torch.complex128), func
        return out


@pytest.mark.parametrize('more', [dict(), dict(prior='sit'), dict(prior='vp'),
                                  dict(codec='learned')])
def test_nothing_on_a_device_is_float64(more):
    small = dict(image_size=16, vae_width=8, latent_dim=4, width=16, layers=(1, 1), gan=0.1,
                 gan_width=8, batch_size=4)
    config = Config(**PRESETS['nano'] | small | more)
    trainer = train.Trainer(config, 3, Process(torch.device('cpu'), torch.float32, False), LPIPS())
    y, noise = torch.tensor([0, 1, 2, 3]), torch.randn(4, 16, 4)
    image = torch.rand(4, 3, 16, 16)
    with NoFloat64():
        trainer.train_step((255 * image).byte(), y, lr=1e-3)
        trainer.row()
        trainer.ema.generate(y, noise, cfg=1.0, gamma=0.0 if config.prior == 'sit' else 0.5)
        recon, nll, *_ = trainer.model(image, y, noise)
        trainer.model.kl(nll, 0.5)
        evaluate.distortion(image, recon.detach(), 0.1)
        evaluate.share_on_manifold(torch.randn(9, 4), torch.randn(9, 4))


def test_a_cpu_does_not_ask_for_a_gpu(two_gpus):
    process = find_process('cpu')
    assert (process.device.type, process.dtype, process.compile) == ('cpu', torch.float32, False)


@pytest.mark.parametrize('flags, dtype', [('avx512f avx512_bf16', torch.bfloat16),
                                          ('avx512f', torch.float32)])
def test_a_cpu_trains_in_bfloat16_if_it_has_it(tmp_path, monkeypatch, flags, dtype):
    for name in ('enable_flash_sdp', 'allow_fp16_bf16_reduction_math_sdp'):
        monkeypatch.setattr(torch.backends.cuda, name, lambda on: None)
    monkeypatch.setattr(model, 'CPU_INFO', str(tmp_path / 'cpuinfo'))
    assert find_process('cpu', training=True).dtype == torch.float32             # not on Linux
    (tmp_path / 'cpuinfo').write_text(f'flags : fpu {flags}\n')
    assert find_process('cpu', training=True).dtype == dtype
    assert find_process('cpu').dtype == torch.float32


@pytest.mark.parametrize('asked', [None, True])
def test_without_a_compiler_training_is_eager(monkeypatch, capsys, asked):
    def no_compiler(function):
        raise RuntimeError('\nFailed to find C compiler.\nPlease specify via CC')
    monkeypatch.setattr(torch, 'compile', no_compiler)
    process = Process(torch.device('cpu'), torch.float32, compile=True)
    if asked:
        message = r'does not work here \(Failed to find C compiler.\); leave --compile away'
        with pytest.raises(UserError, match=message):
            model.can_compile(process, asked)
    else:
        assert not model.can_compile(process, asked)
        assert 'Failed to find C compiler' in capsys.readouterr().out


SMALL_VAE = VAE(8, (1, 2), 1, 4, 0.5)
NETWORKS = {'encoder': SMALL_VAE.encoder, 'decoder': SMALL_VAE.decoder,
            'discriminator': Discriminator(8, 3), 'lpips': LPIPS()}


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_compile_whole(name):
    """As one graph, with all convolutions: torch 2.13 leaves out the forwards of its own modules,
    such as nn.Sequential, and does not say so."""
    graphs, net = [], NETWORKS[name]

    def backend(graph, inputs):
        graphs.append(sum('conv2d' in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    net.compile(fullgraph=True, dynamic=False, backend=backend)
    image = torch.rand(1, 4 if name == 'decoder' else 3, 32, 32)
    inputs = [image, image] if name == 'lpips' else [image]
    net(*inputs)
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in net.modules())
    assert graphs == [convolutions * len(inputs)]
