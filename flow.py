"""The flow: a stack of causal transformers that turns latents into Gaussian noise, and back.

TARFlow (Zhai et al. 2024, arXiv:2412.06329) with two upgrades of SimFlow (arXiv:2512.04084,
appendix B): deep-shallow blocks as in STARFlow (Gu et al. 2025, arXiv:2506.06276), and adaLN-Zero
class conditioning as in DiT (Peebles & Xie 2022, arXiv:2212.09748).

Shapes: B images, T tokens, D channels per token, C width, H heads.  Every block is one affine map,

    image -> noise   z_t = (x_t - mu_t) * exp(-log_scale_t)    all t at once: training
    noise -> image   x_t = mu_t + exp(log_scale_t) * z_t       t = 1..T in turn: sampling

where a causal transformer computes mu_t and log_scale_t from x_<t and the class.

Below the flow stand its siblings: VPFlow, without scales, and SiT, a diffusion model in its place.
"""
import contextlib
from typing import Callable, NamedTuple

import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------------------------------------- the transformer

class Cache:
    """Keys and values of one attention layer for the tokens that have been read. It belongs to the
    call that samples. `mask` (T, T) is added to the scores and lends device and dtype; queries are
    divided by tau (B, 1, 1, 1), if there is one."""

    def __init__(self, batch, heads, head_dim, mask, tau):
        self.kv = mask.new_empty(2, batch, heads, len(mask), head_dim)
        self.mask, self.tau = mask, tau

    def attend(self, q, kv, start):
        """Queries (B, H, n, C/H), keys and values (2, B, H, n, C/H) of tokens start..start+n-1 ->
        (B, H, n, C/H): what these see of one another and of the tokens before them"""
        end = start + q.shape[2]
        self.kv[:, :, :, start:end] = kv
        k, v = self.kv[:, :, :, :end]
        q = q if self.tau is None else q / self.tau
        mask = self.mask[start:end, :end] if q.shape[2] > 1 else None       # one sees all others
        return F.scaled_dot_product_attention(q, k, v, mask)


class Attention(nn.Module):
    """(B, n, C) -> (B, n, C). With a cache the n tokens are those from `start` on, and also see the
    ones before."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h, cache=None, start=0):
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1))       # (B, n, 3, H, C/H)
        if cache is not None:
            q, k, v = qkv = qkv.permute(2, 0, 3, 1, 4)
            r = cache.attend(q, qkv[1:], start)
        else:                                                      # unbind first: its gradient is
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))      # then made in place
            r = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(r.transpose(1, 2).reshape(h.shape))


@contextlib.contextmanager
def by_columns(layers, rows):
    """Inside, the weights of `layers` lie in memory transposed, which changes no result but by
    rounding: a CPU then multiplies from 4 to 16 rows, as sampling has them, 1.2 to 2 times as fast.
    Fewer are left alone, as they would be slower."""
    linears = [m for name, m in layers.named_modules() if isinstance(m, nn.Linear) and rows >= 4
               and not name.endswith('ada') and m.weight.device.type == 'cpu']
    weights = [linear.weight.data for linear in linears]
    try:
        for linear, weight in zip(linears, weights):
            linear.weight.data = weight.t().contiguous().t()
        yield
    finally:
        for linear, weight in zip(linears, weights):
            linear.weight.data = weight


def modulate(h, shift, scale):
    """LayerNorm without affine, then the class's own affine (adaLN): h (B, n, C), shift and scale
    (B, 1, C) -> (B, n, C)"""
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=1e-6), scale)


class Layer(nn.Module):
    """Pre-norm attention and MLP, (B, n, C) -> (B, n, C); shifts, scales and gates, 6 x (B, 1, C),
    come from the class, and the zero-initialised gates make a new layer the identity (adaLN-Zero).
    """

    def __init__(self, width, heads, causal):
        super().__init__()
        self.attn = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))
        self.ada = nn.Linear(width, 6 * width)

    def forward(self, h, ada, cache=None, start=0):
        shift1, scale1, gate1, shift2, scale2, gate2 = ada
        h = torch.addcmul(h, gate1, self.attn(modulate(h, shift1, scale1), cache, start))
        return torch.addcmul(h, gate2, self.mlp(modulate(h, shift2, scale2)))


class Transformer(nn.Module):
    """Tokens (B, n, dim) and their class -> (B, n, out_dim), zero at first as the head is zero."""

    def __init__(self, dim, out_dim, tokens, width, heads, layers, classes, causal=True):
        super().__init__()
        self.grad_ckpt = False                                     # recompute layers in backward?
        self.proj_in = nn.Linear(dim, width)
        self.pos = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.classes = nn.Embedding(classes + 1, width)            # the last row is "no class"
        self.layers = nn.ModuleList(Layer(width, heads, causal) for _ in range(layers))
        self.ada = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, out_dim)
        for linear in [m for m in self.modules() if isinstance(m, nn.Linear)]:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in [self.ada, self.proj_out, *(layer.ada for layer in self.layers)]:
            nn.init.zeros_(linear.weight)

    def embed(self, y):
        """Class indices (B,), or weights of the classes (B, classes), "no class" not among them ->
        (B, C)"""
        return self.classes(y) if y.dim() == 1 else y @ self.classes.weight[:-1]

    def condition(self, embedding):
        """(B, C) -> all that the layers, and at last the head, want to know of it: for each a list
        of (B, 1, C). Once a call, not once a token."""
        cond = F.silu(embedding)
        ada = [layer.ada(cond).unsqueeze(1).chunk(6, dim=-1) for layer in self.layers]
        shift, scale = self.ada(cond).unsqueeze(1).chunk(2, dim=-1)
        return [(s1, 1 + c1, g1, s2, 1 + c2, g2) for s1, c1, g1, s2, c2, g2 in ada] + [
            (shift, 1 + scale)]

    def hidden(self, x, ada, depth, start=0, caches=None):
        """Tokens from `start` on, x (B, n, dim) -> (B, n, C) after the first `depth` layers"""
        h = self.proj_in(x) + self.pos[start:start + x.shape[1]]
        for i, layer in enumerate(self.layers[:depth]):
            if self.grad_ckpt and caches is None:
                h = checkpoint(layer, h, ada[i], use_reentrant=False)
            else:
                h = layer(h, ada[i], caches and caches[i], start)
        return h

    def forward(self, x, ada, start=0, caches=None):
        """Tokens from `start` on, x (B, n, dim), ada of `condition` -> (B, n, out_dim)"""
        h = self.hidden(x, ada, len(self.layers), start, caches)
        return self.proj_out(modulate(h, *ada[-1])).float()        # as exp and the affine map lose
                                                                   # too many digits in bf16

# -------------------------------------------------------------------------------------- guidance

def guide(mu_c, mu_u, log_scale_c, log_scale_u, cfg):
    """Classifier-free guidance for Gaussians (STARFlow; SimFlow section 4.4): four tensors of one
    shape, and cfg, a number or a tensor that fits (w below) -> mu, log_scale of that shape.

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


def extrapolate(mu_c, mu_u, log_scale_c, log_scale_u, cfg):
    """TARFlow's guidance: means and log-scales go w times the difference beyond the conditional
    ones. Shapes as in `guide`. Unlike there, nothing bounds the scale."""
    return mu_c + cfg * (mu_c - mu_u), log_scale_c + cfg * (log_scale_c - log_scale_u)


class Guidance(NamedTuple):
    """rule: combines conditional and unconditional prediction.  every_block: not the deep one only.
    anneal: weight rises in proportion to the number of tokens read.  tau: 0 - the unconditional
    side is "no class"; else it is the same class at this attention temperature, which needs no
    labels (1 would be no guidance)."""
    rule: Callable
    every_block: bool = False
    anneal: bool = False
    tau: float = 0.0


GUIDANCE = {
    'starflow': Guidance(guide),
    'tarflow': Guidance(extrapolate, every_block=True, anneal=True),
    'tarflow_flat': Guidance(extrapolate, every_block=True),
    'tarflow_tau': Guidance(extrapolate, every_block=True, anneal=True, tau=1.5),
}


# -------------------------------------------------------------------------------------- the flow

class Block(Transformer):
    """One autoregressive affine map over the tokens, with everything it needs: its own positions
    and classes.

    The transformer reads x_t at position t and predicts token t + 1 (TARFlow's convention), so the
    token that is read first passes unchanged. Starts as the identity: log_scale = mu = 0.
    """

    def __init__(self, dim, tokens, width, heads, layers, classes, reverse):
        super().__init__(dim, 2 * dim, tokens, width, heads, layers, classes)
        self.reverse = reverse                                     # read right to left?

    def order(self, x):
        """Grid order <-> the order in which this block reads; its own inverse."""
        return x.flip(1) if self.reverse else x

    def predict(self, x, ada, start=0, caches=None):
        """Tokens start..start+n-1 in reading order, x (B, n, D), ada of `condition` -> mu and
        log_scale (B, n, D) of the tokens that follow each of them"""
        return super().forward(x, ada, start, caches).chunk(2, dim=-1)

    def features(self, x, y, depth):
        """x (B, T, D) in grid order, y -> (B, T, C) after `depth` layers, in grid order"""
        return self.order(self.hidden(self.order(x), self.condition(self.embed(y)), depth))

    def shifted(self, x, y):
        """x (B, T, D) in reading order -> mu, log_scale (B, T, D) of each token itself"""
        return [F.pad(p[:, :-1], (0, 0, 1, 0))
                for p in self.predict(x, self.condition(self.embed(y)))]

    def forward(self, x, y):
        """image -> noise: x (B, T, D), y (B,) -> z (B, T, D), logdet (B,) = log |dz/dx|"""
        x = self.order(x)
        mu, log_scale = self.shifted(x, y)
        z = (x - mu) * torch.exp(-log_scale)
        return self.order(z), -log_scale.sum((1, 2))

    def inverse(self, z, y, cfg=0.0, guidance=GUIDANCE['starflow'], window=1, tol=0.0):
        """noise -> image: z (B, T, D), y (B,) -> x (B, T, D). cfg > 0 guides; with and without
        guidance's degradation then go as one batch.

        x_t = mu_t(x_<t) + exp(log_scale_t(x_<t)) z_t is solved `window` tokens at a time: iterate
        x <- mu(x) + exp(log_scale(x)) z for all of them at once (Jacobi). That makes the first one
        exact, and mostly brings several near their final values. The window then moves on past the
        first, and past those that follow it and changed by at most `tol` of their norm, in all
        images. Window 1 is the plain token by token; so is tol 0 with any window, but slower.
        """
        T, z, pair = z.shape[1], self.order(z), 2 if cfg else 1
        weight = torch.full((T, 1), float(cfg), device=z.device)
        if guidance.anneal:
            weight *= torch.arange(1, T + 1, device=z.device).unsqueeze(1) / (T - 1)
        ada, caches = self.prepare(z, y, pair, guidance.tau)
        if tol:                                                    # rounding never stands still
            tol = max(tol, torch.finfo(caches[0].mask.dtype).eps)
        x, start = z.clone(), 0                                    # the first token stays
        with by_columns(self.layers, rows=pair * len(z) * window):
            while start < T - 1:
                end = min(start + window, T - 1)
                read, old = x[:, start:end], x[:, start + 1:end + 1]        # (B, n, D)
                mu, log_scale = self.predict(torch.cat([read] * pair), ada, start, caches)
                if cfg:
                    mu, log_scale = guidance.rule(*mu.chunk(2), *log_scale.chunk(2),
                                                  weight[start:end])
                new = torch.addcmul(mu, torch.exp(log_scale), z[:, start + 1:end + 1])
                final = leading(new, old, tol) if tol and end - start > 1 else 1
                old.copy_(new)
                start += final
        return self.order(x)

    def prepare(self, z, y, pair, tau):
        """For a call that samples: z (B, T, D), y (B,) -> ada of `pair` x B images, empty caches"""
        (B, T, _), heads = z.shape, self.layers[0].attn.heads
        tau_of_row = None
        like = self.proj_in(z[:1, :1])                             # carries autocast's dtype
        if pair == 2:
            other = y if tau else torch.full_like(y, self.classes.num_embeddings - 1)
            y = torch.cat([y, other])
            if tau:
                tau_of_row = like.new_tensor([1.0] * B + [tau] * B).view(-1, 1, 1, 1)
        mask = like.new_full((T, T), float('-inf')).triu(1)
        caches = [Cache(pair * B, heads, like.shape[-1] // heads, mask, tau_of_row)
                  for _ in self.layers]
        return self.condition(self.embed(y)), caches


def leading(new, old, tol):
    """Two (B, n, D) -> how many of the first tokens differ by at most tol of their norm, in all
    images; at least 1"""
    same = (new - old).norm(dim=2) <= tol * new.norm(dim=2)        # (B, n)
    return max(1, int(same.all(0).cumprod(0).sum()))


class Flow(nn.Module):
    """Blocks in the direction image -> noise, reading left to right and right to left in turn. The
    last one is the deep one in SimFlow's sizes: sampling runs it first, and it alone is guided.

    layers: transformer layers of each block; with none at all the flow is the Gaussian N(0, I).
    classes: how many, 0 for data without labels; as a class index it means "no class".
    """

    Block = Block

    def __init__(self, dim, tokens, width, heads, layers, classes):
        super().__init__()
        self.shape = tokens, dim
        self.null_class = classes
        self.blocks = nn.ModuleList(
            self.Block(dim, tokens, width, heads, n, classes, reverse=i % 2 == 1)
            for i, n in enumerate(layers))

    def trace(self, x, y):
        """x (B, T, D), y (B,) -> z (B, T, D), logdet (B,), and every block's input (B, T, D)"""
        logdet, inputs = x.new_zeros(len(x), dtype=torch.float32), []
        for block in self.blocks:
            inputs.append(x)
            x, logdet_block = block(x, y)
            logdet = logdet + logdet_block
        return x, logdet, inputs

    def forward(self, x, y):
        """x (B, T, D), y (B,) class indices, or weights (B, classes) -> z (B, T, D), logdet (B,) =
        log |dz/dx|"""
        z, logdet, _ = self.trace(x, y)
        return z, logdet

    def log_prob(self, z, logdet):
        """z (B, T, D), logdet (B,) -> (B,) log p(x) in nats, summed over (T, D), without the
        constant -0.5 log(2 pi) of each of them"""
        return logdet - 0.5 * z.square().sum((1, 2))

    def nll(self, x, y):
        """x (B, T, D), y (B,) -> (B,) -log p(x | y), nats per dimension, less 0.5 log(2 pi)"""
        return -self.log_prob(*self(x, y)) / x[0].numel()

    @torch.no_grad()
    def sample(self, z, y, cfg=0.0, guidance=GUIDANCE['starflow'], tol=0.0):
        """z ~ N(0, I) (B, T, D), y (B,) -> x (B, T, D)

        cfg is w of the guidance: 0 is off. Blocks that it leaves alone still see the class. tol > 0
        decodes in parallel, to that relative tolerance of each block's tokens; 0 goes token by
        token.
        """
        for block in reversed(self.blocks):
            deep = block is self.blocks[-1]
            weight = cfg if deep or guidance.every_block else 0.0
            window = WINDOW_DEEP if deep else WINDOW
            if not tol or too_many(z.device, len(z), weight):
                window = 1
            z = block.inverse(z, y, weight, guidance, window, tol)
        return z

    @torch.enable_grad()
    def score(self, x, y):
        """grad_x log p(x | y), log p summed over (T, D): x (B, T, D), y (B,) -> (B, T, D)"""
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(self.log_prob(*self(x, y)).sum(), x)[0]

    def score_step(self, x, terms, micro_batch):
        """x + sum of weight * score(x, y) over (weight, y) in terms: x (B, T, D), y (B,) ->
        (B, T, D). Moves all tokens at once through the whole flow.

            SimFlow, Eq. 6         (gamma, class), (-gamma, no class): also corrects what the guided
                                   deep block, one token after the other, could not see
            TARFlow, by Tweedie    (sigma^2, class): the mean of the clean data given noisy x

        Backward keeps every layer's activations where sampling keeps keys and values alone: take
        few images at a time. The terms of an image share a batch.
        """
        weights, ys = zip(*terms)
        out = []
        for x, *ys in zip(x.split(micro_batch), *(y.split(micro_batch) for y in ys)):
            scores = self.score(torch.cat([x] * len(ys)), torch.cat(ys)).chunk(len(ys))
            out.append(x + sum(weight * score for weight, score in zip(weights, scores)))
        return torch.cat(out)


# Tokens that Jacobi solves at once: about the fastest with trained flows of 64 and of 256 tokens.
# The deep block ties neighbours so closely that those far ahead would be worked on in vain.
WINDOW, WINDOW_DEEP = 64, 24
# Jacobi has several times as much to compute, so a CPU with more images than these, guided ones
# counted twice, is faster token by token.
FEW = 4


def too_many(device, images, cfg):
    """For Jacobi to be the faster way, images at once on this device"""
    return device.type == 'cpu' and images * (2 if cfg else 1) > FEW


# -------------------------------------------------------------------------------------- siblings

class VPBlock(Block):
    """A volume preserving block: log_scale = 0, so the log-determinant is 0."""

    def predict(self, x, ada, start=0, caches=None):
        mu, log_scale = super().predict(x, ada, start, caches)
        return mu, torch.zeros_like(log_scale)


class VPFlow(Flow):
    """TARFlow's ablation without scales. No layer can make z have variance 1, so its mean square at
    every (t, d) is tracked (rate 0.1) while training, and sampling starts from it. Likelihood and
    score stay those of N(0, I), which it is trained with."""
    Block = VPBlock

    def __init__(self, dim, tokens, width, heads, layers, classes):
        super().__init__(dim, tokens, width, heads, layers, classes)
        self.register_buffer('variance', torch.ones(tokens, dim))
        self.squares = []                                          # of a step's micro-batches

    def trace(self, x, y):
        z, logdet, inputs = super().trace(x, y)
        if self.training:
            self.squares.append(z.detach().square().mean(0))
        return z, logdet, inputs

    def track(self, mean, failed):
        """End a training step; mean: in place, over processes. One that failed (1) is left out."""
        square = torch.stack(self.squares).mean(0)
        self.squares.clear()
        mean(square)
        self.variance.copy_(torch.where(failed > 0, self.variance,
                                        self.variance.lerp(square, 0.1)))

    def sample(self, z, y, cfg=0.0, guidance=GUIDANCE['starflow'], tol=0.0):
        return super().sample(z * self.variance.sqrt(), y, cfg, guidance, tol)


class SiT(Transformer):
    """A diffusion model with the flow's transformer (Ma et al. 2024, arXiv:2401.08740; SimFlow's
    Table 7): all layers in one stack, without the causal mask, time beside the class in adaLN.

    It predicts the velocity noise - x of the line (1 - t) x + t noise, 0 < t < 1. In place of a
    likelihood `nll` has the squared error of that, which is as good to train with.
    """

    def __init__(self, dim, tokens, width, heads, layers, classes):
        super().__init__(dim, dim, tokens, width, heads, sum(layers), classes, causal=False)
        self.shape = tokens, dim
        self.null_class = classes
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def velocity(self, x, t, y):
        """x (B, T, D) at times t (B,), y (B,) -> (B, T, D)"""
        frequencies = 1000 * 10_000 ** (-torch.arange(128, device=x.device) / 128)
        angles = t.unsqueeze(1) * frequencies                      # (B, 128)
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        return self(x, self.condition(self.embed(y) + time))

    def nll(self, x, y):
        """x (B, T, D), y (B,) -> (B,) mean squared error of the velocity at a random time, from
        torch's global random numbers"""
        t, noise = torch.rand(len(x), device=x.device), torch.randn_like(x)
        v = self.velocity(torch.lerp(x, noise, t.view(-1, 1, 1)), t, y)
        return (v - (noise - x)).square().mean((1, 2))

    @torch.no_grad()
    def sample(self, z, y, cfg=0.0, guidance=None, tol=0.0, steps=50, heun=True):
        """z ~ N(0, I) (B, T, D), y (B,) -> x (B, T, D): integrates the velocity from t = 1 to 0 in
        equal steps, by Heun's rule or Euler's. cfg extrapolates velocities."""
        def velocity(x, t):
            if not cfg:
                return self.velocity(x, x.new_full((len(x),), t), y)
            both = torch.cat([y, torch.full_like(y, self.null_class)])
            v, v_u = self.velocity(x.repeat(2, 1, 1), x.new_full((2 * len(x),), t), both).chunk(2)
            return v + cfg * (v - v_u)

        for i in range(steps):
            t, dt = 1 - i / steps, 1 / steps
            v = velocity(z, t)
            if heun:
                v = (v + velocity(z - dt * v, t - dt)) / 2
            z = z - dt * v
        return z
