"""Files that are written whole or not at all; JSON and tensors in files, as safetensors."""
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.errors import InputError

# ------------------------------------------------------- reading


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises InputError where there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        json.dumps(content, ensure_ascii=False).encode()  # fails for half a character, "\\ud800"
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {reason(error, path)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold one JSON object, not {str(content)[:40]!r}")
    return content


def reason(error: Exception, path: Path) -> str:
    """What an error says, on one line; or that the file is what Git LFS leaves in place of one."""
    try:
        with open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                return "it is a Git LFS pointer; fetch the file itself with: git lfs pull"
    except (OSError, ValueError):
        pass
    return " ".join(str(error).split())


def open_tensors(path: Path) -> safe_open:
    """An open safetensors file. Raises InputError where it cannot be opened."""
    if Path(path).is_dir():
        raise InputError(f"{str(path)!r} is a folder, and should be a safetensors file")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {reason(error, path)}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or the shards that an index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return [folder / "model.safetensors"]
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise InputError(f"{index} has no weight_map of tensors to files")
    return [folder / name for name in sorted(set(named.values()))]


FLOATS = ("F64", "F32", "F16", "BF16")  # types of weights in files


def copy_tensor(target: torch.Tensor, file: safe_open, name: str, path: Path) -> None:
    """Copy tensor `name` of an open file to its place, where it must fit and be finite."""
    source = file.get_slice(name)
    found = f"{source.get_dtype()} {source.get_shape()}"
    if source.get_shape() != list(target.shape) or source.get_dtype() not in FLOATS:
        raise InputError(f"{path}: {name} is {found}, expected {' or '.join(FLOATS)} "
                         f"{list(target.shape)}")
    if not target.copy_(file.get_tensor(name)).isfinite().all():
        raise InputError(f"{path}: {name} has numbers that are not finite in {target.dtype}: "
                         f"damaged?")


# ------------------------------------------------------- writing

def check_writable(path: Path) -> None:
    """Raise InputError now where a file could not be written later, when the work is done."""
    target = Path(os.path.realpath(path))  # what a symlink points to; itself where links circle
    if path.exists() and not path.is_file():  # a device, a pipe, or a folder
        possible = not path.is_dir() and os.access(path, os.W_OK)
    else:
        folder = target.parent
        possible = folder.is_dir() and os.access(folder, os.W_OK) and not target.is_symlink()
    if not possible:
        raise InputError(f"cannot write {path}: its folder must exist and be writable, and it must "
                         f"not be a folder itself")


def write_file(path: Path, save: Callable[[Path], object]) -> None:
    """save(path), by way of a new temporary file: whenever we are killed, the file is whole or old.

    A file that is there keeps its mode. Where `path` is a symlink, what it points to is written. A
    device or a pipe is written to and stays what it is.
    """
    target = Path(os.path.realpath(path))
    special = path.exists() and not path.is_file()
    temporary = None
    try:
        if target.is_symlink():
            raise OSError("symlinks that point to each other")
        beside = None if special else target.parent
        number, name = tempfile.mkstemp(dir=beside, prefix=f"{target.name[:100]}.")
        os.close(number)
        temporary = Path(name)
        save(temporary)
        if special:
            path.write_bytes(temporary.read_bytes())
            return
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(target.stat().st_mode if target.exists() else 0o666 & ~umask)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}") from None
    finally:  # after Ctrl-C too
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, through `write_file`."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict | None = None
                  ) -> None:
    """Save {name: tensor} as safetensors, through `write_file`."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata))
