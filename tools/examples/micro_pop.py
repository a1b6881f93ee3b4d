"""Prefill-only pruning in one file: a toy decoder learns to copy and to count, and then skips layers in prefill.

`python -m tools.examples.micro_pop` takes a minute at most. The line with "prefill-only pruning" is the method.

- A virtual gate is a factor of 1 on what a layer adds. The squared gradient of an answer's loss with respect to
  it says how sensitive the answer is to the layer. In prefill, the deep half has the lowest scores.
- So prefill may skip the deep half. The last prompt token, the boundary, may not, because it predicts the first token
  of the answer. And the skipped layers must still give keys and values, because generated tokens attend to them.
"""

import torch
import torch.nn.functional as F
from torch import nn

LETTERS = 24  # ids 0 to 23: an alphabet that starts anew after its last letter
COPY, COUNT, ANSWER = 24, 25, 26  # ids that mark the task, and the end of the prompt
LENGTH = 8  # letters in a prompt, and in an answer
LAYERS, WIDTH, HEADS = 6, 64, 4  # in shapes: B prompts, T new and N known tokens, V ids, D width, H heads, E = D / H


class Layer(nn.Module):
    """Attention and an MLP. Each adds an update to h [B, T, D]."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.queries = nn.Linear(WIDTH, WIDTH, bias=False)
        self.keys_values = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def attention(self, h, kv):
        """The update of T new tokens. Their keys and values are the last ones of kv [B, N + T, 2 D]."""
        q, k, v = self.queries(self.norm(h)), *kv.chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, T or N + T, E]
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(27, WIDTH)
        self.positions = nn.Embedding(2 * LENGTH + 2, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 27))

    def forward(self, tokens, cache, skipped=(), gates=(1,) * LAYERS):
        """Append tokens [B, T] to the cache, and return their logits [B, T, V].

        Args:
            cache: For each layer, the keys and values [B, N, 2 D] of the tokens so far.
            skipped: Layers that these tokens skip. Their keys and values are computed all the same.
            gates: For each layer, a factor [T, 1] of its updates. It is 1 unless importance is measured.
        """
        start = max(known.shape[1] for known in cache)  # in some layers, those of the prompt may have been dropped
        h = self.embedding(tokens) + self.positions.weight[start : start + tokens.shape[1]]
        for number, layer in enumerate(self.layers):
            kv = layer.keys_values(layer.norm(h))  # a skipped layer has them too, from an earlier layer's h
            cache[number] = torch.cat((cache[number], kv), dim=1)
            if number in skipped:
                continue  # prefill-only pruning
            h = h + gates[number] * layer.attention(h, cache[number])
            h = h + gates[number] * layer.mlp(h)
        return self.head(h)


def new_cache(batch_size):
    return [torch.empty(batch_size, 0, 2 * WIDTH) for _ in range(LAYERS)]


def examples(count):
    """Return prompts [B, T] and answers [B, LENGTH]: half copy their letters, half count on from the last one."""
    letters = torch.randint(LETTERS, (count, LENGTH))
    task = torch.randint(COPY, COUNT + 1, (count, 1))
    counted = (letters[:, -1:] + torch.arange(1, LENGTH + 1)) % LETTERS
    prompts = torch.cat((task, letters, torch.full((count, 1), ANSWER)), 1)
    return prompts, torch.where(task == COPY, letters, counted)


def train(model, steps=400):
    """Learn to predict the next token of examples."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        tokens = torch.cat(examples(64), 1)
        logits = model(tokens[:, :-1], new_cache(64))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def importance(model):
    """Return the mean squared gradient of an answer's loss with respect to each stage's gates, [2, LAYERS]."""
    scores = torch.zeros(2, LAYERS)
    for _ in range(200):
        prompts, answers = examples(1)
        tokens = torch.cat((prompts, answers), 1)[:, :-1]
        both = torch.ones(2, LAYERS, requires_grad=True)  # prefill's gates, and decode's
        in_prefill = torch.arange(tokens.shape[1]) < prompts.shape[1] - 1  # the last prompt token counts as decode
        gates = torch.where(in_prefill, both[0, :, None], both[1, :, None])[..., None]  # [LAYERS, T, 1]
        logits = model(tokens, new_cache(1), gates=gates)[:, -LENGTH:]
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="sum")
        scores += torch.autograd.grad(loss, both)[0] ** 2 / 200
    return scores


@torch.no_grad()
def exact_answers(model, prefill=(), boundary=(), decode=(), without_kv=()):
    """Answer 500 prompts greedily, and return the shares of exact answers as text.

    The first three arguments are the layers that are skipped by the prompt without its last token, by that token, and
    by generated tokens. In the layers `without_kv`, K and V of the prompt without its last token are dropped.
    """
    torch.manual_seed(1)
    prompts, answers = examples(500)
    cache = new_cache(500)
    model(prompts[:, :-1], cache, prefill)
    for number in without_kv:
        cache[number] = cache[number][:, :0]
    tokens = [model(prompts[:, -1:], cache, boundary).argmax(-1)]
    while len(tokens) < LENGTH:
        tokens.append(model(tokens[-1], cache, decode).argmax(-1))
    exact = (torch.cat(tokens, 1) == answers).all(1)
    is_copy = prompts[:, 0] == COPY
    return f"{exact[is_copy].float().mean():8.0%}  {exact[~is_copy].float().mean():8.0%}"


def main():
    torch.set_num_threads(1)  # the tensors are too small for more
    torch.manual_seed(5)
    model = Decoder()
    print("training, which takes most of the minute ...", flush=True)
    train(model)
    print("importance by virtual gates\nlayer       prefill        decode")
    for number, (prefill, decode) in enumerate(importance(model).T.tolist()):
        print(f"{number:5}  {prefill:12.2g}  {decode:12.2g}")
    deep = range(LAYERS // 2, LAYERS)
    print("\nexact answers                                  copying  counting")
    print("the full model                               ", exact_answers(model))
    print("prefill skips the deep half of the layers    ", exact_answers(model, deep))
    print("  and so does the last prompt token          ", exact_answers(model, deep, boundary=deep))
    print("  or the prompt's K and V there are dropped  ", exact_answers(model, deep, without_kv=deep))
    print("all tokens skip them                         ", exact_answers(model, deep, deep, deep))
    print("prefill skips all layers but the first       ", exact_answers(model, range(1, LAYERS)))


if __name__ == "__main__":
    main()
