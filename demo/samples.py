"""Are two samples of texts from one distribution? For `bench.py quality` and demo/humaneval.py."""
import statistics

import torch

from model import Cache


def two_sample(a, b, rounds=9999):
    """p-value of a permutation test of equal means. a, b (prompts,samples): under the null
    hypothesis, that all samples of a prompt come from one distribution, any exchange between a and
    b within a prompt is as likely."""
    both = torch.cat([a, b], 1).double()
    n = a.shape[1]
    order = torch.rand(rounds, *both.shape, generator=torch.Generator().manual_seed(0)).argsort(2)
    shuffled = both.expand(rounds, -1, -1).gather(2, order)

    def gap(x):
        return (x[..., :n].mean((-2, -1)) - x[..., n:].mean((-2, -1))).abs()

    return (1 + (gap(shuffled) >= gap(both) - 1e-12).sum().item()) / (1 + rounds)


def power(a, shift):
    """The chance that `two_sample` finds, at 0.05, a shift of the mean of a (prompts,samples)."""
    error = (2 * a.var(1).mean() / a.numel()).sqrt().clamp(min=1e-12)
    return statistics.NormalDist().cdf(shift / error.item() - 1.96)


def figures(model, prompt, text):
    """What a sample is judged by: mean log p, and % of distinct pairs."""
    tokens = torch.tensor([prompt + text], device=model.embedding.device)
    h = model(tokens[:, :-1], Cache(model, 1, tokens.shape[1]))[0, len(prompt) - 1:]
    log_p = model.logits(h).float().log_softmax(-1).gather(1, tokens[0, len(prompt):, None])
    pairs = list(zip(text, text[1:]))
    return log_p.mean().item(), 100 * len(set(pairs)) / max(1, len(pairs))
