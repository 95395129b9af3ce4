"""Speculative sampling as Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318)
published it: a second, smaller model makes the drafts, one pass per draft. PaSS does without it.

    python pass_sampler.py --model DIR --method draft-model --draft-model SMALLER_DIR --length 4

The rule is the same `verify`. Both models must have the same tokenizer.
"""
from pathlib import Path

import torch

from model import Llama
from pass_sampler import Made, Sampler, Step, draw, probs, verify
from support.errors import InputError, check_number
from support.methods import Method
from support.terminal import user_path
from support.tokenizer import Tokenizer, load_tokenizer


def speculative(s: Sampler, draft_model: Llama, length: int = 4) -> Step:
    """L+1 passes of the draft model, the last for its cache, then one of the model.

    `Step.passes` counts the model's alone: the draft model's are not in tokens_per_pass.
    """
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

    def run(u):
        u_draft, u_verify = u.split([L, L + 1], 1)
        block = [s.x]
        q = []
        for j in range(L):
            h = draft_model(block[-1], small)
            small.commit(s.alive)
            q.append(probs(draft_model.logits(h), s.params))  # (B,1,V)
            block.append(draw(q[-1], u_draft[:, j:j + 1]))
        draft_model(block[-1], small)  # for its keys and values, should all be accepted
        p = s.target_probs(s.model.logits(s.model(torch.cat(block, 1), cache)))
        drafts = torch.cat(block[1:], 1)
        accepted, last = verify(p, torch.cat(q, 1), drafts, u_verify)
        cache.commit((1 + accepted) * s.alive)
        small.length.copy_(cache.length)  # Both caches hold the same text.
        return Made(drafts, accepted, last)

    return Step(run, uniforms=2 * L + 1, drafts=L)


def load_draft_model(folder: Path, model: Llama, tokenizer: Tokenizer) -> Llama:
    """A second Llama, in type and device like `model`. Raises InputError if its tokens differ."""
    small = Llama.load(folder, model.dtype, model.embedding.device)
    if load_tokenizer(folder, small.config.vocab_size).pieces != tokenizer.pieces:
        raise InputError(f"the tokenizer of {folder} is not that of the model, and must be")
    return small


def draft_options(model: Llama, tokenizer: Tokenizer, draft_model: Path | None = None,
                  **given) -> dict:
    """The options of the method."""
    if draft_model is not None:
        given["draft_model"] = load_draft_model(draft_model, model, tokenizer)
    return given


DRAFT_MODEL = Method(speculative, {
    "draft_model": dict(type=user_path, metavar="DIR", help="folder of a smaller LLaMA"),
    "length": dict(type=int, metavar="L", help="drafts per step"),
}, draft_options)
