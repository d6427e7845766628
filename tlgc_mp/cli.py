"""The ``tlgc-mp`` command.

What can be checked is checked before torch is loaded. Every rank of a launch checks the same, so only rank 0 tells.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from tlgc_mp import __version__
from tlgc_mp.bench.commands import add_bench_parser
from tlgc_mp.checkpoint.folder import find_checkpoint
from tlgc_mp.data.catalog import DATASETS
from tlgc_mp.errors import UsageError
from tlgc_mp.models.names import (
    COARSE_INITS,
    CONVOLUTIONS,
    IMAGENET_WIDE_RESNET,
    MOBILENET_V2,
    check_coarse_level,
    check_model,
    check_split,
)
from tlgc_mp.parallel.topology import Launch
from tlgc_mp.training.recipes import RECIPES
from tlgc_mp.training.verdicts import Failed, leave_verdict


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises what it finds wrong, instead of printing a usage text on every rank."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tlgc-mp",
        description="Two-level group convolution across devices, inside a DeepSpeed engine.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tlgc-mp {__version__}")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser(
        "train",
        help="train a model, on one process or under deepspeed, mpirun or torchrun",
        description="Train a model. The same command runs in one process, and under deepspeed, mpirun and torchrun.",
        allow_abbrev=False,
    )
    _model_arguments(train)
    train.add_argument("--dataset", default="cifar10", help=f"{', '.join(DATASETS)} (default: %(default)s)")
    train.add_argument("--data-dir", metavar="DIR", help="where the images are; CIFAR is downloaded there if missing")
    train.add_argument("--val-split", metavar="NAME", help="folder in DIR to test on (default: test, else val)")
    train.add_argument("--image-size", type=int, metavar="PIXELS", help="for imagefolder and synthetic")
    train.add_argument("--recipe", help=f"{', '.join(RECIPES)} (default: by data set): epochs, batch, rate and decay")
    train.add_argument("--epochs", type=int, help="default: the recipe's; its milestones move along")
    train.add_argument(
        "--limit-steps",
        type=int,
        metavar="K",
        help="end each epoch after K steps, and its evaluation after K batches, to try a run (default: no limit)",
    )
    train.add_argument(
        "--log-interval",
        type=int,
        default=50,
        metavar="K",
        help="report loss, rate, speed and remaining time every K steps (default: %(default)s)",
    )
    train.add_argument("--batch-size", type=int, help="samples a step over all replicas (default: the recipe's)")
    train.add_argument("--learning-rate", type=float, metavar="RATE", help="the initial one (default: the recipe's)")
    train.add_argument(
        "--tp",
        type=int,
        metavar="P",
        help="tensor-parallel ranks a replica (default: as many of a host as share the groups)",
    )
    train.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)")
    train.add_argument("--workers", type=int, metavar="W", help="data worker processes a rank (default: by data set)")
    train.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="residual units keep only their input for backward, and are computed again there",
    )
    train.add_argument("--output-dir", metavar="DIR", help="default: runs/MODEL-CONV-GROUPS-DATASET")
    train.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="go on from the newest checkpoint of the run in DIR (default: in the output folder); with `auto`, in the "
        "output folder where there is one, and else begin",
    )
    train.add_argument(
        "--keep",
        type=int,
        default=2,
        metavar="K",
        help="checkpoints to keep: the newest ones, and the best (default: %(default)s)",
    )
    train.add_argument(
        "--save-every",
        type=float,
        metavar="MINUTES",
        help="save when so long has passed since the last checkpoint (default: at the end of an epoch only)",
    )
    train.add_argument("--save-every-steps", type=int, metavar="K", help="save after each K steps of an epoch, too")
    train.add_argument(
        "--blocking-save",
        action="store_true",
        help="write a checkpoint before training goes on, which saves the copy that is written beside it otherwise",
    )
    train.add_argument(
        "--rank-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="end the run when a rank has given no sign of life for so long (default: %(default)g)",
    )
    train.add_argument(
        "--deepspeed_config", "--deepspeed-config", metavar="JSON", help="a DeepSpeed configuration (default: ZeRO 1)"
    )
    train.set_defaults(run=_train)

    again = commands.add_parser(
        "launch",
        help="start a launch of training, and start it again from its newest checkpoint when it fails",
        description="Run COMMAND, any launch of tlgc-mp train under any launcher, and when it fails make sure that "
        "nothing of it is left and run it again, with --resume where its output folder holds a checkpoint. A run that "
        "ended well, has a mistake in its options (status 2) or was asked to stop is not run again. SIGINT, SIGTERM "
        "and SIGUSR1 are passed on. The exit status is the last attempt's.",
        usage="tlgc-mp launch [--max-restarts N] -- COMMAND ...",
        allow_abbrev=False,
    )
    again.add_argument("--max-restarts", type=int, default=3, metavar="N", help="at most (default: %(default)s)")
    again.add_argument("launch", nargs=argparse.REMAINDER, metavar="COMMAND", help="deepspeed, mpirun, torchrun, ...")
    again.set_defaults(run=_launch)

    export = commands.add_parser(
        "export",
        help="write a checkpoint's weights as one safetensors file, for one device and torch alone",
        description="Write the weights and running statistics of a checkpoint, of any number of ranks, as one "
        "safetensors file. tlgc_mp.load_model makes the model from it, without deepspeed.",
        allow_abbrev=False,
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output folder, or one of its checkpoints")
    export.add_argument("output", metavar="OUT", help="the file to write")
    export.set_defaults(run=_export)
    reshard = commands.add_parser(
        "reshard",
        help="cut a checkpoint for another number of tensor-parallel ranks",
        description="Cut a checkpoint for P tensor-parallel ranks and one replica, into another run's folder. "
        "train --resume takes a checkpoint of any number of ranks as it is; this saves its ranks the reading.",
        allow_abbrev=False,
    )
    reshard.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output folder, or one of its checkpoints")
    reshard.add_argument("output", metavar="OUT", help="the run's output folder to write it to")
    reshard.add_argument("--tp", type=int, required=True, metavar="P", help="tensor-parallel ranks")
    reshard.set_defaults(run=_reshard)

    params = commands.add_parser(
        "params",
        help="count a model's parameters, in all and on each rank, without building it",
        description='Print {"total": ..., "per_rank": ...} as JSON: the parameters of the whole model, and those that '
        "one of P tensor-parallel ranks holds. Nothing is allocated.",
        allow_abbrev=False,
    )
    _model_arguments(params)
    params.add_argument("--tp", type=int, default=1, metavar="P", help="tensor-parallel ranks (default: %(default)s)")
    params.add_argument(
        "--layout",
        nargs="?",
        type=int,
        const=224,
        metavar="SIDE",
        help="print instead how each layer is held and what a training step on 8 images of SIDE x SIDE pixels sends "
        "(default: %(const)s)",
    )
    params.set_defaults(run=_params)
    report = commands.add_parser(
        "report",
        help="tables and figures of finished training runs, beside the paper's",
        description="Turn the rows of finished training runs into the paper's tables beside its printed figures, and "
        "into plots of training loss against epoch and of test error against N.",
        allow_abbrev=False,
    )
    report.add_argument("sources", nargs="+", metavar="SOURCE", help="a folder of runs, or a file of rows (JSON lines)")
    report.add_argument("--output", default="report", metavar="DIR", help="(default: %(default)s)")
    report.set_defaults(run=_report)
    add_bench_parser(commands)
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="wrn-28-10",
        help=f"wrn-<depth>-<width>, {IMAGENET_WIDE_RESNET}, {MOBILENET_V2}, torchvision:<name> or timm:<name> "
        "(default: %(default)s)",
    )
    parser.add_argument("--conv", default="gc-2l", help=f"{', '.join(CONVOLUTIONS)} (default: %(default)s)")
    parser.add_argument("--groups", type=int, help="N (default: 4; 1 for sc)")
    parser.add_argument("--num-classes", type=int, metavar="C", help="default: the data set's, or 10 or 1000")
    parser.add_argument(
        "--coarse-everywhere",
        action="store_true",
        help=f"a coarse level in the last 1x1 convolution of {MOBILENET_V2} too, which is a group convolution else",
    )
    parser.add_argument(
        "--coarse-kernel-size", type=int, metavar="D0", help="of the restriction (default: that of its convolution)"
    )
    parser.add_argument(
        "--coarse-init",
        default=COARSE_INITS[0],
        help=f"{', '.join(COARSE_INITS)}: initial weights (default: %(default)s)",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 1 a measurement failed, 2 a mistake in the arguments,
    128 + n ended by signal n."""
    launch = Launch()
    try:
        launch = Launch.detect()
        options = _parser().parse_args(arguments)
        if options.command in ("train", "params") and options.groups is None:
            options.groups = 1 if options.conv == "sc" else 4
        return int(options.run(options, launch))
    except UsageError as error:
        if launch.rank == 0:
            leave_verdict(2, f"error: {error}")
            print(f"tlgc-mp: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def entry() -> NoReturn:
    """The process's entry point: :func:`main`, and an end that no other rank can hold up.

    A rank that fails leaves without the usual farewell: waiting at exit for ranks that wait for this one (MPI's does)
    would hang the job, where a launcher that sees a non-zero status ends it.
    """
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if status == 0 and "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()  # its threads must not outlive the interpreter
    try:
        launch = Launch.detect()
    except UsageError:  # has been said
        launch = Launch()
    if status == 0 or (status != 1 and launch.world == 1):
        sys.exit(status)
    if status == 2 and launch.rank != 0:
        time.sleep(1.0)  # a launcher that sees this rank leave ends rank 0, which has something to say
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _params(options: Any, launch: Launch) -> int:
    check_model(options.model, options.conv, options.groups, options.num_classes, options.coarse_everywhere)
    check_coarse_level(options.conv, options.coarse_kernel_size, options.coarse_init)
    check_split(options.model, options.conv, options.groups, options.tp)
    from tlgc_mp.models.factory import create_meta_model
    from tlgc_mp.parallel.plan import parameter_counts

    model = create_meta_model(
        options.model,
        conv=options.conv,
        groups=options.groups,
        num_classes=options.num_classes,
        coarse_everywhere=options.coarse_everywhere,
        coarse_kernel_size=options.coarse_kernel_size,
        coarse_init=options.coarse_init,
    )
    if options.layout is None:
        print(json.dumps(parameter_counts(model, options.tp)))
        return 0
    if not 1 <= options.layout <= 65536:
        raise UsageError(f"--layout must be a number of pixels, got {options.layout}; use e.g. 224")
    import torch

    from tlgc_mp.parallel.report import layout_report

    images = torch.empty(8, 3, options.layout, options.layout, device="meta")
    print(layout_report(model, images, tensor_parallel=options.tp))
    return 0


def _export(options: Any, launch: Launch) -> int:
    find_checkpoint(options.checkpoint)  # before torch is loaded
    from tlgc_mp.checkpoint.offline import export_checkpoint

    arguments = export_checkpoint(options.checkpoint, options.output)
    print(f"Wrote {arguments['name']}, {arguments['conv']}, {arguments['groups']} groups, to {options.output}")
    return 0


def _reshard(options: Any, launch: Launch) -> int:
    find_checkpoint(options.checkpoint)  # before torch is loaded
    from tlgc_mp.checkpoint.offline import reshard_checkpoint

    print(f"Wrote {reshard_checkpoint(options.checkpoint, options.output, options.tp)}")
    return 0


def _launch(options: Any, launch: Launch) -> int:
    from tlgc_mp.training import restarts

    command = options.launch[1:] if options.launch[:1] == ["--"] else options.launch
    return restarts.run(command, options.max_restarts, lambda words: _parser().parse_args(words))


def _report(options: Any, launch: Launch) -> int:
    from tlgc_mp.bench import training_report

    training_report.write(options.sources, options.output)
    print(f"Wrote report.md, rows.jsonl and the figures to {options.output}")
    return 0


def _train(options: Any, launch: Launch) -> int:
    from tlgc_mp.training.settings import resolve

    settings = resolve(options, launch)
    from tlgc_mp.parallel.engine import use_huge_pages
    from tlgc_mp.parallel.quiet import quiet_start

    use_huge_pages()
    # A rank whose peer is gone says so itself, in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if launch.rank == 0:
        print("Loading torch and deepspeed ...", flush=True)
    with quiet_start():
        from tlgc_mp.training.interrupt import Interrupted
        from tlgc_mp.training.loop import train
        from tlgc_mp.training.watchdog import Watchdog
    try:
        with Watchdog(settings.topology, settings.output_dir, settings.rank_timeout) as watchdog:
            train(settings, launch, watchdog)
    except Interrupted as stopped:
        return 128 + stopped.signal
    except Failed as failed:
        return failed.status
    return 0
