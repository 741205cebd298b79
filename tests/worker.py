"""What test_train.py runs in one or more processes:  [torchrun ...] worker.py grads|nan OUT [options of train.py]"""
import sys

import torch

import conftest  # noqa: F401, puts the project on the path
from data import batches, open_data
from model import PRESETS, Config, find_place, parse_options
import train


def make(options):
    """A trainer whose weights are far from their initial zeros, and its share of the first batch."""
    config = parse_options(Config, options, '', PRESETS)
    place = find_place('cpu', '', config.compile)
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
    """Noise is infinite in the last process only, from step 1 on. Before and after are each process's weights."""
    trainer, image, y = make(options)
    rank, draw = trainer.place.rank, train.draw

    def bad_draw(config, classes, step, labels, place):
        noise, labels = draw(config, classes, step, labels, place)
        return noise * (float('inf') if step and rank == place.world - 1 else 1), labels
    train.draw = bad_draw
    weights = lambda: [p.detach().clone() for p in [*trainer.model.parameters(), *trainer.ema.parameters()]]
    trainer.train_step(image, y, lr=1e-3)
    before = weights()
    for _ in range(2):
        trainer.train_step(image, y, lr=1e-3)
    torch.save((before, weights()), f'{out}.{rank}')
    trainer.require_finite()


if __name__ == '__main__':
    {'grads': grads, 'nan': nan}[sys.argv[1]](sys.argv[2], sys.argv[3:])
