"""What the scripts read and write: prompts, files, folders, tokenizers; and how they fail.

A reader of the method can skip this file. Bad input raises InputError, whose text is one line that
names the cause and the remedy. Output is written whole or not at all.
"""
import argparse
import codecs
import contextlib
import ctypes
import hashlib
import importlib
import json
import math
import os
import platform
import re
import select
import shlex
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

# --------------------------------------------------- errors


class InputError(ValueError):
    """Bad input. `run_script` shows its text, which is one line, and exits with code 2."""


# How PyTorch says that something does not fit.
MEMORY = re.compile("(out of|not enough) memory|allocate|ALLOC_FAILED|calculation overflowed")


def run_script(main):
    """Run a script's main(): bad input is one line on stderr and exit code 2, Ctrl-C 130."""
    if sys.stdout is None or sys.stderr is None:
        sys.exit(2)  # closed: there is nowhere to say so
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what the terminal cannot show
    try:
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
    except OSError as error:  # of stdout: a full disk, or `| head -1`, where nobody reads on
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # or Python complains once more as it ends
        if not isinstance(error, BrokenPipeError):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)


def check_seed(seed):
    """Raise InputError for a seed from which not all random numbers could be derived."""
    if not 0 <= seed < 2**40:
        raise InputError(f"seed must be 0 to 2**40 - 1, not {seed}")


def check_number(name, value, largest):
    """Raise InputError for what is not 1 to `largest`."""
    if not 1 <= value <= largest:
        raise InputError(f"{name} must be 1 to {largest}, not {value}")


def device_named(name):
    """torch.device for --device; None is a GPU where there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a graph is recorded on the current one
        elif device.type != "cpu":
            raise RuntimeError
        return device
    except (RuntimeError, AssertionError):
        raise InputError(f"device {name!r} cannot be used here; --device cpu always can") from None


def extra(module, remedy="pip install -r requirements-bench.txt"):
    """An optional package. Where it is missing, InputError names the remedy."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"this needs the package {module.split('.')[0]}: {remedy}") from None


# ----------------------------------------- reading, writing

def read_json(path):
    """The object, a dict, in a JSON file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {said(error, path)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold one JSON object, not {str(content)[:40]!r}")
    return content


def said(error, path):
    """What an error says, on one line; or that the file is what Git LFS leaves in place of one."""
    try:
        with open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                return "it is a Git LFS pointer; fetch the file itself with: git lfs pull"
    except OSError:
        pass
    return " ".join(str(error).split())


def open_tensors(path):
    """An open safetensors file."""
    if Path(path).is_dir():
        raise InputError(f"{str(path)!r} is a folder, and should be a safetensors file")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {said(error, path)}") from None


def weight_files(folder):
    """The safetensors files of a model folder."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return [folder / "model.safetensors"]
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise InputError(f"{index} has no weight_map of tensors to files")
    return [folder / name for name in sorted(set(named.values()))]


def check_writable(path):
    """Raise InputError now where a file could not be written later, when the work is done."""
    target = Path(os.path.realpath(path))  # what a symlink points to; itself where they circle
    if path.exists() and not path.is_file():  # a device, a pipe, or a folder
        possible = not path.is_dir() and os.access(path, os.W_OK)
    else:
        folder = target.parent
        possible = folder.is_dir() and os.access(folder, os.W_OK) and not target.is_symlink()
    if not possible:
        raise InputError(f"cannot write {path}: its folder must exist and be writable, and it must "
                         f"not be a folder itself")


def check_no_checkpoint(path, resume):
    """Raise InputError where a run would overwrite what another has saved."""
    if path.exists() and not resume:
        raise InputError(f"{path} is there: give --resume, or remove it")


def write_file(path, save):
    """save(path), by way of a temporary name: whenever we are killed, the file is whole or old.

    What a symlink points to is written; a device or a pipe is written to and stays what it is.
    """
    target = path.resolve()
    temporary = target.with_name(target.name + ".tmp")
    try:
        if path.exists() and not path.is_file():
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / path.name
                save(temporary)
                path.write_bytes(temporary.read_bytes())
            return
        temporary.touch()
        mode = temporary.stat().st_mode
        save(temporary)
        temporary.chmod(mode)  # safetensors' own files are for their owner only
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}") from None
    finally:  # after Ctrl-C too
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_tensors(tensors, path, metadata=None):
    """Save {name: tensor} as safetensors, through `write_file`."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata))


# -------------------------- options, prompts, text, figures

def new_parser(about):
    """An ArgumentParser whose --help shows the head of a module as it stands."""
    return argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_common(add, model_required=True):
    """The words that scripts share. add: parser.add_argument."""
    add("--model", type=Path, required=model_required, help="folder of a Hugging Face LLaMA")
    add("--dtype", choices=DTYPES,
        help="of the weights (default: the folder's; decoding on an x86 CPU: float16 for bfloat16)")
    add("--device", help="cpu or cuda (default: a GPU, if there is one)")
    add("--seed", type=int, default=0, help="of all random numbers (default: 0)")


def add_data(add):
    """The words that `read_data` takes."""
    add("--data", type=Path, nargs="+", required=True, help="text files, and folders of them")
    add("--suffix", default="", help="of the files in folders, such as .py (default: all)")


def add_prompt(parser):
    """The words that `read_prompt` reads."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue")
    source.add_argument("--prompt-file", type=Path, help="file whose text to continue")
    source.add_argument("stdin", nargs="?", choices=["-"], help="continue standard input")


DEFAULT_PROMPT = "def fibonacci(n):\n"


def read_prompt(args):
    """The text to continue: standard input, --prompt-file, --prompt, or else what is piped in."""
    try:
        if args.stdin or args.prompt is None and args.prompt_file is None and is_piped(sys.stdin):
            if sys.stdin is None:
                raise OSError("standard input is closed")
            text = sys.stdin.buffer.read().decode("utf-8-sig")
        elif args.prompt_file is not None:
            text = args.prompt_file.read_bytes().decode("utf-8-sig")
        else:
            text = DEFAULT_PROMPT if args.prompt is None else args.prompt
        text.encode()  # a command line that is not UTF-8 fails here
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot read the prompt: {error}") from None
    if not text:
        raise InputError("the prompt is empty; give --prompt TEXT, --prompt-file FILE, or - for "
                         "standard input")
    return text


def is_piped(stream):
    """Is there text on standard input that nobody typed?"""
    try:
        ready = not stream.isatty() and select.select([stream], [], [], 0)[0]
        return bool(ready) and bool(stream.buffer.peek(1))
    except (AttributeError, OSError, ValueError):
        return False


def read_prompts(args, tokenizer, config):
    """{kind: prompts, as lists of token ids} of args.prompts, a JSON file."""
    texts = read_json(args.prompts)
    prompts = {}
    for kind in args.kinds or texts or ["code"]:  # an empty file has no code
        some = texts.get(kind)
        if not isinstance(some, list) or not all(isinstance(text, str) for text in some):
            raise InputError(f"{args.prompts} must hold {{kind: [text, ..]}}, and has no such "
                             f"{kind!r}")
        prompts[kind] = [tokenizer.encode(text) for text in some[:args.count]]
        check_prompts(prompts[kind], args.new_tokens, config)
        longest = max(map(len, prompts[kind]))
        if longest + args.new_tokens > config.context:  # a text cut short would not compare
            raise InputError(f"a prompt of {longest} tokens and {args.new_tokens} new ones are "
                             f"more than the model's context of {config.context}")
    return prompts


def check_options(method, options, known):
    """Raise InputError for options that the method does not have or misses. known: its own, as
    {name: inspect.Parameter}."""
    for name in options:
        if name not in known:
            raise InputError(f"{name} has no effect on method {method}, which has: "
                             f"{', '.join(known) or 'no options'}")
    for name, option in known.items():
        if option.default is option.empty and options.get(name) is None:
            raise InputError(f"method {method} needs a {name}")


def check_prompts(prompts, max_new_tokens, config, rows=math.inf, context=math.inf):
    """Raise InputError for what cannot be continued. rows, context: of a Sampler."""
    context = min(context, config.context)
    if not prompts or max_new_tokens < 1:
        raise InputError("at least one prompt and one new token are needed")
    if len(prompts) > rows:
        raise InputError(f"{len(prompts)} prompts for a Sampler of {rows} rows")
    for prompt in prompts:
        if not isinstance(prompt, list) or not all(isinstance(token, int) for token in prompt):
            raise InputError("prompts must be a list of lists of token ids")
        if not prompt:
            raise InputError("the prompt is empty; give at least one token")
        if len(prompt) >= context:
            raise InputError(f"the prompt has {len(prompt)} tokens and a text at most {context}: "
                             f"shorten the prompt")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise InputError(f"the prompt has tokens from {min(prompt)} to {max(prompt)}, the "
                             f"model 0 to {config.vocab_size - 1}: is it the model's tokenizer?")


def has_colour():
    """Is stdout a terminal that may be coloured?"""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def printer(tokenizer, prompt):
    """An on_token function: writes row 0 as it is made. On a terminal the prompt stands before it,
    and accepted drafts are green."""
    to_text = tokenizer.stream()
    colour = has_colour()
    if sys.stdout.isatty():
        print(f"\033[2m{prompt}\033[0m" if colour else prompt, end="", flush=True)

    def on_token(row, token, from_draft):
        text = to_text(token) if row == 0 else ""
        if text:
            text = f"\033[32m{text}\033[0m" if colour and from_draft else text
            print(text, end="", flush=True)

    return on_token


def report(result, tokenizer, as_json):
    """Print what `printer` has not: the texts of the other rows, and figures; or all as JSON."""
    texts = [tokenizer.decode(row) for row in result["tokens"]]
    if as_json:
        print(json.dumps(result | {"text": texts}))
        return
    for i, text in enumerate(texts[1:], 2):
        print(f"\n--- sample {i}\n{text}", end="")
    print()
    legend = "; green: accepted drafts" if has_colour() else ""
    print(summary(result) + legend, file=sys.stderr)


def summary(result):
    """A line of figures. Recording a graph is not counted in the speed."""
    tokens = sum(map(len, result["tokens"]))
    seconds = result["seconds"] - result["capture_seconds"]
    each = " and text" if len(result["tokens"]) > 1 else ""
    shares = " ".join(f"{share:.2f}" for share in result["accepted_at_least"])
    kept = f"at least 1, 2, .. drafts accepted in {shares} of steps, " if shares else ""
    return (f"method {result['method']} on {result['device']}: {tokens} tokens, "
            f"{result['passes']} passes, {result['tokens_per_pass']:.2f} tokens per pass{each}, "
            f"{kept}{seconds:.2f} s "
            f"({result['prefill_seconds']:.2f} s of it prefill), "
            f"{tokens / seconds:.1f} tokens/s")


# ------------------------------------------------- config.json

# What model.py computes. A checkpoint that wants anything else is refused by name.
ONLY = {
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "sliding_window": None, "quantization_config": None, "partial_rotary_factor": 1.0,
}
DTYPES = {
    "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float32": torch.float32, "float64": torch.float64,
}
# Kinds of rotary scaling, and the numbers that each needs.
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_config(folder):
    """The fields of model.Config, a dict, from folder/config.json and generation_config.json."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if "model_type" not in raw:
        raise InputError(f"{path} has no model_type; expected the config.json of a LLaMA")
    for key, supported in ONLY.items():
        if raw.get(key) is not None and raw[key] != supported:
            raise InputError(f"{path}: {key} = {raw[key]!r} is not supported, only "
                             f"{supported!r}")

    def number(key, default=None, type_=int, source=raw):
        value = source.get(key)
        value = default if value is None else value
        largest = 2**31 if type_ is int else 1e30
        if type(value) not in (int, type_) or not 0 < value < largest:
            raise InputError(f"{path}: {key} must be a positive {type_.__name__}, not "
                             f"{str(value)[:40]}")
        return type_(value)

    # Rotary settings, with the precedence of transformers: `rope_scaling`, else
    # `rope_parameters`; in either `rope_theta`, else the one beside it.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rotary scaling must be an object, not {str(rope)[:40]!r}")
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(scaling, str) or scaling not in SCALINGS:
        raise InputError(f"{path}: rotary scaling {scaling!r} is not supported, only "
                         f"{', '.join(SCALINGS)}")
    numbers = {key: number(key, None, float, rope) for key in SCALINGS[scaling]}
    rope_theta = number("rope_theta", number("rope_theta", 10000.0, float), float, rope)

    n_heads = number("num_attention_heads")
    n_kv_heads = number("num_key_value_heads", n_heads)
    dim = number("hidden_size")
    head_dim = number("head_dim", dim // n_heads)
    if n_heads % n_kv_heads or head_dim % 2:
        raise InputError(f"{path}: {n_heads} heads must be a multiple of {n_kv_heads} "
                         f"key/value heads, and head_dim {head_dim} even")
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{path}: dtype {dtype!r} is not supported, only {', '.join(DTYPES)}")

    # generation_config.json comes first, as in transformers.
    generation = Path(folder) / "generation_config.json"
    stop = read_json(generation).get("eos_token_id") if generation.exists() else None
    if stop is None:
        stop = raw.get("eos_token_id")
    if not isinstance(stop, list):
        stop = [] if stop is None else [stop]
    if not all(type(token) is int for token in stop):
        raise InputError(f"{path}: eos_token_id must be a token's id or a list of them, not "
                         f"{stop}")

    return dict(
        vocab_size=number("vocab_size"),
        dim=dim,
        ffn_dim=number("intermediate_size"),
        n_layers=number("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        norm_eps=number("rms_norm_eps", 1e-6, float),
        rope_theta=rope_theta,
        rope={"rope_type": scaling, **numbers},
        context=number("max_position_embeddings", 2048),
        tied=bool(raw.get("tie_word_embeddings", False)),
        dtype=dtype,
        stop_tokens=tuple(stop),
    )


# ------------------------------------------------ tokenizer

class Tokenizer:
    """Text to token ids and back.

    encode(text) gives ids, with the beginning-of-text token where the model uses one. pieces[id] is
    a token's bytes: none for control tokens, one of a character's for byte fallback. unk is the
    unknown token's id, or None.
    """

    def __init__(self, encode, pieces, unk):
        self.unchecked = encode
        self.pieces = pieces
        self.unk = unk

    def encode(self, text):
        """Token ids; raises InputError for what is no Unicode text, such as half a character."""
        try:
            text.encode()
        except UnicodeError as error:
            raise InputError(f"not a text: {error}") from None
        return self.unchecked(text)

    def stream(self):
        """A function from the next token id to the text that became whole with it.

        Bytes are put together, not texts: a character of several tokens appears with its last one.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(self.pieces[token] if token < len(self.pieces) else b"")

    def decode(self, tokens):
        """The text that `stream` gives for all of `tokens`."""
        return "".join(map(self.stream(), tokens))


def load_tokenizer(folder, vocab_size):
    """folder/tokenizer.model, or folder/tokenizer.json through the optional package `tokenizers`.

    Raises InputError where it is missing, damaged, or larger than the model's vocabulary (but for
    special tokens, which need not be used).
    """
    folder = Path(folder)
    config = folder / "tokenizer_config.json"
    config = read_json(config) if config.exists() else {}
    model, other = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model.exists() and not other.exists():
        raise InputError(f"{folder} has neither tokenizer.model nor tokenizer.json")
    tokenizer = None
    if model.exists():
        try:
            tokenizer = from_sentencepiece(model, config)
        except InputError:
            if not other.exists():
                raise
    tokenizer = tokenizer or from_tokenizers(other, config)
    if any(tokenizer.pieces[vocab_size:]):
        raise InputError(f"the tokenizer of {folder} has {len(tokenizer.pieces)} pieces and the "
                         f"model a vocabulary of {vocab_size}: they do not belong together")
    return tokenizer


def sentencepiece_bytes(piece):
    """The bytes of a sentencepiece: "<0x41>" is a byte, and a space is written as U+2581."""
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("\u2581", " ").encode()


def named_token(token):
    """A token in tokenizer_config.json is a string, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def added_tokens(folder, config):
    """{content: (id, special)} of what stands beside a tokenizer.model, in added_tokens.json and in
    tokenizer_config.json."""
    listed = folder / "added_tokens.json"
    named = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {named_token(config.get(name)) for name in named}
    found = {}
    for content, i in (read_json(listed) if listed.exists() else {}).items():
        found[content] = (i, content in special)
    decoder = config.get("added_tokens_decoder")
    for i, token in (decoder if isinstance(decoder, dict) else {}).items():
        content = named_token(token)
        if content and str(i).isdecimal():
            found[content] = (int(i), isinstance(token, dict) and bool(token.get("special")))
    for content, (i, _) in found.items():
        if not content or type(i) is not int or not 0 <= i < 2**24:
            raise InputError(f"{listed}: {content!r} has the id {i!r}, which is none")
    return found


def from_sentencepiece(path, config):
    """tokenizer.model, and the tokens that were added to it."""
    from sentencepiece import SentencePieceProcessor
    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot read {path}: {said(error, path)}") from None
    bos = []
    if config.get("add_bos_token", True) and sp.bos_id() >= 0:
        bos = [sp.bos_id()]
    pieces = []
    for i in range(sp.vocab_size()):
        silent = sp.is_control(i) or sp.is_unused(i)
        pieces.append(b"" if silent else sentencepiece_bytes(sp.id_to_piece(i)))
    added = {}
    for content, (i, special) in added_tokens(path.parent, config).items():
        if i >= sp.vocab_size():
            added[content] = i
            pieces += [b""] * (i + 1 - len(pieces))
            pieces[i] = b"" if special else content.encode()
    longest_first = sorted(added, key=len, reverse=True)
    split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(text):
        tokens = list(bos)
        for part in split.split(text) if added else [text]:
            tokens += [added[part]] if part in added else sp.encode(part)
        return tokens

    return Tokenizer(encode, pieces, sp.unk_id() if sp.unk_id() >= 0 else None)


def byte_alphabet():
    """{character: byte} of GPT-2: printable bytes as they are, the others from character 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable}
    alphabet |= {chr(256 + i): b for i, b in enumerate(others)}
    return alphabet


def from_tokenizers(path, config):
    """tokenizer.json, if it is of the kinds that LLaMAs have."""
    tokenizers = extra("tokenizers", "pip install -r requirements-smollm2.txt")
    try:
        hf = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise InputError(f"cannot read {path}: {said(error, path)}") from None
    hf.no_truncation()  # the file may have stored them, for training
    hf.no_padding()
    raw = json.loads(hf.to_str())
    decoder = json.dumps(raw["decoder"])
    byte_level = "ByteLevel" in decoder
    if not byte_level and "Metaspace" not in decoder and "\\u2581" not in decoder:
        raise InputError(f"{path}: its decoder, {decoder[:60]}, is not supported, only ByteLevel "
                         f"and Metaspace")
    alphabet = byte_alphabet()
    added = hf.get_added_tokens_decoder()

    def to_bytes(i):
        piece = hf.id_to_token(i) or ""
        if i in added:
            return b"" if added[i].special else added[i].content.encode()
        if not byte_level:
            return sentencepiece_bytes(piece)
        if all(char in alphabet for char in piece):
            return bytes(alphabet[char] for char in piece)
        return piece.encode()

    ids = hf.get_vocab(with_added_tokens=True).values()
    pieces = [to_bytes(i) for i in range(1 + max(ids, default=-1))]
    unk = named_token(config.get("unk_token")) or named_token(raw["model"].get("unk_token"))
    unk = hf.token_to_id(unk) if unk else None
    return Tokenizer(lambda text: hf.encode(text).ids, pieces, unk)


# ------------------------------- tables, what was measured

def cell(value):
    """A number of a table, or a word, as text."""
    if isinstance(value, float):
        digits = 2 - sum(abs(value) >= bound for bound in (10, 100))
        return f"{value:.1g}" if 0 < abs(value) < 0.005 else f"{value:.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def commit():
    """The commit of the code; with a + where a .py file has been changed since."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, check=True, text=True,
                              capture_output=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def tell(parts, path):
    """Print paragraphs (str) and rows of tables (dict) as they come; keep them in a JSON file, if
    path names one. That it can be written is checked before the first part is made."""
    if path:
        check_writable(path)
    text = []
    rows = []
    columns = None
    of_code = commit()
    for part in parts:
        if isinstance(part, str):
            text.append(part)
            columns = None
            print(f"\n{part}", flush=True)
            continue
        if list(part) != columns:
            columns = list(part)
            print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        rows.append(part)
        print(f"| {' | '.join(map(cell, part.values()))} |", flush=True)
    if path:
        about = {"command": shlex.join(sys.argv), "commit": of_code,
                 "python": platform.python_version(), "text": text, "rows": rows}
        content = json.dumps(about, indent=1) + "\n"
        write_file(path, lambda temporary: temporary.write_text(content))


def peak_memory(device, work):
    """Bytes held at most while work() runs, beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before

    def held(word):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(word))

    try:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)  # gives back what was freed
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        before = held("VmRSS")
        work()
        return held("VmHWM") - before
    except OSError as error:
        raise InputError(f"peak memory cannot be measured here: {error}") from None


# ------------------------------- training data, checkpoints

def split_files(paths, suffix):
    """All files below paths, whole: (to train on, held out). Held out is the tenth whose names
    hash lowest."""
    found = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"--data {path} does not exist")
        inside = path.rglob("*") if path.is_dir() else [path]
        for file in inside:
            if file.is_file() and (file == path or file.name.endswith(suffix)):
                found.setdefault(file.resolve(), file)  # each once, by whatever name
    if len(found) < 2:
        of = f" with suffix {suffix}" if suffix else ""
        raise InputError(f"--data has {len(found)} files{of}; at least 2 are needed, as one is "
                         f"held out")
    hashed = sorted(sorted(found.values()), key=lambda f: hashlib.sha256(f.name.encode()).digest())
    tenth = max(1, len(hashed) // 10)
    return sorted(hashed[tenth:]), sorted(hashed[:tenth])


def read_data(tokenizer, paths, suffix, least):
    """Tokens of all files below paths: (N,) to train on and (N,) held out, more than `least`."""
    both = [], []
    for tokens, names in zip(both, split_files(paths, suffix)):
        for name in tqdm(names, "reading", leave=False, disable=None):
            try:
                content = name.read_bytes()
            except OSError as error:
                raise InputError(f"cannot read {name}: {error}") from None
            if b"\0" not in content:  # or it is no text
                tokens += tokenizer.encode(content.decode("utf-8-sig", errors="replace"))
    if min(map(len, both)) <= least:
        raise InputError(f"--data has {len(both[0])} tokens and {len(both[1])} held out; more than "
                         f"{least} of both are needed")
    return [torch.tensor(tokens) for tokens in both]


def windows(tokens, n, length, generator):
    """n random pieces (n,length) of tokens (N,)."""
    starts = torch.randint(len(tokens) - length, (n, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def digest(model, *tensors):
    """Names tensors by what is in them, and a model by where each weight begins."""
    found = hashlib.sha256()
    for tensor in (*tensors, *(weight.detach()[:1].cpu() for weight in model.parameters())):
        found.update(repr(tensor.shape).encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def write_checkpoint(path, state, tensors, moments):
    """state, a dict with its settings; {name: tensor}; {name: what the optimizer knows of it}."""
    tensors = dict(tensors)
    for name, values in moments.items():
        for key, value in values.items():
            tensors[f"{name}/{key}"] = value
    write_tensors(tensors, path, {"state": json.dumps(state)})


def read_checkpoint(path, settings, tensors, moments):
    """Fill tensors and moments; return the state. Raises InputError for other settings."""
    with open_tensors(path) as file:
        try:
            state = json.loads(file.metadata()["state"])
            made_with = dict(state["settings"])
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path} is no checkpoint, or damaged: remove it to begin anew"
                             ) from None
        other = [f"{key} {made_with.get(key)}, now {value}" for key, value in settings.items()
                 if made_with.get(key) != value]
        if other:
            raise InputError(f"{path} was made with other settings ({', '.join(other)}): give "
                             f"those, or remove it to begin anew")
        if {key.partition("/")[0] for key in file.keys()} != set(tensors):
            raise InputError(f"{path} is damaged: remove it to begin anew")
        for key in file.keys():
            name, _, moment = key.partition("/")
            if moment:  # optimizers keep their count of steps on the CPU
                device = "cpu" if moment == "step" else tensors[name].device
                moments[name][moment] = file.get_tensor(key).to(device)
            else:
                tensors[name].data.copy_(file.get_tensor(key))
    return state


# ----------------------------------------- look-ahead files

def fingerprint(config):
    """Names the model that a look-ahead was trained for: a hash of what shapes it, so models of
    one shape share it."""
    shape = repr(replace(config, dtype="", stop_tokens=()))
    return hashlib.sha256(shape.encode()).hexdigest()[:16]


def read_lookahead(path, model, length=None, tokenizer=None):
    """{name: tensor} and the measured acceptance of a file that train_lookahead.py wrote, with the
    first `length` of its L embeddings. Or what path names is no file: see `load_lookahead`.

    Tensors: embeddings (L,D), and of beyond/lookahead.py optionally memory (layers,2,R,K,E), and
    head_in (r,2D) with head_out (D,r). Acceptance: {temperature: table of `evaluate`}.
    Raises InputError where they do not fit the model.
    """
    config = model.config
    if length is not None:
        check_number("length", length, 64)
    if path == "mean":
        return {"embeddings": model.embedding.mean(0).repeat(length or 4, 1)}, {}
    if path == "unk":
        if tokenizer is None or tokenizer.unk is None:
            raise InputError("unk needs a tokenizer that has an unknown token; use mean, or a "
                             "trained file")
        return {"embeddings": model.embedding[tokenizer.unk].repeat(length or 4, 1)}, {}
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        about = (file.metadata() or {}).get("lookahead", "{}")
    try:
        about = json.loads(about)
        acceptance = about.get("acceptance", {})
        for temperature, row in acceptance.items():
            shares = [float(temperature), row["expected"], *row["by_position"]]
            for ranks in row["by_rank"]:
                shares += ranks
            ranks_there = row["by_rank"] and all(row["by_rank"])
            if not ranks_there or not all(0 <= share < math.inf for share in shares):
                raise ValueError("acceptance must be numbers")
        acceptance = {float(temperature): row for temperature, row in acceptance.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: its metadata is damaged: {error!r}") from None
    if about.get("model", fingerprint(config)) != fingerprint(config):
        raise InputError(f"{path} was trained for another model; train one for this model with "
                         f"train_lookahead.py")

    c = config
    sizes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    L = sizes.get("embeddings", [])[:1]
    rank = sizes.get("head_in", [])[:1]
    R = sizes.get("memory", [])[2:3]
    shapes = {
        "embeddings": [*L, c.dim],
        "memory": [c.n_layers, 2, *R, c.n_kv_heads, c.head_dim],
        "head_in": [*rank, 2 * c.dim],
        "head_out": [c.dim, *rank],
    }
    one_head = ("head_in" in tensors) != ("head_out" in tensors)
    if "embeddings" not in tensors or L == [0] or one_head or not set(tensors) <= set(shapes):
        raise InputError(f"{path} is no look-ahead file: its tensors, such as "
                         f"{', '.join([*tensors][:4])}, are not {', '.join(shapes)}")
    for name, tensor in tensors.items():
        fits = sizes[name] == shapes[name] and tensor.dtype in DTYPES.values()
        if not fits or not tensor.isfinite().all():
            raise InputError(f"{path}: {name} must be finite floats of shape {shapes[name]}, not "
                             f"{tensor.dtype} {sizes[name]}: damaged, or for another model?")
    if length is not None and length > L[0]:
        raise InputError(f"{path} has {L[0]} look-ahead tokens, fewer than --length {length}")
    tensors["embeddings"] = tensors["embeddings"][:length]
    return tensors, acceptance
