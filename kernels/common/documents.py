"""Packed documents on a regular grid of chunks.

`doc_ids` [B, T] int32 never falls along T. The state restarts where it rises, and it counts from 0,
the document that was open before the first token: `doc_ids = cumsum(positions == 0)`. A slice of a
rank may therefore start anywhere, and learns nothing from other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def document_starts(doc_ids: Tensor) -> Tensor:
    """[B, T] bool: True where a document starts."""
    return doc_ids != F.pad(doc_ids[:, :-1], (1, 0))


@dataclass(frozen=True)
class ChunkDocuments:
    """What documents allow inside and between chunks, N chunks of C tokens.

    pairs: [B, N, C, C], query t may see key s (same document; causality is not included).
    continues: [B, N, C], the token belongs to the document that was open when its chunk started.
    last: [B, N, C], the token belongs to the document that is open when its chunk ends.
    restarts: [B, N], a document starts in the chunk, so that no state passes through it.
    """

    pairs: Tensor
    continues: Tensor
    last: Tensor
    restarts: Tensor


def chunk_documents(doc_ids: Tensor, chunk_size: int) -> ChunkDocuments:
    """doc_ids [B, N·C] to what each chunk needs."""
    chunks = doc_ids.unflatten(1, (-1, chunk_size))
    final = chunks[:, :, -1:]
    before = F.pad(final[:, :-1], (0, 0, 1, 0))
    return ChunkDocuments(
        pairs=chunks[:, :, :, None] == chunks[:, :, None, :],
        continues=chunks == before,
        last=chunks == final,
        restarts=(final != before).squeeze(-1),
    )


def pad_doc_ids(doc_ids: Tensor, length: int) -> Tensor:
    """The last document goes on through `length` tokens of padding, so that the final state is what
    the last token left."""
    if length == 0:
        return doc_ids
    return torch.cat([doc_ids, doc_ids[:, -1:].expand(-1, length)], dim=1)
