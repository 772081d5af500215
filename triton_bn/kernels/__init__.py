"""Triton kernels over the canonical block ``[outer, channels, inner]`` (:mod:`triton_bn.problem`).

The block is a matrix of N = ``outer`` rows and C*S = ``channels * inner`` columns. A program works on
tiles of R rows and K adjacent columns. Columns belong to channels: column k to channel k // S. With
S = 1 (channels_last, (N, C)) every column is a channel of its own; with a large S a tile lies within one
or two channels; in between it spans several. The same code serves all three: each column keeps
statistics of its own, and only at the end of a program are columns folded into channels.

Names: ``p_`` pointer, ``o_`` offset, ``m_`` mask, ``i_`` index. Vectors over columns have K entries, those over
a tile's channels G. ``ACC`` is the accumulation dtype.
"""
