"""A look-ahead with more to train than the paper's embeddings: a draft memory and a draft head.

Memory: R keys and values per layer that only look-ahead columns see, as if a text that was made for
drafting stood before the real one (prefix tuning, arXiv 2101.00190). The text does not see it, so
the model is untouched.
Head: a look-ahead column does not know the token before the one it guesses, but when its draft is
drawn that token is known. The head corrects the column's logits by it. Each q is then conditional
on the draft before it, and the rule of `verify` is given that q: it stays exact.

Shapes: r rank of the head, C tokens of the shortlist; others as in model.py. Read fused.py next.
"""
import copy
import math

import torch
import torch.nn.functional as F

from model import Cache
from pass_sampler import Lookahead, draw, probs

SHORTLIST = 256  # the head judges this many of the best tokens; all others get q = 0, exact as well


def shortlist(logits):
    """The SHORTLIST best of logits (..,V): their ids (..,C), rising, and their logits (..,C)."""
    ids = logits.topk(min(SHORTLIST, logits.shape[-1]), sorted=False).indices.sort(-1).values
    return ids, logits.gather(-1, ids)


def correction(lookahead, model, h, ids, before):
    """What the head adds to the logits of ids (B,C) at a look-ahead column in state h (B,D), if the
    token before its draft is one of before (B,P): (B,P,C)."""
    if lookahead.head_in is None:
        return 0
    e = model.embed(before)  # (B,P,D)
    features = lookahead.features(h[:, None].expand_as(e), e)  # (B,P,r)
    return features @ F.embedding(ids, lookahead.folded).mT


class LookaheadPlus(Lookahead):
    """memory (layers,2,R,K,E): keys as they enter attention, not rotated, and values.

    head_in (r,2D), head_out (D,r): for a state h of a look-ahead column and the embedding e of the
    token before its draft, h becomes h + head_out @ features(h, e). Memory or head may be None.
    """

    def __init__(self, embeddings, acceptance=(), memory=None, head_in=None, head_out=None):
        super().__init__(embeddings, acceptance)
        self.memory = memory
        self.head_in = head_in
        self.head_out = head_out
        self.folded = None  # of `ready`: output matrix @ head_out, (V,r)

    def ready(self, model):
        """As in Lookahead; and the head is folded into the vocabulary."""
        lookahead = copy.copy(self)
        for name, part in vars(self).items():
            if torch.is_tensor(part):
                setattr(lookahead, name, part.to(model.embedding))
        if self.head_in is not None:
            lookahead.folded = model.logits(lookahead.head_out.mT).mT.contiguous()
        return lookahead

    def features(self, h, e):
        """h, e (..,D) -> (..,r)."""
        both = [F.rms_norm(x, x.shape[-1:], eps=1e-7) for x in (h, e)]
        return F.silu(F.linear(torch.cat(both, -1), self.head_in))

    def draft(self, model, params, h, logits, x, u):
        """As in Lookahead, one draft after the other."""
        if self.head_in is None:
            return super().draft(model, params, h, logits, x, u)
        ids, best = shortlist(logits)  # (B,L,C)
        drafts = [x]
        q = []
        for j in range(h.shape[1]):
            z = best[:, j, None] + correction(self, model, h[:, j], ids[:, j], drafts[-1])
            q.append(probs(z, params))  # (B,1,C)
            k = draw(q[-1], u[:, j:j + 1])
            drafts.append(ids[:, j].gather(1, k))
        q = torch.zeros(logits.shape, dtype=q[0].dtype, device=u.device).scatter_(
            2, ids, torch.cat(q, 1))
        return torch.cat(drafts[1:], 1), q


# ------------------------------------- before training

def initial_memory(model, text):
    """(layers,2,R,K,E): keys and values of text (1,R), not rotated."""
    cache = Cache(model, 1, text.shape[1])
    model(text, cache, torch.zeros_like(text))
    return cache.kv[:, :, 0].transpose(2, 3).float().contiguous()


def initial_head(model, rank, generator):
    """head_in and head_out, which is 0: no correction yet."""
    D = model.config.dim
    device = model.embedding.device
    head_in = torch.randn(rank, 2 * D, generator=generator) / math.sqrt(2 * D)
    return {"head_in": head_in.to(device), "head_out": torch.zeros(D, rank, device=device)}
