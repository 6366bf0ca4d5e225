"""Pairs of a chunk's tokens whose decay differs by channel, sorted by levels.

Of level 0, 1, 2, ... are the pairs s < t in neighbouring blocks of 1, 2, 4, ... tokens under one
block of twice as many. Both are measured from the border between the two, so no exponent is
positive (fla_dist.kernels.gla.triton_kernels). Exponents are sums of log decays over spans of
tokens: products with a matrix of zeros and ones (`spans`). Or the decays themselves are products of
those of the level below (`next_decays`).
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


@lru_cache
def identity(chunk: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[C, C], with which a product changes nothing but the layout in registers."""
    return torch.eye(chunk, dtype=dtype, device=device)


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
def across(b_x, AXIS: tl.constexpr, level: tl.constexpr):
    """Of every token (tokens lie on `AXIS` of two) the number that the token as far into the block
    on the other side of the level's border has."""
    ROWS: tl.constexpr = b_x.shape[0]
    COLUMNS: tl.constexpr = b_x.shape[1]
    LENGTH: tl.constexpr = b_x.shape[AXIS]
    BEFORE: tl.constexpr = LENGTH >> (level + 1) if AXIS == 0 else ROWS * (LENGTH >> (level + 1))
    AFTER: tl.constexpr = COLUMNS << level if AXIS == 0 else 1 << level
    b_bits = tl.reshape(b_x.to(tl.int32, bitcast=True), [BEFORE, 2, AFTER])
    b_bits ^= tl.xor_sum(b_bits, axis=1, keep_dims=True)
    return tl.reshape(b_bits, [ROWS, COLUMNS]).to(tl.float32, bitcast=True)


@triton.jit
def first_decays(b_single, EXCLUSIVE: tl.constexpr):
    """From the decays of single tokens, those of blocks of one token: from the block's start to
    where the token reads the state (EXCLUSIVE: before its own decay), from the token to the block's
    end, and through the block."""
    b_one = tl.full(b_single.shape, 1.0, dtype=tl.float32)
    return b_one if EXCLUSIVE else b_single, b_one, b_single


@triton.jit
def next_decays(
    b_before, b_after, b_block, b_decay, later, AXIS: tl.constexpr, level: tl.constexpr
):
    """The same of blocks twice as long; b_before and b_after also as q and k multiplied by them.
    b_decay: to the level's border. Products of numbers from 0 to 1, in fp32: one exponential a
    token serves all levels."""
    b_other = across(b_block, AXIS, level)
    b_beyond = b_decay * b_other
    b_before = tl.where(later, b_beyond, b_before)
    b_after = tl.where(later, b_after, b_beyond)
    return b_before, b_after, b_block * b_other


@triton.jit
def program_chunk(H):
    """batch, chunk, head of a program in a grid (N·H, B): heads that lie side by side in memory run
    at the same time."""
    chunk = tl.program_id(0) // H
    return tl.program_id(1), chunk, tl.program_id(0) - chunk * H


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
