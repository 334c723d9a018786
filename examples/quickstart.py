"""A small random Llama on two ranks: cut, quantized to NVFP4, compiled, explained, and compared with itself unfused.

    python examples/quickstart.py
"""
import sys

import torch
from rich.console import Console

import fusewire
from fusewire import screen
from fusewire.launch import RankContext, launch


def main(context: RankContext) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)  # the same whole model on every rank, of which each keeps its part
    config = AutoConfig.for_model("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, vocab_size=512, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    prompt = torch.randint(512, (1, 64))

    fusewire.parallelize(model, quantization="nvfp4")
    compiled = fusewire.compile(model, fusewire.Config(plan="sharded"))

    tokens = fusewire.generate(compiled, fusewire.static_cache(model, 1, 80), prompt, 16)
    report = fusewire.explain(compiled, tokens=64)

    compiled.plan = "unfused"  # the same captured graph, with nothing fused
    unfused = fusewire.generate(compiled, fusewire.static_cache(model, 1, 80), prompt, 16)

    if context.rank == 0:
        screen.sites(Console(width=150), report)
        print("tokens equal to those of the unfused model:", torch.equal(tokens, unfused))


if __name__ == "__main__":
    sys.exit(launch(main, 2))
