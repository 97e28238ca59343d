"""How many steered tokens a second, beside TransformerLens's `generate`, one text at a time.

    python tests/benchmarks/steering_speed.py [--suite flowlet] [--device cpu]

The loop is what a user of TransformerLens would write: the hooks of a plan are put on, and
`generate` of the same model is called for each text, with its cache of keys and values. The batch
is `steer`, with 32 samples of each of 8 plans. Both have the paper's temperature and top-p, and 36
new tokens; a text counts as far as its end-of-text token. Each is measured several times, and the
fastest counts. The exit status is 1 where the batch makes less than 30 times as many.

One step of top-p sampling at a vocabulary of 256,000 is timed apart: of rows whose nucleus is among
the likeliest tokens, and of flat ones, whose tokens all have to be sorted. On a GPU it is 512 rows,
on a CPU 64, unless `--rows` says how many.

On two cores with `flowlet` and plans of 24 features over all layers: on an AMD EPYC the loop makes
80 to 85 tokens a second, the batch 3,850, 45 times as many; on an Intel Xeon 80 and 2,960, 37
times. A row of a sampling step takes 0.6 ms if peaked and 1.6 ms if flat (0.65 and 3.3 on the
Xeon); a sort of all in NumPy, logits copied first, took 5.6 and 4.5 ms on the EPYC.
"""

import sys
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from clock import options, seconds
from torch import Tensor

from flowhelpers.flow.graph import flow_graph
from flowhelpers.interventions.generation import draw_tokens, prompt_ids
from flowhelpers.matching.table import match_table
from flowhelpers.steering.plans import Plan, make_plan
from flowhelpers.steering.sweeps import steer
from flowhelpers.suites.load import Suite, load_suite

BAR = 30
VOCABULARY = 256_000  # of Gemma 2
SPREADS = {"peaked": 5.0, "flat": 2.0}  # standard deviation of the logits
PLANS, SAMPLES, NEW = 8, 32, 36
TEMPERATURE, TOP_P = 1.27, 0.7
PROMPT = "From my experience,"


def plans_of(suite: Suite) -> dict[str, Plan | None]:
    """Unsteered text, and the flow of a feature in the middle at growing strengths."""
    graph = flow_graph(suite, f"{suite.layers // 2}/res/0", match_table(suite))
    strengths = [0.25 * (number + 1) for number in range(PLANS - 1)]
    return {"unsteered": None} | {f"s = {s}": make_plan(suite, graph, s) for s in strengths}


@torch.no_grad()
def by_generate(suite: Suite, plans: Mapping[str, Plan | None], texts: int) -> list[Tensor]:
    """Every text on its own; of each plan so many."""
    ids, found = prompt_ids(suite.model, PROMPT, NEW), []
    for plan in plans.values():
        with plan.on(suite) if plan else nullcontext():
            for _ in range(texts):
                made = suite.model.bridge.generate(
                    ids, max_new_tokens=NEW, temperature=TEMPERATURE, top_p=TOP_P,
                    return_type="tokens", verbose=False,
                )  # fmt: skip
                found.append(made[0, ids.shape[1] :])
    return found


def loop_rate(suite: Suite, plans: Mapping[str, Plan | None], texts: int) -> float:
    """Tokens a second of the loop."""
    took, found = seconds(lambda: by_generate(suite, plans, texts))
    return sum(map(len, found)) / took


def steer_rate(suite: Suite, plans: Mapping[str, Plan | None], samples: int, seed: int) -> float:
    """Tokens a second of `steer`."""
    given = {"max_new_tokens": NEW, "temperature": TEMPERATURE, "top_p": TOP_P, "seed": seed}
    rows = samples * len(plans)
    took, table = seconds(
        lambda: steer(suite, plans, PROMPT, samples, **given, batch_size=rows, show_progress=False)
    )
    ids = suite.model.tokenizer(table["text"].tolist(), add_special_tokens=False)["input_ids"]
    return sum(min(len(row) + 1, NEW) for row in ids) / took  # with the token that ends a text


def sampling_step(rows: int, spread: float, device: str, repeats: int) -> float:
    """Seconds to draw a token for each row, from logits on the device."""
    generator = torch.Generator(device).manual_seed(0)
    logits = spread * torch.randn(rows, VOCABULARY, generator=generator, device=device)
    uniform = torch.rand(rows, generator=generator, device=device)
    steps = [lambda: draw_tokens(logits, uniform, TEMPERATURE, TOP_P)] * (repeats + 1)
    return min(seconds(step)[0] for step in steps)


def main() -> None:
    """Prints what was measured."""
    # `loop`: texts of each plan in the loop
    given = options(__doc__, suite="flowlet", device="cpu", loop=3, repeats=3, rows=0)
    rows = given.rows or (64 if given.device == "cpu" else 512)
    for name, spread in SPREADS.items():
        took = 1000 * sampling_step(rows, spread, given.device, given.repeats)
        told = f"{took:,.1f} ms, {took / rows:.3f} a row"
        print(f"a step of {rows} {name} rows x {VOCABULARY:,} tokens: {told}")
    suite = load_suite(given.suite, given.device)
    plans = plans_of(suite)
    by_generate(suite, plans, 1)
    steer_rate(suite, plans, 2, 0)
    slow, fast = [], []
    for seed in range(given.repeats):  # in turn, so that both meet the same machine
        slow.append(loop_rate(suite, plans, given.loop))
        fast.append(steer_rate(suite, plans, SAMPLES, seed))
    ratio = max(fast) / max(slow)
    print(f"one text at a time with generate: {max(slow):,.0f} tokens a second")
    print(f"steer, {SAMPLES} samples of {PLANS} plans: {max(fast):,.0f} tokens a second")
    print(f"  {ratio:.1f} times as many (bar: {BAR})")
    if ratio < BAR:
        sys.exit(1)


if __name__ == "__main__":
    main()
