"""CUDA graphs: a step is recorded once, and replayed without running its Python again."""
import time
from collections.abc import Callable

import torch


class Replay:
    """Calls a function without arguments; a GPU records it at the second call, and replays it.

    What is recorded has fixed shapes, does not wait for the device, and writes in place what
    outlives it. The first call runs it plainly: only after that can it be recorded.
    """

    def __init__(self, records: bool):
        self.records = records
        self.graph = None
        self.result = None  # of the last call; a replay writes it anew
        self.capture_seconds = 0.0

    def __call__(self, function: Callable) -> object:
        if self.records and self.result is not None and self.graph is None:
            start = time.perf_counter()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # This records, and runs nothing.
                self.result = function()
            self.graph = graph
            self.capture_seconds = time.perf_counter() - start
        if self.graph is None:
            self.result = function()
        else:
            self.graph.replay()
        return self.result
