"""A draft model: would a small model serve the large one better than look-ahead tokens do?

    python demo/recipes/distill.py --model models/smollm2 --texts TEXTS --out models/draft
    python pass_sampler.py --model models/smollm2 --method draft-model --draft-model models/draft

A LLaMA of 16 M parameters with the large model's tokenizer learns the large model's distributions,
KL(p || q), on texts that the large model wrote (beyond/own_texts.py).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import support

support.ctrl_c_leaves(__name__)
import json
import shutil
from dataclasses import replace

import torch
from tqdm import tqdm

import bench
from demo.recipes.pretrain import initialise, train
from model import Cache, Llama
from support.checkpoint import check_no_checkpoint, digest, fingerprint, read_texts
from support.data import TEXT
from support.errors import DTYPES, InputError, check_number, check_seed, device_named, run_script
from support.storage import read_json, write_tensors, write_text
from support.tables import print_tables
from support.terminal import add_common, new_parser, user_path
from train_lookahead import backward

WIDTH, LAYERS, HEADS = 256, 4, 4
BATCH = 32  # texts per step
HELD = 64  # texts, to measure on
RATES = {"muon": 0.02, "adamw": 0.002}


def small_config(config):
    return replace(config, dim=WIDTH, ffn_dim=3 * WIDTH, n_layers=LAYERS, n_heads=HEADS,
                   n_kv_heads=HEADS, head_dim=WIDTH // HEADS, tied=True, dtype="bfloat16")


def write_config(config, large, out):
    """config.json, and the tokenizer's files as they are."""
    content = read_json(large / "config.json") | {
        "hidden_size": config.dim, "intermediate_size": config.ffn_dim, "head_dim": config.head_dim,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "tie_word_embeddings": True}
    write_text(out / "config.json", json.dumps(content))
    for tokenizer in large.glob("*token*"):
        shutil.copy(tokenizer, out)


def start(small, large, seed):
    """Random weights, but for the embedding: the large one's, on its principal directions. Most
    tokens are too rare in these texts to be learnt from nothing."""
    initialise(small, seed)
    rows = large.embedding.float()
    rows = rows - rows.mean(0)
    directions = torch.linalg.eigh(rows.mT @ rows).eigenvectors[:, -small.config.dim:]
    projected = rows @ directions
    small.embedding.data.copy_(0.02 * projected / projected.std())


@torch.no_grad()
def states(model, texts):
    """The model's last states (N,T,D) of texts (N,T), on the CPU."""
    parts = []
    for rows in tqdm(texts.split(BATCH), "reading", leave=False, disable=None):
        rows = rows.to(model.embedding.device)
        parts.append(model(rows, Cache(model, *rows.shape)).cpu())
    return torch.cat(parts)


@torch.no_grad()
def agreement(small, large, texts, targets):
    """{what: share of places}: a draft is accepted at temperature 0, and at 1."""
    accepted = 0.0
    same = 0
    places = texts.numel()
    for h, target in zip(states(small, texts), targets):
        q = small.logits(h.to(small.embedding.device)).float().softmax(-1)
        p = large.logits(target.to(large.embedding.device)).float().softmax(-1)
        accepted += torch.minimum(p, q).sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
    return {"accepted at 0": round(same / places, 4), "at 1": round(accepted / places, 4)}


def parse():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add_common(add)
    add("--texts", type=user_path, required=True, help="of beyond/own_texts.py")
    add("--steps", type=int, default=400, help=f"of {BATCH} texts (default: 400)")
    add("--out", type=user_path, default=Path("models/draft"),
        help="folder (default: models/draft)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--json", type=user_path, help="file for what was measured on the way")
    args = parser.parse_args()
    check_seed(args.seed)
    check_number("steps", args.steps, 2**40)
    if args.out.resolve() == args.model.resolve():
        raise InputError("--out is the large model's folder: name another")
    check_no_checkpoint(args.out / "checkpoint", args.resume)
    return args


def distilled(args):
    """Train and write the draft model; then what was measured, as `print_tables` takes it."""
    device = device_named(args.device)
    dtype = DTYPES.get(args.dtype, torch.bfloat16)
    large = Llama.load(args.model, dtype, device, packed=False)
    yield bench.machine(large)
    texts = read_texts(args.texts, large.config)
    texts = texts.tokens[texts.end >= TEXT][:, :TEXT]  # Shorter ones are padded at their end.
    if len(texts) <= HELD:
        raise InputError(f"{args.texts} has {len(texts)} texts; more than {HELD} are needed")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {args.out}: {error.strerror}") from None
    small = Llama(small_config(large.config), dtype, device)
    start(small, large, args.seed)
    texts = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))]
    targets = states(large, texts)

    def add_gradients(step):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(HELD, len(texts), (BATCH,), generator=generator)
        text, target = texts[chosen].to(device), targets[chosen].to(device)
        h = small(text, Cache(small, *text.shape))
        return backward(small, h.flatten(0, 1), text.flatten(), "kl", large,
                        target.flatten(0, 1)).item()

    settings = {"steps": args.steps, "seed": args.seed, "dtype": str(dtype),
                "model": fingerprint(large.config),
                "data and weights": digest(large, texts)}
    checkpoint = args.out / "checkpoint"
    curve = train(small, args, settings, checkpoint, add_gradients,
                  lambda: agreement(small, large, texts[:HELD], targets[:HELD]), RATES)
    write_config(small.config, args.model, args.out)
    write_tensors(small.named_weights(), args.out / "model.safetensors", {"format": "pt"})
    checkpoint.unlink(missing_ok=True)
    yield f"{args.out}: {sum(p.numel() for p in small.parameters()) / 1e6:.1f} M parameters."
    for step, loss, shares, seconds in curve:
        yield {"step": step, "loss": loss} | shares | {"seconds": seconds}


def main():
    args = parse()
    print_tables(distilled(args), args.json)


if __name__ == "__main__":
    run_script(main)
