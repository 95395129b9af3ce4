"""What a training says and writes while it goes on: a bar, FILE.jsonl, and what took how long."""
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from support.storage import write_text
from support.terminal import progress

FIRST = 3  # steps, after which it is said how long the others will take


def new_state(settings: dict) -> dict:
    """What a checkpoint keeps of a training, beside its tensors."""
    return {"settings": settings, "step": 0, "losses": [], "measured": [],
            "spent": {"before": 0.0, "steps": 0.0, "measuring": 0.0}}


class Journal:
    """Keeps state["step"] and, in state["spent"], seconds by what they were spent on."""

    def __init__(self, state: dict, args: Namespace, read_for: int):
        """args: its out, steps, began and process are used. Only process 0 prints. read_for: one
        step in so many reads texts, and takes longer."""
        self.state, self.out, self.steps, self.read_for = state, args.out, args.steps, read_for
        self.bar = progress(args.steps, "training", "step", initial=state["step"], smoothing=0,
                            disable=args.process > 0)
        self.last = args.began
        self.first = []  # seconds of the first steps
        self.spent("before")

    def spent(self, on: str) -> float:
        """Add the seconds since the last call to what they were spent on; return them."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.state["spent"][on] += seconds
        return seconds

    def step(self, loss: float) -> None:
        """A step has ended."""
        self.state["losses"].append(loss)
        self.state["step"] += 1
        self.first.append(self.spent("steps"))
        self.bar.update()
        left = self.steps - self.state["step"]
        if len(self.first) == FIRST and left and not self.bar.disable:
            usual = min(self.first[1:])
            each = usual + (self.first[0] - usual) / self.read_for
            self.say(f"about {left * each / 60:.1f} min for the {left} steps left, {each:.2f} s "
                     f"each")

    def measure(self, evaluate: Callable[[], dict], texts: int) -> dict:
        """The table of evaluate() on so many texts, which is added to FILE.jsonl."""
        self.bar.set_description("measuring")
        table = evaluate()
        losses, self.state["losses"] = self.state["losses"], []
        self.state["measured"].append({
            "step": self.state["step"], "seconds": round(self.state["spent"]["steps"], 1),
            "texts": texts, "loss": sum(losses) / len(losses) if losses else None,
            "acceptance": table})
        lines = [json.dumps(line) + "\n" for line in self.state["measured"]]
        write_text(file_beside(self.out, "jsonl"), "".join(lines))
        expected = ", ".join(f"{row['expected']:.3f} at {t:g}" for t, row in table.items())
        self.say(f"step {self.state['step']}: drafts accepted per step {expected}")
        self.bar.set_description("training")
        self.bar.start_t += self.spent("measuring")  # or the time left would count it as steps
        return table

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        tqdm.write(line, file=sys.stderr)

    def end(self) -> None:
        """Say how long all of it took."""
        minutes = {what: seconds / 60 for what, seconds in self.state["spent"].items()}
        print(f"{self.out}: {sum(minutes.values()):.1f} min: {minutes['before']:.1f} until the "
              f"first step, {minutes['steps']:.1f} for {self.steps} steps, "
              f"{minutes['measuring']:.1f} to measure")


def file_beside(out: Path, suffix: str) -> Path:
    """FILE.suffix, beside the file that a training writes."""
    return out.with_name(f"{out.name}.{suffix}")
