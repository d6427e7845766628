"""What a training run is to do, checked as far as it can be before torch is loaded.

The command line, the recipe and the DeepSpeed configuration each say a part. What they say twice must agree; where they
do not, the run is refused before it starts.
"""

from __future__ import annotations

import hashlib
import os
import sys
from argparse import Namespace
from dataclasses import dataclass, fields
from typing import cast

from tlgc_mp.checkpoint.folder import Run, find_checkpoint, is_exported, saved_run
from tlgc_mp.data import check_dataset
from tlgc_mp.engine.compiled import check_compiled
from tlgc_mp.engine.config import check_values, read_config, section, tensor_parallel_size, zero_stage
from tlgc_mp.errors import UsageError, is_count, is_number, must_be, printable, shown
from tlgc_mp.host import usable_cores
from tlgc_mp.json_types import JsonObject
from tlgc_mp.models.names import check_split, library_model
from tlgc_mp.parallel.topology import Launch, Topology, default_tensor_parallel
from tlgc_mp.training.changes import check_resumed, find_resumed, named_here
from tlgc_mp.training.options import TrainOptions, check_network, check_options
from tlgc_mp.training.recipes import Recipe, default_recipe, departures, find_recipe, with_flags
from tlgc_mp.training.runs import check_free

DEFAULT_CONFIG: JsonObject = {"zero_optimization": {"stage": 1}}
"""The DeepSpeed configuration where none is given."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(TrainOptions):
    """A training run, every choice made.

    Attributes:
        deepspeed_config: complete.
        method: the recipe, as the options have it.
        micro_batch: samples a replica works on at once.
        accumulation: micro-batches an optimizer step.
        topology: this rank's place among P x D.
        resume_from: the checkpoint to go on from, as (folder of checkpoints, tag); ``None`` starts afresh.
        fingerprint: of the folder of images, where they are in one and once it was read.
    """

    groups: int
    recipe: str
    epochs: int
    batch_size: int
    learning_rate: float
    workers: int
    output_dir: str
    deepspeed_config: JsonObject
    method: Recipe
    micro_batch: int
    accumulation: int
    topology: Topology
    resume_from: tuple[str, str] | None
    fingerprint: str | None = None

    def description(self) -> Run:
        """What the run is: the model, what it trains on and how, and how it is spread over ranks."""
        described = [option.name for option in fields(TrainOptions) if option.metadata["described"]]
        run = {
            **{name: getattr(self, name) for name in described},
            "data_dir": None if self.data_dir is None else os.path.abspath(self.data_dir),
            "data_fingerprint": self.fingerprint,
            "departures": departures(self.recipe, self.method),
            "tensor_parallel": self.topology.tensor_parallel,
            "data_parallel": self.topology.data_parallel,
            "zero_stage": zero_stage(self.deepspeed_config),
            "accumulation": self.accumulation,
        }
        return cast(Run, run)


def resolve(options: Namespace, launch: Launch) -> TrainSettings:
    """Turns parsed command-line ``options`` into a complete run.

    Raises:
        UsageError: an option that cannot work, two that contradict each other, a data set, configuration or checkpoint
            that is not as it should be.
    """
    check_network(options)
    check_dataset(options.dataset, options.data_dir, options.val_split)
    if options.num_classes is not None and options.dataset != "synthetic":
        raise must_be("--num-classes", f"left out with --dataset {options.dataset}", options.num_classes)
    if options.activation_checkpointing and library_model(options.model) is not None:
        raise UsageError(
            f"--activation-checkpointing must be left out with --model={options.model}, whose blocks are not known; "
            "in your own code, tlgc_mp.checkpoint_activations takes them"
        )
    recipe_name = options.recipe or default_recipe(options.dataset)
    recipe = find_recipe(recipe_name)
    epochs = recipe.epochs if options.epochs is None else options.epochs
    check_options(options)

    config = dict(DEFAULT_CONFIG) if options.deepspeed_config is None else read_config(options.deepspeed_config)
    zero_stage(config)
    check_values(config)
    recipe = with_flags(recipe, options, config)
    if recipe.warmup_epochs >= epochs:
        raise UsageError(f"--warmup-epochs must be less than the {epochs} epochs, got {recipe.warmup_epochs}")
    topology = _topology(options, config, launch)
    if options.compile:
        check_compiled(options.model, topology.tensor_parallel, options.activation_checkpointing)
    output_dir = output_folder(options)
    try:
        resume_from = None if options.resume is None else find_resumed(options.resume, output_dir)
        saved = None if resume_from is None else saved_run(*resume_from)
    except UsageError as error:
        raise UsageError(f"--resume: {error}") from None
    named = named_here(options, config)
    micro_batch, accumulation = _batches(options, config, recipe, topology, saved)
    given = {option.name: getattr(options, option.name) for option in fields(TrainOptions)}
    resolved = {
        "recipe": recipe_name,
        "epochs": epochs,
        "batch_size": micro_batch * accumulation * topology.data_parallel,
        "learning_rate": _learning_rate(options, config, recipe),
        "workers": default_workers(options.dataset, launch.local_world) if options.workers is None else options.workers,
        "output_dir": output_dir,
        "init_from": None if options.init_from is None else os.path.abspath(options.init_from),
        "deepspeed_config": config,
    }
    settings = TrainSettings(
        **{**given, **resolved},
        method=recipe,
        micro_batch=micro_batch,
        accumulation=accumulation,
        topology=topology,
        resume_from=resume_from,
    )
    if saved is None:
        _check_weights(settings.init_from)
        check_free(output_dir, "--output-dir", "give --resume")
    else:
        check_resumed(settings, saved, named)
    return settings


def output_folder(options: Namespace) -> str:
    """Where a run with the parsed ``options`` writes."""
    if options.output_dir:
        return str(options.output_dir)
    data = options.dataset
    if data == "imagefolder" and isinstance(options.data_dir, str):  # of which there are many
        place = os.path.realpath(options.data_dir)
        digest = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:6]
        data = f"{data}-{printable(os.path.basename(place))}-{digest}"
    return os.path.join("runs", f"{options.model.replace(':', '-')}-{options.conv}-{options.groups}-{data}")


def _topology(options: Namespace, config: JsonObject, launch: Launch) -> Topology:
    """P from --tp or the configuration, which must agree; put into the configuration."""
    configured = tensor_parallel_size(config)
    if options.tp is not None and configured is not None and options.tp != configured:
        raise UsageError(
            f"--tp must be tensor_parallel.autotp_size of the DeepSpeed configuration, {configured}, got {options.tp}; "
            "give one of them, or the same in both"
        )
    ranks = options.tp if options.tp is not None else configured
    if ranks is None:
        ranks = default_tensor_parallel(launch.world, launch.local_world, options.conv, options.groups)
    check_split(options.model, options.conv, options.groups, ranks)
    topology = Topology(launch.world, launch.rank, ranks)
    if ranks > 1:
        config["tensor_parallel"] = {**section(config, "tensor_parallel"), "autotp_size": ranks}
    else:
        config.pop("tensor_parallel", None)
    return topology


def _batches(
    options: Namespace, config: JsonObject, recipe: Recipe, topology: Topology, saved: Run | None
) -> tuple[int, int]:
    """(micro-batch a replica, micro-batches a step), from --batch-size and the configuration, which must agree.

    Where neither says how a step is divided, a resumed run keeps its micro-batch, over which BatchNorm's statistics go,
    however many replicas there are now.
    """
    replicas = topology.data_parallel
    given: dict[str, int] = {}
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = config.get(key)
        if value in (None, "auto"):
            config.pop(key, None)
            continue
        if not is_count(value):
            raise UsageError(f"{key} in the DeepSpeed configuration must be 1 or more, got {shown(value)}; give an int")
        given[key] = value
    accumulation = given.get("gradient_accumulation_steps", 1)
    micro = given.get("train_micro_batch_size_per_gpu")
    configured = given.get("train_batch_size")
    if configured is not None and micro is not None:
        if "gradient_accumulation_steps" not in given:
            accumulation = max(1, configured // (micro * replicas))
        if configured != micro * accumulation * replicas:
            raise UsageError(
                f"train_batch_size in the DeepSpeed configuration must be {micro * accumulation * replicas}, "
                f"train_micro_batch_size_per_gpu={micro} x gradient_accumulation_steps={accumulation} x {replicas} "
                f"replicas, got {configured}"
            )
    elif micro is not None:
        configured = micro * accumulation * replicas
    if options.batch_size is not None and configured is not None and options.batch_size != configured:
        raise UsageError(
            f"--batch-size must be the batch that the DeepSpeed configuration sets, {configured}, got "
            f"{options.batch_size}; give one of them, or the same in both"
        )
    batch = options.batch_size or configured or recipe.batch_size
    if saved is not None and not {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} & given.keys():
        kept = saved["batch_size"] // (saved["accumulation"] * saved["data_parallel"])
        if batch % (replicas * kept) == 0:
            accumulation = batch // (replicas * kept)
    if batch % (replicas * accumulation):
        raise UsageError(
            f"the batch must be a multiple of {replicas * accumulation}, {replicas} replicas x {accumulation} "
            f"accumulation steps, got {batch}"
        )
    micro = batch // (replicas * accumulation)
    config["train_batch_size"] = batch
    config["train_micro_batch_size_per_gpu"] = micro
    config["gradient_accumulation_steps"] = accumulation
    return micro, accumulation


def _learning_rate(options: Namespace, config: JsonObject, recipe: Recipe) -> float:
    """The initial rate, from --learning-rate, the configuration's optimizer or the recipe."""
    if config.get("optimizer") is None:
        if zero_stage(config) > 0:
            config.setdefault("zero_allow_untested_optimizer", True)
        return recipe.learning_rate if options.learning_rate is None else options.learning_rate
    optimizer = section(config, "optimizer")
    rate = section(optimizer, "params").get("lr")
    if rate is None or not isinstance(optimizer.get("type"), str):
        raise UsageError(
            'optimizer in the DeepSpeed configuration must be {"type": ..., "params": {"lr": ...}}, got '
            f"{shown(config['optimizer'])}"
        )
    if not is_number(rate) or not 0 < rate <= sys.float_info.max:
        raise UsageError(
            f"optimizer.params.lr in the DeepSpeed configuration must be a positive number, got {shown(rate)}; use "
            "e.g. 0.1"
        )
    configured = float(rate)
    if options.learning_rate is not None and options.learning_rate != configured:
        raise UsageError(
            f"--learning-rate must be optimizer.params.lr of the DeepSpeed configuration, {configured}, got "
            f"{options.learning_rate}; give one of them, or the same in both"
        )
    return configured


def default_workers(dataset: str, ranks: int) -> int:
    """Data worker processes for each of a node's ``ranks``: none where drawing a sample costs next to nothing, and as
    many as the node's cores allow, four at most, where images are decoded."""
    if dataset in ("digits", "synthetic"):
        return 0
    return max(1, min(4, usable_cores() // ranks))


def _check_weights(init_from: str | None) -> None:
    """Refuses what holds no weights to begin with, as far as can be seen from outside."""
    if init_from is not None and not is_exported(init_from):
        try:
            find_checkpoint(init_from)
        except UsageError as error:
            raise UsageError(f"--init-from: {error}, or a file that tlgc-mp export wrote") from None
