# SPDX-License-Identifier: Apache-2.0
"""Vision-RWKV re-stated from its published formulas, for tests: naive, in float64, a token at a time.

`kernel` is its operator; `weights` are random ones under the names of its files, `logits` the whole network on them.
"""

import torch
from torch.nn.functional import conv2d, layer_norm


def kernel(decay, bonus, key, value, splits=32, eps=1e-6):
    """The kernels' steps for all channels at once: (exponent, sum, sum of weights) are kept for the tokens behind and
    ahead, every sum relative to its exponent. decay, bonus [C], key, value [B, N, C]; both are divided by N here.
    """
    n = key.shape[1]
    w, u = decay.double() / n, bonus.double() / n
    k, v = key.double(), value.double()
    nothing = (torch.full_like(k[:, 0], -1e38), torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]))

    def add(state, exponent, x, weight):
        top = torch.maximum(state[0], exponent)
        old, new = torch.exp(state[0] - top), torch.exp(exponent - top)
        return top, state[1] * old + x * new, state[2] * old + weight * new

    length = -(-n // splits)
    bounds = [(start, min(start + length, n)) for start in range(0, n, length)]
    to_end, to_start = [], []  # each chunk as seen from the token after it, and from its first token
    for start, end in bounds:
        behind, ahead = nothing, nothing
        for i in range(start, end):
            ahead = add(ahead, k[:, i] - w * (i - start), v[:, i], 1)
        for i in reversed(range(start, end)):
            behind = add(behind, k[:, i] - w * (end - i), v[:, i], 1)
        to_end.append(behind)
        to_start.append(ahead)
    rows = []
    for number, (start, end) in enumerate(bounds):
        behind, ahead = nothing, nothing
        for i in range(number):
            top, x, weight = to_end[i]
            behind = add(behind, top - w * (number - i - 1) * length, x, weight)
        for i in range(number, len(bounds)):
            top, x, weight = to_start[i]
            ahead = add(ahead, top - w * (i - number) * length, x, weight)
        leaving = torch.exp(k[:, start] - ahead[0])
        ahead = (ahead[0], ahead[1] - leaving * v[:, start], ahead[2] - leaving)
        for i in range(start, end):
            top = torch.maximum(torch.maximum(ahead[0], behind[0]), u + k[:, i])
            a, b, own = torch.exp(ahead[0] - top), torch.exp(behind[0] - top), torch.exp(u + k[:, i] - top)
            rows.append((ahead[1] * a + behind[1] * b + own * v[:, i]) / (ahead[2] * a + behind[2] * b + own + eps))
            behind = add((behind[0] - w, behind[1], behind[2]), k[:, i], v[:, i], 1)
            following = (i + 1) % n
            ahead = add((ahead[0] + w, ahead[1], ahead[2]), k[:, following] + w, -v[:, following], -1)
    return torch.stack(rows, dim=1)


def weights(dim=16, depth=3, side=4, patch=8, classes=10, *, scaled=False, normed=False, hidden=0, head=True, seed=0):
    """Random weights by the names and shapes of a published file. Its large network has no `fc` but a list as head."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, std=0.3, mean=0.0):
        return mean + std * torch.randn(*shape, generator=generator)

    def norm(name, width):
        return {f"{name}.weight": random(width, mean=1.0), f"{name}.bias": random(width)}

    stored = {
        "backbone.pos_embed": random(1, side**2, dim),
        "backbone.patch_embed.projection.weight": random(dim, 3, patch, patch, std=0.1),
        "backbone.patch_embed.projection.bias": random(dim),
        **norm("backbone.layers.0.ln0", dim),
        **norm("backbone.ln1", dim),
    }
    for i in range(depth):
        layer = f"backbone.layers.{i}"
        stored |= norm(f"{layer}.ln1", dim) | norm(f"{layer}.ln2", dim)
        if scaled:
            stored |= {f"{layer}.gamma1": random(dim, mean=0.5), f"{layer}.gamma2": random(dim, mean=0.5)}
        if normed:
            stored |= norm(f"{layer}.att.key_norm", dim) | norm(f"{layer}.ffn.key_norm", 4 * dim)
        stored |= {f"{layer}.att.{name}.weight": random(dim, dim) for name in ("key", "value", "receptance", "output")}
        stored |= {f"{layer}.att.spatial_mix_{x}": random(1, 1, dim, mean=0.5) for x in "kvr"}
        stored |= {f"{layer}.att.spatial_decay": random(dim, std=4), f"{layer}.att.spatial_first": random(dim, std=2)}
        stored |= {f"{layer}.ffn.spatial_mix_{x}": random(1, 1, dim, mean=0.5) for x in "kr"}
        stored |= {f"{layer}.ffn.key.weight": random(4 * dim, dim), f"{layer}.ffn.value.weight": random(dim, 4 * dim)}
        stored |= {f"{layer}.ffn.receptance.weight": random(dim, dim)}
    if head and hidden:
        stored |= {"head.0.weight": random(hidden, dim), "head.0.bias": random(hidden)}
        stored |= {"head.2.weight": random(classes, hidden), "head.2.bias": random(classes)}
    elif head:
        stored |= {"head.fc.weight": random(classes, dim), "head.fc.bias": random(classes)}
    return stored


def logits(stored, images, operator=kernel):
    """images [B, 3, H, W], whose sides the patch divides into the grid of pos_embed -> [B, classes], in float64."""
    w = {name: value.double() for name, value in stored.items()}

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def optional(x, name):
        return norm(x, name) if f"{name}.weight" in w else x

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    x = conv2d(
        images.double(),
        w["backbone.patch_embed.projection.weight"],
        w["backbone.patch_embed.projection.bias"],
        stride=w["backbone.patch_embed.projection.weight"].shape[-1],
    )
    height, width = x.shape[-2:]
    x = norm(x.flatten(2).mT + w["backbone.pos_embed"], "backbone.layers.0.ln0")

    def shift(x):
        """Channel c of a pixel comes from one of four neighbours, nothing from outside the image."""
        out = torch.zeros_like(x)
        for quarter, (up, left) in enumerate(((0, 1), (0, -1), (1, 0), (-1, 0))):
            some = slice(quarter * x.shape[2] // 4, (quarter + 1) * x.shape[2] // 4)
            for row in range(height):
                for column in range(width):
                    y, z = row - up, column - left
                    if 0 <= y < height and 0 <= z < width:
                        out[:, row * width + column, some] = x[:, y * width + z, some]
        return out

    def attention(x, name):
        near = shift(x)
        k, v, r = (x * w[f"{name}.spatial_mix_{m}"] + near * (1 - w[f"{name}.spatial_mix_{m}"]) for m in "kvr")
        k, v = linear(k, f"{name}.key"), linear(v, f"{name}.value")
        read = operator(w[f"{name}.spatial_decay"], w[f"{name}.spatial_first"], k, v)
        return linear(linear(r, f"{name}.receptance").sigmoid() * optional(read, f"{name}.key_norm"), f"{name}.output")

    def feed_forward(x, name):
        near = shift(x)
        k, r = (x * w[f"{name}.spatial_mix_{m}"] + near * (1 - w[f"{name}.spatial_mix_{m}"]) for m in "kr")
        hidden = optional(linear(k, f"{name}.key").clamp(min=0) ** 2, f"{name}.key_norm")
        return linear(r, f"{name}.receptance").sigmoid() * linear(hidden, f"{name}.value")

    depth = sum(name.endswith("att.spatial_decay") for name in w)
    for layer in (f"backbone.layers.{i}" for i in range(depth)):
        for mix, part, number in ((attention, "att", 1), (feed_forward, "ffn", 2)):
            if f"{layer}.gamma1" in w:  # small, base and large normalise afterwards
                x = x + w[f"{layer}.gamma{number}"] * norm(mix(x, f"{layer}.{part}"), f"{layer}.ln{number}")
            else:
                x = x + mix(norm(x, f"{layer}.ln{number}"), f"{layer}.{part}")
    x = norm(x, "backbone.ln1").mean(1)
    return linear(linear(x, "head.0").tanh(), "head.2") if "head.0.weight" in w else linear(x, "head.fc")
