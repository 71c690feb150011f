"""The decoder's operations in Triton, for CUDA: one kernel a file.

`backend` picks whatever is fastest, `invariant` the same bits for a row whatever else is in the batch. Both are the
`Kernels` of `rollout_server.kernels.interface`. Everything that a pass without adapters and shared runs launches has
shapes known on the host and reads lengths on the device, so that a decode pass can be captured in a CUDA graph.

Letters in kernels: D head dim, PAGE positions of a page, GROUP query heads of a key/value head, BLOCK_* tile sizes.
"""
