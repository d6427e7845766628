"""Measurements of whole training steps, and the tables and plots made from them.

``tlgc-mp bench scaling`` sets two-level group convolution beside what else trains a network too large for one device,
as Table 2 of *Two-level Group Convolution* (https://arxiv.org/abs/2110.05060) does. Every measurement runs in processes
of its own, one a rank and each pinned to its core, so that a core stands for a device.

    settings    options -> what to measure; loads no torch
    report      rows -> a Markdown table and a plot
    ranks/      the ranks of one measurement: started and pinned (launch), what one does (worker), its clocks and meters
    scaling/    a step over widths and strategies, against bandwidth, and the growth of memory
    zero/       memory of each ZeRO stage
    saving/     what a checkpoint costs
    inference   folded networks against dense ones
"""
