"""Tests that need a GPU; `make test-gpu` runs them among its parts."""

import copy
import os
import sys

import pytest
import torch

from empathic.kernels_empathic import without_kernels

sys.path.append(os.path.dirname(__file__))
from test_memory_empathic import KINDS, compressor, conversation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU here."),
]
TURNS = [
    [{"role": "user", "content": "hello there"}, {"role": "user", "content": "how are you"}],
    [{"role": "user", "content": "hi"}],
]


@pytest.fixture(scope="module")
def batch(processor):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    return processor.apply_chat_template(TURNS, add_generation_prompt=True, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, largest", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_a_stream_on_a_gpu_equals_one_pass_and_the_exact_code(kind, dtype, largest):
    torch.manual_seed(0)
    model, ids = compressor(kind).to("cuda", dtype), conversation(1, 90).cuda()

    def far(found, wanted):
        return float((found - wanted).float().norm() / wanted.float().norm())

    with torch.no_grad():
        with without_kernels():
            wanted = model(ids)
        assert far(model(ids), wanted) < largest
        state = model.new_state()
        pieces = [model.append(state, ids[:, first : first + 13]) for first in range(0, 90, 13)]
    assert far(torch.cat(pieces), wanted) < largest


def test_the_model_gives_the_same_logits_on_both_devices(model, batch):
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**batch).logits[real]
        found = copy.deepcopy(model).cuda()(**batch.to("cuda")).logits.cpu()[real]
    assert torch.allclose(found, wanted, atol=2e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_replies_are_generated_in_half_precision(model, batch, implementation):
    half = copy.deepcopy(model).to("cuda", torch.bfloat16)
    half.set_attn_implementation(implementation)
    inputs = batch.to("cuda")
    replies = half.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert replies.shape[1] == inputs["input_ids"].shape[1] + 4


def test_a_training_step_reaches_the_memory_encoder(model, batch):
    trained = copy.deepcopy(model).cuda().train()
    inputs = batch.to("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        trained(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradient = trained.model.memory.mem_embedding.grad
    assert gradient.isfinite().all() and gradient.any()
