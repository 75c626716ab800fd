"""Loss weighted by tokens, and exact match of batched greedy answers, on tiny OLMoE models."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from drlora.data import pad_token_id
from drlora.errors import ConfigError, DataError
from drlora.evaluation.evaluate import edit_distance, evaluate_loss, exact_match

EOS = 256
VOCABULARY = 258


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, `</s>` to end, no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def padding(tokenizer) -> DataCollatorForLanguageModeling:
    return DataCollatorForLanguageModeling(pad_token_id(tokenizer))


def tiny_olmoe(hidden_size: int = 32, **changes) -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=None,
        **changes,
    )
    torch.manual_seed(0)
    return OlmoeForCausalLM(config)


def spread(model: OlmoeForCausalLM) -> OlmoeForCausalLM:
    """Make logits differ clearly, so that the greedy choice is no accident of rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def successor_model(tokenizer, chains: list[str]) -> OlmoeForCausalLM:
    """A model that, after a token of a chain, always writes the next one (`~` stands for eos)."""
    model = tiny_olmoe(hidden_size=VOCABULARY + 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY, VOCABULARY + 2))
        for chain in chains:
            ids = [EOS if char == "~" else tokenizer(char)["input_ids"][0] for char in chain]
            for token, following in zip(ids, ids[1:], strict=False):
                model.lm_head.weight[following, token] = 1.0
    return model


def rows_of(lengths: list[int], unseen: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [-100] * unseen + row[unseen:]} for row in ids]


def loss_by_hand(model, rows) -> tuple[float, int]:
    nats, count = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                nats -= torch.log_softmax(logits[position], -1)[label].item()
                count += 1
    return nats / count, count


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_loss_weighs_tokens_equally(tokenizer, batch_size):
    model = spread(tiny_olmoe()).eval()
    rows = rows_of([3, 20, 7, 4, 11], unseen=2)
    loss, count = loss_by_hand(model, rows)
    result = evaluate_loss(model, rows, padding(tokenizer), batch_size)
    assert result.target_tokens == count == 1 + 18 + 5 + 2 + 9
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_first_label_is_no_target(tokenizer):
    model = tiny_olmoe().eval()
    rows = rows_of([5], unseen=0)
    assert evaluate_loss(model, rows, padding(tokenizer), 1).target_tokens == 4


def test_loss_holds_no_router_loss(tokenizer):
    rows = rows_of([6, 9], unseen=1)
    plain = evaluate_loss(tiny_olmoe(), rows, padding(tokenizer), 2)
    routed = tiny_olmoe(output_router_logits=True, router_aux_loss_coef=10.0)
    assert evaluate_loss(routed, rows, padding(tokenizer), 2) == plain


def test_mode_of_every_module_and_gradients_are_left_alone(tokenizer):
    model = tiny_olmoe(attention_dropout=0.9).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    rows = rows_of([6, 9], unseen=1)
    first = evaluate_loss(model, rows, padding(tokenizer), 2)
    exact_match(model, tokenizer, [{"prompt": "a", "completion": "b"}], 1, 2)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert evaluate_loss(model, rows, padding(tokenizer), 2) == first, "dropout was on"
    assert torch.is_grad_enabled()


def test_mode_is_restored_after_an_error(tokenizer):
    model = tiny_olmoe().train()
    with pytest.raises(DataError):
        exact_match(model, tokenizer, [{"text": "a"}], 1, 2)
    assert model.training


def test_loss_refuses_what_has_no_target(tokenizer):
    model = tiny_olmoe()
    for rows in ([], [{"input_ids": [1, 2], "labels": [1, -100]}]):
        with pytest.raises(DataError, match="no target token"):
            evaluate_loss(model, rows, padding(tokenizer), 2)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        evaluate_loss(model, rows_of([3], 1), padding(tokenizer), 0)


def test_batched_answers_equal_those_one_at_a_time(tokenizer):
    model = spread(tiny_olmoe()).eval()
    prompts = ["a", "the longest of them", "bcd", "hello", "xy"]
    result = exact_match(
        model, tokenizer, [{"prompt": p, "completion": "-"} for p in prompts], 5, 8
    )
    alone = []
    for prompt in prompts:
        ids = list(tokenizer(prompt)["input_ids"])
        for _ in range(8):
            following = model(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(following)
        written = ids[len(ids) - 8 :]
        written = written[: written.index(EOS)] if EOS in written else written
        text = tokenizer.decode(written, skip_special_tokens=True)
        alone.append(text.partition("\n")[0].strip())
    assert [sample.prediction for sample in result.samples] == alone
    assert len(set(alone)) > 1


def test_answers_end_at_newline_or_eos(tokenizer):
    model = successor_model(tokenizer, ["x ab\ncd", "yzw~q"])
    examples = [
        {"prompt": "long prompt x", "completion": " ab"},
        {"prompt": "y", "completion": " zw"},
        {"prompt": "y", "completion": "zwq"},
        {"prompt": "x", "completion": "-", "answers": ["no", "ab "]},
        {"prompt": "x", "completion": "ab", "answers": ["no"]},
    ]
    result = exact_match(model, tokenizer, examples, 2, 10)
    assert [sample.prediction for sample in result.samples] == ["ab", "zw", "zw", "ab", "ab"]
    assert [sample.is_correct for sample in result.samples] == [True, True, False, True, False]
    assert (result.correct, result.total, result.accuracy) == (3, 5, 0.6)


@pytest.mark.parametrize(
    ("one", "other", "edits"),
    [("", "", 0), ("", "a b", 2), ("a b", "", 2), ("a b c", "a c", 1), ("a b", "b a", 2)]
    + [("k ih t ah n", "s ih t ih ng", 3), ("x a b", "a b y", 2)],
)
def test_edit_distance(one, other, edits):
    assert edit_distance(one.split(), other.split()) == edits
    assert edit_distance(other.split(), one.split()) == edits


def test_word_error_rate_is_edits_over_the_words_of_the_nearest_answers(tokenizer):
    model = successor_model(tokenizer, ["xa b\n", "yc~"])
    examples = [
        {"prompt": "x", "completion": "a d"},  # wrote "a b": one edit, two words
        {"prompt": "x", "completion": "-", "answers": ["c d e f", "a b c"]},  # one edit, three
        {"prompt": "y", "completion": "c"},
    ]
    result = exact_match(model, tokenizer, examples, 2, 8)
    assert result.error_rate == pytest.approx(2 / 6)
    assert exact_match(model, tokenizer, examples[2:], 2, 8).error_rate is None


def test_a_choice_is_the_completion_of_least_loss(tokenizer):
    model = spread(tiny_olmoe()).eval()
    examples = [
        {"prompt": prompt, "completion": " b", "choices": [" b", " q", " longer", " z"]}
        for prompt in ("a", "the longest of them", "bcd", "hello", "xy")
    ]
    result = exact_match(model, tokenizer, examples, 2, 1)
    for sample, example in zip(result.samples, examples, strict=True):
        head = tokenizer(example["prompt"])["input_ids"]
        nats = []
        for choice in example["choices"]:
            tail = [*tokenizer(choice)["input_ids"], EOS]
            row = {"input_ids": head + tail, "labels": [-100] * len(head) + tail}
            mean, count = loss_by_hand(model, [row])
            nats.append(mean * count)
        assert sample.prediction == example["choices"][nats.index(min(nats))].strip()
        assert sample.is_correct == (sample.prediction == "b")
    assert len({sample.prediction for sample in result.samples}) > 1
    assert result.error_rate is None


def test_every_end_token_of_the_model_ends_an_answer(tokenizer):
    model = successor_model(tokenizer, ["xab!c"])
    model.generation_config.eos_token_id = [EOS, tokenizer("!")["input_ids"][0]]
    result = exact_match(model, tokenizer, [{"prompt": "x", "completion": "ab"}], 1, 9)
    assert result.samples[0].prediction == "ab"


def test_generation_stops_once_all_have_ended(tokenizer, monkeypatch):
    model = successor_model(tokenizer, ["xab\n"])
    lengths = []
    generate = model.generate

    def watched(**options):
        output = generate(**options)
        lengths.append(output.shape[1] - options["input_ids"].shape[1])
        return output

    monkeypatch.setattr(model, "generate", watched)
    exact_match(model, tokenizer, [{"prompt": "x", "completion": "ab"}], 1, 50)
    assert lengths == [3]


def test_limit_and_samples(tokenizer):
    model = successor_model(tokenizer, ["xa\n"])
    examples = [{"prompt": "x", "completion": "a"}] * 12
    result = exact_match(model, tokenizer, examples, 4, 3, limit=11)
    assert (result.total, result.correct, len(result.samples)) == (11, 11, 10)
    assert exact_match(model, tokenizer, examples, 4, 3, limit=100).total == 12


def test_tokenizer_is_left_as_it_was(tokenizer):
    before = (tokenizer.padding_side, tokenizer.pad_token)
    exact_match(tiny_olmoe(), tokenizer, [{"prompt": "x", "completion": "a"}], 1, 1)
    assert (tokenizer.padding_side, tokenizer.pad_token) == before == ("right", None)


def test_peft_model(tokenizer):
    model = get_peft_model(
        successor_model(tokenizer, ["xa\n"]), LoraConfig(target_modules=["q_proj"])
    )
    rows = rows_of([4, 6], unseen=1)
    assert exact_match(model, tokenizer, [{"prompt": "x", "completion": "a"}], 1, 3).accuracy == 1
    assert evaluate_loss(model, rows, padding(tokenizer), 2).target_tokens == 8


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"text": "a"}, "needs a prompt"),
        ({"prompt": "a"}, "needs a prompt, and answers or a completion"),
        ({"prompt": "a", "completion": "b\nc"}, "compares one line"),
        ({"prompt": "", "completion": "b"}, "empty prompt"),
        ({"prompt": "a", "completion": "b", "choices": ["b"]}, "two or more"),
    ],
)
def test_examples_that_cannot_be_matched(tokenizer, example, said):
    with pytest.raises(DataError, match=said):
        exact_match(tiny_olmoe(), tokenizer, [example], 1, 2)


def test_numbers_that_cannot_work(tokenizer):
    examples = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        exact_match(tiny_olmoe(), tokenizer, examples, 1, 0)
    with pytest.raises(ConfigError, match="limit is 0"):
        exact_match(tiny_olmoe(), tokenizer, examples, 1, 2, limit=0)
    with pytest.raises(DataError, match="no examples"):
        exact_match(tiny_olmoe(), tokenizer, [], 1, 2)
