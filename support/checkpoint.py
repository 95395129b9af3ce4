"""What a training leaves on disk: its checkpoints, look-ahead files, texts that a model wrote.

The folder of a model is read by model.py.
"""
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import safe_open
from torch import Tensor, nn

from support.data import Texts
from support.errors import DTYPES, InputError
from support.storage import open_tensors, write_tensors

# --------------------------------------------------- which model


def fingerprint(config) -> str:
    """Names the model that a file was made for: a hash of what shapes the model. So models of one
    shape share it."""
    shape = repr(replace(config, dtype="", stop_tokens=()))
    return hashlib.sha256(shape.encode()).hexdigest()[:16]


def digest(model: nn.Module, *tensors: Tensor) -> str:
    """A hash of tensors, and of where each weight of a model begins, in whatever type."""
    found = hashlib.sha256()
    for tensor in (*tensors, *(weight.detach()[:1].float().cpu() for weight in model.parameters())):
        found.update(repr(tensor.shape).encode())
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


# ------------------------------------------ interrupted trainings

def check_no_checkpoint(path: Path, resume: bool) -> None:
    """Raise InputError where a run would overwrite what another has saved."""
    if path.exists() and not resume:
        raise InputError(f"{path} is there: give --resume, or remove it")


def write_checkpoint(path: Path, state: dict, tensors: dict, moments: dict) -> None:
    """Save state, a dict that holds the settings; {name: tensor}; and per tensor what the optimizer
    knows of it, {name: {key: tensor}}."""
    tensors = dict(tensors)
    for name, values in moments.items():
        for key, value in values.items():
            tensors[f"{name}/{key}"] = value
    write_tensors(tensors, path, {"state": json.dumps(state)})


def read_checkpoint(path: Path, settings: dict, tensors: dict, moments: dict) -> dict:
    """Fill tensors and moments; return the state. Raises InputError for other settings."""
    with open_tensors(path) as file:
        state = state_of(file, path, settings)
        if {key.partition("/")[0] for key in file.keys()} != set(tensors):
            raise InputError(f"{path} is damaged: remove it to begin anew")
        for key in file.keys():
            name, _, moment = key.partition("/")
            if moment:  # Optimizers keep their count of steps on the CPU.
                device = "cpu" if moment == "step" else tensors[name].device
                moments[name][moment] = file.get_tensor(key).to(device)
            else:
                tensors[name].data.copy_(file.get_tensor(key))
    return state


def state_of(file: safe_open, path: Path, settings: dict) -> dict:
    """The state in an open checkpoint, which must have been made with these settings."""
    try:
        state = json.loads(file.metadata()["state"])
        made_with = dict(state["settings"])
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path} is no checkpoint, or damaged: remove it to begin anew") from None
    other = [f"{key} {made_with.get(key)}, now {value}" for key, value in settings.items()
             if made_with.get(key) != value]
    if other:
        raise InputError(f"{path} was made with other settings ({', '.join(other)}): give those, "
                         f"or remove it to begin anew")
    return state


# ------------------------------------------------ look-ahead files

def read_lookahead(path: Path, config, shapes: dict, length: int | None = None
                   ) -> tuple[dict, dict]:
    """{name: tensor} and {temperature: acceptance} of a file that train_lookahead.py wrote.

    shapes: {name: shape} of the tensors that a file may have; a size of None may be any. length:
    take so many of the embeddings. An acceptance is a table of `train_lookahead.evaluate`.
    Raises InputError where the file is damaged or for another model.
    """
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        about = (file.metadata() or {}).get("lookahead", "{}")
    try:
        about = json.loads(about)
        acceptance = {float(t): row for t, row in about.get("acceptance", {}).items()}
        for row in acceptance.values():
            check_acceptance(row)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: its metadata is damaged: {error!r}") from None
    if about.get("model", fingerprint(config)) != fingerprint(config):
        raise InputError(f"{path} was trained for another model; train one for this model with "
                         f"train_lookahead.py")
    if "embeddings" not in tensors or not set(tensors) <= set(shapes):
        raise InputError(f"{path} is no look-ahead file that is known here: its tensors, such as "
                         f"{', '.join([*tensors][:4])}, are not of {', '.join(shapes)}; "
                         f"`import beyond` adds others")
    for name, tensor in tensors.items():
        wanted = shapes[name]
        fits = tensor.ndim == len(wanted) and tensor.numel() > 0 and tensor.dtype in DTYPES.values()
        fits = fits and all(b in (None, a) for a, b in zip(tensor.shape, wanted))
        if not fits or not tensor.isfinite().all():
            sizes = ", ".join("any" if size is None else str(size) for size in wanted)
            raise InputError(f"{path}: {name} must be finite floats of shape ({sizes}), not "
                             f"{tensor.dtype} {tuple(tensor.shape)}: damaged, or for another "
                             f"model?")
    L = len(tensors["embeddings"])
    if length is not None and length > L:
        raise InputError(f"{path} has {L} look-ahead tokens, fewer than --length {length}")
    tensors["embeddings"] = tensors["embeddings"][:length]
    return tensors, acceptance


def check_acceptance(row: dict) -> None:
    """Raise ValueError, TypeError or KeyError for what is no table of numbers."""
    shares = [row["expected"], *row["by_position"]]
    for ranks in row["by_rank"]:
        shares += ranks
    ranks_there = row["by_rank"] and all(row["by_rank"])
    if not ranks_there or not all(0 <= share < math.inf for share in shares):
        raise ValueError("acceptance must be numbers")


# ---------------------------------------- texts that a model wrote

def write_texts(texts: Texts, path: Path, config) -> None:
    """Save texts that the model of this config wrote."""
    tensors = texts._asdict()
    tensors["texts"] = tensors.pop("tokens").int()
    write_tensors(tensors, path, {"texts": fingerprint(config)})


def read_texts(path: Path, config) -> Texts:
    """The texts of a file that beyond/own_texts.py made for this model. Files from before it held
    texts out have only tokens: all are to train on, their prompts too."""
    with open_tensors(path) as file:
        if (file.metadata() or {}).get("texts") != fingerprint(config):
            raise InputError(f"{path} has no texts by this model: make some with beyond.own_texts")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    tokens = tensors.pop("texts").long()
    N, T = tokens.shape
    none = torch.zeros(N, dtype=torch.float64)
    old = Texts(tokens, torch.full((N,), 1), torch.full((N,), T), none, none.bool())
    return old._replace(**tensors)
