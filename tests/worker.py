"""What test_processes.py runs in one process, and in two by  torchrun ... worker.py FOLDER

FOLDER/jobs.json is a table: name -> [function below, options of train.py]. Each process saves what
it gets as FOLDER/NAME.RANK. One start for all jobs, as starting takes longer than any of them.
"""
import json
import os
import sys

import torch

import conftest  # noqa: F401, puts the project on the path
from data import batches, open_data, parse_options
from model import PRESETS, Config, find_process
import train


def make(options, process):
    """A trainer whose weights are far from their initial zeros, and its share of the first
    batch."""
    config = parse_options(Config, options, '', PRESETS)
    process.compile = bool(config.compile)
    trainer = train.Trainer(config, 10, process)
    g = torch.Generator().manual_seed(0)
    for p in trainer.model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=g)
    image, y, _ = next(batches(open_data('shapes'), config.image_size, config.batch_size, 0, False,
                               0, 1, process.rank, process.world))
    return trainer, image, y


def gradients(options, process=None):
    """-> those of one step by name, before clipping"""
    trainer, image, y = make(options, process or find_process('cpu'))
    trainer.update = lambda terms, lr: None
    trainer.train_step(image, y, lr=1e-3)
    parts = {'model': trainer.model, 'disc': getattr(trainer, 'disc', torch.nn.Module())}
    return {f'{part}.{name}': p.grad
            for part in parts for name, p in parts[part].named_parameters()}


def skip(options, process):
    """Four steps of two runs: in one, the noise is infinite at step 2 in the last process only; the
    other has no step 2. -> what the trainer has after each"""
    draw, states = train.draw_noise, []

    def bad_draw(config, classes, step, labels, process):
        noise, labels = draw(config, classes, step, labels, process)
        last = process.rank == process.world - 1
        return noise * (float('inf') if step == 2 and last else 1), labels
    train.draw_noise = bad_draw
    for leave_out in (False, True):
        trainer, image, y = make(options, process)
        for step in range(4):
            if step == 2 and leave_out:
                trainer.step += 1
                weight = 1 - train.ema_decay(trainer.config, step)
                ema, model = trainer.ema.parameters(), trainer.model.parameters()
                torch._foreach_lerp_(list(ema), list(model), weight)
            else:
                trainer.train_step(image, y, lr=1e-3)
        states.append(trainer.state())
    train.draw_noise = draw
    return states


if __name__ == '__main__':
    folder, here = sys.argv[1], find_process('cpu')
    # As on a busy machine, where gloo's threads wait long for Python: see leave_processes
    sys.setswitchinterval(20)
    with open(os.path.join(folder, 'jobs.json')) as f:
        jobs = json.load(f)
    for job, (function, arguments) in jobs.items():
        result = {'gradients': gradients, 'skip': skip}[function](arguments, here)
        torch.save(result, f'{folder}/{job}.{here.rank}')
