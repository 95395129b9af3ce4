"""New texts on the host: where they end, and how many steps and drafts they took."""
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class RowStep(NamedTuple):
    """What a step made for one row."""
    tokens: list[int]
    accepted: int  # drafts; they stand just before the last token
    finite: bool  # Were all logits of the target finite so far?


@dataclass
class Text:
    """The new text of one row."""
    room: int  # tokens, at most
    full: str  # what ends the text there
    tokens: list[int] = field(default_factory=list)
    from_draft: list[bool] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)  # accepted ones in the text, per step
    ending: str = ""  # "stop", "length", "context"; or it goes on

    def grow(self, made: RowStep, stops: Collection[int]) -> list[tuple[int, bool]]:
        """Add what a step made, up to the end of the text. Returns what was added, as (token, was
        it a draft?)."""
        first = len(made.tokens) - 1 - made.accepted
        before = len(self.tokens)
        for i, token in enumerate(made.tokens):
            self.tokens.append(token)
            self.from_draft.append(first <= i < first + made.accepted)
            if token in stops:
                self.ending = "stop"
            elif len(self.tokens) == self.room:
                self.ending = self.full
            if self.ending:
                break
        added = list(zip(self.tokens[before:], self.from_draft[before:]))
        self.drafts.append(sum(from_draft for _, from_draft in added))
        return added


def new_texts(prompts: list[list[int]], max_new_tokens: int, context: int) -> list[Text]:
    """A Text per prompt. context: tokens of prompt and text, at most."""
    texts = []
    for prompt in prompts:
        room = context - len(prompt)
        full = "length" if max_new_tokens <= room else "context"
        texts.append(Text(min(max_new_tokens, room), full))
    return texts


def rows_of(result: Tensor, drafts: int) -> list[RowStep]:
    """What a step made, from the tensor (B,n+3) that `Sampler.advance` returns: per row a block
    whose last `drafts` tokens are drafts, the last token, how many of the block are kept, and
    whether all logits were finite. This waits for the device."""
    rows = []
    for *block, last, count, finite in result.tolist():
        own = len(block) - drafts  # tokens of the target's own, before the drafts
        rows.append(RowStep([*block[:count], last], count - own, bool(finite)))
    return rows


def figures(texts: list[Text], drafts: int, passes: int) -> dict:
    """What came of texts. drafts and passes: per step.

    tokens and from_draft, lists per row; stop_reason per row: "stop", "length" or "context"; steps
    per row; passes of the model, prefill apart; accepted_at_least, the share of steps that kept
    d_1, d_1 and d_2, ..; tokens_per_pass, in the mean over the rows' own steps.
    """
    steps = [len(text.drafts) for text in texts]
    kept = []
    for i in range(drafts):
        kept.append(sum(n > i for text in texts for n in text.drafts))
    tokens = [text.tokens for text in texts]
    per_step = sum(map(len, tokens)) / sum(steps)
    return {
        "tokens": tokens,
        "from_draft": [text.from_draft for text in texts],
        "stop_reason": [text.ending for text in texts],
        "steps": steps,
        "passes": max(steps) * passes,
        "accepted_at_least": [round(n / sum(steps), 4) for n in kept],
        "tokens_per_pass": round(per_step / passes, 4),
    }
