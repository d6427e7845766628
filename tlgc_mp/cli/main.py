"""The ``tlgc-mp`` command.

What can be checked is checked before torch is loaded. Every rank of a launch checks the same, so only rank 0 tells.
"""

from __future__ import annotations

import argparse
import importlib.resources
import io
import json
import os
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from typing import NoReturn

from tlgc_mp import __version__
from tlgc_mp.checkpoint.folder import find_checkpoint
from tlgc_mp.cli.bench import add_bench_parser
from tlgc_mp.cli.options import DataOfRun, Parser, add_options, add_train_parser, data_of_run, parse
from tlgc_mp.cli.plan import add_plan_parser
from tlgc_mp.data.catalog import DATASETS, check_dataset
from tlgc_mp.engine.config import zero_stage
from tlgc_mp.errors import UsageError, check_installed, one_of, printable
from tlgc_mp.host import keep_freed_memory, replace_file, use_huge_pages
from tlgc_mp.models.names import check_split
from tlgc_mp.parallel.topology import Launch
from tlgc_mp.resilience.verdicts import Failed, leave_verdict
from tlgc_mp.training.options import LARGEST_WORKERS, ModelOptions, check_network, model_arguments
from tlgc_mp.training.settings import default_workers

_FIRST_WORD_SECONDS = 5.0
"""What rank 0 gets, once another has found a mistake, to find and tell it too; processes of a busy host start apart."""


def _parser() -> Parser:
    parser = Parser(
        prog="tlgc-mp",
        description="Two-level group convolution across devices, inside a DeepSpeed engine.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tlgc-mp {__version__}")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    add_train_parser(commands, run=_train)

    again = commands.add_parser(
        "launch",
        help="start a launch of training, and start it again from its newest checkpoint when it fails",
        description="Run COMMAND, any launch of tlgc-mp train under any launcher, and when it fails make sure that "
        "nothing of it is left and run it again, with --resume where its output folder holds a checkpoint. A run that "
        "ended well, has a mistake in its options (status 2) or was asked to stop is not run again. SIGINT, SIGTERM "
        "and SIGUSR1 are passed on. The exit status is the last attempt's. With --mpi or --hosts it is mpirun that "
        "starts COMMAND, of which `train OPTIONS` is enough; MPIRUN_FLAGS in the environment adds flags of mpirun.",
        usage="tlgc-mp launch [--max-restarts N] [--mpi P] [--hosts HOST:P,...] -- COMMAND ...",
        allow_abbrev=False,
    )
    again.add_argument("--max-restarts", type=int, default=3, metavar="N", help="at most (default: %(default)s)")
    again.add_argument("--mpi", type=int, metavar="P", help="start P ranks of COMMAND under mpirun")
    again.add_argument(
        "--hosts",
        metavar="HOST:P,...",
        help="the hosts of these ranks, under mpirun, with how many each takes: node1:2,node2:2",
    )
    again.add_argument("launch", nargs=argparse.REMAINDER, metavar="COMMAND", help="deepspeed, mpirun, torchrun, ...")
    again.set_defaults(run=_launch)

    config = commands.add_parser(
        "config",
        help="print one of the DeepSpeed configurations that come with the package",
        description="Print a DeepSpeed configuration, for a file that train --deepspeed_config takes: tlgc-mp config "
        "zero2 > zero2.json. Without NAME, list them all.",
        allow_abbrev=False,
    )
    config.add_argument("name", nargs="?", metavar="NAME", help="zero2, for example")
    config.set_defaults(run=_config)
    export = commands.add_parser(
        "export",
        help="write a checkpoint's weights as one safetensors file, for one device and torch alone",
        description="Write the weights and running statistics of a checkpoint, of any number of ranks, as one "
        "safetensors file. tlgc_mp.load_model makes the model from it, without deepspeed.",
        allow_abbrev=False,
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output folder, or one of its checkpoints")
    export.add_argument("output", metavar="OUT", help="the file to write")
    export.add_argument(
        "--fold",
        action="store_true",
        help="for inference: two-level layers as torch's own convolutions, BatchNorm folded into them",
    )
    export.set_defaults(run=_export)
    evaluation = commands.add_parser(
        "evaluate",
        help="test a trained network on a data set: error, loss, accuracy of each class",
        description="Test the network of a run or an exported file on the test images of a data set, by default those "
        "of the run.",
        allow_abbrev=False,
    )
    evaluation.add_argument("network", metavar="RUN|FILE", help="a run, one of its checkpoints or an exported file")
    evaluation.add_argument("--dataset", help=f"{', '.join(DATASETS)} (default: the run's)")
    evaluation.add_argument("--data-dir", metavar="DIR", help="where the images are (default: the run's)")
    evaluation.add_argument("--val-split", metavar="NAME", help="folder in DIR to test on (default: the run's)")
    evaluation.add_argument("--workers", type=int, metavar="W", help="data worker processes (default: by data set)")
    evaluation.add_argument("--output", metavar="JSON", help="a file to write the figures to, too")
    evaluation.set_defaults(run=_evaluate)
    predict = commands.add_parser(
        "predict",
        help="say which classes a trained network sees in pictures",
        description="Print the likeliest classes of each picture, as the network of a run or an exported file sees it.",
        allow_abbrev=False,
    )
    predict.add_argument("network", metavar="RUN|FILE", help="a run, one of its checkpoints or an exported file")
    predict.add_argument("pictures", nargs="+", metavar="IMAGE", help="files")
    predict.add_argument("--top", type=int, default=3, metavar="K", help="classes to name (default: %(default)s)")
    predict.set_defaults(run=_predict)
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
    add_options(params, ModelOptions)
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
    add_plan_parser(commands)
    add_bench_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 1 a measurement failed, 2 a mistake in the arguments,
    128 + n ended by signal n."""
    launch = Launch()
    try:
        launch = Launch.detect()
        options = parse(_parser(), sys.argv[1:] if arguments is None else arguments, launch.world)
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not fit the encoding, or be text
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
        time.sleep(_FIRST_WORD_SECONDS)  # a launcher that sees this rank leave ends rank 0, which may not have spoken
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _params(options: Namespace, launch: Launch) -> int:
    check_network(options)
    check_split(options.model, options.conv, options.groups, options.tp)
    from tlgc_mp.models.factory import create_meta_model
    from tlgc_mp.parallel.plan import parameter_counts

    model = create_meta_model(options.model, **model_arguments(options, options.num_classes))
    if options.layout is None:
        print(json.dumps(parameter_counts(model, options.tp)))
        return 0
    if not 1 <= options.layout <= 65536:
        raise UsageError(f"--layout must be a number of pixels, got {options.layout}; use e.g. 224")
    import torch

    from tlgc_mp.models.libraries import FRAMES, takes_videos
    from tlgc_mp.parallel.report import layout_report

    frames = (FRAMES,) if takes_videos(options.model) else ()
    images = torch.empty(8, 3, *frames, options.layout, options.layout, device="meta")
    print(layout_report(model, images, tensor_parallel=options.tp))
    return 0


def _export(options: Namespace, launch: Launch) -> int:
    find_checkpoint(options.checkpoint)  # before torch is loaded
    from tlgc_mp.checkpoint.offline import export_checkpoint

    arguments = export_checkpoint(options.checkpoint, options.output, folded=options.fold)
    if arguments is None:
        print(f"Wrote the weights to {options.output}; the model is your own code's, which loads them")
    else:
        folded = ", folded" if options.fold else ""
        described = f"{arguments['name']}, {arguments['conv']}, {arguments['groups']} groups{folded}"
        print(f"Wrote {described}, to {options.output}")
    return 0


def _evaluate(options: Namespace, launch: Launch) -> int:
    known = data_of_run(options.network)
    dataset, data_dir = options.dataset or known.get("dataset"), options.data_dir
    if dataset is None:
        raise UsageError(f"--dataset must be given for an exported file, got none; use {one_of(DATASETS)}")
    same: DataOfRun = known if dataset == known.get("dataset") and data_dir in (None, known.get("data_dir")) else {}
    data_dir, val_split = data_dir or same.get("data_dir"), options.val_split or same.get("val_split")
    check_dataset(dataset, data_dir, val_split)  # before torch is loaded
    if options.workers is not None and not 0 <= options.workers <= LARGEST_WORKERS:
        raise UsageError(f"--workers must be 0 to {LARGEST_WORKERS}, got {options.workers}")
    from tlgc_mp.training import inference

    workers = default_workers(dataset, 1) if options.workers is None else options.workers
    found = inference.score(
        options.network,
        dataset,
        data_dir,
        workers=workers,
        image_size=same.get("image_size"),
        num_classes=same.get("num_classes"),
        val_split=val_split,
        seed=same.get("seed", 0),
    )
    accuracies = {printable(name): value for name, value in found["class_accuracy_percent"].items()}
    width = max(len(name) for name in ("top-5 error", *accuracies)) + 2
    rows = [("images", f"{found['images']:,}"), ("loss", f"{found['loss']:.4f}")]
    rows += [("top-1 error", f"{found['error_percent']:.2f} %")]
    if found["top5_error_percent"] is not None:
        rows += [("top-5 error", f"{found['top5_error_percent']:.2f} %")]
    rows += [(name, "no images" if value is None else f"{value:.2f} % right") for name, value in accuracies.items()]
    print("\n".join(f"{name:<{width}}{value}" for name, value in rows))
    if options.output is not None:
        try:
            replace_file(options.output, json.dumps(found) + "\n")
        except OSError as error:
            raise UsageError(f"--output must be a file to write, got {options.output!r}: {error.strerror}") from None
    return 0


def _predict(options: Namespace, launch: Launch) -> int:
    if options.top < 1:
        raise UsageError(f"--top must be 1 or more, got {options.top}")
    for picture in options.pictures:
        if not os.path.isfile(picture):
            raise UsageError(f"IMAGE must be a file, got {picture!r}")
    from tlgc_mp.training import inference

    for picture, classes in inference.label(options.network, options.pictures, options.top):
        line = f"{picture}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in classes)
        print(printable(line), flush=True)
    return 0


def _reshard(options: Namespace, launch: Launch) -> int:
    find_checkpoint(options.checkpoint)  # before torch is loaded
    from tlgc_mp.checkpoint.offline import reshard_checkpoint

    print(f"Wrote {reshard_checkpoint(options.checkpoint, options.output, options.tp)}")
    return 0


def _launch(options: Namespace, launch: Launch) -> int:
    from tlgc_mp.resilience import restarts

    command = options.launch[1:] if options.launch[:1] == ["--"] else options.launch
    if options.mpi is not None or options.hosts is not None:
        from tlgc_mp.cli.mpi import mpi_command

        command = mpi_command(command, options.mpi, options.hosts)
    return restarts.run(command, options.max_restarts, lambda words: parse(_parser(), words, launch.world))


def _config(options: Namespace, launch: Launch) -> int:
    folder = importlib.resources.files("tlgc_mp") / "ds_configs"
    texts = {file.name.removesuffix(".json"): file.read_text(encoding="utf-8") for file in folder.iterdir()}
    if options.name is not None and options.name not in texts:
        raise UsageError(
            f"NAME must be a configuration of the package, got {options.name!r}; use {one_of(sorted(texts))}"
        )
    if options.name is not None:
        print(texts[options.name], end="")
    else:
        width = max(map(len, texts)) + 2
        print("\n".join(f"{name:<{width}}{json.dumps(json.loads(text))}" for name, text in sorted(texts.items())))
    return 0


def _report(options: Namespace, launch: Launch) -> int:
    check_installed("matplotlib", "bench", "report")
    from tlgc_mp.paper import report as training_report

    training_report.write(options.sources, options.output)
    print(f"Wrote report.md, rows.jsonl and the figures to {options.output}")
    return 0


def _train(options: Namespace, launch: Launch) -> int:
    from tlgc_mp.training.settings import resolve

    settings = resolve(options, launch)
    from tlgc_mp.engine.quiet import quiet_start

    use_huge_pages()
    # A rank whose peer is gone says so itself, in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler tells of a GPU that is not there
    if launch.rank == 0:
        print("Loading torch and deepspeed ...", flush=True)
    with quiet_start():
        from deepspeed.accelerator import get_accelerator

        from tlgc_mp.cli.train import train
        from tlgc_mp.resilience.interrupt import Interrupted
        from tlgc_mp.resilience.watchdog import Watchdog
    if get_accelerator().device_name() == "cpu" and zero_stage(settings.deepspeed_config) < 3:
        keep_freed_memory()
    try:
        with Watchdog(settings.topology, settings.output_dir, settings.rank_timeout) as watchdog:
            train(options, settings, launch, watchdog)
    except Interrupted as stopped:
        return 128 + stopped.signal
    except Failed as failed:
        return failed.status
    return 0
