"""How bad input ends: with one line that names the cause and the remedy, and exit code 2."""
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable
from numbers import Integral
from types import ModuleType

import torch

from support import leave

DTYPES = {
    "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float32": torch.float32, "float64": torch.float64,
}


class InputError(ValueError):
    """Bad input. `run_script` shows its text, which is one line, and exits with code 2."""


# How PyTorch says that something does not fit.
MEMORY = re.compile("(out of|not enough) memory|allocate|ALLOC_FAILED|calculation overflowed")


def run_script(main: Callable) -> None:
    """Run a script's main(): bad input is one line on stderr and exit code 2, Ctrl-C is 130."""
    if sys.stdout is None or sys.stderr is None:
        sys.exit(2)  # They are closed: there is nowhere to say so.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for characters that the terminal cannot show
    try:
        if signal.getsignal(signal.SIGINT) is leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not MEMORY.search(str(error)):
            raise
        print(f"error: not enough memory: {str(error).splitlines()[0][:200] or 'ask for less'}",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # of stdout: a full disk; or `| head -1`, where nobody reads on
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # or Python complains once more as it ends
        if not isinstance(error, BrokenPipeError):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)


def check_seed(seed: int) -> None:
    """Raise InputError for a seed from which not all random numbers could be derived."""
    check_number("seed", seed, 2**40 - 1, 0)


def check_number(name: str, value: int, largest: int, least: int = 1) -> None:
    """Raise InputError for what is no whole number from `least` to `largest`."""
    if not isinstance(value, Integral) or not least <= value <= largest:
        raise InputError(f"{name} must be {least} to {largest}, not {value}")


def check_options(method: str, given: dict, known: list[str], needed: list[str]) -> None:
    """Raise InputError for options that a method does not have, or needs and was not given."""
    for name in given:
        if name not in known:
            raise InputError(f"{name} has no effect on method {method}, which has: "
                             f"{', '.join(known) or 'no options'}")
    for name in needed:
        if given.get(name) is None:
            raise InputError(f"method {method} needs a {name}")


def device_named(name: str | None) -> torch.device:
    """The device of --device; None is a GPU where there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # A CUDA graph is recorded on the current device.
        elif device.type != "cpu":
            raise RuntimeError
        return device
    except (RuntimeError, AssertionError):
        raise InputError(f"device {name!r} cannot be used here; --device cpu always can") from None


def extra(module: str, remedy: str = "pip install -r requirements-bench.txt") -> ModuleType:
    """An optional package. Raises InputError that names the remedy where the package is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"this needs the package {module.split('.')[0]}: {remedy}") from None
