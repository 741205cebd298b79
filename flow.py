"""The flow: a stack of causal transformers that turns latents into Gaussian noise, and back.

TARFlow (Zhai et al. 2024, arXiv:2412.06329) with two upgrades of SimFlow (arXiv:2512.04084,
appendix B): deep-shallow blocks as in STARFlow (Gu et al. 2025, arXiv:2506.06276), and adaLN-Zero
class conditioning as in DiT (Peebles & Xie 2022, arXiv:2212.09748).

Shapes: B images, T tokens, D channels a token, C width, H heads.  Every block is one affine map,

    image -> noise   z_t = (x_t - mu_t) * exp(-log_scale_t)    all t at once: training
    noise -> image   x_t = mu_t + exp(log_scale_t) * z_t       t = 1..T in turn: sampling

where a causal transformer computes mu_t and log_scale_t from x_<t and the class.
"""
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class Cache:
    """Keys and values of one attention layer, for as many tokens as have been read. It belongs to
    the call that samples. `like` lends device and dtype."""

    def __init__(self, batch, heads, tokens, head_dim, like):
        self.kv = like.new_empty(2, batch, heads, tokens, head_dim)
        self.length = 0

    def append(self, k, v):
        """(B, H, n, C/H) of n new tokens -> those of all tokens so far"""
        end = self.length + k.shape[2]
        self.kv[0, :, :, self.length:end] = k
        self.kv[1, :, :, self.length:end] = v
        self.length = end
        return self.kv[0, :, :, :end], self.kv[1, :, :, :end]


class Attention(nn.Module):
    """(B, n, C) -> (B, n, C), causal. With a cache: one new token, n = 1, sees all those before."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h, cache=None):
        B, n, C = h.shape
        qkv = self.qkv(h).view(B, n, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                       # 3 x (B, H, n, C/H)
        if cache is not None:                                      # one token, which sees all
            k, v = cache.append(k, v)                              # others: it needs no mask
        h = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return self.proj(h.transpose(1, 2).reshape(B, n, C))


def modulate(h, shift, scale):
    """LayerNorm without affine, then the class's own affine (adaLN): h (B, n, C), shift and scale
    (B, 1, C) -> (B, n, C)"""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Layer(nn.Module):
    """Pre-norm attention and MLP, (B, n, C) -> (B, n, C); shifts, scales and gates come from the
    class, cond (B, C), and the zero-initialised gates make a new layer the identity (adaLN-Zero).
    """

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))
        self.ada = nn.Linear(width, 6 * width)

    def forward(self, h, cond, cache=None):
        ada = self.ada(cond)[:, None].chunk(6, dim=-1)             # 6 x (B, 1, C)
        shift1, scale1, gate1, shift2, scale2, gate2 = ada
        h = h + gate1 * self.attn(modulate(h, shift1, scale1), cache)
        return h + gate2 * self.mlp(modulate(h, shift2, scale2))


class Block(nn.Module):
    """One autoregressive affine map over the tokens, with everything it needs: its own positions
    and classes.

    The transformer reads x_t at position t and predicts token t + 1 (TARFlow's convention), so the
    token that is read first passes unchanged. Starts as the identity: log_scale = mu = 0, because
    the head is zero.
    """

    def __init__(self, dim, tokens, width, heads, layers, classes, reverse):
        super().__init__()
        self.reverse = reverse                                     # read right to left?
        self.grad_ckpt = False                                     # recompute layers in backward?
        self.proj_in = nn.Linear(dim, width)
        self.pos = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.classes = nn.Embedding(classes + 1, width)            # the last row is "no class"
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.ada = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, 2 * dim)
        for linear in [m for m in self.modules() if isinstance(m, nn.Linear)]:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in [self.ada, self.proj_out, *(layer.ada for layer in self.layers)]:
            nn.init.zeros_(linear.weight)

    def order(self, x):
        """Grid order <-> the order in which this block reads; its own inverse."""
        return x.flip(1) if self.reverse else x

    def predict(self, x, y, start=0, caches=None):
        """Tokens start..start+n-1 in reading order, x (B, n, D), and their class, y (B,)
        -> mu, log_scale (B, n, D) of the tokens that follow each of them

        In float32, as exp and the affine map lose too many digits in bf16.
        """
        h = self.proj_in(x) + self.pos[start:start + x.shape[1]]   # (B, n, C)
        cond = F.silu(self.classes(y))                             # (B, C)
        for i, layer in enumerate(self.layers):
            if self.grad_ckpt and caches is None:
                h = checkpoint(layer, h, cond, use_reentrant=False)
            else:
                h = layer(h, cond, caches and caches[i])
        shift, scale = self.ada(cond)[:, None].chunk(2, dim=-1)    # 2 x (B, 1, C)
        mu, log_scale = self.proj_out(modulate(h, shift, scale)).float().chunk(2, dim=-1)
        return mu, log_scale

    def forward(self, x, y):
        """image -> noise: x (B, T, D), y (B,) -> z (B, T, D), logdet (B,) = log |dz/dx|"""
        x = self.order(x)                                          # then shift by one: mu_t of x_<t
        mu, log_scale = [F.pad(p[:, :-1], (0, 0, 1, 0)) for p in self.predict(x, y)]
        z = (x - mu) * torch.exp(-log_scale)
        return self.order(z), -log_scale.sum((1, 2))

    def inverse(self, z, y, cfg=0.0):
        """noise -> image, token by token: z (B, T, D), y (B,) -> x (B, T, D)

        cfg > 0 guides (see `guide`); images with and without their class then go as one batch.
        """
        z = self.order(z)
        B, T, _ = z.shape
        pair = 2 if cfg else 1
        if cfg:
            y = torch.cat([y, torch.full_like(y, self.classes.num_embeddings - 1)])
        heads = self.layers[0].attn.heads
        like = self.proj_in(z[:1, :1])                             # carries autocast's dtype
        caches = [Cache(pair * B, heads, T, like.shape[-1] // heads, like) for _ in self.layers]
        x = z.clone()                                              # the first token stays
        for t in range(T - 1):
            mu, log_scale = self.predict(x[:, t:t + 1].repeat(pair, 1, 1), y, t, caches)
            if cfg:
                mu, log_scale = guide(*mu.chunk(2), *log_scale.chunk(2), cfg)
            x[:, t + 1] = mu[:, 0] + torch.exp(log_scale[:, 0]) * z[:, t + 1]
        return self.order(x)


def guide(mu_c, mu_u, log_scale_c, log_scale_u, cfg):
    """Classifier-free guidance for Gaussians (STARFlow; SimFlow section 4.4): four tensors of one
    shape, and cfg, a number (w below) -> mu, log_scale of that shape.

    N(mu_c, sigma_c)^(1+w) / N(mu_u, sigma_u)^w is again a Gaussian wherever its precision is
    positive. With s = (sigma_c / sigma_u)^2, multiply the precision
    (1 + w) / sigma_c^2 - w / sigma_u^2 by sigma_c^2:

        sigma^2 = sigma_c^2 / (1 + w - w s)      mu = ((1 + w) mu_c - w s mu_u) / (1 + w - w s)

    Where sigma_c > sigma_u the product may have no finite integral; s is clipped to 1, which keeps
    the denominator at 1 or more. w = 0 returns the conditional unchanged.
    """
    s = torch.exp(2 * (log_scale_c - log_scale_u).clamp(max=0))
    precision = 1 + cfg - cfg * s                                  # in units of 1 / sigma_c^2
    mu = ((1 + cfg) * mu_c - cfg * s * mu_u) / precision
    return mu, log_scale_c - 0.5 * torch.log(precision)


class Flow(nn.Module):
    """Blocks in the direction image -> noise, reading left to right and right to left in turn. The
    last one is the deep one in SimFlow's sizes: sampling runs it first, and it alone is guided.

    layers: transformer layers of each block.  classes: how many, 0 for data without labels; as a
    class index it means "no class".
    """

    def __init__(self, dim, tokens, width, heads, layers, classes):
        super().__init__()
        self.shape = tokens, dim
        self.null_class = classes
        self.blocks = nn.ModuleList(
            Block(dim, tokens, width, heads, n, classes, reverse=i % 2 == 1)
            for i, n in enumerate(layers))

    def forward(self, x, y):
        """x (B, T, D), y (B,) class indices -> z (B, T, D), logdet (B,) = log |dz/dx|"""
        logdet = x.new_zeros(len(x), dtype=torch.float32)
        for block in self.blocks:
            x, logdet_block = block(x, y)
            logdet = logdet + logdet_block
        return x, logdet

    def log_prob(self, z, logdet):
        """z (B, T, D), logdet (B,) -> (B,) log p(x) in nats, summed over (T, D), without the
        constant -0.5 log(2 pi) of each of them"""
        return logdet - 0.5 * z.square().sum((1, 2))

    def nll(self, x, y):
        """x (B, T, D), y (B,) -> (B,) -log p(x | y) in nats a dimension, omitting 0.5 log(2 pi)"""
        return -self.log_prob(*self(x, y)) / x[0].numel()

    @torch.no_grad()
    def sample(self, z, y, cfg=0.0):
        """z ~ N(0, I) (B, T, D), y (B,) -> x (B, T, D)

        cfg is w of `guide`: 0 is off. Shallow blocks see the class but are not guided.
        """
        for block in reversed(self.blocks):
            z = block.inverse(z, y, cfg if block is self.blocks[-1] else 0.0)
        return z

    @torch.enable_grad()
    def score(self, x, y):
        """grad_x log p(x | y), log p summed over (T, D): x (B, T, D), y (B,) -> (B, T, D)"""
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(self.log_prob(*self(x, y)).sum(), x)[0]

    def score_step(self, x, y, gamma, micro_batch):
        """x + gamma * (score with class - score without), SimFlow Eq. 6: x (B, T, D), y (B,) ->
        (B, T, D). Moves all tokens at once through the whole flow, so it also corrects what the
        guided deep block, one token after the other, could not see.

        Backward keeps every layer's activations where sampling keeps keys and values alone: take
        few images at a time. With and without class share a batch.
        """
        out = []
        for x, y in zip(x.split(micro_batch), y.split(micro_batch)):
            null = torch.full_like(y, self.null_class)
            cond, uncond = self.score(torch.cat([x, x]), torch.cat([y, null])).chunk(2)
            out.append(x + gamma * (cond - uncond))
        return torch.cat(out)
