"""``tlgc-mp plan``: its arguments. Loads no torch before they are checked."""

from __future__ import annotations

from argparse import Namespace

from tlgc_mp.cli.options import Commands, add_options, check_alone
from tlgc_mp.parallel.topology import Launch
from tlgc_mp.planner.devices import DEVICES, DTYPES
from tlgc_mp.planner.settings import resolve
from tlgc_mp.training.options import ModelOptions
from tlgc_mp.training.recipes import OPTIMIZERS, RECIPES


def add_plan_parser(commands: Commands) -> None:
    """Adds ``plan`` to the subparsers ``commands``."""
    plan = commands.add_parser(
        "plan",
        help="does it fit, how fast is it, and on how many devices: without running it",
        description="Run a training step of a model as one rank of many holds it, without memory and without a "
        "network, and tell for every choice of N (where --groups does not say), P, D, ZeRO stage, micro-batch, "
        "activation checkpointing and offload what a rank holds at its peak, what it sends, and how long a step "
        "takes; with the command that starts the fastest one that fits. The exit status is 1 where none does.",
        allow_abbrev=False,
    )
    add_options(plan, ModelOptions)
    plan.add_argument("--batch-size", type=int, metavar="B", help="images a step over all replicas (default: 128)")
    plan.add_argument("--image-size", type=int, metavar="PIXELS", help="(default: 32 for wrn-*, else 224)")
    plan.add_argument("--gpu", default="h200", help=f"of each rank: {', '.join(DEVICES)} (default: %(default)s)")
    plan.add_argument("--calibrated", metavar="FILE", help="a device that --calibrate measured, in place of --gpu")
    plan.add_argument("--calibrate", metavar="FILE", help="measure the device at hand, write FILE, and end")
    plan.add_argument("--memory", metavar="SIZE", help="of a rank, as 24GiB (default: the device's)")
    plan.add_argument("--ranks", type=int, metavar="R", help="in all, P x D (default: 1, or those of --hosts)")
    plan.add_argument("--hosts", metavar="HxR", help="hosts, and ranks of each (default: 8 ranks a host)")
    plan.add_argument("--network", default="100Gbit", metavar="RATE", help="of a host (default: %(default)s)")
    plan.add_argument("--tp", type=int, metavar="P", help="tensor-parallel ranks (default: every number that works)")
    plan.add_argument("--optimizer", default="sgd", help=f"{', '.join(OPTIMIZERS)} (default: %(default)s)")
    plan.add_argument("--dtype", default="fp32", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    plan.add_argument("--recipe", help=f"{', '.join(RECIPES)}: for the hours that it takes (default: by model)")
    plan.add_argument("--output", metavar="DIR", help="a folder to write plan.json, plan.md and plan.png to")
    plan.set_defaults(run=_plan)


def _plan(options: Namespace, launch: Launch) -> int:
    check_alone("plan", launch)
    if options.calibrate is not None:
        from tlgc_mp.planner.calibrate import calibrate

        return calibrate(options.calibrate)
    settings = resolve(options)
    from tlgc_mp.engine.quiet import quiet_start

    with quiet_start():
        import tlgc_mp.engine.recompute  # noqa: F401  # which loads deepspeed
        from tlgc_mp.planner import command

    return command.run(settings)
