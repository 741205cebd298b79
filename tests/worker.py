"""What test_train.py runs in one or more processes:  [torchrun ...] worker.py grads|nan OUT [options of train.py]"""
import sys

import torch

import conftest  # noqa: F401, puts the project on the path
from data import batches, open_data
from model import PRESETS, Config, find_place, parse_options
import train


def make(options, place=None):
    """A trainer whose weights are far from their initial zeros, and its share of the first batch."""
    config = parse_options(Config, options, '', PRESETS)
    place = place or find_place('cpu', '', config.compile)
    trainer = train.Trainer(config, 10, place)
    g = torch.Generator().manual_seed(0)
    for p in trainer.model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=g)
    image, y, _ = next(batches(open_data('shapes'), config.image_size, config.batch_size, 0, False, 0, 1,
                               place.rank, place.world))
    return trainer, image, y


def grads(out, options):
    """Gradients of one step, before clipping, to a file."""
    trainer, image, y = make(options)
    sys.setswitchinterval(20)                                      # gloo's threads wait long for Python: see leave_processes
    trainer.update = lambda terms, adversarial, lr: None
    trainer.train_step(image, y, lr=1e-3)
    if trainer.place.rank == 0:
        torch.save({f'{part}.{name}': p.grad for part in ('model', 'disc')
                    for name, p in getattr(trainer, part).named_parameters()}, out)


def nan(out, options):
    """Four steps: one run whose noise is infinite at step 2 in the last process only, and one that has no step 2.
    Each process saves what it has of both."""
    trainer, image, y = make(options)
    place, draw, states = trainer.place, train.draw, []

    def bad_draw(config, classes, step, labels, place):
        noise, labels = draw(config, classes, step, labels, place)
        return noise * (float('inf') if step == 2 and place.rank == place.world - 1 else 1), labels
    train.draw = bad_draw
    for leave_out in (False, True):
        trainer, image, y = make(options, place)
        for step in range(4):
            if step == 2 and leave_out:
                trainer.step += 1
                weight = 1 - train.ema_decay(trainer.config, step)
                torch._foreach_lerp_(list(trainer.ema.parameters()), list(trainer.model.parameters()), weight)
            else:
                trainer.train_step(image, y, lr=1e-3)
        states.append(trainer.state())
    torch.save(states, f'{out}.{place.rank}')


if __name__ == '__main__':
    {'grads': grads, 'nan': nan}[sys.argv[1]](sys.argv[2], sys.argv[3:])
