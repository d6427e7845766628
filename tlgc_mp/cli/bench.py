"""``tlgc-mp bench``: the arguments of each benchmark. Loads no torch before they are checked."""

from __future__ import annotations

import functools
import importlib
from argparse import ArgumentParser, Namespace

from tlgc_mp.bench.settings import CHECKPOINTED, DTYPES, STRATEGIES, resolve
from tlgc_mp.cli.options import Commands, check_alone
from tlgc_mp.errors import check_installed
from tlgc_mp.parallel.topology import Launch


def add_bench_parser(commands: Commands) -> None:
    """Adds ``bench`` and its benchmarks to the subparsers ``commands``."""
    bench = commands.add_parser("bench", help="measure, and make the tables and plots", allow_abbrev=False)
    benchmarks = bench.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    scaling = benchmarks.add_parser(
        "scaling",
        help="GC-2L beside naive model parallelism and other ways to train a network too large for one device",
        description="Time training steps of WideResNet under several strategies, each on processes of its own that "
        "this command starts, one thread and one core a rank. Writes scaling.json, run.json, scaling.md, scaling.png "
        "and scaling.svg.",
        allow_abbrev=False,
    )
    scaling.add_argument("--widths", nargs="+", type=int, metavar="W", help="of the WideResNet (default: 40 60 80)")
    scaling.add_argument("--depth", type=int, help="of the WideResNet, 6 u + 4 (default: 28)")
    scaling.add_argument("--tp", nargs="+", type=int, metavar="P", help="numbers of ranks (default: 2)")
    scaling.add_argument(
        "--strategies",
        nargs="+",
        metavar="NAME[@P]",
        help=f"{', '.join(STRATEGIES)}; with @P at P ranks only (default: gc-2l naive-mp)",
    )
    scaling.add_argument("--groups", type=int, metavar="N", help="of gc-2l and gc (default: as many as ranks)")
    scaling.add_argument(
        "--coarse-channels", type=int, default=1, metavar="R", help="of gc-2l: representatives (default: %(default)s)"
    )
    scaling.add_argument("--coarse-sum", action="store_true", help="of gc-2l: they are summed over the groups")
    scaling.add_argument(
        "--batch-sizes", nargs="+", type=int, metavar="B", help="one for all widths, or one for each (default: 8 4 2)"
    )
    scaling.add_argument(
        "--micro-batches", nargs="+", type=int, metavar="M", help="to choose from in pipeline (default: 2 4 8)"
    )
    scaling.add_argument("--rounds", type=int, metavar="R", help="times through all strategies (default: 2)")
    scaling.add_argument("--steps", type=int, metavar="K", help="timed steps of a measurement (default: 2)")
    scaling.add_argument("--dtype", default="fp32", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    scaling.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help=f"residual units keep only their input for backward: {', '.join(CHECKPOINTED)}",
    )
    scaling.add_argument("--no-momentum", action="store_true", help="SGD without momentum, which saves memory")
    scaling.add_argument("--quick", action="store_true", help="w = 10, every strategy, one round of one step")
    _add_time_limit(scaling, "of one measurement")
    scaling.add_argument(
        "--hosts",
        nargs="+",
        metavar="HOST",
        help="on which the ranks run, shared evenly, through ssh without a password (default: this machine)",
    )
    scaling.add_argument("--output", metavar="DIR", help="default: runs/scaling-DATE, which all hosts must see")
    scaling.set_defaults(run=_scaling)
    bandwidth = benchmarks.add_parser(
        "bandwidth",
        help="a training step of several strategies against the bandwidth between two hosts",
        description="Time training steps of WideResNet over two hosts that this command makes on this machine (network "
        "namespaces; it needs root, iproute2 and util-linux), at several bandwidths of the link between them. Writes "
        "bandwidth.json, bandwidth.md, bandwidth.png and bandwidth.svg, and goes on with a run that was cut off in its "
        "folder.",
        allow_abbrev=False,
    )
    bandwidth.add_argument("--depth", type=int, default=10, help="of the WideResNet, 6 u + 4 (default: %(default)s)")
    bandwidth.add_argument("--width", type=int, metavar="W", help="of the WideResNet (default: 4)")
    bandwidth.add_argument(
        "--strategies",
        nargs="+",
        metavar="NAME[@P]",
        help=f"{', '.join(STRATEGIES)}; at 2 ranks, or P (default: gc-2l gc channel-parallel naive-mp zero3)",
    )
    bandwidth.add_argument("--groups", type=int, metavar="N", help="of gc-2l and gc (default: as many as ranks)")
    bandwidth.add_argument(
        "--batch-size", type=int, default=32, metavar="B", help="images a step (default: %(default)s)"
    )
    bandwidth.add_argument(
        "--rates", nargs="+", metavar="RATE", help="(default: unlimited 1gbit 100mbit 20mbit; unlimited always)"
    )
    bandwidth.add_argument("--rounds", type=int, default=2, metavar="R", help="(default: %(default)s)")
    bandwidth.add_argument("--steps", type=int, default=5, metavar="K", help="timed ones (default: %(default)s)")
    bandwidth.add_argument("--quick", action="store_true", help="w = 1, one round of one step, unlimited and 20mbit")
    _add_time_limit(bandwidth, "of one measurement; one that must take longer is left out", 120.0)
    bandwidth.add_argument("--output", metavar="DIR", help="default: runs/bandwidth-DATE")
    bandwidth.set_defaults(run=_bandwidth, micro_batches=None, activation_checkpointing=False)
    bandwidth.set_defaults(coarse_channels=1, coarse_sum=False)
    zero = benchmarks.add_parser(
        "zero",
        help="memory of a rank at each ZeRO stage beside tensor parallelism, against what the stage promises",
        description="Measure what a rank holds of parameters, gradients and optimizer state at ZeRO 0 to 3, over P x D "
        "processes that this command starts. Writes zero.json and zero.md.",
        allow_abbrev=False,
    )
    zero.add_argument("--model", metavar="NAME", help="of GC-2L (default: wrn-28-10)")
    zero.add_argument("--groups", type=int, metavar="N", help="(default: 4)")
    zero.add_argument("--tp", type=int, default=2, metavar="P", help="tensor-parallel ranks (default: %(default)s)")
    zero.add_argument("--replicas", type=int, default=2, metavar="D", help="of ZeRO (default: %(default)s)")
    zero.add_argument("--batch-size", type=int, metavar="B", help="images a step (default: two a replica)")
    zero.add_argument("--quick", action="store_true", help="a smaller network, wrn-16-4")
    _add_time_limit(zero, "of it all")
    zero.add_argument("--output", metavar="DIR", help="default: runs/zero-DATE")
    zero.set_defaults(run=functools.partial(_measure, "bench zero", "tlgc_mp.bench.zero.sweep"))
    saving = benchmarks.add_parser(
        "saving",
        help="how long a checkpoint holds training up, beside the time to write the same bytes",
        description="Measure what saving a checkpoint costs P tensor-parallel ranks of GC-2L, on processes that this "
        "command starts. Writes saving.json and saving.md.",
        allow_abbrev=False,
    )
    saving.add_argument("--model", metavar="NAME", help="of GC-2L (default: wrn-28-20)")
    saving.add_argument("--groups", type=int, metavar="N", help="(default: as many as ranks)")
    saving.add_argument("--tp", type=int, default=2, metavar="P", help="tensor-parallel ranks (default: %(default)s)")
    saving.add_argument("--batch-size", type=int, default=8, metavar="B", help="images a step (default: %(default)s)")
    saving.add_argument("--zero-stage", dest="stage", type=int, default=1, help="(default: %(default)s)")
    saving.add_argument("--rounds", type=int, default=5, metavar="R", help="(default: %(default)s)")
    saving.add_argument("--quick", action="store_true", help="a small network, wrn-10-1, and one round")
    _add_time_limit(saving, "of the run")
    saving.add_argument("--output", metavar="DIR", help="default: runs/saving-DATE")
    saving.set_defaults(run=functools.partial(_measure, "bench saving", "tlgc_mp.bench.saving.sweep"))
    inference = benchmarks.add_parser(
        "inference",
        help="dense, group and two-level networks as they are trained and folded, in torch and ONNX Runtime",
        description="Time calls of networks in evaluation, as they are trained and folded for inference, on one "
        "thread. Writes inference.json and inference.md. ONNX Runtime is measured where it is installed: "
        "pip install 'tlgc-mp[onnx]'.",
        allow_abbrev=False,
    )
    inference.add_argument("--models", nargs="+", metavar="NAME", help="(default: mobilenet_v2 wrn-28-10)")
    inference.add_argument("--groups", type=int, default=4, metavar="N", help="(default: %(default)s)")
    inference.add_argument("--batch-size", type=int, default=1, metavar="B", help="images a call (default: 1)")
    inference.add_argument("--rounds", type=int, default=15, metavar="R", help="timed calls (default: %(default)s)")
    inference.add_argument("--quick", action="store_true", help="a small network, wrn-10-1, and one round")
    inference.add_argument("--output", metavar="DIR", help="default: runs/inference-DATE")
    inference.set_defaults(run=functools.partial(_measure, "bench inference", "tlgc_mp.bench.inference"))


def _add_time_limit(parser: ArgumentParser, of: str, default: float = 1800.0) -> None:
    help = f"{of} (default: %(default)g)"
    parser.add_argument("--time-limit", type=float, default=default, metavar="SECONDS", help=help)


def _scaling(options: Namespace, launch: Launch) -> int:
    check_alone("bench scaling", launch)
    check_installed("matplotlib", "bench", "bench scaling")
    settings = resolve(options)
    from tlgc_mp.bench.scaling import sweep as scaling

    return scaling.run(settings)


def _bandwidth(options: Namespace, launch: Launch) -> int:
    check_installed("matplotlib", "bench", "bench bandwidth")
    return _measure("bench bandwidth", "tlgc_mp.bench.scaling.bandwidth", options, launch)


def _measure(command: str, module: str, options: Namespace, launch: Launch) -> int:
    """Runs the benchmark of a module that has ``resolve`` and ``run``."""
    check_alone(command, launch)
    benchmark = importlib.import_module(module)
    return int(benchmark.run(benchmark.resolve(options)))
