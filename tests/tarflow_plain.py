"""TARFlow as one writes it from the paper: the peer that tests/bench.py measures flow.py against.

The same mathematics, parameters and names of parameters as flow.Flow with blocks of equal depth, so
weights can be exchanged and results compared (tests/test_bench.py). None of its savings: attention
under a dense boolean mask, a cache that grows by torch.cat, class terms computed again for every
token, a pass of its own for "no class".
"""
import torch
from torch import nn
import torch.nn.functional as F


def plain_names(state):
    """Weights of flow.Flow by name -> by their names here, where a block is its transformer"""
    return {name.replace('.transformer', ''): value for name, value in state.items()}


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h, mask, cache):
        """h (B, n, C) -> (B, n, C); mask (n, n) where no cache; cache: a dictionary, to be
        filled"""
        B, n, C = h.shape
        parts = self.qkv(h).chunk(3, dim=-1)
        q, k, v = (part.view(B, n, self.heads, -1).transpose(1, 2) for part in parts)
        if cache is not None:
            if self in cache:
                k_old, v_old = cache[self]
                k, v = torch.cat([k_old, k], dim=2), torch.cat([v_old, v], dim=2)
            cache[self] = k, v
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(h.transpose(1, 2).reshape(B, n, C))


class Layer(nn.Module):
    """Attention and MLP with adaLN-Zero, as in DiT"""

    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))
        self.ada = nn.Linear(width, 6 * width)

    def forward(self, h, cond, mask, cache):
        ada = self.ada(F.silu(cond))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = ada.chunk(6, dim=-1)
        h = h + gate1 * self.attn(self.norm(h) * (1 + scale1) + shift1, mask, cache)
        return h + gate2 * self.mlp(self.norm(h) * (1 + scale2) + shift2)


class Block(nn.Module):
    def __init__(self, dim, tokens, width, heads, layers, classes, reverse):
        super().__init__()
        self.reverse = reverse
        self.proj_in = nn.Linear(dim, width)
        self.pos = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.classes = nn.Embedding(classes + 1, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ada = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, 2 * dim)
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        self.register_buffer('mask', mask, persistent=False)
        for module in [self.ada, self.proj_out, *(layer.ada for layer in self.layers)]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def net(self, x, y, pos, mask=None, cache=None):
        """x (B, n, D) -> mu, log_scale (B, n, D) of the tokens that follow each of them"""
        cond, h = self.classes(y), self.proj_in(x) + pos
        for layer in self.layers:
            h = layer(h, cond, mask, cache)
        shift, scale = self.ada(F.silu(cond))[:, None].chunk(2, dim=-1)
        return self.proj_out(self.norm(h) * (1 + scale) + shift).float().chunk(2, dim=-1)

    def forward(self, x, y):
        x = x.flip(1) if self.reverse else x
        mu, log_scale = self.net(x, y, self.pos, self.mask)
        mu = torch.cat([torch.zeros_like(mu[:, :1]), mu[:, :-1]], dim=1)
        log_scale = torch.cat([torch.zeros_like(log_scale[:, :1]), log_scale[:, :-1]], dim=1)
        z = (x - mu) * torch.exp(-log_scale)
        return z.flip(1) if self.reverse else z, -log_scale.sum((1, 2))

    def inverse(self, z, y, cfg, null):
        z = z.flip(1) if self.reverse else z
        x, cache, cache_u = [z[:, :1]], {}, {}
        for t in range(z.shape[1] - 1):
            pos = self.pos[t:t + 1]
            mu, log_scale = self.net(x[-1], y, pos, cache=cache)
            if cfg:
                mu_u, log_scale_u = self.net(x[-1], torch.full_like(y, null), pos, cache=cache_u)
                s = torch.exp(2 * (log_scale - log_scale_u)).clamp(max=1)
                precision = 1 + cfg - cfg * s
                mu = ((1 + cfg) * mu - cfg * s * mu_u) / precision
                log_scale = log_scale - 0.5 * torch.log(precision)
            x.append(mu + torch.exp(log_scale) * z[:, t + 1:t + 2])
        x = torch.cat(x, dim=1)
        return x.flip(1) if self.reverse else x


class TARFlow(nn.Module):
    """Blocks of `layers` layers each, image -> noise; every second one reads right to left."""

    def __init__(self, dim, tokens, width, heads, blocks, layers, classes):
        super().__init__()
        self.null = classes
        self.blocks = nn.ModuleList(
            Block(dim, tokens, width, heads, layers, classes, reverse=i % 2 == 1)
            for i in range(blocks))

    def forward(self, x, y):
        """x (B, T, D), y (B,) -> z (B, T, D), logdet (B,)"""
        logdet = 0
        for block in self.blocks:
            x, logdet_block = block(x, y)
            logdet = logdet + logdet_block
        return x, logdet

    @torch.no_grad()
    def sample(self, z, y, cfg=0.0, every_block=False):
        """z (B, T, D), y (B,) -> x (B, T, D); guided in the last block, or in every one, as TARFlow
        is"""
        for i, block in reversed(list(enumerate(self.blocks))):
            guided = every_block or i == len(self.blocks) - 1
            z = block.inverse(z, y, cfg if guided else 0.0, self.null)
        return z
