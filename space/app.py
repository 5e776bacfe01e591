"""A page that shows the tokens that a token attends to in each variant, the cost and the time.

    pip install -e '.[space]' && python space/app.py

Matrices come from small untrained models of the package; times are measured on request.
"""

import resource
import statistics
import time
import unicodedata
from collections.abc import Callable
from functools import wraps
from typing import Any

import gradio as gr
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from efficient_transformers import VARIANTS, costs, plots
from efficient_transformers.attention_maps import read_matrices

HEAD_SIZE, SPEED_SIZE, ROUNDS = 16, 256, 5
CHARACTERS, LETTERS = 20_000, 40  # longest document, and longest word that is shown
SECONDS = 20  # after which no further round is measured
MEMORY = 16 * 2**30  # address space of the server, in bytes
WAITING = 16  # requests that may wait while one is computed
LIMITS = {
    "length": (2, 256), "knob": (1, 64), "heads": (1, 8), "token": (0, 255), "head": (0, 7), "tokens": (16, 8192),
}  # fmt: skip


def fields(slug: str, knob: int, heads: int, causal: bool) -> dict[str, Any]:
    """Config fields that the page sets. Raises gr.Error if `causal` is set for a variant that is not causal."""
    if causal and not VARIANTS[slug].causal:
        raise gr.Error(f"{VARIANTS[slug].title} cannot be causal.")
    return {"num_attention_heads": heads, "is_decoder": causal, **VARIANTS[slug].knob_fields(knob, heads)}


def read_text(text: str | None, length: int) -> list[str]:
    """The first words of `text`, at most `length`, long ones cut. Raises gr.Error for what is not a short text."""
    if not text:
        raise gr.Error("The document is empty: paste some text.")
    if len(text) > CHARACTERS:
        raise gr.Error(f"The document has {len(text):,} characters, and this page takes {CHARACTERS:,}: shorten it.")
    if not text.strip():
        raise gr.Error("The document is only white space: paste some text.")
    if any(
        (unicodedata.category(letter) in ("Cc", "Cn", "Cs") and not letter.isspace()) or letter == "\ufffd"
        for letter in text
    ):
        raise gr.Error("The document has characters that no text has, as a binary file does: paste plain text.")
    words = text.split()[:length]
    if len(words) < 2:
        raise gr.Error("The text must have at least two words.")
    return [word if len(word) <= LETTERS else f"{word[:LETTERS]}…" for word in words]


def check(slug: str, **values: int) -> None:
    """Raises gr.Error for values that the page's controls cannot have: the functions are also called without it."""
    if slug not in VARIANTS:
        raise gr.Error("There is no such variant.")
    for name, value in values.items():
        low, high = LIMITS[name]
        if not isinstance(value, int) or not low <= value <= high:
            raise gr.Error(f"{name} must be a whole number from {low} to {high:,}.")


def small_model(slug: str, words: list[str], changes: dict[str, Any]) -> tuple[PreTrainedModel, Tensor]:
    hidden = HEAD_SIZE * changes["num_attention_heads"]
    model = plots.drawn_model(slug, max(2, len(words)), **{**changes, "hidden_size": hidden})
    return model, plots.word_ids(" ".join(words), len(words), model.config.vocab_size)


def weights_of(model: PreTrainedModel, ids: Tensor, token: int, head: int) -> Tensor:
    """(n,) relative weight of each token for `token`, from 0 to 1, from attention weights or else position weights."""
    variant = VARIANTS[model.config.model_type.removeprefix("et_")]
    if variant.attention:
        with torch.no_grad():
            row = model(ids, output_attentions=True, use_cache=False).attentions[-1][0, head, token]
    else:
        matrix = read_matrices(model, ids)[0].values
        # a hidden layer between the positions mixes all of them
        row = matrix[token] if len(matrix) == matrix.shape[1] == ids.shape[1] else torch.ones(ids.shape[1])
    return row.abs() / row.abs().max().clamp(min=1e-12)


def show(
    slug: str, length: int, knob: int, heads: int, causal: bool, text: str, token: int, head: int, tokens: int
) -> tuple[Figure, str, list[tuple[str, float | None]], str]:
    """The picture, the cost, the text coloured by the weights of the chosen token, and a summary."""
    check(slug, length=length, knob=knob, heads=heads, token=token, head=head, tokens=tokens)
    words, changes = read_text(text, length), fields(slug, knob, heads, causal)
    model, ids = small_model(slug, words, changes)
    figure = plots.pattern_figure(read_matrices(model, ids), VARIANTS[slug].title)
    place, head = min(token, len(words) - 1), min(head, heads - 1)
    weights = weights_of(model, ids, place, head).tolist()
    coloured = [  # the smallest weight is still visible
        (f"▶{word}◀ " if number == place else f"{word} ", 0.15 + 0.85 * weight if weight else None)
        for number, (word, weight) in enumerate(zip(words, weights, strict=True))
    ]
    count = sum(weight > 0 for weight in weights)
    # shown as Markdown, so it must not contain any word of the document
    said = f"Token {place} attends to {count} of {len(words)} tokens in head {head}."
    return figure, cost(slug, changes, heads, tokens), coloured, said


def large_config(slug: str, changes: dict[str, Any], heads: int, tokens: int) -> Any:
    """The config with a hidden size of 256, or the next size that the heads divide."""
    hidden = -(-SPEED_SIZE // (2 * heads)) * 2 * heads
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 1}
    return VARIANTS[slug].config_class(**sizes, max_position_embeddings=tokens, **changes)


def cost(slug: str, changes: dict[str, Any], heads: int, tokens: int) -> str:
    knob = VARIANTS[slug].knob
    setting = f" With `{knob}={changes[knob]}`:" if knob else ""
    table = costs.costs_table(large_config(slug, changes, heads, tokens), [tokens // 4, tokens // 2, tokens])
    return f"**{VARIANTS[slug].cost}** in time and memory ({plots.paper_link(VARIANTS[slug])}).{setting}\n\n{table}"


def speed(slug: str, knob: int, heads: int, causal: bool, tokens: int) -> str:
    """Median milliseconds of the forward pass of a layer and of full attention, measured in turns."""
    check(slug, knob=knob, heads=heads, tokens=tokens)
    changes = fields(slug, knob, heads, causal)
    own = large_config(slug, changes, heads, tokens)
    full = large_config("full", {"num_attention_heads": heads, "is_decoder": causal}, heads, tokens)
    ids = torch.randint(1, 1000, (1, tokens))
    models = [VARIANTS[name].model_class()(config).eval() for name, config in ((slug, own), ("full", full))]
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        began = time.perf_counter()
        for done in range(ROUNDS + 1):
            if done > 1 and time.perf_counter() - began > SECONDS:
                break
            for model, found in zip(models, times, strict=True):
                start = time.perf_counter()
                model(ids, use_cache=False)
                found.append(1e3 * (time.perf_counter() - start))
    mine, theirs = (statistics.median(found[1:]) for found in times)  # the first round builds the masks
    return (
        f"**{mine:.1f} ms** for {tokens:,} tokens in a model of one layer, full attention {theirs:.1f} ms "
        f"({theirs / mine:.1f} times as long), median of {len(times[0]) - 1} on {torch.get_num_threads()} threads."
    )


def page() -> gr.Blocks:
    choices = [(variant.title, slug) for slug, variant in VARIANTS.items()]
    with gr.Blocks(title="efficient_transformers") as blocks:
        gr.Markdown(
            "# What does a token attend to?\nEfficient self-attention on long documents, as the code computes it."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                slug = gr.Dropdown(choices, value="longformer", label="Variant", elem_id="variant")
                knob = gr.Slider(1, 64, value=4, step=1, label="Window, block, features, …", elem_id="window")
                heads = gr.Slider(1, 8, value=2, step=1, label="Heads")
                length = gr.Slider(8, 256, value=64, step=1, label="Tokens in the picture")
                causal = gr.Checkbox(label="Causal (a decoder)")
                tokens = gr.Dropdown([512, 1024, 2048, 4096, 8192], value=4096, label="Tokens for cost and speed")
                measure = gr.Button("Measure the speed", elem_id="measure")
                said_speed = gr.Markdown(elem_id="speed")
            with gr.Column(scale=2):
                picture = gr.Plot(label="Which tokens attend to which", elem_id="picture")
                price = gr.Markdown(elem_id="cost")
        text = gr.Textbox(
            plots.TEXT.replace("\n", " "), lines=3, max_length=CHARACTERS, label="Your document", elem_id="document"
        )
        with gr.Row():
            token = gr.Slider(0, 255, value=30, step=1, label="Query token", elem_id="token")
            head = gr.Slider(0, 7, value=0, step=1, label="Head")
        said = gr.Markdown(elem_id="said")
        reads = gr.HighlightedText(
            label="Tokens it attends to (darker means more)", elem_id="reads", combine_adjacent=False
        )
        given: list[Any] = [slug, length, knob, heads, causal, text, token, head, tokens]
        results: list[Any] = [picture, price, reads, said]
        draw, measured = within_memory(show), within_memory(speed)
        blocks.load(draw, given, results)
        for part in given:
            event = part.release if isinstance(part, gr.Slider) else part.submit if part is text else part.change
            event(draw, given, results)
        measure.click(measured, [slug, knob, heads, causal, tokens], said_speed)
    return blocks.queue(max_size=WAITING, default_concurrency_limit=1)


def within_memory(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which raises gr.Error if it needs more memory than the server may have."""

    @wraps(function)
    def limited(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise gr.Error("This needs more memory than the page may use: choose fewer tokens or heads.") from error

    return limited


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    page().launch(max_file_size="1mb")
