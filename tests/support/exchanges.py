"""Several processes in one: graphs are made for each in turn, and run side by side in threads that exchange rows."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import fx
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_group(rank, world):
    """Inside, this process is one of `world`, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Process(fx.Interpreter):
    """Runs a graph; rows for others are handed over in `sent`, a list of what each sends."""

    def __init__(self, gm, rank, sent, barrier):
        super().__init__(gm)
        self.rank, self.sent, self.barrier = rank, sent, barrier

    def call_function(self, target, args, kwargs):
        if "wait_tensor" in str(target):
            return args[0]
        if "all_to_all_single" not in str(target):
            return super().call_function(target, args, kwargs)
        self.sent[self.rank] = args[0].split(args[2])
        self.barrier.wait()
        heard = torch.cat([rows[self.rank] for rows in self.sent])
        self.barrier.wait()
        return heard


def run_together(graphs):
    """First outputs of graphs [(graph module, inputs)], one a process."""
    sent, barrier = [None] * len(graphs), threading.Barrier(len(graphs), timeout=60)

    def run(rank):
        gm, inputs = graphs[rank]
        with torch.no_grad():
            return _Process(gm, rank, sent, barrier).run(*inputs)[0]

    with ThreadPoolExecutor(len(graphs)) as pool:
        return list(pool.map(run, range(len(graphs))))
