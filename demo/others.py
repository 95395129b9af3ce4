"""Other programs that decode the same weights, for `bench.py peers`: transformers and llama.cpp.

Each is a function(new_tokens, params, prompts, seed) that returns tokens, seconds and
prefill_seconds, as `Sampler.generate` does. The first token is the prefill's and is left out.
"""
import itertools
import time
from functools import partial

import torch

from files import InputError, extra
from model import DTYPES


def others(folder, device, gguf):
    """{name: function}. gguf: files of demo/to_gguf.py, for llama.cpp."""
    transformers = extra("transformers")
    transformers.utils.logging.set_verbosity_error()
    found = {}
    for dtype in ("bfloat16",) if device.type == "cuda" else ("bfloat16", "float32"):
        network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
        ways = {"generate": {}, "prompt lookup": {"prompt_lookup_num_tokens": 10}}
        if device.type == "cuda":
            ways["static cache, compiled"] = {"cache_implementation": "static"}
        for way, options in ways.items():
            name = f"transformers {transformers.__version__}, {dtype}: {way}"
            found[name] = partial(of_transformers, network.to(device).eval(), options)
    for path in gguf:
        if not path.is_file():
            raise InputError(f"--gguf {path} does not exist; demo/to_gguf.py makes it")
        llama_cpp = extra("llama_cpp", "make peers")
        try:
            engine = llama_cpp.Llama(str(path), n_ctx=2048, verbose=False,
                                     n_threads=torch.get_num_threads())
        except ValueError as error:
            raise InputError(f"cannot read {path}: {error}") from None
        found[f"llama.cpp, {path.stem}"] = partial(of_llama_cpp, engine)
    return found


def of_transformers(network, options, new_tokens, params, prompts, seed):
    ids = torch.tensor(prompts, device=network.device)
    sampling = {"do_sample": False}
    if params.temperature:
        sampling = {"do_sample": True, "temperature": params.temperature, "top_k": params.top_k,
                    "top_p": 1.0}
    torch.manual_seed(seed)
    seconds = {}
    for n in (1, new_tokens):
        start = time.perf_counter()
        texts = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
            pad_token_id=0, repetition_penalty=1.0, **sampling, **options).tolist()
        seconds[n] = time.perf_counter() - start
    return {"tokens": [text[len(prompts[0]) + 1:] for text in texts],
            "seconds": seconds[new_tokens], "prefill_seconds": seconds[1]}


def of_llama_cpp(engine, new_tokens, params, prompts, seed):
    engine.reset()
    engine.set_seed(seed)
    start = time.perf_counter()
    stream = engine.generate(prompts[0], temp=params.temperature, top_k=params.top_k, top_p=1.0,
                             min_p=0.0, repeat_penalty=1.0)
    next(stream)
    prefill_seconds = time.perf_counter() - start
    tokens = list(itertools.islice(stream, new_tokens - 1))
    return {"tokens": [tokens], "seconds": time.perf_counter() - start,
            "prefill_seconds": prefill_seconds}
