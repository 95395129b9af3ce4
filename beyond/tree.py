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

import torch

from beyond.fused import Group, layout
from beyond.lookahead import correction, shortlist
from files import InputError
from pass_sampler import Method, Params, Sampler, draw, ended_by, probs, residual


class Shape:
    """The nodes of a tree: 0 is x, the N drafts follow by depth. W: most candidates of a node.

    children (1+N,W): per node its drafts in order, 0 is none. depths (1+N,).
    path (1+N,1+depth): the nodes from x to each one, which then repeats.
    levels: per depth the nodes with children, those with most first; and per rank their children of
    that rank, which the first of them have.
    """

    def __init__(self, text, device):
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

        ranks = range(self.width)
        children = [[index.get(f"{name}{rank}", 0) for rank in ranks] for name in names]
        paths = [[index[name[:d]] for d in range(self.depth + 1)] for name in names]
        self.children = tensor(children)
        self.path = tensor(paths)
        self.depths = tensor([len(name) for name in names])
        self.levels = []
        for d in range(self.depth):
            parents = [i for i, name in enumerate(names) if len(name) == d and children[i][0]]
            parents.sort(key=lambda i: children[i].count(0))
            by_rank = []
            for rank in ranks:
                nodes = [children[i][rank] for i in parents if children[i][rank]]
                if nodes:
                    by_rank.append(tensor(nodes))
            self.levels.append((tensor(parents), by_rank))


def verify_tree(shape, p, q, tokens, u):
    """The rule, depth by depth: try the children of the node that was accepted last.

    p (B,1+N,V): the target after each node. tokens (B,1+N). q (B,1+N,V): what each draft was drawn
    from, given its siblings before it. u (B,1+N): u[:,i] to accept draft i, u[:,0] to draw last.
    Returns node (B,), the last draft accepted or 0, and the token (B,) that follows it.
    """
    rows = torch.arange(len(p), device=p.device)
    node = torch.zeros_like(rows)
    going = node == 0  # rows that have not ended at a rejection of all children
    rest = p[:, 0]
    for _ in range(shape.depth):
        next_node = node
        for rank in range(shape.width):
            child = shape.children[node, rank]
            tried = going & (child > 0) & (next_node == node)
            token = tokens[rows, child]
            q_child = q[rows, child]  # (B,V)
            q_draft = q_child[rows, token]
            accept = tried & (q_draft > 0) & (u[rows, child] * q_draft < rest[rows, token])
            rest = torch.where(tried[:, None], residual(rest, q_child), rest)
            next_node = torch.where(accept, child, next_node)
        going = next_node != node
        rest = torch.where(going[:, None], p[rows, next_node], rest)
        node = next_node
    return node, draw(rest, u[:, 0])


def grow(shape, s, lookahead, group, u):
    """Draw the drafts: tokens (B,1+N), x first, and their q (B,1+N,V). u (B,N).

    Column d of the group makes the children of all nodes at depth d; those of one node without
    replacement: draw, remove, draw again, each from what `probs` makes of the rest.
    """
    ids, best = shortlist(group.logits)  # (B,depth,C)
    tokens = s.x.repeat(1, 1 + shape.N)
    V = group.logits.shape[-1]
    wide = torch.promote_types(best.dtype, torch.float32)
    q = torch.zeros(*tokens.shape, V, dtype=wide, device=u.device)
    for d, (parents, by_rank) in enumerate(shape.levels):
        before = tokens[:, parents]
        z = best[:, d, None] + correction(lookahead, s.model, group.h[:, d], ids[:, d], before)
        z = z.expand(-1, len(parents), -1).clone()  # (B,P,C)
        for nodes in by_rank:
            rest = z[:, :len(nodes)]  # of their parents: a view
            q_node = probs(rest, s.params)
            k = draw(q_node, u[:, nodes - 1])  # (B,n)
            there = ids[:, d, None].expand_as(q_node)
            tokens[:, nodes] = there.gather(2, k[..., None])[..., 0]
            q[:, nodes] = q.new_zeros(len(q), len(nodes), V).scatter_(2, there, q_node)
            rest.scatter_(2, k[..., None], -math.inf)
    return tokens, q


def method(s, lookahead, tree="0 1 00"):
    """As `fused`, with the drafts of a tree in place of a chain: 1 to depth+1 tokens."""
    shape = Shape(tree, s.x.device)
    if shape.depth > len(lookahead.embeddings):
        raise InputError(f"tree {tree!r} is deeper than the {len(lookahead.embeddings)} look-ahead "
                         f"tokens")
    if shape.width > s.model.config.vocab_size:
        raise InputError(f"tree {tree!r} has more candidates than the model has tokens")
    N = shape.N
    L = shape.depth
    lookahead = lookahead.ready(s.model)
    lookahead.embeddings = lookahead.embeddings[:L]
    offset, visible = layout(shape.path.tolist(), L, s.x.device)
    cache = s.new_cache(s.model, len(offset), lookahead.memory)
    group = Group(s, L)

    def step(u):
        tokens, q = grow(shape, s, lookahead, group, u[:, :N])
        positions = cache.length[:, None] + offset
        h = lookahead.forward(s.model, tokens, cache, positions, visible)
        logits = s.model.logits(h)
        p = s.probs(logits[:, :1 + N])
        node, last = verify_tree(shape, p, q, tokens, u[:, N:])
        path, accepted = shape.path[node], shape.depths[node]
        cache.commit((1 + accepted) * s.alive, path)
        group.keep(h, logits, 1 + N, node)
        return ended_by(last, tokens.gather(1, path[:, 1:]), accepted), 1 + accepted

    return Method(step, uniforms=2 * N + 1, drafts=L)


# ------------------------------------------ choosing a tree

MARGIN = 1.05  # what a tree must promise over plain decoding
COLUMNS = (4, 6, 9, 12, 16, 24, 32, 48, 64)  # sizes of the blocks that `choose` tries


def cover(p, logits, params, generator, ranks):
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


def best_tree(by_rank, depth, columns):
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


def best_of(by_rank, columns):
    """`best_tree` of the depth that is best in so many columns."""
    trees = [best_tree(by_rank, depth, columns) for depth in range(1, 1 + len(by_rank))]
    return max(trees, key=lambda tree: tree[1])


def table_for(lookahead, temperature):
    """by_rank of the look-ahead's file, at the nearest temperature; a guess where there is none."""
    known = lookahead.acceptance
    if not known:
        return [[0.2], [0.08]][:len(lookahead.embeddings)]
    nearest = min(known, key=lambda t: abs(t - temperature))
    return known[nearest]["by_rank"][:len(lookahead.embeddings)]


@torch.inference_mode()
def choose(model, lookahead, temperature, rows=1, graph=True):
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
