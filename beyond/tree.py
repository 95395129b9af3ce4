"""Several candidates for one position: a tree of drafts, judged in one pass (after SpecInfer, arXiv
2305.09781; the rule is that of arXiv 2402.14160 and 2401.06706).

    python pass_sampler.py --model DIR --lookahead FILE --method tree --tree "0 1 00"

A tree is written as paths of ranks, a digit each: "0" and "1" are the first and the second
candidate for the next token, "00" the first one for the token after "0". The block is that of
fused.py with these nodes in place of a chain. `choose` finds a tree for a machine.

Why it is exact: candidates for one position are tried one after the other. Each is accepted with
probability min(1, p/q); a rejection leaves p <- norm(max(0, p - q)). What comes out of one trial
follows the p that it was given (`verify`), so what comes out of all of them does.
"""
import math
import statistics
import sys
import time
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from beyond.fused import Group, Layout
from beyond.lookahead import Candidates
from model import Llama
from pass_sampler import (
    LOOKAHEAD_FLAGS,
    Lookahead,
    Made,
    Params,
    Sampler,
    Step,
    draw,
    lookahead_options,
    probs,
    residual,
)
from support.errors import InputError
from support.methods import Method


class Shape:
    """The nodes of a tree: 0 is x, the N drafts follow by depth.

    path (1+N,1+depth): per node, the nodes from x to it; the node itself fills up the row.
    depths (1+N,).
    levels: a Level per depth of parents.
    """

    def __init__(self, text: str, device: torch.device):
        names = ["", *sorted(text.split(), key=lambda path: (len(path), path))]
        for name in names[1:]:
            before = name[:-1] + chr(ord(name[-1]) - 1)
            digits = name.isdecimal() and name.isascii()
            if not digits or name[:-1] not in names or name[-1] > "0" and before not in names:
                raise InputError(f"tree {text!r}: {name!r} must be digits, and stand with its "
                                 f"parent and the candidates before it")
        if len(names) == 1 or len(set(names)) < len(names):
            raise InputError(f"tree {text!r}: give paths such as \"0 1 00\", each of them once")
        index = {name: i for i, name in enumerate(names)}
        self.N = len(names) - 1
        self.depth = len(names[-1])
        self.width = 1 + max(int(name[-1]) for name in names[1:])

        def tensor(values):
            return torch.tensor(values, device=device)

        def children(node):
            ranks = [f"{names[node]}{rank}" for rank in range(self.width)]
            return [index[name] for name in ranks if name in index]

        paths = [[index[name[:d]] for d in range(self.depth + 1)] for name in names]
        self.path = tensor(paths)
        self.depths = tensor([len(name) for name in names])
        self.levels = []
        for d in range(self.depth):
            parents = [i for i, name in enumerate(names) if len(name) == d and children(i)]
            parents.sort(key=lambda i: -len(children(i)))
            by_rank = []
            child = []
            for rank in range(len(children(parents[0]))):
                some = [i for i in parents if len(children(i)) > rank]
                by_rank.append(tensor([children(i)[rank] for i in some]))
                child.append(torch.zeros(len(names), dtype=torch.long, device=device))
                child[rank][some] = by_rank[rank]
            draws = [nodes - 1 for nodes in by_rank]  # x is node 0, and not drawn
            self.levels.append(Level(tensor(parents), by_rank, child, draws))


class Level(NamedTuple):
    """The parents at one depth of a tree, and their children."""
    parents: Tensor  # nodes, those with most children first
    by_rank: list[Tensor]  # per rank, the children that the first of the parents have
    child: list[Tensor]  # per rank (1+N,): the child of each node; 0 where a node has none here
    draws: list[Tensor]  # per rank, which of the uniforms draws each of by_rank


def verify_tree(shape: Shape, p: Tensor, q: Tensor, tokens: Tensor, u: Tensor
                ) -> tuple[Tensor, Tensor]:
    """The rule, depth by depth: try the children of the node that was accepted last.

    p (B,1+N,V): the target after each node. tokens (B,1+N). q (B,1+N,V): what each draft was drawn
    from, given its siblings before it. u (B,1+N): u[:,i] to accept draft i, u[:,0] to draw last.
    Returns node (B,), the last draft accepted or 0, and the token (B,) that follows it.
    """
    rows = torch.arange(len(p), device=p.device)
    q_draft = q.gather(2, tokens[..., None])[..., 0]  # (B,1+N)
    # A draft is accepted while u q < p. What has q = 0 is no draft, x too.
    u_q = (u * q_draft).masked_fill(q_draft == 0, math.inf)
    node = torch.zeros_like(rows)
    rest = p[:, 0]
    for level in shape.levels:
        parent = node
        for child_of in level.child:
            child = child_of[parent]  # (B,); 0 where there is none, whose q is 0
            p_draft = rest[rows, tokens[rows, child]]
            accept = (node == parent) & (u_q[rows, child] < p_draft)
            rest = residual(rest, q[rows, child])
            node = torch.where(accept, child, node)
        # Where a child was accepted, what is left of p no longer matters.
        rest = torch.where((node == parent)[:, None], rest, p[rows, node])
    return node, draw(rest, u[:, 0])


def grow(shape: Shape, s: Sampler, lookahead: Lookahead, group: Group, u: Tensor
         ) -> tuple[Tensor, Tensor]:
    """Draw the drafts: tokens (B,1+N), x first, and their q (B,1+N,V). u (B,N).

    Column d of the group makes the children of all nodes at depth d; those of one node without
    replacement: draw, remove, draw again, each from what `probs` makes of the rest.
    """
    candidates = Candidates(lookahead, group.h, group.logits)
    tokens = s.x.repeat(1, 1 + shape.N)
    q = candidates.no_probs(1 + shape.N)
    for d, level in enumerate(shape.levels):
        z = candidates.logits(d, tokens[:, level.parents])  # (B,P,C)
        choice = None
        for rank, nodes in enumerate(level.by_rank):
            if choice is not None:  # Without replacement: what was drawn is gone.
                z = z.scatter(2, choice, -math.inf)[:, :len(nodes)]
            q_node = probs(z, s.params)  # (B,n,C), of the first n parents
            choice = draw(q_node, u[:, level.draws[rank]])[..., None]
            ids = candidates.ids[:, d, None].expand_as(q_node)
            tokens[:, nodes] = ids.gather(2, choice)[..., 0]
            nothing = q.new_zeros(len(q), len(nodes), q.shape[2])
            q[:, nodes] = nothing.scatter_(2, ids, q_node)
    return tokens, q


def tree_of_drafts(s: Sampler, lookahead: Lookahead, tree: str = "0 1 00") -> Step:
    """As `fused`, with the drafts of a tree in place of a chain: 1 to depth+1 tokens."""
    shape = Shape(tree, s.x.device)
    if shape.depth > len(lookahead.embeddings):
        raise InputError(f"tree {tree!r} is deeper than the {len(lookahead.embeddings)} look-ahead "
                         f"tokens")
    if shape.width > s.model.config.vocab_size:
        raise InputError(f"tree {tree!r} has more candidates than the model has tokens")
    N = shape.N
    lookahead = lookahead.ready(s.model)
    lookahead.embeddings = lookahead.embeddings[:shape.depth]
    layout = Layout(shape.path.tolist(), lookahead)
    cache = s.new_cache(s.model, len(layout.offset), lookahead.new_cache)
    group = Group(s, layout)

    def run(u):
        u_draft, u_verify = u.split([N, 1 + N], 1)
        tokens, q = grow(shape, s, lookahead, group, u_draft)
        h = layout.run(s.model, tokens, cache)
        logits = s.model.logits(h)
        p = s.target_probs(logits[:, :1 + N])
        node, last = verify_tree(shape, p, q, tokens, u_verify)
        path, accepted = shape.path[node], shape.depths[node]
        cache.commit((1 + accepted) * s.alive, path)
        group.keep(h, logits, node)
        return Made(tokens.gather(1, path[:, 1:]), accepted, last)

    return Step(run, uniforms=2 * N + 1, drafts=shape.depth)


FLAGS = {**LOOKAHEAD_FLAGS, "tree": dict(help='paths of ranks, such as "0 1 00"')}
TREE = Method(tree_of_drafts, FLAGS, lookahead_options, shape="tree")


# ------------------------------------------ choosing a tree

MARGIN = 1.05  # what a tree must promise over plain decoding
COLUMNS = (4, 6, 9, 12, 16, 24, 32, 48, 64)  # sizes of the blocks that `choose` tries


def cover(p: Tensor, logits: Tensor, params: Params, generator: Generator, ranks: int) -> Tensor:
    """(N,ranks): the probability that one of k drafts for a place is accepted, k = 1 .. ranks, if
    they are drawn from q without replacement, as `grow` does, but from all tokens and not from a
    shortlist. That one is accepted is summed exactly; which token was refused is drawn, from
    residual(q, p)."""
    refused = torch.ones(len(p), device=p.device)
    accepted = []
    for _ in range(min(ranks, p.shape[1])):
        q = probs(logits, params)
        refused = refused * (1 - torch.minimum(p, q).sum(1))
        accepted.append(1 - refused)
        u = torch.rand(len(p), dtype=torch.float64, generator=generator, device=p.device)
        logits = logits.scatter(1, draw(residual(q, p), u)[:, None], -math.inf)
        p = residual(p, q)
    return torch.stack(accepted, 1)


def best_tree(by_rank: list[list[float]], depth: int, columns: int) -> tuple[list[str], float]:
    """The tree of this depth, in so many columns, that should accept most; and its tokens per step.

    by_rank [position][k]: the probability that one of the first k+1 candidates is accepted there. A
    draft is worth the product, down its path, of what its rank adds: take the best, and again.
    """
    adds = [[b - a for a, b in zip([0, *ranks], ranks[:10])] for ranks in by_rank[:depth]]

    def worth(path):
        return math.prod(adds[d][int(rank)] for d, rank in enumerate(path))

    paths = []
    reachable = ["0"]
    while reachable and (2 + len(paths)) * (1 + depth) <= columns:
        path = max(reachable, key=worth)
        reachable.remove(path)
        paths.append(path)
        rank = int(path[-1]) + 1
        if len(path) < depth:
            reachable.append(path + "0")
        if rank < len(adds[len(path) - 1]):
            reachable.append(f"{path[:-1]}{rank}")
    return paths, 1 + sum(map(worth, paths))


def best_of(by_rank: list[list[float]], columns: int) -> tuple[list[str], float]:
    """`best_tree` of the depth that is best in so many columns."""
    trees = [best_tree(by_rank, depth, columns) for depth in range(1, 1 + len(by_rank))]
    return max(trees, key=lambda tree: tree[1])


def table_for(lookahead: Lookahead, temperature: float) -> list[list[float]]:
    """by_rank of the look-ahead's file, at the nearest temperature; a guess where there is none."""
    known = lookahead.acceptance
    if not known:
        return [[0.2], [0.08]][:len(lookahead.embeddings)]
    nearest = min(known, key=lambda t: abs(t - temperature))
    return known[nearest]["by_rank"][:len(lookahead.embeddings)]


@torch.inference_mode()
def choose(model: Llama, lookahead: Lookahead, temperature: float, rows: int = 1,
           graph: bool = True) -> str | None:
    """The tree with the most expected tokens per second here, or None where plain decoding is
    faster. Times five steps of each, and says on stderr what it found."""
    by_rank = table_for(lookahead, temperature)
    expected = {None: 1.0}
    for columns in COLUMNS:
        paths, tokens = best_of(by_rank, columns)
        expected[" ".join(paths)] = tokens
    params = Params(temperature)
    samplers = {}
    seconds = {name: [] for name in expected}
    for name in expected:
        words = {"lookahead": lookahead, "tree": name} if name else {}
        method = "tree" if name else "autoregressive"
        samplers[name] = Sampler(model, method, params, rows, 160, graph, **words)
        samplers[name].generate([[0]] * rows, 8, stop_tokens=())
    for _ in range(5):
        for name, sampler in samplers.items():
            start = time.perf_counter()
            sampler.next_step().tolist()
            seconds[name].append(time.perf_counter() - start)
    rate = {name: expected[name] / statistics.median(seconds[name]) for name in expected}
    plain = rate.pop(None)
    best = max(rate, key=rate.get)
    pays = rate[best] > MARGIN * plain
    print(f"tree {best}: {rate[best] / plain:.2f} times as fast as plain decoding, by its file and "
          f"by times here: {'taken' if pays else 'not taken'}", file=sys.stderr)
    return best if pays else None
