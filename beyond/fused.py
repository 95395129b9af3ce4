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

from pass_sampler import Method, ended_by, verify


def layout(paths, L, device):
    """The block [ nodes 0 .. N | group of node 0 | .. | group of node N ]; node 0 is x.

    paths: per node, the nodes from x to it; the last may repeat.
    Returns offset (columns,), positions after x's, and visible (columns,columns): a node sees the
    path to it and itself; a group sees what its node sees, and itself, causally.
    """
    n = len(paths)
    offset = [len(set(path)) - 1 for path in paths]
    visible = torch.zeros(n + n * L, n + n * L, dtype=torch.bool)
    for i, path in enumerate(paths):
        visible[i, path] = True
        for j in range(L):
            column = n + i * L + j
            visible[column, path] = True
            visible[column, n + i * L:column + 1] = True
            offset.append(offset[i] + 1 + j)
    return torch.tensor(offset, device=device), visible.to(device)


class Group:
    """What a step leaves to the next: states and logits of L look-ahead columns.

    They are 0 before the first step. Its drafts come from a q that knows nothing; it stays exact.
    """

    def __init__(self, s, L):
        like = s.model.embedding.dtype
        self.h = s.zeros(L, s.model.config.dim, dtype=like)
        self.logits = s.zeros(L, s.model.config.vocab_size, dtype=like)

    def keep(self, h, logits, nodes, node):
        """Take the group of `node` (B,) out of a block that begins with so many nodes."""
        L = self.h.shape[1]
        columns = nodes + node[:, None] * L + torch.arange(L, device=node.device)
        rows = torch.arange(len(node), device=node.device)[:, None]
        self.h.copy_(h[rows, columns])
        self.logits.copy_(logits[rows, columns])


def method(s, lookahead):
    """A step that judges the drafts and makes the next: 1 to L+1 tokens for one pass."""
    lookahead = lookahead.ready(s.model)
    L = len(lookahead.embeddings)
    chain = [range(1 + i) for i in range(1 + L)]  # draft i follows x and all drafts before it
    offset, visible = layout(chain, L, s.x.device)
    cache = s.new_cache(s.model, len(offset), lookahead.memory)
    group = Group(s, L)

    def step(u):
        drafts, q = lookahead.draft(s.model, s.params, group.h, group.logits, s.x, u[:, :L])
        positions = cache.length[:, None] + offset
        block = torch.cat([s.x, drafts], 1)
        h = lookahead.forward(s.model, block, cache, positions, visible)
        logits = s.model.logits(h)
        p = s.probs(logits[:, :1 + L])
        accepted, last = verify(p, q, drafts, u[:, L:])
        cache.commit((1 + accepted) * s.alive)
        group.keep(h, logits, 1 + L, accepted)
        return ended_by(last, drafts, accepted), 1 + accepted

    return Method(step, uniforms=2 * L + 1, drafts=L)
