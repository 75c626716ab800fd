"""A step on paper takes what a real step takes: memory counted on both, tensor by tensor.

Run: make test ARGS=tests/forecast/test_on_paper.py
"""

import pytest
import torch
from peft import get_peft_model
from tiny import make_batch, make_config, make_model
from transformers import AutoModelForCausalLM

from drlora import DrLoraConfig
from drlora.forecast import step
from drlora.forecast.counting import Counting
from drlora.forecast.memory import SHAPE_BYTES, memory_forecast, optimizer_bytes
from drlora.forecast.pace import GPUS, measure_pace, seconds_on, with_layers
from drlora.forecast.step import Batch, adapted_on_paper, pass_on_paper
from drlora.ops import scratch
from drlora.ops.loop import KEPT_SHAPES, kept_shapes

ROWS, LENGTH = 16, 48
ADAPTER = dict(r_init=3, r_target=3, r_max=3)


def on_paper(family: str, dtype: torch.dtype, checkpoints: bool = False,
             rows: int = ROWS, length: int = LENGTH, **changes):  # fmt: skip
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(make_config(family, **changes))
    model = adapted_on_paper(skeleton, DrLoraConfig(**ADAPTER), dtype)
    return model, pass_on_paper(model, Batch(rows, length, checkpoints), dtype)


def counted(family: str, dtype: torch.dtype, engine: str = "auto",
            rows: int = ROWS, length: int = LENGTH, passes: int = 1, **changes) -> int:  # fmt: skip
    """Most bytes of a real step, by the same count, as in a process that has kept no scratch.

    Scratch that another test left, which may be larger, would be counted at its own size.
    """
    scratch._own.__dict__.clear()
    model = get_peft_model(
        make_model(family, **changes).to(dtype), DrLoraConfig(**ADAPTER, engine=engine)
    )
    model.train()
    batch = make_batch(rows=rows, length=length)
    counting = Counting()
    counting.ignore([*model.parameters(), *model.buffers(), *batch.values()])
    with counting:
        for _ in range(passes):
            model(**batch, use_cache=False).loss.backward()
    return counting.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3", "qwen2_moe"])
def test_memory_is_that_of_a_real_step(family, dtype):
    """At a width where experts and logits matter; within a tenth."""
    sizes = dict(hidden_size=128, vocab_size=512)
    _, found = on_paper(family, dtype, **sizes)
    assert found.peak_bytes == pytest.approx(counted(family, dtype, **sizes), rel=0.1)


@pytest.mark.parametrize("layers", [2, 13])
def test_a_later_pass_of_a_step_has_the_gradients_of_those_before_it(layers):
    """A small batch, beside which they matter; also where some layers stand for all."""
    sizes = dict(rows=1, length=8, num_hidden_layers=layers)
    model, first = on_paper("olmoe", torch.float32, **sizes)
    later = pass_on_paper(model, Batch(1, 8, follows=True), torch.float32)
    one, two = (counted("olmoe", torch.float32, passes=passes, **sizes) for passes in (1, 2))
    assert later.peak_bytes - first.peak_bytes == pytest.approx(two - one, rel=0.1)
    assert later.kept_bytes == first.kept_bytes
    assert first == pass_on_paper(model, Batch(1, 8), torch.float32)  # none are left


def test_a_count_does_not_depend_on_what_was_counted_before():
    sizes = dict(hidden_size=128, vocab_size=512)
    first = counted("qwen2_moe", torch.bfloat16, **sizes)
    counted("qwen2_moe", torch.float32, **sizes)
    assert counted("qwen2_moe", torch.bfloat16, **sizes) == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_a_cpu_does_not_fuse(dtype):
    """Long rows, and values narrower than queries: the matrix is most of the step."""
    sizes = dict(rows=1, length=512)
    model, found = on_paper("deepseek_v3", dtype, **sizes)
    config = model.get_base_model().config
    assert config.v_head_dim < config.qk_nope_head_dim + config.qk_rope_head_dim
    matrix = config.num_attention_heads * 512 * 512 * 4
    assert found.peak_bytes > 2 * matrix
    assert found.peak_bytes == pytest.approx(counted("deepseek_v3", dtype, **sizes), rel=0.1)
    # A GPU fuses these too.
    assert pass_on_paper(model, Batch(1, 512, engine="grouped"), dtype).peak_bytes < matrix


def test_attention_with_dropout_is_not_fused_on_a_cpu():
    changes = dict(rows=1, length=512, attention_dropout=0.1)
    model, found = on_paper("olmoe", torch.float32, **changes)
    assert found.peak_bytes == pytest.approx(counted("olmoe", torch.float32, **changes), rel=0.1)
    _, fused = on_paper("olmoe", torch.float32, rows=1, length=512)
    assert found.peak_bytes > 2 * fused.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_of_a_gpu_runs_on_paper_itself(dtype):
    sizes = dict(hidden_size=128, vocab_size=512)
    model, loop = on_paper("olmoe", dtype, **sizes)
    found = pass_on_paper(model, Batch(ROWS, LENGTH, engine="grouped"), dtype)
    wanted = counted("olmoe", dtype, engine="grouped", **sizes)
    assert found.peak_bytes == pytest.approx(wanted, rel=0.1)
    assert found.peak_bytes > loop.peak_bytes
    assert found.work.products == pytest.approx(loop.work.products, rel=0.5)


def test_of_many_layers_some_stand_for_all(monkeypatch):
    """A model that begins with a layer of another kind; the model is as it was afterwards."""
    model, found = on_paper("deepseek_v3", torch.float32, num_hidden_layers=13)
    monkeypatch.setattr(step, "LAYERS", (98, 99))
    whole = pass_on_paper(model, Batch(ROWS, LENGTH), torch.float32)
    assert found.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.01)
    assert found.kept_bytes == pytest.approx(whole.kept_bytes, rel=0.01)
    assert found.work.products == pytest.approx(whole.work.products, rel=0.001)
    assert found.work.calls == pytest.approx(whole.work.calls, rel=0.01)


def test_checkpointed_layers_are_kept_no_more_and_computed_again():
    changes = dict(num_hidden_layers=6)
    _, plain = on_paper("olmoe", torch.float32, **changes)
    _, again = on_paper("olmoe", torch.float32, checkpoints=True, **changes)
    assert again.kept_bytes < plain.kept_bytes / 2
    assert again.peak_bytes < plain.peak_bytes
    assert again.work.products > 1.2 * plain.work.products


def test_what_is_given_back_is_not_counted():
    counting = Counting()
    with counting:
        one = torch.empty(1000, device="meta")
        assert counting.bytes == 4000
        two = one + one
        assert counting.bytes == 8000
        del one
        assert counting.bytes == 4000
        view = two.view(10, 100)
        del two
        assert counting.bytes == 4000
        del view
    assert (counting.bytes, counting.peak_bytes) == (0, 8000)


@pytest.mark.parametrize(
    ("run", "products"),
    [
        (lambda x, w: x @ w, 2 * 8 * 16 * 4),
        (lambda x, w: torch.addmm(x.new_empty(8, 4), x, w), 2 * 8 * 16 * 4),
        (lambda x, w: x + x, 0),
    ],
)
def test_work_of_products(run, products):
    counting = Counting()
    with counting:
        run(torch.empty(8, 16, device="meta"), torch.empty(16, 4, device="meta"))
    assert counting.work.products == products
    assert counting.work.calls == 1


def test_parts_of_memory():
    model, found = on_paper("olmoe", torch.float32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    on_gpu = memory_forecast(model, 1000.0, 200.0, "adamw_torch", 50.0, on_cpu=False)
    assert (on_gpu.weights, on_gpu.step, on_gpu.checkpoint, on_gpu.allocator) == (1000, 200, 0, 0)
    assert (on_gpu.adapter, on_gpu.optimizer) == (4 * trained, 8 * trained)
    assert on_gpu.total == sum(v for k, v in on_gpu.to_dict().items() if k != "total")
    on_cpu = memory_forecast(model, 1000.0, found.peak_bytes, "sgd", 50.0)
    assert on_cpu.checkpoint == 50 and on_cpu.optimizer == 0 and on_cpu.process > 1e8
    assert on_cpu.code == 0  # in float32 none is written
    in_16_bits = memory_forecast(
        model, 1000.0, found.peak_bytes, "sgd", 50.0, works_in=torch.bfloat16
    )
    assert in_16_bits.code == pytest.approx(kept_shapes() * SHAPE_BYTES)
    assert optimizer_bytes("paged_adamw_8bit") == 0


def test_the_environment_says_of_how_many_shapes_code_is_kept(monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "12")
    assert kept_shapes() == 12
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "many")
    assert kept_shapes() == KEPT_SHAPES


def test_a_model_with_fewer_layers():
    """What is listed by layer is cut too, and the original stays."""
    config = make_config("olmoe", num_hidden_layers=5)
    config.layer_types = ["full_attention"] * 5
    cut = with_layers(config, 2)
    assert (cut.num_hidden_layers, len(cut.layer_types)) == (2, 2)
    assert (config.num_hidden_layers, len(config.layer_types)) == (5, 5)


def test_pace_is_measured_on_few_layers():
    config = make_config("deepseek_v3", num_hidden_layers=6)
    batch = Batch(2, 16)
    pace = measure_pace(config, DrLoraConfig(**ADAPTER), batch, torch.float32)
    assert pace.layers == 4  # up to the first with experts, and two more
    assert 0 < pace.seconds < 30
    assert pace.of(pace.work) == pytest.approx(pace.seconds)
    assert seconds_on(GPUS["t4"], pace.work) > seconds_on(GPUS["h100"], pace.work) > 0
