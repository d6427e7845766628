"""Measurements of whole training steps, and the tables and plots made from them.

``tlgc-mp bench scaling`` sets two-level group convolution beside what else trains a network too large for one device,
as Table 2 of *Two-level Group Convolution* (https://arxiv.org/abs/2110.05060) does. Every measurement runs in processes
of its own, one a rank and each pinned to its core, so that a core stands for a device.

    settings    options -> what to measure; loads no torch
    capacity    what a measurement needs of the machine's memory; loads no torch
    launch      the ranks of one measurement: started, watched, ended; loads no torch
    worker      one rank of one measurement
    strategies  name -> a training step, through the real thing
    meters      clocks of collectives, meters of memory
    flops       the arithmetic of a step, from shapes
    rows        measurements -> the rows of scaling.json
    scaling     the benchmark: rounds of measurements, and its files
    report      rows -> a Markdown table and a plot
"""
