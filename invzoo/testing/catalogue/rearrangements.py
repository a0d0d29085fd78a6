"""Orders, splits, shapes and orthonormal transforms."""

import invzoo as iz

from ..entries import Case, Entry

__all__ = ["REARRANGEMENTS"]

REARRANGEMENTS: tuple[Entry, ...] = (
    # ---- orders, splits ----
    Entry(
        iz.Permute,
        "y[i] = x[permutation[i]]",
        "0",
        Case(lambda: iz.Permute([2, 0, 1]), (3,)),
        Case(lambda: iz.Permute([1, 0], dim=-1), (3, 2), id="last"),
        Case(lambda: iz.Permute([2, 0, 1]), (3, 1, 2), id="images"),
    ),
    Entry(iz.Shuffle, "the same with a random order", "0", Case(lambda: iz.Shuffle(5, dim=1), (5, 2, 2))),
    Entry(iz.Reverse, "y[i] = x[n - 1 - i]", "0", Case(lambda: iz.Reverse(dim=1), (3, 2, 2))),
    Entry(
        iz.Swap,
        "(x1, x2) -> (x2, x1)",
        "0",
        Case(iz.Swap, (4,)),
        Case(lambda: iz.Swap(dim=1), (5, 2, 2), id="odd"),
        Case(iz.Swap, (3,), (2,), id="streams"),
    ),
    Entry(
        iz.Interleave,
        "[a0 a1 b0 b1] -> [a0 b0 a1 b1]",
        "0",
        Case(iz.Interleave, (4,)),
        Case(lambda: iz.Interleave(dim=1), (5, 2, 2), id="odd"),
    ),
    Entry(
        iz.Deinterleave,
        "[a0 b0 a1 b1] -> [a0 a1 b0 b1]",
        "0",
        Case(iz.Deinterleave, (4,)),
        Case(lambda: iz.Deinterleave(dim=1), (5, 2, 2), id="odd"),
    ),
    Entry(
        iz.Split,
        "x -> (x1, x2)",
        "0",
        Case(iz.Split, (4,)),
        Case(lambda: iz.Split(dim=1, split="interleave"), (5, 2), id="interleave"),
        Case(lambda: iz.Split(split=(1, 3)), (4,), id="sizes"),
        Case(lambda: iz.Split(split=0.7), (5,), id="fraction"),
        Case(lambda: iz.Split(-1, "interleave"), (2, 3), id="last"),
    ),
    Entry(
        iz.Merge,
        "(x1, x2) -> x",
        "0",
        Case(iz.Merge, (2,), (2,)),
        Case(lambda: iz.Merge(dim=1, split="interleave"), (3, 2), (2, 2), id="interleave"),
        Case(lambda: iz.Merge(split=(1, 3)), (1,), (3,), id="sizes"),
        Case(lambda: iz.Merge(-1, 0.3), (2, 3), (2, 6), id="fraction"),
    ),
    # ---- shapes ----
    Entry(
        iz.Squeeze,
        "(c, h p, w q) -> (c p q, h, w)",
        "0",
        Case(iz.Squeeze, (1, 2, 4)),
        Case(lambda: iz.Squeeze((3,), order="positions_first"), (2, 6), id="positions"),
        Case(lambda: iz.Squeeze((1, 3)), (2, 2, 3), id="factors"),
        Case(iz.Squeeze, (1, 2, 4, 2), id="volumes"),
    ),
    Entry(
        iz.Unsqueeze,
        "(c p q, h, w) -> (c, h p, w q)",
        "0",
        Case(iz.Unsqueeze, (4, 2, 1)),
        Case(lambda: iz.Unsqueeze(order="positions_first"), (8, 1, 2, 1), id="positions"),
    ),
    Entry(iz.Flatten, "(c, h, w) -> (c h w)", "0", Case(lambda: iz.Flatten((2, 3)), (2, 3))),
    Entry(iz.Reshape, "the same entries in another shape", "0", Case(lambda: iz.Reshape((2, 6), (3, -1)), (2, 6))),
    Entry(
        iz.Rearrange,
        "what an einops pattern says",
        "0",
        Case(lambda: iz.Rearrange("b (h p) c -> b h (c p)", {"p": 2, "c": 3}), (4, 3)),
        Case(lambda: iz.Rearrange("b c ... -> b ... c"), (2, 3, 2), id="dots"),
    ),
    Entry(
        iz.Pad,
        "x -> (0, x, 0)",
        "none",
        Case(lambda: iz.Pad(2, dim=1), (3, 2)),
        Case(lambda: iz.Pad((1, 2), dim=(-1, -2)), (1, 2, 3), id="pixels"),
    ),
    # ---- orthonormal transforms ----
    Entry(
        iz.HaarDownsample,
        "means and differences of each cell of pixels, as channels",
        "0",
        Case(iz.HaarDownsample, (1, 2, 4)),
        Case(lambda: iz.HaarDownsample("db2", order="positions_first"), (2, 6), id="db2"),
        Case(lambda: iz.HaarDownsample("db2"), (1, 2, 4), id="short"),
        Case(iz.HaarDownsample, (1, 2, 2, 2), id="volumes"),
    ),
    Entry(
        iz.HaarUpsample,
        "the same the other way round",
        "0",
        Case(iz.HaarUpsample, (4, 1, 2)),
        Case(lambda: iz.HaarUpsample("db3"), (2, 4), id="db3"),
    ),
    Entry(
        iz.DCT,
        "the cosine transform of some dims",
        "0",
        Case(iz.DCT, (2, 5)),
        Case(lambda: iz.DCT((-2, -1)), (2, 3), id="pixels"),
        Case(lambda: iz.DCT(1), (3, 2), id="channels"),
    ),
    Entry(
        iz.Hadamard,
        "the Hadamard transform of some dims",
        "0",
        Case(lambda: iz.Hadamard(dim=1), (4, 2)),
        Case(lambda: iz.Hadamard((-1, 1)), (2, 3, 4), id="pixels"),
    ),
)
