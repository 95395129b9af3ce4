"""What a reader of the method may skip, a subject per file:

errors.py     how bad input ends: one line, exit code 2; checks; names of devices and types
storage.py    files that are written whole or not at all; tensors and JSON in files
checkpoint.py interrupted trainings, look-ahead files, texts that a model wrote
tokenizer.py  text to token ids and back
added_tokens.py  tokens beside the vocabulary: which file wins, what is printed, what ends a text
chat.py       a message, written as the model's own template has it
methods.py    what a method is to a command line: name, options
terminal.py   command lines, and what is printed while a text is made
prompts.py    prompts: where they come from, and which cannot be continued
text.py       new texts: where they end, how many steps and drafts they took
tables.py     tables of figures, on the screen and in JSON files
timing.py     times that compare: turns, ratios, intervals
data.py       text to train on
journal.py    what a training says and writes while it goes on
processes.py  several processes that train together, under torchrun
"""
import os
import signal


def leave(*_) -> None:
    """What Ctrl-C does until `run_script` begins: no traceback, the exit code of a Ctrl-C."""
    os._exit(130)


def ctrl_c_leaves(name: str) -> None:
    """Let Ctrl-C end a script while it still imports torch. name: __name__ of the script; nothing
    changes where the script is imported, or Ctrl-C has another meaning already."""
    if name == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
