"""The order in which the programs of a Triton kernel take their rows."""

import triton
import triton.language as tl


@triton.jit
def from_last():
    """A program's number along axis 0, counted from the last.

    cuBLAS computes the first rows first, so the last ones are still in the cache when a kernel behind it starts there;
    and what this kernel writes last are the first rows, with which the next product starts.
    """
    return tl.num_programs(0) - 1 - tl.program_id(0)
