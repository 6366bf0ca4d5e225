"""Pairs of a chunk's tokens whose decay differs by channel, sorted by levels.

Of level 0, 1, 2, ... are the pairs s < t in neighbouring blocks of 1, 2, 4, ... tokens under one
block of twice as many. Both are measured from the border between the two, so no exponent is
positive (fla_dist.kernels.gla.triton_kernels). Exponents are sums of log decays over spans of
tokens: products with a matrix of zeros and ones.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_dist.kernels.common.segments import LOG2_E


@lru_cache
def spans(chunk: int, dtype: torch.dtype, device: torch.device, exclusive: bool = False) -> Tensor:
    """[levels + 2, C, C] of zeros and ones: row t marks the tokens u whose decays lie between t and
    its border of the level; and of the last two, between the chunk's start and t, and t and its
    end. Exclusive: a token that reads the state is before its own decay."""
    place = torch.arange(chunk, device=device)
    t, u = place[:, None], place[None, :]
    before, after = u < t if exclusive else u <= t, u > t
    levels = []
    for level in range(chunk.bit_length() - 1):
        later = (t >> level) % 2 == 1
        levels.append((t >> level == u >> level) & torch.where(later, before, after))
    return torch.stack([*levels, before, after]).to(dtype)


def span_types(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Of the spans that sum exponents, and of those that sum their gradients."""
    if dtype == torch.float32:
        return torch.float32, torch.float32
    return torch.float16, torch.bfloat16


@triton.jit
def is_later(o_t, level):
    """Whether a token is after its border of the level, not before it."""
    return (o_t >> level) & 1 != 0


@triton.jit
def level_pairs(o_t, level):
    """[C, C]: the tokens on the other side of the level's border."""
    return (o_t[:, None] ^ o_t[None, :]) >> level == 1


@triton.jit
def summands(b_g, EXACT: tl.constexpr):
    """Log decays in base 2, in the type in which spans of them are summed. Half precision holds an
    exponent x to |x| 2^-12, and e^x makes it nothing: an error of x is an error of x e^x of the
    decay, at most 1e-4."""
    if EXACT:
        b_summands = b_g.to(tl.float32) * LOG2_E
    else:
        b_summands = tl.maximum(b_g.to(tl.float32) * LOG2_E, -60000.0).to(tl.float16)
    return b_summands


@triton.jit
def load_spans(spans, o_pair, COUNT: tl.constexpr, C: tl.constexpr):
    """The first COUNT of the [C, C] spans, so that a loop that takes them need not load them."""
    b_spans = ()
    for i in tl.static_range(COUNT):
        b_spans = b_spans + (tl.load(spans + i * C * C + o_pair),)  # type: ignore[assignment]
    return b_spans


@triton.jit
def documents(doc_ids, start, T, C: tl.constexpr):
    """doc_ids of C tokens; those beyond T are of the last document."""
    return tl.load(doc_ids + tl.minimum(start + tl.arange(0, C), T - 1))


@triton.jit
def open_documents(doc_ids, start, T, C: tl.constexpr):
    """The document open at a chunk's start, and at its end."""
    before = tl.load(doc_ids + start - 1, mask=start > 0, other=0)
    return before, tl.load(doc_ids + tl.minimum(start + C, T) - 1)


@triton.jit
def chunk_documents(doc_ids, start, T, C: tl.constexpr, PACKED: tl.constexpr):
    """document [C]; whether a token is of the document open at the chunk's start, at its end;
    whether no document starts in it."""
    o_c = tl.arange(0, C)
    b_document = o_c * 0
    b_continues, b_last, passes = o_c >= 0, o_c >= 0, start >= 0
    if PACKED:
        b_document = documents(doc_ids, start, T, C)
        before, last = open_documents(doc_ids, start, T, C)
        b_continues, b_last, passes = b_document == before, b_document == last, last == before
    return b_document, b_continues, b_last, passes
