"""Per-sample Jacobians of an encoder from transformers: which token of a sentence moves its first one most.

pip install transformers
python examples/jacobians_transformers.py
"""

import argparse

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

import pmf


def main(arguments: list[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=12)
    settings = parser.parse_args(arguments)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    encoder = BertModel(config, add_pooling_layer=False).eval()
    words = torch.randint(100, (settings.batch, settings.tokens))
    embedded = encoder.embeddings.word_embeddings(words)

    def first_token(embedding: Tensor) -> Tensor:
        return encoder(inputs_embeds=embedding[None]).last_hidden_state[0, 0]

    with pmf.replace_sdpa(), torch.no_grad():
        # [sample, output feature, token, input feature]
        jacobians = torch.func.vmap(torch.func.jacfwd(first_token))(embedded)
    influence = jacobians.square().sum((1, 3)).sqrt()
    for sample, row in enumerate(influence):
        print(f"sentence {sample}: token {row[1:].argmax().item() + 1} moves the first token most")
    return jacobians


if __name__ == "__main__":
    main()
