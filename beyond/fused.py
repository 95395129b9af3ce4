"""PaSS in one pass per step: the pass that judges the drafts also runs the look-ahead of the next.

The look-ahead tokens never see the token that they stand for, so they need not wait until it is
drawn. They must only stand after the last accepted draft, and which one that will be is not known
yet. So a group of L look-ahead tokens stands after x and after every draft (the layout of arXiv
2507.11851), and the group of the last accepted one makes the next drafts:

    [ x  d_1  d_2 | LA_1 LA_2 | LA_1 LA_2 | LA_1 LA_2 ]     L = 2: (1+L)^2 columns
      p   p    p    after x     after d_1   after d_2

A step gives 1 to L+1 tokens for one pass; `pass` gives 2 to L+2 for two. It is exact for the reason
that `verify` gives: p is the model's, q is what the drafts were drawn from, whatever that was.

    python pass_sampler.py --model DIR --lookahead FILE --method fused --length 1

Few columns are cheap, 16 or more only on a GPU: on a CPU try --length 1. Read tree.py next.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from beyond.lookahead import block_mask
from model import Cache, Llama
from pass_sampler import (
    LOOKAHEAD_FLAGS,
    Lookahead,
    Made,
    Sampler,
    Step,
    lookahead_options,
    verify,
)
from support.methods import Method


class Layout:
    """The block [ nodes 0 .. N | group of node 0 | .. | group of node N ]. Node 0 is x, the others
    are drafts; a group is L look-ahead tokens.

    offset (columns,): positions after x's. pattern: as `Cache.mask` takes it. A node sees the path
    to it, and itself. A group sees what its node sees, and itself, causally.
    """

    def __init__(self, paths: list[list[int]], lookahead: Lookahead):
        """paths: per node, the nodes from x to it; the last may repeat."""
        n = len(paths)
        L = len(lookahead.embeddings)
        device = lookahead.embeddings.device
        self.nodes = n
        self.groups = lookahead.embeddings.repeat(n, 1)
        offset = [len(set(path)) - 1 for path in paths]
        visible = torch.zeros(n + n * L, n + n * L, dtype=torch.bool)
        for i, path in enumerate(paths):
            visible[i, path] = True
            for j in range(L):
                column = n + i * L + j
                visible[column, path] = True
                visible[column, n + i * L:column + 1] = True
                offset.append(offset[i] + 1 + j)
        self.offset = torch.tensor(offset, device=device)
        pattern = F.pad(visible, (1, 0), value=True)  # what is committed
        self.pattern = F.pad(pattern, (0, 1), value=False).to(device)  # what is not used yet
        self.first_group = torch.arange(n, n + L, device=device)  # columns of node 0's group

    def run(self, model: Llama, tokens: Tensor, cache: Cache) -> Tensor:
        """Run the block with these tokens (B,1+N) as nodes: states (B,columns,D)."""
        groups = self.groups.expand(len(tokens), -1, -1)
        x = torch.cat([model.embed(tokens), groups], 1)
        positions = cache.length[:, None] + self.offset
        mask = block_mask(cache, self.nodes, x.shape[1], self.pattern)
        return model(x, cache, positions, mask)


class Group:
    """What a step leaves to the next: states and logits of the L columns of one group.

    They are 0 before the first step. Its drafts come from a q that knows nothing; it stays exact.
    """

    def __init__(self, s: Sampler, layout: Layout):
        dtype = s.model.embedding.dtype
        L = len(layout.first_group)
        # (rows,L): where the group of node 0 of each row stands, in a batch of such blocks.
        begins = len(layout.offset) * torch.arange(s.rows, device=s.x.device)
        self.first_groups = begins[:, None] + layout.first_group
        self.h = s.zeros(L, s.model.config.dim, dtype=dtype)
        self.logits = s.zeros(L, s.model.config.vocab_size, dtype=dtype)

    def keep(self, h: Tensor, logits: Tensor, node: Tensor) -> None:
        """Take the group of `node` (B,) out of the states and logits of a block."""
        L = self.first_groups.shape[1]
        columns = (self.first_groups + L * node[:, None]).flatten()  # (B*L,)
        torch.index_select(h.flatten(0, 1), 0, columns, out=self.h.flatten(0, 1))
        torch.index_select(logits.flatten(0, 1), 0, columns, out=self.logits.flatten(0, 1))


def fused(s: Sampler, lookahead: Lookahead) -> Step:
    """A step that judges the drafts and makes the next: 1 to L+1 tokens for one pass."""
    lookahead = lookahead.ready(s.model)
    L = len(lookahead.embeddings)
    chain = [list(range(1 + i)) for i in range(1 + L)]  # Draft i follows x and all drafts before.
    layout = Layout(chain, lookahead)
    cache = s.new_cache(s.model, len(layout.offset), lookahead.new_cache)
    group = Group(s, layout)

    def run(u):
        u_draft, u_verify = u.split([L, L + 1], 1)
        drafts, q = lookahead.draft(s.params, group.h, group.logits, s.x, u_draft)
        h = layout.run(s.model, torch.cat([s.x, drafts], 1), cache)
        logits = s.model.logits(h)
        p = s.target_probs(logits[:, :1 + L])
        accepted, last = verify(p, q, drafts, u_verify)
        cache.commit((1 + accepted) * s.alive)
        group.keep(h, logits, accepted)
        return Made(drafts, accepted, last)

    return Step(run, uniforms=2 * L + 1, drafts=L)


FUSED = Method(fused, LOOKAHEAD_FLAGS, lookahead_options)
