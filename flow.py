"""The flow: a stack of causal transformers that turns latents into Gaussian noise, and back.

TARFlow (Zhai et al. 2024, arXiv:2412.06329) with two upgrades of SimFlow (arXiv:2512.04084,
appendix B): deep-shallow blocks as in STARFlow (Gu et al. 2025, arXiv:2506.06276), and adaLN-Zero
class conditioning as in DiT (Peebles & Xie 2022, arXiv:2212.09748).

Shapes: B images, T tokens, D channels per token, C width, H heads. Every block is one affine map,

    image -> noise   z_t = (x_t - mean_t) * exp(-log_scale_t)     all t at once: training
    noise -> image   x_t = mean_t + exp(log_scale_t) * z_t        t = 1..T in turn: sampling

where a causal transformer computes mean_t and log_scale_t from x_<t and the class.

Below the flow stand its siblings: decoding several tokens at once, VPFlow, which has no scales,
TARFlow as released, and SiT, a diffusion model in the flow's place.
"""
import contextlib
import functools
import math
from typing import Callable, NamedTuple
import warnings

import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------------------------------------- the transformer

class Attention(nn.Module):
    """Multi-head self-attention, (B, n, C) -> (B, n, C)."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h, cache=None, window=None):
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1))       # (B, n, 3, H, C/H)
        if window is None:
            # unbind comes first, as its gradient is then made without another copy.
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))      # (B, H, n, C/H)
            r = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            qkv = qkv.permute(2, 0, 3, 1, 4)                       # (3, B, H, n, C/H)
            r = window.attend(qkv[0], qkv[1:], cache)
        return self.proj(r.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm attention and MLP, (B, n, C) -> (B, n, C). Shifts, scales and gates come from the
    class, and the zero-initialised gates make a new layer the identity (adaLN-Zero)."""
    eps = 1e-6                                                     # of LayerNorm

    def __init__(self, width, heads, causal):
        super().__init__()
        self.attn = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))
        self.ada = nn.Linear(width, 6 * width)

    def condition(self, cond):
        """Embedding of class (and time) (B, C) -> modulation, 6 x (B, 1, C)"""
        ada = self.ada(cond).float().unsqueeze(1)                  # (B, 1, 6C)
        shift1, scale1, gate1, shift2, scale2, gate2 = ada.chunk(6, dim=-1)
        return shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2

    def forward(self, h, modulation, cache=None, window=None):
        """modulation: what `condition` returned"""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        # Attention and MLP run in the weights' dtype, or in autocast's. Norms, shifts, gates and
        # the residual stream h stay in float32.
        dtype = self.mlp[0].weight.dtype
        r = self.attn(modulate(h, shift1, scale1, self.eps).to(dtype), cache, window)
        h = torch.addcmul(h, gate1, r.float())
        r = self.mlp(modulate(h, shift2, scale2, self.eps).to(dtype))
        return torch.addcmul(h, gate2, r.float())


def modulate(h, shift, scale, eps=1e-6):
    """LayerNorm without affine, then the class's own affine map: h (B, n, C), shift and scale
    (B, 1, C) -> (B, n, C)"""
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=eps), scale)


class Transformer(nn.Module):
    """Tokens (B, n, dim) of a class -> (B, n, out_dim); zero at first, as the head is zero."""
    Layer = Layer

    def __init__(self, dim, out_dim, tokens, width, heads, layers, classes, causal=True):
        super().__init__()
        self.null_class = classes
        self.grad_ckpt = False                                     # recompute layers in backward?
        self.proj_in = nn.Linear(dim, width)
        self.pos = nn.Parameter(torch.randn(tokens, width) * 0.02)
        # The last row is "no class". Std 1 is nn.Embedding's default: SimFlow gives no value, and
        # with DiT's 0.02 nano learned more slowly.
        self.classes = nn.Embedding(classes + 1, width)
        self.layers = nn.ModuleList(self.Layer(width, heads, causal) for _ in range(layers))
        self.ada = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, out_dim)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if name.endswith('ada'):
                    nn.init.zeros_(module.weight)
        nn.init.zeros_(self.proj_out.weight)

    def condition(self, y, time=0.0):
        """Class indices y (B,), or weights (B, classes + 1), the last for "no class"; time (B, C)
        if diffusion -> modulations: one for each layer, then the head's, of (B, 1, C) tensors"""
        if y.dim() == 1:
            embedding = self.classes(y)                            # (B, C)
        else:
            embedding = y @ self.classes.weight
        cond = F.silu(embedding + time).to(self.ada.weight.dtype)  # (B, C)
        modulations = [layer.condition(cond) for layer in self.layers]
        shift, scale = self.ada(cond).float().unsqueeze(1).chunk(2, dim=-1)
        modulations.append((shift, 1 + scale))
        return modulations

    def forward(self, x, modulations, caches=None, window=None):
        """x (B, n, dim) -> (B, n, out_dim) float32. All tokens, or with a window those in it."""
        if window is None:
            pos = self.pos[:x.shape[1]]                            # (n, C)
        else:
            pos = self.pos.index_select(0, window.at)
        h = self.enter(x, pos, modulations[-1])                    # (B, n, C)
        for i, layer in enumerate(self.layers):
            if window is not None:
                h = layer(h, modulations[i], caches[i], window)
            elif self.grad_ckpt:
                h = checkpoint(layer, h, modulations[i], use_reentrant=False,
                               preserve_rng_state=False)           # no layer draws any
            else:
                h = layer(h, modulations[i])
        # What follows, exp and an affine map, would lose too many digits in bfloat16.
        with no_autocast(h.device):
            return self.leave(h, modulations[-1])

    def enter(self, x, pos, modulation):
        """x (B, n, dim), pos (n, C) -> h (B, n, C)"""
        return self.proj_in(x.to(self.proj_in.weight.dtype)).float() + pos

    def leave(self, h, modulation):
        """h (B, n, C) -> (B, n, out_dim)"""
        return self.proj_out(modulate(h, *modulation))


def no_autocast(device):
    """A context in which the dtypes of the operands decide."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


# ---------------------------------------------------------------------------------------- guidance

def guide(mean_c, mean_u, log_scale_c, log_scale_u, cfg):
    """Classifier-free guidance for Gaussians (STARFlow; SimFlow section 4.4): four tensors of one
    shape, and cfg, a number or a tensor that fits (w below) -> mean, log_scale of that shape.

    N(mean_c, sigma_c)^(1+w) / N(mean_u, sigma_u)^w is again a Gaussian wherever its precision is
    positive. With s = (sigma_c / sigma_u)^2, multiply the precision
    (1 + w) / sigma_c^2 - w / sigma_u^2 by sigma_c^2:

        sigma^2 = sigma_c^2 / (1 + w - w s)
        mean = ((1 + w) mean_c - w s mean_u) / (1 + w - w s)

    Where sigma_c > sigma_u the product may have no finite integral; s is clipped to 1, which keeps
    the denominator at 1 or more. w = 0 returns the conditional unchanged.
    """
    s = torch.exp(2 * (log_scale_c - log_scale_u).clamp(max=0))
    precision = 1 + cfg - cfg * s                                  # in units of 1 / sigma_c^2
    mean = ((1 + cfg) * mean_c - cfg * s * mean_u) / precision
    return mean, log_scale_c - 0.5 * torch.log(precision)


def extrapolate(mean_c, mean_u, log_scale_c, log_scale_u, cfg):
    """TARFlow's guidance: means and log-scales go w times the difference beyond the conditional
    ones. Shapes as in `guide`. Unlike there, nothing bounds the scale."""
    return (mean_c + cfg * (mean_c - mean_u),
            log_scale_c + cfg * (log_scale_c - log_scale_u))


class Guidance(NamedTuple):
    """A row of GUIDANCE.

    rule: combines the conditional and the unconditional prediction.
    every_block: guide all blocks, not the deep one alone.
    anneal: the weight rises in proportion to the number of tokens that were read.
    tau: if 0, the unconditional side is "no class"; else the same class at this attention
    temperature, which needs no labels (1 would be no guidance).
    """
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


# ---------------------------------------------------------------------------------------- the flow

class Block(nn.Module):
    """One autoregressive affine map over the tokens, with positions and classes of its own.

    backwards: read the grid right to left, bottom to top. Starts as the identity: mean and
    log_scale are 0.
    """

    def __init__(self, dim, tokens, width, heads, layers, classes, backwards, kind=Transformer):
        super().__init__()
        self.backwards = backwards
        self.transformer = kind(dim, 2 * dim, tokens, width, heads, layers, classes)

    def reorder(self, x):
        """Grid order <-> the order in which this block reads; its own inverse."""
        return x.flip(1) if self.backwards else x

    def split(self, out):
        """What the transformer answers, (B, n, 2D) -> mean, log_scale (B, n, D)"""
        return out.chunk(2, dim=-1)

    def forward(self, x, y):
        """image -> noise: x (B, T, D), y (B,) -> z (B, T, D), logdet (B,) = log |dz/dx|"""
        x = self.reorder(x)
        out = self.transformer(x, self.transformer.condition(y))   # (B, T, 2D)
        mean, log_scale = self.split(shift(out))
        z = (x - mean) * torch.exp(-log_scale)
        return self.reorder(z), -log_scale.sum((1, 2))

    def inverse(self, z, y, cfg=0.0, guidance=GUIDANCE['starflow']):
        """noise -> image, token by token: z (B, T, D), y (B,) -> x (B, T, D). cfg > 0 guides."""
        inversion = Inversion(self, z, y, cfg, guidance)
        with transposed_weights(self.transformer.layers, inversion.rows):
            for length, tokens in inversion.pieces():
                inversion.length = length
                again = capture(inversion.step, z.device)
                for _ in range(tokens - 1):
                    again()
        return self.reorder(inversion.x)


def shift(out):
    """(B, T, 2D) -> the same one token later. The transformer predicts token t + 1 at position t
    (TARFlow's convention). Nothing predicts the first token: it gets 0, and passes unchanged."""
    return F.pad(out[:, :-1], (0, 0, 1, 0))


class Flow(nn.Module):
    """Blocks in the direction image -> noise, reading forwards and backwards in turn. The last one
    is deep in L, XL and XXL; in S and B all are equally deep. Sampling runs it first, and with
    STARFlow's guidance --cfg acts on it alone.

    layers: transformer layers of each block; without blocks, (), the flow is the Gaussian N(0, I).
    classes: their number, 0 for data without labels; this number as an index means "no class".
    """
    Block, Transformer = Block, Transformer

    def __init__(self, dim, tokens, width, heads, layers, classes):
        super().__init__()
        self.shape = tokens, dim
        self.null_class = classes
        self.blocks = nn.ModuleList(
            self.Block(dim, tokens, width, heads, n, classes, i % 2 == 1, self.Transformer)
            for i, n in enumerate(layers))

    def forward(self, x, y, inputs=None):
        """x (B, T, D), y as in `Transformer.condition` -> z (B, T, D), logdet (B,) = log |dz/dx|.
        Appends each block's input (B, T, D) to the list `inputs`, if given."""
        logdet = x.new_zeros(len(x), dtype=torch.float32)
        for block in self.blocks:
            if inputs is not None:
                inputs.append(x)
            x, logdet_block = block(x, y)
            logdet = logdet + logdet_block
        return x, logdet

    def log_prob(self, z, logdet):
        """z (B, T, D), logdet (B,) -> (B,) log p(x) in nats, summed over (T, D), without the
        constant -0.5 log(2 pi) of each of them"""
        return logdet - 0.5 * z.square().sum((1, 2))

    def nll(self, x, y):
        """x (B, T, D), y (B,) -> (B,) -log p(x | y), nats per dimension, less 0.5 log(2 pi)"""
        z, logdet = self(x, y)
        return -self.log_prob(z, logdet) / x[0].numel()

    @torch.no_grad()
    def sample(self, z, y, cfg=0.0, guidance=GUIDANCE['starflow'], tol=0.0):
        """z ~ N(0, I) (B, T, D), y (B,) -> x (B, T, D)

        cfg is w of the guidance: 0 is off. Unguided blocks still see the class. tol > 0 decodes in
        parallel, each block's tokens to that relative tolerance; 0 goes token by token. Matrix
        products run in the weights' dtype, with autocast off: it would cast all weights again for
        every token.
        """
        with no_autocast(z.device):
            for block in reversed(self.blocks):
                deep = block is self.blocks[-1]
                w = cfg if deep or guidance.every_block else 0.0
                if tol and not jacobi_is_slower(z.device, len(z), w):
                    window = WINDOW_DEEP if deep else WINDOW
                    z = jacobi_inverse(block, z, y, w, guidance, window, tol)
                else:
                    z = block.inverse(z, y, w, guidance)
        if z.device.type == 'cuda':
            torch.cuda.empty_cache()                               # free the graphs' private pools
        return z

    @torch.enable_grad()
    def score(self, x, y):
        """grad_x log p(x | y), log p summed over (T, D): x (B, T, D), y (B,) -> (B, T, D)"""
        x = x.detach().requires_grad_(True)
        z, logdet = self(x, y)
        return torch.autograd.grad(self.log_prob(z, logdet).sum(), x)[0]

    def score_step(self, x, steps):
        """x + sum of weight * score(x, y) over (weight, y) in steps: x (B, T, D), y (B,) ->
        (B, T, D). Moves all tokens at once through the whole flow.

            SimFlow, Eq. 6         (gamma, class), (-gamma, no class): also corrects what the guided
                                   deep block, one token after the other, could not see
            TARFlow, by Tweedie    (sigma^2, class): the mean of the clean data given noisy x
        """
        out = []
        for part in self.score_batches(x, len(steps)):
            ys = torch.cat([y[part] for _, y in steps])
            xs = x[part].repeat(len(steps), 1, 1)
            scores = self.score(xs, ys)
            move = 0
            for (weight, _), score in zip(steps, scores.chunk(len(steps))):
                move = move + weight * score
            out.append(x[part] + move)
        return torch.cat(out)

    def score_batches(self, x, copies):
        """-> slices of x (B, T, D) that fit in memory with each image `copies` times in the batch:
        backward keeps all activations."""
        hidden = sum(len(block.transformer.layers) * block.transformer.pos.numel()
                     for block in self.blocks)                     # T x C x layers
        size = max(1, score_elements(x.device) // max(1, copies * hidden))
        return [slice(i, i + size) for i in range(0, len(x), size)]


def score_elements(device):
    """-> elements of hidden states, B x T x C x layers, in the largest batch of the score step. In
    bfloat16 each takes about 40 bytes: 16 images of XXL, with and without the class, need 20 GB."""
    if device.type != 'cuda':
        return 2 ** 25
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return free // 2 // 40


# -------------------------------------------------------------------------- decoding token by token

class Window(NamedTuple):
    """The n tokens that a block reads in one step of its inversion, and what they see.

    at (n,): their positions.  mask (n, length): 0 for the tokens up to each of them, -inf for later
    ones.  tau (B, 1, 1, 1): attention temperatures, if any.
    """
    at: torch.Tensor
    mask: torch.Tensor
    tau: torch.Tensor | None

    def attend(self, q, kv, cache):
        """q (B, H, n, C/H), kv (2, B, H, n, C/H) of these tokens, cache (2, B, H, T, C/H) of all ->
        (B, H, n, C/H)"""
        cache.index_copy_(3, self.at, kv)
        k, v = cache[:, :, :, :self.mask.shape[1]]
        q = q if self.tau is None else q / self.tau
        if torch.compiler.is_compiling() and q.shape[2] == 1 and len(q) >= 32:
            # With one query per head most of the time goes into reading keys and values. At XXL's
            # 72 channels per head cuDNN took 225 us, these lines 160 to 170 (H200, 512 rows).
            scores = (q * k).sum(-1, dtype=torch.float32) / math.sqrt(q.shape[-1])     # (B, H, L)
            return (scores + self.mask).softmax(-1).to(v.dtype).unsqueeze(2) @ v
        return F.scaled_dot_product_attention(q, k, v, self.mask)


class Inversion:
    """The state of a block's inversion: x (B, T, D) so far, in reading order, and all layers' keys
    and values. The next step reads the n tokens at `at` (n,), and attends to the first `length`.

    A step changes tensors in place, positions too, and never waits for the device, so that a CUDA
    graph of one step can be replayed.
    """

    def __init__(self, block, z, y, cfg, guidance, n=1):
        self.block, self.transformer = block, block.transformer
        self.guidance = guidance
        self.z = block.reorder(z)
        self.x = self.z.clone()                                    # the first token stays
        B, T, _ = z.shape
        self.length = T
        self.guided = cfg > 0
        self.tau = None
        like = self.transformer.proj_in.weight                     # in the dtype of attention
        if self.guided:                                            # both halves as one batch
            other = y if guidance.tau else torch.full_like(y, self.transformer.null_class)
            y = torch.cat([y, other])
            if guidance.tau:
                self.tau = like.new_ones(2 * B, 1, 1, 1)
                self.tau[B:] = guidance.tau
        self.modulations = self.transformer.condition(y)
        self.rows = len(y) * n                                     # of every matrix product
        heads = self.transformer.layers[0].attn.heads
        shape = 2, len(y), heads, T, len(like) // heads            # keys and values
        self.caches = [like.new_zeros(shape) for _ in self.transformer.layers]
        self.mask = like.new_full((T, T), float('-inf')).triu(1)
        self.at = torch.arange(n, device=z.device)
        self.weight = torch.full((T, 1), float(cfg), device=z.device)
        if guidance.anneal:
            read = torch.arange(1, T + 1, device=z.device)
            self.weight *= read.unsqueeze(1) / (T - 1)

    def predict(self):
        """-> x (B, n, D) of the tokens that follow those at `at`, given these and all before"""
        x = self.x.index_select(1, self.at)
        mask = self.mask.index_select(0, self.at)                  # (n, T)
        window = Window(self.at, mask[:, :self.length], self.tau)
        both = torch.cat([x, x]) if self.guided else x
        out = self.transformer(both, self.modulations, self.caches, window)
        mean, log_scale = self.block.split(out)
        if self.guided:
            weight = self.weight.index_select(0, self.at)          # (n, 1)
            mean, log_scale = self.guidance.rule(*mean.chunk(2), *log_scale.chunk(2), weight)
        z = self.z.index_select(1, self.at + 1)
        return torch.addcmul(mean, torch.exp(log_scale), z)

    def step(self):
        """One token is read, and the next one known."""
        self.x.index_copy_(1, self.at + 1, self.predict())
        self.at += 1

    def pieces(self):
        """-> pairs (length that attention covers, tokens to read with it). In a CUDA graph the
        length is fixed, so its last positions may still be empty."""
        (T, width), pieces = self.transformer.pos.shape, []
        if self.x.device.type != 'cuda':
            size = 1
        elif self.rows * T < 6 * width:                            # KV cache small beside weights:
            size = T                                               # a single capture is fastest
        else:
            size = math.ceil(T / 4)
        for t in range(0, T - 1, size):
            pieces.append((min(t + size, T), min(size, T - 1 - t)))
        return pieces


def capture(step, device):
    """Run step() -> a function that runs it again. On a GPU that is the replay of a CUDA graph, as
    hundreds of small operations take longer to launch, one by one, than to compute."""
    step()
    if device.type != 'cuda':
        return step
    try:
        graph, stream = torch.cuda.CUDAGraph(), capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Not torch.cuda.graph, which first waits for the device and empties its cache.
            # thread_local: threads that load data may use CUDA meanwhile.
            graph.capture_begin(capture_error_mode='thread_local')
            try:
                step()                                             # is recorded, and does not run
            finally:
                graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph.replay
    except RuntimeError as e:
        warnings.warn(f'decoding without a CUDA graph, more slowly: {str(e).splitlines()[0]}')
        return step


@functools.lru_cache
def capture_stream(device):
    """One for all captures: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def transposed_weights(layers, rows):
    """A context in which the weights of `layers` are stored transposed; results change only by
    rounding. A CPU then multiplies 4 to 16 rows, as in sampling, 1.2 to 2 times as fast. With fewer
    rows it would be slower, so nothing is done."""
    linears = []
    if rows >= 4 and next(layers.parameters()).device.type == 'cpu':
        for layer in layers:
            linears += [layer.attn.qkv, layer.attn.proj, layer.mlp[0], layer.mlp[2]]
    weights = [linear.weight.data for linear in linears]
    try:
        for linear, weight in zip(linears, weights):
            linear.weight.data = weight.t().contiguous().t()
        yield
    finally:
        for linear, weight in zip(linears, weights):
            linear.weight.data = weight


# ---------------------------------------------------------- siblings: decoding many tokens at once

# Tokens that Jacobi solves at once: about the fastest with trained flows of 64 and of 256 tokens.
# In the deep block neighbours depend so closely on each other that work far ahead is wasted.
WINDOW, WINDOW_DEEP = 64, 24
# Jacobi computes several times as much. On a CPU it pays for at most this many images (guided ones
# count twice).
JACOBI_IMAGES = 4


def jacobi_is_slower(device, images, cfg):
    """Is Jacobi slower than token by token, for so many images at once on this device?"""
    return device.type == 'cpu' and images * (2 if cfg else 1) > JACOBI_IMAGES


class Jacobi(Inversion):
    """A block's inversion, `n` tokens at a time. known (): the number of tokens that are final."""

    def __init__(self, block, z, y, cfg, guidance, n, tol):
        super().__init__(block, z, y, cfg, guidance, n)
        self.known = torch.ones((), dtype=torch.long, device=z.device)
        self.tol = tol
        if tol:                                                    # rounding never stands still
            self.tol = max(tol, torch.finfo(self.mask.dtype).eps)
        self.offsets = self.at.clone()

    def step(self):
        """x <- mean(x) + exp(log_scale(x)) z at all tokens of the window; then move it on."""
        if self.x.device.type == 'cpu':                            # what comes later is masked
            self.length = int(self.at[-1]) + 1
        after = self.at + 1
        old = self.x.index_select(1, after)                        # (B, n, D)
        new = self.predict()
        self.x.index_copy_(1, after, new)
        change = (new - old).norm(dim=2)                           # (B, n)
        same = change <= self.tol * new.norm(dim=2)
        leading = same.all(0).cumprod(0).sum()                     # of the window, in all images
        self.known.copy_(torch.maximum(self.known + 1, after[0] + leading))
        last = self.x.shape[1] - 1 - len(self.at)                  # place of the window
        self.at.copy_(self.offsets + (self.known - 1).clamp(max=last))


def jacobi_inverse(block, z, y, cfg, guidance, window, tol):
    """As Block.inverse, `window` tokens at a time: z (B, T, D), y (B,) -> x (B, T, D).

    An iteration makes the first unknown token exact, and usually brings several more close to their
    final values. The window then moves past the leading tokens that changed by at most `tol` of
    their norm in all images, at least past the first. tol 0 amounts to token by token, but slower.
    """
    T = z.shape[1]
    if T == 1:
        return z
    inversion = Jacobi(block, z, y, cfg, guidance, min(window, T - 1), tol)
    with transposed_weights(block.transformer.layers, inversion.rows):
        again = capture(inversion.step, z.device)
        while inversion.known.item() < T:                          # waits for the device
            for _ in range(4 if z.device.type == 'cuda' else 1):
                again()
    return block.reorder(inversion.x)


# -------------------------------------------------------------------------- siblings: other models

class VPBlock(Block):
    """A volume preserving block: log_scale = 0, so the log-determinant is 0."""

    def split(self, out):
        mean, log_scale = super().split(out)
        return mean, torch.zeros_like(log_scale)


class VPFlow(Flow):
    """TARFlow's ablation without scales: no layer can bring z to variance 1, so training tracks its
    mean square at every (t, d) (rate 0.1), and sampling starts from noise of that variance.
    Likelihood and score stay those of N(0, I), with which it is trained."""
    Block = VPBlock

    def __init__(self, dim, tokens, width, heads, layers, classes):
        super().__init__(dim, tokens, width, heads, layers, classes)
        self.register_buffer('variance', torch.ones(tokens, dim))
        self.squares = []                                          # of a step's micro-batches

    def forward(self, x, y, inputs=None):
        z, logdet = super().forward(x, y, inputs)
        if self.training:
            self.squares.append(z.detach().square().mean(0))
        return z, logdet

    def track(self, mean, failed):
        """End a training step. mean: averages over processes in place. failed: 1 skips the step."""
        square = torch.stack(self.squares).mean(0)
        self.squares.clear()
        mean(square)
        self.variance.copy_(torch.where(failed > 0, self.variance,
                                        self.variance.lerp(square, 0.1)))

    def sample(self, z, y, cfg=0.0, guidance=GUIDANCE['starflow'], tol=0.0):
        return super().sample(z * self.variance.sqrt(), y, cfg, guidance, tol)


class TARLayer(Layer):
    """TARFlow's: learned weights where ours asks the class."""
    eps = 1e-5

    def __init__(self, width, heads, causal):
        super().__init__(width, heads, causal)
        del self.ada
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def condition(self, cond):
        gate = torch.ones_like(self.norm1.bias)
        return (self.norm1.bias, self.norm1.weight, gate,
                self.norm2.bias, self.norm2.weight, gate)


class TARTransformer(Transformer):
    """TARFlow's: the class is added to the tokens, "no class" is the mean of all classes, and no
    norm precedes the head. First weights are as in ml-tarflow, but for the head's bias, 0."""
    Layer = TARLayer

    def __init__(self, dim, out_dim, tokens, width, heads, layers, classes):
        super().__init__(dim, out_dim, tokens, width, heads, layers, classes)
        del self.ada
        self.classes = nn.Embedding(classes, width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        for parameter in self.proj_out.parameters():
            nn.init.zeros_(parameter)
        for weight in (self.pos, self.classes.weight):
            nn.init.normal_(weight, std=0.01)

    def condition(self, y, time=0.0):
        if y.dim() == 1:
            y = F.one_hot(y, self.null_class + 1).float()
        share = y[:, -1:] / max(1, self.null_class)                # of each class in "no class"
        embedding = (y[:, :-1] + share) @ self.classes.weight      # (B, C)
        return [layer.condition(None) for layer in self.layers] + [embedding.unsqueeze(1)]

    def enter(self, x, pos, embedding):
        return super().enter(x, pos, None) + embedding

    def leave(self, h, embedding):
        return self.proj_out(h)


class TARFlow(Flow):
    """TARFlow as released, for images in pixels: without adaLN, blocks of one depth."""
    Transformer = TARTransformer


class TARVPFlow(VPFlow):
    Transformer = TARTransformer


class SiT(Transformer):
    """A diffusion model with the flow's transformer (Ma et al. 2024, arXiv:2401.08740; SimFlow's
    Table 7): all layers in one stack, without the causal mask, time beside the class in adaLN.

    It predicts the velocity noise - x of the line (1 - t) x + t noise, 0 < t < 1. In place of a
    likelihood, `nll` returns the velocity's squared error, which serves just as well as a loss.
    Positions, GELU and initial weights are as in the released code, whose t runs the other way.
    """

    def __init__(self, dim, tokens, width, heads, layers, classes):
        super().__init__(dim, dim, tokens, width, heads, sum(layers), classes, causal=False)
        self.shape = tokens, dim
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        for weight in (self.classes.weight, self.time[0].weight, self.time[2].weight):
            nn.init.normal_(weight, std=0.02)
        for linear in (self.time[0], self.time[2]):
            nn.init.zeros_(linear.bias)
        for layer in self.layers:
            layer.mlp[1] = nn.GELU('tanh')
        self.pos.requires_grad_(False).copy_(waves(math.isqrt(tokens), width))

    def velocity(self, x, t, y):
        """x (B, T, D) at times t (B,), y (B,) -> (B, T, D)"""
        frequencies = 10_000 ** (-torch.arange(128, device=x.device) / 128)
        angles = t.unsqueeze(1) * frequencies                      # (B, 128)
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        return self(x, self.condition(y, time))

    def nll(self, x, y):
        """x (B, T, D), y (B,) -> (B,) mean squared error of the velocity at a random time, drawn
        from torch's global generator"""
        t = torch.rand(len(x), device=x.device)
        noise = torch.randn_like(x)
        between = torch.lerp(x, noise, t.view(-1, 1, 1))
        error = self.velocity(between, t, y) - (noise - x)
        return error.square().mean((1, 2))

    @torch.no_grad()
    def sample(self, z, y, cfg=0.0, guidance=None, tol=0.0, steps=50):
        """z ~ N(0, I) (B, T, D), y (B,) -> x (B, T, D): integrates the velocity from t = 1 to 0 in
        equal steps, by Heun's rule. cfg extrapolates velocities."""
        null = torch.full_like(y, self.null_class)

        def velocity(x, t):
            t = x.new_full((len(x),), t)
            v = self.velocity(x, t, y)
            if cfg:
                v = v + cfg * (v - self.velocity(x, t, null))
            return v

        for i in range(steps):
            t, dt = 1 - i / steps, 1 / steps
            v = velocity(z, t)
            v = (v + velocity(z - dt * v, t - dt)) / 2
            z = z - dt * v
        return z


def waves(side, width):
    """-> (side * side, width) sines and cosines of a token's column, then of its row, as DiT has
    them. width: a multiple of 4."""
    frequencies = 10_000 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side).unsqueeze(1) * frequencies         # (side, width / 4)
    table = torch.cat([angles.sin(), angles.cos()], dim=1)         # (side, width / 2)
    columns, rows = table.repeat(side, 1), table.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=1)
