import torch
from torch import nn

from deepseek_mp.optim import AdamW, embeddings_apart
from deepseek_mp.workloads.gpt import GPTConfig, byte_gpt


def test_embeddings_and_a_tied_head_keep_fp32_moments():
    model = byte_gpt(GPTConfig(width=64, layers=1, context=64))
    model.blocks[0].up.weight.requires_grad_(False)
    optimizer = AdamW(embeddings_apart(model), states="8bit")
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimizer.step()
    in_blocks = {name for name, p in model.named_parameters() if "exp_avg_codes" in optimizer.state[p]}
    assert in_blocks == {f"blocks.0.{name}.weight" for name in ("qkv", "out", "down")}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in trained}


def test_a_model_without_embeddings_has_one_group():
    assert [len(group["params"]) for group in embeddings_apart(nn.Linear(2, 2))] == [2]
