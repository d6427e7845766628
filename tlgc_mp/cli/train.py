"""A run of ``tlgc-mp train``: the same under every launcher, on one rank or many."""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from dataclasses import replace

import torch
import torch.distributed as dist

from tlgc_mp.cli.options import write
from tlgc_mp.data import Datasets, EvaluationBatches, TrainingBatches, load_datasets
from tlgc_mp.engine import checkpoint_activations, initialize
from tlgc_mp.engine.compiled import compile_training
from tlgc_mp.engine.config import dtype_of
from tlgc_mp.engine.monitors import leave_to_the_main_thread
from tlgc_mp.engine.start import start_distributed
from tlgc_mp.errors import printable
from tlgc_mp.host import usable_cores
from tlgc_mp.parallel.plan import parameter_counts
from tlgc_mp.parallel.sharding import effective_parameters
from tlgc_mp.parallel.topology import Launch
from tlgc_mp.resilience.claim import claimed
from tlgc_mp.resilience.interrupt import StopRequest
from tlgc_mp.resilience.watchdog import Watchdog
from tlgc_mp.training import optimization
from tlgc_mp.training.changes import check_data
from tlgc_mp.training.console import say
from tlgc_mp.training.evaluation import EVALUATION_BATCH, reduced
from tlgc_mp.training.headline import average_note, headline
from tlgc_mp.training.metrics import peak_memory_bytes, print_summary
from tlgc_mp.training.model import check_library, model_of
from tlgc_mp.training.protocols import steps_of
from tlgc_mp.training.recipe_trainer import RecipeTrainer
from tlgc_mp.training.settings import TrainSettings

MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")
"""Sections of a DeepSpeed configuration that have the engine report."""


def train(options: Namespace, settings: TrainSettings, launch: Launch, watchdog: Watchdog) -> None:
    """Trains a model as ``settings`` say, evaluating and saving it every epoch; rank 0 reports.

    Args:
        options: what the settings were made from.
        settings: equal on every rank but for the rank in their topology.
        launch: this rank's place on its node.
        watchdog: entered; it watches from here on until the run ends.

    Raises:
        UsageError: something that only shows now is the user's to mend, a damaged image, say.
        Interrupted: a signal asked the run to stop; a checkpoint was saved.
    """
    _use_cores(launch)
    leave_to_the_main_thread()
    speaks, config = settings.topology.rank == 0, settings.deepspeed_config
    check_library(settings)
    say(f"Reading {settings.dataset} ...", speaks)
    data = load_datasets(
        settings.dataset,
        settings.data_dir,
        seed=settings.seed,
        image_size=settings.image_size,
        num_classes=settings.num_classes,
        val_split=settings.val_split,
    )
    settings = replace(settings, fingerprint=data.fingerprint)
    check_data(settings)
    for note in data.notes:
        say(printable(note), speaks)
    share = {
        "rank": settings.topology.dp_rank,
        "replicas": settings.topology.data_parallel,
        "num_workers": settings.workers,
    }
    batches = TrainingBatches(data.train, batch_size=settings.micro_batch, seed=settings.seed, **share)
    tests = EvaluationBatches(data.test, batch_size=EVALUATION_BATCH, **share)
    images = f"the training set of {len(data.train)} images"
    steps = steps_of(batches, settings.accumulation, settings.limit_steps, images)
    model = model_of(settings, data.num_classes, data.image_size)
    with watchdog.meeting():
        start_distributed()
    watchdog.start()
    if settings.dry_run:
        for monitor in MONITORS:
            config.pop(monitor, None)  # each would begin to write
    with contextlib.nullcontext() if settings.dry_run else claimed(settings.output_dir, settings.resume_from):
        if speaks and not settings.dry_run:
            write(options, settings.output_dir)
        if settings.activation_checkpointing:
            checkpoint_activations(model)
        counts = parameter_counts(model, settings.topology.tensor_parallel)
        say(headline(settings, counts, data, steps), speaks)
        if note := average_note(settings, steps):
            say(note, speaks)
        engine, _, _, _ = initialize(
            model=model,
            optimizer=None if "optimizer" in config else optimization.make_optimizer(settings),
            lr_scheduler=None if "scheduler" in config else optimization.make_scheduler(settings, steps),
            config=config,
            seed=settings.seed,
            sample_inputs=torch.empty(settings.micro_batch, 3, data.image_size, data.image_size, device="meta"),
        )
        trainer = RecipeTrainer(settings, engine, data, batches, tests)
        trainer.begin()
        if settings.dry_run:
            watchdog.workers.may_end()
            say("Nothing is trained or written (--dry-run)", speaks)
            return
        if settings.compile:
            say(f"The first step compiles the model ({compile_training(engine)}), which takes a while", speaks)
        with StopRequest(agreed=watchdog.workers.may_end) as stop, trainer.profiler:
            saved = trainer.train(stop)
        watchdog.workers.may_end()
        _report(trainer, data, counts, saved)


def _report(trainer: RecipeTrainer, data: Datasets, counts: dict[str, int], saved: str) -> None:
    """Writes and prints what came of a run that is over. Collective."""
    settings, engine, metrics = trainer.settings, trainer.engine, trainer.metrics
    peak = torch.tensor(peak_memory_bytes(), dtype=torch.int64)
    peak = reduced(peak.to(engine.device), dist.ReduceOp.MAX)
    effective = effective_parameters(engine.module) if settings.conv == "flgc" else None
    if not trainer.speaks:
        return
    metrics.write_result(
        {
            **settings.description(),
            "dtype": dtype_of(settings.deepspeed_config),
            "num_classes": data.num_classes,
            "parameters": counts["total"],
            "parameters_per_rank": counts["per_rank"],
            "effective_parameters": effective,
            "peak_memory_bytes": int(peak),
        }
    )
    best, last = metrics.best("test_error_percent"), metrics.lines[-1]
    error = f"{last['test_error_percent']:.2f} % after epoch {last['epoch']}"
    print_summary(
        [
            ("test error", f"{error} (best {best['test_error_percent']:.2f} %, epoch {best['epoch']})"),
            ("time", f"{last['seconds']:.1f} s of training and evaluation"),
            ("parameters", f"{counts['total']:,} in all, {counts['per_rank']:,} a rank"),
            ("peak memory", f"{int(peak) / 2**20:,.0f} MiB, the largest of {settings.topology.world} rank(s)"),
            ("checkpoint", saved),
            ("saving", f"{trainer.save_seconds:.1f} s in which training waited for {trainer.saves} checkpoint(s)"),
            *([("profile", trainer.profiler.told)] if settings.profile is not None else []),
            ("metrics", f"{metrics.path}, and for TensorBoard in {settings.output_dir}"),
        ]
    )


def _use_cores(launch: Launch) -> None:
    """Shares a node's cores among its ranks, unless the launcher has set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // launch.local_world))
