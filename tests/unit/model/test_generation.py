"""Generation: what is chosen, when it stops, what the cache sees, and how text is streamed."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kimi_convert.errors import CheckpointError, UsageError
from kimi_convert.model.generation import generate, stream_text
from kimi_convert.model.loading import load_model
from kimi_convert.model.tokenizer import load_tokenizer
from tests.tiny import tiny_config
from tests.unit.model.tokenizer_folders import MOONLET, write_tiktoken_folder

CONFIG = tiny_config("kimi_linear")
VOCAB_SIZE = CONFIG.vocab_size
TABLE = torch.randn(101, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
PROMPT = [3, 1, 4]


class HashModel:
    """Logits that depend on every token seen, in order; the state is in the cache alone."""

    def __init__(self):
        self.config = CONFIG
        self.embed = nn.Embedding(VOCAB_SIZE, 1)
        self.lengths = []  # of the calls

    def __call__(self, tokens, cache=None):
        self.lengths.append(tokens.shape[1])
        kept = None if cache is None else cache.layers[0].state
        state = 0 if kept is None else int(kept)
        rows = []
        for token in tokens[0].tolist():
            state = (state * 7 + token + 1) % len(TABLE)
            rows.append(TABLE[state])
        if cache is not None:
            cache.layers[0].state = torch.tensor(state)
            cache.position += tokens.shape[1]
        return torch.stack(rows)[None]


class FixedModel:
    """The same logits after every token."""

    def __init__(self, logits):
        self.config = CONFIG
        self.embed = nn.Embedding(VOCAB_SIZE, 1)
        self.logits = torch.full((VOCAB_SIZE,), -1e30)
        self.logits[: len(logits)] = torch.tensor(logits)

    def __call__(self, tokens, cache=None):
        cache.position += tokens.shape[1]
        return self.logits.expand(1, tokens.shape[1], -1)


def of_probabilities(*probabilities):
    return FixedModel([math.log(probability) for probability in probabilities])


def greedy_without_cache(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def run(model, count=20, **options):
    return list(generate(model, PROMPT, max_new_tokens=count, **options))


def test_greedy_follows_the_likeliest_token():
    assert run(HashModel()) == greedy_without_cache(HashModel(), PROMPT, 20)


def test_greedy_with_cache_equals_greedy_without_on_a_trained_model():
    model = load_model(MOONLET)
    prompt = load_tokenizer(MOONLET).encode("The list is sorted by")
    with torch.inference_mode():
        expected = greedy_without_cache(model, prompt, 20)
    assert list(generate(model, prompt, max_new_tokens=20)) == expected


@pytest.mark.parametrize(
    ("prompt_length", "prefill"),
    [(1, [1]), (511, [511]), (512, [512]), (513, [512, 1]), (1030, [512, 512, 6])],
)
def test_prompt_runs_once_in_chunks_then_one_token_per_step(prompt_length, prefill):
    model = HashModel()
    prompt = [i % VOCAB_SIZE for i in range(prompt_length)]
    ids = list(generate(model, prompt, max_new_tokens=4))
    assert model.lengths == [*prefill, 1, 1, 1]
    assert ids == greedy_without_cache(HashModel(), prompt, 4)


def test_ids_come_as_they_are_chosen():
    model = HashModel()
    ids = generate(model, PROMPT, max_new_tokens=20)
    assert model.lengths == []
    next(ids)
    assert model.lengths == [3]
    next(ids)
    assert model.lengths == [3, 1]


@pytest.mark.parametrize("place", [0, 1, 7])
def test_generation_ends_before_the_first_stop_id(place):
    free = run(HashModel())
    stop = free[place]
    first = free.index(stop)
    model = HashModel()
    assert run(model, stop_ids=[95, stop]) == free[:first]
    assert len(model.lengths) == first + 1


def test_two_generations_at_once_do_not_disturb_each_other():
    model = HashModel()
    pair = zip(
        generate(model, PROMPT, max_new_tokens=9),
        generate(model, [5], max_new_tokens=9),
        strict=True,
    )
    left, right = (list(ids) for ids in zip(*pair, strict=True))
    assert left == greedy_without_cache(HashModel(), PROMPT, 9)
    assert right == greedy_without_cache(HashModel(), [5], 9)


def test_inference_mode_does_not_leak_between_steps():
    ids = generate(HashModel(), PROMPT, max_new_tokens=2)
    next(ids)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_a_seed_decides_what_is_sampled():
    first, second = (run(HashModel(), temperature=1.0, seed=5) for _ in range(2))
    assert first == second
    assert first != run(HashModel(), temperature=1.0, seed=6)


def test_sampling_neither_reads_nor_moves_the_global_generator():
    model = HashModel()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run(model, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert run(model, temperature=1.0) == first


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 2.0, "top_p": 1e-9},
        {"temperature": 1e-6},
        {"temperature": 5e-324},
    ],
    ids=str,
)
def test_the_narrowest_sampling_equals_greedy(options):
    assert run(HashModel(), **options) == run(HashModel())


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 1}], ids=str)
def test_of_equal_tokens_the_first_is_taken(options):
    model = FixedModel([0.0, 1.0, 1.0, 1.0])
    assert set(run(model, **options)) == {1}


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"top_p": 0.49}, {1}),
        ({"top_p": 0.51}, {1, 3}),
        ({"top_p": 0.79}, {1, 3}),
        ({"top_p": 0.81}, {1, 3, 0}),
        ({"top_p": 1.0}, {1, 3, 0, 2}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {1, 3, 0}),
        ({"top_k": 10**9}, {1, 3, 0, 2}),
        # 0.5 and 0.3 of 0.8 are 0.625 and 0.375: top_p counts what top_k left.
        ({"top_k": 2, "top_p": 0.62}, {1}),
        ({"top_k": 2, "top_p": 0.63}, {1, 3}),
    ],
    ids=str,
)
def test_sampling_is_limited_to_the_likeliest(options, possible):
    model = of_probabilities(0.15, 0.5, 0.05, 0.3)
    # The rarest token stays away from 1000 draws with probability 0.95^1000 < 1e-22.
    assert set(run(model, 1000, temperature=1.0, **options)) == possible


def test_top_p_keeps_no_token_after_it_is_reached():
    model = FixedModel([0.0, 0.0, 0.0, 0.0])  # each exactly 1/4
    assert set(run(model, 1000, temperature=1.0, top_p=0.5)) == {0, 1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_are_likely(temperature):
    weights = [probability ** (1 / temperature) for probability in (0.15, 0.5, 0.05, 0.3)]
    draws = 4000
    counts = Counter(run(of_probabilities(0.15, 0.5, 0.05, 0.3), draws, temperature=temperature))
    for token_id, weight in enumerate(weights):
        expected = weight / sum(weights)
        deviation = math.sqrt(expected * (1 - expected) / draws)
        # Five standard deviations: chance fails this once in 1.7 million seeds.
        assert abs(counts[token_id] / draws - expected) < 5 * deviation


def test_an_empty_prompt_starts_from_bos():
    expected = list(generate(HashModel(), [9], max_new_tokens=5))
    assert list(generate(HashModel(), [], max_new_tokens=5, bos_token_id=9)) == expected


def test_bos_is_not_put_before_a_prompt():
    assert run(HashModel(), bos_token_id=9) == run(HashModel())


def test_an_empty_prompt_without_bos_is_refused_at_once():
    with pytest.raises(UsageError, match="prompt is empty") as caught:
        generate(HashModel(), [], max_new_tokens=5)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_at_once(options, said):
    with pytest.raises(UsageError, match=f"{said} is not valid"):
        generate(HashModel(), PROMPT, **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize("outside", [-1, VOCAB_SIZE])
def test_a_prompt_id_outside_the_vocabulary_is_refused_at_once(outside):
    with pytest.raises(UsageError, match="does not know"):
        generate(HashModel(), [0, outside], max_new_tokens=1)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error(broken):
    with pytest.raises(CheckpointError, match="not finite"):
        run(FixedModel([0.0, broken]))


TOKENIZERS = {
    "tokenizer.json": lambda folder: load_tokenizer(MOONLET),
    "tiktoken.model": lambda folder: load_tokenizer(
        write_tiktoken_folder(folder, ["é".encode(), "中".encode()[:2], b"the"])
    ),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, tmp_path_factory):
    return TOKENIZERS[request.param](tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def id_of(tokenizer):
    return {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}


@given(data=st.data())
def test_streamed_pieces_are_the_decoded_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(pieces)


@given(text=st.text())
def test_streamed_text_is_the_text(tokenizer, text):
    pieces = list(stream_text(tokenizer, tokenizer.encode(text)))
    assert "".join(pieces) == text


@given(raw=st.binary())
def test_any_bytes_stream_as_they_decode(tokenizer, id_of, raw):
    ids = [id_of[bytes((byte,))] for byte in raw]
    assert "".join(stream_text(tokenizer, ids)) == raw.decode("utf-8", "replace")


def test_a_character_over_several_tokens_comes_whole_and_at_once(tokenizer, id_of):
    taken = []

    def ids():
        for byte in "a😀é".encode():
            taken.append(byte)
            yield id_of[bytes((byte,))]

    pieces = stream_text(tokenizer, ids())
    seen = [(piece, len(taken)) for piece in itertools.islice(pieces, 3)]
    assert seen == [("a", 1), ("😀", 5), ("é", 7)]
    assert list(pieces) == []


def test_a_character_cut_off_by_the_end_becomes_one_replacement(tokenizer, id_of):
    ids = [id_of[bytes((byte,))] for byte in "a😀".encode()[:-1]]
    assert list(stream_text(tokenizer, ids)) == ["a", "\N{REPLACEMENT CHARACTER}"]
