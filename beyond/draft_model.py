"""Speculative sampling as Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318)
published it: a second, smaller model makes the drafts, one pass per draft. PaSS does without it.

    python pass_sampler.py --model DIR --method draft-model --draft-model SMALLER_DIR --length 4

The rule is the same `verify`. Both models must have the same tokenizer.
"""
import torch

from files import InputError, check_number, load_tokenizer
from model import Llama
from pass_sampler import Method, draw, ended_by, probs, verify


def method(s, draft_model, length=4):
    """L+1 passes of the draft model, the last for its cache, then one of the model."""
    L = length
    check_number("length", L, 64)
    if draft_model.config.vocab_size != s.model.config.vocab_size:
        raise InputError(f"the draft model has a vocabulary of {draft_model.config.vocab_size}, "
                         f"the model one of {s.model.config.vocab_size}: they must be the same")
    if draft_model.config.context < s.context:
        raise InputError(f"the draft model's context of {draft_model.config.context} is less than "
                         f"the {s.context} of prompt and new tokens: ask for fewer")
    cache = s.new_cache(s.model, 1 + L)
    small = s.new_cache(draft_model, 1 + L)

    def step(u):
        block = [s.x]
        q = []
        for j in range(L):
            h = draft_model(block[-1], small)
            small.commit(s.alive)
            q.append(probs(draft_model.logits(h), s.params))  # (B,1,V)
            block.append(draw(q[-1], u[:, j:j + 1]))
        draft_model(block[-1], small)  # for its keys and values, should all be accepted
        block, q = torch.cat(block, 1), torch.cat(q, 1)
        p = s.probs(s.model.logits(s.model(block, cache)))
        drafts = block[:, 1:]
        accepted, last = verify(p, q, drafts, u[:, L:])
        cache.commit((1 + accepted) * s.alive)
        small.length.copy_(cache.length)  # both caches hold the same text
        return ended_by(last, drafts, accepted), 1 + accepted

    return Method(step, uniforms=2 * L + 1, drafts=L)


def load_draft_model(folder, model, tokenizer):
    """A second Llama, in type and device like `model`. Raises InputError if its tokens differ."""
    small = Llama.load(folder, model.dtype, model.embedding.device)
    if load_tokenizer(folder, small.config.vocab_size).pieces != tokenizer.pieces:
        raise InputError(f"the tokenizer of {folder} is not that of the model, and must be")
    return small
