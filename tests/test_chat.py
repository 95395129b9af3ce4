"""A message in the chat template of a model's folder: as transformers writes it, or one line that
says why not."""
import itertools
import json

import pytest
from common import run_main

import beyond.own_texts
import demo.steps
import pass_sampler
from model import Llama
from pass_sampler import Params, generate
from results import spec_bench
from support.chat import message_encoder
from support.checkpoint import read_texts
from support.errors import InputError
from support.tokenizer import load_tokenizer

TEMPLATE = """{% if messages[0]['role'] == 'system' %}[{{ messages[0]['content'] }}]
{% endif %}
{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ bos_token + message['content'] | trim }}{{ eos_token }}
    {% endif %}
{% endfor %}{% if add_generation_prompt %}> {% endif %}"""


@pytest.fixture
def chat_folder(folder, tmp_path):
    """A model with a template, and a tokenizer that puts <s> before each text."""
    copied = tmp_path / "chat"
    copied.mkdir()
    for path in folder.iterdir():
        (copied / path.name).symlink_to(path)
    write(copied, chat_template=TEMPLATE)
    return copied


def write(folder, **more):
    """tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    path.unlink(missing_ok=True)
    path.write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}} | more))


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_as_transformers(chat_folder, system):
    """The text of the template; and its own <s> is not doubled by the tokenizer's."""
    jinja2 = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": " Why? \n"}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    (expected,), _ = jinja2.render_jinja_template(
        [messages], chat_template=TEMPLATE, add_generation_prompt=True, bos_token="<s>",
        eos_token="</s>")
    tokenizer = load_tokenizer(chat_folder, 320)
    ids = message_encoder(chat_folder, tokenizer, system)(" Why? \n")
    assert ids == tokenizer.encode(expected, begin=False) == tokenizer.encode(expected)[1:]


def test_where_the_template_stands(chat_folder):
    """A file beside the config wins; of several that have names it is the default."""
    tokenizer = load_tokenizer(chat_folder, 320)
    write(chat_folder, chat_template=[{"name": "tool", "template": "no"},
                                      {"name": "default", "template": "some"}])
    assert message_encoder(chat_folder, tokenizer)("Why?") == tokenizer.encode("some", begin=False)
    (chat_folder / "chat_template.jinja").write_text("other")
    assert message_encoder(chat_folder, tokenizer)("Why?") == tokenizer.encode("other", begin=False)


@pytest.mark.parametrize("template, says", [
    (None, "has no chat template"),
    ("{{ raise_exception('no system, please') }}", "no system, please"),
    ("{% if %}", "cannot write this"),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
])
def test_templates_that_write_nothing(chat_folder, template, says):
    write(chat_folder, chat_template=template)
    with pytest.raises(InputError, match=says) as error:
        message_encoder(chat_folder, load_tokenizer(chat_folder, 320))("Why?")
    assert "\n" not in str(error.value)


def test_command_lines(chat_folder, capsys):
    """What is printed is the answer, what the model writes after the template."""
    words = ["--model", chat_folder, "--prompt", "Why?", "--temperature", 1]
    code, out, err = run_main(pass_sampler, capsys, *words, "--chat", "--method", "autoregressive",
                              "--max-new-tokens", 5)
    assert code == 0, err
    model, tokenizer = Llama.load(chat_folder), load_tokenizer(chat_folder, 320)
    ids = message_encoder(chat_folder, tokenizer)("Why?")
    answer, = generate(model, [ids], "autoregressive", Params(1), 5)["tokens"]
    assert out == tokenizer.decode(answer) + "\n"
    code, out, err = run_main(demo.steps, capsys, *words, "--chat", "--steps", 1, "--length", 2)
    assert code == 0 and f"STEP 1. {len(ids) - 1} tokens" in out, err
    for script in (pass_sampler, demo.steps):
        code, _, err = run_main(script, capsys, *words, "--system", "Be brief.")
        assert code == 2 and "--system needs --chat" in err


def test_answers_to_train_on(chat_folder, tmp_path, capsys):
    """Once at temperature 0 and as often as asked at the others; held out by message; what was
    written begins where the template ends."""
    messages = [f"Why {i}?" for i in range(12)] + ["long " * 200]
    (tmp_path / "messages.json").write_text(json.dumps({"chat": messages}))
    words = ["--model", chat_folder, "--chat", tmp_path / "messages.json", "--answers", 2,
             "--new-tokens", 7, "--out", tmp_path / "texts"]
    code, out, err = run_main(beyond.own_texts, capsys, *words)
    assert code == 0 and "1 messages of more than 192 tokens are left out" in err, err
    model, tokenizer = Llama.load(chat_folder), load_tokenizer(chat_folder, 320)
    texts = read_texts(tmp_path / "texts", model.config)
    assert len(texts.end) == 12 * (1 + 2 + 2) and int(texts.held.sum()) == 5
    prompts = {}
    for message in messages[:12]:
        prompts[message] = message_encoder(chat_folder, tokenizer)(message)
    for tokens, begin, end, t, _ in zip(*texts):
        prompt = tokens[:begin].tolist()
        assert prompt in prompts.values() and begin < end <= begin + 7
        if t == 0:
            answer, = generate(model, [prompt], "autoregressive", Params(), 7)["tokens"]
            assert tokens[begin:end].tolist() == answer
    by_prompt = {}
    for tokens, begin, held in zip(texts.tokens, texts.begin, texts.held):
        by_prompt.setdefault(tuple(tokens[:begin].tolist()), set()).add(bool(held))
    assert all(len(kinds) == 1 for kinds in by_prompt.values())
    (tmp_path / "messages.json").write_text('{"chat": "Why?"}')
    code, _, err = run_main(beyond.own_texts, capsys, *words)
    assert code == 2 and "must hold" in err
    (tmp_path / "messages.json").write_text('{"chat": ["Why?", "Why?"]}')
    code, _, err = run_main(beyond.own_texts, capsys, *words)
    assert code == 2 and "at least 2 are needed" in err


def test_spec_bench(chat_folder, tmp_path, capsys):
    """A row per task, temperature and method. As many questions as asked, evenly spread."""
    lines = [{"category": category, "turns": [f"{category} {i}?", "more"]}
             for category in ("qa", "math", "coding") for i in range(4)]
    path = tmp_path / "question.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert spec_bench.read_questions(path, 4) == {
        "question answering": [f"qa {i}?" for i in range(4)],
        "multi-turn conversation": ["math 0?", "math 2?", "coding 0?", "coding 2?"]}
    words = ["--model", chat_folder, "--questions", path, "--count", 2, "--new-tokens", 8,
             "--rounds", 1, "--decode", 0, "--methods", "pass=2"]
    code, out, err = run_main(spec_bench, capsys, *words, "--json", tmp_path / "out.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    found = [(row["text"], row["temperature"], row["method"]) for row in rows]
    assert found == [*itertools.product(
        ("question answering", "multi-turn conversation"), (0, 1), ("autoregressive", "pass=2"))]
    path.write_text('{"category": "qa"}')
    code, _, err = run_main(spec_bench, capsys, *words)
    assert code == 2 and "question.jsonl of Spec-Bench" in err
