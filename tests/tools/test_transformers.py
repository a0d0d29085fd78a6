"""Models of transformers, some of whose blocks are couplings of its parts, alone and in its ``Trainer``."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.models.bert.modeling_bert import BertAttention, BertIntermediate, BertOutput
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention

import invzoo as iz
from invzoo.testing.memory import track_memory
from tests.reference import assert_near
from tests.tools.nets import assert_learns_and_saves

WORDS, LENGTH, WIDTH = 20, 12, 32

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore::FutureWarning"),  # its own use of others
]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """The ``Trainer`` is made of Accelerate, which keeps what the first accelerator of a process was told."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Attends(nn.Module):
    """Attention of the library's on one stream, behind a norm; the mask is a side input."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH // 2), attention

    def forward(self, x: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        return self.attention(self.norm(x), attention_mask=attention_mask)[0]


class BertFeedForward(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.intermediate, self.output = BertIntermediate(config), BertOutput(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), torch.zeros_like(x))  # the residual is the coupling's


class Block(nn.Module):
    """What a model of transformers takes for a block; what it does not know of is left to the coupling."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.coupling = iz.AdditiveCoupling(f, g, dim=-1)

    def mask(self, *args: Any) -> Tensor | None:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, *args: Any, **others: Any) -> Tensor:
        return self.coupling(hidden_states, attention_mask=self.mask(*args))


class BertBlock(Block):
    def mask(self, attention_mask: Tensor | None = None, *args: Any) -> Tensor | None:
        return attention_mask


class GPT2Block(Block):
    def mask(self, cache: Any = None, attention_mask: Tensor | None = None, *args: Any) -> Tensor | None:
        return attention_mask


def bert(depth: int = 8, replaced: range | None = None) -> BertForSequenceClassification:
    sizes = {"vocab_size": WORDS, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2, "num_labels": 2}
    config = BertConfig(hidden_size=WIDTH, num_hidden_layers=depth, max_position_embeddings=LENGTH, **sizes)
    model = BertForSequenceClassification(config)
    half = copy.copy(config)
    half.hidden_size = WIDTH // 2
    for i in range(depth) if replaced is None else replaced:
        model.bert.encoder.layer[i] = BertBlock(Attends(BertAttention(half)), BertFeedForward(half))
    return model.train()


def gpt2(depth: int = 8, replaced: range | None = None) -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=WIDTH, n_layer=depth, n_head=2, use_cache=False)
    config.bos_token_id = config.eos_token_id = 0
    model = GPT2LMHeadModel(config)
    half = copy.copy(config)
    half.hidden_size = WIDTH // 2
    for i in range(depth) if replaced is None else replaced:
        parts = Attends(GPT2Attention(half, layer_idx=i)), nn.Sequential(nn.LayerNorm(WIDTH // 2), GPT2MLP(WIDTH, half))
        model.transformer.h[i] = GPT2Block(*parts)
    return model.train()


def texts(count: int = 48) -> list[dict[str, Tensor]]:
    """Draw sentences, some of them short; the label says whether the first word is a late one in the vocabulary."""
    words = torch.randint(1, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (count, 1), generator=torch.Generator().manual_seed(2))
    masks = (torch.arange(LENGTH) < lengths).long()
    return [
        {"input_ids": w, "attention_mask": m, "labels": (w[0] > WORDS // 2).long()}
        for w, m in zip(words, masks, strict=True)
    ]


def batch(make: Callable[..., PreTrainedModel], count: int = 48) -> dict[str, Tensor]:
    stacked = {k: torch.stack([text[k] for text in texts(count)]) for k in ("input_ids", "attention_mask", "labels")}
    if make is gpt2:  # counts from its first word
        stacked["input_ids"] = stacked["labels"] = (stacked["input_ids"][:, :1] + torch.arange(LENGTH)) % WORDS
    return stacked


MODELS = pytest.mark.parametrize("make", [bert, gpt2])


def gradients(model: PreTrainedModel, inputs: dict[str, Tensor], mode: str) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    with iz.mode(model, mode):
        model(**inputs).loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@MODELS
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "gradient_checkpointing"])
def test_gradients_of_a_model_with_some_blocks_replaced(make: Callable[..., PreTrainedModel], checkpointed: bool):
    """Dropout is on, and plain blocks stand before and behind the couplings."""
    model = make(4, range(1, 3)).double()
    if checkpointed:
        model.gradient_checkpointing_enable()
    expected = gradients(model, batch(make), "store")
    for mode in ("recompute", "invert", "invert"):
        assert_near(gradients(model, batch(make), mode), expected)


@pytest.mark.usual
@MODELS
def test_memory_does_not_grow_with_the_blocks(make: Callable[..., PreTrainedModel]):
    inputs = batch(make)

    def held(depth: int, mode: str) -> int:
        model = make(depth)
        with iz.mode(model, mode), track_memory() as memory:
            loss = model(**inputs).loss
            current = memory.current
        loss.backward()
        return current

    held(1, "invert")
    assert held(8, "invert") < 1.01 * held(2, "invert")  # the state of a generator for each dropout is small
    assert held(8, "store") > 3 * held(2, "invert")


@MODELS
def test_trainer(make: Callable[..., PreTrainedModel], tmp_path):
    inputs = batch(make)
    examples = [{k: v[i] for k, v in inputs.items()} for i in range(48)]

    def train(model: PreTrainedModel) -> list[float]:
        quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
        steps = {"num_train_epochs": 6, "per_device_train_batch_size": 48, "logging_steps": 1, "learning_rate": 1e-2}
        trainer = Trainer(model, TrainingArguments(str(tmp_path), **quiet, **steps), train_dataset=examples)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert_learns_and_saves(lambda: make().double(), train, rtol=1e-6, less=2)


@MODELS
def test_save_pretrained(make: Callable[..., PreTrainedModel], tmp_path):
    model = make(2).eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded = make(2).eval()
    from safetensors.torch import load_model  # noqa: PLC0415 - comes with transformers

    load_model(loaded, tmp_path / "model.safetensors", strict=False)  # strict: tied weights are saved once
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch(make)).logits, model(**batch(make)).logits, rtol=0, atol=0)


def test_generation():
    model = gpt2(2).eval()
    prompt = batch(gpt2, 2)["input_ids"][:, :4]
    found = model.generate(prompt, max_length=8, do_sample=False, use_cache=False)
    words = prompt
    for _ in range(4):
        with torch.no_grad():
            words = torch.cat((words, model(words).logits[:, -1:].argmax(-1)), 1)
    assert F.pad(found, (0, 8 - found.shape[1])).equal(words)
