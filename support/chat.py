"""Chat: a message, written as the model's own template has it."""
import json
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

from support.added_tokens import read_settings, token_of
from support.errors import InputError, extra
from support.tokenizer import Tokenizer


def add_chat(add: Callable) -> None:
    """Add the words that `encode_prompt` takes. add: parser.add_argument."""
    add("--chat", action="store_true", help="answer the prompt, a message to a chat model")
    add("--system", metavar="TEXT", help="with --chat: what the model is told before the message")


def encode_prompt(args: Namespace, text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a command line's prompt: a text to continue, or with --chat one to answer."""
    if args.system is not None and not args.chat:
        raise InputError("--system needs --chat")
    if args.chat:
        return message_encoder(args.model, tokenizer, args.system)(text)
    return tokenizer.encode(text)


def message_encoder(folder: Path, tokenizer: Tokenizer, system: str | None = None
                    ) -> Callable[[str], list[int]]:
    """A function from a message to the token ids of the chat template of a model's folder, up to
    where the answer begins. A beginning-of-text token is there if the template has one.

    Raises InputError where there is no template; the function, where it refuses the messages.
    """
    source, names = chat_template(folder)
    before = [] if system is None else [{"role": "system", "content": system}]

    def refuse(text):
        raise ValueError(text)

    # Some templates come from strangers: in a sandbox they cannot reach files or other code.
    sandbox = extra("jinja2.sandbox", "pip install jinja2")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {
        "raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}

    @contextmanager
    def in_one_line():
        try:
            yield
        except Exception as error:  # A template is a program, and may raise anything.
            said = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the chat template of {folder} cannot write this: "
                             f"{said[:200]}") from None

    with in_one_line():
        template = environment.from_string(source)

    def encode(message):
        with in_one_line():
            text = template.render(
                messages=[*before, {"role": "user", "content": message}],
                add_generation_prompt=True, tools=None, documents=None, **names)
        return tokenizer.encode(text, begin=False)

    return encode


def chat_template(folder: Path) -> tuple[str, dict[str, str]]:
    """The chat template of a folder, and {name: token} of the special tokens that it may name."""
    settings = read_settings(folder)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    beside = folder / "chat_template.jinja"
    if beside.exists():
        try:
            template = beside.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise InputError(f"cannot read {beside}: {error}") from None
    if not isinstance(template, str):
        raise InputError(f"{folder} has no chat template, so --chat does not know how a message "
                         f"looks to this model; without --chat the prompt is continued")
    tokens = {name: token_of(settings[name]) for name in settings if name.endswith("_token")}
    return template, {name: token.content for name, token in tokens.items() if token}
