"""The tab where annotators rank the answers to a prompt. It shows the criteria and has keyboard shortcuts."""

import random
import re
import threading
import time
from collections import Counter
from pathlib import Path

import gradio as gr

from arena.battle import visitor_of
from arena.limits import Limits
from arena.store import Store
from data import formats
from data.records import BadRows, Ranking, read_records
from evals.verdicts import text_hash

CRITERIA = Path(__file__).parents[1] / "docs" / "annotation.md"
MAX_ANSWERS = 9  # one key each
LOAN = 900  # seconds after which an annotator's item is given to somebody else
# The keys work while no text field has the focus. They edit the ranking and press the buttons.
SHORTCUTS = """
<script>
document.addEventListener("keydown", (event) => {
  const field = document.querySelector("#ranking textarea, #ranking input");
  if (!field || !field.offsetParent || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("textarea, input[type=text], input:not([type])") && event.target !== field) return;
  const press = (selector) => document.querySelector(selector)?.click();
  const put = (text) => {
    Object.getOwnPropertyDescriptor(Object.getPrototypeOf(field), "value").set.call(field, text);
    field.dispatchEvent(new Event("input", {bubbles: true}));
  };
  if (/^[1-9]$/.test(event.key)) {
    const now = field.value.trim();
    put(now === "" || now.endsWith("=") ? now + event.key : now + " > " + event.key);
  } else if (event.key === "=") put(field.value.trim() + "=");
  else if (event.key === "Backspace") put(field.value.trim().replace(/(>|=)?\\s*\\d?\\s*=?$/, "").trim());
  else if (event.key === "n") press("#unacceptable input");
  else if (event.key === "Enter") press("#submit");
  else return;
  event.preventDefault();
});
</script>
"""


def load_items(files: list[str], *, double_share: float, seed: int) -> list[dict]:
    """Items from records with a prompt and 2 to 9 completions. A share of them goes to two annotators.

    Which items go to two annotators depends on their text and the seed alone, so it is the same after a restart.
    """
    if not 0 <= double_share <= 1:
        raise ValueError(f"double_share={double_share} must lie in [0, 1]")
    items = []
    for file in files:
        for record in read_records(file, formats.preferences, BadRows("error")):
            answers = record.completions if isinstance(record, Ranking) else _sides(record)
            if not 2 <= len(answers) <= MAX_ANSWERS:
                raise ValueError(f"{record.where}: has {len(answers)} answers; annotators rank 2 to {MAX_ANSWERS}")
            name = text_hash(repr((record.prompt, answers)))
            twice = random.Random(f"{seed}/{name}").random() < double_share
            items.append({"id": name, "prompt": record.prompt, "answers": answers, "readers": 1 + twice})
    return items


def _sides(record) -> list[str]:
    if not hasattr(record, "chosen"):
        raise ValueError(
            f"{record.where}: has one answer; annotators rank two or more (completions, or chosen/rejected)"
        )
    return [record.chosen, record.rejected]


def parse_ranking(text: str, num_answers: int) -> list[int]:
    """The rank of each answer in the order on the page, 1 = best: "2 > 1=3" is [2, 1, 2].

    Raises:
        ValueError: with a sentence for the annotator.
    """
    if not re.fullmatch(r"\s*\d(\s*[>=]\s*\d)*\s*", text):
        raise ValueError("Write the answers from best to worst, like 2 > 1=3 (= is a tie).")
    groups = [[int(n) for n in group.split("=")] for group in text.split(">")]
    named = sorted(n for group in groups for n in group)
    if named != list(range(1, num_answers + 1)):
        raise ValueError(f"Each of the answers 1 to {num_answers} must be named once; you named {named}.")
    rank = 1
    rank_of: dict[int, int] = {}
    for group in groups:
        rank_of |= dict.fromkeys(group, rank)
        rank += len(group)
    return [rank_of[n] for n in range(1, num_answers + 1)]


class Desk:
    """Hands out items and takes rankings. It never gives an item to more people at once than it needs."""

    def __init__(self, store: Store, limits: Limits, *, seed: int):
        self.store, self.limits, self.seed = store, limits, seed
        self._lent: dict[str, tuple[str, float]] = {}  # by annotator: item, since when
        self._lock = threading.Lock()

    def next(self, annotator: str) -> dict | None:
        """The next item, with the order of its answers for this annotator (`shown`), or None if there is none."""
        with self._lock:
            now = time.monotonic()
            self._lent = {who: loan for who, loan in self._lent.items() if who != annotator and now - loan[1] < LOAN}
            item = self.store.next_item(annotator, Counter(name for name, _ in self._lent.values()))
            if item is not None:
                self._lent[annotator] = (item["id"], now)
        if item is not None:
            order = list(range(len(item["answers"])))
            random.Random(f"{self.seed}/{annotator}/{item['id']}").shuffle(order)
            item["shown"] = order
        return item

    def submit(self, item: dict, annotator: str, ranking: str, unacceptable: bool, reason: str) -> None:
        """Store a ranking in the original order of the answers.

        Raises:
            ValueError: with a sentence for the annotator.
        """
        on_page = parse_ranking(ranking, len(item["answers"]))
        if len(reason) > self.limits.max_characters:
            raise ValueError(
                f"The reason has {len(reason)} characters; at most {self.limits.max_characters} are allowed."
            )
        ranks = [0] * len(on_page)
        for place, answer in enumerate(item["shown"]):
            ranks[answer] = on_page[place]
        self.store.annotate(
            item["id"], annotator, ranks=ranks, acceptable=not unacceptable, reason=reason.strip(), shown=item["shown"]
        )


def annotate_tab(desk: Desk, blocks: gr.Blocks) -> None:
    """Build the tab inside an open `gr.Blocks`."""
    state = gr.State(None)
    with gr.Row():
        with gr.Column(scale=3):
            prompt = gr.Textbox(label="Conversation", interactive=False, lines=4, elem_id="prompt")
            answers = [
                gr.Textbox(label=f"Answer {n}", interactive=False, lines=3, visible=False, elem_id=f"answer-{n}")
                for n in range(1, MAX_ANSWERS + 1)
            ]
            ranking = gr.Textbox(label="Ranking, best first (keys 1-9, =, Backspace)", max_length=40, elem_id="ranking")
            unacceptable = gr.Checkbox(label="None of them is acceptable (key n)", elem_id="unacceptable")
            reason = gr.Textbox(label="Reason (optional)", max_length=desk.limits.max_characters, elem_id="reason")
            submit = gr.Button("Submit (Enter)", variant="primary", elem_id="submit")
            another = gr.Button("Next item", elem_id="next")
            notice = gr.Textbox(show_label=False, interactive=False, container=False, elem_id="annotate-notice")
        with gr.Column(scale=2), gr.Accordion("Criteria", open=True):
            gr.Markdown(CRITERIA.read_text())
    shown = [prompt, *answers, ranking, unacceptable, reason, notice, state]

    def page(item: dict | None, sentence: str) -> list:
        texts = [item["answers"][i] for i in item["shown"]] if item else []
        boxes = [
            gr.update(value=texts[n] if n < len(texts) else "", visible=n < len(texts)) for n in range(MAX_ANSWERS)
        ]
        head = "\n\n".join(f"{m['role']}: {m['content']}" for m in item["prompt"]) if item else "No items are left."
        return [head, *boxes, "", False, "", sentence, item]

    def on_next(request: gr.Request):
        return page(desk.next(visitor_of(request)), "")

    def on_submit(text: str, bad: bool, why: str, item: dict | None, request: gr.Request):
        if item is None:
            return on_next(request)
        try:
            desk.submit(item, visitor_of(request), text or "", bool(bad), why or "")
        except ValueError as error:
            return [gr.skip()] * (len(shown) - 2) + [str(error), item]
        return page(desk.next(visitor_of(request)), "Saved.")

    blocks.load(on_next, None, shown, queue=False)
    submit.click(on_submit, [ranking, unacceptable, reason, state], shown, queue=False, api_name="annotate")
    another.click(on_next, None, shown, queue=False, api_name="next")
