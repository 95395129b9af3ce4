"""New texts on the host: where they end, and how many steps and drafts they took."""
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple


class RowStep(NamedTuple):
    """What a step made of one row."""
    tokens: list[int]
    accepted: int  # drafts; they stand just before the last token
    finite: bool  # Are the logits that the target has given so far?


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


def figures(texts: list[Text], drafts: int, passes: int) -> dict:
    """What `Sampler.generate` returns, but for times. drafts and passes: per step."""
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
