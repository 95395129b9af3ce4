"""PaSS, parallel speculative sampling (Monea, Joulin, Grave 2023, arXiv 2311.13581), top to bottom.

    python pass_sampler.py --model demo/model --lookahead demo/model/lookahead.safetensors --compare pass fused

In equations p is the target's next-token distribution (the model's own) and q the draft's; x_1..x_n is the text so far.
Shapes: B batch rows, T block columns, V vocabulary, L look-ahead tokens, D width, N drafts of a tree, P parents at a depth, W
candidates, C shortlisted tokens, r rank of the head; R, K, E as in model.py.
Read `probs`, `draw`, `verify` (the rule that makes drafts harmless), then the loops `autoregressive` and `parallel`: that is the
paper. What goes beyond it: `verify_tree`, `without_replacement`, `Tree`, `draft_tree`, `fused`, `choose_tree`.
Start with model.py, where block, cache and commit are explained.
"""
import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from model import DTYPES, Cache, InputError, Llama, device_named, load_tokenizer, open_tensors, rms_norm, run_script

# ------------------------------------------------------------------------------------- distributions and the rejection rule


@dataclass(frozen=True)
class Params:
    """Sampling parameters. temperature 0 is greedy; top_k 0 and top_p 1 are off.

    A further one goes last, with a default that is off: here, in `probs`, in `main`, and in `probs` of tests/naive.py; then into
    SETTINGS of tests/test_exact.py, as a tuple, and into PARAMS and SETTINGS of tests/test_samplers.py. `make test` says if a
    planted bug of tests/mutants.py no longer fits `probs`.
    """
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top-k must be 0 (off) or a positive number of tokens, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must be above 0 and at most 1 (off), not {self.top_p}")


def probs(logits, params):
    """Logits (...,V) -> probabilities (...,V) in float32 (float64 for float64). The same function makes p and q.

    In this order: temperature; top-k, the tokens at least as likely as the k-th; top-p, the fewest most likely tokens that
    together reach top_p (arXiv 1904.09751), the one that crosses it included. Tokens that tie with the last one kept are kept.
    Temperature 0 is the one-hot distribution, so greedy decoding needs no code of its own anywhere.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if params.temperature == 0:
        best, token = logits.max(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, token, best - best + 1)  # 1, but NaN where the best logit is NaN or infinite
    logits = (logits - logits.amax(-1, keepdim=True)) / max(params.temperature, 1e-30)  # maximum 0: no overflow
    if 0 < params.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[..., -1:], -math.inf)
    p = logits.softmax(-1)
    if params.top_p < 1:
        falling = p.sort(-1, descending=True).values
        before = falling.cumsum(-1) - falling  # probability of all more likely tokens
        least = falling.masked_fill(before >= params.top_p, 1).amin(-1, keepdim=True)
        p = p.masked_fill(p < least, 0)
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(p, u):
    """Inverse CDF: weights p (...,V), not necessarily normalised, and uniforms u (...) in [0, 1) -> tokens (...).

    Takes the first token whose cumulative weight exceeds u times the total, so never one of weight 0. Where a weight is NaN it
    returns V, which is no token: `Run.emit` makes an error of it.
    """
    cdf = p.double().cumsum(-1)
    return torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True)[..., 0]


def verify(p, q, drafts, u):
    """The rejection rule of speculative sampling (Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).

    p (B,L+1,V): the target after 0 .. L drafts.  q (B,L,V): what the drafts (B,L) were drawn from.  u (B,L+1): independent
    uniforms in [0, 1); they are arguments, and the rule a pure function, so that a test can integrate over them exactly.
    Returns accepted (B,), how many drafts to keep, and the token (B,) that follows them.

    Accept draft d while u < p(d)/q(d); at the first rejection draw from norm(max(0, p - q)); after L acceptances draw from p.
    Why the output follows p, for one position: token x comes out as an accepted draft with probability
    q(x) min(1, p(x)/q(x)) = min(p(x), q(x)). A rejection has probability 1 - sum_y min(p(y), q(y)) = sum_y max(0, p(y) - q(y)),
    which is just what the residual is divided by, so x comes out after one with probability max(0, p(x) - q(x)).
    The sum is p(x), whatever q is. A bad q costs time, never truth.
    """
    p_draft = p[:, :-1].gather(-1, drafts[..., None])[..., 0]
    q_draft = q.gather(-1, drafts[..., None])[..., 0]
    accept = u[:, :-1] * q_draft < p_draft
    accepted = accept.long().cumprod(1).sum(1)  # those before the first rejection
    rows = torch.arange(len(p), device=p.device)
    p, q = p[rows, accepted], F.pad(q, (0, 0, 0, 1))[rows, accepted]  # q = 0 after the last draft: the residual is p itself
    return accepted, draw(residual(p, q), u[:, -1])


def residual(p, q):
    """norm(max(0, p - q)), (...,V): what a rejected draft from q leaves to be drawn of p."""
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    # p and q can be equal up to rounding; then a "rejection" is rounding too, and p is as right as the empty residual.
    return torch.where(total > 0, rest / total, p)


def verify_tree(parent, p, q, tokens, u):
    """The rule of `verify` for a tree of N drafts, several of which may stand for the same position (Jeon et al. 2024, arXiv
    2402.14160; Yang et al. 2024, arXiv 2401.06706).

    parent: per draft 1 .. N the node it follows, 0 being the root; siblings stand in the order in which they were drawn, and
    parents before children.  p (B,1+N,V): the target after each node.  tokens (B,1+N).  q (B,1+N,V): what each draft was drawn
    from, given its siblings before it; zero where there was nothing left to draw.  u (B,1+N): u[:,i] to accept draft i.
    Column 0 is the root: its q is not used, its u makes the last draw.
    Returns node (B,), the last draft accepted or 0 for none, and the token (B,) that follows it.

    One draft after the other, each is accepted with min(1, p/q) for what its siblings left of p, and on rejection
    p <- norm(max(0, p - q)). What comes out of one such trial follows the p that it was given, whatever q is (`verify`), so what
    comes out of all of them follows p. With one child a node, this is `verify`.
    """
    rows = torch.arange(len(p), device=p.device)
    node, rest = torch.zeros_like(rows), p[:, 0]
    for i, above in enumerate(parent, 1):
        tried = node == above  # not where a sibling was accepted, nor in branches that have been left
        q_draft = q[rows, i, tokens[:, i]]
        accept = tried & (q_draft > 0) & (u[:, i] * q_draft < rest[rows, tokens[:, i]])
        rest = torch.where(tried[:, None], residual(rest, q[:, i]), rest)
        rest, node = torch.where(accept[:, None], p[:, i], rest), torch.where(accept, i, node)
    return node, draw(rest, u[:, 0])


def without_replacement(q, k, generator):
    """Draw k tokens, one after the other, from q (...,V) without replacement.

    The k largest of q / Exp(1), in order, are just that: an exponential race, in which token x arrives at a time Exp(1) / q(x).
    Returns tokens (...,k), and what each was drawn from, (...,k,V): q without the tokens before it, renormalised; 0 where q has
    no more tokens.
    """
    arrival = torch.empty(q.shape, dtype=torch.float64, device=q.device).exponential_(generator=generator)
    tokens = (q / arrival).topk(k).indices
    left = q.unsqueeze(-2).repeat(*[1] * (q.ndim - 1), k, 1)
    for i in range(1, k):
        left[..., i:, :].scatter_(-1, tokens[..., i - 1, None, None].expand(*tokens.shape[:-1], k - i, 1), 0)
    total = left.sum(-1, keepdim=True)
    return tokens, torch.where(total > 0, left / total, 0)


# ---------------------------------------------------------------------------------------------------------------- look-ahead

@dataclass(eq=False)
class Lookahead:
    """All that is trained; the model is frozen. The paper's method is `embeddings` alone, the rest is optional.

    embeddings (L,D): what stands in the look-ahead columns.
    memory (layers,2,R,K,E): keys (as they enter attention, not rotated) and values that only look-ahead columns see.
    head_in (r,2D), head_out (D,r): the draft head. A look-ahead column does not know the token before the one it predicts, but when
    its draft is drawn that token is known. Its embedding e corrects the column's state h to h + head_out @ features(h, e).
    """
    embeddings: torch.Tensor
    memory: torch.Tensor | None = None
    head_in: torch.Tensor | None = None
    head_out: torch.Tensor | None = None
    folded: torch.Tensor | None = None  # made by `fit`
    acceptance: dict = field(default_factory=dict)  # of train_lookahead.evaluate, from the file

    def features(self, h, e):
        """h, e (...,D) -> (...,r)."""
        return F.silu(F.linear(torch.cat([rms_norm(h), rms_norm(e)], -1), self.head_in))

    def to(self, model):
        """A copy in the model's dtype and on its device; gradients flow through it to the parts of this one."""
        return replace(self, **{name: part.to(model.embedding) for name, part in vars(self).items() if torch.is_tensor(part)})

    def fit(self, model):
        """Make it ready, in place, for sampling from this model: its dtype, its device, and the head folded into the vocabulary,
        folded = W_out @ head_out (V,r), so that a draft needs no second product with W_out."""
        vars(self).update(vars(self.to(model)))
        if self.head_in is not None and self.folded is None:
            self.folded = model.logits(self.head_out.T).T.contiguous()
        return self


# -------------------------------------------------------------------------------------------------------- what methods share

class Run:
    """The state of one generation: cache, random numbers, and the rows' texts with their stops and statistics."""

    def __init__(self, model, prompts, params, lookahead=None, max_new_tokens=1, seed=0, on_token=None, length=0, tree=None,
                 draft_params=None, draft_model=None):
        lookahead = Lookahead(model.embedding.new_zeros(0, model.config.dim)) if lookahead is None else lookahead.fit(model)
        context, longest = model.config.context, max(map(len, prompts))
        self.model, self.prompts, self.params, self.on_token = model, prompts, params, on_token
        self.lookahead, self.embeddings = lookahead, lookahead.embeddings.expand(len(prompts), -1, -1)
        self.device, self.tree, self.draft_model = model.embedding.device, tree, draft_model
        self.draft_params, self.length = draft_params or params, length
        self.budget = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
        self.limit = ["length" if max_new_tokens <= context - len(prompt) else "context" for prompt in prompts]
        self.cache = Cache(model, len(prompts), min(longest + max_new_tokens, context) +
                           max(1 + length, len(tree.offset) if tree else 0), lookahead.memory)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.tokens = [[] for _ in prompts]
        self.from_draft = [[] for _ in prompts]  # per token: was it an accepted draft?
        self.stop_reason = [None] * len(prompts)
        self.alive = torch.ones(len(prompts), dtype=torch.long, device=self.device)
        self.passes, self.drafted, self.accepted = 0, [0] * length, [0] * length
        self.start, self.prefill_seconds = time.perf_counter(), None

    def uniform(self, n):
        """(B,n) uniforms in [0, 1): every row and every decision has its own."""
        return torch.rand(len(self.prompts), n, dtype=torch.float64, generator=self.generator, device=self.device)

    def probs(self, logits):
        return probs(logits, self.params)

    def forward(self, tokens, L=0, tree=None):
        """Run tokens (B,T) and the first L look-ahead tokens after the text: next positions, causal. Returns (B,T+L,D).

        With a tree: its nodes (B,1+N), the root and the drafts, and L look-ahead tokens after each. Returns (B,(1+N)(1+L),D).
        """
        self.passes += 1
        group = self.embeddings[:, :L].repeat(1, tokens.shape[1] if tree else 1, 1)
        x = torch.cat([self.model.embed(tokens), group], 1)
        column = torch.arange(x.shape[1], device=self.device)
        offset, visible = (tree.offset, tree.visible) if tree else (column, None)
        return self.model(x, self.cache.length[:, None] + offset, self.cache, visible,
                          sees_memory=column >= tokens.shape[1] if L and self.cache.memory else None)

    def commit(self, count, columns=None):
        self.cache.commit(count * self.alive, columns)  # a finished row stays where it is, whatever the others do

    def emit(self, last, drafts=None, accepted=None):
        """Append to each living row its accepted drafts, drafts[:accepted] of (B,L), then `last` (B,), a token from the model.

        A row ends at a stop token wherever in the run it is, else at its budget of new tokens, else at the end of the context.
        Returns False when every row has ended. Raises InputError where the model's logits were not finite.
        """
        last = last.tolist()
        if max(last) >= self.model.config.vocab_size:  # what `draw` makes of NaN
            raise InputError(f"the model's logits are not finite, in {self.model.precision}: try --dtype float32 or no --lookahead")
        drafts, accepted = (drafts.tolist(), accepted.tolist()) if drafts is not None else ([[]] * len(last), [0] * len(last))
        for row in (row for row, reason in enumerate(self.stop_reason) if reason is None):
            for i in range(len(drafts[row])):
                self.drafted[i] += 1
                self.accepted[i] += i < accepted[row]
            for i, token in enumerate(drafts[row][:accepted[row]] + last[row:row + 1]):
                self.tokens[row].append(token)
                self.from_draft[row].append(i < accepted[row])
                if self.on_token:
                    self.on_token(row, token, i < accepted[row])
                if token in self.model.config.stop_tokens:
                    self.stop_reason[row] = "stop"
                elif len(self.tokens[row]) == self.budget[row]:
                    self.stop_reason[row] = self.limit[row]
                if self.stop_reason[row]:
                    self.alive[row] = 0
                    break
        return None in self.stop_reason

    def useful_drafts(self, besides):
        """L, or fewer at the end: besides its drafts a step gives one token after them, and in `parallel` one before them."""
        left = max(self.budget[row] - len(self.tokens[row]) for row, reason in enumerate(self.stop_reason) if reason is None)
        return max(0, min(self.length, left - besides))


PREFILL_BLOCK = 512  # columns; bounds the memory of the mask and of the activations, however long the prompt


def prefill(run, L=0):
    """Commit the prompts and carry the first group of L look-ahead tokens along. Returns the states (B,1+L,D) of each row's last
    prompt token and of its look-ahead tokens, as every later drafting pass does.

    Rows differ in length, so each is laid out [ prompt | look-ahead | padding ]: causality hides the padding.
    """
    model, cache, device = run.model, run.cache, run.device
    lengths = torch.tensor([len(prompt) for prompt in run.prompts], device=device)
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in run.prompts], batch_first=True).to(device)
    early = (lengths - PREFILL_BLOCK).clamp(min=0)  # tokens that go before the last block, itself at most PREFILL_BLOCK + L

    def columns(width):
        positions = cache.length[:, None] + torch.arange(width, device=device)
        return tokens.gather(1, positions.clamp(max=tokens.shape[1] - 1)), positions

    while (cache.length < early).any():
        model(*columns(PREFILL_BLOCK), cache)
        cache.commit((early - cache.length).clamp(max=PREFILL_BLOCK))
    count = lengths - early
    x, positions = columns(int(count.max()) + L)
    x, rows = model.embed(x), torch.arange(len(lengths), device=device)[:, None]
    group = count[:, None] + torch.arange(L, device=device)  # (B,L), the columns of the look-ahead
    x[rows, group] = run.embeddings[:, :L]
    own = positions - cache.length[:, None] - count[:, None]  # 0 .. L-1 for the look-ahead
    h = model(x, positions, cache, sees_memory=(0 <= own) & (own < L) if L and cache.memory else None)
    h = h[rows, count[:, None] - 1 + torch.arange(1 + L, device=device)]
    cache.commit(count)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    run.passes, run.prefill_seconds = 1, time.perf_counter() - run.start
    return h


# --------------------------------------------------------------------------------------------------------------- the methods

def autoregressive(run):
    """One pass a token: what every method must equal in distribution, and beat in time."""
    h = prefill(run)
    while True:
        x = draw(run.probs(run.model.logits(h[:, 0])), run.uniform(1)[:, 0])
        if not run.emit(x):
            return
        h = run.forward(x[:, None])
        run.commit(1)


SHORTLIST = 256


def shortlist(run, h, logits, before):
    """Correct logits (B,V) of a look-ahead column in state h (B,D) by the draft head, for tokens before (B,P) the draft.

    Returns the corrected logits (B,P,C) of the SHORTLIST best tokens and their ids (B,C). All others get q = 0, which spares most
    of the work over the vocabulary and is as exact, since the rule is given that q.
    """
    best, ids = logits.topk(min(SHORTLIST, logits.shape[-1]))
    best = best[:, None].expand(-1, before.shape[1], -1)
    if run.lookahead.folded is not None:
        e, rows = run.model.embed(before), F.embedding(ids, run.lookahead.folded)  # (B,P,D), (B,C,r)
        best = best + (rows @ run.lookahead.features(h[:, None].expand_as(e), e).transpose(1, 2)).transpose(1, 2)
    return best, ids


def draft(run, h, logits, x):
    """Draw d_1 .. d_L (B,L) from the states h (B,L,D) and logits (B,L,V) of the look-ahead tokens; also returns their q (B,L,V).

    x (B,) is the token before d_1. Without a draft head no draft depends on another and all are drawn at once; with one, each q
    is conditional on the draft before it, which is as exact, since the rule is given that q.
    """
    u, last = run.uniform(h.shape[1]), run.model.config.vocab_size - 1
    if run.lookahead.folded is None or h.shape[1] == 0:
        q = run.probs(logits)
        return draw(q, u).clamp(max=last), q  # where q is NaN any token will do: the rule rejects it
    drafts, q = [x], []
    for j in range(h.shape[1]):
        best, ids = shortlist(run, h[:, j], logits[:, j], drafts[j][:, None])
        q.append(run.probs(torch.full_like(logits[:, j], -math.inf).scatter(1, ids, best[:, 0])))
        drafts.append(draw(q[j], u[:, j]).clamp(max=last))
    return torch.stack(drafts[1:], 1), torch.stack(q, 1)


def parallel(run):
    """PaSS (arXiv 2311.13581, section 3): two passes give 2 to L+2 tokens.

    Pass 1 runs [x_n, LA_1 .. LA_L]: x_n yields p for x_{n+1}, and LA_j, at the position of x_{n+j} without having seen it,
    yields q for draft d_j of x_{n+1+j}. Pass 2 runs [x_{n+1}, d_1 .. d_L] and yields the p that judge the drafts.
    """
    L = run.useful_drafts(2)
    h = prefill(run, L)  # the first pass 1
    while True:
        logits = run.model.logits(h)
        x = draw(run.probs(logits[:, 0]), run.uniform(1)[:, 0])
        if not run.emit(x):
            return
        drafts, q = draft(run, h[:, 1:], logits[:, 1:], x)
        p = run.probs(run.model.logits(run.forward(torch.cat([x[:, None], drafts], 1))))  # pass 2
        accepted, x = verify(p, q, drafts, run.uniform(1 + L))
        if not run.emit(x, drafts, accepted):
            return
        run.commit(1 + accepted)
        L = run.useful_drafts(2)
        h = run.forward(x[:, None], L)  # pass 1
        run.commit(1)


# ----------------------------------------------------------------------------------------------------- beyond the paper: one pass

class Tree:
    """Which drafts one pass tries: paths of ranks. In "0 1 00", 1 is the second candidate for the next token, 00 the first one
    after the first; a chain of three is "0 00 000". The block is [ x_n | drafts 1 .. N, by depth | G_0 .. G_N ]: after the root
    x_n and after every draft a group of as many look-ahead tokens as the tree is deep. The first 1+N columns are the nodes. A rank
    is one digit: at most ten candidates.
    """

    def __init__(self, paths, device="cpu"):
        """Raises InputError for a path without its parent, or without the candidates before it."""
        nodes = ["", *sorted(paths, key=lambda path: (len(path), path))]
        self.paths, self.depth, n = nodes[1:], len(nodes[-1]), len(nodes)
        if len(set(nodes)) < n or any(path[:-1] not in nodes or path[-1] > "0" and path[:-1] + chr(ord(path[-1]) - 1) not in nodes
                                      for path in self.paths):
            raise InputError(f"tree {' '.join(paths)!r}: each path must come once, with its parent and the ranks before its last")
        self.parent = [nodes.index(path[:-1]) for path in self.paths]
        # Per depth: the nodes that are parents; the most children one has; the children as (which parent, rank); the first's node.
        self.levels = []
        for d in range(self.depth):
            children = [path for path in self.paths if len(path) == d + 1]
            parents = sorted({path[:-1] for path in children})
            at = [(parents.index(path[:-1]), int(path[-1])) for path in children]
            self.levels.append(([nodes.index(path) for path in parents], 1 + max(k for _, k in at), at, nodes.index(children[0])))

        def tensor(values, dtype=torch.long):
            return torch.tensor(values, dtype=dtype, device=device)
        self.depths = tensor([len(node) for node in nodes])  # (1+N,)
        # From the root down to each node, which then repeats: `commit` takes as many as were accepted.
        self.path = tensor([[nodes.index(node[:d]) for d in range(self.depth + 1)] for node in nodes])  # (1+N,1+depth)
        above = tensor([[a.startswith(b) for b in nodes] for a in nodes], torch.bool)  # a node sees its ancestors and itself ..
        inside = torch.ones(self.depth, self.depth, dtype=torch.bool, device=device).tril()
        groups = torch.block_diag(*[inside] * n)  # .. a group what its node sees, and itself causally
        self.visible = torch.cat([F.pad(above, (0, len(groups))), torch.cat([above.repeat_interleave(self.depth, 0), groups], 1)])
        self.offset = torch.cat([self.depths, (self.depths[:, None] + 1 + torch.arange(self.depth, device=device)).flatten()])
        self.chain = self.depth == n - 1  # then the accepted path lies in the first columns, and need not be moved there


def draft_tree(run, tree, h, logits, x):
    """Draw the drafts: tokens (B,1+N), the root x (B,) first, and the q (B,1+N,V) that `verify_tree` must know.

    h (B,L,D) and logits (B,L,V) are those of one look-ahead group, whose column d drafts the children of the nodes at depth d, all
    at once, since a draft head needs their parents only. At draft temperature 0 siblings are the best in order, each from a q of
    its own that is one-hot. Each of P parents gets W candidates; those that the tree has not are dropped.
    """
    tokens = x[:, None].repeat(1, len(tree.path))
    q = torch.zeros(*tokens.shape, logits.shape[-1], dtype=torch.promote_types(logits.dtype, torch.float32), device=run.device)
    for d, (parents, width, children, first) in enumerate(tree.levels):
        best, ids = shortlist(run, h[:, d], logits[:, d], tokens[:, parents])
        if run.draft_params.temperature == 0:
            order = best.topk(width).indices  # (B,P,W)
            left = torch.zeros(*order.shape, best.shape[-1], dtype=q.dtype, device=run.device).scatter_(-1, order[..., None], 1)
        else:
            order, left = without_replacement(probs(best, run.draft_params), width, run.generator)  # (B,P,W), (B,P,W,C)
        for i, (parent, k) in enumerate(children, first):
            tokens[:, i] = ids.gather(1, order[:, parent, k:k + 1])[:, 0]
            q[:, i].scatter_(1, ids, left[:, parent, k])
    return tokens, q


def fused(run):
    """One pass a step (the layout of arXiv 2507.11851): the pass that validates the drafts also drafts the next ones.

    Look-ahead tokens never see the token x that they come before, in `parallel` neither, so they need not wait for it: they only
    must stand after the last accepted draft. So a group stands after each, in the pass that decides which it is and what x is, and
    the group of that one drafts what follows x: 1 + accepted tokens a pass, where `parallel` has (2 + accepted) / 2.
    """
    tree, rows = run.tree, torch.arange(len(run.prompts), device=run.device)
    h = prefill(run, tree.depth)  # the first group rides with the prompt
    logits = run.model.logits(h)
    x = draw(run.probs(logits[:, 0]), run.uniform(1)[:, 0])
    h, logits, n = h[:, 1:], logits[:, 1:], len(tree.path)
    alive = run.emit(x)
    while alive:
        tokens, q = draft_tree(run, tree, h, logits, x)
        h = run.forward(tokens, tree.depth, tree)
        logits = run.model.logits(h)
        node, x = verify_tree(tree.parent, run.probs(logits[:, :n]), q, tokens, run.uniform(n))
        path, accepted = tree.path[node], tree.depths[node]
        alive = run.emit(x, tokens.gather(1, path[:, 1:]), accepted)
        run.commit(1 + accepted, None if tree.chain else path)
        group = n + node[:, None] * tree.depth + torch.arange(tree.depth, device=run.device)  # (B,L): its columns in the block
        h, logits = h[rows[:, None], group], logits[rows[:, None], group]


def measure(functions, rounds):
    """Median seconds of each of functions {name: function}, interleaved. rounds: an iterable, whose first round warms up."""
    times = {name: [] for name in functions}
    for _ in rounds:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def run_columns(model, cache, T):
    """A pass of T columns, of any tokens, after what the cache has committed. Returns h (B,T,D) and logits (B,T,V)."""
    tokens = torch.zeros(len(cache.length), T, dtype=torch.long, device=cache.length.device)
    h = model(tokens, cache.length[:, None] + torch.arange(T, device=tokens.device), cache)
    logits = model.logits(h)
    logits[0, 0, 0].item()  # waits for a GPU
    return h, logits


@lru_cache(4)
def step_seconds(model, lookahead, rows):
    """({T: seconds of a pass of T columns}, seconds of drafting for each depth of a tree, and of drafting and judging for each draft)
    on this machine. Takes a second, once for a model, look-ahead and number of rows."""
    cache, run = Cache(model, rows, 160), Run(model, [[0]] * rows, Params(1), lookahead)
    cache.commit(128)
    h, logits = run_columns(model, cache, 5)

    def draft_and_judge(tree):
        tokens, q = draft_tree(run, tree, h, logits, torch.zeros_like(cache.length))
        p = run.probs(logits[:, :q.shape[1]])
        verify_tree(tree.parent, p, q, tokens, run.uniform(q.shape[1]))[1].tolist()
    functions = {}
    for T, drafts in ((1, 1), (4, 4), (8, 0), (16, 0), (32, 0)):
        functions[T] = partial(run_columns, model, cache, T)
        if drafts:  # right after a pass: the head's weights are then as far away as they will be
            tree = Tree([str(rank) for rank in range(drafts)], model.embedding.device)
            functions[f"{drafts} drafts"] = partial(draft_and_judge, tree)
    seconds = measure(functions, range(6))
    one, four = seconds.pop("1 drafts"), seconds.pop("4 drafts")
    each = max(0.0, four - one) / 3
    return seconds, one - each, each


MARGIN = 1.15  # what a tree must promise over plain decoding: whole decodes of SmolLM2 gained up to .15 less than the estimate


def gains(by_rank):
    """What each rank adds to the ranks before it, [position][k]: the worth of a draft whose parent was accepted."""
    return [[b - a for a, b in zip([0, *ranks], ranks[:10])] for ranks in by_rank]


def choose_tree(by_rank, seconds, drafting, judging=0.0):
    """The paths of the tree that gives the most tokens per unit of time; [] where none promises MARGIN times plain decoding.

    by_rank: of `known_acceptance`.  seconds, drafting, judging: of `step_seconds`.
    A draft is worth the probability that it is accepted: the product, down its path, of what its rank adds. N drafts give
    1 + the sum of their worths tokens a pass, for the time of (1+N)(1+depth) columns, drafting and judging. For each depth, grow the
    tree by the draft that is worth most as long as the cost of its columns was measured; keep the best tree on the way.
    """
    measured = sorted(seconds)

    def cost(drafts, depth):
        columns = (1 + drafts) * (1 + depth)
        above = min(T for T in measured if T >= columns)
        below = max(T for T in measured if T <= columns)
        passing = seconds[below] + (seconds[above] - seconds[below]) * (columns - below) / max(1, above - below)
        return passing + drafting * depth + judging * drafts

    best, rate = [], MARGIN / cost(0, 0)
    for depth in range(1, len(by_rank) + 1):
        adds = gains(by_rank[:depth])
        paths, tokens, open_paths = [], 1.0, {"0": adds[0][0]}
        while open_paths and (len(paths) + 2) * (1 + depth) <= measured[-1]:
            path = max(open_paths, key=open_paths.get)
            worth, d, k = open_paths.pop(path), len(path), int(path[-1])
            paths, tokens = [*paths, path], tokens + worth
            if d < depth:
                open_paths[path + "0"] = worth * adds[d][0]
            if k + 1 < len(adds[d - 1]) and adds[d - 1][k] > 0:
                open_paths[path[:-1] + str(k + 1)] = worth * adds[d - 1][k + 1] / adds[d - 1][k]
            # A shallower tree had its turn, with shorter groups.
            if tokens / cost(len(paths), depth) > rate and max(map(len, paths)) == depth:
                best, rate = paths, tokens / cost(len(paths), depth)
    return best


def known_acceptance(lookahead, temperature):
    """[position][k]: the probability that one of the k+1 first candidates is accepted, from the look-ahead's file, at the nearest
    temperature that was measured."""
    nearest = min(lookahead.acceptance, key=lambda t: abs(float(t) - temperature), default=None)
    table = lookahead.acceptance[nearest]["by_rank"] if nearest else [[0.2], [0.08]]  # untrained "mean", SmolLM2, greedy
    return table[:len(lookahead.embeddings)]


def parse_tree(text, model, rows, lookahead, temperature):
    """"0 1 00", "chain:3" or "auto" -> a list of paths."""
    if text == "auto":
        return choose_tree(known_acceptance(lookahead, temperature), *step_seconds(model, lookahead, rows))
    kind, _, n = text.partition(":")
    L, vocabulary = lookahead.embeddings.shape[0], model.config.vocab_size
    paths = ["0" * (i + 1) for i in range(min(int(n), L + 1))] if kind == "chain" and n.isdecimal() and len(n) < 9 else text.split()
    if not paths or not all(path.isdecimal() and path.isascii() and int(max(path)) < vocabulary for path in paths):
        raise InputError(f"tree {text!r}: give paths of ranks such as \"0 1 00\", or chain:N, or auto")
    if max(map(len, paths)) > L:
        raise InputError(f"tree {text!r} is deeper than the {L} look-ahead tokens")
    return paths


def draft_model(run):
    """Speculative sampling as Leviathan et al. and Chen et al. published it: a second, smaller model drafts, one pass a draft."""
    small = Run(run.draft_model, run.prompts, run.draft_params, max_new_tokens=max(run.budget), length=run.length)
    prefill(small)
    x = draw(run.probs(run.model.logits(prefill(run)[:, 0])), run.uniform(1)[:, 0])
    alive = run.emit(x)
    while alive:
        drafts, q = [x], []
        for _ in range(max(1, run.useful_drafts(1))):
            q.append(probs(small.model.logits(small.forward(drafts[-1][:, None]))[:, 0], run.draft_params))
            drafts.append(draw(q[-1], run.uniform(1)[:, 0]))
            small.commit(1)
        small.forward(drafts[-1][:, None])  # its q is not needed, but its keys and values are, should all be accepted
        drafts, q = torch.stack(drafts, 1), torch.stack(q, 1)
        p = run.probs(run.model.logits(run.forward(drafts)))
        accepted, x = verify(p, q, drafts[:, 1:], run.uniform(drafts.shape[1]))
        alive = run.emit(x, drafts[:, 1:], accepted)
        run.commit(1 + accepted)
        small.cache.length = run.cache.length  # the draft model's cache rolls back to the same text


# To add a method: a function of a Run that prefills, emits and commits, and its name here; the command lines then know it. (`pass`
# is a word of Python's.)
METHODS = {"autoregressive": autoregressive, "pass": parallel, "fused": fused, "draft-model": draft_model}
LOOKS_AHEAD = {"pass", "fused"}  # those that need a Lookahead


@torch.inference_mode()
def generate(model, prompts, method="pass", lookahead=None, params=Params(), max_new_tokens=128, seed=0, on_token=None, *,
             tree="auto", draft_temperature=None, draft_model=None, length=4):
    """Continue each of `prompts`, lists of token ids that may differ in length, by a method of METHODS.

    lookahead: a Lookahead, for pass and fused.  on_token(row, token, from_draft) is called for each token as it is made.
    tree: for fused, see `parse_tree`.  draft_temperature: for fused and draft-model, of the q that drafts are drawn from; None is
    as for p.  draft_model, length: for draft-model, a Llama of the same vocabulary, and how many drafts it makes a step.
    The same seed, method, batch and machine give the same text, but for tree "auto", which depends on measured times.
    Returns a dict: method, tree (fused only; empty if plain decoding is faster here), tokens and from_draft (lists of lists),
    stop_reason ("stop", "length" or "context", per row), passes (of the model, prefill being one; not those of a draft model),
    drafted (positions; a tree tries several drafts for one), accepted_by_position (share of the drafted positions at which a
    draft was accepted, each after all before it), tokens_per_pass (per row), seconds (in all) and prefill_seconds.
    Raises InputError for an empty prompt, one that leaves no room in the context, and ids outside of the vocabulary.
    """
    config = model.config
    for prompt in prompts:
        if not prompt:
            raise InputError("the prompt is empty; give at least one token")
        if len(prompt) >= config.context:
            raise InputError(f"the prompt has {len(prompt)} tokens and the context {config.context}: shorten the prompt")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise InputError(f"the prompt has tokens from {min(prompt)} to {max(prompt)}, the model only 0 to "
                             f"{config.vocab_size - 1}: is this the model's own tokenizer?")
    if not prompts or max_new_tokens < 1:
        raise InputError("at least one prompt and one new token are needed")
    if lookahead is None and method in LOOKS_AHEAD:
        raise InputError(f"method {method} needs a look-ahead")
    if method == "draft-model" and (draft_model is None or draft_model.config.vocab_size != config.vocab_size):
        raise InputError(f"method {method} needs a draft model (--draft-model DIR) with the vocabulary of the model, "
                         f"{config.vocab_size} tokens")
    if method == "draft-model" and (length < 1 or draft_model.config.context < min(config.context, max_new_tokens + max(
            map(len, prompts)))):
        raise InputError(f"method {method} needs a length of at least 1, not {length}, and a draft model whose context of "
                         f"{draft_model.config.context} tokens holds prompt and new tokens: ask for fewer")
    lookahead = lookahead if method in LOOKS_AHEAD else None
    draft_params = params if draft_temperature is None else replace(params, temperature=draft_temperature)
    paths = parse_tree(tree, model, len(prompts), lookahead, params.temperature) if method == "fused" else []
    run = Run(model, prompts, params, lookahead, max_new_tokens, seed, on_token, len(lookahead.embeddings) if lookahead else length,
              Tree(paths, model.embedding.device) if paths else None, draft_params, draft_model)
    (autoregressive if method == "fused" and not paths else METHODS[method])(run)
    drafted, seconds = [n for n in run.drafted if n], time.perf_counter() - run.start
    return {"method": method, **({"tree": " ".join(paths)} if method == "fused" else {}), "tokens": run.tokens,
            "from_draft": run.from_draft, "stop_reason": run.stop_reason, "passes": run.passes, "drafted": sum(drafted),
            "accepted_by_position": [round(a / n, 4) for a, n in zip(run.accepted, drafted)],
            "tokens_per_pass": round(sum(map(len, run.tokens)) / len(prompts) / run.passes, 4),
            "seconds": seconds, "prefill_seconds": run.prefill_seconds}


# ---------------------------------------------------------------------------------------------------------- look-ahead files

def fingerprint(config):
    """Names the model that a look-ahead was trained for: a hash of what shapes it."""
    return hashlib.sha256(repr(replace(config, dtype="", stop_tokens=())).encode()).hexdigest()[:16]


def load_lookahead(spec, model, tokenizer, prompt, length=None):
    """The Lookahead that `spec` names.

    A safetensors file as train_lookahead.py writes: tensor `embeddings` (L,D), optionally `memory`, `head_in` and `head_out`;
    "unk", the embedding of the unknown token, the untrained baseline of the paper; or "mean", the mean embedding of the prompt
    (arXiv 2603.17942), without training too. length: L; None is all that the file has, or 4.
    Raises InputError where the file does not fit the model.
    """
    if length is not None and length < 1:
        raise InputError(f"length must be at least 1, not {length}; for none use --method autoregressive")
    c = model.config
    if spec == "mean":
        return Lookahead(model.embed(torch.tensor(prompt, device=model.embedding.device)).mean(0).repeat(length or 4, 1))
    if spec == "unk":
        if tokenizer.unk is None:
            raise InputError("this tokenizer has no unknown token; use --lookahead mean or a trained file")
        return Lookahead(model.embedding[tokenizer.unk].repeat(length or 4, 1))
    with open_tensors(spec) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        try:
            about = json.loads((file.metadata() or {}).get("lookahead", "{}"))
            acceptance = about.get("acceptance", {})
            for t, row in acceptance.items():
                shares = [float(t), row["expected"], *row["by_position"], *(share for ranks in row["by_rank"] for share in ranks)]
                if not all(row["by_rank"]) or not all(type(share) in (int, float) and 0 <= share < math.inf for share in shares):
                    raise ValueError("acceptance must be numbers")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"{spec}: its metadata is damaged: {error!r}") from None
    if about.get("model", fingerprint(c)) != fingerprint(c):
        raise InputError(f"{spec} was trained for another model; train one for this model with train_lookahead.py")
    sizes = {name: tensor.shape[0] if tensor.ndim else 0 for name, tensor in tensors.items()}
    rank, slots = sizes.get("head_in", 0), tensors["memory"].shape[2] if tensors.get("memory", torch.empty(0)).ndim == 5 else 0
    shapes = {"embeddings": (sizes.get("embeddings"), c.dim), "memory": (c.n_layers, 2, slots, c.n_kv_heads, c.head_dim),
              "head_in": (rank, 2 * c.dim), "head_out": (c.dim, rank)}
    if "embeddings" not in tensors or ("head_in" in tensors) != ("head_out" in tensors) or set(tensors) - set(shapes):
        raise InputError(f"{spec} is no look-ahead file: its tensors, such as {', '.join([*tensors][:4])}, are not {', '.join(shapes)}")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise InputError(f"{spec}: {name} must be finite floats of shape {shapes[name]}, not {tensor.dtype} "
                             f"{tuple(tensor.shape)}: damaged, or trained for another model?")
    if length is not None and length > len(tensors["embeddings"]):
        raise InputError(f"{spec} has {len(tensors['embeddings'])} look-ahead tokens, fewer than --length {length}")
    return Lookahead(tensors.pop("embeddings")[:length], **tensors, acceptance=acceptance)


def load_draft_model(folder, model, tokenizer):
    """A second Llama, in the model's dtype and on its device. Raises InputError where its tokens are not those of the model."""
    small = Llama.load(folder, model.dtype, model.embedding.device)
    if load_tokenizer(folder, small.config.vocab_size).pieces != tokenizer.pieces:
        raise InputError(f"the tokenizer of {folder} is not that of the model; a draft model must share the vocabulary")
    return small


# -------------------------------------------------------------------------------------------------------------- command line

def read_prompt(args):
    try:
        if args.stdin:
            text = sys.stdin.buffer.read().decode()
        else:
            text = args.prompt if args.prompt_file is None else args.prompt_file.read_bytes().decode()
        text.encode()  # a command line that is not UTF-8 fails here
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot read the prompt: {error}") from None
    if not text:
        raise InputError("the prompt is empty; give --prompt TEXT, --prompt-file FILE, or - for standard input")
    return text


def printer(tokenizer):
    """An on_token function that writes row 0 to stdout as it is made, accepted drafts in colour on a terminal."""
    to_text, colour = tokenizer.stream(), sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def on_token(row, token, from_draft):
        text = to_text(token) if row == 0 else ""
        if text:
            print(f"\033[32m{text}\033[0m" if colour and from_draft else text, end="", flush=True)
    return on_token


def summary(results):
    """One line of figures for the runs of one method; the acceptance is that of the first, the one that was shown."""
    tokens, seconds = sum(len(t) for r in results for t in r["tokens"]), sum(r["seconds"] for r in results)
    shares = " ".join(f"{share:.2f}" for share in results[0]["accepted_by_position"])
    drafts = f", accepted by position {shares}" if shares else ""
    tree, none = results[0].get("tree"), "none, since plain decoding is faster here (--tree 0 insists)"
    tree = "" if tree is None else f" with tree {tree or none}"
    runs = f" in {len(results)} runs" if len(results) > 1 else ""
    return (f"{results[0]['method']}{tree}: {tokens} tokens{runs}, {sum(r['passes'] for r in results)} passes, "
            f"{statistics.mean(r['tokens_per_pass'] for r in results):.2f} tokens a pass{drafts}, {seconds:.2f} s "
            f"({sum(r['prefill_seconds'] for r in results):.2f} s of it prefill), {tokens / seconds:.1f} tokens/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json, model.safetensors and a tokenizer")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="def fibonacci(n):\n", help="text to continue (default: %(default)r)")
    source.add_argument("--prompt-file", type=Path, help="file whose text to continue")
    source.add_argument("stdin", nargs="?", choices=["-"], help="continue the text on standard input")
    add("--method", choices=METHODS, default="pass", help="default: %(default)s")
    add("--lookahead", default="mean", metavar="FILE|unk|mean", help="trained file, or untrained baseline (default: %(default)s)")
    add("--length", type=int, help="look-ahead tokens L, or drafts of the draft model (default: all of the file, or 4)")
    add("--tree", default="auto", help="of fused: paths of ranks such as \"0 1 00\", or chain:N, or auto, the fastest (default)")
    add("--draft-model", type=Path, metavar="DIR", help="folder of the model that drafts for --method draft-model")
    add("--draft-temperature", type=float, help="of the drafts of fused and draft-model (default: as --temperature)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=0, help="0 is off (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="1 is off (default: %(default)s)")
    add("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    add("--samples", type=int, default=1, help="independent continuations, one batch (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own; on an x86 CPU float16 weights in place of bfloat16")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--compare", nargs="*", choices=METHODS, metavar="METHOD", help="run --method, or these, interleaved with "
        "autoregressive, and print the ratios of their speeds (- for standard input goes before it)")
    add("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    args = parser.parse_args()

    params, text = Params(args.temperature, args.top_k, args.top_p), read_prompt(args)
    methods = [args.method] if args.compare is None else ["autoregressive", *(args.compare or [args.method])]
    if len(set(methods)) < len(methods):
        raise InputError("--compare sets methods against autoregressive; name others, each once")
    if args.tree != "auto" and "fused" not in methods:
        raise InputError("--tree is for --method fused only")
    if args.samples < 1:
        raise InputError(f"samples must be at least 1, not {args.samples}")
    model = Llama.load(args.model, DTYPES.get(args.dtype), device_named(args.device))
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    prompt = tokenizer.encode(text)
    if not prompt:
        raise InputError("the prompt has no tokens; give a longer one")
    lookahead, small = None, None
    if LOOKS_AHEAD & set(methods):
        lookahead = load_lookahead(args.lookahead, model, tokenizer, prompt, args.length)
    if "draft-model" in methods and args.draft_model:
        small = load_draft_model(args.draft_model, model, tokenizer)
    options = dict(tree=args.tree, draft_temperature=args.draft_temperature, draft_model=small,
                   length=4 if args.length is None else args.length)

    def once(method, seed, tokens=args.max_new_tokens, show=False):
        if show and len(methods) > 1:
            print(f"--- {method}, after {text[-40:]!r}", flush=True)
        result = generate(model, [prompt] * args.samples, method, lookahead, params, tokens, seed,
                          printer(tokenizer) if show else None, **options)
        result["text"] = [tokenizer.decode(row) for row in result["tokens"]]
        del result["from_draft"]
        if show:
            print("".join(f"\n--- sample {i}\n{text}" for i, text in enumerate(result["text"]) if i))
        return result

    rounds = 1 if args.compare is None else 3
    if args.compare is not None:
        for method in methods:
            once(method, args.seed, tokens=4)  # warm up
    results = {method: [] for method in methods}
    for seed in range(args.seed, args.seed + rounds):  # interleaved: what disturbs the machine meets all
        for method in methods:
            results[method].append(once(method, seed, show=seed == args.seed and not args.json))
    if args.compare is None:
        print(json.dumps(results[args.method][0])) if args.json else print(summary(results[args.method]), file=sys.stderr)
        return
    per_token = {m: [r["seconds"] / sum(map(len, r["tokens"])) for r in results[m]] for m in methods}
    ratio = {m: statistics.median(a / b for a, b in zip(per_token["autoregressive"], per_token[m])) for m in methods[1:]}
    if args.json:
        print(json.dumps({m: results[m][0] for m in methods} | {"ratio": ratio}))
        return
    for method in methods:
        print(summary(results[method]), file=sys.stderr)
    for method in methods[1:]:
        same = "" if args.temperature else "; the text is the same" if all(
            a["tokens"] == b["tokens"] for a, b in zip(results["autoregressive"], results[method])) else "; the text differs: two " \
            f"logits may tie within the rounding of {model.precision}, but if it differs with --dtype float64 too, the sampler is " \
            "wrong: run tests/test_exact.py"
        print(f"{method} takes {1 / ratio[method]:.2f} of the time per token: {ratio[method]:.2f}x as fast (median of {rounds} "
              f"interleaved runs){same}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
