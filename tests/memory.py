"""How much memory a training step will take, told from shapes alone, without a GPU and in seconds.

Options are train.py's, with WORLD_SIZE processes (1, if that is not set), and 1,000 classes.

    python tests/memory.py --model XXL --batch_size 128 --grad_ckpt 1
    WORLD_SIZE=8 python tests/memory.py --model XXL
"""
import contextlib
import dataclasses
import math
from unittest import mock
import warnings
import weakref

import conftest  # noqa: F401, puts the project on the path
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import cli, parse_options
from model import PRESETS, Config, DINOv2, Process, processes
from train import Trainer
from vae import LPIPS


class Fake(FakeTensorMode):
    """Tensors made in here have shapes and sizes but no contents."""

    def __torch_dispatch__(self, *args):
        out = super().__torch_dispatch__(*args)
        self.fake_tensor_converter.tensor_memo.clear()             # weakrefs, which stop Module.to
        return out

    def __deepcopy__(self, memo):                                  # a copied tensor stays in here
        return self


class Memory(TorchDispatchMode):
    """Bytes of the live tensors among those made in here; at their peak, that and the share of the
    gradients of `trained`. Sees the results of operations, not what they need inside."""

    def __init__(self):
        super().__init__()
        self.sizes, self.bytes, self.trained, self.peak = {}, 0, [], (0, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t)]:
            if storage._cdata not in self.sizes:                   # else a view, or in place
                self.sizes[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        if self.bytes > self.peak[0]:
            self.peak = self.bytes, self.gradients()
        return out

    def free(self, key):
        self.bytes -= self.sizes.pop(key)

    def gradients(self):
        return sum(p.grad.nbytes for p in self.trained if p.grad is not None)


def step_memory(trainer, memory, batch, world=1):
    """Bytes by use, at the peak of a step of `batch` images. memory: has seen the trainer made."""
    c = trainer.config
    used = {'model': True, 'disc': c.gan, 'lpips': c.lpips, 'teacher': c.align}
    parameters = [p for name in used if used[name] for p in getattr(trainer, name).parameters()]
    parts = {'parameters': sum(p.nbytes for p in parameters)}
    memory.trained = [p for p in parameters if p.requires_grad]
    for p in memory.trained:
        p.grad = torch.zeros_like(p)
    trainer.adversarial = c.gan > 0
    for opt in trainer.optimizers():
        opt.step()                                                 # the first one makes the state
        opt.zero_grad(set_to_none=world == 1)
        if world > 1:                                              # DDP's buckets stay
            opt.zero_grad = lambda set_to_none, zero=opt.zero_grad: zero(set_to_none=False)
    parts['average and Adam'] = memory.bytes - memory.gradients() - parts['parameters']
    memory.peak, trainer.step = (0, 0), c.gan_start
    image = torch.zeros(batch, 3, c.image_size, c.image_size, dtype=torch.uint8)
    trainer.train_step(image, torch.zeros(batch, dtype=torch.long), lr=0.0)
    peak, parts['gradients'] = memory.peak
    return parts | {'activations': peak - sum(parts.values())}


def predict_memory(config, classes, world=1):
    """step_memory of one of `world` processes, from fake CPU tensors. Attention is taken to be
    fused: no T x T matrix, which a CPU has in bfloat16; without a --dtype one is taken to be in
    float32. Not in it: what torch.compile changes, CUDA's context, cuDNN's workspaces, gaps between
    blocks of memory."""
    half = (config.dtype or config.device) not in ('float32', 'cpu', 'mps')
    process = Process(torch.device('cpu'), torch.bfloat16 if half else torch.float32, compile=False)
    accum = min(2, config.grad_accum)                              # a third one is like the second
    batch = config.batch_size // world // config.grad_accum * accum
    config = dataclasses.replace(config, grad_accum=accum)
    in_float32 = lambda norm: lambda h, *args, **kwargs: norm(h.float(), *args, **kwargs)
    with contextlib.ExitStack() as stack:
        for name in ('layer_norm', 'group_norm'):                  # as CUDA's autocast does
            stack.enter_context(mock.patch.object(F, name, in_float32(getattr(F, name))))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings('ignore', 'Accessing the data pointer')      # deepcopy, of a Fake
        stack.enter_context(Fake())
        memory = stack.enter_context(Memory())
        size = (64, 2, 1) if config.repa == 'random' else (768, 12, 12)      # else ViT-B's
        teacher = DINOv2(*size, math.isqrt(config.tokens)) if config.align else None
        trainer = Trainer(config, classes, process, LPIPS(), teacher)
        return step_memory(trainer, memory, batch, world)


def main(argv):
    config = parse_options(Config, argv, 'Predict the memory of a training step.', PRESETS)
    dataclasses.replace(config, dry_run=True).check()              # counts WORLD_SIZE
    parts = predict_memory(config, 1000, processes())
    print(f'{sum(parts.values()) / 1e9:.2f} GB per process, not compiled; '
          'CUDA, cuDNN and fragmentation take more')
    for name, size in parts.items():
        print(f'  {name:20}{size / 1e9:8.2f}')


if __name__ == '__main__':
    cli(main)
