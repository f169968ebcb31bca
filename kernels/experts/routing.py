# SPDX-License-Identifier: Apache-2.0
"""Which rows of the sorted buffers belong to which expert, without asking the device (no host synchronisation).

Every choice of an expert by a token is a row: `T * K` rows, numbered `t * K + k` before sorting. Sorted by expert
(stable, so the result is deterministic), the rows of expert e lie at `offsets[e - 1] : offsets[e]`. The backward pass
starts each expert's rows at a multiple of `ALIGNMENT` instead, with zeros in between, so that the weight gradient's
loop over rows needs no mask: `padded_offsets` are the ends of those. An expert without rows has zeros too, so that no
product is over nothing.

Shape suffixes: T tokens, K experts of a token, E experts, R = T * K rows.
"""

from typing import NamedTuple

import torch

ALIGNMENT = 64
FP8_GROUP = 128  # values of a row that share an exponent in the eight-bit form of `pre`


class Routing(NamedTuple):
    """Where each row lies. All int32, on the device of the expert ids.

    Attributes:
        order_R: the unsorted row `t * K + k` that lies at each sorted place. Places from `offsets_E[-1]` on hold the
            choices of experts that are not here (ids from E on, under expert parallelism) in no order.
        slots_TK: the sorted place of each choice; -1 for an expert that is not here.
        padded_slots_TK: the same in a padded buffer.
        offsets_E: where each expert's rows end.
        padded_offsets_E: where they end when every expert has a positive multiple of `ALIGNMENT`.
    """

    order_R: torch.Tensor
    slots_TK: torch.Tensor
    padded_slots_TK: torch.Tensor
    offsets_E: torch.Tensor
    padded_offsets_E: torch.Tensor


def padded_rows(rows: int, num_experts: int) -> int:
    """The most rows that a padded buffer can need: every expert wastes at most `ALIGNMENT`."""
    return (rows + num_experts * ALIGNMENT) // ALIGNMENT * ALIGNMENT


def route_reference(ids_TK: torch.Tensor, num_experts: int) -> Routing:
    """The routing in plain operations, on any device.

    Args:
        ids_TK: integer expert ids `(T, K)`; ids from `num_experts` on belong to other ranks.
        num_experts: how many experts are here.
    """
    ids_R = ids_TK.reshape(-1).clamp(max=num_experts)
    order_R = torch.sort(ids_R, stable=True).indices
    slots_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.numel(), device=ids_R.device))
    counts_E = (ids_R[:, None] == torch.arange(num_experts, device=ids_R.device)).sum(dim=0)
    padded_E = (counts_E.clamp(min=1) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    offsets_E, padded_offsets_E = counts_E.cumsum(0), padded_E.cumsum(0)
    moved_E = (padded_offsets_E - padded_E) - (offsets_E - counts_E)
    padded_slots_R = slots_R + moved_E[ids_R.clamp(max=num_experts - 1)]
    elsewhere_R = ids_R == num_experts
    return Routing(
        order_R.int(),
        slots_R.masked_fill(elsewhere_R, -1).view(ids_TK.shape).int(),
        padded_slots_R.masked_fill(elsewhere_R, -1).view(ids_TK.shape).int(),
        offsets_E.int(),
        padded_offsets_E.int(),
    )


def permute_reference(x_TH: torch.Tensor, routing: Routing, padded: bool = False) -> torch.Tensor:
    """The token of each sorted row: `(R, H)`, or `(padded_rows(R, E), H)` with zeros between the experts."""
    (tokens, top_k), num_experts = routing.slots_TK.shape, routing.offsets_E.numel()
    if not padded:
        return x_TH[routing.order_R // top_k]
    out_PH = x_TH.new_zeros((padded_rows(tokens * top_k, num_experts) + 1, x_TH.shape[1]))
    out_PH[routing.padded_slots_TK] = x_TH[:, None]  # -1: the row too many, which is cut off
    return out_PH[:-1]


def combine_reference(
    rows_RH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of each token's rows, weighted or not, in fp32 (float64 stays): `(T, H)` in the dtype of the rows."""
    accumulator = torch.promote_types(rows_RH.dtype, torch.float32)
    taken_TKH = torch.where((slots_TK >= 0)[..., None], rows_RH[slots_TK.clamp(min=0)].to(accumulator), 0)
    if weights_TK is not None:
        taken_TKH = taken_TKH * weights_TK[..., None].to(accumulator)
    return taken_TKH.sum(dim=1).to(rows_RH.dtype)
