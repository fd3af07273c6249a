"""Runs every CUDA C++ kernel, forward and backward, at sizes that cross their boundaries: for test_sanitizer.py.

python tests/helpers/every_cuda_kernel.py     # prints the number of runs; results are test_mixer.py's to check
"""

import torch
from helpers.kernel_cases import cast, make_directions, make_xz, results
from mambapeft_kernels import ssm_mixer

# batch, length, channels, states, rank: whole and ragged chunks of tokens, tiles of channels and lanes of states.
SHAPES = [(2, 17, 64, 16, 4), (3, 9, 100, 5, 3), (1, 25, 70, 19, 2), (2, 8, 136, 22, 6), (1, 1, 33, 32, 1)]


def main() -> None:
    runs = 0
    for batch, length, channels, states, rank in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            # Without offsets; with them, which adds the state offset's gradient; one direction, as in a last block.
            for offsets, chosen in ((False, slice(0, 2)), (True, slice(0, 2)), (False, slice(1, 2))):
                directions = make_directions(channels, states, rank, offsets=offsets, device="cuda")[chosen]
                found = results(make_xz(batch, length, channels, "cuda"), directions, dtype, "cuda", torch.float32)
                assert all(t.isfinite().all() for t in found.values())
                runs += 1
                if channels % 64 == 0:  # with frozen weights, bfloat16 has another kernel for the scans
                    xz = make_xz(batch, length, channels, "cuda").to(dtype).requires_grad_()
                    out = ssm_mixer(xz, cast(directions, torch.float32, grad=False), backend="cuda")
                    assert torch.autograd.grad(out, xz, torch.ones_like(out))[0].isfinite().all()
                    runs += 1
    torch.cuda.synchronize()
    print(f"{runs} runs of the CUDA C++ kernels")


if __name__ == "__main__":
    main()
