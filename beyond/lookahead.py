"""A look-ahead with more to train than the paper's embeddings: a draft memory and a draft head.

Memory: R keys and values per layer that only look-ahead columns see, as if a text that was made for
drafting stood before the real one (prefix tuning, arXiv 2101.00190). The text does not see it, so
the model is untouched.
Head: a look-ahead column does not know the token before the one it guesses, but when its draft is
drawn that token is known. The head corrects the column's logits by it. Each q is then conditional
on the draft before it, and the rule of `verify` is given that q: it stays exact.

Shapes: R memory slots, r rank of the head, C tokens of the shortlist; others as in model.py. Read
fused.py next.
"""
import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Cache, Config, Llama
from pass_sampler import Lookahead, Params, draw, probs
from support.errors import InputError

# The head judges this many of the best tokens. All others get q = 0, which is exact as well.
SHORTLIST = 256

# ----------------------------------------------------- the memory


class MemoryCache(Cache):
    """A cache with a memory before the text of every row: [ memory R | committed | block | .. ].

    `mask` shows the memory to no column, but `block_mask` shows it to look-ahead columns.
    """

    def __init__(self, cache: Cache, memory: Tensor):
        """memory (layers,2,R,K,E). Gradients flow to it. All else is that of `cache`, shared."""
        vars(self).update(vars(cache))
        rows = cache.kv.shape[2]
        self.memory = memory.transpose(2, 3)[:, :, None]  # (layers,2,1,K,R,E)
        self.first = memory.shape[2]
        shown = self.memory.detach().expand(-1, -1, rows, -1, -1, -1)
        self.kv = torch.cat([shown, cache.kv], 4)
        # As slots that no text will ever reach, it is hidden like all that are not used yet.
        nowhere = torch.full((self.first,), 2**62, device=cache.place.device)
        self.place = torch.cat([nowhere, cache.place])

    def write(self, layer: int, kv: Tensor, slots: Tensor, S: int) -> tuple[Tensor, Tensor]:
        """As in Cache. Each layer takes its own slice of the memory: gradients through the whole
        `kv` were made anew in every layer, which was half the time of training SmolLM2."""
        keys, values = super().write(layer, kv, slots, S)
        if self.memory.requires_grad:
            keys[:, :, :self.first], values[:, :, :self.first] = self.memory[layer]
        return keys, values


def block_mask(cache: Cache, tokens: int, T: int, pattern: Tensor | None = None) -> Tensor:
    """`cache.mask` of T columns that begin with so many tokens; the look-ahead columns after them
    see the memory, if the cache has one."""
    mask = cache.mask(T, pattern)
    if cache.first:
        mask[:, tokens:, :cache.first] = True
    return mask


# ------------------------------------------------------- the head

class LookaheadPlus(Lookahead):
    """memory (layers,2,R,K,E): keys as they enter attention, not rotated, and values.

    head_in (r,2D), head_out (D,r): for a state h of a look-ahead column and the embedding e of the
    token before its draft, h becomes h + head_out @ features(h, e). Memory or head may be None.
    """

    def __init__(self, embeddings: Tensor, acceptance: dict | None = None,
                 memory: Tensor | None = None, head_in: Tensor | None = None,
                 head_out: Tensor | None = None):
        super().__init__(embeddings, acceptance)
        if (head_in is None) != (head_out is None) or (
                head_in is not None and len(head_in) != head_out.shape[1]):
            raise InputError("a head has a head_in and a head_out of the same rank")
        self.memory = memory
        self.head_in = head_in
        self.head_out = head_out
        # Of `ready`: the head's first half for each token of the vocabulary, its second half for
        # each token's logit, (V,r) both.
        self.of_token = self.of_logit = None

    @staticmethod
    def shapes(config: Config) -> dict[str, tuple]:
        """Of what this adds, as in Lookahead."""
        c = config
        return {"memory": (c.n_layers, 2, None, c.n_kv_heads, c.head_dim),
                "head_in": (None, 2 * c.dim), "head_out": (c.dim, None)}

    def ready(self, model: Llama) -> "LookaheadPlus":
        """As in Lookahead; and the head is applied to the whole vocabulary, once."""
        lookahead = copy.copy(self)
        for name, part in vars(self).items():
            if torch.is_tensor(part):
                setattr(lookahead, name, part.to(model.embedding))
        if self.head_in is not None:
            of_e = lookahead.head_in[:, model.config.dim:]
            lookahead.of_token = F.linear(normal(model.embedding), of_e)
            lookahead.of_logit = model.logits(lookahead.head_out.mT).mT.contiguous()
        return lookahead

    def new_cache(self, model: Llama, rows: int, slots: int) -> Cache:
        """As in Lookahead; with the memory, if there is one."""
        cache = Cache(model, rows, slots)
        return cache if self.memory is None else MemoryCache(cache, self.memory)

    def forward(self, model: Llama, tokens: Tensor, cache: Cache) -> Tensor:
        """As in Lookahead; the look-ahead columns see the memory."""
        embeddings = self.embeddings.expand(len(tokens), -1, -1)
        x = torch.cat([model.embed(tokens), embeddings], 1)
        mask = block_mask(cache, tokens.shape[1], x.shape[1])
        return model(x, cache, mask=mask)

    def features(self, h: Tensor, e: Tensor) -> Tensor:
        """h, e (..,D) -> (..,r). `Candidates` has the same in two halves, of h and of e."""
        return F.silu(F.linear(torch.cat([normal(h), normal(e)], -1), self.head_in))

    def draft(self, params: Params, h: Tensor, logits: Tensor, x: Tensor, u: Tensor
              ) -> tuple[Tensor, Tensor]:
        """As in Lookahead, one draft after the other."""
        if self.head_in is None:
            return super().draft(params, h, logits, x, u)
        candidates = Candidates(self, h, logits)
        q = candidates.no_probs(h.shape[1])
        drafts = []
        for j in range(h.shape[1]):
            q_j = probs(candidates.logits(j, x), params)  # (B,1,C)
            choice = draw(q_j, u[:, j:j + 1])
            ids = candidates.ids[:, j]
            x = ids.gather(1, choice)
            q[:, j].scatter_(1, ids, q_j[:, 0])
            drafts.append(x)
        return torch.cat(drafts, 1), q

    def training_states(self, model: Llama, x: Tensor, cache: Cache, positions: Tensor,
                        mask: Tensor, before: Tensor) -> Tensor:
        """As in Lookahead: every column x sees the memory, and the head is given the token before
        each guess."""
        if self.memory is not None:
            cache = MemoryCache(cache, self.memory)
            mask = F.pad(mask, (cache.first, 0), value=True)
        h = model(x, cache, positions, mask)
        if self.head_in is not None:
            h = h + F.linear(self.features(h, model.embed(before)), self.head_out)
        return h


def normal(x: Tensor) -> Tensor:
    """x (..,D) by its root mean square."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-7)


class Candidates:
    """What look-ahead columns offer for the next places: the SHORTLIST best tokens of each."""

    def __init__(self, lookahead: Lookahead, h: Tensor, logits: Tensor):
        """h (B,L,D), logits (B,L,V): of the columns. lookahead: what `ready` returned."""
        self.lookahead = lookahead
        self.shape = logits.shape
        best = logits.topk(min(SHORTLIST, logits.shape[-1]), sorted=False).indices
        self.ids = best.sort(-1).values  # (B,L,C), rising
        self.best = logits.gather(-1, self.ids)
        self.has_head = getattr(lookahead, "head_in", None) is not None
        if self.has_head:
            of_h = lookahead.head_in[:, :h.shape[-1]]
            self.of_h = F.linear(normal(h), of_h)  # (B,L,r), for all columns at once
            self.of_logit = F.embedding(self.ids, lookahead.of_logit)  # (B,L,C,r)

    def logits(self, j: int, before: Tensor) -> Tensor:
        """Logits (B,P,C) of ids[:, j], if the token before is one of before (B,P)."""
        best = self.best[:, j, None]
        if not self.has_head:
            return best.expand(-1, before.shape[1], -1)
        of_e = F.embedding(before, self.lookahead.of_token)  # (B,P,r)
        features = F.silu(self.of_h[:, j, None] + of_e)
        return torch.baddbmm(best, features, self.of_logit[:, j].mT)

    def no_probs(self, places: int) -> Tensor:
        """q (B,places,V) that is 0 everywhere, in the type that `probs` gives."""
        B, _, V = self.shape
        dtype = torch.float64 if self.best.dtype == torch.float64 else torch.float32
        return torch.zeros(B, places, V, dtype=dtype, device=self.best.device)
