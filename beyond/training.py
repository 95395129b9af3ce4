"""What train_lookahead.py can train beyond the embeddings: the memory and the head of lookahead.py.

Importing this adds both to the script's options. Then the acceptance at the end is measured for
several candidates per place, since a tree needs that (tree.py).
"""
import math
from argparse import Namespace

import torch
from torch import Generator, Tensor

from beyond.tree import cover
from model import Cache, Llama
from pass_sampler import Params
from support.data import TEXT, windows
from train_lookahead import PARTS, Part

RANKS = 5  # candidates for one place, of which the acceptance is measured


def initial_parts(model: Llama, tokens: Tensor, args: Namespace, generator: Generator
                  ) -> dict[str, Tensor]:
    """A memory that is a piece of text, and a head that corrects nothing yet; or neither."""
    device = model.embedding.device
    parts = {}
    if args.memory:
        text = windows(tokens, 1, args.memory, generator)
        parts["memory"] = initial_memory(model, text.to(device))
    if args.head:
        D = model.config.dim
        head_in = torch.randn(args.head, 2 * D, generator=generator) / math.sqrt(2 * D)
        parts["head_in"] = head_in.to(device)
        parts["head_out"] = torch.zeros(D, args.head, device=device)
    return parts


def initial_memory(model: Llama, text: Tensor) -> Tensor:
    """(layers,2,R,K,E): keys and values of text (1,R), not rotated: all stand at position 0."""
    cache = Cache(model, 1, text.shape[1])
    model(text, cache, torch.zeros_like(text))
    return cache.kv[:, :, 0].transpose(2, 3).float().contiguous()


def accepted_of_several(p: Tensor, logits: Tensor, params: Params, generator: Generator) -> Tensor:
    """(N,RANKS): see `cover`."""
    return cover(p, logits, params, generator, RANKS)


PARTS.append(Part(
    {"memory": dict(type=int, help="memory slots R (default: 0)"),
     "head": dict(type=int, help="rank of the draft head (default: 0, none)")},
    {"memory": (0, TEXT), "head": (0, 2**14)}, initial_parts,
    {"memory": 0.02, "head_in": 0.003, "head_out": 0.003}, accepted_of_several))
