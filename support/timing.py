"""Times that compare: functions that take turns, ratios and their intervals."""
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from support.terminal import progress

RESAMPLES = 2000  # of a bootstrap


def interleaved(functions: dict[str, Callable], units: list, rounds: int, what: str
                ) -> dict[str, Tensor]:
    """Seconds {name: (units,rounds)} of functions {name: f(unit, round) -> seconds}.

    What disturbs a machine lasts for seconds or minutes. So on each unit all functions take turns,
    each time another one first; and each is called once before, to warm up.
    """
    names = list(functions)
    seconds = {name: torch.zeros(len(units), rounds) for name in names}
    for function in functions.values():
        function(units[0], 0)
    with progress(rounds * len(units), what, "turn", leave=False) as bar:
        for r, i in itertools.product(range(rounds), range(len(units))):
            first = (r + i) % len(names)
            for name in names[first:] + names[:first]:
                seconds[name][i, r] = functions[name](units[i], r)
            bar.update()
    return seconds


def interval(ratios: Tensor) -> tuple[float, float, float]:
    """Median of ratios (units,rounds) and its 95 % interval, (middle, low, high): the bootstrap
    draws units anew, and of each its rounds."""
    generator = torch.Generator().manual_seed(0)
    n, rounds = ratios.shape
    unit = torch.randint(n, (RESAMPLES, n, 1), generator=generator)
    turn = torch.randint(rounds, (RESAMPLES, n, rounds), generator=generator)
    return ratios.quantile(0.5).item(), *middle_95(ratios[unit, turn].flatten(1).quantile(0.5, 1))


def middle_95(values: Tensor) -> list[float]:
    """[low, high] of what a bootstrap found."""
    return values.quantile(values.new_tensor([0.025, 0.975])).tolist()


def factors(counts: Tensor, costs: Tensor) -> dict[str, tuple[float, float, float]]:
    """Tokens per step, the cost of a step, and the gain, which is their quotient: each the value
    and its 95 % interval, (middle, low, high).

    counts (n,2): new tokens and steps of n prompts, of which the bootstrap draws n anew. costs
    (rounds,): seconds of a step / seconds of a plain step in the same round. Their median counts.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(len(counts), (RESAMPLES, len(counts)), generator=generator)
    tokens, steps = counts.double()[prompt].sum(1).unbind(1)
    turn = torch.randint(len(costs), (RESAMPLES, len(costs)), generator=generator)
    drawn = {"tokens per step": tokens / steps, "cost": costs.double()[turn].quantile(0.5, 1)}
    tokens, steps = counts.sum(0).tolist()
    middle = {"tokens per step": tokens / steps, "cost": costs.quantile(0.5).item()}
    for all_of in (drawn, middle):
        all_of["gain"] = all_of["tokens per step"] / all_of["cost"]
    return {name: (middle[name], *middle_95(drawn[name])) for name in middle}


def in_columns(found: dict[str, tuple[float, float, float]]) -> dict[str, float]:
    """What `factors` found, as columns of a table."""
    row = {}
    for what, (middle, low, high) in found.items():
        row |= {what: middle, f"{what} from": low, f"{what} to": high}
    return row
